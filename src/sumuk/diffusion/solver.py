"""What a solver is, and the deterministic solvers with no memory of earlier steps.

A solver never calls the network. Its ``step`` is a coroutine: it yields :class:`Ask` (this x, at this level)
and is sent the network's estimate of the clean picture; it returns the next x and whatever it wants to
remember. The loop stands once, in :mod:`sample`; progress, cancel and batching belong to the engine that
drives the coroutine.

Everything moves by one first-order step that is exact while the clean estimate stays frozen, and finite at
both ends:

    transit(x, clean, now, then) = k x + (then.alpha - now.alpha k) clean,    k = then.sigma / now.sigma

which is DDIM (Song et al. 2021, eq. 12, eta = 0), Euler in Karras' variables, and Euler on a rectified flow
at once. A better solver is a better clean estimate: whatever the method, the step is ``transit(x, best, now,
then)``, and the methods differ only in how they blend answers into ``best``. A second look ``D2`` at a level
between, for one:

| solver | looks again at | best |
|---|---|---|
| Heun | then | D + tau / (2 tau') (D2 - D) |
| DPM2 | the geometric mean of tau and tau' | D + tau / tau_mid (D2 - D) |
| DPM-Solver++(2S) | the middle in half-log-SNR | D2 |

tau is the :func:`clock`. A step that touches an end where the method has no finite form is taken at first
order, as the originals do at the clean end.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import Flow, Level


@dataclass(frozen=True, slots=True)
class Ask:
    """The question: what clean picture is seen in x at this level? The answer has the shape of ``x``."""

    x: Tensor
    level: Level


Step = Generator[Ask, Tensor, tuple[Tensor, Any]]
"""One step: yields asks, is sent clean estimates, returns (next x, memory for the next step)."""


class Noise(Protocol):
    """Where a stochastic solver gets its noise; one source an image."""

    def __call__(self, now: Level, then: Level) -> Tensor:
        """Unit-variance noise of the image's shape, for the move from ``now`` to ``then``."""
        ...


class Solver:
    """Base of all solvers: a frozen value, its memory travels in ``past``."""

    @property
    def order(self) -> int:
        """Order of convergence on a smooth problem, with no noise drawn (the laws measure it)."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return False

    def start(self, grid: Sequence[Level]) -> Any:
        """The memory before the first step; a solver that must know the way ahead takes it from the grid."""
        return None

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        """Move ``x`` from ``now`` to ``then``."""
        raise NotImplementedError


def transit(x: Tensor, clean: Tensor, now: Level, then: Level) -> Tensor:
    """The first-order move above. ``x`` and ``clean`` share a shape."""
    keep = then.sigma / now.sigma
    return keep * x + (then.alpha - now.alpha * keep) * clean


def at_least_zero(**settings: float) -> None:
    """Refuse a setting below zero, or not a number.

    Raises:
        BadInput: naming the setting and its value.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise BadInput(f"{name} must be 0 or more, got {value}")


def clock(level: Level) -> float:
    """The time tau that Runge-Kutta and Adams methods count in: where the path of x is nearly straight.

    sigma / alpha for x / alpha (Karras et al. 2022, eq. 4), and t for x itself on a rectified flow. Both are
    the same ODE; a method of second order differs between them, and each family's published samplers count
    this way.
    """
    if isinstance(level.schedule, Flow):
        return level.sigma / (level.alpha + level.sigma)
    return level.ratio


def at_clock(level: Level, tau: float) -> Level:
    """The level of the same schedule at which :func:`clock` reads ``tau``."""
    if isinstance(level.schedule, Flow):
        return level.with_ratio(tau / (1 - tau) if tau < 1 else math.inf)
    return level.with_ratio(tau)


def look_again(
    x: Tensor, clean: Tensor, now: Level, at: Level, weight: float
) -> Generator[Ask, Tensor, Tensor]:
    """Go to ``at`` with ``clean``, ask there, and lean from the first answer towards it by ``weight``."""
    again = yield Ask(transit(x, clean, now, at), at)
    return clean + weight * (again - clean)


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method, DDIM with eta = 0: one ask, one move (Song et al. 2021; Karras et al. 2022)."""

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        return transit(x, clean, now, then), None


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method: the slopes at both ends of the step, averaged (Karras et al. 2022, algorithm 1)."""

    @property
    def order(self) -> int:
        return 2

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        if math.isfinite(clock(now)) and not then.is_clean:
            clean = yield from look_again(x, clean, now, then, clock(now) / (2 * clock(then)))
        return transit(x, clean, now, then), None


@dataclass(frozen=True)
class DPM2(Solver):
    """The midpoint method, its middle geometric (Lu et al. 2022a, DPM-Solver-2; k-diffusion's form)."""

    @property
    def order(self) -> int:
        return 2

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        if math.isfinite(clock(now)) and not then.is_clean:
            middle = math.sqrt(clock(now) * clock(then))
            clean = yield from look_again(x, clean, now, at_clock(now, middle), clock(now) / middle)
        return transit(x, clean, now, then), None


@dataclass(frozen=True)
class DPMpp2S(Solver):
    """DPM-Solver++(2S): the estimate halfway in half-log-SNR (Lu et al. 2022b, algorithm 1, r = 1/2)."""

    @property
    def order(self) -> int:
        return 2

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        if not then.is_clean:
            clean = yield from look_again(x, clean, now, now.between(then), 1.0)
        return transit(x, clean, now, then), None
