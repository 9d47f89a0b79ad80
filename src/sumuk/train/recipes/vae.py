"""A KL autoencoder from scratch, without perceptual networks (none is at hand offline).

Loss = |x - y| + edges x |edges of x - edges of y| over three scales + kl x KL(q || N(0, 1)), Kingma & Welling
2014, with the pyramid of differences standing in for LPIPS: it asks for edges in the right place at every
scale.

With ``decoder_of`` only the decoder learns, on latents that are encoded once, under a little noise: what a diffusion
model draws is never quite a latent of a picture. The latents stay as they are to the bit.

Otherwise, on export the latents are brought to mean 0 and standard deviation 1 / 0.18215 in each channel, by folding an
affine map into ``quant_conv`` and ``post_quant_conv``; so the file keeps the latent convention of Stable
Diffusion 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadInput
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import write
from sumuk.nets.vae import Vae, VaeShape, vae_shape
from sumuk.train.config import TrainConfig, VaeRecipe
from sumuk.train.data import Order, chunks, read_pixels, read_records, to_signed
from sumuk.train.sheet import tile

SD1_SCALE = 0.18215


@dataclass(frozen=True)
class Batch:
    """Pictures [B, 3, H, W] in -1..1, and their latents [B, C, h, w] where only the decoder learns."""

    pixels: Tensor
    latents: Tensor | None


class VaeTraining:
    """See :class:`sumuk.train.loop.Recipe`. Held-out pictures are not seen."""

    def __init__(self, config: TrainConfig, recipe: VaeRecipe) -> None:
        self.recipe = recipe
        if recipe.crop is not None and not 0 < recipe.crop <= config.data.size:
            raise BadInput(f"crop {recipe.crop} is outside 1 to {config.data.size}, the pictures' size")
        records = [r for r in read_records(config.data) if r.split == "train"]
        self.pixels = read_pixels(config.data.root, records, config.data.size)
        self.order = Order(len(records), config.seed)
        self.vae = _fresh(recipe) if recipe.decoder_of is None else _begun(recipe.decoder_of)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self.latents = None if recipe.decoder_of is None else self._encode()

    @torch.no_grad()
    def _encode(self) -> Tensor:
        """Every picture's latent, plain and mirrored [2, N, C, h, w]."""
        sides = []
        for mirrored in (False, True):
            rows = (to_signed(self.pixels[list(some)]) for some in chunks(range(len(self.pixels)), 64))
            sides.append(torch.cat([self.vae.encode(x.flip(-1) if mirrored else x).mode() for x in rows]))
        return torch.stack(sides)

    def batch(self, images: int, size: int, random: torch.Generator) -> Batch:
        """Pictures or crops of them, half of them mirrored; latents where the encoder is finished."""
        rows = self.order.batch(images, size)
        pixels = to_signed(self.pixels[rows])
        side = self.recipe.crop
        if side is not None and images < self.recipe.crop_until:
            places = torch.randint(pixels.shape[-1] - side + 1, (size, 2), generator=random).tolist()
            pixels = torch.stack(
                [each[:, y : y + side, x : x + side] for each, (y, x) in zip(pixels, places, strict=True)]
            )
        mirrored = torch.rand(size, generator=random) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        latents = None if self.latents is None else self.latents[mirrored.long(), rows]
        return Batch(pixels, latents)

    def loss(self, batch: Batch, random: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        pixels = batch.pixels.contiguous(memory_format=torch.channels_last)
        if batch.latents is None:
            moments = self.vae.encode(pixels)
            latent = moments.sample(torch.randn(moments.mean.shape, generator=random))
            kl = moments.kl().float().mean()
        else:
            noise = torch.randn(batch.latents.shape, generator=random)
            latent = batch.latents + self.recipe.latent_noise / SD1_SCALE * noise
            kl = torch.zeros(())
        drawn = self.vae.decode(latent).float()
        plain = (pixels - drawn).abs().mean()
        edges = edge_distance(pixels, drawn)
        figures = {
            "psnr": float(10 * torch.log10(4 / F.mse_loss(pixels, drawn.detach()))),
            "kl": float(kl.detach()),
        }
        return plain + self.recipe.edges * edges + self.recipe.kl * kl, figures

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Pictures above their reconstructions."""
        shown = to_signed(self.pixels[:: max(1, len(self.pixels) // 16)][:16])
        drawn = self.vae.decode(self.vae.encode(shown).mode())
        return tile(torch.cat([shown, drawn]), columns=16)

    @torch.no_grad()
    def export(self, path: Path) -> None:
        if self.latents is None:
            standardise(self.vae, to_signed(self.pixels[:2048]))
        write(path, self.vae.state_dict())


def _fresh(recipe: VaeRecipe) -> Vae:
    vae = Vae(
        VaeShape(
            width=recipe.channels,
            multiples=recipe.multiples,
            blocks=recipe.blocks,
            latent=recipe.latent_channels,
            quantised=recipe.latent_channels,
        )
    )
    # Latents that begin narrow: noise as wide as the signal would hide it from the decoder for thousands of steps.
    bias = vae.quant_conv.bias
    assert bias is not None
    nn.init.constant_(bias.data[recipe.latent_channels :], -6.0)
    return vae


def _begun(path: Path) -> Vae:
    """A finished autoencoder of which only the decoder may change."""
    weights = load_file(read_header(path).path)  # absent or damaged: refused in one line
    vae = Vae(vae_shape({name: tuple(t.shape) for name, t in weights.items()}))
    vae.load_state_dict({name: t.float() for name, t in weights.items()})
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return vae


def edge_distance(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of horizontal and vertical differences over halved scales; [B, C, H, W]."""
    total = a.new_zeros(())
    for _ in range(scales):
        for axis in (-1, -2):
            total = total + (a.diff(dim=axis) - b.diff(dim=axis)).abs().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / scales


@torch.no_grad()
def standardise(vae: Vae, pixels: Tensor) -> None:
    """Fold into ``vae`` the affine map that gives its latents, per channel, mean 0 and deviation 1 / 0.18215.

    Reconstructions do not change: ``post_quant_conv`` undoes what ``quant_conv`` does.
    """
    means = torch.cat([vae.encode(pixels[list(rows)]).mode() for rows in chunks(range(len(pixels)), 64)])
    mean = means.mean(dim=(0, 2, 3))
    scale = 1.0 / (means.std(dim=(0, 2, 3)) * SD1_SCALE)
    half = len(mean)
    into, back = vae.quant_conv, vae.post_quant_conv
    assert into.bias is not None and back.bias is not None
    back.bias.add_(back.weight[:, :, 0, 0] @ mean)
    back.weight.div_(scale[None, :, None, None])
    into.bias[:half].sub_(mean).mul_(scale)
    into.weight[:half].mul_(scale[:, None, None, None])
    into.bias[half:].add_(2 * scale.log())
