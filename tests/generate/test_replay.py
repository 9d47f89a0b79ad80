from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.generate.conftest import gap, lively, refusal, run
from tests.weights.tiny import fill, tiny

from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.generate.engine import Finished
from sumuk.generate.receipt import read_receipt, save_png
from sumuk.generate.replay import Verdict, replay, request_of, same_model
from sumuk.weights.checkpoint import load, save
from sumuk.weights.model import Model

ASKED = {"prompt": "a fox in the snow", "solver": "dpmpp-2m-sde", "seed": 7, "negative": "the sea"}


@pytest.fixture
def drawn(model: Model) -> Finished:
    return run(model, ASKED)[0][0]


def again(
    model: Model, finished: Finished, picture: Image.Image | None = None, **more: Image.Image
) -> Verdict:
    receipt = json.loads(json.dumps(finished.receipt))
    request = request_of(receipt, more)
    return replay(picture or finished.picture, receipt, model, request)


def test_what_was_not_touched_is_identical(model: Model, drawn: Finished, tmp_path: Path):
    save_png(drawn.picture, drawn.receipt, tmp_path / "a.png")
    picture, receipt = read_receipt(tmp_path / "a.png")
    verdict = replay(picture, receipt, model, request_of(receipt, {}))
    assert (verdict.kind, verdict.largest, verdict.psnr, verdict.reasons) == (
        "identical",
        0,
        float("inf"),
        (),
    )
    assert gap(verdict.picture, drawn.picture) == 0


@pytest.mark.parametrize(
    "asked",
    [
        {"count": 3, "solver": "euler-a"},
        {"hires": {"scale": 1.5}},
        {"variation": 0.5, "variation_seed": 3, "solver": "ddim", "eta": 0.5},
        {"guidance": 1.0, "width": 72, "clip_skip": 2},
        {"guidance": 3, "rescale": 0.5, "guidance_start": 0.25, "guidance_end": 0.9, "grid": "exponential"},
        {"prompt": "[a fox:the sea:0.5] AND (snow:1.2) :0.5", "preview": 2},
        {"seed": 2**64 - 1, "solver": "lms"},
    ],
)
def test_every_kind_of_request_can_be_replayed(model: Model, asked: dict[str, Any]):
    for finished in run(model, asked)[0]:
        verdict = again(model, finished)
        assert verdict.kind == "identical" and not verdict.reasons


def test_fast_pictures_are_replayed_in_fast_mode(model: Model):
    finished = run(model, ASKED, mode="fast")[0][0]
    assert again(model, finished).kind == "identical"


def test_pictures_that_it_began_from_must_be_given_and_match(
    model: Model, photo: Image.Image, hole: Image.Image
):
    finished = run(model, {"init": photo, "mask": hole})[0][0]
    assert again(model, finished, init=photo, mask=hole).kind == "identical"
    assert "give it with --init" in refusal(lambda: again(model, finished))
    assert "give it with --mask" in refusal(lambda: again(model, finished, init=photo))
    other = photo.copy()
    other.putpixel((0, 0), (1, 2, 3))
    assert "the init picture is not the one" in refusal(lambda: again(model, finished, init=other, mask=hole))
    text = run(model, {})[0][0]
    assert "the receipt knows of no init picture; leave --init out" in refusal(
        lambda: again(model, text, init=photo)
    )


def test_a_picture_that_was_edited(model: Model, drawn: Finished):
    edited = drawn.picture.copy()
    edited.paste("red", (0, 0, 9, 9))
    verdict = again(model, drawn, edited)
    assert verdict.kind == "different" and verdict.psnr < 40
    (reason,) = verdict.reasons
    assert "changed after it was made" in reason and "drawn again it is as it was" in reason


def test_a_picture_that_was_touched_lightly(model: Model, drawn: Finished):
    light = drawn.picture.point(lambda value: min(value + 2, 255))
    verdict = again(model, drawn, light)
    assert verdict.kind == "within tolerance" and verdict.largest == 2 and verdict.reasons


def test_a_picture_that_was_made_smaller(model: Model, drawn: Finished):
    verdict = again(model, drawn, drawn.picture.resize((32, 32)))
    assert verdict.kind == "different"
    assert "the size was (32, 32), is (64, 64)" in " ".join(verdict.reasons)


def test_another_model(drawn: Finished, tmp_path: Path):
    other = lively(tiny())
    fill(other.text)
    save(other, tmp_path / "other.safetensors")
    verdict = again(load(tmp_path / "other.safetensors"), drawn)
    assert verdict.kind == "different"
    digest = drawn.receipt["model"]["files"][0]["sha256"][:10]
    assert f"the model files differ ({digest} then, " in verdict.reasons[0]


def test_another_prediction(model_file: Path, drawn: Finished):
    other = load(model_file, prediction="v")
    assert other.prediction is PREDICTIONS["v"]
    assert same_model(drawn.receipt, other) == ["the prediction was eps, is v"]
    assert again(other, drawn).kind == "different"


def test_other_threads_and_dtype_are_told(model_file: Path, drawn: Finished):
    torch.set_num_threads(2)
    verdict = again(load(model_file, dtype="bfloat16"), drawn)
    assert "threads was 1, is 2" in verdict.reasons and "dtype was float32, is bfloat16" in verdict.reasons


def test_other_arithmetic_is_told(model: Model, drawn: Finished):
    receipt = drawn.receipt | {"numerics": 0}
    verdict = replay(drawn.picture, receipt, model, request_of(receipt, {}))
    assert verdict.kind == "identical" and verdict.reasons == ("numeric version was 0, is 1",)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "steps: input should be"),
        ({"guidance": "nan"}, "guidance: input should be a finite number"),
        ({"moon": 1}, "unknown setting 'moon'"),
        ({"count": 64}, "the receipt is damaged: it tells of one picture"),
        ({"init": "/etc/passwd"}, "the receipt is damaged: it does not describe the init picture"),
        ({"mask": {"sha256": 3}}, "the receipt is damaged: it does not describe the mask picture"),
        ({"init": {"sha256": "0" * 64}}, "give it with --init"),
        ({"prompt": [["a"]]}, "prompt: input should be a valid string"),
        ({"hires": {"scale": 100}}, "hires: scale: input should be"),
    ],
)
def test_settings_from_elsewhere_are_checked(drawn: Finished, settings: dict[str, Any], told: str):
    receipt = drawn.receipt | {"settings": drawn.receipt["settings"] | settings}
    assert told in refusal(lambda: request_of(receipt, {}))


def test_no_path_of_a_receipt_is_opened(drawn: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secret = tmp_path / "secret.png"
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    secret.write_bytes(stream.getvalue())
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was opened"))
    receipt = drawn.receipt | {"settings": drawn.receipt["settings"] | {"init": str(secret)}}
    refusal(lambda: request_of(receipt, {}))
