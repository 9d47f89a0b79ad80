"""A run that was stopped, killed or damaged and then resumed ends with the same bits as one that never was.

Everything is compared: weights, averages, moments of the optimizer, and the exported checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.train.small_run import saved, text_config, unlike, vae_config, write_pictures, write_vae

from sumuk.base.errors import BadFile
from sumuk.train.config import TrainConfig
from sumuk.train.loop import Tick
from sumuk.train.run import run
from sumuk.train.state import saves

Make = Callable[..., TrainConfig]
"""(out, changes) -> a configuration of one kind of recipe."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Path:
    return write_pictures(folder / "pictures")


@pytest.fixture(scope="module", params=["vae", "text-to-image"])
def make(request: pytest.FixtureRequest, folder: Path, pictures: Path) -> Make:
    """Ten pictures in batches of four, so that epochs end inside batches; bfloat16, as real runs are."""
    if request.param == "vae":
        # Crops end in the middle too: stopping must not move that point.
        recipe = {"crop": 8, "crop_until": 12}
        return lambda out, **rest: vae_config(pictures, out, recipe=recipe, precision="bf16", **rest)
    vae = write_vae(pictures, folder / "vae.safetensors")
    return lambda out, **rest: text_config(pictures, out, vae, precision="bf16", **rest)


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through in one go."""
    out = tmp_path_factory.mktemp("whole")
    assert run(make(out), tell=lambda sentence: None) == out / "model.safetensors"
    return out


class After:
    """Says stop once ``count`` steps were taken."""

    def __init__(self, count: int) -> None:
        self.left = count

    def tick(self, each: Tick) -> None:
        self.left -= 1

    def __call__(self) -> bool:
        return self.left <= 0


def go_on(config: TrainConfig, steps: int | None = None) -> tuple[Path | None, list[str]]:
    """Run with new objects, as a new process would; global random numbers are led astray first."""
    torch.manual_seed(int(torch.randint(1 << 40, ())))
    after, told = After(steps if steps is not None else 10**9), list[str]()
    return run(config, tell=told.append, tick=after.tick, stop=after), told


def assert_same_end(one: Path, other: Path) -> None:
    first, second = saves(one)[-1], saves(other)[-1]
    assert first.name == second.name
    tensors = saved(first)
    assert {name.split("/")[0] for name in tensors} == {"weights", "ema", "optimizer"}
    assert unlike(tensors, saved(second)) == []
    # Outside the assertion, as pytest would write a difference of megabytes.
    alike = (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert alike, "the exported checkpoints differ"


def test_stopping_changes_nothing(make: Make, whole: Path, tmp_path: Path):
    config = make(tmp_path / "parts")
    assert go_on(config, steps=2)[0] is None
    assert [each.name for each in saves(config.out)] == ["state-0000000008"]
    half = saved(saves(config.out)[-1])
    made, told = go_on(config, steps=3)
    assert made is None and "8 of 28 images seen" in told[0]
    assert go_on(config)[0] == config.out / "model.safetensors"
    assert_same_end(whole, config.out)
    moved = unlike(half, saved(saves(config.out)[-1]))
    assert len(moved) > 0.9 * len(half), "nothing was learnt between, so equality would prove nothing"


def test_the_seed_matters(make: Make, whole: Path, tmp_path: Path):
    """Else the law above would hold of a run that ignores its randomness."""
    out = tmp_path / "other"
    run(make(out, seed=4), tell=lambda sentence: None)
    differing = unlike(saved(saves(whole)[-1]), saved(saves(out)[-1]))
    assert any(name.startswith("weights/") for name in differing)


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_damaged_save_is_passed_over_by_name(make: Make, whole: Path, tmp_path: Path, harm: str):
    config = make(tmp_path / "hurt", every={"save": 8, "sheet": 10_000})
    assert go_on(config, steps=4)[0] is None
    older, newest = saves(config.out)
    assert (older.name, newest.name) == ("state-0000000008", "state-0000000016")
    victim = newest / "optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    made, told = go_on(config)
    assert told[0] == f"{victim} is missing or damaged; going back to state-0000000008"
    assert "8 of 28 images seen" in told[1]
    assert made is not None
    assert_same_end(whole, config.out)


def test_a_save_without_its_manifest_is_none(make: Make, whole: Path, tmp_path: Path):
    """What a kill leaves on a file system that keeps no order: parts, but not the manifest, written last."""
    config = make(tmp_path / "torn", every={"save": 8, "sheet": 10_000})
    go_on(config, steps=4)
    (saves(config.out)[-1] / "manifest.json").unlink()
    assert [each.name for each in saves(config.out)] == ["state-0000000008"]
    _, told = go_on(config)
    assert "8 of 28 images seen" in told[0]
    assert_same_end(whole, config.out)


def test_another_configuration_is_refused(make: Make, tmp_path: Path):
    config = make(tmp_path / "changed")
    go_on(config, steps=1)
    before = saved(saves(config.out)[-1])
    with pytest.raises(BadFile, match="belongs to a run with another configuration") as caught:
        go_on(make(config.out, optim={"rate": 1e-3, "warmup": 8}))
    assert caught.value.code == "train.config"
    assert unlike(before, saved(saves(config.out)[-1])) == []


def test_length_cadence_and_places_may_change(make: Make, tmp_path: Path):
    config = make(tmp_path / "moved")
    go_on(config, steps=1)
    config.out.rename(tmp_path / "elsewhere")
    longer = make(tmp_path / "elsewhere", images=8, every={"save": 4, "sheet": 10_000})
    made, told = go_on(longer)
    assert "4 of 8 images seen" in told[0] and made is not None
