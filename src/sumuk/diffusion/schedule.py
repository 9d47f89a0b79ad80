"""How much picture and how much noise: the forward process ``x_t = alpha x_0 + sigma eps`` as a pair.

DDPM and its heirs (variance preserving, ``alpha^2 + sigma^2 = 1``), score-SDE's variance exploding process
(``alpha = 1``) and rectified flow (``alpha + sigma = 1``) are three schedules and nothing more. Neither betas nor a
lone sigma leave this file: everyone else sees a :class:`Level`.

A schedule also owns *network time*, the number that the network is told: an index in 0..999 for DDPM-type models
(fractional between two trained levels), ``1000 t`` for SD3 and FLUX, ``t`` or ``sigma`` for score-SDE.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sumuk.base.errors import BadInput


@dataclass(frozen=True, slots=True)
class Level:
    """One point of a schedule: the weights of picture and noise.

    Attributes:
        alpha: weight of the clean picture, in [0, 1].
        sigma: weight of unit-variance noise, >= 0.
        schedule: the process that this level belongs to.
    """

    alpha: float
    sigma: float
    schedule: Schedule = field(repr=False, compare=False)

    @property
    def ratio(self) -> float:
        """Noise to picture, ``sigma / alpha``: what Karras et al. (2022) and k-diffusion call sigma."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def half_log_snr(self) -> float:
        """``log(alpha / sigma)``, the lambda of DPM-Solver (Lu et al. 2022); infinite at the two ends."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    @property
    def time(self) -> float:
        """What the network is told."""
        return self.schedule.time(self)

    @property
    def is_clean(self) -> bool:
        return self.sigma == 0

    @property
    def is_pure_noise(self) -> bool:
        return self.alpha == 0

    def with_ratio(self, ratio: float) -> Level:
        """The level of the same schedule that has this noise-to-picture ratio."""
        return self.schedule.at_ratio(ratio)

    def between(self, then: Level, fraction: float = 0.5) -> Level:
        """A level on the way to ``then``: linear in half-log-SNR, in ratio or time where that is infinite."""
        here, there = self.half_log_snr, then.half_log_snr
        if math.isfinite(here) and math.isfinite(there):
            return self.with_ratio(math.exp(-(here + fraction * (there - here))))
        if math.isfinite(self.ratio):
            return self.with_ratio(self.ratio + fraction * (then.ratio - self.ratio))
        return self.schedule.level(self.time + fraction * (then.time - self.time))


class Schedule(ABC):
    """A forward process. ``time`` runs from :attr:`first` (least noise trained) to :attr:`last` (most noise)."""

    first: float
    last: float

    @abstractmethod
    def level(self, time: float) -> Level:
        """The level at a network time in [first, last].

        Raises:
            BadInput: a time outside of that range.
        """

    def _check(self, time: float) -> None:
        if not self.first <= time <= self.last:
            raise BadInput(f"time {time} is outside the trained range {self.first:g} to {self.last:g}")

    @abstractmethod
    def time(self, level: Level) -> float:
        """The inverse of :meth:`level`; a level outside the trained range gets the nearest trained time."""

    @abstractmethod
    def at_ratio(self, ratio: float) -> Level:
        """The level with ``sigma / alpha = ratio`` (0 <= ratio <= inf)."""

    @property
    def clean(self) -> Level:
        """The picture itself, free of noise."""
        return Level(1.0, 0.0, self)

    @property
    def noisiest(self) -> Level:
        """Where sampling begins."""
        return self.level(self.last)

    @property
    def least(self) -> Level:
        """The lowest noise that the network was trained on."""
        return self.level(self.first)


class VariancePreserving(Schedule):
    """``alpha^2 + sigma^2 = 1`` (Ho et al. 2020; Song et al. 2021), kinds below say how alpha falls."""

    def at_ratio(self, ratio: float) -> Level:
        if math.isinf(ratio):
            return Level(0.0, 1.0, self)
        alpha = 1.0 / math.sqrt(1.0 + ratio * ratio)
        return Level(alpha, ratio * alpha, self)


class Discrete(VariancePreserving):
    """A variance-preserving process trained at whole time steps, given by its cumulative products.

    Between two trained steps the logarithm of sigma/alpha is linear in time, as k-diffusion has it; next to a
    terminal SNR of zero, where that is infinite, the angle atan(sigma/alpha) is.

    Args:
        alphas_cumprod: ``alpha_t^2`` for t = 0..T-1, falling.
    """

    def __init__(self, alphas_cumprod: Sequence[float]) -> None:
        values = [float(a) for a in alphas_cumprod]
        falling = all(a > b for a, b in pairwise(values))
        if len(values) < 2 or not falling or not 0.0 <= values[-1] < values[0] < 1.0:
            raise BadInput(
                f"cumulative alphas must fall strictly inside [0, 1), got {len(values)} values from "
                f"{values[0] if values else None} to {values[-1] if values else None}"
            )
        self.alphas_cumprod = tuple(values)
        self.first, self.last = 0.0, float(len(values) - 1)
        self._levels = [Level(math.sqrt(a), math.sqrt(1.0 - a), self) for a in values]
        self._log_ratios = [-level.half_log_snr for level in self._levels]
        self._angles = [math.atan2(level.sigma, level.alpha) for level in self._levels]

    def level(self, time: float) -> Level:
        self._check(time)
        low = min(int(time), len(self._levels) - 2)
        part = time - low
        if part == 0.0:
            return self._levels[low]
        if part == 1.0:
            return self._levels[low + 1]
        if math.isinf(self._log_ratios[low + 1]):
            angle = self._angles[low] + part * (self._angles[low + 1] - self._angles[low])
            return Level(math.cos(angle), math.sin(angle), self)
        log_ratio = self._log_ratios[low] + part * (self._log_ratios[low + 1] - self._log_ratios[low])
        return self.at_ratio(math.exp(log_ratio))

    def time(self, level: Level) -> float:
        value = -level.half_log_snr
        high = bisect_left(self._log_ratios, value)
        if high == 0:
            return self.first
        if high == len(self._log_ratios):
            return self.last
        low = high - 1
        if math.isinf(self._log_ratios[high]):
            angle = math.atan2(level.sigma, level.alpha)
            return low + (angle - self._angles[low]) / (self._angles[high] - self._angles[low])
        return low + (value - self._log_ratios[low]) / (self._log_ratios[high] - self._log_ratios[low])


def _cumulated(betas: Sequence[float]) -> Discrete:
    product, products = 1.0, []
    for beta in betas:
        product *= 1.0 - beta
        products.append(product)
    return Discrete(products)


def _spread(start: float, end: float, steps: int) -> list[float]:
    return [start + (end - start) * i / (steps - 1) for i in range(steps)]


def linear(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Discrete:
    """Betas linear in time: DDPM, DiT (Ho et al. 2020, section 4)."""
    return _cumulated(_spread(start, end, steps))


def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Discrete:
    """Square roots of betas linear in time: latent diffusion and all of Stable Diffusion 1, 2, XL."""
    return _cumulated([root * root for root in _spread(math.sqrt(start), math.sqrt(end), steps)])


def cosine(steps: int = 1000, offset: float = 0.008, most: float = 0.999) -> Discrete:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17), each beta at most ``most``."""

    def kept(part: float) -> float:
        return math.cos((part + offset) / (1 + offset) * math.pi / 2) ** 2

    return _cumulated([min(1 - kept((i + 1) / steps) / kept(i / steps), most) for i in range(steps)])


def zero_terminal_snr(schedule: Discrete) -> Discrete:
    """Shift and stretch alpha so that the last step is pure noise (Lin et al. 2024, algorithm 1)."""
    alphas = [math.sqrt(a) for a in schedule.alphas_cumprod]
    first, last = alphas[0], alphas[-1]
    return Discrete([((a - last) * first / (first - last)) ** 2 for a in alphas])


class ContinuousVP(VariancePreserving):
    """score-SDE's VP process: ``log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2`` (Song et al. 2021, eq. 33).

    Network time is ``999 t`` for t in [1e-5, 1], as the published VP models were trained.
    """

    def __init__(self, start: float = 0.1, end: float = 20.0, scale: float = 999.0) -> None:
        self.start, self.end, self.scale = start, end, scale
        self.first, self.last = 1e-5 * scale, scale

    def level(self, time: float) -> Level:
        self._check(time)
        t = time / self.scale
        log_alpha = -0.25 * t * t * (self.end - self.start) - 0.5 * t * self.start
        return Level(math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)), self)

    def time(self, level: Level) -> float:
        if level.is_pure_noise:
            return self.last
        slope = self.end - self.start
        t = (math.sqrt(self.start**2 - 4 * slope * math.log(level.alpha)) - self.start) / slope
        return min(max(t * self.scale, self.first), self.last)


class VarianceExploding(Schedule):
    """``alpha = 1``, sigma geometric in t (Song et al. 2021, eq. 30).

    Network time is sigma itself, which is what NCSN++ embeds (its logarithm is taken inside the network).
    """

    def __init__(self, least: float = 0.01, most: float = 50.0) -> None:
        self.first, self.last = least, most

    def level(self, time: float) -> Level:
        self._check(time)
        return Level(1.0, time, self)

    def time(self, level: Level) -> float:
        return min(max(level.ratio, self.first), self.last)

    def at_ratio(self, ratio: float) -> Level:
        return Level(1.0, ratio, self)


class Flow(Schedule):
    """Rectified flow: ``alpha = 1 - t, sigma = t`` (Liu et al. 2023), t shifted towards noise.

    Network time is ``1000 t`` after the shift ``t' = s t / (1 + (s - 1) t)`` (Esser et al. 2024, eq. 23);
    shifting is a matter of the grid, so it is kept here as a number for :mod:`grid` and asks no level anything.

    Args:
        shift: the factor s; 3 for SD3. With ``exp(mu)`` this is FLUX's form too.
        scale: network time per unit of t.
    """

    def __init__(self, shift: float = 1.0, scale: float = 1000.0) -> None:
        if not shift > 0:
            raise BadInput(f"flow shift must be above 0, got {shift}")
        self.shift, self.scale = shift, scale
        self.first, self.last = 0.0, scale

    def level(self, time: float) -> Level:
        self._check(time)
        t = time / self.scale
        return Level(1.0 - t, t, self)

    def time(self, level: Level) -> float:
        return self.scale * level.sigma / (level.alpha + level.sigma)

    def at_ratio(self, ratio: float) -> Level:
        if math.isinf(ratio):
            return Level(0.0, 1.0, self)
        return Level(1.0 / (1.0 + ratio), ratio / (1.0 + ratio), self)

    def shifted(self, t: float) -> Level:
        """The level of an unshifted t in [0, 1]."""
        shifted = self.shift * t / (1.0 + (self.shift - 1.0) * t)
        return self.level(min(self.scale * shifted, self.last))  # rounding may pass the end by a unit


def resolution_shift(
    tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)
) -> float:
    """FLUX's shift factor ``exp(mu)``, mu linear in the number of image tokens (H/16 x W/16)."""
    (few, small), (many, large) = low, high
    return math.exp(small + (large - small) * (tokens - few) / (many - few))
