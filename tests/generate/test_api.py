from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.generate.conftest import gap, pixels, refusal

import sumuk
from sumuk.generate.api import MINIATURE, miniature
from sumuk.generate.engine import Finished, Preview, Progress
from sumuk.weights.model import Model

FOLDER = Path(__file__).parents[2] / "examples"
CHOICES = {FOLDER / "zoo.py", FOLDER / "hostile.py"}
"""Scripts with choices: tests/weights/test_zoo.py, tests/laws/test_hostile_files.py."""
EXAMPLES = sorted(set(FOLDER.glob("*.py")) - CHOICES)
needs_miniature = pytest.mark.skipif(not MINIATURE.is_file(), reason="the miniature is not built yet")


def test_generate_tells_and_ends_with_the_picture(model: Model):
    request = sumuk.Request(prompt="a fox", steps=3, seed=1, preview=1)
    events = list(sumuk.generate(model, request))
    assert [type(each) for each in events] == [Progress, Preview, Progress, Preview, Progress, Finished]
    last = events[-1]
    assert isinstance(last, Finished) and last.picture.size == (64, 64)
    assert gap(sumuk.draw("a fox", model=model, steps=3, seed=1), last.picture) == 0


def test_draw_refuses_by_name(model: Model):
    assert "unknown setting 'sed'; did you mean 'seed'?" in refusal(
        lambda: sumuk.draw("a", model=model, sed=1)
    )
    assert "did you mean 'euler'?" in refusal(lambda: sumuk.draw("a", model=model, solver="eulr"))
    assert "steps" in refusal(lambda: sumuk.Request(steps=0))


def test_draw_raises_what_fails(model: Model, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.denoiser, "forward", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        sumuk.draw("a", model=model, steps=1)


@pytest.mark.parametrize(
    "code",
    [
        "import sumuk; generate = sumuk.generate; assert callable(generate)",
        "import sumuk; sumuk.draw; assert callable(sumuk.generate); assert callable(sumuk.generate)",
        "import sumuk.generate.engine as engine, sumuk; assert callable(sumuk.generate) and engine.Engine",
        "from sumuk import Hires, Request, draw, generate, load, miniature, open, save; assert callable(generate)",
        "import sumuk; assert all(getattr(sumuk, name) for name in dir(sumuk))",
    ],
)
def test_the_public_names_are_what_they_say_in_any_order(code: str):
    """``sumuk.generate`` is a package and a function; importing the one must not lose the other."""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        sumuk.sample  # noqa: B018


@needs_miniature
def test_the_miniature_draws_what_words_and_seed_decide():
    first = sumuk.draw("a fox, 3d style", steps=3, seed=1)
    assert first.size == (64, 64) and first.mode == "RGB"
    assert gap(first, sumuk.draw("a fox, 3d style", steps=3, seed=1)) == 0
    assert gap(first, sumuk.draw("a fox, 3d style", steps=3, seed=2)) > 0
    assert miniature() is miniature()
    if not miniature().denoiser.state_dict()["middle_block.1.norm.bias"].any():
        pytest.skip("the miniature is not trained yet")  # training moves them off zero
    assert gap(first, sumuk.draw("여우, 플랫", steps=3, seed=1)) > 0


@needs_miniature
def test_the_engine_law_holds_for_the_miniature():
    requests = [
        sumuk.Request(prompt="a fox, 3d style", steps=3, seed=1),
        sumuk.Request(prompt="여우, 플랫", steps=2, seed=2, solver="euler-a", guidance=3),
    ]
    engine = sumuk.generate.engine.Engine(miniature())
    jobs = [engine.submit(each) for each in requests]
    together = {each.job: each.picture for each in engine.events() if isinstance(each, Finished)}
    for job, request in zip(jobs, requests, strict=True):
        alone = [each.picture for each in sumuk.generate(miniature(), request) if isinstance(each, Finished)]
        assert gap(alone[0], together[job]) == 0


@needs_miniature
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    pictures = sorted(tmp_path.glob("*.png"))
    assert pictures and capsys.readouterr().out
    for each in pictures:
        with Image.open(each) as picture:
            assert np.ptp(pixels(picture.convert("RGB"))) > 0


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
