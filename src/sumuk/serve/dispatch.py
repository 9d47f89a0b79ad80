"""Between the line and what draws: jobs are given out while there is room, and what comes back is kept.

What happens to one job is dealt with in the order in which it happened, by one task of its own
(:meth:`Dispatch._follow`). Every change of a job's state is on the disk before anybody is told of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sumuk.serve.backend import Backend
from sumuk.serve.line import Line
from sumuk.serve.live import Ending, Live
from sumuk.serve.metrics import Metrics
from sumuk.serve.order import Job, State
from sumuk.serve.recovery import MOST_KILLS
from sumuk.serve.store import Store
from sumuk.serve.trouble import Refused, Trouble, refused, trouble_of
from sumuk.serve.wire import Died, Drawn, Loaded, Loading, Lost, Shown, Stepped, Told, Vitals

log = logging.getLogger("sumuk.serve")

BETWEEN_LOOKS = 0.25
"""Seconds between two looks at deadlines."""
MOST_DEATHS = 2
"""Workers that may be lost over one job; then it is given up. Of those that were killed from outside, which is rarely a
job's fault, as many as servers (:data:`~sumuk.serve.recovery.MOST_KILLS`)."""

STOPS = "the server stops; the job is kept and goes on when the server is back"

Inspect = Callable[[bytes], Awaitable[None]]
Seal = Callable[[bytes], Awaitable[bytes]]


class Dispatch:
    """The jobs that are not over, and what draws them.

    Args:
        backend: what draws.
        store, line, metrics: of the server.
        inspect: looks at a finished picture, and raises Refused if it is withheld.
        seal: makes the file that is kept from the one that was drawn.

    Attributes:
        live: all jobs that are not over, and those whose last pictures are being stopped.
        draining: nothing is begun any more.
        broken: why nothing can be drawn, for good; empty: it can.
        vitals: what the worker said of itself last.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        line: Line,
        metrics: Metrics,
        inspect: Inspect | None,
        seal: Seal | None,
    ) -> None:
        self.live: dict[str, Live] = {}
        self.draining = False
        self.broken = ""
        self.vitals = Vitals()
        self._backend, self._store, self._line, self._metrics = backend, store, line, metrics
        self._inspect, self._seal = inspect, seal
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_since = 0.0
        metrics.queue_jobs.set_function(lambda: len(line))
        metrics.queue_cost.set_function(lambda: line.waiting_cost)
        metrics.running_pictures.set_function(lambda: self.at_work)

    @property
    def at_work(self) -> int:
        """Pictures that take a slot."""
        return sum(len(live.at_work) for live in self.live.values())

    # Giving out.

    def add(self, job: Job, seconds: float, deaths: int = 0) -> Live:
        """A job that is in the line and on the disk is served from now on, for so many seconds."""
        live = self.live[job.id] = Live(job, seconds, deaths)
        self._line.open(job.id)
        self.pump()
        return live

    def pump(self) -> None:
        """Begin whatever there is room for."""
        while not self.draining and self._backend.ready and (first := self._line.first()) is not None:
            live = self.live[first]
            if not self._has_room_for(live):
                return
            self._line.take()
            if not self.at_work:
                self._busy_since = time.monotonic()
            live.at_work = set(range(live.job.count)) - set(live.done)
            self._spawn(self._follow(live))

    def _has_room_for(self, live: Live) -> bool:
        """Nobody overtakes the first in the line, so that a large job comes to its turn.

        A job over which a worker was lost is alone the second time, so that no neighbour pays for it.
        """
        at_work = self.at_work
        suspect = live.deaths or any(each.deaths and each.at_work for each in self.live.values())
        pictures = live.job.count - len(live.job.results)
        return not at_work or (not suspect and at_work + pictures <= self._backend.slots)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What is told.

    def tell(self, told: Told) -> None:
        """Something happened where it is drawn."""
        if isinstance(told, Stepped | Shown | Drawn | Lost):
            self._told_of_job(told)
        elif isinstance(told, Died):
            self._died(told)
        elif isinstance(told, Vitals):
            self.vitals = told
            self._metrics.vitals(told)
        elif isinstance(told, Loading):
            log.info("%s is being loaded", told.model)
        elif isinstance(told, Loaded):
            log.info("%s is loaded: %.1f s, %d bytes, licence %s", *_loaded(told))
        if not isinstance(told, Stepped | Shown):
            self.pump()

    def _told_of_job(self, told: Stepped | Shown | Drawn | Lost) -> None:
        live = self.live.get(told.job)
        if live is None or told.image not in live.at_work:
            log.debug("nobody waits for %s", type(told).__name__, extra={"job": told.job})
        elif isinstance(told, Stepped | Shown):
            unseen = isinstance(told, Shown) and self._inspect is not None  # nobody looks at previews first
            if not live.job.over and not unseen:
                live.happened(told)
        else:
            live.at_work.discard(told.image)
            if isinstance(told, Drawn):
                now = time.monotonic()
                self._line.pace.measured(live.job.cost / live.job.count, now - self._busy_since)
                self._busy_since = now
            live.inbox.put_nowait(told)
            self._release(live)

    def _died(self, died: Died) -> None:
        log.error("what draws was lost: %s", died.why)
        self._metrics.worker_died()
        self.broken = "" if died.again else died.why
        for live in list(self.live.values()):
            if live.given:
                live.at_work.clear()
                live.inbox.put_nowait(died)
                self._release(live)

    def _release(self, live: Live) -> None:
        """A job that is over is forgotten when the last of its pictures is."""
        if live.job.over and not live.at_work:
            self.live.pop(live.job.id, None)

    # One job.

    async def _follow(self, live: Live) -> None:
        """From a job's turn to its end, or until it waits again."""
        try:
            if not await self._begin(live):
                return
            while not live.job.over:
                happened = await live.inbox.get()
                if isinstance(happened, Drawn):
                    await self._keep(live, happened)
                elif isinstance(happened, Lost):
                    self._lose(live, happened)
                elif isinstance(happened, Ending):
                    await self._end(live, happened.state, happened.trouble)
                elif await self._bereaved(live, happened):
                    return
                if live.settled and not live.job.over:
                    await self._end(live, *_outcome(live))
        except Exception as error:
            log.exception("failed", extra={"job": live.job.id})
            self._backend.cancel(live.job.id)
            await self._end(live, "failed", trouble_of(error))

    async def _begin(self, live: Live) -> bool:
        """Give a job to what draws, unless that has gone meanwhile: then it waits again."""
        now = time.time()
        order = await self._store.begin(live.job.id, now)
        if not live.job.attempt:
            self._metrics.wait_seconds.observe(now - live.job.created)
        live.job = replace(live.job, state="running", began=now, attempt=live.job.attempt + 1)
        log.info("begun, attempt %d", live.job.attempt, extra={"job": live.job.id})
        if live.stopping:
            live.at_work.clear()
        elif not self._backend.ready:
            return not await self._requeued(live, 0)
        else:
            live.given = True
            self._backend.draw(live.job.id, order, live.done)
        return True

    async def _keep(self, live: Live, drawn: Drawn) -> None:
        """A finished picture is looked at, sealed, written, and told of; or withheld."""
        try:
            if self._inspect is not None:
                await self._inspect(drawn.png)
            png = drawn.png if self._seal is None else await self._seal(drawn.png)
            result = await self._store.keep(live.job.id, drawn.image, png, drawn.receipt)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("picture %d cannot be kept", drawn.image, extra={"job": live.job.id})
                error = refused("internal", trouble_of(RuntimeError()).detail)
            self._lose(live, Lost(drawn.job, drawn.image, error.trouble))
        else:
            live.job = replace(live.job, results=(*live.job.results, result))
            self._metrics.pictures.inc()
            live.tell(replace(drawn, png=b""))

    def _lose(self, live: Live, lost: Lost) -> None:
        live.lost[lost.image] = lost.trouble
        log.info("picture %d will not come: %s", lost.image, lost.trouble.detail, extra={"job": lost.job})
        live.tell(lost)

    async def _bereaved(self, live: Live, died: Died) -> bool:
        """What drew a job is gone: whether the job waits again."""
        live.deaths += 1
        if live.stopping or live.deaths < (MOST_KILLS if died.killed else MOST_DEATHS):
            return await self._requeued(live, 1)
        why = f"what drew it was lost {live.deaths} times over it; it is not tried again"
        await self._end(live, "failed", Trouble("worker-lost", why))
        return False

    async def _requeued(self, live: Live, deaths: int) -> bool:
        """A job waits again, before its owner's others; unless it is to be ended, which is the next in its inbox."""
        live.begin_anew()
        await self._store.requeue(live.job.id, deaths)
        live.job = replace(live.job, state="queued", began=None)
        if live.stopping:
            return False
        log.warning("waits again, as what drew it was lost", extra={"job": live.job.id})
        self._line.enter(live.job.id, live.job.owner, live.job.cost, front=True)
        self.pump()
        return True

    async def _end(self, live: Live, state: State, trouble: Trouble | None) -> None:
        now = time.time()
        try:
            await self._store.end(live.job.id, state, now, trouble)
        except Refused as error:  # it is over all the same; after a restart it is drawn again
            log.error("the end cannot be written: %s", error, extra={"job": live.job.id})
        results = tuple(sorted(live.job.results, key=lambda result: result.image))
        live.job = replace(live.job, state=state, ended=now, trouble=trouble, results=results)
        if state == "done":
            live.job = replace(live.job, step=live.job.steps)
        self._metrics.jobs.labels(state).inc()
        self._metrics.job_seconds.labels(state).observe(now - live.job.created)
        log.info(
            "%s after %.1f s%s",
            state,
            now - live.job.created,
            "" if trouble is None else f": {trouble.detail}",
            extra={"job": live.job.id},
        )
        live.tell(live.job)
        live.over.set()
        self._release(live)
        self.pump()

    # Giving up.

    def give_up(self, live: Live, state: State, trouble: Trouble) -> None:
        """End a job in this way, soon; its pictures stop within one step. Once is enough."""
        if live.stopping or live.job.over:
            return
        live.stopping = True
        if self._line.leave(live.job.id):
            self._spawn(self._end(live, state, trouble))
        else:
            self._backend.cancel(live.job.id)
            live.inbox.put_nowait(Ending(state, trouble))

    async def look(self) -> None:
        """For ever: give up what is past its time, and begin what has room by now."""
        while True:
            for live in list(self.live.values()):
                if time.monotonic() > live.until:
                    after = time.time() - live.job.created
                    why = f"the job was not finished within {after:.0f} seconds"
                    self.give_up(live, "failed", Trouble("deadline", why))
            self.pump()
            await asyncio.sleep(BETWEEN_LOOKS)

    async def drain(self, seconds: float) -> None:
        """Wait for what runs, after :attr:`draining` was set, and put the rest back into the line on the disk."""
        for live in self.live.values():
            if live.job.id in self._line:  # nobody needs to wait for the others' end to hear it
                live.tell(refused("unready", STOPS, retry_after=5))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for live in self.live.values():
            if live.job.state == "running":
                with suppress(Refused):  # which the store has logged; the next start finds the job running
                    await self._store.requeue(live.job.id)
                log.info("did not finish in time and waits for the next start", extra={"job": live.job.id})
            live.tell(refused("unready", STOPS, retry_after=5))
            live.over.set()


def _outcome(live: Live) -> tuple[State, Trouble | None]:
    """How a job ends whose pictures are all there or lost: by the first that was."""
    if not live.lost:
        return "done", None
    trouble = next(iter(live.lost.values()))
    return ("cancelled" if trouble.type == "cancelled" else "failed"), trouble


def _loaded(told: Loaded) -> tuple[str, float, int, str]:
    return told.model, told.seconds, told.size, told.licence or "unknown"
