"""The cosine process in continuous time, as Würstchen and Stable Cascade were trained on it.

Its angle is linear in time (Nichol & Dhariwal 2021, equation 17; Pernias et al. 2023, section 3.3)::

    theta(t) = (t + s) / (1 + s) pi / 2          alpha^2 = cos^2 theta(t) / cos^2 theta(0),   t in [0, 1]

kept between two bounds. A shift for larger pictures moves where a walk looks, by ``2 log(1 / shift)`` of the log
signal-to-noise ratio, and not what the network is told: its time is always the unshifted inverse.
"""

from __future__ import annotations

import math

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import Level, VariancePreserving


class ContinuousCosine(VariancePreserving):
    """The cosine process; network time is t itself, from where alpha^2 is ``most`` to where it is ``least``.

    Args:
        shift: how much more noise a walk sees at the same t, see :meth:`shifted`; 2 for Cascade's stage C.
        offset: the small s.
        least: the smallest alpha^2.
        most: the largest alpha^2.

    Raises:
        BadInput: a shift that is not above 0.
    """

    def __init__(
        self, shift: float = 1.0, *, offset: float = 0.008, least: float = 1e-4, most: float = 0.9999
    ) -> None:
        if not shift > 0:
            raise BadInput(f"cosine shift must be above 0, got {shift}")
        self.shift, self.offset = shift, offset
        self._start = self._angle(0.0)
        self._loudest = Level(math.sqrt(least), math.sqrt(1.0 - least), self)
        self._quietest = Level(math.sqrt(most), math.sqrt(1.0 - most), self)
        self.first, self.last = self._exact_time(self._quietest), self._exact_time(self._loudest)

    def _angle(self, t: float) -> float:
        return (t + self.offset) / (1.0 + self.offset) * math.pi / 2

    def _exact_time(self, level: Level) -> float:
        # sin^2 = sigma^2 cos^2 theta(0) + sin^2 theta(0): from both sides, so that no end loses digits
        norm = math.hypot(level.alpha, level.sigma)
        cos = math.cos(self._start)
        sine = math.hypot(level.sigma / norm * cos, math.sin(self._start))
        angle = math.atan2(sine, level.alpha / norm * cos)
        return angle * 2 / math.pi * (1.0 + self.offset) - self.offset

    def level(self, time: float) -> Level:
        for end, there in ((self.first, self._quietest), (self.last, self._loudest)):
            if math.isclose(time, end, rel_tol=1e-12):  # a sum of fractions may round past an end
                return there
        self._check(time)
        return self._unbounded(time)

    def _unbounded(self, t: float) -> Level:
        angle, cos = self._angle(t), math.cos(self._start)
        variance = math.sin(angle - self._start) * math.sin(angle + self._start) / cos**2
        return Level(max(math.cos(angle) / cos, 0.0), math.sqrt(min(max(variance, 0.0), 1.0)), self)

    def time(self, level: Level) -> float:
        return min(max(self._exact_time(level), self.first), self.last)

    def shifted(self, t: float) -> Level:
        """The level that a walk visits at t in [0, 1]: bounded, shifted, bounded again as it was published."""
        if not 0.0 <= t <= 1.0:
            raise BadInput(f"t of a cosine walk must lie between 0 and 1, got {t}")
        ratio = min(max(self._unbounded(t).ratio, self._quietest.ratio), self._loudest.ratio) * self.shift
        if ratio >= self._loudest.ratio:
            return self._loudest
        return self._quietest if ratio <= self._quietest.ratio else self.at_ratio(ratio)
