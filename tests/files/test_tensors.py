"""Writing: readable by the library, the same bytes each time, complete or absent, in bounded memory. Hashes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.atomic import creating, replacing
from sumuk.files.hashes import hashes
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import Lazy, dtype_name, from_header, lazy, torch_dtype, write


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "z": torch.randn(3, 3),
        "a": torch.randn(5).half(),
        "b": torch.randn(2, 3).bfloat16().t(),
        "c": torch.arange(4),
        "d": torch.tensor(1.5, dtype=torch.float64),
        "e": torch.zeros(0),
        "f": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
        "g": torch.tensor([True, False, True]),
    }


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "w.safetensors", tensors, {"format": "pt", "note": "수묵"})
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert torch.equal(loaded[name].float(), value.float()), name
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "수묵"}


def test_every_tensor_is_aligned_and_order_does_not_matter(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "1.safetensors", tensors, {"b": "2", "a": "1"})
    write(tmp_path / "2.safetensors", dict(reversed(tensors.items())), {"a": "1", "b": "2"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    header = read_header(tmp_path / "1.safetensors")
    assert header.start % 8 == 0
    for name, info in header.tensors.items():
        assert info.begin % tensors[name].element_size() == 0, name


def test_loading_maps_and_never_writes_through(tmp_path: Path) -> None:
    write(tmp_path / "w.safetensors", {"w": torch.zeros(1000)})
    before = (tmp_path / "w.safetensors").read_bytes()
    one = from_header(read_header(tmp_path / "w.safetensors"))["w"]
    first, second = one.load(), one.load()
    assert first.data_ptr() == second.data_ptr()  # the same pages, not copies
    first += 1
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_a_file_can_be_replaced_by_a_change_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {"w": torch.arange(6.0), "n": torch.arange(3)})
    write(path, {name: one.cast(torch.bfloat16) for name, one in from_header(read_header(path)).items()})
    loaded = load_file(path)
    assert loaded["w"].dtype == torch.bfloat16 and loaded["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded["n"].dtype == torch.int64


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive = peak = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def load() -> torch.Tensor:
        nonlocal alive, peak
        alive += 1
        peak = max(peak, alive)
        return torch.ones(1000).as_subclass(Counted)

    write(tmp_path / "w.safetensors", {str(i): Lazy((1000,), "F32", load) for i in range(50)})
    assert len(load_file(tmp_path / "w.safetensors")) == 50
    assert peak <= 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {"w": torch.zeros(3)})
    before = path.read_bytes()

    def broken() -> torch.Tensor:
        raise RuntimeError("broken pipe of numbers")

    with pytest.raises(RuntimeError, match="numbers"):
        write(path, {"a": torch.zeros(9), "b": Lazy((3,), "F32", broken)})
    with pytest.raises(BadInput, match="announced"):
        write(path, {"b": Lazy((3,), "F32", lambda: torch.zeros(4))})
    with pytest.raises(BadInput, match="metadata"):
        write(path, {"a": torch.zeros(1)}, {"n": 3})
    assert path.read_bytes() == before
    assert [place.name for place in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot write"):
        write(tmp_path / "no" / "such" / "w.safetensors", {"w": torch.zeros(1)})


def test_new_files_obey_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write(tmp_path / "w.safetensors", {"w": torch.zeros(1)})
    finally:
        os.umask(old)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644


def write_for_ever(path: Path, values: list[dict[str, Lazy]]) -> None:
    """In a child process: one complete version after the other, until it is killed."""
    turn = 0
    while True:
        turn += 1
        write(path, values[turn % len(values)], {"value": str(turn % len(values))})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    def slowly(value: torch.Tensor) -> Lazy:
        def load() -> torch.Tensor:
            time.sleep(0.002)
            return value

        return Lazy((20000,), "F32", load)

    values = [{f"t{i}": slowly(torch.full((20000,), float(v))) for i in range(5)} for v in range(3)]
    path = tmp_path / "w.safetensors"
    write(path, values[0], {"value": "0"})
    caught_in_the_act = 0
    for moment in range(10):
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(path, values)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 10
        while not any(tmp_path.glob(".*partial")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.0023 * moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partial = list(tmp_path.glob(".*partial"))
        caught_in_the_act += len(partial)
        for left in partial:
            left.unlink()
        header = read_header(path)
        expected = float(header.metadata["value"])
        for name, one in from_header(header).items():
            assert bool((one.load() == expected).all()), (moment, name)
    assert caught_in_the_act > 0  # else the moments were no test


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), creating(tmp_path / "model") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with creating(tmp_path / "model") as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "model" / "whole").exists()
    with pytest.raises(BadInput, match="not an empty folder"), creating(tmp_path / "model"):
        pass
    with replacing(tmp_path / "model" / "whole") as file:
        file.write(b"y")
    assert (tmp_path / "model" / "whole").read_text() == "y"


def test_hashes_are_those_of_the_field(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {"w": torch.arange(700_000.0)}, {"note": "first"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    seen: list[tuple[int, int]] = []
    found = hashes(path, lambda done, total: seen.append((done, total)))
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.autov2 == found.sha256[:10]
    assert found.autov3 == hashlib.sha256(content[start:]).hexdigest()[:12]
    assert seen[-1] == (len(content), len(content)) and len(seen) == 3
    write(path, {"w": torch.arange(700_000.0)}, {"note": "another, longer text"})
    again = hashes(path)
    assert again.autov3 == found.autov3 and again.sha256 != found.sha256


def test_dtypes_by_their_usual_names() -> None:
    assert torch_dtype("bf16") == torch_dtype("BFloat16") == torch_dtype(torch.bfloat16) == torch.bfloat16
    assert dtype_name(torch.float8_e5m2) == "F8_E5M2"
    with pytest.raises(BadInput, match="int4"):
        torch_dtype("int4")
    with pytest.raises(BadInput, match="complex128"):
        dtype_name(torch.complex128)
    assert lazy(torch.arange(3)).cast(torch.float16).dtype == "I64"


def test_metadata_of_a_written_file_is_valid_json(tmp_path: Path) -> None:
    write(tmp_path / "w.safetensors", {"w": torch.zeros(1)}, {"quote": 'a "b"\n'})
    content = (tmp_path / "w.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"quote": 'a "b"\n'}


def test_a_large_file_is_written_past_the_cache_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {"a": torch.randn(3000, 1000), "b": torch.ones(7, dtype=torch.bool), "c": torch.randn(0)}
    write(
        tmp_path / "small.safetensors",
        some,
        {"x": "0" * 66, "y": "later"},
        digest="x",
        settle=lambda: {"y": "late"},
    )
    monkeypatch.setattr("sumuk.files.tensors.HUGE", 0)
    write(
        tmp_path / "large.safetensors",
        some,
        {"x": "0" * 66, "y": "later"},
        digest="x",
        settle=lambda: {"y": "late"},
    )
    assert (tmp_path / "large.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
