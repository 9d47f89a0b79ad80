from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.cli.conftest import Call

from sumuk.generate.api import MINIATURE
from sumuk.generate.receipt import read_receipt, save_png

needs_miniature = pytest.mark.skipif(not MINIATURE.is_file(), reason="the miniature is not built yet")


@pytest.fixture
def drawn(call: Call, model_file: Path) -> Path:
    assert call("generate", "a fox", "-m", model_file, "--steps", 3, "--seed", 7, "-o", "a.png").code == 0
    return Path("a.png")


def test_identical(call: Call, model_file: Path, drawn: Path):
    said = call("replay", drawn, "-m", model_file, "-o", "again.png")
    assert (said.code, said.out) == (0, "identical\n")
    assert Image.open("again.png").tobytes() == Image.open(drawn).tobytes()


def test_another_picture_is_told_with_reasons(call: Call, model_file: Path, drawn: Path):
    picture, receipt = read_receipt(drawn)
    picture.paste("red", (0, 0, 20, 20))
    save_png(picture, receipt, drawn)
    said = call("replay", drawn, "-m", model_file)
    assert said.code == 1 and said.out.startswith("different (largest difference ")
    assert "the picture was changed after it was made" in said.out


def test_the_model_must_be_given_unless_it_is_the_miniature(call: Call, drawn: Path):
    said = call("replay", drawn)
    assert said.code == 2
    assert "text-to-image.safetensors, which is not the miniature here; give it with --model" in said.err


def test_a_device_that_is_not_here_can_be_replaced(call: Call, model_file: Path, drawn: Path):
    picture, receipt = read_receipt(drawn)
    receipt["machine"]["device"] = "cuda:77"
    save_png(picture, receipt, drawn)
    said = call("replay", drawn, "-m", model_file)
    assert said.code == 2 and "device 'cuda:77' is not here; there is cpu" in said.err
    said = call("replay", drawn, "-m", model_file, "--device", "cpu")
    assert said.code == 0 and "device was cuda:77, is cpu" in said.out


@pytest.mark.parametrize(
    ("text", "told"),
    [("{}", "damaged"), ("[" * 10_000, "damaged"), ("NaN", "damaged"), (None, "carries no Sumuk receipt")],
)
def test_hostile_receipts(call: Call, text: str | None, told: str):
    info = PngInfo()
    if text is not None:
        info.add_itxt("sumuk", text)
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    said = call("replay", "a.png")
    assert said.code == 2 and said.out == "" and said.err.count("\n") == 1 and told in said.err


def test_hostile_values_in_a_good_receipt(call: Call, model_file: Path, drawn: Path):
    picture, receipt = read_receipt(drawn)
    for change, told in (
        ({"machine": receipt["machine"] | {"dtype": "x"}}, "dtype 'x'"),
        ({"model": receipt["model"] | {"prediction": "x"}}, "unknown prediction 'x'"),
        ({"settings": receipt["settings"] | {"solver": "x"}}, "unknown solver 'x'"),
        ({"settings": receipt["settings"] | {"init": "/etc/passwd"}}, "damaged"),
    ):
        info = PngInfo()
        info.add_itxt("sumuk", json.dumps(receipt | change))
        picture.save("b.png", pnginfo=info)
        said = call("replay", "b.png", "-m", model_file)
        assert said.code == 2 and said.err.count("\n") == 1 and told in said.err, said


def test_bad_targets(call: Call, drawn: Path):
    for out, told in (("no/b.png", "the folder no does not exist"), ("b.jpg", "does not end in .png")):
        said = call("replay", drawn, "-o", out)
        assert said.code == 2 and told in said.err and said.err.count("\n") == 1
    assert call("replay", "none.png").err == "sumuk: no image at none.png\n"


@needs_miniature
def test_demo(call: Call, monkeypatch: pytest.MonkeyPatch):
    from sumuk.cli import draw

    monkeypatch.setattr(draw, "DEMO", draw.DEMO[:2])
    said = call("demo", "-o", "x.png")
    assert said.code == 0 and "2 pictures in " in said.out and "look at x.png" in said.out
    assert Image.open("x.png").size == (512, 256)
    assert call("demo", "-o", "no/x.png").err == "sumuk: the folder no does not exist; make it first\n"
