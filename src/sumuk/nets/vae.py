"""The KL autoencoder of latent diffusion: an image to a Gaussian over a small latent, and back.

    (mu, log s^2) = quant_conv(encoder(x)),   z = mu + s eps,   x' = decoder(post_quant_conv(z))

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1, appendix G.
Names are those of the published Stable Diffusion files; 16-channel autoencoders (SD3, FLUX.1) have the same
names without the two ``quant`` convolutions. Latents here are raw: the factor and shift that a family
applies to them belong to the family.

Shapes: B images, C colours, H and W pixels, z latent channels, h = H / stride, w = W / stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.header import count

GROUPS = 32
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class VaeShape:
    """What a header says of an autoencoder.

    Attributes:
        width: channels at full resolution, a multiple of 32.
        multiples: channels of each level over ``width``; one halving between levels.
        blocks: residual blocks of an encoder level (a decoder level has one more).
        latent: channels that the encoder makes and the decoder takes.
        quantised: channels between ``quant_conv`` and ``post_quant_conv``; None where the file has neither.
        colours: channels of an image.
    """

    width: int = 128
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent: int = 4
    quantised: int | None = 4
    colours: int = 3

    def __post_init__(self) -> None:
        if not self.multiples or min(self.multiples) < 1 or self.blocks < 1 or self.latent < 1:
            raise BadInput(
                f"an autoencoder needs levels, blocks and latent channels of at least 1, not {self}"
            )
        if self.width < 1 or self.width % GROUPS:
            raise BadInput(f"autoencoder width {self.width} is not a multiple of {GROUPS} (its norm groups)")

    @property
    def groups(self) -> int:
        """Groups of each normalisation: the published 32 where that leaves at least four channels to a group.

        A narrower network normalises four channels together: with one channel a group, normalisation would
        erase every channel's mean and contrast, and colours with them. (A header does not show the number of
        groups.)
        """
        return min(GROUPS, self.width // 4)

    @property
    def stride(self) -> int:
        """Pixels a side that one latent cell stands for."""
        return int(2 ** (len(self.multiples) - 1))

    @property
    def channels(self) -> int:
        """Channels of a latent as callers see it."""
        return self.latent if self.quantised is None else self.quantised


def vae_shape(shapes: Mapping[str, tuple[int, ...]]) -> VaeShape:
    """Reads the shape off tensor names and shapes alone.

    Args:
        shapes: tensor name (published names, no prefix) to its shape.

    Raises:
        BadFile: the names or sizes are not those of a KL autoencoder.
    """

    def size(name: str, axis: int) -> int:
        if name not in shapes or len(shapes[name]) <= axis:
            raise BadFile(
                f"not a KL autoencoder: tensor {name!r} is missing or has too few axes", "vae.header"
            )
        return shapes[name][axis]

    width, colours = size("encoder.conv_in.weight", 0), size("encoder.conv_in.weight", 1)
    levels = count(shapes, "encoder.down.{}.block.0.conv1.weight")
    widths = [size(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    if not widths or any(w % width for w in widths):
        raise BadFile(
            f"autoencoder level widths {widths} are not multiples of its first, {width}", "vae.header"
        )
    latent = size("decoder.conv_in.weight", 1)
    if size("encoder.conv_out.weight", 0) != 2 * latent:
        raise BadFile(
            f"autoencoder makes {size('encoder.conv_out.weight', 0)} channels where its decoder takes "
            f"{latent}; a Gaussian needs {2 * latent}",
            "vae.header",
        )
    return VaeShape(
        width=width,
        multiples=tuple(w // width for w in widths),
        blocks=count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        latent=latent,
        quantised=size("post_quant_conv.weight", 1) if "post_quant_conv.weight" in shapes else None,
        colours=colours,
    )


@dataclass(frozen=True)
class Moments:
    """A diagonal Gaussian over latents.

    Attributes:
        mean: [B, z, h, w].
        log_variance: [B, z, h, w], natural logarithm, within -30..20.
    """

    mean: Tensor
    log_variance: Tensor

    def mode(self) -> Tensor:
        """The most likely latent, [B, z, h, w]."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """A latent drawn with the caller's standard normal ``noise``, [B, z, h, w]."""
        if noise.shape != self.mean.shape:
            raise BadInput(
                f"noise of shape {tuple(noise.shape)} does not fit latents {tuple(self.mean.shape)}"
            )
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, a sum over each image, [B] (Kingma & Welling, B)."""
        mean, log_variance = self.mean.float(), self.log_variance.float()
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=(1, 2, 3))


class ResBlock(nn.Module):
    """Pre-norm residual block; [B, before, h, w] to [B, after, h, w]."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(before, groups)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = _norm(after, groups)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """One head over all positions, by 1x1 convolutions; [B, C, h, w] to the same."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)  # [B, 1, h*w, C]
        return x + self.proj_out(seen.squeeze(1).transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """The narrowest level: block, attention, block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = PixelAttention(width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halves the sides. Pads right and below only, as the published weights were trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution under the name in the file."""

    def __init__(self, before: int, after: int, blocks: int, groups: int, resample: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(before if index == 0 else after, after, groups) for index in range(blocks)
        )
        if resample == "down":
            self.downsample = Downsample(after)
        elif resample == "up":
            self.upsample = Upsample(after)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.block:
            x = part(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    """[B, C, H, W] to [B, 2 * latent, h, w]."""

    def __init__(self, shape: VaeShape) -> None:
        super().__init__()
        widths = [shape.width * multiple for multiple in shape.multiples]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(shape.colours, shape.width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, after, shape.blocks, shape.groups, "down" if level < last else None)
            for level, (before, after) in enumerate(zip([shape.width, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1], shape.groups)
        self.norm_out = _norm(widths[-1], shape.groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * shape.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, latent, h, w] to [B, C, H, W]. ``up`` is numbered from full resolution, so it runs backwards."""

    def __init__(self, shape: VaeShape) -> None:
        super().__init__()
        widths = [shape.width * multiple for multiple in shape.multiples]
        self.conv_in = nn.Conv2d(shape.latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], shape.groups)
        self.up = nn.ModuleList(
            Level(before, after, shape.blocks + 1, shape.groups, "up" if level > 0 else None)
            for level, (before, after) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0], shape.groups)
        self.conv_out = nn.Conv2d(widths[0], shape.colours, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Vae(nn.Module):
    """The autoencoder. Pixels are -1..1; the decoder's answer is not clamped."""

    def __init__(self, shape: VaeShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        if shape.quantised is not None:
            self.quant_conv = nn.Conv2d(2 * shape.latent, 2 * shape.quantised, 1)
            self.post_quant_conv = nn.Conv2d(shape.quantised, shape.latent, 1)

    @property
    def stride(self) -> int:
        """Pixels a side that one latent cell stands for."""
        return self.shape.stride

    def encode(self, pixels: Tensor) -> Moments:
        """[B, C, H, W] in -1..1 to the Gaussian of its latent; H and W are multiples of ``stride``."""
        self._check(pixels, self.shape.colours, self.stride, "pixels")
        raw = self.encoder(pixels)
        return _moments(raw if self.shape.quantised is None else self.quant_conv(raw))

    def decode(self, latent: Tensor) -> Tensor:
        """[B, z, h, w] to pixels [B, C, h * stride, w * stride], about -1..1."""
        self._check(latent, self.shape.channels, 1, "a latent")
        return self.decoder(latent if self.shape.quantised is None else self.post_quant_conv(latent))

    def _check(self, x: Tensor, channels: int, step: int, what: str) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise BadInput(
                f"{what} of shape {tuple(x.shape)}: this autoencoder takes [B, {channels}, height, width]"
            )
        if x.shape[2] < step or x.shape[3] < step or x.shape[2] % step or x.shape[3] % step:
            raise BadInput(
                f"{what} of {x.shape[3]}x{x.shape[2]}: sides must be multiples of {step}; resize or pad"
            )


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def _moments(raw: Tensor) -> Moments:
    mean, log_variance = raw.chunk(2, dim=1)
    return Moments(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))
