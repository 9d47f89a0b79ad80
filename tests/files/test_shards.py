"""Shard indices: honest ones are followed, those that point elsewhere or disagree with their shards are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.shards import read_json, read_shards
from sumuk.files.tensors import write

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def folder(tmp_path: Path, where: object) -> Path:
    write(tmp_path / FIRST, {"a": torch.zeros(1), "b": torch.ones(2)})
    write(tmp_path / SECOND, {"c": torch.ones(3)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": where}))
    return index


def test_an_honest_index(tmp_path: Path) -> None:
    headers = read_shards(folder(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND}))
    assert [sorted(header.tensors) for header in headers] == [["a", "b"], ["c"]]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
                                  "https://x.org/x.safetensors", "x.ckpt", "", 7, ".safetensors"])  # fmt: skip
def test_a_shard_is_a_plain_name(tmp_path: Path, name: object) -> None:
    with pytest.raises(BadFile) as caught:
        read_shards(folder(tmp_path, {"a": name}))
    assert caught.value.code == "shards.name"


def test_an_index_that_disagrees(tmp_path: Path) -> None:
    honest = {"a": FIRST, "b": FIRST, "c": SECOND}
    cases = {
        "shards.disagree": [{**honest, "b": SECOND}, {"a": FIRST, "c": SECOND}],
        "shards.lost": [{**honest, "d": FIRST}],
        "shards.map": [{}, [], None],
    }
    for code, maps in cases.items():
        for where in maps:
            with pytest.raises(BadFile) as caught:
                read_shards(folder(tmp_path, where))
            assert caught.value.code == code, where
    with pytest.raises(MissingFile, match="00003"):
        read_shards(folder(tmp_path, {**honest, "d": "model-00003-of-00003.safetensors"}))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    index = folder(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    write(tmp_path / SECOND, {"c": torch.ones(3), "a": torch.ones(1)})
    with pytest.raises(BadFile, match=r"'a' lies in"):
        read_shards(index)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\xff"])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadFile):
        read_json(path)
