"""Mutated files by the hundred thousand: read, or refused by one of our errors; none takes 2 s, none kills a process.

``python -m tests.hostile.fuzz FORMAT`` runs the same, tells its figures and goes on where it was stopped.
"""

from __future__ import annotations

import pytest
from tests.hostile.fuzz import PART, run

SECONDS = 2.0
MEMORY = 64 * 2**10
"""KiB that a part of 10,000 may grow by; the most was 9,000."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count", "codes"),
    [("safetensors", 100_000, 20), ("gguf", 100_000, 20), ("pickle", 100_000, 12), ("adapters", 20_000, 20)],
)
def test_mutations_are_read_or_refused(kind: str, count: int, codes: int) -> None:
    found = run(kind, count)
    print(f"{kind}: {found}")
    assert found.files == count
    assert found.worst < SECONDS and found.kib < MEMORY
    assert found.read > count / 100, "mutations that are all refused at once reach nothing"
    assert len(found.codes) >= codes, found.codes


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "pickle", "adapters"])
def test_some_of_them_always(kind: str) -> None:
    found = run(kind, 600, part=PART)
    assert found.files == 600 and found.worst < SECONDS and found.codes and found.read
