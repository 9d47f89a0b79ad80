"""Hostile PyTorch files are refused by name, at once, in little memory, and the next good one is read."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from tests.hostile.case import Case
from tests.hostile.fuzz_pickle import check, mutations
from tests.hostile.pickle_cases import CASES, GOOD, GOOD_LEGACY

from sumuk.base.errors import BadFile
from sumuk.files.ckpt import read_ckpt, read_with
from sumuk.files.ckpt_process import in_process
from sumuk.files.safetensors import read_header

WHOLE = [case for case in CASES if case.number != 33]
CUT = [case for case in CASES if case.number == 33]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case.number} {case.name}")
def test_hostile_file_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    path = case.make(tmp_path)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(BadFile) as caught:
        read_header(path) if path.suffix == ".safetensors" else read_ckpt(path)
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert caught.value.code == case.code, message
    assert path.name in message and message.isprintable() and len(message) < 500
    assert seconds < 1.0 and peak < 64 * 2**20
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("good", [GOOD, GOOD_LEGACY])
def test_the_next_good_one_is_read(good: bytes, tmp_path: Path) -> None:
    path = WHOLE[0].make(tmp_path)
    with pytest.raises(BadFile):
        read_ckpt(path)
    path.write_bytes(good)
    (tensor,) = read_ckpt(path).tensors.values()
    assert tensor.load().tolist() == [0.0] * 4


def test_cut_at_each_sixty_fourth(tmp_path: Path) -> None:
    for case in CUT:
        with pytest.raises(BadFile) as caught:
            read_with(case.make(tmp_path), in_process)
        assert caught.value.code in ("ckpt.cut", "ckpt.kind"), f"{case.name}: {caught.value}"


def test_the_list_is_whole() -> None:
    assert {case.number for case in CASES} == set(range(1, 35)) and len(WHOLE) > 180
    assert not [name for name, times in Counter(case.name for case in CASES).items() if times > 1]


def test_mutations_are_refused_or_read(tmp_path: Path) -> None:
    for content in mutations(seed=7, count=2000):
        check(content, tmp_path)


def test_mutations_are_the_same_for_a_seed_and_reach_both_ends(tmp_path: Path) -> None:
    made = list(mutations(3, 400))
    assert made == list(mutations(3, 400)) and len(set(made)) > 350
    codes: Counter[str] = Counter()
    for content in made:
        (tmp_path / "one.ckpt").write_bytes(content)
        try:
            read_with(tmp_path / "one.ckpt", in_process)
            codes["read"] += 1
        except BadFile as error:
            codes[error.code] += 1
    assert codes["read"] > 15 and len(codes) > 11, codes
