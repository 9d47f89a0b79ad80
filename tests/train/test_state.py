"""Saves on disk: whole or absent at whatever point the process dies, the last two kept, damage told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sumuk.base.errors import BadFile
from sumuk.train import state as module
from sumuk.train.config import OptimConfig
from sumuk.train.ema import Ema
from sumuk.train.optim import make_optimizer
from sumuk.train.state import TrainState, resume, saves

ROOT = Path(__file__).parents[2]


def fresh(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    return TrainState({"net": net}, make_optimizer(net.parameters(), OptimConfig()), Ema({"net": net}, 10))


def advance(state: TrainState) -> None:
    """A step of four images that depends on nothing but the state."""
    net = state.modules["net"]
    net(torch.tensor([[1.0, 2.0, state.images + 1.0]])).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.images += 4
    state.ema.update(state.images, 4)


def contents(state: TrainState) -> list[bytes]:
    """Every bit of a state, in a fixed order."""
    moments = [
        value for each in state.optimizer.state_dict()["state"].values() for _, value in sorted(each.items())
    ]
    tensors = [*state.modules["net"].state_dict().values(), *state.ema.weights.values(), *moments]
    return [bytes(tensor.detach().numpy().tobytes()) for tensor in tensors]


def run_of(out: Path, steps: int) -> TrainState:
    state = fresh()
    for _ in range(steps):
        advance(state)
        state.save(out, "mark")
    return state


def test_a_save_holds_every_bit(tmp_path: Path):
    state = run_of(tmp_path, 3)
    other = fresh(seed=1)
    assert contents(other) != contents(state)
    assert resume(other, tmp_path, "mark") == []
    assert other.images == 12
    assert contents(other) == contents(state)
    advance(other)
    advance(state)
    assert contents(other) == contents(state)


def test_two_saves_are_kept(tmp_path: Path):
    run_of(tmp_path, 4)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["state-0000000012", "state-0000000016"]


def test_nothing_saved_begins_anew(tmp_path: Path):
    state = fresh()
    assert resume(state, tmp_path / "absent", "mark") == []
    assert state.images == 0


def test_saving_twice_leaves_the_first_in_place(tmp_path: Path):
    """Replacing it would leave a moment without any save, the first time there is only one."""
    state = run_of(tmp_path, 1)
    before = (tmp_path / "state-0000000004").stat().st_ino
    state.save(tmp_path, "mark")
    assert (tmp_path / "state-0000000004").stat().st_ino == before
    (tmp_path / "state-0000000004" / "weights.safetensors").write_bytes(b"")
    state.save(tmp_path, "mark")  # a damaged one is replaced
    assert resume(fresh(), tmp_path, "mark") == []


def test_a_whole_save_outlives_damaged_ones_ahead_of_it(tmp_path: Path):
    """After going back past damaged saves, new saves are older than those by name, and must not be pruned."""
    run_of(tmp_path, 1)
    keep = tmp_path / "state-0000000004"
    for images in (12, 16):
        ahead = tmp_path / f"state-{images:010d}"
        ahead.mkdir()
        (ahead / "manifest.json").write_text("{}")
    state = fresh(seed=1)
    sentences = resume(state, tmp_path, "mark")
    assert [s.split(";")[1] for s in sentences] == [f" going back to {keep.name}"] * 2
    advance(state)
    target = state.save(tmp_path, "mark")
    assert target.is_dir() and keep.is_dir()
    again = fresh(seed=2)
    resume(again, tmp_path, "mark")
    assert again.images == 8 and contents(again) == contents(state)


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", '{"images": 4}', '{"images": 5, "seconds": 0, "config": "mark", "files": {}}'],
)
def test_a_damaged_manifest_is_damage(tmp_path: Path, manifest: str):
    run_of(tmp_path, 2)
    (tmp_path / "state-0000000008" / "manifest.json").write_text(manifest)
    state = fresh()
    assert len(resume(state, tmp_path, "mark")) == 1
    assert state.images == 4


def test_a_manifest_that_names_fewer_files_is_damage(tmp_path: Path):
    run_of(tmp_path, 2)
    path = tmp_path / "state-0000000008" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["ema.safetensors"]
    path.write_text(json.dumps(manifest))
    assert len(resume(fresh(), tmp_path, "mark")) == 1


def test_a_missing_file_is_damage(tmp_path: Path):
    run_of(tmp_path, 2)
    (tmp_path / "state-0000000008" / "ema.safetensors").unlink()
    (sentence,) = resume(fresh(), tmp_path, "mark")
    assert "ema.safetensors is missing or damaged; going back to state-0000000004" in sentence


def test_saves_without_a_whole_one_stop_the_run(tmp_path: Path):
    """To begin anew in silence would throw days away."""
    run_of(tmp_path, 2)
    for folder in saves(tmp_path):
        (folder / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(BadFile, match=r"no save below .* is whole") as caught:
        resume(fresh(), tmp_path, "mark")
    assert caught.value.code == "train.damaged"


def test_a_full_disk_costs_no_earlier_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = run_of(tmp_path, 1)
    expected = contents(state)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    advance(state)
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(BadFile, match=r"cannot save the run to .*No space left"):
        state.save(tmp_path, "mark")
    assert [each.name for each in tmp_path.iterdir()] == ["state-0000000004"]
    other = fresh(seed=1)
    resume(other, tmp_path, "mark")
    assert contents(other) == expected


DIE = """
import json, os, shutil, signal, sys
from pathlib import Path
from tests.train.test_state import advance, contents, fresh, run_of
from sumuk.train import state as module
from sumuk.train.state import resume

out, calls = Path(sys.argv[1]), 0

def mortal(function, at):
    def call(*args, **rest):
        global calls
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*args, **rest)
    return call

state = run_of(out / "base", 2)
before = contents(state)
advance(state)
after = contents(state)
rows = []
for at in range(100):
    place = out / str(at)
    shutil.copytree(out / "base", place)
    child = os.fork()
    if child == 0:
        module.save_file = mortal(module.save_file, at)
        module._sync = mortal(module._sync, at)
        module._sha256 = mortal(module._sha256, at)
        module.shutil.rmtree = mortal(shutil.rmtree, at)
        for name in ("rename", "mkdir", "write_text"):
            setattr(Path, name, mortal(getattr(Path, name), at))
        state.save(place, "mark")
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    other = fresh(seed=1)
    sentences = resume(other, place, "mark")
    found, same = other.images, contents(other) == (before if other.images == 8 else after)
    if found == 8:
        advance(other)
    other.save(place, "mark")
    rows.append([died, found, same, sentences, sorted(each.name for each in place.iterdir())])
    if died == 0:
        break
print(json.dumps(rows))
"""


def test_killed_at_any_point_of_a_save(tmp_path: Path):
    """``kill -9`` before each write, sync, rename and removal in turn: what loads is one state or the other."""
    done = subprocess.run(
        [sys.executable, "-c", DIE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) > 15
    assert [row[0] for row in rows] == [-9] * (len(rows) - 1) + [0]
    found = [row[1] for row in rows]
    assert set(found) == {8, 12} and found == sorted(found), "from some point on the new save stands"
    for died, _, same, sentences, left in rows:
        assert same and sentences == []
        # The next save clears what the killed one left behind.
        assert left == ["state-0000000008", "state-0000000012"], (died, left)
