"""One who watches a job: what happened and was not taken yet, never more than a little of it."""

from __future__ import annotations

import asyncio
from collections import deque

from sumuk.serve.order import Job
from sumuk.serve.wire import Drawn, Lost, Shown, Stepped

Seen = Stepped | Shown | Drawn | Lost | Job

MOST: dict[type, int] = {Stepped: 64, Shown: 4}
"""How many of a kind wait for a slow watcher; the oldest is left out. All others, a few to a picture, are kept."""


class Watcher:
    """A queue of one reader."""

    def __init__(self) -> None:
        self._waiting: deque[Seen | Exception] = deque()
        self._some = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, seen: Seen | Exception) -> None:
        """Something happened; an error ends the watching."""
        kind = type(seen)
        if kind in MOST and sum(type(each) is kind for each in self._waiting) >= MOST[kind]:
            self._waiting.remove(next(each for each in self._waiting if type(each) is kind))
        self._waiting.append(seen)
        self._some.set()

    async def next(self) -> Seen:
        """What comes next.

        Raises:
            Exception: the one that was put.
        """
        while not self._waiting:
            self._some.clear()
            await self._some.wait()
        seen = self._waiting.popleft()
        if isinstance(seen, Exception):
            raise seen
        return seen
