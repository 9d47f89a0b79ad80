"""Headers: good ones are read as the library reads them, hostile ones are refused by name, fast, in little memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.hostile.safetensors_cases import BROKEN, entry, one, raw

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.safetensors import MAX_HEADER, MAX_TENSORS, read_header
from sumuk.files.tensors import from_header

IN_NUMBERS = ("4-bit elements, which nothing computes with",)
"""What the header does not show."""


@pytest.mark.parametrize(
    ("name", "code", "made"),
    [each[1:] for each in BROKEN if each[2] != "bool" and each[1] not in IN_NUMBERS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_header_is_refused_by_name(
    name: str, code: str, made: bytes | Callable[[], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(made() if callable(made) else made)
    began = time.process_time()
    with pytest.raises(BadFile) as caught:
        read_header(path)
    assert time.process_time() - began < 1.0
    assert caught.value.code.startswith(f"safetensors.{code}"), caught.value.code
    assert "hostile.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_good_header_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt", "note": "여우"})
    header = read_header(tmp_path / "good.safetensors")
    assert header.metadata == {"format": "pt", "note": "여우"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    lazies = from_header(header)
    for name, value in tensors.items():
        assert torch.equal(lazies[name].load(), value), name


def test_a_bool_that_is_neither_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bool.safetensors"
    path.write_bytes(one(dtype="BOOL", shape=(2,), end=2, data=b"\x01\x07"))
    with pytest.raises(BadFile, match="BOOL"):
        from_header(read_header(path))["w"].load()


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="absent"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(BadFile, match="folder"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(BadFile, match="regular"):  # and does not wait for someone to write into it
        read_header(tmp_path / "pipe.safetensors")


def test_a_file_replaced_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    lazies = from_header(read_header(path))
    save_file({"w": torch.zeros(4), "x": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(BadFile, match="replaced") as caught:
        lazies["w"].load()
    assert caught.value.code == "file.changed"


def test_a_file_written_over_between_two_loads_is_noticed(tmp_path: Path) -> None:
    """In place, so that the pages under the reader change; shortened, they would be gone and kill the process."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(40_000), "b": torch.zeros(40_000)}, path)
    lazies = from_header(read_header(path))
    lazies["a"].load()
    os.truncate(path, 100)
    with pytest.raises(BadFile) as caught:
        lazies["b"].load()
    assert caught.value.code == "file.changed"


def test_a_file_that_is_replaced_while_it_is_read_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    lazies = from_header(read_header(path))
    lazies["a"].load()
    save_file({"b": torch.zeros(9)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    assert torch.equal(lazies["b"].load(), torch.ones(4))
    path.unlink()
    assert torch.equal(lazies["b"].load(), torch.ones(4))


def test_twenty_four_gigabytes_are_opened_at_once(tmp_path: Path) -> None:
    """Only the header is read: a sparse file of a large model's size opens in a fraction of a second."""
    count, size = 1000, 24_000_000
    table = {
        f"block.{i}.weight": entry(shape=(size // 2,), begin=i * size, end=(i + 1) * size, dtype="F16")
        for i in range(count)
    }
    path = tmp_path / "large.safetensors"
    header = json.dumps(table).encode()
    path.write_bytes(raw(header))
    os.truncate(path, 8 + len(header) + count * size)
    began = time.perf_counter()
    assert len(read_header(path).tensors) == count
    assert time.perf_counter() - began < 0.5


def test_the_limit_is_far_above_real_files() -> None:
    assert MAX_TENSORS >= 50_000 and MAX_HEADER >= 16 * 2**20
