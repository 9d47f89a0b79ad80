"""All hostile files: the whole list of 72."""

from __future__ import annotations

from tests.hostile import gguf_cases, guest_cases, meaning_cases, pickle_cases, safetensors_cases
from tests.hostile.case import Case

CASES: tuple[Case, ...] = (
    *pickle_cases.CASES,
    *safetensors_cases.CASES,
    *gguf_cases.CASES,
    *guest_cases.CASES,
    *meaning_cases.CASES,
)
"""In the order of their numbers, as far as the files that they stand in are."""


def reader_of(case: Case) -> str:
    """The reader that opens it, see :mod:`tests.hostile.worker`."""
    return getattr(case, "reader", "open")
