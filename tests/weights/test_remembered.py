"""What is known of files is believed as long as they are what they were, and by no damage longer."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from sumuk.base.errors import MissingFile
from sumuk.files.hashes import Hashes, hashes
from sumuk.weights import remembered
from sumuk.weights.model import WeightFile
from sumuk.weights.remembered import Index, state, usual_index


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"as it was")
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files are read whole."""
    found: list[Path] = []

    def counted(path: Path, progress: object = None) -> Hashes:
        found.append(path)
        return hashes(path)

    monkeypatch.setattr(remembered, "hashes", counted)
    return found


def test_a_file_is_read_once_also_by_the_next_process(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    index = Index(tmp_path / "index")
    assert index.hashed(file, state(file)) is None
    assert index.hashes(file) == hashes(file) == index.hashes(file)
    assert Index(tmp_path / "index").hashes(file) == hashes(file)
    assert reads == [file]


def test_a_file_that_was_given_its_old_date_is_read_again(
    file: Path, tmp_path: Path, reads: list[Path]
) -> None:
    index = Index(tmp_path / "index")
    index.hashes(file)
    before = file.stat()
    with file.open("r+b") as handle:
        handle.write(b"as it is.")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert index.hashes(file) == hashes(file)
    assert len(reads) == 2


def test_a_link_and_its_file_are_known_as_one(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    index = Index(tmp_path / "index")
    (tmp_path / "link").symlink_to(file)
    assert index.hashes(tmp_path / "link") == index.hashes(file)
    assert reads == [file]


@pytest.mark.parametrize("said", ["", "[]", "{}", "7", '["one"]', '{"sha256": 1, "more": 2}', "\x00"])
def test_nonsense_in_the_index_is_not_believed(file: Path, tmp_path: Path, said: str) -> None:
    index = Index(tmp_path / "index")
    index.hashes(file)
    index.tell(file, state(file), "sd1/text-to-image", "Stable Diffusion 1")
    with sqlite3.connect(tmp_path / "index") as base:
        base.execute("UPDATE files SET said = ?", (said,))
    again = Index(tmp_path / "index")
    assert again.told(file, state(file)) is None
    assert again.hashes(file) == hashes(file)


def test_what_is_not_there_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        Index(tmp_path / "index").hashes(tmp_path / "none")


def test_the_files_of_a_model_are_known_to_the_shelf(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert WeightFile(file).sha256 == hashes(file).sha256
    known = usual_index().hashed(file, state(file))
    assert known is not None and known == WeightFile(file).hashes


def test_a_user_without_a_home(file: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert WeightFile(file).sha256 == WeightFile(file).sha256 == hashes(file).sha256
    assert reads == [file]
