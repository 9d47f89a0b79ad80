"""A finished picture in the format that was asked for, and the texts in it."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sumuk.base.errors import BadInput
from sumuk.serve.formats import as_format

TEXT = "여우 a fox\nNegative prompt: 흐림\nSteps: 2, Seed: 5, Sampler: euler"


def png(text: str = TEXT, mode: str = "RGB") -> bytes:
    info = PngInfo()
    info.add_itxt("parameters", text)
    info.add_itxt("sumuk", "{}")
    file = io.BytesIO()
    Image.linear_gradient("L").convert(mode).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def comment(picture: bytes) -> str | None:
    """EXIF's UserComment as A1111 reads it: piexif takes "unicode" for UTF-16, big-endian."""
    raw = Image.open(io.BytesIO(picture)).getexif().get_ifd(0x8769).get(0x9286)
    if raw is None:
        return None
    assert raw[:8] == b"UNICODE\0"
    return raw[8:].decode("utf-16-be")


def test_png_is_given_as_it_is():
    given = png()
    assert as_format(given, "png") is given


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_carry_the_text_where_a1111_puts_it(kind):
    made = as_format(png(), kind)
    with Image.open(io.BytesIO(made)) as image:
        assert image.format == kind.upper() and image.size == (256, 256)
    assert comment(made) == TEXT


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_quality_changes_the_size(kind):
    sizes = [len(as_format(png(""), kind, quality)) for quality in (5, 50, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


def test_a_text_without_room_in_a_jpeg_is_left_out_of_it_alone():
    long = "a" * 40_000  # 80,000 bytes in UTF-16; a JPEG's segment has 65,533
    assert comment(as_format(png(long), "jpeg")) is None
    assert comment(as_format(png(long), "webp")) == long
    fits = "a" * 32_000
    assert comment(as_format(png(fits), "jpeg")) == fits


def test_a_preview_becomes_a_png_too():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "JPEG")
    with Image.open(io.BytesIO(as_format(file.getvalue(), "png"))) as image:
        assert image.format == "PNG" and image.size == (8, 8)


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_a_quality_out_of_range_is_refused(quality):
    with pytest.raises(BadInput, match=f"quality {quality} is not within 1..100"):
        as_format(png(), "jpeg", quality)


def test_a_quality_of_png_is_refused():
    with pytest.raises(BadInput, match="does nothing for png"):
        as_format(png(), "png", 90)
