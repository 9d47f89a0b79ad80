"""More than one machine: a :class:`~sumuk.serve.backend.Backend` whose workers are replicas of Ray Serve.

The front is the same as on one machine: it holds the queue, and what it has promised lies on its disk. Each picture of
a job is one call of a painter (:mod:`~sumuk.serve.replica`), so that the pictures of a job spread over the replicas,
Serve scales by the number of pictures that are drawn or wait, and a replica that is lost costs the pictures that it was
drawing and no others: these are drawn again elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sumuk.base.errors import BadInput
from sumuk.serve.config import ServeConfig
from sumuk.serve.crew import Crew, Roll, hire, join
from sumuk.serve.local import slots
from sumuk.serve.order import Order
from sumuk.serve.trouble import Refused, Trouble, refused, trouble_of
from sumuk.serve.wire import Answer, Checked, Died, Drawn, Entry, Loaded, Lost, OfJob, Told, Verb, Vitals

log = logging.getLogger("sumuk.serve")

TRIES = 3
"""Replicas that may be lost over one picture; then it is given up."""
PATIENCE = 60.0
"""Seconds in which the clerk answers; it may have to be started again meanwhile."""
LOAD_PATIENCE = 600.0
"""Seconds in which a painter loads a model."""
BETWEEN_LOOKS = 1.0
"""Seconds between two looks at who is there."""
LOST = Trouble("worker-lost", f"what drew it was lost {TRIES} times; try again", retry_after=5)
CANCELLED = Trouble("cancelled", "the job was cancelled")


class Cluster:
    """Draws on a Ray cluster (see :func:`~sumuk.serve.crew.join` for which).

    Args:
        config: of the server. Model and shelf lie under these paths on every machine.
        most: replicas; None: one for each GPU, or for each machine where none is used.
        crew: one that somebody else hires and dismisses; None: one's own.

    Attributes:
        replicas: how those do that told something, by their names; the latest is the last.

    Raises:
        BadInput: a value does not fit.
    """

    def __init__(self, config: ServeConfig, most: int | None = None, crew: Crew | None = None) -> None:
        if most is not None and most < 1:
            raise BadInput(f"{most} replicas can draw nothing; ask for one at least")
        if config.device.startswith("cuda:"):
            raise BadInput(f"device {config.device!r}: on a cluster Ray chooses the card; say 'cuda'")
        self._config, self._most, self._crew, self._own = config, most, crew, crew is None
        self._each = self.slots = slots(config)
        self.ready = False
        self.replicas: dict[str, Vitals] = {}
        self._tell: Callable[[Told], None] = lambda told: None
        self._painter: Any = None
        self._clerk: Any = None
        self._roll = Roll()
        self._numbers = itertools.count()
        self._pictures: dict[str, set[asyncio.Task[None]]] = {}
        self._begun: set[str] = set()
        self._started_ray = False
        self._watching: list[asyncio.Task[None]] = []
        self._over = asyncio.Event()

    async def start(self, tell: Callable[[Told], None]) -> None:
        """See :class:`~sumuk.serve.backend.Backend`, here and below. A model that is not there is told of later.

        Raises:
            Refused: there is no such cluster.
        """
        self._tell = tell
        if self._crew is None:
            self._started_ray = await asyncio.to_thread(join, self._config)
            with suppress(ValueError):  # another thread than the main one has no signals
                # Ray has put itself before whoever handles SIGTERM, to write a trace that nobody wants.
                signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
            self._crew = await asyncio.to_thread(hire, self._config, self._most)
        self._painter, self._clerk = await asyncio.to_thread(self._crew.handles)
        self._watching = [asyncio.ensure_future(self._watch(self._crew))]

    async def _watch(self, crew: Crew) -> None:
        """Look who is there until it ends. They are given twice what they draw, so that Serve sees a need for more."""
        while not self._over.is_set():
            try:
                self._roll = await asyncio.to_thread(crew.roll)
            except Exception as error:
                log.warning("the Ray cluster does not answer: %s", error)
                self._roll = Roll()
            self.ready = self._roll.clerk and self._roll.painters > 0
            self.slots = self._each * max(1, min(crew.most, 2 * self._roll.painters))
            if self._roll.broken:
                log.critical("no painter can work: %s", self._roll.broken)
                self._tell(Died(self._roll.broken, again=False))
                for job in [*self._pictures]:
                    self.cancel(job)
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), BETWEEN_LOOKS)

    # -- questions -------------------------------------------------------------------------------------------------

    async def _ask(self, verb: Verb, about: Any = None) -> Any:
        return _said(await self._call(lambda: self._clerk.ask.remote(verb, about), verb, PATIENCE))

    async def _call(self, call: Callable[[], Any], what: str, patience: float) -> Any:
        """What a call returns; once more, if who was called is lost."""
        if not self._roll.clerk:
            raise refused("unready", "what draws is being started; try again", retry_after=2)
        for again in (True, False):
            try:
                async with asyncio.timeout(patience):
                    return await call()
            except TimeoutError:
                raise refused("unready", f"no answer to {what!r} in {patience:g} s", retry_after=30) from None
            except Exception as error:
                if not _is_loss(error):
                    raise
                log.warning("who was asked to %s is lost: %s", what, error)
                if not again:
                    break
        raise refused("worker-lost", "who answers was lost; try again", retry_after=5)

    async def check(self, order: Order) -> Checked:
        return await self._ask("check", order)

    async def catalogue(self) -> list[Entry]:
        here = {model for each in self.replicas.values() for model in each.models}
        found: list[Entry] = await self._ask("catalogue")
        return [replace(each, loaded=each.sort == "model" and each.name in here) for each in found]

    async def describe(self, name: str) -> dict[str, Any]:
        return await self._ask("describe", name)

    async def choices(self) -> dict[str, list[dict[str, Any]]]:
        return await self._ask("choices")

    async def load(self, name: str) -> None:
        """On one painter; orders for it are sent there."""
        painter = self._painter.options(multiplexed_model_id=mark(Order(values={}, model=name), self._config))
        answer, (replica, some) = await self._call(lambda: painter.bring.remote(name), "load", LOAD_PATIENCE)
        for told in some:
            self._hear(replica, told)
        _said(answer)

    # -- pictures --------------------------------------------------------------------------------------------------

    def draw(self, job: str, order: Order, done: tuple[int, ...] = ()) -> None:
        images = set(range(int(order.values.get("count") or 1)))
        for image in sorted(images - {*done}):
            task = asyncio.ensure_future(self._picture(job, order, image, tuple(images - {image})))
            at_work = self._pictures.setdefault(job, set())
            at_work.add(task)
            task.add_done_callback(lambda task: self._leave(job, task))

    def _leave(self, job: str, task: asyncio.Task[None]) -> None:
        self._pictures[job].discard(task)
        if not self._pictures[job]:
            del self._pictures[job]

    async def _picture(self, job: str, order: Order, image: int, others: tuple[int, ...]) -> None:
        """One picture, drawn again when its painter is lost; its end is told once."""
        end: Lost | Drawn = Lost(job, image, LOST)
        try:
            for _ in range(TRIES):
                found = await self._try(job, order, image, others)
                if found is not None:
                    end = found
                    break
        except asyncio.CancelledError:
            end = Lost(job, image, CANCELLED)
        except Exception as error:
            log.exception("picture %d failed", image, extra={"job": job})
            end = Lost(job, image, trouble_of(error))
        if not self._roll.broken:  # with that, all was told of all
            self._tell(end)

    async def _try(self, job: str, order: Order, image: int, others: tuple[int, ...]) -> Drawn | Lost | None:
        """How a picture ended; None: its painter was lost."""
        name = f"{job}.{image}.{next(self._numbers)}"
        handle = self._painter.options(stream=True, multiplexed_model_id=mark(order, self._config))
        response = handle.draw.remote(name, order, others)
        end: Drawn | Lost | None = None
        replica = ""
        try:
            async for replica, some in response:
                self._begun.add(name)
                for told in some:
                    if isinstance(told, OfJob):
                        told = replace(told, job=job)
                    if isinstance(told, Drawn | Lost):
                        end = told
                    else:
                        self._hear(replica, told)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            if not _is_loss(error):
                raise
            log.warning("the painter of picture %d is lost: %s", image, error, extra={"job": job})
            self.replicas.pop(replica, None)
        finally:
            self._begun.discard(name)
        return end

    def _hear(self, replica: str, told: Told) -> None:
        if isinstance(told, Vitals):
            told = self._together(replica, told)
        elif isinstance(told, Loaded):
            known = self.replicas.setdefault(replica, Vitals())
            models = tuple(dict.fromkeys((*known.models, told.model)))
            self.replicas[replica] = replace(known, models=models)
        self._tell(told)

    def _together(self, replica: str, told: Vitals) -> Vitals:
        """How all do: what is counted since the last report is this one's, what is there now is everybody's."""
        self.replicas.pop(replica, None)
        self.replicas[replica] = told
        while len(self.replicas) > max(1, self._roll.painters):  # some have left without a word
            del self.replicas[next(iter(self.replicas))]
        everyone = [*self.replicas.values()]
        escalations: dict[str, int] = {}
        for each in everyone:
            for rung, count in each.escalations.items():
                escalations[rung] = escalations.get(rung, 0) + count
        return replace(
            told,
            pictures=len(self._begun),
            resident=sum(each.resident for each in everyone),
            device_memory=sum(each.device_memory for each in everyone),
            models=tuple(dict.fromkeys(model for each in everyone for model in each.models)),
            escalations=escalations,
        )

    def cancel(self, job: str) -> None:
        for task in self._pictures.get(job, ()):
            task.cancel()

    async def stop(self) -> None:
        self._tell = lambda told: None
        self.ready = False
        tasks = [task for some in self._pictures.values() for task in some]
        for task in tasks:
            task.cancel()
        self._over.set()
        await asyncio.gather(*tasks, *self._watching, return_exceptions=True)
        if self._own:
            await asyncio.to_thread(self._end)

    def _end(self) -> None:
        import ray

        for handle in (self._painter, self._clerk):
            with suppress(Exception):
                handle.shutdown()  # it has a thread that counts calls
        if self._started_ray:
            ray.shutdown()
        elif self._crew is not None:
            with suppress(Exception):
                self._crew.dismiss()


def mark(order: Order, config: ServeConfig) -> str:
    """What a painter keeps in memory for an order, as Serve sends equal ones to the same; empty: all have it."""
    names = (order.model, order.vae, order.refiner)
    home = names in ((None, None, None), (config.usual, None, None))
    return "" if home else "|".join(each or "" for each in names)


def _said(answer: Answer) -> Any:
    if answer.trouble is not None:
        raise Refused(answer.trouble)
    return answer.value


def _is_loss(error: Exception) -> bool:
    """Whether a call failed because who was called is lost, and not by an error of ours there."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    return isinstance(error, RayError | RayServeException) and not isinstance(error, RayTaskError)
