"""The first look at a picture that was sent: its header alone, read here, before any decoder sees a byte.

What it is (by its first bytes, never by a name), how large it says it is, whether it moves, and how much it carries
beside the pixels. All of it is arithmetic over a few hundred bytes, so that the worst file costs milliseconds.
Formats: PNG (ISO 15948), JPEG (ITU T.81), WebP (RFC 9649).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sumuk.serve.trouble import Refused, refused

MOST_BESIDE = 4 * 2**20
"""Bytes of a file that are no pixels: profiles, EXIF, comments, texts. Cameras write a tenth of it."""
MOST_PIECES = 2**14
"""Chunks or segments of a file; libpng writes 8 KiB into each."""
MOST_SCANS = 100
"""Passes over a JPEG's pixels; progressive ones have about ten, and each costs as much as a small picture."""
TAKEN = "PNG, JPEG and WebP are taken"
KNOWN = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"8BPS", "a Photoshop document"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "a PDF"),
    (b"SIMPLE", "a FITS file"),
    (b"<", "a text such as SVG or HTML"),
    (b"\0\0\1\0", "an icon"),
    (b"\0\0\0\x0cjP", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"),
)
"""First bytes of what is often sent by mistake, to say so."""
_NO_FRAME = {0xC4, 0xC8, 0xCC}
"""Markers between those of a JPEG's frames that are none."""
_ALONE = {0x01, *range(0xD0, 0xD8)}
"""Markers without a length."""


@dataclass(frozen=True)
class Header:
    """What a picture says of itself."""

    format: str
    width: int
    height: int


def read_header(data: bytes, what: str, most_pixels: int) -> Header:
    """The header of a whole file, if it is one that is taken.

    Args:
        data: the file.
        what: what to call it in the refusal.
        most_pixels: that it may have.

    Raises:
        Refused: ``bad-picture``: another format, too large, animated, cut short, or too much beside the pixels.
    """
    look = _Look(data, what)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        found = look.png()
    elif data.startswith(b"\xff\xd8\xff"):
        found = look.jpeg()
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = look.webp()
    else:
        raise look.no(_another(data))
    if not found.width or not found.height:
        raise look.no("says that it has no pixels")
    if found.width * found.height > most_pixels:
        raise look.no(f"has {found.width} x {found.height} pixels; at most {most_pixels:,} are read")
    return found


def _another(data: bytes) -> str:
    if not data:
        return f"is empty; {TAKEN}"
    if data[4:8] == b"ftyp":
        return f"is a HEIC, AVIF or film; {TAKEN}"
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, name in KNOWN:
        if start.startswith(magic):
            return f"is {name}; {TAKEN}"
    return f"is no picture that is known; {TAKEN}"


class _Look:
    """One file under the eye."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.what = data, what
        self.beside = self.pieces = 0

    def no(self, why: str) -> Refused:
        return refused("bad-picture", f"{self.what} {why}")

    def short(self) -> Refused:
        return self.no("is cut short; send the whole file")

    def piece(self, size: int, beside: bool) -> None:
        """Count one chunk or segment."""
        self.pieces += 1
        if self.pieces > MOST_PIECES:
            raise self.no(f"is in more than {MOST_PIECES:,} pieces; save it anew")
        self.beside += size if beside else 0
        if self.beside > MOST_BESIDE:
            raise self.no(
                f"carries more than {MOST_BESIDE:,} bytes beside its pixels; save it without its metadata"
            )

    def png(self) -> Header:
        data, at, ended = self.data, 8, False
        if data[8:16] != b"\0\0\0\rIHDR" or len(data) < 33:
            raise self.no("is a PNG without a header")
        while at + 12 <= len(data) and not ended:
            size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
            if name in (b"acTL", b"fcTL", b"fdAT"):
                raise self.no("is animated; save the frame that you mean by itself")
            self.piece(size, name not in (b"IHDR", b"PLTE", b"IDAT"))
            at, ended = at + 12 + size, name == b"IEND"
        if not ended or at > len(data):
            raise self.short()
        self.piece(len(data) - at, True)
        return Header("PNG", int.from_bytes(data[16:20]), int.from_bytes(data[20:24]))

    def jpeg(self) -> Header:
        data, at = self.data, 2
        found: Header | None = None
        while at + 4 <= len(data):
            if data[at] != 0xFF:
                raise self.no("is a damaged JPEG")
            marker = data[at + 1]
            if marker == 0xFF or marker in _ALONE:  # a byte that fills, or a marker without a length
                at += 1 if marker == 0xFF else 2
                self.piece(1, True)
                continue
            size = int.from_bytes(data[at + 2 : at + 4])
            if marker == 0xDA:
                if found is None:
                    raise self.no("is a JPEG without a header")
                if data.count(b"\xff\xda") > MOST_SCANS:
                    raise self.no(f"is drawn in more than {MOST_SCANS} passes; save it anew")
                return found
            if size < 2 or at + 2 + size > len(data):
                raise self.short()
            self.piece(size, marker >= 0xE0)
            if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
                tall, wide = data[at + 5 : at + 7], data[at + 7 : at + 9]
                found = Header("JPEG", int.from_bytes(wide), int.from_bytes(tall))
            at += 2 + size
        raise self.short()

    def webp(self) -> Header:
        end = 8 + int.from_bytes(self.data[4:8], "little")
        if end > len(self.data):
            raise self.short()
        found: Header | None = None
        for name, at, size in self._webp_chunks(end):
            body = self.data[at : at + 10]
            if name in (b"ANIM", b"ANMF") or (name == b"VP8X" and body[:1] and body[0] & 2):
                raise self.no("is animated; save the frame that you mean by itself")
            pixels = name in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH")
            self.piece(size, not pixels)
            if found is None and pixels:
                found = _webp_size(name, body)
        if found is None:
            raise self.no("is a WebP without a header")
        self.piece(len(self.data) - end, True)
        return found

    def _webp_chunks(self, end: int) -> Iterator[tuple[bytes, int, int]]:
        at = 12
        while at + 8 <= end:
            size = int.from_bytes(self.data[at + 4 : at + 8], "little")
            if at + 8 + size > end:
                raise self.short()
            yield self.data[at : at + 4], at + 8, size
            at += 8 + size + size % 2


def _webp_size(name: bytes, body: bytes) -> Header | None:
    """Width and height from the first chunk's first bytes."""
    if name == b"VP8X" and len(body) == 10:
        wide, tall = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    elif name == b"VP8L" and body[:1] == b"\x2f":
        bits = int.from_bytes(body[1:5], "little")
        wide, tall = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif name == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        wide = int.from_bytes(body[6:8], "little") & 0x3FFF
        tall = int.from_bytes(body[8:10], "little") & 0x3FFF
    else:
        return None
    return Header("WEBP", wide, tall)
