"""T2I-Adapter (Mou et al. 2023): a small network that tells a U-Net of a picture, once for all steps.

The picture is unshuffled to the latent's size or below and passes residual blocks, level by level; what each
level finds is added to the encoder of the U-Net, on the way down (their equations 2 and 3)::

    f_i = level_i(f_{i-1});    h = h + f_i    at the end of level i

It attaches from outside and leaves the U-Net as it was. Parameter names are those of the original files.

Letters: B batch, C channels, H W height and width of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.header import count, reader
from sumuk.nets.unet import UNet

_size = reader("adapter", "adapter")

Shapes = Mapping[str, tuple[int, ...]]
ROWS = 2
"""Residual blocks of a level of the full T2I-Adapter."""


@dataclass(frozen=True, kw_only=True)
class T2IShape:
    """What a header says of a T2I-Adapter.

    Attributes:
        colours: channels of the picture: 3, or 1 for edges.
        factor: pixels a side of one cell after unshuffling: 8, or 16 for SDXL.
        widths: channels of each level, those of the U-Net's levels.
        rows: residual blocks of a level.
        kernel: size of each block's second convolution.
        light: whether the blocks are a quarter as wide inside (the colour adapter).
    """

    colours: int = 3
    factor: int = 8
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    rows: int = ROWS
    kernel: int = 1
    light: bool = False

    def __post_init__(self) -> None:
        if min(self.colours, self.factor, self.rows, *self.widths) < 1 or self.kernel % 2 == 0:
            raise BadInput(f"sizes below 1, or an even kernel, in {self}")

    @property
    def xl(self) -> bool:
        """Whether it is for SDXL, which is told below its first level and only halved once more."""
        return self.factor == 16

    def halves(self, level: int) -> bool:
        """Whether a level begins by halving the size."""
        return level == 2 if self.xl else level > 0


class Residual(nn.Module):
    """``x + conv(relu(conv(x)))``, behind a halving and a change of width where a level begins."""

    def __init__(self, channels: int, width: int, kernel: int, *, half: bool) -> None:
        super().__init__()
        self.halving = half
        if channels != width:
            self.in_conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = _halved(x) if self.halving else x
        x = self.in_conv(x) if hasattr(self, "in_conv") else x
        return x + self.block2(F.relu(self.block1(x)))


class LightLevel(nn.Module):
    """A level of the light adapter: narrow residual blocks between two 1x1 convolutions."""

    def __init__(self, channels: int, width: int, rows: int, *, half: bool) -> None:
        super().__init__()
        self.halving = half
        inner = width // 4
        self.in_conv = nn.Conv2d(channels, inner, 1)
        self.body = nn.Sequential(*(Residual(inner, inner, 3, half=False) for _ in range(rows)))
        self.out_conv = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.body(self.in_conv(_halved(x) if self.halving else x)))


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True)  # odd sizes are rounded up, as in the U-Net


class T2IAdapter(nn.Module):
    """The network; its findings are added to a U-Net by :func:`with_features`.

    Args:
        shape: see :class:`T2IShape`; usually read off a file by :func:`t2i_shape`.
    """

    def __init__(self, shape: T2IShape) -> None:
        super().__init__()
        self.shape = shape
        channels, widths = shape.colours * shape.factor**2, shape.widths
        self.body = nn.ModuleList()
        if not shape.light:
            self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
            channels = widths[0]
        for level, width in enumerate(widths):
            half = shape.halves(level)
            if shape.light:
                self.body.append(LightLevel(channels, width, shape.rows, half=half))
            for row in range(0 if shape.light else shape.rows):
                before = channels if row == 0 else width
                self.body.append(Residual(before, width, shape.kernel, half=half and row == 0))
            channels = width

    def forward(self, hint: Tensor) -> list[Tensor]:
        """One feature map for each level.

        Args:
            hint: the picture in 0 to 1, ``[B, colours, h, w]``, sides divisible by ``factor``.

        Raises:
            BadInput: another shape.
        """
        shape = self.shape
        if hint.ndim != 4 or hint.shape[1] != shape.colours or any(n % shape.factor for n in hint.shape[2:]):
            wanted = f"[B, {shape.colours}, {shape.factor} h, {shape.factor} w]"
            raise BadInput(f"this T2I-Adapter needs a picture of shape {wanted}, not {list(hint.shape)}")
        h = F.pixel_unshuffle(hint, shape.factor)
        h = h if shape.light else self.conv_in(h)
        found = []
        rows = 1 if shape.light else shape.rows
        for index, block in enumerate(self.body):
            h = block(h)
            if index % rows == rows - 1:
                found.append(h)
        return found


@contextmanager
def with_features(unet: UNet, features: Sequence[Tensor], *, xl: bool = False) -> Iterator[None]:
    """Add a T2I-Adapter's findings to the encoder of a U-Net until the block ends.

    Args:
        unet: the U-Net.
        features: what :class:`T2IAdapter` answered, ``[B, C, h, w]`` of the U-Net's batch, or of batch 1.
        xl: the adapter's ``shape.xl``. SDXL takes the first behind its first halving, the last in the middle.

    Raises:
        BadInput: more features than places.
    """
    levels, row = len(unet.shape.channel_mult), unet.shape.num_res_blocks + 1
    places: list[nn.Module] = [unet.input_blocks[level * row + row - 1] for level in range(levels)]
    if xl:
        places = [unet.input_blocks[row], *places[1:], unet.middle_block]
    if len(features) > len(places):
        raise BadInput(f"{len(features)} features of a T2I-Adapter do not fit this U-Net of {levels} levels")
    with ExitStack() as stack:
        for place, feature in zip(places, features, strict=False):
            stack.callback(place.register_forward_hook(_adding(feature)).remove)
        yield


def _adding(feature: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """The hook that adds one feature map to a block's output."""

    def add(_module: nn.Module, _given: tuple[Any, ...], out: Tensor) -> Tensor:
        if out.shape[1:] != feature.shape[1:]:
            raise BadInput(
                f"a feature of shape {list(feature.shape)} does not fit the U-Net's {list(out.shape)}; "
                "the picture must have the size of the drawing, and the adapter be made for this model"
            )
        return out + feature.to(out)

    return add


def t2i_shape(shapes: Shapes) -> T2IShape:
    """Read the shape of a T2I-Adapter off a header (published names).

    The picture's colours and the unshuffling hide in one number of channels: a multiple of 16 x 16 is taken
    for SDXL's, else one of 8 x 8, as all published ones have 1 or 3 colours.

    Raises:
        BadFile: a tensor that tells a width is missing or of a shape that no T2I-Adapter has; named.
    """
    light = "body.0.out_conv.weight" in shapes
    first = "body.0.in_conv.weight" if light else "conv_in.weight"
    channels = _size(shapes, first, 1)
    factor = 8 if channels % 256 else 16
    pattern = "body.{}.out_conv.weight" if light else "body.{}.block1.weight"
    blocks = count(shapes, pattern)
    rows = count(shapes, "body.0.body.{}.block1.weight") if light else ROWS
    if channels % factor**2 or not blocks or (not light and blocks % rows):
        raise BadFile(
            f"tensor {first!r} of {channels} channels, with {blocks} blocks, is that of no T2I-Adapter",
            "t2i.shape",
        )
    step = 1 if light else rows
    return T2IShape(
        colours=channels // factor**2,
        factor=factor,
        widths=tuple(_size(shapes, pattern.format(index), 0) for index in range(0, blocks, step)),
        rows=rows,
        kernel=1 if light else _size(shapes, "body.0.block2.weight", 2),
        light=light,
    )
