"""Desks are killed, and no job that was acknowledged is lost or done twice; and a long life takes no more memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def told_by(program: str, *arguments: object) -> dict[str, int]:
    """What one of the programs beside this test prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.serve.{program}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kills", "seed"), [(20, 1), pytest.param(200, 2, marks=pytest.mark.slow)])
def test_kills_lose_nothing_and_double_nothing(tmp_path: Path, kills: int, seed: int):
    told = told_by("killed_desks", tmp_path, kills, seed)
    print(told)
    assert told["acknowledged"] >= kills and told["interrupted"] >= kills // 4, f"too little happened: {told}"
    wrong = ("lost", "duplicates", "redrawn")
    assert {name: told[name] for name in wrong} == dict.fromkeys(wrong, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("leak", "grows"), [(0, False), (20_000, True)], ids=["plain", "leaking"])
def test_two_thousand_jobs_take_no_more_memory(leak: int, grows: bool, tmp_path: Path):
    """With a leak of 20 kB a job planted, the same test fails."""
    told = told_by("long_life", tmp_path, 2000, leak)
    print(told)
    assert told["done"] == 2000
    assert (told["growth"] > 20 * 2**20) == grows
