"""Solvers that throw away more noise than the step asks for, and put fresh noise in its place.

With ``q`` the ratio of noise-to-picture ratios, then to now (0 from pure noise, 0 to the clean picture),

    up = eta then.sigma sqrt(1 - q^2),   at most then.sigma        down = sqrt(then.sigma^2 - up^2)

one splits ``then.sigma`` into what is reached by the ODE and what is drawn anew. With Euler's method beneath,
this is DDIM with eta (Song et al. 2021, eq. 16), DDPM's ancestral sampling at eta = 1 (Ho et al. 2020, eq.
7), and k-diffusion's ``_ancestral`` samplers, at once and for any schedule. Another split,

    down = then.sigma q^eta

is the exact one of the SDE that mixes noise in at rate eta (Lu et al. 2022b, appendix A). At eta = 1 they
agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import Ask, Noise, Solver, Step, at_least_zero, transit


def _shrink(now: Level, then: Level) -> float:
    """q = (then.sigma / then.alpha) / (now.sigma / now.alpha), finite at both ends."""
    return then.sigma * now.alpha / (now.sigma * then.alpha)


def ancestral_split(now: Level, then: Level, eta: float) -> tuple[Level, float]:
    """(the level that the ODE goes down to, the standard deviation of the noise that is added there).

    The first has ``then``'s alpha and less noise than the schedule has there, so no network is asked at it.
    """
    up = min(eta * then.sigma * math.sqrt(max(1 - _shrink(now, then) ** 2, 0.0)), then.sigma)
    return Level(then.alpha, math.sqrt(then.sigma**2 - up**2), then.schedule), up


def reverse_sde_split(now: Level, then: Level, eta: float) -> tuple[Level, float]:
    """The same pair for the SDE whose exact solution the DPM-Solver++ SDE methods approximate."""
    kept = _shrink(now, then) ** eta
    up = then.sigma * math.sqrt(max(1 - kept * kept, 0.0))
    return Level(then.alpha, then.sigma * kept, then.schedule), up


@dataclass(frozen=True)
class Ancestral(Solver):
    """A memoryless solver made ancestral: step ``inner`` down too far, add noise back up.

    Args:
        inner: the solver beneath; Euler gives "Euler a" and DDIM(eta), DPM2 "DPM2 a", DPMpp2S "DPM++ 2S a".
        eta: 0 leaves ``inner`` as it is and draws nothing, 1 is DDPM's variance.
        s_noise: factor on the added noise.
    """

    inner: Solver
    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        at_least_zero(eta=self.eta, s_noise=self.s_noise)

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        down, up = ancestral_split(now, then, self.eta)
        if up == 0:
            return (yield from self.inner.step(x, now, then, None, noise))
        # `inner` may ask on its way, so it goes to the schedule's own level of that ratio, rescaled after.
        lower = now.with_ratio(down.ratio)
        x, _ = yield from self.inner.step(x, now, lower, None, noise)
        return x * (then.alpha / lower.alpha) + up * self.s_noise * noise(now, then), None


@dataclass(frozen=True)
class DDPM(Solver):
    """DDPM's own sampler (Ho et al. 2020, algorithm 2): the posterior's mean, and one of two variances.

    Args:
        variance: "small", the posterior's own (as Euler ancestral), or "large", the forward step's beta.
        Large is
            right for data of unit variance, and on a variance-exploding schedule it is SMLD's choice.
    """

    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise BadInput(f"variance must be 'small' or 'large', got {self.variance!r}")

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        down, up = ancestral_split(now, then, 1.0)
        x = transit(x, clean, now, down)
        if then.is_clean:
            return x, None
        if self.variance == "large":
            up *= now.sigma / then.sigma
        return x + up * noise(now, then), None


@dataclass(frozen=True)
class DPMppSDE(Solver):
    """DPM-Solver++ SDE of k-diffusion: a second look part of the way, both moves ancestral.

    Args:
        eta: how much noise is exchanged; 0 is DPM-Solver++(2S).
        s_noise: factor on the added noise.
        part: where the second look is, as a fraction of the step in half-log-SNR.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    part: float = 0.5

    def __post_init__(self) -> None:
        at_least_zero(eta=self.eta, s_noise=self.s_noise)
        if not 0 < self.part <= 1:
            raise BadInput(f"part must be above 0 and at most 1, got {self.part}")

    @property
    def order(self) -> int:
        return 2

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        if not then.is_clean:
            middle = now.between(then, self.part)
            again = yield Ask(self._move(x, clean, now, middle, noise), middle)
            clean = clean + (again - clean) / (2 * self.part)
        return self._move(x, clean, now, then, noise), None

    def _move(self, x: Tensor, clean: Tensor, now: Level, then: Level, noise: Noise) -> Tensor:
        down, up = ancestral_split(now, then, self.eta)
        x = transit(x, clean, now, down)
        return x + up * self.s_noise * noise(now, then) if up > 0 else x


@dataclass(frozen=True)
class LCM(Solver):
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): jump to the picture, noise it again.

    The answer passes through the boundary condition ``c_skip x + c_out clean`` that makes a consistency model
    the identity at time 0 (Song et al. 2023, section 3); time is the network's.

    Args:
        sigma_data: standard deviation of the data in the boundary condition.
        scaling: factor on the network's time in it.
    """

    sigma_data: float = 0.5
    scaling: float = 10.0

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        clean = yield Ask(x, now)
        time, data = self.scaling * now.time, self.sigma_data
        norm = math.hypot(time, data)
        picture = (time / norm) * clean + (data / norm) ** 2 * x
        if then.is_clean:
            return picture, None
        return then.alpha * picture + then.sigma * noise(now, then), None


@dataclass(frozen=True)
class Churn(Solver):
    """Karras' churn around a memoryless solver: add a little noise, then step from there (2022, algorithm 2).

    Args:
        inner: the solver beneath: Euler, Heun, DPM2.
        churn: total amount, shared among all steps (s_churn); one step raises the ratio by 41 % at most.
        above, below: only where the ratio lies between these (s_tmin, s_tmax).
        s_noise: factor on the added noise.
    """

    inner: Solver
    churn: float
    above: float = 0.0
    below: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        at_least_zero(churn=self.churn, s_noise=self.s_noise)

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def start(self, grid: Sequence[Level]) -> Any:
        return min(self.churn / (len(grid) - 1), math.sqrt(2) - 1) if len(grid) > 1 else 0.0

    def step(self, x: Tensor, now: Level, then: Level, past: Any, noise: Noise) -> Step:
        more = past if self.above <= now.ratio <= self.below and not now.is_pure_noise else 0.0
        raised = now
        if more > 0:
            raised = now.with_ratio(now.ratio * (1 + more))
            added = raised.alpha * math.sqrt(raised.ratio**2 - now.ratio**2) * self.s_noise
            x = x * (raised.alpha / now.alpha) + added * noise(now, then)
        x, _ = yield from self.inner.step(x, raised, then, None, noise)
        return x, past
