"""GGUF files: the header read strictly and without torch, tensors mapped and dequantised when they are loaded.

Layout of the format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian::

    "GGUF"  u32 version  u64 tensors  u64 keys
    each key     text name, u32 type, value
    each tensor  text name, u32 dimensions, a u64 for each, innermost first, u32 type, u64 offset
    the rest     the tensors' bytes, each beginning at a multiple of ``general.alignment``, offsets counted from here

A text is a u64 length and UTF-8, an array a u32 type, a u64 length and values. The usual readers trust these numbers:
lengths that wrap, arrays that never end, tensors that overlap. Here each is compared with the size of the file before
anything is allocated, and refused with a :class:`~sumuk.base.errors.BadFile` that names file and value. Padding is not
looked at: that would cost a page of the disk for each tensor.

Shapes are not always as they were. ComfyUI-GGUF stores a tensor whose rows do not fit the blocks as rows of 256 and
its shape in a key ``comfy.gguf.orig_shape.NAME``. ggml itself forgets outermost sizes of 1. Both are undone here.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sumuk.base.errors import BadFile
from sumuk.files.gguf_header import CONTROL, I32, I64, TEXT, U32, Header, begin, read_values, refuse, shown
from sumuk.files.safetensors import MAX_NAME, Held, regular, stamp
from sumuk.files.tensors import Lazy, Packed, Shape, Tensors

if TYPE_CHECKING:
    import os

    import torch
    from torch import Tensor

MAX_DIMENSIONS = 4
"""As many as ggml's tensors have."""
MAX_SHAPE = 8
"""Dimensions of a shape kept in a key."""
ALIGNMENTS = tuple(2**power for power in range(3, 17))
ALIGNMENT = 32
"""What the format says where a file does not."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
POSITIONS = "pos_embed"
"""The table of positions of SD3 and DiT, [1, places, width]: no other tensor of their files begins with a 1."""

PLAIN: Mapping[int, tuple[str, int, str]] = {
    0: ("F32", 4, "float32"), 1: ("F16", 2, "float16"), 30: ("BF16", 2, "bfloat16"), 28: ("F64", 8, "float64"),
    24: ("I8", 1, "int8"), 25: ("I16", 2, "int16"), 26: ("I32", 4, "int32"), 27: ("I64", 8, "int64"),
}  # fmt: skip
"""Number of a type in the file -> name, bytes of an element, name in torch."""
BLOCKS: Mapping[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
"""Number of a quantised type -> name, elements of a block, bytes of a block."""
OTHERS: Mapping[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types that are not read here, or by nobody any more."""


@dataclass(frozen=True)
class Gguf:
    """A file whose header was read and checked.

    Attributes:
        path: the file.
        tensors: by name, sizes outermost first as everywhere here. Quantised ones load as F32 and tell how they are
            stored in ``Lazy.packed``, whose ``stored()`` is ``{"blocks": uint8 [rows, bytes of a row]}``.
        metadata: the header's texts (``general.architecture``, ``general.name``).
        values: all else that it says; of an array above 1,000 elements only how many there are, as a text.
    """

    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Info:
    """Where one tensor lies: its type's number, its sizes outermost first, offset and bytes."""

    kind: int
    shape: Shape
    begin: int
    size: int


def read_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Read and check the header; tensor bytes are not touched, so the size of the file does not matter.

    Raises:
        MissingFile: no such file.
        BadFile: anything that the format forbids, or a type that is not read here; ``code`` begins with ``gguf.``.
    """
    path = regular(path)
    try:
        before = stamp(path)
        with path.open("rb", buffering=2**16) as file:
            header = Header(path, file, before[2])
            tensors, keys = begin(header)
            values = read_values(header, keys)
            found = _infos(header, tensors)
        if stamp(path) != before:
            refuse(path, "changed", "changed while it was read; wait until it is complete")
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error}", "gguf.read") from error
    texts = {key: value for key, (kind, value) in values.items() if kind == TEXT}
    alignment = _alignment(path, values.get("general.alignment"))
    start = _up(header.at, alignment)
    _contiguous(path, found, before[2] - start, alignment)
    data = _Data(path, before, start)
    shapes = {name: _shape(path, name, info, values) for name, info in found.items()}
    return Gguf(
        path,
        {name: _lazy(data, name, info, shapes[name]) for name, info in found.items()},
        texts,
        {key: value for key, (kind, value) in values.items() if kind != TEXT},
    )


def _up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _span(sizes: Iterable[int]) -> int:
    """What a step over a whole tensor may come to: its elements, were no size 0. Steps are counted in 64 bits."""
    return prod(max(size, 1) for size in sizes)


def _alignment(path: Path, said: tuple[int, Any] | None) -> int:
    if said is None:
        return ALIGNMENT
    kind, value = said
    if kind != U32 or value not in ALIGNMENTS:
        refuse(
            path,
            "alignment",
            f"general.alignment is {value!r:.40} (type {kind}), not a u32 power of two from 8 to {ALIGNMENTS[-1]}",
        )
    return int(value)


def _infos(header: Header, count: int) -> dict[str, _Info]:
    found: dict[str, _Info] = {}
    for number in range(count):
        name = header.text(MAX_NAME, f"name of tensor {number}", "name")
        # A checkpoint's names become those of files and attributes; ggml's limit of 63 bytes is one of its memory.
        if not name or CONTROL.search(name):
            header.refuse("name", f"tensor name {shown(name)} is empty or not printable")
        if name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
            header.refuse("name", f"tensor name {shown(name)} is a path out of its folder")
        if name in found:
            header.refuse("duplicate", f"has the tensor {shown(name)} twice")
        found[name] = _info(header, f"tensor {shown(name)}")
    return found


def _info(header: Header, what: str) -> _Info:
    count = header.number("I")
    if count > MAX_DIMENSIONS:
        header.refuse("dims", f"{what} has {count} dimensions, above {MAX_DIMENSIONS}")
    *sizes, kind, begin = struct.unpack(f"<{count}QIQ", header.take(8 * count + 12))
    if any(size >= 2**63 for size in sizes):
        header.refuse("shape", f"{what} has the sizes {sizes}, which are negative or above 2^63")
    if kind in PLAIN:
        name, width, _ = PLAIN[kind]
        block = 1
    elif kind in BLOCKS:
        name, block, width = BLOCKS[kind]
    else:
        known = ", ".join(sorted(name for name, *_ in (*PLAIN.values(), *BLOCKS.values())))
        header.refuse("dtype", f"{what} has the type {OTHERS.get(kind, kind)}; read are {known}")
    row, elements = (sizes[0] if sizes else 1), prod(sizes)
    if row % block:
        header.refuse("row", f"{what} of {name} has rows of {row}, not a multiple of {block}")
    if _span(sizes) >= 2**63 or elements // block * width >= 2**63:
        header.refuse("size", f"{what} of sizes {sizes} has more elements or bytes than 2^63")
    return _Info(kind, tuple(reversed(sizes)), begin, elements // block * width)


def _contiguous(path: Path, found: Mapping[str, _Info], room: int, alignment: int) -> None:
    """Each byte behind the header belongs to one tensor or to the padding before the next."""
    at = 0
    for name, info in sorted(found.items(), key=lambda item: (item[1].begin, item[1].size)):
        what, begin = f"tensor {shown(name)}", info.begin
        if begin % alignment:
            refuse(path, "offset", f"{what} begins at {begin}, not a multiple of {alignment}")
        if begin < at:
            refuse(path, "overlap", f"{what} begins at {begin}, but another ends at {at}")
        if begin > _up(at, alignment):
            code = "hole" if begin <= room else "offset"
            refuse(path, code, f"bytes {at} to {begin}, before {what}, belong to no tensor")
        at = begin + info.size
    if at > room:
        refuse(
            path, "truncated", f"is cut off: its tensors need {at} bytes, not {max(room, 0)}; fetch it again"
        )
    if room > _up(at, alignment):
        refuse(path, "tail", f"has {room - at} bytes behind its last tensor")


def _shape(path: Path, name: str, info: _Info, values: dict[str, tuple[int, Any]]) -> Shape:
    """A tensor's own shape; the key that says it is used up."""
    said = values.pop(ORIGINAL_SHAPE + name, None)
    if said is None:
        placed = name.rpartition(".")[2] == POSITIONS and len(info.shape) == 2
        return (1, *info.shape) if placed else info.shape
    kind, sizes = said
    if (
        kind not in (-1 - I32, -1 - I64)
        or not isinstance(sizes, list)
        or len(sizes) > MAX_SHAPE
        or min(sizes, default=0) < 0
        or prod(sizes) != prod(info.shape)
        or _span(sizes) >= 2**63
    ):
        key, stored = shown(ORIGINAL_SHAPE + name), list(info.shape)
        refuse(path, "orig_shape", f"{key} is {sizes!r:.60}, no shape for the stored {stored}")
    return tuple(sizes)


def _lazy(data: _Data, name: str, info: _Info, shape: Shape) -> Lazy:
    source = str(data.path)
    if info.kind in PLAIN:
        dtype, _, torch_name = PLAIN[info.kind]
        return Lazy(shape, dtype, partial(_plain, data, name, info, shape, torch_name), source)
    scheme, *_ = BLOCKS[info.kind]
    stored = partial(_blocks, data, name, info)
    expand = partial(_expand, scheme, shape)
    return Lazy(
        shape, "F32", partial(_load, stored, expand), source, Packed(scheme, info.size, stored, expand)
    )


def _plain(data: _Data, name: str, info: _Info, shape: Shape, dtype: str) -> Tensor:
    import torch

    return data.read(name, info).view(getattr(torch, dtype)).reshape(shape)


def _blocks(data: _Data, name: str, info: _Info) -> dict[str, Tensor]:
    _, block, width = BLOCKS[info.kind]
    return {"blocks": data.read(name, info).reshape(prod(info.shape[:-1]), info.shape[-1] // block * width)}


def _expand(scheme: str, shape: Shape, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    from sumuk.files.gguf_blocks import expand

    return expand(scheme, stored["blocks"]).reshape(shape).to(dtype)


def _load(stored: Any, expand: Any) -> Tensor:
    import torch

    tensor: Tensor = expand(stored(), torch.float32)
    return tensor


class _Data:
    """The mapped tensor bytes, opened when first needed. The mapping is private: nothing written reaches the file."""

    def __init__(self, path: Path, identity: tuple[int, int, int, int], start: int) -> None:
        self.path, self.identity, self.start = path, identity, start
        self.held: Held | None = None
        self.mapped: Any = None

    def read(self, name: str, info: _Info) -> Tensor:
        """Its bytes: uint8 [size]."""
        import torch

        if not info.size:
            return torch.empty(0, dtype=torch.uint8)
        try:
            if self.held is None:
                held = Held(self.path, self.identity, "gguf.changed")
                self.mapped = mmap.mmap(held.handle, 0, access=mmap.ACCESS_COPY)
                self.held = held
            self.held.check()
        except (OSError, ValueError) as error:
            if isinstance(error, BadFile):
                raise
            raise BadFile(
                f"{self.path}: tensor {shown(name)} cannot be read: {error}", "gguf.read"
            ) from error
        return torch.frombuffer(
            self.mapped, dtype=torch.uint8, count=info.size, offset=self.start + info.begin
        )
