"""The desk: what every API and the page stand before. It takes orders in, tells how they are, and gives pictures out.

A job is on the disk before it is acknowledged. Jobs are seen by their owner alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from sumuk.serve.backend import Backend
from sumuk.serve.config import ServeConfig
from sumuk.serve.dispatch import STOPS, Dispatch, Inspect, Seal
from sumuk.serve.door import Door
from sumuk.serve.line import Line
from sumuk.serve.metrics import Metrics
from sumuk.serve.order import Caller, Job, Order, State
from sumuk.serve.recovery import recover
from sumuk.serve.retention import keep_sweeping
from sumuk.serve.store import Store
from sumuk.serve.trouble import Refused, Trouble, refused
from sumuk.serve.watching import Seen, Watcher
from sumuk.serve.wire import Died, Entry, Loaded, Told, Vitals

log = logging.getLogger("sumuk.serve")

FRESH = 2.0
"""Seconds in which a catalogue is not asked for again."""
MOST_LISTED = 500
MOST_SETTINGS = 64 * 1024
"""Characters of an owner's settings."""

InspectOrder = Callable[[Order], Awaitable[None]]


class Desk:
    """The one thing behind every API.

    Args:
        config: of the server.
        backend: what draws.
        inspect_prompt: looks at an order before it is taken, and raises Refused if it is not.
        inspect_image: looks at a finished picture before it is kept, and raises Refused if it is withheld.
        seal: signs a finished picture.

    A stage that fails in another way withholds what it looked at.

    Raises:
        BadInput: a rate is not written as one.
    """

    def __init__(
        self,
        config: ServeConfig,
        backend: Backend,
        inspect_prompt: InspectOrder | None = None,
        inspect_image: Inspect | None = None,
        seal: Seal | None = None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.metrics = Metrics()
        self._inspect_prompt = inspect_prompt
        self._door = Door(config)
        self._store = Store(config.state)
        self._line = Line(config.queue_jobs, config.queue_cost, config.job_cost)
        self._dispatch = Dispatch(backend, self._store, self._line, self.metrics, inspect_image, seal)
        self._keys: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._entries: tuple[float, list[Entry]] | None = None
        self._choices: dict[str, list[dict[str, Any]]] | None = None
        self._running = False
        self._chores: list[asyncio.Task[None]] = []
        self._stopped: asyncio.Task[None] | None = None

    # Starting and stopping.

    async def start(self) -> None:
        """Take the state folder, put the last server's jobs in order, and begin. Once is enough.

        Raises:
            BadInput, BadFile: see :meth:`sumuk.serve.store.Store.open`.
            Refused: what draws cannot be started.
        """
        if self._running:
            return
        await self._store.open()
        try:
            for job, deaths in await recover(self._store, time.time()):
                self._line.enter(job.id, job.owner, job.cost)
                self._dispatch.add(job, self._seconds_left(job), deaths)
            await self.backend.start(self._tell)
        except BaseException:
            await self._store.close()
            raise
        self._running = True
        sweeping = keep_sweeping(self._store, self.config.keep_days, self.config.keep_bytes)
        self._chores = [asyncio.ensure_future(each) for each in (self._dispatch.look(), sweeping)]

    async def stop(self) -> None:
        """Unready at once; running jobs get their time, the rest waits for the next start. Once is enough."""
        if self._stopped is None:
            self._dispatch.draining = True
            self._stopped = asyncio.ensure_future(self._stop())
        await asyncio.shield(self._stopped)

    async def _stop(self) -> None:
        await self._dispatch.drain(self.config.drain if self._running else 0.0)
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        await self.backend.stop()
        await self._store.close()

    @property
    def draining(self) -> bool:
        """Whether it stops."""
        return self._dispatch.draining

    @property
    def ready(self) -> bool:
        """Whether orders are taken."""
        return not self.why_unready

    @property
    def why_unready(self) -> str:
        """Why no orders are taken; empty: they are."""
        if self.draining:
            return "the server is stopping"
        if not self._running:
            return "the server is starting"
        if self._dispatch.broken:
            return f"what draws is broken: {self._dispatch.broken}"
        return "" if self.backend.ready else "the model is being loaded"

    @property
    def vitals(self) -> Vitals:
        """What the worker said of itself last."""
        return self._dispatch.vitals

    def _tell(self, told: Told) -> None:
        if isinstance(told, Loaded | Died):
            self._entries = None
        self._dispatch.tell(told)

    # Taking in.

    async def submit(
        self, order: Order, caller: Caller, key: str | None = None, digest: str = ""
    ) -> tuple[Job, bool]:
        """Take an order in. When this returns, the job is on the disk.

        Args:
            order: what is wanted.
            caller: who asks.
            key: an idempotency key (draft-ietf-httpapi-idempotency-key-header): the same one means the same job.
            digest: of everything that was sent with the key.

        Returns:
            The job, and whether it is a new one.

        Raises:
            Refused, SumukError: it is not taken, and why.
        """
        self._check_ready()
        self._door.count(caller)
        if key is None:
            return await self._take_in(order, caller, None, ""), True
        lock = self._keys.setdefault((caller.owner, key), asyncio.Lock())
        async with lock:
            known = self._known(order, caller, key, digest)
            if known is not None:
                return known, False
            return await self._take_in(order, caller, key, digest), True

    def _check_ready(self) -> None:
        why = self.why_unready
        if why:
            raise refused("unready", f"{why}; try again in a moment", retry_after=5)

    def _known(self, order: Order, caller: Caller, key: str, digest: str) -> Job | None:
        """The job that a key stands for already."""
        known = self._store.known(caller.owner, key)
        if known is None:
            return None
        if known.digest != digest:
            raise refused(
                "other-body", f"the idempotency key {key!r} was used for another request; make a new one"
            )
        job = self.job(known.job, caller)
        if order.attached and not job.over:
            raise refused(
                "conflict",
                f"the request with the idempotency key {key!r} is still at work",
                retry_after=1,
                job=job.id,
            )
        # Who waits on the connection sees nothing but the answer: after one that means "try again", it is tried again.
        again = job.state == "cancelled" or (job.trouble is not None and job.trouble.status >= 500)
        return None if order.attached and again else job

    async def _take_in(self, order: Order, caller: Caller, key: str | None, digest: str) -> Job:
        order = await self._door.checked(order)
        checked = await self.backend.check(order)
        if self._inspect_prompt is not None:
            await self._inspected(order, self._inspect_prompt)
        self._check_ready()
        job = Job(
            id=secrets.token_hex(16),
            owner=caller.owner,
            state="queued",
            order=order,
            count=checked.count,
            cost=checked.cost,
            created=time.time(),
            steps=checked.steps,
        )
        self._line.admit(job.id, job.owner, job.cost)
        return await asyncio.shield(asyncio.ensure_future(self._commit(job, key, digest)))

    async def _inspected(self, order: Order, inspect: InspectOrder) -> None:
        try:
            await inspect(order)
        except Refused:
            raise
        except Exception:
            log.exception("the prompt cannot be checked, and is refused")
            raise refused("internal", "the prompt cannot be checked, so that it is not drawn") from None

    async def _commit(self, job: Job, key: str | None, digest: str) -> Job:
        """On the disk first, then in the line; whoever asked may have gone away meanwhile."""
        try:
            job = await self._store.add(job, key, digest)
        except BaseException:
            self._line.leave(job.id)
            raise
        log.info(
            "taken in for %s: %d pictures, cost %.3g", job.owner, job.count, job.cost, extra={"job": job.id}
        )
        live = self._dispatch.add(job, self._seconds_left(job))
        return live.seen(self._line.position(job.id))

    def _seconds_left(self, job: Job) -> float:
        """The server's patience begins anew with it; a deadline that was asked for does not."""
        if job.order.deadline is None:
            return self.config.patience
        return min(self.config.patience, job.created + job.order.deadline - time.time())

    # Telling.

    def job(self, id: str, caller: Caller) -> Job:
        """A job as it is now. Pictures in its order stand as ``{"sha256": ...}``.

        Raises:
            Refused: the caller has no such job.
        """
        job = None
        if re.fullmatch("[0-9a-f]{32}", id):
            live = self._dispatch.live.get(id)
            job = self._store.job(id) if live is None else live.seen(self._line.position(id))
        if job is None or job.owner != caller.owner:
            raise refused("not-found", f"there is no job {id[:80]!r}")
        return job

    def jobs(
        self,
        caller: Caller,
        *,
        limit: int = 50,
        before: str | None = None,
        states: Collection[State] | None = None,
    ) -> list[Job]:
        """The caller's jobs, the newest first.

        Args:
            caller: whose.
            limit: at most so many, up to 500.
            before: id of a job; only older ones are given.
            states: only those in one of them.

        Raises:
            Refused: ``limit`` is out of range, or the caller has no job ``before``.
        """
        if not 1 <= limit <= MOST_LISTED:
            raise refused("bad-value", f"limit is 1 to {MOST_LISTED}, not {limit}")
        if before is not None:
            self.job(before, caller)
        positions = self._line.positions()
        found = []
        for job in self._store.jobs(caller.owner, limit, before, states):
            live = self._dispatch.live.get(job.id)
            found.append(job if live is None else live.seen(positions.get(job.id)))
        return found

    async def watch(self, id: str, caller: Caller) -> AsyncGenerator[Seen, None]:
        """The job as it is, then what happens to its pictures, and last the ended job.

        Finished pictures come without their PNG (:meth:`result_file` has it). A slow watcher misses steps and
        previews, and nothing else.

        Raises:
            Refused: the caller has no such job; ``unready``: the server stops before the job is over.
        """
        job = self.job(id, caller)
        live = self._dispatch.live.get(id)
        if live is None or job.over:
            yield job
            return
        watcher = Watcher()
        live.watchers.add(watcher)
        try:
            yield job
            while True:
                seen = await watcher.next()
                yield seen
                if isinstance(seen, Job):
                    return
        finally:
            live.watchers.discard(watcher)

    async def cancel(self, id: str, caller: Caller, why: str = "it was asked for") -> Job:
        """Stop a job, a running one within one step; one that is over is left as it is.

        Raises:
            Refused: the caller has no such job; ``unready``: the server stopped before the job.
        """
        self.job(id, caller)
        live = self._dispatch.live.get(id)
        if live is not None:
            self._dispatch.give_up(live, "cancelled", Trouble("cancelled", f"cancelled: {why}"))
            await live.over.wait()
            if not live.job.over:
                raise refused("unready", STOPS, retry_after=5)
            return live.job
        return self.job(id, caller)

    def result_file(self, id: str, image: int, caller: Caller) -> Path:
        """Where a finished picture's PNG lies.

        Raises:
            Refused: there is none, or not yet; or it is no longer kept.
        """
        job = self.job(id, caller)
        if image not in (result.image for result in job.results):
            raise refused("not-found", f"job {id} has no finished picture {image}")
        path = self._store.path(id, image)
        if not path.is_file():
            raise refused(
                "gone",
                f"picture {image} of job {id} is no longer kept (results are for {self.config.keep_days:g} days)",
            )
        return path

    # What can be asked for.

    async def catalogue(self) -> list[Entry]:
        """Everything that orders can name."""
        if self._entries is None or time.monotonic() - self._entries[0] > FRESH:
            self._entries = time.monotonic(), await self.backend.catalogue()
        return self._entries[1]

    async def choices(self) -> dict[str, list[dict[str, Any]]]:
        """Solvers and step spacings, which do not change while a server runs."""
        if self._choices is None:
            self._choices = await self.backend.choices()
        return self._choices

    async def describe(self, name: str) -> dict[str, Any]:
        """What ``sumuk inspect`` says of an entry."""
        return await self.backend.describe(name)

    async def load(self, name: str) -> None:
        """Bring a model into memory."""
        await self.backend.load(name)
        self._entries = None

    # What an owner wants to find again.

    async def settings(self, owner: str) -> dict[str, Any]:
        """What :meth:`keep_settings` kept."""
        return json.loads(self._store.settings(owner))

    async def keep_settings(self, owner: str, settings: dict[str, Any]) -> None:
        """Keep an owner's settings, in place of what was there.

        Raises:
            Refused: they are too long.
        """
        text = json.dumps(settings)
        if len(text) > MOST_SETTINGS:
            raise refused(
                "too-large", f"settings are {len(text):,} characters of JSON; at most {MOST_SETTINGS:,}"
            )
        await self._store.keep_settings(owner, text)
