"""The numbers of a PyTorch file: storages mapped when first asked for, checked once, looked at with sizes and strides.

The mapping is private: who changes a tensor in place changes a copy of its pages, never the file. A view that is not in
order of its storage (a transposed matrix) is copied into order, all others share the mapped pages.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

from sumuk.base.errors import BadFile
from sumuk.files.safetensors import BITS, Held

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of one storage in the file; ``crc`` is their CRC32, None where the format has none."""

    start: int
    size: int
    crc: int | None


@dataclass(frozen=True, slots=True)
class Look:
    """A tensor in a storage; offset, sizes and strides count elements of ``kind``, a key of ``BITS``."""

    key: str
    kind: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def fault(self, available: int) -> str:
        """Why it is no tensor in a storage of so many bytes; "" if it is one.

        Elements may lie in any order and share places (an expanded tensor), but all within the storage, and no more of
        them than it has: a file of a kilobyte could stand for a terabyte otherwise.
        """
        count = available * 8 // BITS[self.kind]
        if (
            prod(max(n, 1) for n in self.size) >= 2**63
        ):  # steps are counted in 64 bits, also beside a size of 0
            return f"has the sizes {list(self.size)!s:.80}, whose steps are above 2^63"
        if prod(self.size) > count:
            return f"has {prod(self.size)} elements in a storage of {count}: expanded, save it with .clone()"
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if 0 in self.size:
            return "" if self.offset <= count else f"begins at element {self.offset} of {count}"
        return "" if last < count else f"reaches element {last} of a storage with {count}"


class Storages:
    """One file's storages, mapped at the first look; safe to share between threads.

    Args:
        path: the file.
        identity: its stamp when its headers were read.
        runs: where each storage lies.
        checked: the keys whose CRC32 was found right already.
    """

    def __init__(
        self, path: Path, identity: tuple[int, ...], runs: Mapping[str, Run], checked: set[str]
    ) -> None:
        self.path = path
        self.identity = identity
        self.runs = runs
        self.checked = checked
        self.held: Held | None = None
        self.map: Any = None
        self.lock = Lock()

    def tensor(self, name: str, look: Look) -> Tensor:
        """The numbers in order, not read before they are used unless their CRC32 is to be checked.

        Raises:
            BadFile: the file was replaced, its bytes are not those that were written, or a BOOL is neither 0 nor 1.
        """
        import torch

        from sumuk.files.tensors import dtypes

        dtype = dtypes()[look.kind]
        run = self.runs[look.key]
        with self.lock:
            mapped = self._mapped()
            if look.key not in self.checked and run.crc is not None:
                if crc(memoryview(mapped)[run.start : run.start + run.size]) != run.crc:
                    wrong_crc(self.path, f"storage {look.key!r}, of tensor {name!r},")
                self.checked.add(look.key)
        if 0 in look.size:
            return torch.empty(look.size, dtype=dtype)
        width = BITS[look.kind] // 8
        count = run.size // width
        if run.start % width:  # old files align nothing, and numbers across words are slow or forbidden
            flat = torch.frombuffer(
                bytearray(memoryview(mapped)[run.start : run.start + run.size]), dtype=dtype, count=count
            )
        else:
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=run.start)
        tensor = flat.as_strided(look.size, look.stride, look.offset).contiguous()
        if dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise BadFile(f"{self.path}: BOOL tensor {name!r} holds other bytes than 0 and 1", "ckpt.bool")
        return tensor

    def _mapped(self) -> Any:
        try:
            if self.held is None:
                held = Held(self.path, self.identity)
                self.map = mmap.mmap(held.handle, 0, access=mmap.ACCESS_COPY)
                self.held = held
            self.held.check()
        except (OSError, ValueError) as error:
            if isinstance(error, BadFile):
                raise
            raise BadFile(f"{self.path}: cannot be read: {error}", "ckpt.read") from error
        return self.map


def crc(data: memoryview) -> int:
    """CRC32 of bytes, a piece at a time."""
    value = 0
    for at in range(0, len(data), CHUNK):
        value = zlib.crc32(data[at : at + CHUNK], value)
    return value


def wrong_crc(path: Path, what: str) -> NoReturn:
    """Raise the error for bytes that are not those that were written."""
    raise BadFile(f"{path}: {what} is damaged (its CRC32 is wrong); fetch the file again", "ckpt.crc")
