"""Tensors that are read when they are asked for, and written one at a time.

A file, a shard set or a result of a conversion is a plain ``dict`` of names to :class:`Lazy`; to take a part
of it, rename or merge is to build another dict. Nothing is read until a :meth:`Lazy.load`, which maps the
file's pages without copying them. Looking at names and shapes needs no torch, so it is imported by the first
load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.atomic import replacing
from sumuk.files.safetensors import BITS, Header, Held, stamp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sumuk.files.direct import Sink
    from sumuk.files.metered import Meter

Shape = tuple[int, ...]
PIECE = 1 << 24
"""Bytes between two reports of a file that is written."""
EMPTY = "0x" + "0" * 64
HUGE = 1 << 30
"""Bytes from which on a file is written past the system's cache."""


@dataclass(frozen=True, slots=True)
class Packed:
    """How a tensor is stored where that takes fewer bits than its numbers: quantised, in blocks, with scales.

    Attributes:
        scheme: its usual name: ``Q4_K``, ``NF4``, ``F8_E4M3 scaled``.
        size: bytes that it takes as it is stored.
        stored: reads what is stored, by names of its own (``blocks``, ``scale``).
        expand: what is stored, and a floating-point type, to the numbers in the tensor's shape.
    """

    scheme: str
    size: int
    stored: Callable[[], dict[str, Tensor]] = field(repr=False, compare=False)
    expand: Callable[[Mapping[str, Tensor], torch.dtype], Tensor] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that can be had.

    Attributes:
        shape: sizes, outermost first.
        dtype: name as in safetensors files (``"F16"``) of what ``load`` gives.
        load: reads it.
        source: the file that it comes from, for messages.
        packed: how it is stored if that is not one of those types; None: it is.
    """

    shape: Shape
    dtype: str
    load: Callable[[], Tensor] = field(repr=False, compare=False)
    source: str = field(default="", compare=False)
    packed: Packed | None = None

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stored(self) -> str:
        """How its numbers lie in the file: the scheme that it is packed in, else its type."""
        return self.dtype if self.packed is None else self.packed.scheme

    def become(
        self, load: Callable[[], Tensor], *, shape: Shape | None = None, dtype: str | None = None
    ) -> Lazy:
        """Another tensor that is made of this one, with the same origin."""
        return Lazy(self.shape if shape is None else shape, dtype or self.dtype, load, self.source)

    def cast(self, dtype: torch.dtype) -> Lazy:
        """The same numbers as another floating-point type; whole numbers stay as they are."""
        if not self.dtype.startswith(("F", "BF")) or self.dtype == dtype_name(dtype):
            return self
        return self.become(lambda: self.load().to(dtype), dtype=dtype_name(dtype))


Tensors = dict[str, Lazy]


def lazy(tensor: Tensor, source: str = "") -> Lazy:
    """A tensor in memory as a :class:`Lazy`."""
    return Lazy(tuple(tensor.shape), dtype_name(tensor.dtype), lambda: tensor, source)


def from_header(header: Header) -> Tensors:
    """The tensors of a safetensors file whose header was read and checked; the file is mapped at the first
    load.
    """
    reader = Reader(header)
    return {
        name: Lazy(info.shape, info.dtype, partial(reader.get, name), str(header.path))
        for name, info in header.tensors.items()
    }


class Reader:
    """One mapped file, opened when first needed."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.held: Held | None = None
        self.handle: Any = None

    def get(self, name: str) -> Tensor:
        import torch
        from safetensors import SafetensorError, safe_open

        path, dtype = self.header.path, self.header.tensors[name].dtype
        if dtype not in dtypes():
            raise BadFile(
                f"{path}: tensor {name!r} is of {dtype}, which nothing here computes with",
                "safetensors.dtype",
            )
        try:
            if self.held is None:
                held = Held(path, self.header.stamp)
                self.handle = safe_open(path, framework="pt", device="cpu").__enter__()
                if stamp(path) != held.identity:  # the library opened it by its name
                    raise BadFile(
                        f"{path}: was replaced since its header was read; try again", "file.changed"
                    )
                self.held = held
            self.held.check()
            tensor: Tensor = self.handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadFile(f"{path}: tensor {name!r} cannot be read: {error}", "safetensors.read") from error
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise BadFile(f"{path}: BOOL tensor {name!r} holds other bytes than 0 and 1", "safetensors.bool")
        return tensor


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Lazy | Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    digest: str | None = None,
    settle: Callable[[], Mapping[str, str]] | None = None,
    meter: Meter | None = None,
) -> None:
    """Write a safetensors file in the memory of its largest tensor; the same tensors give the same bytes.

    Wide elements come first and names are sorted, so that every tensor is aligned for mapping. The file
    appears under its name when it is complete, see :mod:`~sumuk.files.atomic`.

    Args:
        path: where to; an existing file is replaced.
        tensors: name -> tensor, loaded one at a time.
        metadata: free texts.
        digest: the metadata that shall hold the SHA-256 of all that follows the header, ``0x`` and 64 digits. It is
            known only at the end; its place in the header is kept free until then.
        settle: asked when all tensors are written for texts to stand in place of those of ``metadata``, which must be
            as long or longer: what else is known only then.
        meter: told of the bytes written.

    Raises:
        BadInput: a name, text or dtype that the format cannot hold.
        BadFile: writing failed; the old file is as it was.
    """
    entries = {name: value if isinstance(value, Lazy) else lazy(value) for name, value in tensors.items()}
    texts = dict(metadata or {}) | ({digest: EMPTY} if digest else {})
    order = sorted(entries, key=lambda name: (-BITS[entries[name].dtype], name))
    header = _header(entries, order, texts)
    sums = hashlib.sha256()
    with replacing(path) as file:
        sink = _sink(file) if size(entries) >= HUGE else None
        out = file if sink is None else sink
        out.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for piece in _pieces(name, entries[name]):
                out.write(piece)
                if digest:
                    sums.update(piece)
                if meter is not None:
                    meter.add(len(piece))
        if sink is not None:
            sink.end()
        late = ({digest: f"0x{sums.hexdigest()}"} if digest else {}) | dict(settle() if settle else {})
        if late:
            again = _header(entries, order, texts | late)
            assert len(again) <= len(header)
            file.seek(8)
            file.write(again.ljust(len(header)))


def _sink(file: BinaryIO) -> Sink:
    from sumuk.files.direct import Sink  # with numpy, which looking at names can do without

    return Sink(file)


def _header(tensors: Mapping[str, Lazy], order: list[str], texts: Mapping[str, str]) -> bytes:
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadInput(f"metadata {key!r} is {type(text).__name__}; safetensors files hold only texts")
    if "__metadata__" in tensors or "" in tensors:
        raise BadInput("a tensor cannot be named '' or '__metadata__' in a safetensors file")
    table: dict[str, Any] = {"__metadata__": dict(sorted(texts.items()))} if texts else {}
    at = 0
    for name in order:
        one = tensors[name]
        end = at + length(one)
        table[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _pieces(name: str, one: Lazy) -> Iterator[memoryview]:
    import torch

    tensor = one.load()
    if tuple(tensor.shape) != one.shape or dtype_name(tensor.dtype) != one.dtype:
        raise BadInput(
            f"tensor {name!r} was announced as {one.dtype} {list(one.shape)} but is "
            f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    for begin in range(0, len(data), PIECE):
        yield data[begin : begin + PIECE]


def length(one: Lazy) -> int:
    """Bytes that a tensor takes in a file."""
    return one.parameters * BITS[one.dtype] // 8


def size(tensors: Mapping[str, Lazy]) -> int:
    """Bytes that tensors take in a file."""
    return sum(length(one) for one in tensors.values())


@lru_cache(maxsize=1)
def dtypes() -> dict[str, torch.dtype]:
    """Types by the names that safetensors files give them."""
    import torch

    return {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
        "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
        "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
        "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    }  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype in safetensors files: ``torch.float16 -> "F16"``.

    Raises:
        BadInput: the format does not hold it.
    """
    for name, known in dtypes().items():
        if known == dtype:
            return name
    raise BadInput(f"safetensors files cannot hold {dtype}")


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """A torch dtype by any usual spelling: ``"bfloat16"``, ``"bf16"``, ``"BF16"``, ``torch.bfloat16``.

    Raises:
        BadInput: not a floating-point type that networks run in.
    """
    import torch

    names = {
        "float32": torch.float32, "f32": torch.float32, "fp32": torch.float32,
        "float16": torch.float16, "f16": torch.float16, "fp16": torch.float16, "half": torch.float16,
        "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
        "float64": torch.float64, "f64": torch.float64,
    }  # fmt: skip
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    try:
        return names[name.lower()]
    except KeyError:
        raise BadInput(f"dtype {name!r} is not one of float32, bfloat16, float16, float64") from None
