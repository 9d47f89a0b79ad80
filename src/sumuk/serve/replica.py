"""What runs on the cluster: painters, each with a worker in its process, and a clerk who answers questions.

The front names these classes and never makes one, so that torch is imported where they live and not where it lives.
A painter is a replica of Ray Serve; one call of :meth:`Painter.draw` is one picture. The clerk holds no model, touches
no device and is never busy with a picture, so that orders are checked while all painters work, or while none is there.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from sumuk.base.errors import SumukError
from sumuk.serve.config import ServeConfig
from sumuk.serve.order import Order
from sumuk.serve.trouble import Trouble
from sumuk.serve.wire import Answer, Ask, Draw, Drawn, Loaded, Loading, Lost, OfJob, Stop, Told, Verb, Vitals

MARKS = 4
"""Models for which a painter is asked first: those that it drew with last."""
MOST_NEWS = 64
"""Loaded models and the like that wait for a call to be told in; the oldest is left out."""

Sheet = tuple[str, list[Told]]
"""Who says it (the replica), and what happened since its last one."""


class Clerk:
    """Answers questions about orders and files.

    Args:
        config: of the server.

    Raises:
        RuntimeError: what the server is to offer is not on this machine. (Of other errors Serve keeps less.)
    """

    def __init__(self, config: ServeConfig) -> None:
        from sumuk.serve import logs
        from sumuk.serve.worker import Worker

        logs.set_up(config)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        try:
            self._worker = Worker(config, self._send)
        except SumukError as error:
            raise RuntimeError(str(error)) from None

    async def ask(self, verb: Verb, about: Any = None) -> Answer:
        """A question and its answer; what is refused is told in it."""
        number = next(self._numbers)
        answer = self._answers[number] = self._loop.create_future()
        self._worker.hear(Ask(number, verb, about))
        try:
            return await answer
        finally:
            del self._answers[number]

    def _send(self, said: Any) -> None:
        """The worker says something, from a thread of its own."""
        self._loop.call_soon_threadsafe(self._hear, said)

    def _hear(self, said: Told | Answer) -> None:
        if isinstance(said, Answer):
            answer = self._answers.get(said.number)
            if answer is not None and not answer.done():
                answer.set_result(said)


class Painter(Clerk):
    """Draws pictures, one in a call, together with those of the other calls.

    Args:
        config: of the server.
        threads: of torch.

    Raises:
        RuntimeError: see :class:`Clerk`; or the usual model cannot be loaded.
    """

    def __init__(self, config: ServeConfig, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._name = serve.get_replica_context().replica_tag
        self._calls: dict[str, asyncio.Queue[Told]] = {}
        self._news: deque[Told] = deque(maxlen=MOST_NEWS)
        self._first: Trouble | None = None
        self._began = threading.Event()
        super().__init__(config)
        self._worker.begin()
        threading.Thread(target=self._worker.live, name="worker", daemon=True).start()
        # A replica that is still being made gets no calls, so that its loop has nothing else to do than to wait.
        self._began.wait()
        if self._first is not None:
            raise RuntimeError(self._first.detail)

    async def _welcome(self) -> None:
        if mark := serve.get_multiplexed_model_id():
            await self._mark(mark)

    @serve.multiplexed(max_num_models_per_replica=MARKS)  # type: ignore[untyped-decorator]
    async def _mark(self, mark: str) -> str:
        """Says to Serve that calls of this mark are welcome here. Models come and go by the worker's own rules."""
        return mark

    async def bring(self, model: str) -> tuple[Answer, Sheet]:
        """Load a model by its name; what is refused is told in the answer."""
        await self._welcome()
        answer = await self.ask("load", model)
        return answer, (self._name, self._gone())

    async def draw(self, name: str, order: Order, done: tuple[int, ...]) -> AsyncIterator[Sheet]:
        """Draw the one picture of an order that is not ``done``; who goes away stops it.

        Args:
            name: of this call, like no other's.
            order: see :class:`~sumuk.serve.order.Order`.
            done: all pictures but one.
        """
        told = self._calls[name] = asyncio.Queue()
        try:
            await self._welcome()
            self._worker.hear(Draw(name, order, done))
            over = False
            while not over:
                some = [*self._gone(), await told.get()]
                while not told.empty():
                    some.append(told.get_nowait())
                yield self._name, some
                over = any(isinstance(each, Drawn | Lost) for each in some)
        finally:
            del self._calls[name]
            self._worker.hear(Stop(name))  # of a picture that is finished nothing is left to stop

    def _gone(self) -> list[Told]:
        news = [*self._news]
        self._news.clear()
        return news

    def _send(self, said: Any) -> None:
        if isinstance(said, Trouble):
            self._first = said
        if isinstance(said, Trouble | Loaded):
            self._began.set()
        super()._send(said)

    def _hear(self, said: Told | Answer) -> None:
        if isinstance(said, OfJob):
            if said.job in self._calls:
                self._calls[said.job].put_nowait(said)
        elif isinstance(said, Vitals | Loading | Loaded):
            if self._calls:
                next(iter(self._calls.values())).put_nowait(said)
            else:
                self._news.append(said)
        else:
            super()._hear(said)
