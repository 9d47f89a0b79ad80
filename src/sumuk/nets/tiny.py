"""A tiny autoencoder between images and the latents that a sampler works on, for previews and small machines.

Convolutions and rectifiers only, distilled from a KL autoencoder (O. Boer Bohan, TAESD, 2023; the weights for
SD, SDXL, SD3 and FLUX.1 share one architecture and differ in latent channels):

    block(x) = relu(conv relu conv relu conv (x) + x),   decoder(z) = ... (3 tanh(z / 3))

Conventions differ from ``vae.py``: **images are 0..1**, and latents are those of the denoiser, already scaled
and shifted by the family. Neither side is random. The decoder squashes its latent softly to -3..3; its image
is not clamped and may leave 0..1 a little.

Published names are bare numbers, the places in a sequence; encoder and decoder are two files.

Shapes: B images, C colours, H and W pixels, z latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput

STRIDE = 8  # pixels a side that one latent cell stands for
BLOCKS = (3, 3, 3, 1)  # from the narrowest level to full resolution


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """What a header says: channels inside, of the latent and of the image."""

    width: int = 64
    channels: int = 4
    colours: int = 3

    def __post_init__(self) -> None:
        if min(self.width, self.channels, self.colours) < 1:
            raise BadInput(f"a tiny autoencoder needs channels of at least 1, not {self}")


def tiny_encoder_shape(shapes: Mapping[str, tuple[int, ...]]) -> TinyShape:
    """Reads the shape of an encoder off names and sizes alone; BadFile if it is none."""
    first, last = _convolution(shapes, "0.weight", "encoder"), _convolution(shapes, "14.weight", "encoder")
    return TinyShape(width=first[0], channels=last[0], colours=first[1])


def tiny_decoder_shape(shapes: Mapping[str, tuple[int, ...]]) -> TinyShape:
    """Reads the shape of a decoder off names and sizes alone; BadFile if it is none."""
    first, last = _convolution(shapes, "1.weight", "decoder"), _convolution(shapes, "19.weight", "decoder")
    return TinyShape(width=first[0], channels=first[1], colours=last[0])


def _convolution(shapes: Mapping[str, tuple[int, ...]], name: str, part: str) -> tuple[int, ...]:
    extra = next((key for key in shapes if ".pool." in key), None)
    if extra is not None:
        raise BadFile(f"tiny {part} has {extra!r}: the pooled kind (FLUX.2) is not supported", "tiny.header")
    if len(shapes.get(name, ())) != 4:
        raise BadFile(f"not a tiny {part}: convolution {name!r} is missing", "tiny.header")
    return shapes[name]


class TinyBlock(nn.Module):
    """Three convolutions around a shortcut; [B, width, h, w] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Squash(nn.Module):
    """3 tanh(z / 3): leaves common latents alone and bounds the rest."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class TinyEncoder(nn.Sequential):
    """[B, C, H, W] in 0..1 to a latent [B, z, H / 8, W / 8]; H and W are multiples of 8."""

    def __init__(self, shape: TinyShape) -> None:
        width = shape.width
        layers: list[nn.Module] = [_conv(shape.colours, width)]
        for level, blocks in enumerate(reversed(BLOCKS)):
            if level > 0:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock(width) for _ in range(blocks)]
        super().__init__(*layers, _conv(width, shape.channels))
        self.shape = shape

    def forward(self, pixels: Tensor) -> Tensor:
        _check(pixels, self.shape.colours, STRIDE, "pixels")
        return super().forward(pixels)


class TinyDecoder(nn.Sequential):
    """A latent [B, z, h, w] to pixels [B, C, 8 h, 8 w], about 0..1."""

    def __init__(self, shape: TinyShape) -> None:
        width = shape.width
        layers: list[nn.Module] = [Squash(), _conv(shape.channels, width), nn.ReLU()]
        for level, blocks in enumerate(BLOCKS):
            if level > 0:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [TinyBlock(width) for _ in range(blocks)]
        super().__init__(*layers, _conv(width, shape.colours))
        self.shape = shape

    def forward(self, latent: Tensor) -> Tensor:
        _check(latent, self.shape.channels, 1, "a latent")
        return super().forward(latent)


def _conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


def _check(x: Tensor, channels: int, step: int, what: str) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise BadInput(f"{what} of shape {tuple(x.shape)}: takes [B, {channels}, height, width]")
    if x.shape[2] < step or x.shape[3] < step or x.shape[2] % step or x.shape[3] % step:
        raise BadInput(
            f"{what} of {x.shape[3]}x{x.shape[2]}: sides must be multiples of {step}; resize or pad"
        )
