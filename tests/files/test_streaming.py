"""Reading without a map: how far a file was read, and the memory that it is read into."""

from __future__ import annotations

from pathlib import Path

import torch

from sumuk.files.safetensors import read_header
from sumuk.files.streaming import Front, blank, unmapped
from sumuk.files.tensors import from_header, write


def test_the_front_is_where_the_first_gap_begins(tmp_path: Path) -> None:
    write(path := tmp_path / "x.safetensors", {name: torch.ones(10) for name in "abcd"})
    header, front = read_header(path), Front()
    tensors = unmapped(from_header(header), front)
    assert front.of(path) == 0
    for name, count in (("c", 0), ("a", 1), ("a", 1), ("d", 1), ("b", 4)):
        tensors[name].load()
        assert front.of(path) == header.start + 40 * count
    assert front.of(path) == path.stat().st_size


def test_tensors_to_be_filled_are_writable_and_of_any_shape() -> None:
    for shape in ((), (0, 3), (7,), (3, 1 << 20)):
        for dtype in (torch.float16, torch.float32, torch.bool, torch.float8_e4m3fn):
            made = blank(shape, dtype)
            assert (made.shape, made.dtype) == (shape, dtype)
            made.reshape(-1).view(torch.uint8).fill_(1)
