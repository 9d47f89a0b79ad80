"""Solvers that remember earlier answers: one formula, and a table.

The ODE's exact solution replaces the frozen clean estimate of :func:`~sumuk.diffusion.solver.transit` by its
mean over the step, weighted by ``e^lambda dlambda`` (lambda: half-log-SNR; Lu et al. 2022b, eq. 8). A
multistep method draws a polynomial through the last answers and takes that mean exactly. It thus needs where
the answers stood (*nodes*, the step being 1 long) and the means of 1, theta, theta^2 .. over the step
(*moments*). With ``H`` the bend,

    moment k = integral_0^1 e^(H theta) theta^k dtheta / integral_0^1 e^(H theta) dtheta

| solver | remembers | nodes counted in | bend H |
|---|---|---|---|
| DPM-Solver++ 2M, 2M SDE, 3M SDE | clean estimate | lambda | (1 + eta) h; "midpoint": 0 |
| UniPC | clean estimate | lambda | h |
| DEIS (rho, log-polynomial) | noise estimate | lambda | -h |
| LMS | slope in tau | tau, :func:`~sumuk.diffusion.solver.clock` | 0 |
| PLMS, iPNDM | slope in tau | steps, taken as equal | 0 |

A remembered slope is worth ``clean = -tau slope`` up to a term without memory, so all end in the same
``transit``. Answers at pure noise (lambda, or tau, infinite) carry no polynomial and are passed over; a step
of infinite h is taken at first order. So every method is finite on grids of any length from pure noise to the
clean picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.ancestral import reverse_sde_split
from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import Ask, Noise, Solver, Step, at_least_zero, clock, look_again, transit


def moments(bend: float, most: int) -> list[float]:
    """The means above for k = 0 .. ``most``; they start with 1."""
    if abs(bend) < 1:  # the recursion below cancels here; its Taylor series converges in a few terms
        raw = [
            math.factorial(k) * sum(((-bend) ** n) / math.factorial(n + k + 1) for n in range(20))
            for k in range(most + 1)
        ]
    else:
        raw = [-math.expm1(-bend) / bend]
        for k in range(1, most + 1):
            raw.append((1 - k * raw[-1]) / bend)
    return [value / raw[0] for value in raw]


def weights(nodes: Sequence[float], means: Sequence[float]) -> list[float]:
    """What each remembered answer weighs in the mean of the polynomial through them and the present one."""
    found = []
    for number, node in enumerate(nodes):
        basis = [1.0]
        for other in (0.0, *nodes[:number], *nodes[number + 1 :]):
            shifted, scaled = [0.0, *basis], [*(other * part for part in basis), 0.0]
            basis = [(up - down) / (node - other) for up, down in zip(shifted, scaled, strict=True)]
        found.append(sum(part * mean for part, mean in zip(basis, means, strict=True)))
    return found


def lean(present: Tensor, earlier: Sequence[Tensor], parts: Sequence[float]) -> Tensor:
    """``present`` leaning towards each earlier value by that value's part."""
    best = present
    for value, part in zip(earlier, parts, strict=True):
        best = best + part * (value - present)
    return best


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer (or a slope made of it), and where it was given."""

    level: Level
    value: Tensor


@dataclass(frozen=True, slots=True)
class Memory:
    """What was seen, latest first, and how many steps are left."""

    seen: tuple[Seen, ...]
    left: int


@dataclass(frozen=True)
class Multistep(Solver):
    """What they share: a bounded memory, and nodes counted from ``now`` with the step to ``then`` as 1.

    Args:
        points: how many answers the polynomial passes through, the present one included.
        lower_order_final: fewer points towards the end, one in the last step (for few steps).
    """

    points: int = 2
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.points <= 4:
            raise BadInput(f"points must be 1 to 4, got {self.points}")

    @property
    def order(self) -> int:
        return self.points

    def start(self, grid: Sequence[Level]) -> Memory:
        return Memory((), len(grid) - 1)

    def place(self, level: Level) -> float:
        """The coordinate in which the answers are joined by a polynomial."""
        return level.half_log_snr

    def recall(self, past: Memory, now: Level, then: Level) -> tuple[list[Tensor], list[float]]:
        """Earlier values that bear on this step, latest first, and their nodes."""
        most = min(self.points, past.left) if self.lower_order_final else self.points
        here, step = self.place(now), self.place(then) - self.place(now)
        if not math.isfinite(step):
            return [], []
        usable = [seen for seen in past.seen[: most - 1] if math.isfinite(self.place(seen.level))]
        return [seen.value for seen in usable], [(self.place(seen.level) - here) / step for seen in usable]

    def remember(self, past: Memory, now: Level, value: Tensor) -> Memory:
        return Memory((Seen(now, value), *past.seen)[: self.points], past.left - 1)


@dataclass(frozen=True)
class DPMppM(Multistep):
    """DPM-Solver++ multistep, 2M and 3M, and their SDE variants (Lu et al. 2022b, algorithm 2; k-diffusion).

    Three points are of second order: the published weight of the second difference, kept here, is half of
    what the integral gives. The step to the clean picture is of first order.

    Args:
        eta: noise exchanged; 0 is the ODE, 1 the SDE.
        s_noise: factor on the added noise.
        kind: how two points are weighed: "midpoint" (halfway) or "heun" (the exact integral).
    """

    eta: float = 0.0
    s_noise: float = 1.0
    kind: Literal["midpoint", "heun"] = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(eta=self.eta, s_noise=self.s_noise)
        if self.points > 3:
            raise BadInput(f"DPM-Solver++ has 1 to 3 points, got {self.points}")
        if self.kind not in ("midpoint", "heun"):
            raise BadInput(f"kind must be 'midpoint' or 'heun', got {self.kind!r}")

    @property
    def order(self) -> int:
        return min(self.points, 2)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, x: Tensor, now: Level, then: Level, past: Memory, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        earlier, nodes = self.recall(past, now, then)
        best = clean
        if earlier:
            bend = (1 + self.eta) * (then.half_log_snr - now.half_log_snr)
            means = moments(0.0 if self.kind == "midpoint" and len(nodes) == 1 else bend, len(nodes))
            if len(nodes) == 2:
                means[2] /= 2
            best = lean(clean, earlier, weights(nodes, means))
        down, up = reverse_sde_split(now, then, self.eta)
        x = transit(x, best, now, down)
        if up > 0:
            x = x + up * self.s_noise * noise(now, then)
        return x, self.remember(past, now, clean)


@dataclass(frozen=True)
class LMS(Multistep):
    """Linear multistep on the slope in tau: Adams-Bashforth for unequal steps (Katherine Crowson's LMS)."""

    points: int = 4

    def tau(self, level: Level) -> float:
        return clock(level)

    def place(self, level: Level) -> float:
        return self.tau(level)

    def bend(self, now: Level, then: Level) -> float:
        return 0.0

    def slope(self, x: Tensor, clean: Tensor, now: Level) -> Tensor:
        """d(x / scale) / dtau, where scale = sigma / tau."""
        return (x - now.sigma / self.tau(now) * clean) / now.sigma

    def step(self, x: Tensor, now: Level, then: Level, past: Memory, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        slope = self.slope(x, clean, now)
        earlier, nodes = self.recall(past, now, then)
        if earlier:
            mean = lean(slope, earlier, weights(nodes, moments(self.bend(now, then), len(nodes))))
            clean = clean - self.tau(now) * (mean - slope)
        return transit(x, clean, now, then), self.remember(past, now, slope)


@dataclass(frozen=True)
class PLMS(LMS):
    """Pseudo linear multistep: Adams-Bashforth for equal steps, whatever the grid (Liu et al. 2022, PNDM).

    Second order, for the steps are not equal in tau. The first step is Heun's, or Euler's for iPNDM (Zhang &
    Chen 2023).

    Args:
        improved_start: ask twice in the first step.
    """

    improved_start: bool = True

    @property
    def order(self) -> int:
        return min(self.points, 2)

    def recall(self, past: Memory, now: Level, then: Level) -> tuple[list[Tensor], list[float]]:
        earlier, _ = super().recall(past, now, then)
        return earlier, [-1.0 - number for number in range(len(earlier))]

    def step(self, x: Tensor, now: Level, then: Level, past: Memory, noise: Noise) -> Step:
        tau = self.tau(now)
        if past.seen or not self.improved_start or then.is_clean or math.isinf(tau):
            return (yield from super().step(x, now, then, past, noise))
        clean = yield Ask(x, now)
        best = yield from look_again(x, clean, now, then, tau / (2 * self.tau(then)))
        return transit(x, best, now, then), self.remember(past, now, self.slope(x, clean, now))


@dataclass(frozen=True)
class DEIS(LMS):
    """Exponential integrator on the noise estimate, polynomial in log rho (Zhang & Chen 2023, DEIS)."""

    points: int = 3

    def tau(self, level: Level) -> float:
        return level.ratio

    def place(self, level: Level) -> float:
        return level.half_log_snr

    def bend(self, now: Level, then: Level) -> float:
        return now.half_log_snr - then.half_log_snr


@dataclass(frozen=True, slots=True)
class Guessed(Memory):
    """UniPC's memory: also the estimate by which the last step was taken, and how many answers it used."""

    guess: Tensor | None = None
    used: int = 0


@dataclass(frozen=True)
class UniPC(Multistep):
    """Unified predictor-corrector (Zhao et al. 2023, algorithms 5, 7): an answer first mends the last step.

    One ask a step: the corrector reuses the answer at the predicted x. It corrects by a difference, so an x
    that was changed between two steps (a mask) stays changed.

    Args:
        kind: B(h) of the paper, "bh1" or "bh2"; it matters only where the paper sets a weight to one half.
    """

    lower_order_final: bool = True
    kind: Literal["bh1", "bh2"] = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points > 3:
            raise BadInput(f"UniPC has 1 to 3 points, got {self.points}")
        if self.kind not in ("bh1", "bh2"):
            raise BadInput(f"kind must be 'bh1' or 'bh2', got {self.kind!r}")

    @property
    def order(self) -> int:
        return self.points + 1

    def start(self, grid: Sequence[Level]) -> Memory:
        return Guessed((), len(grid) - 1)

    def means(self, step: float, count: int) -> list[float]:
        """Moments for a step of ``step`` in lambda; with one remembered answer, the paper's one half."""
        if count > 1:
            return moments(step, count)
        half = step / -math.expm1(-step) / 2 if self.kind == "bh1" and math.isfinite(step) else 0.5
        return [1.0, half]

    def corrected(self, x: Tensor, clean: Tensor, now: Level, past: Guessed) -> Tensor:
        """x at ``now``, as if the step that led there had known the answer at its end."""
        if past.guess is None:
            return x
        (last, *before), step = past.seen, now.half_log_snr - past.seen[0].level.half_log_snr
        before = before[: past.used]
        nodes = [(seen.level.half_log_snr - last.level.half_log_snr) / step for seen in before] + [1.0]
        values = [*(seen.value for seen in before), clean]
        better = lean(last.value, values, weights(nodes, self.means(step, len(nodes))))
        return x + (now.alpha - last.level.alpha * now.sigma / last.level.sigma) * (better - past.guess)

    def step(self, x: Tensor, now: Level, then: Level, past: Guessed, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        x = self.corrected(x, clean, now, past)
        earlier, nodes = self.recall(past, now, then)
        step = then.half_log_snr - now.half_log_snr
        guess = lean(clean, earlier, weights(nodes, self.means(step, len(nodes)))) if earlier else clean
        kept = self.remember(past, now, clean)
        return transit(x, guess, now, then), Guessed(kept.seen, kept.left, guess, len(earlier))
