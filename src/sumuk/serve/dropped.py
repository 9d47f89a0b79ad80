"""What made a picture that somebody brings: its receipt or A1111's text, as a request to submit again.

Both come from anywhere and are believed in nothing: the PNG's chunks are walked without decoding a pixel, what is
packed is unpacked up to a bound, and each setting passes the same gate as one that is sent. What cannot be taken over
is listed with the reason; nothing is dropped in silence.
"""

from __future__ import annotations

import json
import reprlib
import zlib
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from sumuk.base.errors import BadFile
from sumuk.generate.infotext import LONGEST, parse_infotext
from sumuk.generate.request import PICTURES
from sumuk.serve.a1111_names import SCHEDULERS
from sumuk.serve.wish import Wish

SIGNATURE = b"\x89PNG\r\n\x1a\n"
READ = ("sumuk", "parameters")
"""Texts of a PNG that are read."""
MOST_CHUNKS = 100_000
RECEIPT = 1
"""Format of the receipts that are understood."""
MOST_SETTINGS = 300
AGAIN = "a text holds no picture; give it again"
A1111 = {
    "Steps": "steps",
    "Sampler": "solver",
    "Schedule type": "grid",
    "CFG scale": "guidance",
    "Seed": "seed",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation",
    "Clip skip": "clip_skip",
    "Eta": "eta",
    "CFG Rescale": "rescale",
    "Guidance start": "guidance_start",
    "Guidance end": "guidance_end",
    "Denoising strength": "strength",
    "Mask blur": "mask_blur",
}
SPACINGS = ("Karras", "Exponential")
"""Step spacings that old versions put behind the sampler's name."""


def dropped(png: bytes) -> dict[str, Any]:
    """What a PNG says of itself.

    Returns:
        ``request``: fields of a request; ``model``: which one drew it, as far as it says so; ``source``: ``sumuk`` or
        ``a1111``; ``left_out``: name of what was not taken over -> why.

    Raises:
        BadFile: no PNG, a damaged one, or one that says nothing of itself.
        BadInput: its text is too long.
    """
    texts = png_texts(png)
    left_out: dict[str, str] = {}
    if "sumuk" in texts:
        try:
            return _from_receipt(_receipt(texts["sumuk"]))
        except BadFile as error:
            if "parameters" not in texts:
                raise
            left_out["sumuk"] = str(error)
    if "parameters" not in texts:
        raise BadFile(
            "the picture carries neither a Sumuk receipt nor A1111's parameters; "
            "drop the PNG as it was saved, since other programs take its texts away",
            "image.no-text",
        )
    found = _from_infotext(texts["parameters"])
    found["left_out"] = left_out | found["left_out"]
    return found


def png_texts(png: bytes) -> dict[str, str]:
    """The texts of a PNG that are read here, by keyword.

    Raises:
        BadFile: no PNG, a damaged one, or a text that is too long.
    """
    if not png.startswith(SIGNATURE):
        raise BadFile("the picture is no PNG, the format that carries receipts", "image.format")
    texts: dict[str, str] = {}
    for kind, body in _chunks(png):
        keyword, found, rest = body.partition(b"\0")
        name = keyword.decode("latin-1")
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or not found or name not in READ:
            continue
        if name in texts:  # also: each packed text is unpacked once
            raise BadFile(f"the PNG carries {name!r} twice", "image.damaged")
        texts[name] = _text(kind, rest, name)
    return texts


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each chunk (PNG specification, section 5.3)."""
    start = len(SIGNATURE)
    for _ in range(MOST_CHUNKS):
        length, kind = int.from_bytes(png[start : start + 4], "big"), png[start + 4 : start + 8]
        end = start + 8 + length
        if len(png) < end + 4:
            raise BadFile(f"the PNG ends within a chunk, at byte {len(png):,}", "image.damaged")
        if kind in (b"tEXt", b"zTXt", b"iTXt"):  # the others may be long, and are not read
            body = png[start + 8 : end]
            if zlib.crc32(kind + body) != int.from_bytes(png[end : end + 4], "big"):
                raise BadFile(f"a text of the PNG, at byte {start:,}, is damaged", "image.damaged")
            yield kind, body
        if kind == b"IEND":
            return
        start = end + 4
    raise BadFile(f"the PNG has more than {MOST_CHUNKS:,} chunks", "image.damaged")


def _text(kind: bytes, rest: bytes, name: str) -> str:
    """A text chunk's text, behind its keyword (section 11.3.3)."""
    packed, coding = kind == b"zTXt", "latin-1"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        packed, coding = rest[:1] == b"\1", "utf-8"
        rest = rest[2:].split(b"\0", 2)[-1]
    most = 4 * LONGEST  # bytes of that many characters
    try:
        if packed:
            rest = zlib.decompressobj().decompress(rest, most + 1)
        if len(rest) > most or len(text := rest.decode(coding)) > LONGEST:
            raise BadFile(f"the PNG's text {name!r} is longer than {LONGEST:,} characters", "image.text")
    except (zlib.error, UnicodeDecodeError) as error:
        raise BadFile(f"the PNG's text {name!r} cannot be read: {error!s:.100}", "image.text") from None
    return text


def _receipt(text: str) -> dict[str, Any]:
    """A receipt, as far as it looks like one.

    Raises:
        BadFile: it does not.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        receipt = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"the receipt is damaged: {error!s:.100}", "image.receipt") from None
    if not isinstance(receipt, dict) or not isinstance(receipt.get("settings"), dict):
        raise BadFile("the receipt is damaged: it holds no settings", "image.receipt")
    if (number := receipt.get("receipt")) != RECEIPT:
        said = reprlib.repr(number)
        raise BadFile(
            f"the receipt has format {said}; this version of Sumuk reads {RECEIPT}", "image.receipt"
        )
    return receipt


def _from_receipt(receipt: dict[str, Any]) -> dict[str, Any]:
    settings = receipt["settings"]
    left_out = {name: AGAIN for name in (*PICTURES, "steer") if settings.get(name)}
    rest = {name: value for name, value in settings.items() if name not in (*PICTURES, "steer")}
    about = receipt.get("model")
    about = about if isinstance(about, dict) else {}
    files = about.get("files")
    first = files[0] if isinstance(files, list) and files and isinstance(files[0], dict) else {}
    model = {"title": about.get("title"), "family": about.get("family"), "file": first.get("name")}
    model["sha256"] = first.get("sha256")
    if isinstance(version := receipt.get("sumuk"), str):
        model["writer"] = f"sumuk {version}"
    return _found(rest, model, left_out, "sumuk")


def _from_infotext(text: str) -> dict[str, Any]:
    said = parse_infotext(text)
    settings = dict(said.settings)
    values: dict[str, Any] = {"prompt": said.prompt, "negative": said.negative}
    model = {
        "title": settings.pop("Model", None),
        "sha256": settings.pop("Model hash", None),
        "writer": settings.pop("Version", None),
    }
    left_out: dict[str, str] = {}
    width, cross, height = settings.get("Size", "").partition("x")
    if cross:
        values |= {"width": width, "height": height}
        del settings["Size"]
    if settings.get("RNG") == "CPU":  # ours too
        del settings["RNG"]
    sampler, _, spacing = settings.get("Sampler", "").rpartition(" ")
    if sampler and spacing in SPACINGS and "Schedule type" not in settings:
        settings |= {"Sampler": sampler, "Schedule type": spacing}
    spacings = dict(SCHEDULERS.values())  # A1111's labels; what Sumuk writes are names in small letters
    if (label := settings.get("Schedule type", "")) in spacings:
        del settings["Schedule type"]
        values["grid"] = spacings[label]
    if "Hires upscale" in settings:
        first = "Hires strength" if "Hires strength" in settings else "Denoising strength"
        names = {"scale": "Hires upscale", "steps": "Hires steps", "strength": first}
        values["hires"] = {ours: settings.pop(theirs) for ours, theirs in names.items() if theirs in settings}
    for picture, mark in (("init", "Denoising strength"), ("mask", "Mask blur")):
        if mark in settings:
            left_out[picture] = AGAIN
    for theirs, ours in A1111.items():
        if theirs in settings:
            values[ours] = settings.pop(theirs)
    for name, value in settings.items():
        left_out[_line(name)] = f"no request says this (it is {_line(value)!r})"
    return _found(values, model, left_out, "a1111")


def _found(
    values: dict[str, Any], model: dict[str, Any], left_out: dict[str, str], source: str
) -> dict[str, Any]:
    """The answer: values that a request takes go into it, the others are noted."""
    if len(values) + len(left_out) > MOST_SETTINGS:
        raise BadFile(f"the picture tells more than {MOST_SETTINGS} settings of itself", "image.text")
    request: dict[str, Any] = {}
    for name, value in values.items():
        try:
            # Strict where JSON said what is a number; A1111's text does not.
            read = Wish.model_validate({name: value}, strict=source == "sumuk")
        except ValidationError as error:
            why = error.errors()[0]["msg"].removeprefix("Value error, ")
            left_out[_line(name)] = f"{why} (it is {reprlib.repr(value)})"
        else:
            request |= {k: v for k, v in read.model_dump(exclude_unset=True).items() if v is not None}
    about = {key: _line(value) for key, value in model.items() if isinstance(value, str | int)}
    return {"request": request, "model": about, "source": source, "left_out": left_out}


def _line(value: object) -> str:
    """A text from elsewhere, short, and such that it can be sent."""
    return str(value)[:200].encode(errors="backslashreplace").decode()
