"""GGUF files that are hostile or broken, byte by byte: numbers 55 to 67 of the list.

Many are the kinds of llama.cpp's ``test-gguf.cpp`` and of the advisories on its readers: CVE-2025-53630,
CVE-2026-27940 and CVE-2026-33298 are sizes that wrap.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.hostile.case import Case

U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64 = range(13)
TYPE = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_2": 4, "Q8_0": 8, "Q4_K": 12, "I8": 24, "I64": 27, "BF16": 30}
TOP = 2**64 - 1


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def number(name: str, value: int, kind: int = U32, letter: str = "I") -> bytes:
    return key(name, kind, struct.pack("<" + letter, value))


def array(name: str, kind: int, count: int, values: bytes = b"") -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", kind, count) + values)


def tensor(
    name: str | bytes, sizes: Sequence[int], kind: int = 0, at: int = 0, dims: int | None = None
) -> bytes:
    """An entry; sizes innermost first."""
    head = struct.pack("<I", len(sizes) if dims is None else dims)
    return text(name) + head + struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, at)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file out of its entries."""
    n_tensors, n_keys = (len(tensors), len(keys)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment) + data


ONE = tensor("w", [8])
GOOD = gguf([key("general.architecture", TEXT, text("flux"))], [ONE], bytes(32))


def swapped() -> bytes:
    """As a big-endian machine writes it; the magic stays."""
    head = (
        b"GGUF"
        + struct.pack(">IQQ", 3, 1, 0)
        + struct.pack(">Q", 1)
        + b"w"
        + struct.pack(">IQIQ", 1, 8, 0, 0)
    )
    return head + bytes(-len(head) % 32) + bytes(32)


def nested(depth: int) -> bytes:
    return key("deep", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U8, 0))


def one(entry: bytes, data: bytes = bytes(32)) -> bytes:
    return gguf([], [entry], data)


def two(first: bytes, second: bytes, data: bytes = bytes(64)) -> bytes:
    return gguf([], [first, second], data)


def aligned(entry: bytes, step: int = 32) -> bytes:
    return gguf([entry], [ONE], bytes(32), alignment=step)


def overlong_array(count: int, kind: int = U8) -> bytes:
    """64 bytes that claim an array without end."""
    return gguf([array("general.tags", kind, count)]).ljust(64, b"\0")


FILES: tuple[tuple[int, str, str, Callable[[], bytes]], ...] = (
    (55, "empty", "truncated", lambda: b""),
    (55, "magic alone", "truncated", lambda: b"GGUF"),
    (55, "bad magic", "magic", lambda: gguf(magic=b"FUGG")),
    (55, "old magic", "magic", lambda: gguf(magic=b"ggjt")),
    (55, "version 0", "version", lambda: gguf(version=0)),
    (55, "version 1", "version", lambda: gguf(version=1)),
    (55, "version 99", "version", lambda: gguf(version=99)),
    (55, "byte-swapped", "swapped", swapped),
    (56, "2^64-1 tensors", "count", lambda: gguf(counts=(TOP, 0))),
    (56, "2^64-1 keys", "count", lambda: gguf(counts=(0, TOP))),
    (56, "more tensors than bytes", "count", lambda: gguf([], [ONE], bytes(32), counts=(90, 0))),
    (56, "more tensors than entries", "truncated",
     lambda: gguf([], [tensor(name, [8]) for name in "abc"], counts=(5, 0), alignment=1)),
    (57, "key of 2^63 bytes", "length", lambda: gguf([struct.pack("<Q", 2**63) + b"k"]).ljust(64, b"\0")),
    (57, "key of 10 kB", "key", lambda: gguf([number("k" * 10_000, 1)])),
    (57, "text of 2^40 bytes", "length", lambda: gguf([key("t", TEXT, struct.pack("<Q", 2**40))])),
    (57, "text of 2^64-8 bytes", "length", lambda: gguf([key("t", TEXT, struct.pack("<Q", TOP - 7))])),
    (57, "text of 2 MB", "text", lambda: gguf([key("t", TEXT, text(b"x" * 2**21))])),
    (57, "10 MB of texts", "text", lambda: gguf([key(f"t{i}", TEXT, text(b"x" * 10**6)) for i in range(10)])),
    (58, "u8 array of 2^40 in 64 bytes", "length", lambda: overlong_array(2**40)),
    (58, "u64 array of 2^61, which wraps", "length", lambda: overlong_array(2**61, U64)),
    (58, "text array of 2^40", "length", lambda: overlong_array(2**40, TEXT)),
    (58, "two million texts", "array", lambda: gguf([array("t", TEXT, 2 * 10**6, bytes(16 * 10**6))])),
    (58, "3,000 arrays of 900", "array", lambda: gguf([array(f"t{i}", U8, 900, bytes(900)) for i in range(3000)])),
    (58, "text array with one too long", "length",
     lambda: gguf([array("t", TEXT, 1001, bytes(8000) + struct.pack("<Q", 2**40))])),
    (58, "text array that runs out", "length",
     lambda: gguf([array("t", TEXT, 1001, struct.pack("<Q", 300) * 1001)])),
    (59, "array of arrays", "nested", lambda: gguf([nested(1)])),
    (59, "2,000 nested arrays", "nested", lambda: gguf([nested(2000)])),
    (60, "empty key", "key", lambda: gguf([number("", 1)])),
    (60, "NUL in key", "key", lambda: gguf([number("a\0b", 1)])),
    (60, "key not UTF-8", "utf8", lambda: gguf([key(b"\xff\xfe", U8, b"\1")])),
    (60, "text not UTF-8", "utf8", lambda: gguf([key("general.name", TEXT, text(b"\xed\xa0\x80"))])),
    (60, "text in an array not UTF-8", "utf8", lambda: gguf([array("general.tags", TEXT, 1, text(b"\xff"))])),
    (60, "bool 7", "bool", lambda: gguf([key("b", BOOL, b"\7")])),
    (60, "bool 7 in an array", "bool", lambda: gguf([array("b", BOOL, 2, b"\1\7")])),
    (60, "bool 7 in a long array", "bool", lambda: gguf([array("b", BOOL, 2000, bytes(1999) + b"\7")])),
    (60, "duplicate key", "duplicate", lambda: gguf([number("k", 1), number("k", 2)])),
    (60, "value of unknown type", "type", lambda: gguf([key("k", 13, bytes(8))])),
    (60, "elements of unknown type", "type", lambda: gguf([array("k", 2**31, 1, bytes(8))])),
    (61, "alignment 0", "alignment", lambda: aligned(number("general.alignment", 0))),
    (61, "alignment 1", "alignment", lambda: aligned(number("general.alignment", 1), 1)),
    (61, "alignment 13", "alignment", lambda: aligned(number("general.alignment", 13), 13)),
    (61, "alignment as int32", "alignment", lambda: aligned(number("general.alignment", 32, I32))),
    (61, "alignment as u64", "alignment", lambda: aligned(number("general.alignment", 32, U64, "Q"))),
    (61, "alignment 2^31", "alignment", lambda: aligned(number("general.alignment", 2**31))),
    (61, "alignment as text", "alignment", lambda: aligned(key("general.alignment", TEXT, text("32")))),
    (61, "alignment as array", "alignment",
     lambda: aligned(array("general.alignment", U32, 1, struct.pack("<I", 32)))),
    (62, "2^31 dimensions", "dims", lambda: one(tensor("w", [8], dims=2**31))),
    (62, "64 dimensions", "dims", lambda: one(tensor("w", [1] * 64))),
    (62, "5 dimensions", "dims", lambda: one(tensor("w", [8, 1, 1, 1, 1]))),
    (62, "a size of 2^64-1", "shape", lambda: one(tensor("w", [TOP]))),
    (62, "a size of 2^64-1 beside 0", "shape", lambda: one(tensor("w", [0, TOP]), b"")),
    (63, "elements that wrap to 0", "size", lambda: one(tensor("w", [2**32, 2**32]), b"")),
    (63, "elements that wrap to 8", "size", lambda: one(tensor("w", [2**61 + 1, 8]))),
    (63, "sizes that wrap beside 0", "size", lambda: one(tensor("w", [0, 2**62, 2**62]), b"")),
    (63, "a kept shape that wraps beside 0", "orig_shape",
     lambda: gguf([array("comfy.gguf.orig_shape.w", I64, 3, struct.pack("<3q", 0, 2**62, 2**62))],
                  [tensor("w", [0])])),
    (63, "bytes that wrap", "size", lambda: one(tensor("w", [2**61], TYPE["I64"]), b"")),
    (63, "blocks whose bytes wrap", "size", lambda: one(tensor("w", [2**63 - 32], TYPE["Q8_0"]))),
    (63, "sums that wrap", "truncated",
     lambda: two(tensor("a", [2**63 - 64], TYPE["I8"]), tensor("b", [2**63 - 64], TYPE["I8"], 2**63 - 64))),
    (64, "unknown type", "dtype", lambda: one(tensor("w", [8], 999))),
    (64, "type 2^32-1", "dtype", lambda: one(tensor("w", [8], 2**32 - 1))),
    (64, "removed type Q4_2", "dtype", lambda: one(tensor("w", [32], TYPE["Q4_2"]))),
    (64, "type that is not read: IQ2_XXS", "dtype", lambda: one(tensor("w", [256], 16), bytes(96))),
    (64, "row of 16 in blocks of 32", "row", lambda: one(tensor("w", [16, 2], TYPE["Q4_0"]))),
    (64, "row of 128 in blocks of 256", "row", lambda: one(tensor("w", [128, 2], TYPE["Q4_K"]), bytes(160))),
    (64, "scalar in blocks", "row", lambda: one(tensor("w", [], TYPE["Q8_0"]))),
    (65, "offset past the end", "offset", lambda: one(tensor("w", [8], at=4096))),
    (65, "offset 2^64-32, which wraps", "offset", lambda: one(tensor("w", [8], at=TOP - 31))),
    (65, "unaligned offset", "offset", lambda: one(tensor("w", [4], at=8))),
    (65, "truncated", "truncated", lambda: GOOD[:-1]),
    (65, "truncated within the header", "truncated", lambda: GOOD[:60]),
    (66, "same bytes twice", "overlap", lambda: two(tensor("a", [8]), tensor("b", [8]))),
    (66, "partial overlap", "overlap", lambda: two(tensor("a", [16]), tensor("b", [8], at=32))),
    (66, "hole before", "hole", lambda: one(tensor("w", [8], at=32), bytes(64))),
    (66, "hole between", "hole", lambda: two(tensor("a", [8]), tensor("b", [8], at=64), bytes(96))),
    (66, "a block behind the last tensor", "tail", lambda: one(ONE, bytes(64))),
    (66, "ZIP tail", "tail", lambda: GOOD + b"PK\x05\x06" + bytes(18)),
    (66, "bytes behind a header without tensors", "tail", lambda: gguf(data=bytes(64))),
    (67, "duplicate tensor", "duplicate", lambda: two(ONE, tensor("w", [8], at=32))),
    (67, "name of 10 kB", "name", lambda: one(tensor("w" * 10_000, [8]))),
    (67, "empty name", "name", lambda: one(tensor("", [8]))),
    (67, "name that leaves its folder", "name", lambda: one(tensor("../../etc/passwd", [8]))),
    (67, "absolute name", "name", lambda: one(tensor("/etc/passwd", [8]))),
    (67, "Windows path", "name", lambda: one(tensor("a\\..\\x", [8]))),
    (67, "NUL in name", "name", lambda: one(tensor("a\0b", [8]))),
    (67, "name not UTF-8", "utf8", lambda: one(tensor(b"\xc0\xaf", [8]))),
    (67, "shape of another size", "orig_shape",
     lambda: gguf([array("comfy.gguf.orig_shape.w", I32, 1, struct.pack("<i", 9))], [ONE], bytes(32))),
    (67, "negative shape", "orig_shape",
     lambda: gguf([array("comfy.gguf.orig_shape.w", I32, 2, struct.pack("<ii", -2, -4))], [ONE], bytes(32))),
    (67, "shape of numbers that are none", "orig_shape",
     lambda: gguf([array("comfy.gguf.orig_shape.w", F32, 1, struct.pack("<f", 8))], [ONE], bytes(32))),
    (67, "shape of 1,000 sizes", "orig_shape",
     lambda: gguf([array("comfy.gguf.orig_shape.w", I32, 1000, struct.pack("<i", 1) * 1000)], [ONE], bytes(32))),
)  # fmt: skip
LEGAL: tuple[tuple[int, str, Callable[[], bytes]], ...] = (
    (62, "a size of 0", lambda: one(tensor("w", [0, 4]), b"")),
    (62, "a size of 0 in blocks", lambda: one(tensor("w", [0, 4], TYPE["Q4_K"]), b"")),
    (62, "a size of 0 beside 2^62", lambda: one(tensor("w", [0, 2**62], TYPE["Q4_0"]), b"")),
    (62, "no dimensions", lambda: one(tensor("w", []), bytes(32))),
)


def _case(number: int, name: str, code: str, make: Callable[[], bytes], warns: str | None = None) -> Case:
    def write(folder: Path) -> Path:
        path = folder / "hostile.gguf"
        path.write_bytes(make())
        return path

    return Case(number, f"GGUF: {name}", code, write, warns)


CASES = (
    *(_case(number, name, f"gguf.{code}", make) for number, name, code, make in FILES),
    *(_case(number, name, "", make, warns="") for number, name, make in LEGAL),
)
