"""Pictures that harm those who decode them carelessly, each made here in a few bytes, and ordinary ones beside them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int = 8, height: int = 8, *more: bytes, data: bytes | None = None, kind: int = 2) -> bytes:
    """A PNG with 8 bits a channel, whatever it says of its size, with further chunks before its pixels."""
    rows = b"".join(b"\0" + bytes(3 * min(width, 64)) for _ in range(min(height, 64)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows) if data is None else data)
    return SIGNATURE + header + b"".join(more) + pixels + chunk(b"IEND", b"")


def saved(image: Image.Image, format: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **how)
    return file.getvalue()


def pattern(width: int = 24, height: int = 16, channels: int = 3) -> Image.Image:
    """A picture without symmetry: brighter to the right, redder below."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // width, y * 255 // height, (x + 2 * y) % 256, 128 + 0 * x]
    return Image.fromarray(np.stack(planes[:channels], -1).astype(np.uint8))


def _bomb(size: int) -> bytes:
    """A packed stream of that many zeros, made in no time since its parts are alike; it has no end."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    first, second = (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + second * (size // len(block) - 1)


def _frames(format: str, count: int = 3) -> bytes:
    frames = [Image.new("RGB", (8, 8), (n * 40, 0, 0)) for n in range(count)]
    return saved(frames[0], format, save_all=True, append_images=frames[1:])


def _many_frames() -> bytes:
    """A PNG of 100,000 frames, none of which is worth looking at."""
    control = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 100, 0, 0))
    return png(8, 8, chunk(b"acTL", struct.pack(">II", 10**5, 0)), control * 10**5)


def _jpeg_with(*segments: bytes) -> bytes:
    whole = saved(pattern(), "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def _exif_loop() -> bytes:
    """EXIF whose first directory names itself as the next one, and as its own part."""
    directory = struct.pack("<H", 2)
    directory += struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 8)


def _webp_size(width: int, height: int) -> bytes:
    body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inside = b"WEBPVP8X" + struct.pack("<I", 10) + body
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def _scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = saved(pattern(512, 512), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + b"\xff\xd9"


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _truncated_inside(share: float) -> bytes:
    """Whole in its chunks, but its packed rows end early."""
    rows = zlib.compress(np.random.default_rng(0).bytes(64 * (3 * 64 + 1)))
    return png(64, 64, data=_cut(rows, share))


def _noise() -> bytes:
    return np.random.default_rng(1).bytes(10_000)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "png of 50,000 x 50,000": lambda: png(50_000, 50_000),
    "png of 2^31-1 x 2^31-1": lambda: png(2**31 - 1, 2**31 - 1),
    "png of 0 x 8": lambda: png(0, 8),
    "png of 16,777,217 x 1": lambda: png(16_777_217, 1),
    "png that says 4096 x 4096 and has 64 rows": lambda: png(4096, 4096),
    "png with zTXt of 64 MiB": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + _bomb(2**26))),
    "png with zTXt of 1 GiB": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + _bomb(2**30))),
    "png with iTXt of 64 MiB": lambda: png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + _bomb(2**26))),
    "png with a hundred zTXt": lambda: png(8, 8, *[chunk(b"zTXt", b"a\0\0" + _bomb(2**20))] * 100),
    "png with tEXt of 64 MB": lambda: png(8, 8, chunk(b"tEXt", b"a\0" + bytes(64_000_000))),
    "png with eXIf of 64 MB": lambda: png(8, 8, chunk(b"eXIf", b"II*\0" + bytes(64_000_000))),
    "png in a million pieces": lambda: png(8, 8, chunk(b"IDAT", b"") * 10**6),
    "png of 100,000 frames": _many_frames,
    "apng": lambda: _frames("PNG"),
    "png without an end": lambda: png()[:-12],
    "png cut in half": lambda: _cut(saved(pattern(256, 256), "PNG"), 0.5),
    "png whose rows end early": lambda: _truncated_inside(0.5),
    "png with a chunk longer than the file": lambda: SIGNATURE + png()[8:33] + struct.pack(">I", 2**31) + b"IDAT",
    "png with a wrong checksum": lambda: png()[:-20] + b"\0\0\0\0" + png()[-16:],
    "png of colour type 7": lambda: png(kind=7),
    "signature alone": lambda: SIGNATURE,
    "gif": lambda: saved(pattern(), "GIF"),
    "gif of many frames": lambda: _frames("GIF", 200),
    "animated webp": lambda: _frames("WEBP"),
    "webp of 16,777,216 x 16,777,216": lambda: _webp_size(2**24, 2**24),
    "webp cut in half": lambda: _cut(saved(pattern(64, 64), "WEBP"), 0.5),
    "webp without a picture": lambda: _webp_size(8, 8),
    "webp that is noise": lambda: saved(pattern(), "WEBP")[:30] + _noise(),
    "jpeg of 65,535 x 65,535": lambda: b"\xff\xd8" + segment(0xC0, b"\x08\xff\xff\xff\xff\x01\x01\x11\0")
    + segment(0xDA, b"\x01\x01\0\0\x3f\0") + bytes(100),
    "jpeg of 0 rows": lambda: b"\xff\xd8" + segment(0xC0, b"\x08\0\0\0\x08\x01\x01\x11\0")
    + segment(0xDA, b"\x01\x01\0\0\x3f\0"),
    "jpeg cut in half": lambda: _cut(saved(pattern(256, 256), "JPEG"), 0.5),
    "jpeg with a maker note of 64 MB": lambda: _jpeg_with(*[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 985),
    "jpeg with comments without end": lambda: _jpeg_with(*[segment(0xFE, b"")] * 100_000),
    "jpeg filled up": lambda: b"\xff\xd8" + b"\xff" * 10**6,
    "jpeg of a thousand scans": lambda: _scans(1000),
    "jpeg that is noise": lambda: saved(pattern(), "JPEG")[:200] + _noise(),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "svg with a declaration": lambda: b'\xef\xbb\xbf <?xml version="1.0"?><svg/>',
    "html": lambda: b"<!doctype html><script>alert(1)</script>",
    "fits": lambda: b"SIMPLE  =                    T" + bytes(2880),
    "fits of gzip": lambda: saved(pattern(), "TIFF")[:4] + _bomb(2**20),
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "psd": lambda: b"8BPS\0\1\0\0\0\0\0\0\0\3\xff\xff\xff\xff\xff\xff\xff\xff\0\x08\0\3",
    "bmp": lambda: saved(pattern(), "BMP"),
    "tiff": lambda: saved(pattern(), "TIFF"),
    "ico": lambda: saved(pattern(), "ICO"),
    "pdf": lambda: b"%PDF-1.7\n",
    "heic": lambda: b"\0\0\0\x18ftypheic" + bytes(100),
    "zip": lambda: b"PK\3\4" + bytes(100),
    "text": lambda: b"a fox in the snow",
    "nothing": lambda: b"",
    "noise": _noise,
}  # fmt: skip
"""What has to be refused."""


def with_text(**texts: str) -> bytes:
    """A sound PNG whose texts are not."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return saved(pattern(), "PNG", pnginfo=info)


ODD: dict[str, Callable[[], bytes]] = {
    "jpeg whose exif goes in circles": lambda: _jpeg_with(segment(0xE1, b"Exif\0\0" + _exif_loop())),
    "png with an icc profile that is none": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + _bomb(2**26))),
    "png with a text that is a script": lambda: with_text(parameters="<script>alert(1)</script>\nSteps: 1"),
    "png with a prompt of a megabyte": lambda: with_text(parameters="fox " * 250_000),
    "png with a path in its receipt": lambda: with_text(sumuk='{"receipt":1,"model":"/etc/passwd"}'),
    "png whose palette is not there": lambda: png(kind=3),
    "png whose pixels unpack to a gigabyte": lambda: png(512, 512, data=_bomb(2**30)),
    "png with bytes behind its end": lambda: png() + b"PK\3\4" + bytes(1000),
}
"""What is odd beside its pixels: a plain picture comes of it, or it is refused."""
