"""How the worker does: counted round by round, told about once a second."""

from __future__ import annotations

import time

import torch

from sumuk.serve.metrics import resident
from sumuk.serve.residents import Resident, Residents
from sumuk.serve.wire import Vitals

BETWEEN = 1.0
"""Seconds between two reports."""


class Gauge:
    """What is counted between two reports."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._last = time.monotonic()
        self._seconds, self._rounds, self._rows, self._room = 0.0, 0, 0, 0

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= BETWEEN

    def add(self, seconds: float, before: tuple[int, int], after: tuple[int, int]) -> None:
        self._seconds += seconds
        self._rounds += 1
        self._rows += after[0] - before[0]
        self._room += after[1] - before[1]

    def report(self, pictures: int, residents: Residents) -> Vitals:
        escalations: dict[str, int] = {}
        for each in [*residents.here.values()]:
            for rung, count in each.engine.escalations.items():
                escalations[rung] = escalations.get(rung, 0) + count
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        made = Vitals(
            pictures=pictures,
            rounds=self._rounds,
            round_seconds=self._seconds,
            rows=self._rows,
            row_room=self._room,
            resident=resident(),
            device_memory=torch.cuda.memory_allocated() if cuda else 0,
            models=tuple(dict.fromkeys(key[0] for key in [*residents.here])),
            escalations=escalations,
        )
        self._begin()
        return made


def counts(resident: Resident) -> tuple[int, int]:
    """Rows answered and rows that there was room for, since the engine was made."""
    return resident.engine.rows_answered, resident.engine.row_room
