"""A folder of models: found by name and by hash, looked at once, nothing outside it named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sumuk.base.errors import BadInput, MissingFile
from sumuk.files.hashes import hashes
from sumuk.files.tensors import write
from sumuk.weights import inspect
from sumuk.weights.shelf import Entry, Shelf


def lora(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    write(
        path,
        {f"{layer}.lora_down.weight": torch.randn(2, 768), f"{layer}.lora_up.weight": torch.randn(320, 2)},
    )
    return path


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    lora(tmp_path / "models" / "Ink.safetensors", 1)
    lora(tmp_path / "models" / "people" / "fox.safetensors", 2)
    lora(tmp_path / "models" / "animals" / "fox.safetensors", 3)
    write(tmp_path / "models" / "seven.safetensors", {"clip_l": torch.ones(7, 64)})
    (tmp_path / "models" / "broken.safetensors").write_bytes(b"not a model")
    (tmp_path / "models" / "notes.txt").write_text("not looked at")
    return Shelf(tmp_path / "models", tmp_path / "index.sqlite3")


def test_everything_is_told_also_what_is_broken(shelf: Shelf) -> None:
    told = {entry.path.relative_to(shelf.root).as_posix(): entry.kind for entry in shelf.entries()}
    assert told == {
        "Ink.safetensors": "lora/sd1",
        "people/fox.safetensors": "lora/sd1",
        "animals/fox.safetensors": "lora/sd1",
        "seven.safetensors": "textual-inversion/other",
        "broken.safetensors": "",
    }
    (broken,) = [entry for entry in shelf.entries() if entry.name == "broken"]
    assert broken.title.startswith("cannot be read: ")


def test_names_are_found_whatever_their_case_but_never_guessed(shelf: Shelf) -> None:
    assert shelf.find("Ink", ["lora/"]).path.name == "Ink.safetensors"
    assert shelf.find("iNK").name == "Ink"
    assert shelf.find("people/fox").path.parent.name == "people"
    with pytest.raises(BadInput, match=r"'fox' is the name of 2 files .*animals"):
        shelf.find("fox")
    with pytest.raises(MissingFile, match="did you mean 'Ink'"):
        shelf.find("Inkk")
    with pytest.raises(MissingFile, match="no textual-inversion 'Ink'"):
        shelf.find("Ink", ["textual-inversion/"])
    with pytest.raises(MissingFile):
        shelf.find("../Ink")


def test_hashes_find_a_file(shelf: Shelf) -> None:
    known = hashes(shelf.root / "Ink.safetensors")
    assert known.autov3 is not None
    for digits in (known.sha256[:10], known.autov3, "0x" + known.sha256.upper()):
        assert shelf.by_hash(digits).name == "Ink"
    with pytest.raises(MissingFile, match="00000000"):
        shelf.by_hash("00000000")
    with pytest.raises(BadInput, match="at least 8"):
        shelf.by_hash("1234")


def test_files_are_looked_at_once_until_they_change(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    really = inspect.open
    monkeypatch.setattr(inspect, "open", lambda path: looked.append(Path(path).name) or really(path))
    first = shelf.entries()
    assert len(looked) == 5
    looked.clear()
    assert shelf.entries() == first and looked == []
    write(shelf.root / "seven.safetensors", {"emb_params": torch.ones(2, 768)})
    kinds = {entry.name: entry.kind for entry in shelf.entries()}
    assert looked == ["seven.safetensors"] and kinds["seven"] == "textual-inversion/sd1"


def test_a_file_that_is_taken_away_meanwhile_is_passed_over(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Shelf.look

    def late(self: Shelf, path: Path) -> Entry:
        if path.name == "Ink.safetensors":
            path.unlink()
        return look(self, path)

    monkeypatch.setattr(Shelf, "look", late)
    assert [entry.name for entry in shelf.entries()] == ["broken", "fox", "fox", "seven"]


def test_hashes_are_remembered(shelf: Shelf) -> None:
    entry = shelf.find("Ink")
    assert shelf.known_sha256(entry) is None
    known = shelf.hashes(entry)
    assert shelf.known_sha256(entry) == known.sha256
    os.utime(entry.path, ns=(1, 1))
    assert shelf.known_sha256(entry) is None


@pytest.mark.parametrize("damage", [b"", b"SQLite format 3\0 but no more", b"x" * 5000])
def test_a_damaged_index_only_costs_time(shelf: Shelf, tmp_path: Path, damage: bytes) -> None:
    before = shelf.entries()
    (tmp_path / "index.sqlite3").write_bytes(damage)
    for _ in range(2):
        assert Shelf(shelf.root, tmp_path / "index.sqlite3").entries() == before


def test_an_index_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    lora(tmp_path / "models" / "Ink.safetensors")
    (tmp_path / "file").write_text("in the way")
    shelf = Shelf(tmp_path / "models", tmp_path / "file" / "index.sqlite3")
    assert [entry.name for entry in shelf.entries()] == ["Ink"]


def test_links_out_of_the_folder_are_passed_over_and_told(shelf: Shelf, tmp_path: Path) -> None:
    outside = lora(tmp_path / "secret" / "Outside.safetensors")
    (shelf.root / "out.safetensors").symlink_to(outside)
    (shelf.root / "nowhere.safetensors").symlink_to(tmp_path / "missing")
    (shelf.root / "loop.safetensors").symlink_to(shelf.root / "loop.safetensors")
    (shelf.root / "in.safetensors").symlink_to(shelf.root / "Ink.safetensors")
    os.mkfifo(shelf.root / "pipe.safetensors")
    names = {entry.name for entry in shelf.entries()}
    assert "in" in names and not names & {"out", "nowhere", "loop", "pipe"}
    assert {path.name for path, _ in shelf.skipped} == {
        "out.safetensors", "nowhere.safetensors", "loop.safetensors", "pipe.safetensors"
    }  # fmt: skip


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no folder"):
        Shelf(tmp_path / "nothing")
