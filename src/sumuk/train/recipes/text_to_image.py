"""A latent text-to-image model from scratch: U-Net and text tower learn, the autoencoder is finished.

Loss = w(t) |output - target|^2 with t uniform over the schedule (Ho et al. 2020) or leaning towards noise and, if
asked for, min-SNR weights (Hang et al. 2023, section 3.4): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v. The
prompt is dropped now and then for classifier-free guidance (Ho & Salimans 2022). The result is an ordinary SD1
single file that carries its own vocabulary in the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sumuk.base.errors import BadInput
from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.diffusion.sample import drive, sample
from sumuk.diffusion.schedule import Level, scaled_linear
from sumuk.diffusion.solver import Ask, Euler
from sumuk.families.sd import HEADS
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import write
from sumuk.nets.clip import ClipShape, ClipText
from sumuk.nets.tokens import ClipTokens
from sumuk.nets.unet import UNet, UNetShape
from sumuk.nets.vae import Vae, vae_shape
from sumuk.train.config import TextToImageRecipe, TrainConfig
from sumuk.train.data import Order, chunks, read_pixels, read_records, seeded, to_signed
from sumuk.train.recipes.vae import SD1_SCALE
from sumuk.train.sheet import tile
from sumuk.weights.checkpoint import load
from sumuk.weights.model import Model


@dataclass(frozen=True)
class Batch:
    """Clean latents [B, C, h, w] and token ids [B, L]."""

    latents: Tensor
    ids: Tensor


class TextToImageTraining:
    """See :class:`sumuk.train.loop.Recipe`."""

    def __init__(self, config: TrainConfig, recipe: TextToImageRecipe) -> None:
        self.recipe, self.size = recipe, config.data.size
        every = read_records(config.data)
        self.records = [r for r in every if r.split == "train"]
        weights = load_file(read_header(recipe.vae).path)  # absent or damaged: refused in one line
        self.vae = Vae(vae_shape({name: tuple(t.shape) for name, t in weights.items()}))
        self.vae.load_state_dict(weights)
        self.vae.requires_grad_(False).eval()
        pixels = to_signed(read_pixels(config.data.root, self.records, config.data.size))
        self.means, self.deviations = self._encode(pixels)
        # Words of the whole folder, so that a run on more of it can go on from this one's weights.
        whole = read_records(config.data.model_copy(update={"styles": (), "objects": None}))
        texts = sorted({text for r in whole for captions in r.captions.values() for text in captions})
        begun = None if recipe.start is None else load(recipe.start, dtype="float32")
        self.tokens = (
            begun.tokens if begun else ClipTokens.train(texts, recipe.vocabulary, recipe.text_length)
        )
        for text in texts:  # found now, not days into the run
            count, room = len(self.tokens.encode(text)), recipe.text_length - 2
            if count > room:
                raise BadInput(
                    f"caption {text!r:.100} has {count} tokens, more than the {room} of "
                    f"text_length {recipe.text_length}"
                )
        channels = self.means.shape[1]
        levels = len(recipe.multiples)
        self.unet = UNet(
            UNetShape(
                in_channels=channels,
                out_channels=channels,
                model_channels=recipe.channels,
                channel_mult=recipe.multiples,
                num_res_blocks=recipe.blocks,
                transformer_depth=(1,) * levels,
                middle_depth=1,
                context_dim=recipe.text_width,
                heads=HEADS,  # a header does not show heads: whoever opens the export takes the family's number
            )
        )
        self.text = ClipText(
            ClipShape(
                width=recipe.text_width,
                depth=recipe.text_layers,
                length=recipe.text_length,
                vocabulary=self.tokens.size,
                hidden=4 * recipe.text_width,
            )
        )
        # CLIP begins with embeddings of 0.02. Larger ones make words differ from the first step on, before the
        # blocks have learned to tell them apart.
        nn.init.normal_(self.text.text_model.embeddings.token_embedding.weight, std=0.2)
        self.modules: dict[str, nn.Module] = {"unet": self.unet, "text": self.text}
        if begun is not None:
            self._begin_from(begun)
        self.prediction = PREDICTIONS[recipe.prediction]
        self.schedule = scaled_linear()
        levels_ = [self.schedule.level(t) for t in range(int(self.schedule.last) + 1)]
        self.alphas = torch.tensor([level.alpha for level in levels_])
        self.sigmas = torch.tensor([level.sigma for level in levels_])
        self.order = Order(len(self.records), config.seed)

    def _begin_from(self, begun: Model) -> None:
        """Take over another model's U-Net and text tower.

        Raises:
            BadInput: it has another shape or prediction, or learned on another autoencoder's latents.
        """
        if begun.prediction.name != self.recipe.prediction:
            raise BadInput(
                f"{self.recipe.start} predicts {begun.prediction.name}, the recipe {self.recipe.prediction}"
            )
        for name, mine, theirs in (
            ("autoencoder", self.vae, begun.vae),
            ("U-Net", self.unet, begun.denoiser),
            ("text tower", self.text, begun.text),
        ):
            if mine.shape != theirs.shape:
                raise BadInput(
                    f"the {name} of {self.recipe.start} has {theirs.shape}, the recipe {mine.shape}"
                )
        others = begun.vae.state_dict()
        if any(
            not torch.equal(value.half(), others[name].half())
            for name, value in self.vae.state_dict().items()
        ):
            raise BadInput(
                f"{self.recipe.start} has another autoencoder than {self.recipe.vae}; its latents differ"
            )
        self.unet.load_state_dict(begun.denoiser.state_dict())
        self.text.load_state_dict(begun.text.state_dict())

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The latent cache: scaled means and deviations [N, C, h, w]."""
        moments = [self.vae.encode(pixels[list(rows)]) for rows in chunks(range(len(pixels)), 64)]
        mean = torch.cat([m.mean for m in moments]) * SD1_SCALE
        deviation = torch.cat([(0.5 * m.log_variance).exp() for m in moments]) * SD1_SCALE
        return mean, deviation

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, L], begun, ended and padded; a caption that is too long is an error of the data."""
        return torch.tensor([self.tokens.row(self.tokens.encode(text)) for text in texts])

    def batch(self, images: int, size: int, random: torch.Generator) -> Batch:
        rows = self.order.batch(images, size)
        noise = torch.randn((size, *self.means.shape[1:]), generator=random)
        latents = self.means[rows] + self.deviations[rows] * noise
        return Batch(latents, self.ids([self._caption(row, random) for row in rows]))

    def _caption(self, row: int, random: torch.Generator) -> str:
        """One of the picture's prompts, language first by a fair coin; or the empty one."""
        dropped, tongue, which = torch.rand(3, generator=random).tolist()
        if dropped < self.recipe.drop_text:
            return ""
        captions = list(self.records[row].captions.values())
        texts = captions[int(tongue * len(captions))]
        return texts[int(which * len(texts))]

    def loss(self, batch: Batch, random: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        clean = batch.latents
        time = self._times(len(clean), random)
        noise = torch.randn(clean.shape, generator=random)
        at = _Levels(self.alphas[time][:, None, None, None], self.sigmas[time][:, None, None, None])
        x = at.alpha * clean + at.sigma * noise
        output = self.unet(x, time.float(), self.text(batch.ids).last).float()
        target = self.prediction.target(clean, noise, at)  # type: ignore[arg-type]
        each = (output - target).square().mean(dim=(1, 2, 3))
        return (self._weights(time) * each).mean(), {"mse": float(each.detach().mean())}

    def _times(self, count: int, random: torch.Generator) -> Tensor:
        """Trained steps [count], uniform or leaning towards noise."""
        u = torch.rand(count, generator=random)
        shift = self.recipe.time_shift
        return (len(self.alphas) * shift * u / (1 + (shift - 1) * u)).long().clamp(max=len(self.alphas) - 1)

    def _weights(self, time: Tensor) -> Tensor:
        if self.recipe.snr_gamma is None:
            return torch.ones(len(time))
        snr = (self.alphas[time] / self.sigmas[time]).square()
        return snr.clamp(max=self.recipe.snr_gamma) / (snr + (self.recipe.prediction == "v"))

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], *, seed: int, steps: int = 20, scale: float = 4.0) -> Tensor:
        """Pictures [N, 3, H, W] in -1..1 by Euler's method, for sheets and evaluation during training."""
        context = self.text(self.ids([*prompts, *[""] * len(prompts)])).last
        shape = (len(prompts), *self.means.shape[1:])
        grid = [self.schedule.level(self.schedule.last * (1 - i / steps)) for i in range(steps)]
        x = torch.randn(shape, generator=seeded(seed, 0))
        latents = drive(
            sample(Euler(), x, [*grid, self.schedule.clean], _no_noise),
            lambda ask: self._answer(ask, context, scale),
        )
        return self.vae.decode(latents / SD1_SCALE)

    def _answer(self, ask: Ask, context: Tensor, scale: float) -> Tensor:
        twice = torch.cat([ask.x, ask.x])
        output = self.unet(twice, torch.full((len(twice),), ask.level.time), context)
        wanted, empty = output.chunk(2)
        return self.prediction.clean(ask.x, empty + scale * (wanted - empty), ask.level)

    def sheet(self) -> Image.Image:
        prompts = self.recipe.sheet_prompts or tuple(
            next(iter(r.captions.values()))[0] for r in self.records[:: max(1, len(self.records) // 32)][:32]
        )
        return tile(self.draw(prompts, seed=0), columns=8)

    def export(self, path: Path) -> None:
        parts = {
            "model.diffusion_model.": self.unet,
            "first_stage_model.": self.vae,
            "cond_stage_model.transformer.": self.text,
        }
        tensors = {
            prefix + name: tensor.detach().half()
            for prefix, module in parts.items()
            for name, tensor in module.state_dict().items()
        }
        prediction = {"eps": "epsilon"}.get(self.recipe.prediction, self.recipe.prediction)
        metadata = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1",
            "modelspec.implementation": "sumuk",
            "modelspec.title": self.recipe.title,
            "modelspec.license": self.recipe.licence,
            "modelspec.resolution": f"{self.size}x{self.size}",
            "modelspec.prediction_type": prediction,
            "sumuk.tokenizer": self.tokens.to_json(),
        }
        if self.recipe.guidance is not None:
            metadata["sumuk.guidance"] = f"{self.recipe.guidance:g}"
        write(path, tensors, metadata)


@dataclass(frozen=True)
class _Levels:
    """A level for each row of a batch: the prediction table asks only for these two."""

    alpha: Tensor
    sigma: Tensor


def _no_noise(now: Level, then: Level) -> Tensor:
    raise AssertionError("a deterministic solver drew noise")
