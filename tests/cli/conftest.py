"""The command line, called in this process as the shell would call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.generate.conftest import saved

from sumuk.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code and both its outputs."""

    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Runs ``sumuk`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(each) for each in arguments])
        told = capsys.readouterr()
        return Said(int(caught.value.code or 0), told.out, told.err)

    yield run
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    hole = Image.new("L", (64, 64))
    hole.paste(255, (16, 16, 48, 48))
    hole.save(path)
    return path
