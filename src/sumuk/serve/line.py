"""Who is next: a fair order between owners, first come first served within one. No clock, no disk, no waiting.

Start-time fair queueing (Goyal, Vin and Cheng 1996) by cost. Each owner has a *lead*: how much more was drawn for it
than for the one who is served now. The waiting owner with the least lead is next. That least lead is taken off all
leads, down to nothing, so that an owner who was away has saved nothing up; and whoever is served has its cost laid on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from sumuk.serve.trouble import refused

FIRST_PACE = 1e6
"""Cost a second, before anything was measured: a small GPU, or 20 steps of 512 x 512 pixels in ten seconds."""
LONGEST_WAIT = 3600.0
"""Seconds that anybody is told to wait at most."""


class Pace:
    """How much is drawn in a second: a running average over about the last twenty pictures."""

    FADE = 0.95

    def __init__(self) -> None:
        self._cost = 0.0
        self._seconds = 0.0

    def measured(self, cost: float, seconds: float) -> None:
        """A picture of that cost came after so many seconds of work, none of them idle."""
        self._cost = self._cost * self.FADE + cost
        self._seconds = self._seconds * self.FADE + seconds

    @property
    def rate(self) -> float:
        """Cost per second."""
        return self._cost / self._seconds if self._cost and self._seconds else FIRST_PACE


@dataclass
class Ticket:
    """A place in the line. While it is ``held``, what it stands for is not on disk yet, and it is not served."""

    job: str
    owner: str
    cost: float
    number: int
    held: bool = False


class Line:
    """The jobs that wait.

    Args:
        jobs: how many may wait.
        cost: how much cost may wait.
        job_cost: of one job.
    """

    def __init__(self, jobs: int, cost: float, job_cost: float) -> None:
        self.jobs, self.cost, self.job_cost = jobs, cost, job_cost
        self.pace = Pace()
        self._tickets: dict[str, Ticket] = {}
        self._waiting: dict[str, deque[Ticket]] = {}
        self._leads: dict[str, float] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, job: str) -> bool:
        return job in self._tickets

    @property
    def waiting_cost(self) -> float:
        """Of all that wait."""
        return sum(ticket.cost for ticket in self._tickets.values())

    def admit(self, job: str, owner: str, cost: float) -> None:
        """A new job takes its place, held until :meth:`open`.

        A full line is closed to those who wait in it already. An owner with nothing in it gets one place, so that
        nobody can shut the others out by filling it.

        Raises:
            Refused: it costs too much, or there is too much in the line.
        """
        if cost > self.job_cost:
            raise refused(
                "bad-value",
                f"the job costs {cost:.3g} (pixels x steps x rows, all pictures together); at most {self.job_cost:.3g}"
                " are taken at once: ask for fewer or smaller pictures, or fewer steps",
            )
        if self._waiting.get(owner):
            full, over = len(self) + 1 - self.jobs, self.waiting_cost + cost - self.cost
            if full > 0:
                self._refuse(f"{len(self)} jobs wait, as many as may", self.waiting_cost / len(self) * full)
            if over > 0:
                self._refuse(
                    f"jobs of a cost of {self.waiting_cost:.3g} wait, and this one is of {cost:.3g}", over
                )
        self.enter(job, owner, cost)
        self._tickets[job].held = True

    def _refuse(self, why: str, excess: float) -> None:
        after = min(max(1.0, excess / self.pace.rate), LONGEST_WAIT)
        raise refused(
            "too-many",
            f"{why}; try again in {after:.0f} s",
            retry_after=after,
            position=len(self),
        )

    def enter(self, job: str, owner: str, cost: float, *, front: bool = False) -> None:
        """A job takes its place whatever the bounds say; at the ``front`` of its owner's, if it was served before."""
        self._numbers += 1
        ticket = self._tickets[job] = Ticket(job, owner, cost, self._numbers)
        waiting = self._waiting.setdefault(owner, deque())
        if front:
            waiting.appendleft(ticket)
        else:
            waiting.append(ticket)

    def open(self, job: str) -> None:
        """What was held can be served."""
        self._tickets[job].held = False

    def leave(self, job: str) -> bool:
        """A job goes without being served; whether it was there."""
        ticket = self._tickets.pop(job, None)
        if ticket is None:
            return False
        waiting = self._waiting[ticket.owner]
        waiting.remove(ticket)
        if not waiting:
            del self._waiting[ticket.owner]
        return True

    def first(self) -> str | None:
        """The job that is next, if there is one."""
        heads = [waiting[0] for waiting in self._waiting.values() if not waiting[0].held]
        return _first(heads, self._leads).job if heads else None

    def take(self) -> str | None:
        """The job that is next is served: it leaves, and its owner is charged."""
        job = self.first()
        if job is not None:
            ticket = self._tickets[job]
            self.leave(job)
            self._leads = _charged(self._leads, ticket)
        return job

    def order(self) -> Iterator[str]:
        """All jobs in the order in which they would be served if nobody else came."""
        leads = self._leads
        rest = {owner: deque(waiting) for owner, waiting in self._waiting.items()}
        while rest:
            ticket = _first([waiting[0] for waiting in rest.values()], leads)
            leads = _charged(leads, ticket)
            rest[ticket.owner].popleft()
            if not rest[ticket.owner]:
                del rest[ticket.owner]
            yield ticket.job

    def position(self, job: str) -> int | None:
        """How many jobs are served before it, by the order of now; None: it does not wait."""
        if job not in self._tickets:
            return None
        return next(position for position, each in enumerate(self.order()) if each == job)

    def positions(self) -> dict[str, int]:
        """The same of all that wait."""
        return {job: position for position, job in enumerate(self.order())}


def _first(heads: list[Ticket], leads: dict[str, float]) -> Ticket:
    return min(heads, key=lambda ticket: (leads.get(ticket.owner, 0.0), ticket.number))


def _charged(leads: dict[str, float], served: Ticket) -> dict[str, float]:
    """Everybody's lead after a ticket was served; those without one are left out."""
    least = leads.get(served.owner, 0.0)
    charged = {owner: lead - least for owner, lead in leads.items() if lead > least}
    charged[served.owner] = served.cost
    return charged
