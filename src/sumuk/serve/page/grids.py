"""Compare grids being drawn: each picture a job, a few at a time, whether anybody looks or not."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace

from sumuk.serve.desk import Desk
from sumuk.serve.order import Caller
from sumuk.serve.page.axes import Plan
from sumuk.serve.page.form import order_of
from sumuk.serve.page.kept import Kept
from sumuk.serve.page.sheet import Sheet
from sumuk.serve.page.waking import woken
from sumuk.serve.trouble import Refused, Trouble, refused, trouble_of

log = logging.getLogger("sumuk.serve")

AT_ONCE = 8
"""Jobs of a grid that wait or run at the same time; others of the same owner get between them."""
PATIENCE = 60.0
"""Seconds at most that a picture waits before it is tried again, where there was too much at once."""
MOST = 100
"""Grids that are remembered; the oldest goes."""


class Grid:
    """A grid.

    Args:
        desk: which takes its orders.
        kept: the pictures that they need.
        caller: whose it is.
        plan: what to draw.
        sheet: where it goes, still without jobs.

    Attributes:
        name: by which it is found.
        trouble: the first thing that went wrong.
    """

    def __init__(self, desk: Desk, kept: Kept, caller: Caller, plan: Plan, sheet: Sheet) -> None:
        self.name = secrets.token_hex(16)
        self.caller, self.sheet = caller, sheet
        self.trouble: Trouble | None = None
        self._desk, self._kept, self._plan = desk, kept, plan
        self._cancelled = False
        self._room = asyncio.Semaphore(AT_ONCE)
        self._seed = plan.cells[0][0]["seed"].strip() or str(secrets.randbelow(2**32))  # one for all
        sheet.jobs = [[None] * len(line) for line in plan.cells]
        places = [(row, column) for row, line in enumerate(plan.cells) for column in range(len(line))]
        self._work = [asyncio.ensure_future(self._cell(*place)) for place in places]

    @property
    def over(self) -> bool:
        """Whether no picture will come any more."""
        return all(each.done() for each in self._work)

    async def _cell(self, row: int, column: int) -> None:
        """One picture: taken in when there is room, then waited for."""
        form, jobs = self._plan.cells[row][column], self.sheet.jobs[row]
        async with self._room:
            try:
                await woken(self._desk)
                form = form | {"seed": form["seed"] or self._seed}
                order = replace(
                    await order_of(form, self._kept, self.caller.owner), shown=False
                )  # no previews
                while not self._cancelled:
                    try:
                        jobs[column] = job = (await self._desk.submit(order, self.caller))[0]
                        break
                    except Refused as error:
                        if error.trouble.type != "too-many":
                            raise
                        await asyncio.sleep(min(PATIENCE, error.trouble.retry_after or 1.0))
                else:
                    return
                async for _ in self._desk.watch(job.id, self.caller):
                    pass
                jobs[column] = ended = self._desk.job(job.id, self.caller)
                if ended.state == "failed":
                    self.trouble = self.trouble or ended.trouble
            except Exception as error:  # the others are drawn all the same
                log.info("a picture of a grid was not drawn: %s", error)
                self.trouble = self.trouble or trouble_of(error)

    def look(self) -> None:
        """Read how far its jobs are."""
        for line in self.sheet.jobs:
            for column, job in enumerate(line):
                if job is not None and not job.over:
                    with suppress(Refused):
                        line[column] = self._desk.job(job.id, self.caller)

    async def cancel(self) -> None:
        """Stop what waits and runs."""
        self._cancelled = True
        for line in self.sheet.jobs:
            for job in line:
                if job is not None and not job.over:
                    with suppress(Refused):
                        await self._desk.cancel(job.id, self.caller)

    def drop(self) -> None:
        """Leave it: what was taken in is drawn, the rest is not."""
        for each in self._work:
            each.cancel()


class Grids:
    """The grids of this server's page."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Grid] = OrderedDict()

    def add(self, grid: Grid) -> None:
        """Remember a grid."""
        self._known[grid.name] = grid
        while len(self._known) > MOST:
            self._known.popitem(last=False)[1].drop()

    def find(self, name: str, caller: Caller) -> Grid:
        """A grid.

        Raises:
            Refused: there is none, or it is another's.
        """
        grid = self._known.get(name)
        if grid is None or grid.caller.owner != caller.owner:
            raise refused("gone", "the grid is no longer known; draw it again")
        return grid
