"""The ZIP archive around a PyTorch file, read strictly: every byte belongs to one entry or to the directory.

::

    local header, name, padding, bytes, descriptor    for each entry, the first at byte 0, without gaps
    central directory                                 the same names, with places, sizes and CRC32
    end of directory                                  64-bit record and locator where used, then the 22-byte one

(APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.) General readers accept far more: entries that share one body, names that
differ between header and directory, bytes before, behind and between. Each of these has hidden something from a
scanner. Here they refuse the file, as do compression and encryption, which torch.save never uses.
"""

from __future__ import annotations

import re
import stat
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from sumuk.files.ckpt_kind import archive_of

MAX_ENTRIES = 65_535
MAX_DIRECTORY = 32 * 2**20
MAX_NAME = 300

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FLAGS = 0x0808
"""A descriptor behind the bytes; names in UTF-8."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Read = Callable[[int, int], bytes]
"""Offset and count to the bytes there; fewer where the file ends."""
Refuse = Callable[[str, str], NoReturn]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the archive.

    Attributes:
        name: with the folders in front.
        start: offset of its first byte in the archive.
        size: bytes.
        crc: CRC32 of them, as the directory says.
    """

    name: str
    start: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Listed:
    raw: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    mode: int
    header: int


def read_entries(read: Read, size: int, refuse: Refuse) -> dict[str, Entry]:
    """All entries by their name; only headers are read.

    Args:
        read: gives bytes of the file.
        size: of the file.
        refuse: raises the error, given its code and a sentence on the file.
    """
    begin, total, length = _ends(read, size, refuse)
    raw = read(begin, length)
    if len(raw) < length:
        refuse("cut", "is cut off within its directory; fetch it again")
    listed = _directory(raw, total, refuse)
    names = [_name(one, refuse) for one in listed]
    if what := archive_of(names):
        refuse("kind", f"is {what}")
    if len(set(names)) < len(names):
        refuse("zip", f"its archive holds {Counter(names).most_common(1)[0][0]!r} twice")
    entries = {}
    at = 0
    for name, one in sorted(zip(names, listed, strict=True), key=lambda pair: pair[1].header):
        _plain(name, one, refuse)
        if one.header != at:
            what = "share bytes" if one.header < at else "leave bytes between them that belong to none"
            refuse("zip", f"its archive's entries {what}, at {name!r}")
        start = _local(read, one, name, refuse)
        at = _behind(read, one, start, begin, refuse)
        entries[name] = Entry(name, start, one.size, one.crc)
    if at != begin:
        refuse("zip", f"its archive has {begin - at} bytes before its directory that belong to no entry")
    return entries


def _ends(read: Read, size: int, refuse: Refuse) -> tuple[int, int, int]:
    """Offset of the directory, its number of entries and its length."""
    tail = read(max(0, size - _END.size), _END.size)
    if len(tail) < _END.size or tail[:4] != b"PK\x05\x06":
        refuse(
            "cut", "is a ZIP archive without its end: cut off (fetch it again), or something stands behind it"
        )
    _, disk, first, here, total, length, begin, comment = _END.unpack(tail)
    if comment or disk or first or here != total:
        refuse("zip", "its archive has a comment or several volumes, which torch.save never writes")
    end = size - _END.size
    place = read(max(0, end - _LOCATOR.size), _LOCATOR.size)
    if place[:4] == b"PK\x06\x07":
        _, disk, at, disks = _LOCATOR.unpack(place)
        record = read(at, _END64.size) if at < size else b""
        if at + _END64.size + _LOCATOR.size != end or record[:4] != b"PK\x06\x06" or disk or disks > 1:
            refuse("zip", "its archive's 64-bit end of directory is not where it should be")
        _, own, _, _, disk, first, here64, total64, length64, begin64 = _END64.unpack(record)
        agree = all(
            small in (big, limit)
            for small, big, limit in (
                (total, total64, 0xFFFF),
                (length, length64, 0xFFFFFFFF),
                (begin, begin64, 0xFFFFFFFF),
            )
        )
        if own != _END64.size - 12 or disk or first or here64 != total64 or not agree:
            refuse("zip", "its archive's two ends of directory disagree")
        total, length, begin, end = total64, length64, begin64, at
    if total > MAX_ENTRIES or length > MAX_DIRECTORY:
        refuse("zip", f"its archive lists {total} entries in {length} bytes, above {MAX_ENTRIES}")
    if begin + length != end:
        refuse("zip", "its archive's directory is not where its end says: bytes stand before or behind it")
    return begin, total, length


def _directory(raw: bytes, total: int, refuse: Refuse) -> list[_Listed]:
    listed: list[_Listed] = []
    at = 0
    for _ in range(total):
        if at + _CENTRAL.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
            refuse("zip", f"its archive's directory breaks off after {len(listed)} of {total} entries")
        fields = _CENTRAL.unpack_from(raw, at)
        flags, method = fields[3], fields[4]
        crc, packed, size, names, extras, comments, disk = fields[7:14]
        attributes, header = fields[15:]
        at += _CENTRAL.size
        name = raw[at : at + names]
        extra = raw[at + names : at + names + extras]
        at += names + extras + comments
        if at > len(raw) or comments or disk not in (0, 0xFFFF) or len(name) > MAX_NAME:
            refuse("zip", f"its archive's entry {name[:40]!r} has a comment, a long name or another volume")
        size, packed, header = _wide(extra, [size, packed, header], name, refuse)
        listed.append(_Listed(name, flags, method, crc, packed, size, attributes >> 16, header))
    if at != len(raw):
        refuse("zip", f"its archive's directory has {len(raw) - at} bytes behind its last entry")
    return listed


def _wide(extra: bytes, numbers: list[int], name: bytes, refuse: Refuse) -> list[int]:
    """Sizes and offset, those that do not fit in 32 bits from the 64-bit field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == 1:
            wide = [number for number in numbers if number == 0xFFFFFFFF]
            if len(body) < length or len(body) < 8 * len(wide):
                refuse("zip", f"its archive's entry {name[:40]!r} has a short 64-bit field")
            values = iter(struct.unpack_from(f"<{len(wide)}Q", body))
            return [next(values) if number == 0xFFFFFFFF else number for number in numbers]
    return numbers


def _name(one: _Listed, refuse: Refuse) -> str:
    try:
        name = one.raw.decode("utf-8")
    except UnicodeDecodeError:
        refuse("zip", f"its archive has the entry name {one.raw[:40]!r}, which is not UTF-8")
    if not name or _CONTROL.search(name):
        refuse("zip", f"its archive has the entry name {name[:60]!r}, which is not printable")
    if name[0] == "/" or "\\" in name or ".." in name.split("/") or name[1:2] == ":":
        refuse("zip", f"its archive's entry {name[:60]!r} is a path out of its folder")
    return name


def _plain(name: str, one: _Listed, refuse: Refuse) -> None:
    if one.flags & ~_FLAGS:
        what = "encrypted" if one.flags & 0x2041 else f"marked with the flags {one.flags:#x}"
        refuse("zip", f"its archive's entry {name!r} is {what}; torch.save writes none such")
    if one.method or one.packed != one.size:
        refuse(
            "zip",
            f"its archive's entry {name!r} is compressed; torch.save stores bytes as they are: save it again",
        )
    if stat.S_IFMT(one.mode) not in (0, stat.S_IFREG) or name.endswith("/"):
        refuse("zip", f"its archive's entry {name!r} is a link or a folder, no plain file")


def _local(read: Read, one: _Listed, name: str, refuse: Refuse) -> int:
    """Where an entry's bytes begin, from its own header, which must agree with the directory."""
    raw = read(one.header, _LOCAL.size + len(one.raw))
    if len(raw) < _LOCAL.size + len(one.raw) or raw[:4] != b"PK\x03\x04":
        refuse("zip", f"its archive's entry {name!r} has no header at byte {one.header}")
    _, _, flags, method, _, _, crc, packed, size, names, extras = _LOCAL.unpack_from(raw)
    if raw[_LOCAL.size :] != one.raw or names != len(one.raw):
        refuse("zip", f"its archive's entry {name!r} is called {raw[_LOCAL.size :][:40]!r} in its own header")
    later = bool(flags & 8)  # sizes stand behind the bytes
    fits = (
        (crc == one.crc or (later and crc == 0))
        and (packed in (one.packed, 0xFFFFFFFF) or (later and packed == 0))
        and (size in (one.size, 0xFFFFFFFF) or (later and size == 0))
    )
    if flags != one.flags or method != one.method or not fits:
        refuse("zip", f"its archive's entry {name!r} has another size, CRC or method in its own header")
    return one.header + _LOCAL.size + names + extras


def _behind(read: Read, one: _Listed, start: int, limit: int, refuse: Refuse) -> int:
    """Where the next entry must begin: behind the bytes and their descriptor."""
    end = start + one.size
    if end > limit:
        refuse(
            "cut", f"its archive's entry {one.raw!r:.80} ends at byte {end}, beyond the directory at {limit}"
        )
    if one.flags & 8:
        raw = read(end, 24)
        for sign in (b"PK\x07\x08", b""):
            for numbers in ("<3I", "<I2Q"):
                holds = numbers == "<I2Q" or one.size < 2**32
                if holds and raw.startswith(sign + struct.pack(numbers, one.crc, one.size, one.size)):
                    return end + len(sign) + struct.calcsize(numbers)
        refuse("zip", f"its archive's entry {one.raw!r:.80} has no descriptor behind its bytes")
    return end
