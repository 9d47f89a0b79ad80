"""score-SDE's own samplers: predictor-corrector, and the ODE by Runge-Kutta (Song et al. 2021).

The score is ``(alpha clean - x) / sigma^2``. A forward step from ``then`` up to ``now`` multiplies by
``m = now.alpha / then.alpha`` and adds variance ``v = now.sigma^2 - m^2 then.sigma^2``; no beta is needed:

    predictor  (eq. 46)          x' = (2 - m) x + v score + sqrt(v) z
    corrector  (algorithms 4, 5) x  = x + e score + sqrt(2 e) z,    e = 2 m^2 (snr |z| / |score|)^2

m is 1 on the variance-exploding process, and m^2 the alpha_i of the published VP corrector.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sumuk.base.errors import BadInput, SumukError
from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import Ask, Noise, Solver, Step, at_least_zero, transit


def _score(x: Tensor, clean: Tensor, at: Level) -> Tensor:
    return (at.alpha * clean - x) / at.sigma**2


def _sizes(x: Tensor) -> Tensor:
    """The norm of each image: x [B, ...] -> [B, 1, ...]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class ReverseDiffusion(Solver):
    """The reverse-diffusion predictor above. The step to the clean picture adds no noise.

    It needs small steps (hundreds): for a variance-preserving process it is the continuous equation's, not
    DDPM's.
    """

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        mult = now.alpha / then.alpha
        variance = now.sigma**2 - (mult * then.sigma) ** 2
        x = (2 - mult) * x + variance * _score(x, clean, now)
        if not then.is_clean:
            x = x + math.sqrt(variance) * noise(now, then)
        return x, None


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """Langevin steps at a level, then a predictor's step to the next; x is [B, ...].

    Args:
        predictor: any memoryless solver; ancestral ones are what the paper calls the ancestral predictor.
        corrections: Langevin steps at each level; each asks once.
        snr: their signal-to-noise ratio, 0.16 for VE in the paper, 0.01 on CIFAR-10 with VP.
    """

    predictor: Solver = ReverseDiffusion()
    corrections: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        at_least_zero(corrections=self.corrections, snr=self.snr)

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        for _ in range(self.corrections):
            clean = yield Ask(x, now)
            score, z = _score(x, clean, now), noise(now, then)
            size = 2 * (now.alpha / then.alpha) ** 2 * (self.snr * _sizes(z) / _sizes(score)) ** 2
            x = x + size * score + (2 * size).sqrt() * z
        return (yield from self.predictor.step(x, now, then, None, noise))


_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class RK45(Solver):
    """The probability-flow ODE by Dormand & Prince's pair of orders 5 and 4, its steps chosen by the error.

    Solved in ``t = sigma / (alpha + sigma)`` for ``y = x / (alpha + sigma)``, where ``dy/dt = (y - clean) /
    t`` is finite from pure noise on, for every process. Each interval of the grid is solved to the tolerance
    with as few steps as that takes, so a grid of two levels integrates over the whole range. The last bit of
    a way to the clean picture, below ``tail`` or the least trained level, is one first-order step (Song et
    al. 2021, appendix C).

    Args:
        rtol, atol: error allowed in a step, relative to |y| and absolute; its root mean square counts.
        tail: the ratio sigma / alpha where the last step begins, at the least.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    tail: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0 and self.tail > 0):
            raise BadInput(f"rtol, atol, tail must be above 0, got {self.rtol}, {self.atol}, {self.tail}")

    @property
    def order(self) -> int:
        return 5

    def step(self, x: Tensor, now: Level, then: Level, past: float | None, noise: Noise) -> Step:
        stop = then
        if then.is_clean:
            stop = now.with_ratio(min(max(now.schedule.least.ratio, self.tail), now.ratio))
        if stop.ratio < now.ratio:
            x, past = yield from self._solve(x, now, stop, past)
        if then is not stop:
            clean = yield Ask(x, stop)
            x = transit(x, clean, stop, then)
        return x, past

    def _solve(
        self, x: Tensor, now: Level, then: Level, size: float | None
    ) -> Generator[Ask, Tensor, tuple[Tensor, float]]:
        """x at ``then``, and the size of step to try next."""
        t, end = _t(now), _t(then)
        size = t - end if size is None else size
        y = x / (now.alpha + now.sigma)
        first = yield from _slope(y, t, now)
        while t > end:
            step = min(size, t - end)
            if t - step == t:
                raise SumukError(f"no step is small enough for rtol {self.rtol} at t = {t:.3g}; raise it")
            last = step == t - end
            slopes = [first]
            for node, row in zip(_NODES[1:], _STAGES[1:], strict=True):
                inner = y - step * sum(part * slope for part, slope in zip(row, slopes, strict=True) if part)
                at = then if last and node == 1.0 else None
                slopes.append((yield from _slope(inner, t - node * step, at or _level(now, t - node * step))))
            wrong = step * sum(part * slope for part, slope in zip(_ERROR, slopes, strict=True))
            allowed = self.atol + self.rtol * torch.maximum(y.abs(), inner.abs())
            error = float((wrong / allowed).square().mean().sqrt())
            if error <= 1:
                y, t, first = inner, end if last else t - step, slopes[-1]
            factor = 10.0 if error == 0 else min(10.0, max(0.2, 0.9 * error**-0.2))  # 0.2 if not a number
            # A step cut short by the end of the interval says little of what the next may be.
            size = max(size, step * factor) if last and error <= 1 else step * factor
        return y * (then.alpha + then.sigma), size


def _t(level: Level) -> float:
    return level.sigma / (level.alpha + level.sigma)


def _level(like: Level, t: float) -> Level:
    return like.with_ratio(t / (1 - t) if t < 1 else math.inf)


def _slope(y: Tensor, t: float, at: Level) -> Generator[Ask, Tensor, Tensor]:
    clean = yield Ask(y * (at.alpha + at.sigma), at)
    return (y - clean) / t
