"""What a server offers by name, and that it never says where it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sumuk.base.errors import BadInput, MissingFile
from sumuk.generate.api import MINIATURE
from sumuk.serve.config import ServeConfig
from sumuk.serve.offered import Offered, choices
from sumuk.weights.model import WeightFile

LORA = MINIATURE.with_name("porcelain.safetensors")


def shelf(folder: Path, **files: Path) -> Path:
    for name, source in files.items():
        target = folder / f"{name.replace('__', '/')}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return folder


def names(offered: Offered) -> list[tuple[str, str]]:
    return [(each.sort, each.name) for each in offered.entries()]


def test_the_miniature_and_its_lora_are_offered_where_nothing_else_is():
    offered = Offered(ServeConfig())
    assert names(offered) == [("model", "miniature"), ("lora", "porcelain")]
    entry = offered.entries()[0]
    assert entry.licence == "Apache-2.0" and entry.file == "miniature.safetensors" and entry.size > 10**7


def test_a_named_model_is_the_usual_one_and_brings_no_miniature(tmp_path: Path):
    shelf(tmp_path, own=MINIATURE, other=MINIATURE)
    offered = Offered(ServeConfig(model=tmp_path / "own.safetensors"))
    assert offered.usual == "own" and names(offered) == [("model", "own")]
    assert offered.find("own", "model") == tmp_path / "own.safetensors"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    shelf(tmp_path, a__ink=LORA, b__ink=LORA, c__tea=LORA)
    offered = Offered(ServeConfig(shelf=tmp_path))
    assert [n for sort, n in names(offered) if sort == "lora"] == ["a/ink", "b/ink", "porcelain", "tea"]
    assert offered.find("b/ink", "lora") == tmp_path / "b" / "ink.safetensors"
    with pytest.raises(MissingFile, match="ink"):
        offered.find("ink", "lora")


def test_what_comes_to_the_shelf_later_is_found(tmp_path: Path):
    offered = Offered(ServeConfig(shelf=tmp_path))
    with pytest.raises(MissingFile, match="'ink'"):
        offered.find("ink", "lora")
    shelf(tmp_path, ink=LORA)
    assert offered.find("ink", "lora").is_file()
    assert offered.named("INK", "lora") == "ink"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "ink\0", "..", "", "C:\\x", "~/x"])
def test_a_name_is_never_a_path(tmp_path: Path, name: str):
    offered = Offered(ServeConfig(shelf=shelf(tmp_path / "shelf", ink=LORA)))
    (tmp_path / "secret.safetensors").write_bytes(LORA.read_bytes())
    for sort in ("model", "lora", "vae"):
        with pytest.raises(MissingFile):
            offered.find(name, sort)
        with pytest.raises(MissingFile):
            offered.find("../secret", sort)


def test_nothing_says_where_things_lie(tmp_path: Path):
    offered = Offered(ServeConfig(shelf=shelf(tmp_path / "shelf", a__ink=LORA, own=MINIATURE)))
    for name in ("miniature", "ink", "own"):
        told = json.dumps(offered.describe(name), default=str)
        assert str(tmp_path) not in told and str(MINIATURE.parent) not in told
    assert offered.describe("own")["path"] == "own.safetensors"
    assert offered.describe("ink")["path"] == "a/ink.safetensors"


def test_what_does_not_draw_is_no_model(tmp_path: Path):
    offered = Offered(ServeConfig(shelf=shelf(tmp_path, ink=LORA)))
    assert offered.usual_settings("miniature").size == 64
    with pytest.raises(MissingFile):
        offered.usual_settings("ink")
    with pytest.raises(BadInput, match="LoRA"):
        Offered(ServeConfig(model=tmp_path / "ink.safetensors")).usual_settings("ink")


def test_every_choice_has_a_name_and_its_aliases():
    some = choices()
    euler = next(each for each in some["solvers"] if each["name"] == "euler-ancestral")
    assert "euler-a" in euler["aliases"] and "eta" in euler["settings"]
    assert {"karras", "leading", "trailing"} <= {each["name"] for each in some["grids"]}


def test_a_shelf_is_looked_through_once_for_many_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offered = Offered(ServeConfig(shelf=shelf(tmp_path, ink=LORA)))
    looks = 0
    entries = offered._shelf.entries

    def counted():
        nonlocal looks
        looks += 1
        return entries()

    monkeypatch.setattr(offered._shelf, "entries", counted)
    for _ in range(20):
        offered.entries()
        offered.find("ink", "lora")
    assert looks == 1


def test_a_hash_is_told_as_soon_as_anybody_has_read_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    offered = Offered(ServeConfig(model=shelf(tmp_path / "shelf", own=MINIATURE) / "own.safetensors"))
    assert offered.entries()[0].sha256 is None, "to list files reads none of them whole"
    known = WeightFile(offered.find("own", "model")).sha256  # as a receipt does
    assert offered.entries(fresh=0.0)[0].sha256 == known
