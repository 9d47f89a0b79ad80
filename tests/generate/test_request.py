from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from tests.generate.conftest import refusal

from sumuk.base.errors import BadInput, MissingFile, SumukError
from sumuk.generate.request import (
    MOST_PIXELS,
    PICTURES,
    Hires,
    Request,
    Steer,
    image_digest,
    make_request,
    places,
    read_image,
)

PICTURE = Image.new("RGB", (64, 64), "red")
MASK = Image.new("L", (64, 64), 255)


def encoded(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"width": 100}, "width: input should be a multiple of 8 (got 100)"),
        ({"height": 0}, "height: input should be greater than or equal to 8 (got 0)"),
        ({"width": 8200}, "width: input should be less than or equal to 8192"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1 (got 0)"),
        ({"steps": 1001}, "(got 1001)"),
        ({"steps": 2.5}, "(got 2.5)"),
        ({"guidance": float("nan")}, "guidance: input should be a finite number (got nan)"),
        ({"guidance": "nan"}, "guidance: input should be a finite number"),
        ({"guidance": float("inf")}, "guidance: input should be a finite number (got inf)"),
        ({"guidance": -1}, "(got -1)"),
        ({"eta": float("nan")}, "eta: input should be a finite number"),
        ({"rescale": 1.5}, "(got 1.5)"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0 (got -1)"),
        ({"seed": 2**64}, f"(got {2**64})"),
        ({"variation_seed": 2**64, "variation": 0.5}, "variation_seed"),
        ({"count": 0}, "count"),
        ({"count": 65}, "(got 65)"),
        ({"clip_skip": 13}, "clip_skip"),
        ({"preview": -1}, "preview"),
        ({"hires": {"scale": 1.0}}, "hires: scale: input should be greater than 1 (got 1.0)"),
        ({"hires": {"scale": float("nan")}}, "hires: scale: input should be a finite number"),
        ({"hires": {"scael": 2.0}}, "hires: unknown setting 'scael'; did you mean 'scale'?"),
        ({"stepz": 3}, "unknown setting 'stepz'; did you mean 'steps'?"),
        ({"prompt": 3}, "prompt: input should be a valid string (got 3)"),
        ({"prompt": "a \ud800"}, "prompt: character 3 is no Unicode character, but half of one"),
        ({"init": PICTURE, "strength": -0.1}, "(got -0.1)"),
        ({"init": 3}, "init: an image is a path, bytes or a PIL image, not int"),
        ({"init": b"nothing"}, "init: the picture of 7 bytes is no PNG, JPEG or WEBP picture"),
        ({"mask": MASK}, "a mask needs an init image"),
        (
            {"init": PICTURE, "mask": MASK.resize((32, 64))},
            "the mask is 32 x 64 but the init image 64 x 64; make them the same size",
        ),
        ({"init": PICTURE, "mask": Image.new("L", (64, 64))}, "the mask is black everywhere"),
        ({"init": PICTURE, "mask": Image.new("RGBA", (64, 64))}, "the mask has transparent parts"),
        ({"guidance_start": 0.6, "guidance_end": 0.4}, "guidance_start 0.6 is not before guidance_end 0.4"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "no step would be guided"),
        ({"variation": 0.5}, "variation needs a variation_seed"),
        # Settings that would do nothing.
        ({"strength": 0.5}, "strength 0.5 does nothing without an init image"),
        ({"mask_blur": 8}, "mask_blur 8 does nothing without a mask"),
        ({"init": PICTURE, "mask_blur": 8}, "mask_blur 8 does nothing without a mask"),
        ({"variation_seed": 5}, "variation_seed 5 does nothing without variation"),
    ],
)
def test_a_bad_value_is_named_in_one_line(values: dict, told: str):
    assert told in refusal(lambda: make_request(**values))
    assert told in refusal(lambda: Request(**values))


def test_hostile_values_do_not_fill_the_message():
    deep: dict = {}
    for _ in range(900):
        deep = {"a": deep}
    for value in (deep, "x" * 10**6, b"x" * 10**6, list(range(10**5))):
        assert len(refusal(lambda value=value: make_request(seed=value))) < 200


def test_several_bad_values_are_told_together():
    line = refusal(lambda: make_request(steps=0, width=9))
    assert "steps" in line and "width" in line


def test_validation_by_pydantic_stays_pydantics():
    with pytest.raises(ValidationError, match="steps: input should be"):
        Request.model_validate({"steps": 0})
    assert Request.model_validate_json('{"steps": 3}').steps == 3
    assert "steps" in Request.model_json_schema(mode="serialization")["properties"]


def test_hires_alone_is_refused_alike():
    assert "scale" in refusal(lambda: Hires(scale=9))


def test_what_says_the_default_is_taken():
    request = make_request(strength=0.75, mask_blur=2, guidance_start=0.0, variation=0.0, variation_seed=5)
    assert request.variation_seed == 5


def test_it_is_frozen():
    with pytest.raises(ValidationError):
        make_request().steps = 3  # type: ignore[misc]


def test_missing_file(tmp_path: Path):
    with pytest.raises(MissingFile, match=r"no image at .*nothing\.png"):
        make_request(init=tmp_path / "nothing.png")
    with pytest.raises(MissingFile):
        make_request(init=str(tmp_path))  # a folder


# Pictures from elsewhere


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
WHOLE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (WHOLE[: len(WHOLE) // 2], "cannot be decoded"),
        (WHOLE[:40], "cannot be decoded|is no PNG"),
        (SVG, "is no PNG, JPEG or WEBP picture"),
        (b"", "is no PNG, JPEG or WEBP picture"),
        (encoded(PICTURE, "GIF"), "is no PNG, JPEG or WEBP picture"),
        (encoded(PICTURE, "BMP"), "is no PNG, JPEG or WEBP picture"),
        (
            header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
            "cannot be decoded|pixels",
        ),
        (header(20_000, 20_000) + chunk(b"IDAT", b""), "cannot be decoded|pixels"),
        (header(12_000, 9_000) + chunk(b"IDAT", b""), r"12000 x 9000 pixels; at most 16,777,216 are read"),
        (header(5000, 5000) + chunk(b"IDAT", b""), r"5000 x 5000 pixels; at most 16,777,216 are read"),
        # 40 MB of zeros in a text
        (
            header(8, 8) + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"0" * 4 * 10**7)) + WHOLE[33:],
            "cannot be decoded",
        ),
        (WHOLE[:33] + chunk(b"IDAT", b"no zlib") + chunk(b"IEND", b""), "cannot be decoded"),
    ],
    ids=["half", "header", "svg", "empty", "gif", "bmp", "huge", "bomb", "warned", "large", "text", "data"],
)
def test_hostile_pictures(content: bytes, told: str, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(SumukError, match=told) as caught:
        read_image(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not recwarn.list, [str(each.message) for each in recwarn.list]
    with pytest.raises(SumukError, match=told):
        read_image(content)


def test_a_large_picture_is_refused_before_its_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch):
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(BadInput, match="pixels"):
        read_image(encoded(Image.new("L", (4097, 4096))))
    assert MOST_PIXELS < 4097 * 4096


def test_a_huge_file_is_not_read(tmp_path: Path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    assert "bytes; at most" in refusal(lambda: read_image(path))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animations_are_refused(form: str):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green")]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert "is animated" in refusal(lambda: read_image(content))


def test_palettes_become_colours():
    source = Image.new("RGB", (8, 8), (10, 200, 30))
    found = read_image(encoded(source.quantize(4)))
    assert found.mode == "RGB" and found.getpixel((3, 3)) == (10, 200, 30)
    see_through = Image.new("P", (8, 8), 0)
    see_through.putpalette([1, 2, 3])
    found = read_image(encoded(see_through, transparency=0))
    assert found.mode == "RGBA" and found.getpixel((0, 0)) == (1, 2, 3, 0) and not found.info


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.array([[0, 257 * 100], [257 * 200 + 100, 65535]], np.uint16)
    found = read_image(encoded(Image.fromarray(deep)))
    assert found.mode == "L" and np.asarray(found).tolist() == [[0, 100], [200, 255]]


def test_other_modes():
    assert read_image(Image.new("CMYK", (8, 8), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert read_image(Image.new("1", (8, 8), 1)).getpixel((0, 0)) == 255
    assert read_image(Image.new("LA", (8, 8), (7, 9))).getpixel((0, 0)) == (7, 7, 7, 9)
    assert "no defined white" in refusal(lambda: read_image(Image.new("F", (8, 8))))
    assert "no defined white" in refusal(lambda: read_image(Image.new("I", (8, 8), 70_000)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_is_turned_upright_as_its_camera_says(form: str):
    source = Image.new("RGB", (32, 16), "black")
    source.paste("white", (0, 0, 16, 16))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    found = read_image(encoded(source, form, exif=exif))
    assert found.size == (16, 32)
    assert found.getpixel((8, 4))[0] > 200 and found.getpixel((8, 28))[0] < 50
    assert make_request(init=found).init.size == (16, 32), "and not turned again"


def test_a_request_keeps_its_picture_when_the_callers_changes():
    mine = PICTURE.copy()
    request = make_request(init=mine)
    mine.paste("blue", (0, 0, 64, 64))
    assert request.init.getpixel((0, 0)) == (255, 0, 0)


def test_digests_tell_pictures_apart():
    same = read_image(encoded(PICTURE)), read_image(encoded(PICTURE, "WEBP", lossless=True))
    assert image_digest(same[0]) == image_digest(same[1])
    others = [
        Image.new("RGB", (64, 64), (254, 0, 0)), Image.new("RGB", (32, 128), "red"), Image.new("L", (192, 64), 0),
    ]  # fmt: skip
    assert len({image_digest(each) for each in (PICTURE, *others)}) == 4


def fields_with_pictures(kind: type) -> set[str]:
    return {
        name
        for name, hint in get_type_hints(kind).items()
        if Image.Image in getattr(hint, "__args__", (hint,))
    }


def test_every_field_that_holds_a_picture_is_known() -> None:
    """One that is forgotten would open a file of a server by the name that a caller gives."""
    assert fields_with_pictures(Request) == set(PICTURES)
    assert fields_with_pictures(Steer) == {"hint"}


def test_where_pictures_stand() -> None:
    values = {"init": b"1", "mask": None, "steer": [{"control": "a"}, "odd", {"control": "b", "hint": b"2"}]}
    found = {called: holder[key] for holder, key, called in places(values)}
    assert found == {"init": b"1", "steer.2.hint": b"2"}
    assert not [*places({"steer": 7})]


@pytest.mark.parametrize(
    "wrong", [{"label": 2**31}, {"original": (0, 8)}, {"original": (10**400, 8)}, {"crop": (0, 65_537)}]
)
def test_numbers_that_no_model_can_take(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        make_request(prompt="a fox", **wrong)
