"""A worker process on this machine, kept alive: the usual :class:`~sumuk.serve.backend.Backend`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from sumuk.serve.config import ServeConfig
from sumuk.serve.order import Order
from sumuk.serve.trouble import Refused, Trouble, refused
from sumuk.serve.wire import Answer, Ask, Checked, Died, Draw, Entry, Loaded, Stop, Told, Verb

log = logging.getLogger("sumuk.serve")

TOGETHER = {"exact": 2, "fast": 16}
"""Pictures drawn at once, by the engine's mode."""
MOST_DEATHS, WITHIN = 5, 60.0
"""A worker that dies so often in so many seconds is not started again."""
PATIENCE = 600.0
"""Seconds in which a question is answered; loading a large model from a slow disk takes minutes."""

Target = Callable[[ServeConfig, Connection], None]


def slots(config: ServeConfig) -> int:
    """How many pictures are drawn at once."""
    mode = config.mode or ("exact" if config.device.startswith("cpu") else "fast")
    return config.together or TOGETHER[mode]


def work(config: ServeConfig, connection: Connection) -> None:
    """What the worker process runs; torch is imported there and not here."""
    from sumuk.serve import worker

    worker.work(config, connection)


class LocalWorker:
    """A worker process, replaced when it dies.

    Args:
        config: of the server.
        target: what the process runs; another one to plant faults in tests.
    """

    def __init__(self, config: ServeConfig, target: Target = work) -> None:
        self.slots = slots(config)
        self.ready = False
        self._up = False
        self._config, self._target = config, target
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self._stopping = False
        self._process: Any = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def start(self, tell: Callable[[Told], None]) -> None:
        """See :class:`~sumuk.serve.backend.Backend`.

        Raises:
            Refused: the model or the shelf is not there.
        """
        self._tell, self._loop = tell, asyncio.get_running_loop()
        self._begin()
        try:
            await self._first
        except BaseException:
            await self.stop()
            raise

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def _begin(self) -> None:
        """A new process, with a thread for each direction."""
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=self._target, args=(self._config, there), daemon=True)
        self._process.start()
        there.close()
        self._outbox = queue.SimpleQueue()
        self._first: asyncio.Future[None] = self._loop.create_future()
        for each in (self._listen, self._speak):
            threading.Thread(target=each, args=(here, self._outbox), daemon=True).start()

    def _speak(self, connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        while (said := outbox.get()) is not None:
            try:
                connection.send(said)
            except OSError:
                return  # it died; whoever listens will notice

    def _listen(self, connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        process = self._process
        try:
            while True:
                self._call(self._hear, connection.recv())
        except (EOFError, OSError):
            pass
        outbox.put(None)
        process.join()
        connection.close()
        self._call(self._ended, process.exitcode)

    def _call(self, function: Callable[..., None], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(function, *values)

    def _hear(self, said: Told | Answer | Trouble | None) -> None:
        if said is None:
            self._up = True
            self._first.set_result(None)
        elif isinstance(said, Trouble) and not self._first.done():
            self._first.set_exception(Refused(said))
        elif isinstance(said, Trouble):
            self._tell(Died(said.detail, again=False))
        elif isinstance(said, Answer):
            waiting = self._answers.pop(said.number, None)
            if waiting is not None and not waiting.done():
                if said.trouble is None:
                    waiting.set_result(said.value)
                else:
                    waiting.set_exception(Refused(said.trouble))
        else:
            self.ready = self.ready or isinstance(said, Loaded)
            self._tell(said)

    def _ended(self, code: int | None) -> None:
        self.ready = self._up = False
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(refused("worker-lost", "what draws was lost; try again", retry_after=5))
        self._answers.clear()
        if not self._first.done():
            self._first.set_exception(
                refused(
                    "worker-lost", f"the worker ended with code {code} before it was ready; its log says why"
                )
            )
        if self._stopping:
            return
        now = time.monotonic()
        self._deaths.append(now)
        often = len(self._deaths) == MOST_DEATHS and now - self._deaths[0] < WITHIN
        why = f"the worker process ended with code {code}"
        log.error("%s%s", why, f", {MOST_DEATHS} times in {WITHIN:g} s: it is given up" if often else "")
        if not often:
            self._begin()
            self._first.add_done_callback(lambda first: first.exception())  # told by the next death
        self._tell(Died(why, again=not often, killed=code == -signal.SIGKILL))

    async def _ask(self, verb: Verb, about: Any = None) -> Any:
        if not self._up:
            raise refused("unready", "what draws is being started; try again", retry_after=2)
        number = next(self._numbers)
        self._answers[number] = self._loop.create_future()
        self._outbox.put(Ask(number, verb, about))
        try:
            return await asyncio.wait_for(self._answers[number], PATIENCE)
        except TimeoutError:
            raise refused("unready", f"no answer to {verb!r} in {PATIENCE:g} s", retry_after=30) from None
        finally:
            self._answers.pop(number, None)

    async def check(self, order: Order) -> Checked:
        """See :class:`~sumuk.serve.backend.Backend`, here and below."""
        return await self._ask("check", order)

    async def catalogue(self) -> list[Entry]:
        return await self._ask("catalogue")

    async def describe(self, name: str) -> dict[str, Any]:
        return await self._ask("describe", name)

    async def choices(self) -> dict[str, list[dict[str, Any]]]:
        return await self._ask("choices")

    async def load(self, name: str) -> None:
        await self._ask("load", name)

    def draw(self, job: str, order: Order, done: tuple[int, ...] = ()) -> None:
        self._outbox.put(Draw(job, order, done))

    def cancel(self, job: str) -> None:
        self._outbox.put(Stop(job))

    async def stop(self) -> None:
        self._stopping, self.ready, self._up = True, False, False
        self._outbox.put(None)
        if self._process is not None:
            self._process.kill()  # it keeps nothing that the front does not have
            await asyncio.to_thread(self._process.join)
