"""All hostile files: the whole list of 72."""

from __future__ import annotations

from pathlib import Path

from tests.hostile import gguf_cases, guest_cases, meaning_cases, pickle_cases, safetensors_cases
from tests.hostile.case import Case
from tests.hostile.pickle_files import file, tensor


def _beside_zero(folder: Path) -> Path:
    path = folder / "hostile.ckpt"
    path.write_bytes(file({"w": tensor((0, 2**61, 2**61), (1, 1, 1))}))
    return path


FOUND = (Case(16, "sizes that wrap beside 0", "ckpt.tensor", _beside_zero),)
"""What fuzzing one format showed of another."""
CASES: tuple[Case, ...] = (
    *pickle_cases.CASES,
    *FOUND,
    *safetensors_cases.CASES,
    *gguf_cases.CASES,
    *guest_cases.CASES,
    *meaning_cases.CASES,
)
"""In the order of their numbers, as far as the files that they stand in are."""


def reader_of(case: Case) -> str:
    """The reader that opens it, see :mod:`tests.hostile.worker`."""
    return getattr(case, "reader", "open")
