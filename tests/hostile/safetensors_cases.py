"""Safetensors files that are hostile or broken, byte by byte: numbers 35 to 54 of the list."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.hostile.case import Case

GOOD = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
"""The header of one tensor with 8 bytes."""
EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
MISSING = "missing"
"""Stands for the code of a file that is not there."""


def raw(header: bytes, data: bytes = b"") -> bytes:
    """A file out of its header and its data."""
    return len(header).to_bytes(8, "little") + header + data


def entry(shape: Any = (2,), begin: int = 0, end: int = 8, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def one(name: str = "w", data: bytes = bytes(8), **kinds: Any) -> bytes:
    """A file of one tensor."""
    return raw(json.dumps({name: entry(**kinds)}).encode(), data)


def two(first: dict[str, Any], second: dict[str, Any], data: bytes = bytes(16)) -> bytes:
    return raw(json.dumps({"a": first, "b": second}).encode(), data)


def texts(table: Any) -> bytes:
    """A file of metadata alone."""
    return raw(json.dumps({"__metadata__": table}).encode())


def changed(old: bytes, new: bytes) -> bytes:
    """The good file with something else in its header."""
    assert old in GOOD
    return raw(GOOD.replace(old, new), bytes(8))


def crowd(count: int) -> bytes:
    """So many tensors of no size."""
    return raw(b"{%s}" % b",".join(b'"%d":%s' % (at, EMPTY) for at in range(count)))


def many(piece: bytes, count: int) -> bytes:
    """The same thing so many times, in a list where a tensor should be."""
    return raw(b'{"w":[' + b",".join([piece] * count) + b"]}")


def tables(count: int) -> bytes:
    return raw(b"{%s}" % b",".join(b'"%d":{}' % at for at in range(count)))


def cut(size: int) -> bytes:
    return one()[:size]


BROKEN: tuple[tuple[int, str, str, bytes | Callable[[], bytes]], ...] = (
    (35, "empty", "short", b""),
    (35, "one byte", "short", bytes(1)),
    (35, "seven bytes", "short", bytes(7)),
    (35, "header length 0", "start", bytes(8)),
    (35, "header length 0, then data", "start", bytes(64)),
    (35, "header length 2^63", "length", (2**63).to_bytes(8, "little") + bytes(64)),
    (35, "header length 2^64-1", "length", b"\xff" * 8 + bytes(64)),
    (35, "header longer than the file", "length", (len(GOOD) + 9).to_bytes(8, "little") + GOOD + bytes(8)),
    (35, "a header of 40 MB", "length", lambda: raw(b'{"__metadata__":{"a":"' + b"x" * 40_000_000 + b'"}}')),
    (35, "a header of 15 MB with one wide letter", "count",
     lambda: raw(b'{"__metadata__":{"a":"' + b"x" * 15_000_000 + "\U0001f600".encode() + b'"}}')),
    (35, "a header of 15 MB with one wide letter, spelt out", "count",
     lambda: raw(b'{"__metadata__":{"a":"' + b"x" * 15_000_000 + rb'\ud83d\ude00"}}')),
    (35, "a web page", "length", b"<!DOCTYPE html><html>" + b" " * 50),
    (36, "not UTF-8", "utf8", raw(b'{"\xff\xfe":1}')),
    (36, "a surrogate in UTF-8", "utf8", raw(b'{"\xed\xa0\x80":1}')),
    (36, "UTF-16", "start", raw(GOOD.decode().encode("utf-16-le")[1:], bytes(8))),
    (36, "byte order mark", "start", raw(b"\xef\xbb\xbf" + GOOD, bytes(8))),
    (36, "a list", "start", raw(b"[]")),
    (36, "a text", "start", raw(b'"w"')),
    (36, "trailing NULs", "json", raw(GOOD + bytes(8), bytes(8))),
    (36, "trailing line breaks", "json", raw(GOOD + b"\n\n", bytes(8))),
    (36, "second JSON", "json", raw(GOOD + b"{}", bytes(8))),
    (36, "cut JSON", "json", raw(GOOD[:-1], bytes(8))),
    (36, "a comma too many", "json", raw(GOOD[:-1] + b",}", bytes(8))),
    (36, "a comment", "json", raw(GOOD[:-1] + b"/* */}", bytes(8))),
    (36, "a control character in a name", "json", changed(b'"w"', b'"\x01"')),
    (36, "blanks alone", "start", raw(b" " * 64)),
    (37, "leading space", "start", raw(b" " + GOOD, bytes(8))),
    (37, "leading line break", "start", raw(b"\n" + GOOD, bytes(8))),
    (37, "leading tab", "start", raw(b"\t" + GOOD, bytes(8))),
    (38, "duplicate tensor", "duplicate", raw(GOOD[:-1] + b"," + GOOD[1:], bytes(8))),
    (38, "duplicate tensor, spelt in two ways", "duplicate",
     raw(GOOD[:-1] + b"," + GOOD[1:].replace(b'"w"', rb'"\u0077"'), bytes(8))),
    (38, "duplicate tensor with a long name", "duplicate",
     raw((GOOD[:-1] + b"," + GOOD[1:]).replace(b'"w"', b'"' + b"w" * 5000 + b'"'), bytes(8))),
    (38, "duplicate field", "duplicate", changed(b'"F32"', b'"F32","dtype":"F32"')),
    (39, "duplicate metadata", "duplicate", raw(b'{"__metadata__":{"a":"1","a":"2"}}')),
    (39, "two metadata", "duplicate", raw(b'{"__metadata__":{},"__metadata__":{}}')),
    (39, "metadata not texts", "metadata", texts({"a": 1})),
    (39, "metadata in metadata", "metadata", texts({"a": {"b": "c"}})),
    (39, "metadata null", "metadata", texts({"a": None})),
    (39, "metadata a list", "metadata", texts([])),
    (39, "metadata a text", "metadata", texts("a")),
    (39, "metadata as a tensor", "metadata", texts(entry())),
    (39, "too much metadata", "metadata", texts({str(at): "" for at in range(10_001)})),
    (39, "lone surrogate in metadata", "metadata", raw(rb'{"__metadata__":{"a":"\ud800"}}')),
    (39, "lone surrogate in a key of metadata", "metadata", raw(rb'{"__metadata__":{"\udfff":"a"}}')),
    (39, "number without end in metadata", "number", raw(b'{"__metadata__":{"a":1e999}}')),
    (40, "unknown field", "fields", one(note="x")),
    (40, "unknown fields with long names", "fields", one(**{"x" * 500 + str(at): 1 for at in range(9)})),
    (40, "missing field", "fields", raw(b'{"w":{"dtype":"F32","shape":[2]}}', bytes(8))),
    (40, "entry a list", "fields", raw(b'{"w":[]}')),
    (40, "entry null", "fields", raw(b'{"w":null}')),
    (40, "entry a number", "fields", raw(b'{"w":7}')),
    (41, "unknown dtype", "dtype", one(dtype="F33")),
    (41, "dtype in small letters", "dtype", one(dtype="f32")),
    (41, "dtype a number", "dtype", one(dtype=32)),
    (41, "dtype a list", "dtype", one(dtype=["F32"])),
    (41, "dtype of 1 MB", "dtype", lambda: one(dtype="F" * 10**6)),
    (41, "4-bit elements, which nothing computes with", "dtype", one(dtype="F4", end=1, data=b"\x21")),
    (41, "odd number of 4-bit elements", "size", one(dtype="F4", shape=(3,), end=1, data=bytes(1))),
    (41, "three 6-bit elements", "size", one(dtype="F6_E2M3", shape=(3,), end=2, data=bytes(2))),
    (42, "negative offset", "offsets", one(begin=-8, end=0, data=b"")),
    (42, "reversed offsets", "offsets", one(begin=8, end=0)),
    (42, "float offsets", "number", changed(b"[0,8]", b"[0.0,8.0]")),
    (42, "offsets with exponents", "number", changed(b"[0,8]", b"[0,8e0]")),
    (42, "true as offset", "offsets", changed(b"[0,8]", b"[false,8]")),
    (42, "text as offset", "offsets", changed(b"[0,8]", b'[0,"8"]')),
    (42, "three offsets", "offsets", changed(b"[0,8]", b"[0,4,8]")),
    (42, "one offset", "offsets", changed(b"[0,8]", b"[8]")),
    (42, "a table of offsets", "offsets", changed(b"[0,8]", b'{"0":8}')),
    (42, "infinite offset", "number", changed(b"[0,8]", b"[0,Infinity]")),
    (42, "NaN offset", "number", changed(b"[0,8]", b"[NaN,8]")),
    (42, "offsets of 2^64", "offsets", one(begin=2**64, end=2**64 + 8)),
    (42, "5,000-digit offset", "json", changed(b"[0,8]", b"[0," + b"8" * 5000 + b"]")),
    (42, "4,000-digit offset", "offsets", changed(b"[0,8]", b"[0," + b"8" * 4000 + b"]")),
    (43, "same bytes twice", "overlap", two(entry(), entry(), bytes(8))),
    (43, "partial overlap", "overlap", two(entry(), entry(begin=4, end=12), bytes(12))),
    (43, "one inside another", "overlap",
     two(entry((4,), end=16), entry((1,), begin=4, end=8), bytes(16))),
    (43, "overlap of long names", "overlap",
     raw(json.dumps({"a" * 450: entry(), "b" * 450: entry(begin=4, end=12)}).encode(), bytes(12))),
    (44, "hole before", "hole", one(begin=8, end=16, data=bytes(16))),
    (44, "hole between", "hole", two(entry(), entry(begin=12, end=20), bytes(20))),
    (44, "bytes without a tensor", "tail", raw(b"{}", bytes(8))),
    (44, "one byte behind the last tensor", "tail", one(data=bytes(9))),
    (44, "ZIP tail", "tail", one(data=bytes(8) + b"PK\x05\x06" + bytes(18))),
    (45, "one byte lost", "truncated", one(data=bytes(7))),
    (45, "all data lost", "truncated", one(data=b"")),
    (45, "cut within the header", "length", cut(40)),
    (45, "cut behind the length", "length", cut(8)),
    (45, "24 GB of which nothing is there", "truncated", one(shape=(6 * 10**9,), end=24 * 10**9)),
    (46, "shape and span disagree", "size", one(shape=(3,))),
    (46, "shape overflow", "size", one(shape=(2**62, 2**62))),
    (46, "shape that wraps to 2", "size", one(shape=(2**33, 2**31 + 1))),
    (46, "shape of 2^3968", "size", one(shape=(2**62,) * 64)),
    (46, "sizes that wrap beside 0", "size", one(shape=(0, 2**62, 2**62), end=0, data=b"")),
    (46, "dimension above 2^63", "shape", one(shape=(2**64 - 1, 0), end=0, data=b"")),
    (46, "dimension of 2^64", "shape", one(shape=(2**64,))),
    (46, "negative dimension", "shape", one(shape=(-2,))),
    (46, "two negative dimensions", "shape", one(shape=(-1, -2))),
    (46, "shape a number", "shape", changed(b"[2]", b"2")),
    (46, "shape of texts", "shape", changed(b"[2]", b'["2"]')),
    (46, "shape in a shape", "shape", changed(b"[2]", b"[[2]]")),
    (47, "empty tensor inside another", "overlap", two(entry(), entry(shape=(0,), begin=4, end=4), bytes(8))),
    (47, "empty tensor behind the end", "hole", two(entry(), entry(shape=(0,), begin=9, end=9), bytes(8))),
    (47, "empty tensor that has bytes", "size", one(shape=(0,))),
    (48, "65 dimensions", "shape", one(shape=(1,) * 65, end=4, data=bytes(4))),
    (48, "100,000 dimensions", "shape", lambda: one(shape=(1,) * 100_000, end=4, data=bytes(4))),
    (49, "empty name", "name", one(name="")),
    (49, "path as name", "name", one(name="../../etc/passwd")),
    (49, "path within a name", "name", one(name="a/../../x")),
    (49, "absolute path as name", "name", one(name="/etc/passwd")),
    (49, "Windows path as name", "name", one(name="..\\x")),
    (49, "absolute Windows path as name", "name", one(name="\\\\host\\x")),
    (49, "NUL in name", "name", one(name="a\0b")),
    (49, "line break in name", "name", one(name="a\nb")),
    (49, "terminal escape in name", "name", one(name="\x1b[2Jw")),
    (49, "lone surrogate in name", "name", changed(b'"w"', rb'"\ud800"')),
    (49, "501 characters in name", "name", one(name="x" * 501)),
    (49, "name of 1 MB", "name", lambda: one(name="x" * 10**6)),
    (50, "BOOL byte 7", "bool", one(dtype="BOOL", end=2, data=b"\x01\x07")),
    (50, "BOOL byte 255 at the end of many", "bool",
     lambda: one(dtype="BOOL", shape=(10**6,), end=10**6, data=bytes(10**6 - 1) + b"\xff")),
    (51, "500,000 empty tensors", "", lambda: crowd(500_000)),
    (51, "100,001 empty tensors", "count", lambda: crowd(100_001)),
    (51, "50,001 empty tensors", "count", lambda: crowd(50_001)),
    (51, "two million empty tables", "", lambda: tables(2 * 10**6)),
    (51, "a million empty tables", "count", lambda: tables(10**6)),
    (52, "100,000 deep", "depth", raw(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    (52, "100,000 tables deep", "depth", raw(b'{"w":' * 100_000 + b"1" + b"}" * 100_000)),
    (52, "100,000 deep without an end", "depth", raw(b'{"w":' + b"[" * 100_000 + b"}")),
    (52, "metadata 100,000 deep", "depth", raw(b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    (52, "five million empty lists", "count", lambda: many(b"[]", 5 * 10**6)),
    (52, "two million numbers", "count", lambda: many(b"54321", 2 * 10**6)),
    (52, "2,000 numbers of 4,000 digits", "fields", lambda: many(b"8" * 4000, 2000)),
)  # fmt: skip
"""Number, name, code behind "safetensors.", and what. An empty code: whichever, as several are right."""

FLOATS = {
    "F64": struct.pack("<2d", 1.0, float("nan")),
    "F32": struct.pack("<2f", 1.0, float("nan")),
    "F16": struct.pack("<2e", 1.0, float("-inf")),
    "BF16": b"\x80\x3f\x80\x7f",
    "F8_E4M3": b"\x38\x7f",
    "F8_E5M2": b"\x3c\x7c",
}
"""Two numbers of each type, of which the second is none."""

LEGAL: tuple[tuple[int, str, bytes | Callable[[], bytes], str], ...] = (
    (35, "no tensors", raw(b"{}"), ""),
    (36, "trailing blanks", raw(GOOD + b"  ", bytes(8)), ""),
    (39, "empty metadata", texts({}), ""),
    (39, "markup and control characters in metadata", texts({"a": "[red]\x1b[2J\n</script>"}), ""),
    (47, "empty tensors that share an offset",
     raw(json.dumps({"a": entry((0,), 0, 0), "b": entry((0, 2**40), 0, 0), "c": entry()}).encode(), bytes(8)), ""),
    (48, "64 dimensions", one(shape=(1,) * 64, end=4, data=bytes(4)), ""),
    (49, "500 letters of Hangul in a name", one(name="묵" * 500), ""),
    (50, "BOOL bytes 0 and 1", one(dtype="BOOL", end=2, data=b"\x01\x00"), ""),
    (51, "50,000 empty tensors", lambda: crowd(50_000), ""),
    *((54, f"{dtype} with a number that is none",
       one(dtype=dtype, end=len(data), data=data), "w: 1 ") for dtype, data in FLOATS.items()),
)  # fmt: skip
"""Number, name, what, and what the warnings hold."""


def shards(where: Mapping[str, Any] | bytes, **files: bytes) -> Callable[[Path], Path]:
    """Writes an index and its shards: ``a=...`` becomes ``a.safetensors``."""

    def write(folder: Path) -> Path:
        for stem, content in files.items():
            (folder / f"{stem}.safetensors").write_bytes(content)
        index = folder / "model.safetensors.index.json"
        index.write_bytes(where if isinstance(where, bytes) else json.dumps({"weight_map": where}).encode())
        return index

    return write


A, B = one("a"), one("b")
SHARDS: tuple[tuple[str, str, Callable[[Path], Path]], ...] = (
    ("a shard ../x", "shards.name", shards({"a": "../a.safetensors"}, a=A)),
    ("an absolute shard", "shards.name", shards({"a": "/etc/passwd"})),
    ("a URL as a shard", "shards.name", shards({"a": "https://example.com/a.safetensors"})),
    ("a Windows path as a shard", "shards.name", shards({"a": "..\\a.safetensors"})),
    ("a shard that is no safetensors file", "shards.name", shards({"a": "a.bin"})),
    ("a shard with NUL", "shards.name", shards({"a": "a\0.safetensors"})),
    ("a shard that is a number", "shards.name", shards({"a": 1})),
    ("a shard with a name of 1 MB", "shards.name", shards({"a" * 10**6: "/" * 10**6})),
    ("a missing shard", MISSING, shards({"a": "a.safetensors", "b": "b.safetensors"}, a=A)),
    ("a shard with a name of 5,000 letters", "shards.name", shards({"a": "a" * 5000 + ".safetensors"})),
    ("a tensor in two shards", "shards.", shards({"a": "a.safetensors", "b": "b.safetensors"}, a=A, b=A)),
    ("a tensor in another shard", "shards.disagree",
     shards({"a": "b.safetensors", "b": "a.safetensors"}, a=A, b=B)),
    ("a tensor that is not listed", "shards.disagree",
     shards({"a": "a.safetensors", "b": "b.safetensors"},
            a=two(entry(), entry(begin=8, end=16)).replace(b'"b"', b'"c"'), b=B)),
    ("a tensor that no shard has", "shards.lost", shards({"a": "a.safetensors", "x" * 9000: "a.safetensors"}, a=A)),
    ("a hostile shard", "safetensors.overlap",
     shards({"a": "a.safetensors", "b": "a.safetensors"}, a=two(entry(), entry(), bytes(8)))),
    ("no weight_map", "shards.map", shards(b"{}")),
    ("an empty weight_map", "shards.map", shards({})),
    ("weight_map a list", "shards.map", shards(b'{"weight_map":["a"]}')),
    ("an index that is a list", "json.kind", shards(b"[]")),
    ("an index that is no JSON", "json.parse", shards(b"{")),
    ("an index that is not UTF-8", "json.parse", shards(b'{"\xff":1}')),
    ("an index 100,000 deep", "json.parse", shards(b'{"weight_map":' + b"[" * 100_000)),
    ("an index with a name twice", "shards.disagree",
     shards(b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}', a=A, b=B)),
    ("an index of five million empty lists", "json.size", shards(b"[" + b"[]," * 5_000_000 + b"[]]")),
    ("an index of a million numbers", "json.size", shards(b"[" + b"54321," * 2_000_000 + b"1]")),
)  # fmt: skip
"""Number 53: name, code, and what writes it."""


def huge_index(folder: Path) -> Path:
    """A gigabyte that takes no disk."""
    index = folder / "model.safetensors.index.json"
    index.write_bytes(b"{")
    os.truncate(index, 2**30)
    return index


def hundred_megabytes(folder: Path) -> Path:
    """A header just above what the format allows, all of it there."""
    path = folder / "hostile.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    os.truncate(path, 101_000_000)
    return path


def shard_link(folder: Path) -> Path:
    """A shard that is a pipe."""
    os.mkfifo(folder / "a.safetensors")
    return shards({"a": "a.safetensors"})(folder)


def _case(
    number: int, name: str, code: str, made: bytes | Callable[[], bytes], warns: str | None = None
) -> Case:
    def write(folder: Path) -> Path:
        path = folder / "hostile.safetensors"
        path.write_bytes(made() if callable(made) else made)
        return path

    return Case(number, f"safetensors: {name}", code, write, warns)


CASES: tuple[Case, ...] = (
    *(_case(number, name, f"safetensors.{code}", made) for number, name, code, made in BROKEN),
    *(_case(number, name, "", made, warns) for number, name, made, warns in LEGAL),
    *(Case(53, f"shards: {name}", code, make) for name, code, make in SHARDS),
    Case(35, "safetensors: a header of 100 MB and a byte", "safetensors.length", hundred_megabytes),
    Case(53, "shards: an index of a gigabyte", "json.size", huge_index),
    Case(53, "shards: a shard that is a pipe", "file.kind", shard_link),
)
