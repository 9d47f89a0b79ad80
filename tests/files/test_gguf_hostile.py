"""Hostile GGUF files are refused by name, at once, in little memory, and the next good one is read."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from tests.hostile.case import Case
from tests.hostile.fuzz_gguf import check, mutations
from tests.hostile.gguf_cases import CASES, GOOD, ONE, TEXT, array, gguf, tensor

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.gguf import read_gguf


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number} {case.name}")
def test_hostile_file_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    path = case.make(tmp_path)
    tracemalloc.start()
    began = time.process_time()
    if case.warns is None:
        with pytest.raises(BadFile) as caught:
            read_gguf(path)
        assert caught.value.code == case.code
        message = str(caught.value)
        assert "hostile.gguf" in message and "\n" not in message and len(message) < 400
    else:
        for one in read_gguf(path).tensors.values():
            assert tuple(one.load().shape) == one.shape
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1.0 and peak < 64 * 2**20
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    path.write_bytes(GOOD)
    assert read_gguf(path).tensors["w"].load().tolist() == [0.0] * 8


def test_the_list_is_whole() -> None:
    assert {case.number for case in CASES} == set(range(55, 68))
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("cut", range(64))
def test_cut_at_each_sixty_fourth(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(GOOD[: len(GOOD) * cut // 64])
    with pytest.raises(BadFile) as caught:
        read_gguf(path)
    assert caught.value.code in ("gguf.truncated", "gguf.length", "gguf.count")


def test_the_largest_that_is_allowed_is_quick(tmp_path: Path) -> None:
    """A million words; 20,000 tensors; measured 0.18 s and 0.16 s of a processor."""
    for name, content in (
        ("words", gguf([array("t", TEXT, 10**6, (struct.pack("<Q", 4) + b"word") * 10**6)])),
        ("tensors", gguf([], [tensor(f"blocks.{i}.weight", [0]) for i in range(20_000)])),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        began = time.process_time()
        read_gguf(path)
        assert time.process_time() - began < 1.0, name


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        read_gguf(tmp_path / "nothing.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    for place in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(BadFile) as caught:
            read_gguf(place)
        assert caught.value.code == "file.kind"


def test_a_file_that_is_replaced_before_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    path.write_bytes(GOOD)
    before = read_gguf(path).tensors["w"]
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf([], [ONE], b"\1" * 32))
    other.replace(path)
    with pytest.raises(BadFile) as caught:
        before.load()
    assert caught.value.code == "gguf.changed"
    path.unlink()
    with pytest.raises(BadFile) as caught:
        before.load()
    assert caught.value.code == "gguf.read"


def test_the_file_is_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    path.write_bytes(GOOD)
    mapped = read_gguf(path).tensors["w"].load()
    mapped.fill_(1.0)
    assert path.read_bytes() == GOOD and torch.equal(mapped, torch.ones(8))


def test_mutations_are_refused_or_read(tmp_path: Path) -> None:
    for content in mutations(seed=7, count=1000):
        check(content, tmp_path)


def test_mutations_are_the_same_for_a_seed_and_reach_both_ends(tmp_path: Path) -> None:
    made = list(mutations(3, 200))
    assert made == list(mutations(3, 200)) and len(set(made)) > 150
    codes: dict[str, int] = {}
    for content in made:
        (tmp_path / "one.gguf").write_bytes(content)
        try:
            read_gguf(tmp_path / "one.gguf")
            code = "read"
        except BadFile as error:
            code = error.code
        codes[code] = codes.get(code, 0) + 1
    assert codes["read"] > 10 and len(codes) > 12, codes
