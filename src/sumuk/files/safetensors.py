"""The header of a safetensors file, read strictly and without torch, before any library touches the file.

Layout of the format (https://github.com/huggingface/safetensors)::

    8 bytes      n, little endian
    n bytes      JSON  {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    the rest     the tensors' bytes, without holes, offsets counted from here

The reference reader accepts more than the format allows (duplicate names, leading blanks, unknown fields,
names that are paths). Here each is refused with a :class:`~sumuk.base.errors.BadFile` that names file and
value.
"""

from __future__ import annotations

import json
import os
import re
import stat
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from sumuk.base.errors import BadFile, MissingFile

MAX_HEADER = 16 * 2**20
"""Longest header in bytes. The format allows 100 MB, which would take 300 MB of memory to read."""
MAX_TENSORS = 50_000
"""Five times what the largest published checkpoint holds; a million empty tensors would cost seconds to read."""
MAX_NAME = 500
MAX_METADATA = 10_000
MAX_DIMENSIONS = 64
MAX_ROOM = 60 * 2**20
"""Bytes of memory that the text of a JSON document may take while it is parsed."""

BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, for every dtype of the format."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_WIDE = re.compile(rb"[\xf0-\xf4]|\\u[dD][89abAB]")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: a key of :data:`BITS`.
        shape: sizes, outermost first; ``()`` for a scalar.
        begin: offset of its first byte, counted from the end of the header.
        end: offset behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself.

    Attributes:
        path: the file.
        tensors: name -> place, in the order of the file's header.
        metadata: the free texts of ``__metadata__``.
        start: offset of the first tensor byte in the file.
        stamp: device, inode, size and time of change when the header was read, to notice a file swapped
            later.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    start: int
    stamp: tuple[int, int, int, int]


def stamp(file: Path | int) -> tuple[int, int, int, int]:
    """Identity of a file, or of an open one, as the file system tells: device, inode, bytes, time of change in ns."""
    info = os.stat(file)  # noqa: PTH116  # an open file has no path
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


class Held:
    """A file that stays open, so that it can be asked again and again whether it is still what it was.

    Whatever its name comes to mean, who holds a file has it whole. But one that is written over may change under its
    reader, and one that is shortened kills a process that looks at mapped pages which are gone (SIGBUS).

    Args:
        path: the file.
        identity: its stamp when its header was read.
        code: of the error that says that it changed.

    Raises:
        OSError: it cannot be opened.
        BadFile: it is another file by now.
    """

    def __init__(self, path: Path, identity: tuple[int, ...], code: str = "file.changed") -> None:
        self.path, self.identity, self.code = path, identity, code
        self.handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.handle)
        self.check()

    def check(self) -> None:
        """Refuse it if it changed."""
        if stamp(self.handle) != self.identity:
            raise BadFile(
                f"{self.path}: was replaced or changed since its header was read; try again", self.code
            )


def regular(path: str | os.PathLike[str]) -> Path:
    """The path, if it names a regular file (links are followed, as the hub's cache consists of them).

    Raises:
        MissingFile: nothing there.
        BadFile: a folder, pipe or device (reading a pipe would wait for ever).
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', error)})"
        folder = str(path.absolute().parent)
        raise MissingFile(f"no file {shown(path.name)} in {folder!r:.200}{reason}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise BadFile(f"{path}: is {kind}; give a weight file", "file.kind")
    return path


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header; tensor bytes are not touched, so the size of the file does not matter.

    Raises:
        MissingFile: no such file.
        BadFile: anything that the format forbids; ``code`` begins with ``safetensors.``.
    """
    path = regular(path)
    before = stamp(path)
    size = before[2]
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            _refuse(path, "short", f"has only {size} bytes, not even the 8 of a header's length")
        length = int.from_bytes(first, "little")
        if length > MAX_HEADER or length > size - 8:
            limit = min(MAX_HEADER, size - 8)
            what = _mistaken(first)
            _refuse(path, "length", f"header length {length} is above {limit}{what}")
        raw = file.read(length)
    if len(raw) < length or stamp(path) != before:
        _refuse(path, "changed", "changed while it was read; wait until it is complete")
    if raw[:1] != b"{":
        _refuse(path, "start", f"header starts with {raw[:8]!r} instead of '{{'{_mistaken(first)}")
    if too_much := swells(raw):
        _refuse(path, "count", f"header {too_much}")
    table = _parse(path, raw)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    if len(table) > MAX_TENSORS:
        _refuse(path, "count", f"holds {len(table)} tensors, above {MAX_TENSORS}")
    tensors = {name: _entry(path, name, entry) for name, entry in table.items()}
    _contiguous(path, tensors, size - 8 - length)
    return Header(path, tensors, metadata, 8 + length, before)


def _refuse(path: Path, code: str, what: str) -> NoReturn:
    raise BadFile(f"{path}: {what}", f"safetensors.{code}")


def _mistaken(first: bytes) -> str:
    """What a file that is no safetensors file probably is."""
    if first[:2] == b"PK" or first[:1] == b"\x80":
        return "; this is a PyTorch pickle: name it .ckpt or .pt"
    if first[:4] == b"GGUF":
        return "; this is a GGUF file: name it .gguf"
    if first.lstrip()[:1] == b"<" or first == b"version ":
        return "; this is a text file, perhaps a web page or a Git LFS pointer instead of the weights"
    return ""


def shown(name: str) -> str:
    """A name from a file for a message, as long as a message may be."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def swells(raw: bytes) -> str:
    """Why a JSON document would take far more memory or time to parse than its size explains; "" if it does not.

    An empty table takes thirty times the memory of its brackets, and a single wide letter makes a text four times as
    large. What stands in texts is counted as well, which real documents have room for.
    """
    for piece, most, what in ((b"{", 2, "tables"), (b"[", 4, "lists"), (b",", 20, "values")):
        if (count := raw.count(piece)) > most * MAX_TENSORS:
            return f"holds {count} {what}, above {most * MAX_TENSORS}"
    narrow = raw.isascii() and b"\\u" not in raw
    width = 1 if narrow else 4 if _WIDE.search(raw) else 2
    room = len(raw) * (1 + 2 * width)  # itself, its text, and a value that is nearly all of it
    if room > MAX_ROOM:
        return f"takes {room} bytes of memory to read, above {MAX_ROOM}"
    return ""


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            _refuse(path, "duplicate", f"header names {shown(twice)} twice")
        return table

    def no_number(text: str) -> NoReturn:
        _refuse(path, "number", f"header holds the number {text[:40]!r}; only whole numbers are allowed")

    raw = raw.rstrip(b" ")  # nothing else may follow the table, though the parser would pass over line breaks
    if not raw.endswith(b"}"):
        _refuse(path, "json", f"header ends with {raw[-8:]!r} instead of '}}'")
    try:
        table = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=once,
            parse_float=no_number,
            parse_constant=no_number,
        )
    except UnicodeDecodeError as error:
        _refuse(path, "utf8", f"header is not UTF-8: {error.reason} at byte {error.start}")
    except RecursionError:
        _refuse(path, "depth", "header nests too deeply")
    except BadFile:
        raise
    except ValueError as error:
        _refuse(path, "json", f"header is not JSON: {error}")
    assert isinstance(table, dict)  # it starts with a brace
    return table


def _metadata(path: Path, table: object) -> dict[str, str]:
    if not isinstance(table, dict):
        _refuse(path, "metadata", f"__metadata__ is {type(table).__name__}, not a table of texts")
    if len(table) > MAX_METADATA:
        _refuse(path, "metadata", f"__metadata__ has {len(table)} entries, above {MAX_METADATA}")
    for key, value in table.items():
        if not isinstance(value, str):
            _refuse(path, "metadata", f"metadata {shown(key)} is {type(value).__name__}, not a text")
        if _SURROGATE.search(key) or _SURROGATE.search(value):
            _refuse(path, "metadata", f"metadata {shown(key)} holds half a letter (a lone surrogate)")
    return table


def _entry(path: Path, name: str, entry: object) -> TensorInfo:
    def refuse(code: str, what: str) -> NoReturn:
        _refuse(path, code, f"tensor {shown(name)}{what}")

    if not name or len(name) > MAX_NAME or _CONTROL.search(name):
        refuse("name", f": its name is empty, above {MAX_NAME} characters or not printable")
    if name[0] in "/\\" or (".." in name and ".." in re.split(r"[/\\]", name)):
        refuse("name", ": its name is a path out of its folder")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        fields = sorted(entry)[:8] if isinstance(entry, dict) else type(entry).__name__
        refuse("fields", f" has the fields {fields!s:.120}, not {sorted(_FIELDS)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse("dtype", f" has the unknown dtype {dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        refuse("shape", f" has the shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        refuse("offsets", f" has the offsets {offsets!r:.80}")
    numbers = prod(shape)
    if (numbers or prod(side or 1 for side in shape)) >= 2**63:  # steps have 64 bits, also beside a size of 0
        refuse("size", f" has the shape {shape!s:.80}, whose steps are above 2^63")
    begin, end = offsets
    if begin > end:
        refuse("offsets", f" ends at {end} before it begins at {begin}")
    bits = numbers * BITS[dtype]
    if bits != 8 * (end - begin):
        need = f"{bits / 8:g} bytes" if bits < 2**66 else "more than 2^63 bytes"
        refuse("size", f" of {dtype} {shape!s:.80} needs {need}, not {end - begin}")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # type(), as True is an int as well


def _contiguous(path: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """Each byte behind the header belongs to one tensor: no overlap, no hole to hide another file in."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < at:
            _refuse(path, "overlap", f"tensor {shown(name)} begins at {info.begin}, but another ends at {at}")
        if info.begin > at:
            _refuse(
                path, "hole", f"bytes {at} to {info.begin}, before tensor {shown(name)}, belong to no tensor"
            )
        at = info.end
    if at > size:
        _refuse(path, "truncated", f"is cut off: its tensors need {at} bytes, not {size}; fetch it again")
    if at < size:
        _refuse(path, "tail", f"has {size - at} bytes behind its last tensor")
