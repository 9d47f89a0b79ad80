"""What decides the tensors of Stable Cascade's stages B and C, and how it is read off a header.

No shape tells how the heads of attention lie, nor how many latent cells go into one position: heads are 64 wide in all
four published models, stage B takes squares of 2 x 2 cells and stage C single ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.header import count, reader

_size = reader("Cascade stage", "cascade")

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor, by its published name."""

TIMES = ("sca", "crp")
"""What a published stage may be told beside the time."""


@dataclass(frozen=True, kw_only=True)
class CascadeShape:
    """What both stages have; levels are counted from the finest.

    Args:
        in_channels: of the latent.
        out_channels: of the prediction.
        patch: side of the squares of latent cells that are one position of the network.
        widths: of each level.
        down: groups of blocks (C T or C T A) of each level on the way down.
        up: the same on the way up.
        attends: for each level, whether its groups have an A.
        down_repeats: how often the blocks of each level are run on the way down.
        up_repeats: the same on the way up.
        cond_width: width D of the condition's tokens.
        pooled_width: of the sentence's vector.
        tokens: how many tokens one such vector becomes.
        time_width: features of one time.
        times: what the network is told beside the time: ``sca``, ``crp``.
        kernel: side of the depthwise convolutions, odd.
        head_channels: width of one head of attention.

    Raises:
        BadInput: values that contradict each other.
    """

    in_channels: int
    out_channels: int
    patch: int
    widths: tuple[int, ...]
    down: tuple[int, ...]
    up: tuple[int, ...]
    attends: tuple[bool, ...]
    down_repeats: tuple[int, ...]
    up_repeats: tuple[int, ...]
    cond_width: int
    pooled_width: int = 1280
    tokens: int = 4
    time_width: int = 64
    times: tuple[str, ...] = ("sca",)
    kernel: int = 3
    head_channels: int = 64

    def __post_init__(self) -> None:
        rows = (self.down, self.up, self.attends, self.down_repeats, self.up_repeats)
        if not self.widths or any(len(row) != len(self.widths) for row in rows):
            raise BadInput(f"every level needs a width, groups, repeats and attention or not, in {self}")
        if min(*self.widths, *self.down, *self.up, *self.down_repeats, *self.up_repeats, self.patch) < 1:
            raise BadInput(f"widths, groups, repeats and patch must be at least 1, in {self}")
        if self.time_width < 4 or self.time_width % 2:
            raise BadInput(f"time_width {self.time_width} is not an even number of at least 4")
        if self.kernel % 2 == 0:
            raise BadInput(f"the side {self.kernel} of the depthwise convolutions must be odd")
        for width, attends in zip(self.widths, self.attends, strict=True):
            if attends and width % self.head_channels:
                raise BadInput(f"width {width} is not a multiple of {self.head_channels}, one head")


@dataclass(frozen=True, kw_only=True)
class StageCShape(CascadeShape):
    """Stage C: beside the pooled sentence it reads every token, and a picture through CLIP's image tower."""

    text_width: int = 1280
    image_width: int = 768


@dataclass(frozen=True, kw_only=True)
class StageBShape(CascadeShape):
    """Stage B: it looks at stage C's latent (``effnet``), and at pixels of which published models know none."""

    effnet_channels: int = 16
    pixel_channels: int = 3


Kind = TypeVar("Kind", bound=CascadeShape)


def read_c(shapes: Shapes) -> StageCShape:
    """The shape of a stage C, from the tensors that tell it; BadFile where one is missing or senseless."""
    return _made(
        StageCShape,
        **_trunk(shapes, 1, _size(shapes, "clip_txt_mapper.weight", 0), "clip_txt_pooled_mapper.weight"),
        text_width=_size(shapes, "clip_txt_mapper.weight", 1),
        image_width=_size(shapes, "clip_img_mapper.weight", 1),
    )


def read_b(shapes: Shapes) -> StageBShape:
    """The shape of a stage B; see :func:`read_c`."""
    attention = next((name for name in shapes if name.endswith(".kv_mapper.1.weight")), None)
    cond = _size(shapes, attention or "down_blocks.2.2.kv_mapper.1.weight", 1)
    return _made(
        StageBShape,
        **_trunk(shapes, 2, cond, "clip_mapper.weight"),
        effnet_channels=_size(shapes, "effnet_mapper.0.weight", 1),
        pixel_channels=_size(shapes, "pixels_mapper.0.weight", 1),
    )


def _trunk(shapes: Shapes, patch: int, cond: int, pooled: str) -> dict[str, Any]:
    levels = count(shapes, "down_blocks.{}.0.depthwise.weight")
    rows = range(levels)
    attends = tuple(f"down_blocks.{level}.2.kv_mapper.1.weight" in shapes for level in rows)
    turned = [levels - 1 - level for level in rows]  # the way up is numbered from the coarsest level
    return {
        "in_channels": _size(shapes, "embedding.1.weight", 1) // patch**2,
        "out_channels": _size(shapes, "clf.1.weight", 0) // patch**2,
        "patch": patch,
        "widths": tuple(_size(shapes, f"down_blocks.{level}.0.depthwise.weight", 0) for level in rows),
        "down": tuple(_groups(shapes, f"down_blocks.{i}", a) for i, a in zip(rows, attends, strict=True)),
        "up": tuple(_groups(shapes, f"up_blocks.{i}", a) for i, a in zip(turned, attends, strict=True)),
        "attends": attends,
        "down_repeats": tuple(1 + count(shapes, f"down_repeat_mappers.{i}.{{}}.weight") for i in rows),
        "up_repeats": tuple(1 + count(shapes, f"up_repeat_mappers.{i}.{{}}.weight") for i in turned),
        "cond_width": cond,
        "pooled_width": _size(shapes, pooled, 1),
        "tokens": _size(shapes, pooled, 0) // cond,
        "time_width": _size(shapes, "down_blocks.0.1.mapper.weight", 1),
        "times": tuple(name for name in TIMES if f"down_blocks.0.1.mapper_{name}.weight" in shapes),
        "kernel": _size(shapes, "down_blocks.0.0.depthwise.weight", 2),
    }


def _groups(shapes: Shapes, blocks: str, attends: bool) -> int:
    """How many groups of two or three blocks a level has; each begins with a depthwise convolution."""
    size, found = 3 if attends else 2, 0
    while f"{blocks}.{found * size}.depthwise.weight" in shapes:
        found += 1
    return found


def _made(kind: type[Kind], **values: Any) -> Kind:
    try:
        return kind(**values)
    except BadInput as error:
        raise BadFile(
            f"tensor 'down_blocks.0.0.depthwise.weight' and others: {error}", "cascade.shape"
        ) from error


def missing(key: str) -> BadFile:
    """The error for a tensor that is not there."""
    return BadFile(
        f"tensor {key!r} is missing; the file is incomplete or no Cascade stage", "cascade.missing"
    )
