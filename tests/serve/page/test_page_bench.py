"""Work on the shelf: names that are taken and refused, and a real command with its output and its end."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from sumuk.generate.api import MINIATURE
from sumuk.serve.page.bench import GRACE, Bench, Work
from sumuk.serve.page.words import Words
from sumuk.serve.trouble import Refused

ENGLISH = Words("en")


@pytest.fixture
def bench(tmp_path) -> Bench:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.copy(MINIATURE, shelf / "mine.safetensors")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (shelf / "way.out").symlink_to(tmp_path / "secret.safetensors")
    return Bench(shelf)


@pytest.mark.parametrize(
    "name", ["", None, "../secret.safetensors", "/etc/passwd", "way.out", "none.safetensors"]
)
def test_files_are_of_the_shelf(bench, name):
    assert bench.file("mine.safetensors", ENGLISH) == bench.shelf / "mine.safetensors"
    with pytest.raises(Refused):
        bench.file(name, ENGLISH)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "-x", "x\0", "x" * 200, "CON:", "mine", "mine.safetensors"]
)
def test_new_names_are_plain_and_free(bench, name):
    assert bench.new(" 새 모델 ".replace(" ", "") + "-2.1", ENGLISH).parent == bench.shelf
    with pytest.raises(Refused):
        bench.new(name, ENGLISH)


async def done(bench: Bench, *arguments: str | Path) -> Work:
    work = bench.start("ann", [*arguments], "", ENGLISH)
    while not work.over:
        await asyncio.sleep(0.02)
    return work


def test_a_command_says_what_it_does_and_how_it_ended(bench):
    work = asyncio.run(done(bench, "inspect", bench.shelf / "mine.safetensors"))
    assert work.code == 0 and "Stable Diffusion 1.x" in work.said
    work = asyncio.run(done(bench, "inspect", bench.shelf / "none.safetensors"))
    assert work.code not in (0, None)
    assert "none.safetensors" in work.said
    assert str(bench.shelf) not in work.said, "where the shelf lies is nobody's business"


def test_one_works_at_a_time_and_a_cancelled_one_leaves_nothing(bench):
    async def act() -> Work:
        path = bench.shelf / "mine.safetensors"
        work = bench.start(
            "ann", ["prune", path, bench.shelf / "new.safetensors"], "new.safetensors", ENGLISH
        )
        with pytest.raises(Refused, match="at work already"):
            bench.start("ben", ["inspect", path], "", ENGLISH)
        await asyncio.sleep(0.3)
        bench.cancel("ben")
        assert not work.cancelled.is_set(), "it is another's"
        bench.cancel("ann")
        async with asyncio.timeout(2 * GRACE):
            while not work.over:
                await asyncio.sleep(0.02)
        return work

    assert asyncio.run(act()).code is None
    assert sorted(path.name for path in bench.shelf.iterdir()) == ["mine.safetensors", "way.out"]


def test_the_methods_of_merging_are_of_two_models():
    pytest.importorskip("gradio", reason="the page is not installed: pip install 'sumuk[ui]'")
    from sumuk.serve.page.workshop import METHODS
    from sumuk.weights.merge_methods import METHODS as KNOWN

    assert all(len(KNOWN[name].roles) == 2 and KNOWN[name].alpha is not None for name in METHODS)
