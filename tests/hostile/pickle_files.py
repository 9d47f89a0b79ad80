"""PyTorch files put together byte by byte: pickles out of values and raw opcodes, and the archives around them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C


class Ops(bytes):
    """Opcodes that leave one value on the stack."""


def name(module: str, what: str) -> Ops:
    return Ops(b"c" + module.encode() + b"\n" + what.encode() + b"\n")


def value(of: Any) -> bytes:
    """The opcodes, of protocol 2, that make a value."""
    if isinstance(of, Ops):
        return of
    if of is None or isinstance(of, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[of]
    if isinstance(of, int):
        raw = of.to_bytes(of.bit_length() // 8 + 1, "little", signed=True)
        return b"K" + bytes([of]) if 0 <= of < 256 else b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(of, float):
        return b"G" + struct.pack(">d", of)
    if isinstance(of, str):
        return b"X" + struct.pack("<I", len(of.encode())) + of.encode()
    if isinstance(of, bytes):
        return b"C" + bytes([len(of)]) + of
    if isinstance(of, tuple):
        return b"(" + b"".join(map(value, of)) + b"t"
    if isinstance(of, list):
        return b"](" + b"".join(map(value, of)) + b"e"
    if isinstance(of, dict):
        return b"}(" + b"".join(value(part) for pair in of.items() for part in pair) + b"u"
    raise TypeError(type(of))


def call(module: str, what: str, *args: Any) -> Ops:
    return Ops(name(module, what) + value(args) + b"R")


def storage(
    key: Any = "0", kind: str = "FloatStorage", count: Any = 4, *more: Any, module: str = "torch"
) -> Ops:
    return Ops(value(("storage", name(module, kind), key, "cpu", count, *more)) + b"Q")


def tensor(
    size: Any = (4,),
    stride: Any = (1,),
    offset: Any = 0,
    source: Ops | None = None,
    grad: Any = False,
    hooks: Any = None,
    *more: Any,
) -> Ops:
    hooks = call("collections", "OrderedDict") if hooks is None else hooks
    where = storage() if source is None else source
    return call("torch._utils", "_rebuild_tensor_v2", where, offset, size, stride, grad, hooks, *more)


def pickle(of: Any, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value(of) + b"."


@dataclass(frozen=True, slots=True)
class Part:
    """An entry of an archive; None stands for what is right."""

    name: bytes
    body: bytes = b""
    local: bytes | None = None
    flags: int = 0
    method: int = 0
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    mode: int = 0
    header: int | None = None
    extra: bytes = b""
    descriptor: bytes | None = None


def parts(
    of: bytes, data: Mapping[str, bytes] | None = None, root: str = "archive", **notes: bytes
) -> list[Part]:
    """The entries of a usual file."""
    inner = {"data.pkl": of, "byteorder": b"little"}
    inner |= {f"data/{key}": raw for key, raw in ({"0": bytes(16)} if data is None else data).items()}
    inner |= {"version": b"3\n", **{key.replace("__", "."): raw for key, raw in notes.items()}}
    return [Part(f"{root}/{key}".encode(), raw) for key, raw in inner.items()]


def change(of: Sequence[Part], at: int, **fields: Any) -> list[Part]:
    """The same entries, one of them with other fields."""
    return [replace(part, **fields) if place == at else part for place, part in enumerate(of)]


@dataclass(frozen=True)
class End:
    """What stands in the end of the directory; None stands for what is right."""

    comment: bytes = b""
    total: int | None = None
    length: int | None = None
    begin: int | None = None
    wide: tuple[int, int, int] | None = None
    between: bytes = b""
    behind: bytes = b""


def archive(of: Sequence[Part], end: End | None = None) -> bytes:
    """A ZIP archive out of its entries, told to lie where they say so."""
    end = end or End()
    out, directory = bytearray(), bytearray()
    for part in of:
        at = len(out)
        crc = zlib.crc32(part.body) if part.crc is None else part.crc
        packed = len(part.body) if part.packed is None else part.packed
        size = len(part.body) if part.size is None else part.size
        own = part.name if part.local is None else part.local
        fields = (part.flags, part.method, 0, 0, crc, packed, size)
        if part.header is None:
            out += struct.pack("<4sH", b"PK\3\4", 0) + struct.pack("<4H3I", *fields)
            out += struct.pack("<2H", len(own), 0) + own + part.body
            out += part.descriptor or b""
        directory += struct.pack("<4s2H", b"PK\1\2", 0, 0) + struct.pack("<4H3I", *fields)
        directory += struct.pack("<5H", len(part.name), len(part.extra), 0, 0, 0)
        directory += struct.pack("<2I", part.mode << 16, at if part.header is None else part.header)
        directory += part.name + part.extra
    out += end.between
    begin = len(out) if end.begin is None else end.begin
    total = len(of) if end.total is None else end.total
    length = len(directory) if end.length is None else end.length
    out += directory
    if end.wide:
        record = len(out)
        out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, end.wide[0], *end.wide)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, record, 1)
    out += struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, total & 0xFFFF, total & 0xFFFF, length, begin, len(end.comment)
    )
    return bytes(out) + end.comment + end.behind


def file(of: Any, data: Mapping[str, bytes] | None = None, **notes: bytes) -> bytes:
    """A usual file around a value, or around a pickle that is given as bytes."""
    raw = of if isinstance(of, bytes) and not isinstance(of, Ops) else pickle(of)
    return archive(parts(raw, data, **notes))


def legacy(
    of: Any,
    data: Mapping[str, tuple[int, bytes]] | None = None,
    *,
    magic: Any = MAGIC,
    version: Any = 1001,
    system: Any = None,
    order: Any = None,
    behind: bytes = b"",
) -> bytes:
    """A file from before archives; ``data`` gives the number of elements and the bytes of each storage."""
    data = {"0": (4, bytes(16))} if data is None else data
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    heads = (magic, version, system, of, list(data) if order is None else order)
    out = b"".join(pickle(head) for head in heads)
    return out + b"".join(struct.pack("<Q", count) + raw for count, raw in data.values()) + behind


GOOD = file({"state_dict": {"w": tensor()}, "epoch": 3})
GOOD_LEGACY = legacy({"w": tensor(source=storage("0", "FloatStorage", 4, None))})
