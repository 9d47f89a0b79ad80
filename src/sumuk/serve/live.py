"""A job that is not over, as the server holds it in memory: how far it is, what is to be done with it, who watches."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

from sumuk.serve.order import Job, State
from sumuk.serve.trouble import Trouble
from sumuk.serve.watching import Seen, Watcher
from sumuk.serve.wire import Died, Drawn, Lost, Shown, Stepped


@dataclass(frozen=True)
class Ending:
    """The job is to be ended in this way, whatever its pictures do."""

    state: State
    trouble: Trouble


class Live:
    """One such job.

    Args:
        job: as it was written last.
        seconds: that it has left.
        deaths: of workers that were drawing it.

    Attributes:
        inbox: what happened to it and was not dealt with yet, in order.
        at_work: pictures that take a slot of what draws; they may outlast a job that was stopped.
        given: whether what draws has it.
        stopping: whether an :class:`Ending` is on its way.
        lost: pictures that will not come.
        over: set when nothing more happens to it here.
    """

    def __init__(self, job: Job, seconds: float, deaths: int = 0) -> None:
        self.job = job
        self.until = time.monotonic() + seconds
        self.deaths = deaths
        self.inbox: asyncio.Queue[Drawn | Lost | Died | Ending] = asyncio.Queue()
        self.at_work: set[int] = set()
        self.given = False
        self.stopping = False
        self.lost: dict[int, Trouble] = {}
        self.over = asyncio.Event()
        self.watchers: set[Watcher] = set()
        self._progress: dict[int, Stepped] = {}

    @property
    def done(self) -> tuple[int, ...]:
        """Pictures that are finished and kept."""
        return tuple(result.image for result in self.job.results)

    @property
    def settled(self) -> bool:
        """Whether every picture is finished or lost."""
        return len(self.job.results) + len(self.lost) == self.job.count

    def seen(self, position: int | None) -> Job:
        """The job as it is told: with its place in the line, and how far its slowest picture is."""
        if self.job.over:
            return self.job
        if self.job.state == "queued":  # or just leaving the line
            return replace(self.job, position=position or 0)
        missing = [image for image in range(self.job.count) if image not in {*self.done, *self.lost}]
        steps = max((told.steps for told in self._progress.values()), default=self.job.steps)
        slowest = min((self._step(image) for image in missing), default=steps)
        return replace(self.job, step=slowest, steps=steps)

    def _step(self, image: int) -> int:
        return self._progress[image].step if image in self._progress else 0

    def tell(self, seen: Seen | Exception) -> None:
        """Everybody who watches hears of it."""
        for watcher in self.watchers:
            watcher.put(seen)

    def happened(self, told: Stepped | Shown) -> None:
        """A picture goes on, which is not written anywhere."""
        if isinstance(told, Stepped):
            self._progress[told.image] = told
        self.tell(told)

    def begin_anew(self) -> None:
        """What draws has lost it."""
        self.given = False
        self.at_work.clear()
        self.lost.clear()
        self._progress.clear()
