"""A KL autoencoder from scratch, without perceptual networks (none is at hand offline).

Loss = |x - y| + edges x |edges of x - edges of y| over three scales + kl x KL(q || N(0, 1)), Kingma & Welling
2014, with the pyramid of differences standing in for LPIPS: it asks for edges in the right place at every
scale.

On export the latents are brought to mean 0 and standard deviation 1 / 0.18215 in each channel, by folding an
affine map into ``quant_conv`` and ``post_quant_conv``; so the file keeps the latent convention of Stable
Diffusion 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadInput
from sumuk.files.tensors import write
from sumuk.nets.vae import Vae, VaeShape
from sumuk.train.config import TrainConfig, VaeRecipe
from sumuk.train.data import Order, chunks, read_pixels, read_records, to_signed
from sumuk.train.sheet import tile

SD1_SCALE = 0.18215


class VaeTraining:
    """See :class:`sumuk.train.loop.Recipe`. Held-out pictures are not seen."""

    def __init__(self, config: TrainConfig, recipe: VaeRecipe) -> None:
        self.recipe = recipe
        if recipe.crop is not None and not 0 < recipe.crop <= config.data.size:
            raise BadInput(f"crop {recipe.crop} is outside 1 to {config.data.size}, the pictures' size")
        self.vae = Vae(
            VaeShape(
                width=recipe.channels,
                multiples=recipe.multiples,
                blocks=recipe.blocks,
                latent=recipe.latent_channels,
                quantised=recipe.latent_channels,
            )
        )
        # Latents that begin narrow: noise as wide as the signal would hide it from the decoder for thousands
        # of steps.
        bias = self.vae.quant_conv.bias
        assert bias is not None
        nn.init.constant_(bias.data[recipe.latent_channels :], -6.0)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        records = [r for r in read_records(config.data) if r.split == "train"]
        self.pixels = read_pixels(config.data.root, records, config.data.size)
        self.order = Order(len(records), config.seed)

    def batch(self, images: int, size: int, random: torch.Generator) -> Tensor:
        """Pictures or crops of them [size, 3, H, W] in -1..1, half of them mirrored."""
        pixels = to_signed(self.pixels[self.order.batch(images, size)])
        side = self.recipe.crop
        if side is not None and images < self.recipe.crop_until:
            places = torch.randint(pixels.shape[-1] - side + 1, (size, 2), generator=random).tolist()
            pixels = torch.stack(
                [each[:, y : y + side, x : x + side] for each, (y, x) in zip(pixels, places, strict=True)]
            )
        mirrored = torch.rand(size, generator=random) < 0.5
        return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)

    def loss(self, batch: Tensor, random: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        batch = batch.contiguous(memory_format=torch.channels_last)
        moments = self.vae.encode(batch)
        latent = moments.sample(torch.randn(moments.mean.shape, generator=random))
        drawn = self.vae.decode(latent).float()
        plain = (batch - drawn).abs().mean()
        edges = edge_distance(batch, drawn)
        kl = moments.kl().float().mean()
        figures = {
            "psnr": float(10 * torch.log10(4 / F.mse_loss(batch, drawn.detach()))),
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
        standardise(self.vae, to_signed(self.pixels[:2048]))
        write(path, self.vae.state_dict())


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
