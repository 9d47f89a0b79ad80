"""What is asked of the server, by whom, and what became of it: an order, a caller, a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sumuk.serve.trouble import Trouble

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[State] = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        owner: the name of the caller's key, ``local`` where none is needed. Jobs are seen by their owner alone.
        address: where the call comes from, for rate limits.
    """

    owner: str = "local"
    address: str = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request for pictures, and which model draws it.

    Attributes:
        values: fields of :class:`sumuk.Request` as JSON has them, with bytes (a whole PNG) where a picture stands.
        model: name of a checkpoint that the server offers; None: its usual one.
        vae: name of an autoencoder in place of the checkpoint's; None: its own.
        refiner: name of a checkpoint that draws the last part; None: none.
        controls: ControlNets that the request steers by: their names in the request -> names that the server offers.
        deadline: seconds from admission in which it must be finished; None: the server's usual patience.
        attached: a connection waits for it, and when that is gone nobody wants it any more.
        shown: somebody looks on while it is drawn, so that previews are worth their time; ``preview`` of its values
            says how often, and if it does not, the server decides.
    """

    values: Mapping[str, Any]
    model: str | None = None
    vae: str | None = None
    refiner: str | None = None
    controls: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None
    attached: bool = False
    shown: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished picture of a job.

    Attributes:
        image: which one, from 0.
        file: name of its PNG in the server's folder of results, chosen by the server.
        seed: that made it.
        width, height: pixels.
        sha256: of the file.
        receipt: what made it.
    """

    image: int
    file: str
    seed: int
    width: int
    height: int
    sha256: str
    receipt: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """An order that was taken in.

    Attributes:
        id: 32 hexadecimal digits that nobody can guess.
        owner: see :class:`Caller`.
        state: where it is.
        order: what was asked, with the seed filled in, so that it gives the same pictures if it must begin anew.
        count: of pictures.
        cost: pixels x steps x rows, all pictures together.
        created, began, ended: seconds since 1970; None: not yet.
        attempt: how often it was begun.
        results: what is finished already.
        trouble: why it failed or was cancelled.
        position: how many jobs are served before it, by the order of now; None once it runs.
        step, steps: how far the slowest of its pictures is, while it runs.
    """

    id: str
    owner: str
    state: State
    order: Order
    count: int
    cost: float
    created: float
    began: float | None = None
    ended: float | None = None
    attempt: int = 0
    results: tuple[Result, ...] = ()
    trouble: Trouble | None = None
    position: int | None = None
    step: int = 0
    steps: int = 0

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED
