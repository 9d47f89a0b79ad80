"""Bytes done of several passes over several files, told as one sum."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Meter:
    """Bytes done of several passes over several files, told as one sum.

    Args:
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.
        total: bytes in all.
    """

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        self._one_at_a_time = threading.Lock()

    def add(self, count: int) -> None:
        """So many more are done, in whatever thread; headers, which nobody foresaw, do not lead beyond the end."""
        with self._one_at_a_time:
            self.done = min(self.done + count, self.total)
            if self.progress is not None:
                self.progress(self.done, self.total)

    def reading(self) -> Callable[[int, int], None]:
        """A callback for one file, which is told its bytes from the first on."""
        before = 0

        def told(done: int, _: int) -> None:
            nonlocal before
            self.add(done - before)
            before = done

        return told
