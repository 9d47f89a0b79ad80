"""Tiny pipelines of diffusers with random weights, and both sides drawn from the same noise.

A pipeline is built, saved as a folder, opened here as any user opens one, and asked for the same picture. What is
compared are the latents that the decoder gets: max |ours - theirs| / max |theirs|.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sumuk.diffusion.noise import ImageNoise
from sumuk.diffusion.sample import Moved
from sumuk.generate.draw import draw
from sumuk.generate.engine import Engine
from sumuk.generate.request import Request
from sumuk.generate.settings import resolve
from sumuk.nets.tokens import ClipTokens
from sumuk.nets.unigram import SPACE, T5Tokens
from sumuk.weights import vocabulary
from sumuk.weights.model import Model

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT, NEGATIVE = "a fox in the snow", "the sea, a fish"
WIDTH, HEIGHT, SEED, STEPS = 96, 128, 12, 5
TEXT, ROWS = 64, 16
"""Width of text and tokens of a row of the tiny CLIP towers."""
GUIDED = {"prompt": PROMPT, "negative": NEGATIVE, "steps": STEPS, "guidance": 4.0, "seed": SEED}
SIZED = {"width": WIDTH, "height": HEIGHT}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
"""The noise of Stable Diffusion 1, 2 and XL, as their folders have it."""


@dataclass(frozen=True)
class Case:
    """A measured agreement, for the test and for the table in the documentation."""

    name: str
    pipeline: str
    how: str
    limit: float
    measure: Callable[[Path], float]


CASES: list[Case] = []


def case(name: str, pipeline: str, how: str, limit: float) -> Callable[[Callable[[Path], float]], Any]:
    """Puts a function from an empty folder to the largest relative difference into the table."""

    def keep(measure: Callable[[Path], float]) -> Callable[[Path], float]:
        CASES.append(Case(name, pipeline, how, limit, measure))
        return measure

    return keep


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the largest value; both must be something."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert torch.isfinite(theirs).all() and float(theirs.abs().max()) > 1e-2
    return float((ours - theirs).abs().max() / theirs.abs().max())


# -- parts -----------------------------------------------------------------------------------------------------------


def randomise(net: nn.Module, seed: int = 0) -> Any:
    """Every parameter matters, none being zero; copies of DiT's embedders stay copies."""
    torch.manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        key = name.split(".emb.")[-1] if ".norm1.emb." in name else name
        if key not in drawn:
            if parameter.ndim > 1:
                table = name.endswith(("embedding.weight", "embedding_table.weight", "shared.weight"))
                spread = 1.0 if table else parameter[0].numel() ** -0.5
                drawn[key] = 0.7 * spread * torch.randn(parameter.shape)
            else:
                drawn[key] = float("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(
                    parameter.shape
                )
        parameter.requires_grad_(False).copy_(drawn[key])
    return net.eval()


@functools.cache
def clip_words(pad: int | None = None) -> Any:
    """OpenAI's vocabulary, in short rows; ``pad`` 0 is the exclamation mark of the OpenCLIP towers."""
    with tempfile.TemporaryDirectory() as place:
        vocabulary.write_folder(ClipTokens.openai(pad=pad, length=ROWS), Path(place) / "words")
        return transformers.CLIPTokenizer.from_pretrained(Path(place) / "words")


@functools.cache
def t5_words(length: int) -> Any:
    """A vocabulary of letters and a few words."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0)]
    words = [(f"{SPACE}{word}", -3.0) for word in ("fox", "snow", "sea", "the", "in")]
    letters = [(chr(letter), -5.0) for letter in range(ord("a"), ord("z") + 1)]
    with tempfile.TemporaryDirectory() as place:
        tokens = T5Tokens([*special, *words, *letters], length=length)
        vocabulary.write_folder(tokens, Path(place) / "words")
        return transformers.T5TokenizerFast.from_pretrained(Path(place) / "words")


def clip(seed: int, *, projected: bool = False, activation: str = "gelu", pad: int | None = 0) -> Any:
    """A CLIP text tower of two blocks."""
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT,
        intermediate_size=4 * TEXT,
        projection_dim=TEXT,
        num_hidden_layers=2,
        num_attention_heads=TEXT // 64,
        max_position_embeddings=ROWS,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407 if pad is None else pad,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomise(kind(config), seed)


def clip_l(seed: int = 1, *, projected: bool = False) -> Any:
    """As OpenAI's: the end fills up rows, the quick GELU."""
    return clip(seed, projected=projected, activation="quick_gelu", pad=None)


def t5(width: int, seed: int = 3) -> Any:
    config = transformers.T5Config(
        vocab_size=160,  # transformers adds a hundred sentinels
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    return randomise(transformers.T5EncoderModel(config), seed)


def vae(channels: int = 4, scale: float = 0.18215, shift: float | None = None) -> Any:
    """Of the published stride 8; those of 16 channels have no convolution at the waist.

    Four channels a group, as narrow autoencoders here are read; the published ones have 32 groups on both sides.
    """
    waist = channels == 4
    net = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=waist,
        use_post_quant_conv=waist,
        sample_size=HEIGHT,
    )
    return randomise(net, 4)


def unet(levels: Sequence[bool], heads: int | Sequence[int], **more: Any) -> Any:
    """A U-Net; ``levels``: which of them attend."""
    config = {
        "sample_size": 16,
        "block_out_channels": [64 * 2 ** min(level, 1) for level in range(len(levels))],
        "down_block_types": [("CrossAttn" if a else "") + "DownBlock2D" for a in levels],
        "up_block_types": [("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(levels)],
        "layers_per_block": 1,
        "attention_head_dim": heads,
        "cross_attention_dim": TEXT,
    }
    return randomise(diffusers.UNet2DConditionModel(**(config | more)), 5)


def ddim(**more: Any) -> Any:
    """That ends at the clean picture, as every walk here does."""
    return diffusers.DDIMScheduler(
        **(BETAS | {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"} | more)
    )


def picture(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A smooth random picture."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def half() -> Image.Image:
    """A mask: white below the middle."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[HEIGHT // 2 :] = 255
    return Image.fromarray(drawn)


# -- both sides ------------------------------------------------------------------------------------------------------


def saved(pipe: Any, folder: Path) -> Any:
    """The pipeline, quiet, and on disk as a folder."""
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    return pipe


@dataclass(frozen=True)
class Drawn:
    """What was drawn here: the latent at the end of each walk, and pixels in 0..1."""

    latents: list[Tensor]
    pixels: Tensor


@torch.inference_mode()
def drawn(model: Model, **wanted: Any) -> Drawn:
    """One picture by the engine's own forward."""
    engine = Engine(model)
    picture = draw(model, resolve(Request(**wanted), model), 0)
    latents: list[Tensor] = []
    reply: Any = None
    while True:
        try:
            event = picture.send(reply)
        except StopIteration as stop:
            return Drawn(latents, (stop.value / 2 + 0.5).clamp(0, 1))
        reply = None
        if not isinstance(event, Moved):
            reply = engine._forward(event)
            for answer in reply:
                if isinstance(answer, Exception):
                    raise answer
        elif event.step == event.steps:
            latents.append(event.x)


def unit(channels: int = 4, stride: int = 8, seed: int = SEED) -> Tensor:
    """The standard normal noise that a picture here begins with."""
    return ImageNoise(seed, (1, channels, HEIGHT // stride, WIDTH // stride)).initial()


def beginning(scheduler: Any, noise: Tensor, steps: int = STEPS) -> Tensor:
    """What a pipeline must be given as latents to begin where we do, at sigma times the noise.

    Schedulers begin at the noise itself where they take the first level for pure noise, though it has a little of
    the picture left (0.2 % in Stable Diffusion).
    """
    scheduler.set_timesteps(steps)
    first = int(scheduler.timesteps[0])
    if hasattr(scheduler, "sigmas"):
        return noise * float(scheduler.sigmas[0] / scheduler.init_noise_sigma)
    return noise * float((1 - scheduler.alphas_cumprod[first]) ** 0.5)


@torch.inference_mode()
def asked(pipe: Any, **given: Any) -> Tensor:
    """The pipeline's latents for the usual prompt."""
    usual = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
    }
    return pipe(**(usual | {"output_type": "latent"} | given)).images
