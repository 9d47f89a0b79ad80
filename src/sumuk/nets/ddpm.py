"""The U-Net of DDPM: noise out of pixels, without text, class or latent.

Two or more residual blocks on each level, attention over all pixels on the levels that have it (those of 16 x 16
pixels, in the published models) and in the middle; every output of the way down is kept and concatenated to the way
up's input of the same size (Ho et al. 2020, appendix B)::

    emb  = dense(silu(dense(features(t))))
    skip = [conv_in(x)]
    skip.append(attn(block(skip[-1], emb)))               for each block of down, and for each halving
    h = mid(skip[-1], emb)
    h = attn(block(concat(h, skip.pop()), emb))           for each block of up, from the narrowest level on
    conv_out(silu(norm_out(h)))

Parameter names are those of the published PyTorch files (CIFAR-10, CelebA, LSUN; Song et al. 2021, DDIM). What differs
from the latent-diffusion U-Net of :mod:`~sumuk.nets.unet`: time features are sines first, norms have an epsilon of
1e-6, attention has one head and 1x1 convolutions, and a halving pads right and below only.

Letters: B batch, C channels, H W height and width, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.header import count, reader
from sumuk.nets.layers import GROUPS, Upsample, group_norm, timestep_embedding, zero
from sumuk.nets.vae import Downsample, PixelAttention

_size = reader("DDPM pixel model", "ddpm")

EPS = 1e-6
"""Epsilon of every group normalisation."""


@dataclass(frozen=True, kw_only=True)
class PixelUNetShape:
    """Everything that decides which tensors the network has.

    Args:
        in_channels: colours of the noisy picture.
        out_channels: channels of the prediction.
        model_channels: width of the first level; a multiple of 32.
        channel_mult: width of each level in units of ``model_channels``; one halving between levels.
        num_res_blocks: residual blocks of each level on the way down (the way up has one more).
        attends: for each level, whether attention follows its blocks.

    Raises:
        BadInput: values that contradict each other.
    """

    in_channels: int = 3
    out_channels: int = 3
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int = 2
    attends: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not self.channel_mult or len(self.attends) != len(self.channel_mult):
            raise BadInput(
                f"channel_mult {self.channel_mult} and attends {self.attends} must have one entry per level"
            )
        if self.model_channels <= 0 or self.model_channels % GROUPS:
            raise BadInput(f"model_channels {self.model_channels} is not a positive multiple of {GROUPS}")
        if min(self.in_channels, self.out_channels, self.num_res_blocks, *self.channel_mult) < 1:
            raise BadInput(f"a U-Net needs colours, blocks and widths of at least 1, not {self}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def emb_width(self) -> int:
        """Width E of the embedding of time."""
        return 4 * self.model_channels

    @property
    def least(self) -> int:
        """Pixels a side of the smallest picture: one that the last level still sees."""
        return int(2 ** (len(self.channel_mult) - 1))


class ResBlock(nn.Module):
    """Two convolutions around a shift by the time embedding; starts as the identity (or its 1x1 shortcut).

    Args:
        channels: channels in.
        out_channels: channels out.
        emb_width: width E of the embedding.
    """

    def __init__(self, channels: int, out_channels: int, emb_width: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(emb_width, out_channels)
        self.norm2 = group_norm(out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)
        zero(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x [B, C, H, W]``, ``emb [B, E]`` to ``[B, out_channels, H, W]``."""
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Level(nn.Module):
    """What one resolution has on the way down or up, under the names in the file.

    Args:
        inputs: channels into each block.
        width: channels out of each.
        emb_width: width E of the embedding.
        attends: whether attention follows each block.
    """

    def __init__(self, inputs: list[int], width: int, emb_width: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(channels, width, emb_width) for channels in inputs)
        self.attn = nn.ModuleList(PixelAttention(width, GROUPS) for _ in inputs if attends)

    def run(self, index: int, x: Tensor, emb: Tensor) -> Tensor:
        """One block and its attention, ``[B, C, H, W]`` to ``[B, width, H, W]``."""
        x = self.block[index](x, emb)
        return self.attn[index](x) if self.attn else x


class Down(Level):
    """A level on the way down; adds what the way up will want to ``skips``, whose last is its input."""

    def __init__(self, inputs: list[int], width: int, emb_width: int, attends: bool, halves: bool) -> None:
        super().__init__(inputs, width, emb_width, attends)
        if halves:
            self.downsample = Downsample(width)

    def forward(self, skips: list[Tensor], emb: Tensor) -> None:
        for index in range(len(self.block)):
            skips.append(self.run(index, skips[-1], emb))
        if hasattr(self, "downsample"):
            skips.append(self.downsample(skips[-1]))


class Up(Level):
    """A level on the way up; takes its skips from the end of ``skips``, and the size of the next of them."""

    def __init__(self, inputs: list[int], width: int, emb_width: int, attends: bool, doubles: bool) -> None:
        super().__init__(inputs, width, emb_width, attends)
        if doubles:
            self.upsample = Upsample(width)

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        for index in range(len(self.block)):
            h = self.run(index, torch.cat((h, skips.pop()), dim=1), emb)
        if hasattr(self, "upsample"):
            h = self.upsample(h, (skips[-1].shape[-2], skips[-1].shape[-1]))
        return h


class Middle(nn.Module):
    """The narrowest level: block, attention, block; ``[B, C, H, W]`` to the same."""

    def __init__(self, width: int, emb_width: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, emb_width)
        self.attn_1 = PixelAttention(width, GROUPS)
        self.block_2 = ResBlock(width, width, emb_width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, emb)), emb)


class TimeEmbedding(nn.Module):
    """``features [B, width]`` to ``[B, 4 width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])

    def forward(self, features: Tensor) -> Tensor:
        return self.dense[1](F.silu(self.dense[0](features)))


class PixelUNet(nn.Module):
    """The network.

    Args:
        shape: see :class:`PixelUNetShape`.
    """

    def __init__(self, shape: PixelUNetShape) -> None:
        super().__init__()
        self.shape = shape
        width, emb, last = shape.model_channels, shape.emb_width, len(shape.widths) - 1
        self.temb = TimeEmbedding(width)
        self.conv_in = nn.Conv2d(shape.in_channels, width, 3, padding=1)
        kept = [width]  # channels of every skip
        levels = [*enumerate(zip(shape.widths, shape.attends, strict=True))]
        self.down = nn.ModuleList()
        for number, (out, attends) in levels:
            befores = [kept[-1], *[out] * (shape.num_res_blocks - 1)]
            self.down.append(Down(befores, out, emb, attends, number < last))
            kept += [out] * (shape.num_res_blocks + (number < last))
        width = kept[-1]
        self.mid = Middle(width, emb)
        self.up = nn.ModuleList()
        for number, (out, attends) in reversed(levels):
            befores = [width, *[out] * shape.num_res_blocks]
            inputs = [before + kept.pop() for before in befores]
            self.up.insert(0, Up(inputs, out, emb, attends, number > 0))  # numbered from full resolution
            width = out
        self.norm_out = group_norm(width, EPS)
        self.conv_out = nn.Conv2d(width, shape.out_channels, 3, padding=1)
        zero(self.conv_out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise (or whatever the model was trained for) in a picture.

        A side that cannot be halved evenly is rounded down on the way down, and on the way up enlarged to what it
        was; the published code refuses such sides.

        Args:
            x: noisy picture, ``[B, in_channels, H, W]``, pixels about -1..1. H and W of at least ``shape.least``.
            t: network time, ``[B]``, 0 to 999 for the published models, may be fractional.

        Returns:
            ``[B, out_channels, H, W]``.

        Raises:
            BadInput: a picture or time of another shape.
        """
        shape = self.shape
        if x.ndim != 4 or x.shape[1] != shape.in_channels or min(x.shape[-2:]) < shape.least:
            raise BadInput(
                f"a picture of shape {tuple(x.shape)} does not fit this U-Net, which takes "
                f"[B, {shape.in_channels}, H, W] with H and W of at least {shape.least}"
            )
        if t.shape != x.shape[:1]:
            raise BadInput(f"time of shape {tuple(t.shape)} does not fit a batch of {x.shape[0]}: give [B]")
        emb = self.temb(timestep_embedding(t, shape.model_channels, ddpm=True).to(x.dtype))
        skips = [self.conv_in(x)]
        for level in self.down:
            level(skips, emb)
        h = self.mid(skips[-1], emb)
        for level in reversed(self.up):
            h = level(h, skips, emb)
        return self.conv_out(F.silu(self.norm_out(h)))


def pixel_unet_shape(shapes: Mapping[str, tuple[int, ...]]) -> PixelUNetShape:
    """Read the shape off the names and shapes of a header: the way down tells all.

    Args:
        shapes: shape of each tensor, by its published name.

    Raises:
        BadFile: a tensor is missing, or of a shape that this network does not have; named.
    """
    width = _size(shapes, "conv_in.weight", 0)
    mult, attends = [], []
    blocks = count(shapes, "down.0.block.{}.conv1.weight")
    for level in range(max(1, count(shapes, "down.{}.block.0.conv1.weight"))):
        key = f"down.{level}.block.0.conv1.weight"
        channels = _size(shapes, key, 0)
        if channels % width:
            raise BadFile(
                f"tensor {key!r} has {channels} channels, no multiple of the {width} of 'conv_in.weight'",
                "ddpm.shape",
            )
        if (found := count(shapes, f"down.{level}.block.{{}}.conv1.weight")) != blocks:
            least = f"down.{level}.block.{min(found, blocks)}.conv1.weight"
            raise BadFile(
                f"a level has {found} blocks where the first has {blocks}; see tensor {least!r}", "ddpm.shape"
            )
        mult.append(channels // width)
        attends.append(f"down.{level}.attn.0.q.weight" in shapes)
    try:
        return PixelUNetShape(
            in_channels=_size(shapes, "conv_in.weight", 1),
            out_channels=_size(shapes, "conv_out.weight", 0),
            model_channels=width,
            channel_mult=tuple(mult),
            num_res_blocks=blocks,
            attends=tuple(attends),
        )
    except BadInput as error:
        raise BadFile(
            f"tensor 'conv_in.weight' has the shape {list(shapes['conv_in.weight'])}: {error}", "ddpm.shape"
        ) from error
