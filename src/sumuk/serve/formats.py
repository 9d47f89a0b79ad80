"""A finished picture in the format that was asked for: PNG as it lies on disk, JPEG or WebP made from it.

The PNG carries two texts, the receipt and A1111's ``parameters``, and perhaps a signature; it is given as it is. The
others have one place for text, EXIF's UserComment, where A1111 puts its ``parameters`` (piexif's "unicode": the mark
``UNICODE`` and UTF-16, big-endian), and so do we. A signature does not survive another format.
"""

from __future__ import annotations

import io
from typing import Literal

from PIL import ExifTags, Image

from sumuk.base.errors import BadInput

Kind = Literal["png", "jpeg", "webp"]
MEDIA: dict[Kind, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = 90
"""Of JPEG and WebP, where none is asked for."""
MOST_EXIF = 65_533
"""Bytes of EXIF in a JPEG: one segment."""


def as_format(picture: bytes, kind: Kind, quality: int | None = None) -> bytes:
    """A picture of ours in another format.

    Args:
        picture: a whole PNG (or a preview's JPEG) that this server made; others are not trusted here.
        kind: what to make.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        BadInput: a quality for PNG, which loses nothing, or one out of range.
    """
    if quality is not None and not 1 <= quality <= 100:
        raise BadInput(f"quality {quality} is not within 1..100")
    if kind == "png" and quality is not None:
        raise BadInput(f"quality {quality} does nothing for png, which loses nothing; leave it out")
    with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
        if (image.format or "").lower() == kind:
            return picture
        image.load()
        file = io.BytesIO()
        if kind == "png":
            image.save(file, "PNG")
        else:
            exif = _exif(image.info.get("parameters", ""), MOST_EXIF if kind == "jpeg" else None)
            plain = image.convert("RGB") if kind == "jpeg" else image
            plain.save(file, kind.upper(), quality=QUALITY if quality is None else quality, exif=exif)
    return file.getvalue()


def _exif(text: str, most: int | None) -> bytes:
    """EXIF with A1111's text; none where there is no text, or no room for it (the PNG has it all the same)."""
    if not text:
        return b""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    packed = exif.tobytes()
    return packed if most is None or len(packed) <= most else b""
