"""Noise of one image: seeded per image and drawn on the CPU, so no device and no batch changes a picture.

Two sources, both answering ``source(now, then)`` as :class:`sumuk.diffusion.solver.Noise` asks:

* :class:`ImageNoise` continues one generator: first the initial noise, then one draw a step, in order. That
  is what diffusers and ComfyUI do with a CPU generator, so seeds agree with theirs. Change the step count and
  the draws fall on other levels.
* :class:`BrownianPath` is one fixed Brownian motion over the noise level. A step gets the motion's increment
  across it, so with the same seed 10 and 100 steps follow the same path and their pictures converge.

torch's CPU generator uses the low 32 bits of a seed only: seeds 2^32 apart draw the same noise, here as
elsewhere.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import Level


def _checked_seed(name: str, seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise BadInput(f"{name} must be a whole number from 0 to 2^64 - 1, got {seed!r}")
    return seed


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not shape or any(size < 1 for size in shape):
        raise BadInput(f"noise needs a shape of positive sizes, got {shape}")
    return tuple(shape)


def _unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def slerp(low: Tensor, high: Tensor, amount: float) -> Tensor:
    """Spherical interpolation of two noises, each column of the picture by itself.

    The stable-diffusion-webui convention for variation seeds: angles are taken along the second dimension
    from the end. Columns that are parallel are mixed linearly.

    Args:
        low: noise, (..., h, w), what amount 0 gives.
        high: noise of the same shape, what amount 1 gives.
        amount: in [0, 1].
    """
    one, other = (noise / noise.norm(dim=-2, keepdim=True) for noise in (low, high))
    cosine = (one * other).sum(-2, keepdim=True)
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    sine = torch.sin(angle)
    curved = torch.sin((1.0 - amount) * angle) / sine * low + torch.sin(amount * angle) / sine * high
    return torch.where(sine < 1e-6, (1.0 - amount) * low + amount * high, curved)


class ImageNoise:
    """One generator, drawn from in order: the initial noise first, then one noise a step.

    Args:
        seed: whole number in [0, 2^64).
        shape: of the noise, with its batch dimension of 1.
        dtype: of what is handed out; drawing is always in float32.
        device: where it is handed out; drawing is always on the CPU.
        subseed: a second seed towards which the initial noise is turned (variation seed); needs a strength.
            Noise of the steps stays that of ``seed``.
        subseed_strength: how far, in [0, 1].

    Raises:
        BadInput: a seed or strength out of range, or a strength without a subseed.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
        subseed: int | None = None,
        subseed_strength: float = 0.0,
    ) -> None:
        self.shape, self.dtype, self.device = _checked_shape(shape), dtype, device
        if not 0.0 <= subseed_strength <= 1.0:
            raise BadInput(f"subseed_strength must lie between 0 and 1, got {subseed_strength}")
        if subseed is None and subseed_strength > 0:
            raise BadInput(f"subseed_strength {subseed_strength:g} needs a subseed")
        self._generator = torch.Generator("cpu").manual_seed(_checked_seed("seed", seed))
        first = _unit(self.shape, self._generator)
        if subseed is not None:
            other = _unit(self.shape, torch.Generator("cpu").manual_seed(_checked_seed("subseed", subseed)))
            if subseed_strength > 0:
                if len(self.shape) < 2:
                    raise BadInput(
                        f"a variation seed needs noise of height and width, got shape {self.shape}"
                    )
                first = slerp(first, other, subseed_strength)
        self._first = first

    def initial(self) -> Tensor:
        """The unit noise that sampling starts from; the same at every call."""
        return self._first.to(self.device, self.dtype, copy=True)

    def __call__(self, now: Level, then: Level) -> Tensor:
        """The next unit noise of the sequence, whichever step it is for."""
        return _unit(self.shape, self._generator).to(self.device, self.dtype)


class BrownianPath:
    """A Brownian motion W over the noise level, the same path at every step count.

    The motion runs over ``ratio / (1 + ratio)``, which maps clean..pure noise to [0, 1] and so takes an
    infinite ratio as well. (k-diffusion runs it over the ratio itself; over this clock few and many steps
    agree a little better.) Values come by halving the interval, each midpoint from its own seeded noise
    (Levy's construction), so nothing is stored but the last value and any level can be asked in any order.

    Args:
        seed: whole number in [0, 2^64); unlike torch's generator all its bits count.
        shape: of the noise, with its batch dimension of 1.
        dtype: of what is handed out; drawing is in float32, sums are in float64.
        device: where it is handed out; drawing is always on the CPU.
    """

    _DEPTH = 26  # halvings; 1.5e-8 of the whole range is far below any step, and each costs one draw

    def __init__(
        self,
        seed: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.shape = _checked_seed("seed", seed), _checked_shape(shape)
        self.dtype, self.device = dtype, device
        self._last: tuple[float, Tensor] | None = None

    def __call__(self, now: Level, then: Level) -> Tensor:
        """The path's increment from ``now`` to ``then``, scaled to unit variance.

        Raises:
            BadInput: the two levels have the same amount of noise.
        """
        length = abs(_moment(now) - _moment(then))
        if not length > 0:
            raise BadInput(f"no noise lies between two levels of the same ratio {now.ratio:g}")
        return (self.increment(now, then) / math.sqrt(length)).to(self.device, self.dtype)

    def increment(self, now: Level, then: Level) -> Tensor:
        """``W(then) - W(now)`` in float64 on the CPU; increments of adjoining steps add up."""
        start, end = self._value(_moment(now)), self._value(_moment(then))
        return end - start

    def _value(self, at: float) -> Tensor:
        if self._last is not None and self._last[0] == at:
            return self._last[1]
        left, right = 0.0, 1.0
        below, above = torch.zeros(self.shape, dtype=torch.float64), self._node(0, 0)
        index = 0
        for depth in range(1, self._DEPTH + 1):
            if at in (left, right):
                break
            middle = 0.5 * (left + right)
            between = 0.5 * (below + above) + 0.5 * math.sqrt(right - left) * self._node(depth, index)
            if at < middle:
                right, above, index = middle, between, 2 * index
            else:
                left, below, index = middle, between, 2 * index + 1
        share = (at - left) / (right - left)
        value = below + share * (above - below)
        self._last = (at, value)
        return value

    def _node(self, depth: int, index: int) -> Tensor:
        key = hashlib.blake2b(f"{self.seed} {depth} {index}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))
        return _unit(self.shape, generator).double()


def _moment(level: Level) -> float:
    """The Brownian path's time of a level: ``ratio / (1 + ratio)``, from 0 (clean) to 1 (pure noise)."""
    return level.sigma / (level.alpha + level.sigma)
