"""What draws, as the front sees it: a worker process on this machine, or replicas of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sumuk.serve.order import Order
from sumuk.serve.wire import Checked, Entry, Told


class Backend(Protocol):
    """Draws orders. All methods are called on the front's event loop, and so is ``tell``.

    Attributes:
        slots: how many pictures are drawn at once; more would only wait inside.
        ready: whether it takes orders now.
    """

    slots: int
    ready: bool

    async def start(self, tell: Callable[[Told], None]) -> None:
        """Begin; from now on ``tell`` is called with what happens. Returns before models are loaded.

        A worker that dies is told of once (:class:`~sumuk.serve.wire.Died`), after which nothing more comes of the
        jobs that it had; whether they are given to the next one is the front's decision.
        """

    async def check(self, order: Order) -> Checked:
        """Whether an order can be drawn, and what it costs. Quick, also while the device is busy.

        Raises:
            Refused: no, and why.
        """

    async def catalogue(self) -> list[Entry]:
        """Everything that orders can name."""

    async def describe(self, name: str) -> dict[str, Any]:
        """What ``sumuk inspect`` says of an entry, as JSON.

        Raises:
            Refused: there is none of that name.
        """

    async def choices(self) -> dict[str, list[dict[str, Any]]]:
        """``solvers`` and ``grids``: name, aliases, and what each takes."""

    async def load(self, name: str) -> None:
        """Bring a model into memory, so that the first order for it need not wait.

        Raises:
            Refused: it cannot be loaded.
        """

    def draw(self, job: str, order: Order, done: tuple[int, ...] = ()) -> None:
        """Begin a job's pictures, but those in ``done``; what becomes of each is told."""

    def cancel(self, job: str) -> None:
        """Stop a job's pictures within one step; each is told of as lost. A job that is not there is none."""

    async def stop(self) -> None:
        """End the worker; nothing is told any more."""
