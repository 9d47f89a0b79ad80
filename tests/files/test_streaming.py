"""Reading without a map: each tensor in memory of its own, the file hashed on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from sumuk.files.direct import Source, Sum
from sumuk.files.safetensors import read_header
from sumuk.files.streaming import ahead, unmapped, written
from sumuk.files.tensors import from_header, write

DTYPES = (torch.float16, torch.float32, torch.bool, torch.float8_e4m3fn, torch.float64, torch.int64)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_tensors_are_what_the_library_maps(tmp_path: Path, shift: int) -> None:
    torch.manual_seed(0)
    shapes = ((), (0, 3), (7,), (3, 1 << 12))
    some = {
        f"{dtype}-{len(shape)}": (torch.randn(shape) > 0).to(dtype) for dtype in DTYPES for shape in shapes
    }
    write(path := tmp_path / "x.safetensors", some)
    if shift:  # a header of odd length, as other programs write them
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        path.write_bytes(
            (length + shift).to_bytes(8, "little") + data[8 : 8 + length] + b" " * shift + data[8 + length :]
        )
    mapped, own = from_header(read_header(path)), unmapped(from_header(read_header(path)))
    for name, one in own.items():
        made, theirs = one.load(), mapped[name].load()
        assert (made.shape, made.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(made.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
        made.reshape(-1).view(torch.uint8).fill_(1)  # its own


def test_a_file_is_hashed_while_its_tensors_are_loaded(tmp_path: Path) -> None:
    write(path := tmp_path / "x.safetensors", {name: torch.randn(10) for name in "abcd"})
    told: list[int] = []
    sums = {path: Sum(Source(path), told.append)}
    tensors = unmapped(from_header(read_header(path)), sums)
    for name in ("c", "a", "a", "d"):
        tensors[name].load()
    assert sums[path].hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(told) == path.stat().st_size


def test_working_ahead_leaves_torch_its_threads(tmp_path: Path) -> None:
    write(path := tmp_path / "x.safetensors", {name: torch.randn(10) for name in "abcd"})
    tensors = unmapped(from_header(read_header(path)))
    threads = torch.get_num_threads()
    with ahead(tensors, written(tensors), lambda name: 40) as ready:
        made = {name: ready[name].load() for name in written(tensors)}
    assert torch.get_num_threads() == threads
    assert all(torch.equal(made[name], tensors[name].load()) for name in tensors)
