"""Files written while somebody watches, and sets of shards that are whole or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sumuk.base.errors import BadFile, BadInput, Cancelled
from sumuk.files.metered import Meter
from sumuk.files.safetensors import read_header
from sumuk.files.shards import index_of, read_shards, write_shards
from sumuk.files.tensors import Lazy, from_header, lazy, size, write

TENSORS = {
    f"block.{i}.weight": lazy(torch.arange(64, dtype=dtype).reshape(8, 8) + i)
    for i, dtype in enumerate([torch.float32, torch.float16, torch.int64, torch.bfloat16, torch.float32])
} | {"marker": lazy(torch.empty(0)), "scalar": lazy(torch.tensor(3.0))}


def broken() -> torch.Tensor:
    raise BadFile("cannot be read")


def held(index: Path) -> dict[str, torch.Tensor]:
    return {name: one.load() for header in read_shards(index) for name, one in from_header(header).items()}


def test_the_same_bytes_as_plain_writing(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", TENSORS, {"title": "여우", "format": "pt"})
    write(tmp_path / "b.safetensors", TENSORS, {"title": "여우", "format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_digest_is_that_of_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    texts = {"a": '"hash":"0x' + "0" * 64 + '"', "hash": "an older one"}
    write(path, TENSORS, texts, digest="hash")
    header = read_header(path)
    body = path.read_bytes()[header.start :]
    assert header.metadata == {"a": texts["a"], "hash": "0x" + hashlib.sha256(body).hexdigest()}
    theirs = load_file(path)
    assert all(torch.equal(theirs[name], one.load()) for name, one in TENSORS.items())


def test_progress_counts_every_byte_and_stops_the_work(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    meter = Meter(lambda done, total: told.append((done, total)), size(TENSORS))
    write(tmp_path / "a.safetensors", TENSORS, meter=meter)
    assert told[-1] == (size(TENSORS), size(TENSORS)) and told == sorted(told)

    def stop(done: int, total: int) -> None:
        raise Cancelled("enough")

    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(Cancelled):
        write(tmp_path / "a.safetensors", {"x": lazy(torch.ones(3))}, meter=Meter(stop, 12))
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [place.name for place in tmp_path.iterdir()] == ["a.safetensors"]


def test_large_tensors_are_told_in_pieces(tmp_path: Path) -> None:
    told: list[int] = []
    meter = Meter(lambda done, total: told.append(done), 5 << 23)
    write(tmp_path / "a.safetensors", {"x": lazy(torch.zeros(5 << 21))}, meter=meter)
    assert told == [1 << 24, 1 << 25, 5 << 23]


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    for tensors, texts in (
        ({"": lazy(torch.ones(1))}, {}),
        ({"__metadata__": lazy(torch.ones(1))}, {}),
        ({"x": Lazy((2,), "F32", lambda: torch.ones(3))}, {}),
        ({"x": lazy(torch.ones(1))}, {"steps": 3}),
    ):
        with pytest.raises(BadInput):
            write(tmp_path / "a.safetensors", tensors, texts)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_set_of_shards(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    files = write_shards(path, TENSORS, {"title": "x"}, 300)
    assert [file.name for file in files] == [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    table = json.loads(index_of(path).read_text())
    assert table["metadata"] == {"total_size": size(TENSORS)}
    assert set(table["weight_map"]) == set(TENSORS)
    again = held(index_of(path))
    assert all(torch.equal(again[name], one.load()) for name, one in TENSORS.items())
    assert read_header(files[0]).metadata == {"title": "x"}
    # One tensor is larger than a shard may be, and has one for itself.
    assert max(file.stat().st_size - read_header(file).start for file in files) == 512


def test_what_fits_is_one_file_with_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert write_shards(path, TENSORS, {}, 1 << 20, digest="hash") == (path,)
    assert "hash" in read_header(path).metadata and not index_of(path).exists()


def test_another_cut_takes_the_place_of_a_set(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shards(path, TENSORS, {}, 300)
    changed = TENSORS | {"scalar": lazy(torch.tensor(4.0))}
    write_shards(path, changed, {}, 1000)
    assert held(index_of(path))["scalar"] == 4.0
    assert len(list(tmp_path.iterdir())) == 1 + len(read_shards(index_of(path)))


def test_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shards(path, TENSORS, {}, 300)
    before = {place.name: place.read_bytes() for place in tmp_path.iterdir()}
    with pytest.raises(BadInput, match="same names"):
        write_shards(path, TENSORS | {"scalar": lazy(torch.tensor(4.0))}, {}, 300)
    assert {place.name: place.read_bytes() for place in tmp_path.iterdir()} == before
    write(tmp_path / "whole.safetensors", TENSORS)
    with pytest.raises(BadInput, match="instead of the shards"):
        write_shards(tmp_path / "whole.safetensors", TENSORS, {}, 300)
    with pytest.raises(BadInput, match="only letters"):
        write_shards(tmp_path / "여우.safetensors", TENSORS, {}, 300)


def test_a_failure_leaves_the_old_set_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shards(path, TENSORS, {}, 300)
    before = {place.name: place.read_bytes() for place in tmp_path.iterdir()}
    with pytest.raises(BadFile, match="cannot be read"):
        write_shards(path, TENSORS | {"zz": Lazy((1,), "F32", broken)}, {}, 1000)
    assert {place.name: place.read_bytes() for place in tmp_path.iterdir()} == before
