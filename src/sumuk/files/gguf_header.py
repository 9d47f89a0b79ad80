"""The front of a GGUF file, number by number: what a file says of its own lengths is compared with what is left of it.

See :mod:`~sumuk.files.gguf` for the layout. Nothing is allocated that the file does not hold, and nothing is kept that
is longer than anybody needs: vocabularies are passed over and counted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from sumuk.base.errors import BadFile
from sumuk.files.safetensors import MAX_METADATA

MAX_TENSORS = 20_000
"""Several times what the largest published checkpoint holds; each takes 8 microseconds to read."""
MAX_HEADER = 64 * 2**20
"""Longest header in bytes. A vocabulary of 256,000 pieces takes 6 MB."""
MAX_TEXT = 2**20
MAX_TEXTS = 8 * 2**20
"""Bytes of all texts that are kept; in memory a character may take four."""
MAX_KEY = 1_000
MAX_ELEMENTS = 1_000_000
"""Elements of all arrays together: reading as many texts takes a fifth of a second."""
MAX_KEPT = 1_000
"""Elements of an array whose values are of interest; longer ones are vocabularies."""
MAX_ALL_KEPT = 200_000
VERSIONS = (2, 3)

SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Number of a value's type -> its letter at :mod:`struct`."""
U32, I32, BOOL, TEXT, ARRAY, I64 = 4, 5, 7, 8, 9, 11

CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def refuse(path: Path, code: str, what: str) -> NoReturn:
    raise BadFile(f"{path}: {what}", f"gguf.{code}")


def shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


class Header:
    """The bytes of a header, from front to back; what is asked for is compared with what is left."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = 0
        self.elements = self.kept = self.texts = 0

    def refuse(self, code: str, what: str) -> NoReturn:
        refuse(self.path, code, what)

    def take(self, count: int) -> bytes:
        """The next bytes; the caller has compared their number with :meth:`claim` if the file says it."""
        raw = self.file.read(count)
        self.at += count
        if len(raw) < count:
            self.refuse("truncated", f"is cut off within its header, after {self.size} bytes; fetch it again")
        if self.at > MAX_HEADER:
            self.refuse("header", f"header is longer than {MAX_HEADER} bytes")
        return raw

    def claim(self, count: int, width: int, what: str) -> None:
        """Refuses so many things of at least this many bytes if the file cannot hold them."""
        if count * width > min(self.size, MAX_HEADER) - self.at:
            left = f"byte {self.at} of {self.size}"
            self.refuse("length", f"{what} says a length of {count} at {left}, more than is left")

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack("<" + letter, self.take(struct.calcsize(letter)))
        return value

    def text(self, most: int, what: str, code: str) -> str:
        """A text of at most so many bytes."""
        length = self.number("Q")
        self.claim(length, 1, what)
        if length > most:
            self.refuse(code, f"{what} has {length} bytes, above {most}")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.refuse("utf8", f"{what} is not UTF-8: {error.reason} at byte {error.start} of {raw[:24]!r}")

    def value(self, kind: int, what: str) -> Any:
        """A value that is kept."""
        if kind == TEXT:
            before = self.at
            text = self.text(MAX_TEXT, what, "text")
            self.texts += self.at - before
            if self.texts > MAX_TEXTS:
                self.refuse("text", f"its texts are longer than {MAX_TEXTS} bytes together")
            return text
        if kind not in SCALARS:
            self.refuse("type", f"{what} has the unknown type {kind}")
        number = self.number(SCALARS[kind])
        return self.truth(number, what) if kind == BOOL else number

    def truth(self, number: int, what: str) -> bool:
        if number > 1:
            self.refuse("bool", f"{what} is neither true nor false but {number}")
        return bool(number)

    def array(self, what: str) -> tuple[int, Any]:
        """Its elements' type, and a list, or for a long one a text that says how many."""
        kind, count = self.number("I"), self.number("Q")
        if kind == ARRAY:
            self.refuse("nested", f"{what} is an array of arrays, which no model's file needs")
        if kind != TEXT and kind not in SCALARS:
            self.refuse("type", f"{what} has elements of the unknown type {kind}")
        width = 8 if kind == TEXT else struct.calcsize(SCALARS[kind])
        self.claim(count, width, what)
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            self.refuse("array", f"its arrays have more than {MAX_ELEMENTS} elements together")
        if count <= MAX_KEPT:
            self.kept += count
            if self.kept > MAX_ALL_KEPT:
                self.refuse("array", f"its short arrays have more than {MAX_ALL_KEPT} elements together")
        if kind == TEXT:
            if count <= MAX_KEPT:
                return kind, [self.value(kind, what) for _ in range(count)]
            self.skip_texts(count, what)
            return kind, f"{count} elements"
        raw = self.take(count * width)
        if kind == BOOL:
            self.truth(max(raw, default=0), what)
        if count > MAX_KEPT:
            return kind, f"{count} elements"
        numbers = struct.unpack(f"<{count}{SCALARS[kind]}", raw)
        return kind, [bool(number) if kind == BOOL else number for number in numbers]

    def skip_texts(self, count: int, what: str) -> None:
        """A vocabulary; without the calls of :meth:`take`, as there may be a million."""
        read, most = self.file.read, min(self.size, MAX_HEADER)
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            self.at += 8 + length
            if length > MAX_TEXT or self.at > most:
                self.refuse("length", f"{what} holds a text of {length} bytes before byte {most}")
            read(length)


def begin(header: Header) -> tuple[int, int]:
    """Magic, version and the numbers of tensors and keys."""
    magic = header.take(4)
    if magic != b"GGUF":
        header.refuse("magic", f"begins with {magic!r} instead of b'GGUF'; this is no GGUF file")
    version = header.number("I")
    if version not in VERSIONS:
        if version & 0xFFFF == 0 < version:
            header.refuse(
                "swapped", "is written in big-endian byte order; convert it again for usual machines"
            )
        header.refuse("version", f"has GGUF version {version}; 2 and 3 are read: convert it again")
    tensors, keys = header.number("Q"), header.number("Q")
    if tensors > MAX_TENSORS or tensors * 24 > header.size:
        header.refuse(
            "count", f"claims {tensors} tensors in {header.size} bytes; at most {MAX_TENSORS} are read"
        )
    if keys > MAX_METADATA or keys * 13 > header.size:
        header.refuse("count", f"claims {keys} keys in {header.size} bytes; at most {MAX_METADATA} are read")
    return tensors, keys


def read_values(header: Header, count: int) -> dict[str, tuple[int, Any]]:
    """Key -> type and value; an array has the type of its elements, negative."""
    values: dict[str, tuple[int, Any]] = {}
    for number in range(count):
        key = header.text(MAX_KEY, f"key {number}", "key")
        if not key or CONTROL.search(key):
            header.refuse("key", f"key {number} is {shown(key)}, empty or not printable")
        if key in values:
            header.refuse("duplicate", f"has the key {shown(key)} twice")
        kind, what = header.number("I"), f"key {shown(key)}"
        if kind == ARRAY:
            inner, value = header.array(what)
            values[key] = -1 - inner, value
        else:
            values[key] = kind, header.value(kind, what)
    return values
