"""The one thread that writes to the database. What is asked of it at the same time goes to the disk together.

A commit waits for the disk, so that many small ones one after the other would be slow; those that wait while one is
written share the next.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from sumuk.serve.trouble import refused

log = logging.getLogger("sumuk.serve")

T = TypeVar("T")
Asked = tuple[Callable[[], Any], Future[Any]]


class Writer:
    """A thread with a connection.

    Attributes:
        db: for what runs in the thread.
    """

    def __init__(self) -> None:
        self.db: sqlite3.Connection
        self._thread = ThreadPoolExecutor(1, "sumuk-store")
        self._asked: deque[Asked] = deque()

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread, by itself and without a transaction."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def do(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread: all that it writes is on the disk when this returns, or nothing of it.

        It may run twice, if what it shared a commit with failed.

        Raises:
            Refused: the disk is full or fails.
        """
        future: Future[T] = Future()
        self._asked.append((work, future))
        self._thread.submit(self._write)
        return await asyncio.wrap_future(future)

    def end(self) -> None:
        """Let the thread go, which has nothing more to do."""
        self._thread.shutdown()

    def _write(self) -> None:
        """Everything that waits by now; of several calls the first does it all."""
        waiting: list[Asked] = []
        while self._asked:
            work, future = self._asked.popleft()
            if future.set_running_or_notify_cancel():
                waiting.append((work, future))
        if len(waiting) > 1:
            with suppress(Exception):  # one of them is to blame; each for itself shows which
                values = self._transact(lambda: [work() for work, _ in waiting])
                for (_, future), value in zip(waiting, values, strict=True):
                    future.set_result(value)
                return
        for work, future in waiting:
            try:
                future.set_result(self._transact(work))
            except sqlite3.Error as error:
                log.exception("the server's state cannot be written")
                why = f"the server's state cannot be written ({error}); try again later"
                future.set_exception(refused("unready", why, retry_after=30))
            except BaseException as error:
                future.set_exception(error)

    def _transact(self, work: Callable[[], T]) -> T:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            value = work()
            self.db.execute("COMMIT")
            return value
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk may have rolled it back already
                self.db.execute("ROLLBACK")
            raise
