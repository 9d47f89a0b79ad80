"""What a picture from elsewhere says of itself: taken over, or listed with the reason; never trusted."""

from __future__ import annotations

import io
import json
import struct
import time
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sumuk.base.errors import BadFile, SumukError
from sumuk.generate.request import Request
from sumuk.serve.dropped import dropped, png_texts

RECEIPT = {
    "receipt": 1,
    "sumuk": "0.1.0",
    "model": {"title": "Mine", "family": "sd1", "files": [{"name": "mine.safetensors", "sha256": "ab" * 32}]},
    "settings": {
        "prompt": "a fox",
        "negative": "",
        "width": 64,
        "height": 64,
        "steps": 4,
        "solver": "euler",
        "guidance": 7.0,
        "seed": 2**63,
        "eta": None,
        "count": 1,
        "skip_layers": [],
        "init": None,
        "strength": 0.75,
        "hires": {"scale": 2.0, "steps": 4, "strength": 0.5},
    },
}
A1111 = (
    "a fox\nNegative prompt: blurry\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x768, "
    'Model hash: 0123456789, Model: "a, b", Clip skip: 2, Version: v1.10.1'
)


def png(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def with_receipt(**changes: object) -> bytes:
    return png(sumuk=json.dumps(RECEIPT | {"settings": RECEIPT["settings"] | changes}))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_receipt_becomes_a_request():
    found = dropped(with_receipt())
    assert found["source"] == "sumuk" and found["left_out"] == {}
    wanted = {k: v for k, v in RECEIPT["settings"].items() if v is not None}
    assert found["request"] == wanted
    assert found["model"] == {
        "title": "Mine",
        "family": "sd1",
        "file": "mine.safetensors",
        "sha256": "ab" * 32,
        "writer": "sumuk 0.1.0",
    }
    Request(**found["request"])


def test_pictures_of_a_receipt_are_asked_for_again():
    digest = {"width": 8, "height": 8, "sha256": "0" * 64}
    found = dropped(with_receipt(init=digest, strength=0.5, steer=[{"control": "canny", "hint": digest}]))
    assert set(found["left_out"]) == {"init", "steer"}
    assert found["request"]["strength"] == 0.5 and "init" not in found["request"]


def test_what_a_receipt_says_wrongly_is_listed():
    found = dropped(with_receipt(steps=True, width="64", solver=5, wibble=1, seed=-1))
    assert set(found["left_out"]) == {"steps", "width", "solver", "wibble", "seed"}
    assert not {"steps", "width", "solver", "wibble", "seed"} & set(found["request"])
    assert "(it is True)" in found["left_out"]["steps"]


def test_a1111_becomes_a_request():
    found = dropped(png(parameters=A1111))
    assert found["source"] == "a1111" and found["left_out"] == {}
    assert found["request"] == {
        "prompt": "a fox",
        "negative": "blurry",
        "width": 512,
        "height": 768,
        "steps": 20,
        "solver": "DPM++ 2M",
        "grid": "karras",
        "guidance": 7.0,
        "seed": 5,
        "clip_skip": 2,
    }
    assert found["model"] == {"title": "a, b", "sha256": "0123456789", "writer": "v1.10.1"}


def test_a1111s_second_pass_and_older_sampler_names():
    text = (
        "x\nSteps: 20, Sampler: DPM++ 2M Karras, Seed: 5, Denoising strength: 0.6, Hires upscale: 2, "
        "Hires steps: 5, Hires upscaler: Latent, RNG: NV, ENSD: 31337"
    )
    found = dropped(png(parameters=text))
    assert found["request"]["hires"] == {"scale": 2.0, "steps": 5, "strength": 0.6}
    assert (found["request"]["solver"], found["request"]["grid"]) == ("DPM++ 2M", "karras")
    assert found["left_out"].keys() == {"Hires upscaler", "RNG", "ENSD"}
    assert "'31337'" in found["left_out"]["ENSD"]


def test_a1111s_image_to_image_asks_for_its_picture():
    found = dropped(
        png(parameters="x\nSteps: 20, Seed: 5, Size: 64x64, Denoising strength: 0.6, Mask blur: 4")
    )
    assert found["request"]["strength"] == 0.6 and found["request"]["mask_blur"] == 4
    assert found["left_out"].keys() == {"init", "mask"}


def test_spacings_that_share_a_name_are_told_apart():
    theirs = "x\nSteps: 2, Seed: 5, Size: 64x64, Schedule type: Uniform, Version: v1.10.1"
    assert dropped(png(parameters=theirs))["request"]["grid"] == "normal"
    ours = "x\nSteps: 2, Seed: 5, Size: 64x64, Schedule type: uniform, Version: sumuk 0.1.0"
    assert dropped(png(parameters=ours))["request"]["grid"] == "uniform"
    automatic = "x\nSteps: 2, Seed: 5, Size: 64x64, Schedule type: Automatic"
    found = dropped(png(parameters=automatic))
    assert "grid" not in found["request"] and not found["left_out"]


def test_a_damaged_receipt_gives_way_to_the_other_text_and_is_listed():
    found = dropped(png(sumuk="{", parameters=A1111))
    assert found["source"] == "a1111" and "damaged" in found["left_out"]["sumuk"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "damaged"),
        ("[]", "holds no settings"),
        ('{"receipt": 1}', "holds no settings"),
        ('{"receipt": 1, "settings": {"steps": NaN}}', "NaN is no number"),
        ('{"receipt": 2, "settings": {}}', "format 2"),
        ('{"receipt": ' + "1" * 5000 + "}", "damaged"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_bad_receipt_is_refused(text, why):
    with pytest.raises(BadFile, match=why) as caught:
        dropped(png(sumuk=text))
    assert caught.value.code.startswith("image.")


def test_a_picture_that_says_nothing_is_refused():
    with pytest.raises(BadFile, match="neither a Sumuk receipt nor A1111's parameters"):
        dropped(png())


def test_hostile_names_and_titles_can_be_sent_on():
    bad = {"\ud800" * 300: 1, "a" * 10_000: [[[]]] * 100, "<script>": "<script>"}
    receipt = RECEIPT | {"settings": {"prompt": "\udfff", **bad}, "model": {"title": "\ud800" * 1000}}
    found = dropped(png(sumuk=json.dumps(receipt)))
    assert len(json.dumps(found, ensure_ascii=False).encode()) < 5000  # and it is encodable
    assert "prompt" in found["left_out"] and not found["request"]


def test_too_many_settings_are_refused_at_once():
    began = time.process_time()
    many = {f"x{i}": i for i in range(50_000)}
    with pytest.raises(BadFile, match="more than 300 settings"):
        dropped(png(sumuk=json.dumps(RECEIPT | {"settings": many})))
    text = "x\n" + ", ".join(f"ab{i}: 1" for i in range(50_000))
    with pytest.raises(BadFile, match="more than 300 settings"):
        dropped(png(parameters=text))
    assert time.process_time() - began < 1.5


def test_each_kind_of_text_chunk_is_read():
    for make in (
        lambda text: chunk(b"tEXt", b"parameters\0" + text.encode("latin-1")),
        lambda text: chunk(b"zTXt", b"parameters\0\0" + zlib.compress(text.encode("latin-1"))),
        lambda text: chunk(b"iTXt", b"parameters\0\0\0\0\0" + text.encode()),
        lambda text: chunk(b"iTXt", b"parameters\0\1\0ko\0x\0" + zlib.compress(text.encode())),
    ):
        data = b"\x89PNG\r\n\x1a\n" + make("a föx") + chunk(b"IEND", b"")
        assert png_texts(data) == {"parameters": "a föx"}


def test_a_packed_bomb_is_not_unpacked():
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 20_000_000, 9))
    data = b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IEND", b"")
    tracemalloc.start()
    try:
        with pytest.raises(BadFile, match="longer than 1,000,000 characters"):
            png_texts(data)
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


def test_a_text_may_be_there_once():
    one = chunk(b"tEXt", b"parameters\0x")
    with pytest.raises(BadFile, match="'parameters' twice"):
        png_texts(b"\x89PNG\r\n\x1a\n" + one + one + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIDAT"],
)
def test_what_is_no_png_is_refused(data):
    with pytest.raises(BadFile):
        dropped(data)


def test_damage_is_noticed():
    data = bytearray(png(parameters=A1111))
    data[data.index(b"a fox")] ^= 1
    with pytest.raises(BadFile, match="is damaged"):
        dropped(bytes(data))


GOOD = png(parameters=A1111, sumuk=json.dumps(RECEIPT))


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_are_read_or_refused(changes):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    with suppress(SumukError):
        json.dumps(dropped(bytes(data)), ensure_ascii=False).encode()


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)
)
def test_any_value_of_a_receipt_is_taken_or_listed(value):
    settings = dict.fromkeys(("prompt", "steps", "hires", "loras", "seed", "original"), value)
    text = json.dumps({"receipt": 1, "settings": settings, "model": value, "sumuk": value})
    try:
        found = dropped(png(sumuk=text))
    except BadFile:  # NaN
        return
    unsaid = {name for name, each in settings.items() if each is None}
    assert found["request"].keys() | found["left_out"].keys() >= settings.keys() - unsaid
    json.dumps(found, ensure_ascii=False).encode()
