"""Importing Sumuk, and asking it for help, loads none of the heavy packages. Told by sys.modules, not the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"


def loaded(code: str) -> set[str]:
    """Top-level packages in sys.modules after ``code`` in a fresh interpreter."""
    report = "\nimport sys; print('|'.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split("|"))


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import sumuk; assert 'draw' in dir(sumuk)", {"torch", "numpy", "pydantic", "PIL", "tokenizers"}),
        (
            "import sumuk.cli.main as main, typer; typer.main.get_command(main.app)",
            {"torch", "numpy", "pydantic", "PIL", "tokenizers"},
        ),
        (
            "import sys, sumuk.cli.main as cli\n"
            "for verb in ([], ['generate'], ['train']):\n"
            "    sys.argv = ['sumuk', *verb, '--help']\n"
            "    try:\n        cli.main()\n"
            "    except SystemExit as done:\n        assert not done.code\n",
            {"torch", "numpy", "PIL", "tokenizers"},  # Typer itself takes pydantic to print a verb's help
        ),
        # What a family is, and a training configuration, are told without torch too.
        ("import sumuk.train.config", {"torch", "numpy"}),
        ("import sumuk.base.registry, sumuk.base.errors", {"torch", "numpy", "pydantic", "typer"}),
    ],
    ids=["sumuk", "app", "help", "config", "base"],
)
def test_light(code: str, heavy: set[str]):
    modules = loaded(code)
    assert "sumuk" in modules
    assert sorted(modules & heavy) == []


def test_the_report_sees_torch():
    assert "torch" in loaded("import sumuk; sumuk.load")
