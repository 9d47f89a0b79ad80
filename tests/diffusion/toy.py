"""Data whose posterior mean is known in closed form: the exact denoiser that the solver tests ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sumuk.diffusion.sample import Moved, sample
from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import Ask, Noise, Solver

Denoise = Callable[[Tensor, Level], Tensor]
SHAPE = (2, 3, 4, 4)


class Mixture:
    """Two images, each drawn from three Gaussians: ``E[x_0 | x]`` is smooth and truly nonlinear."""

    def __init__(self, spread: float = 0.4) -> None:
        draw = torch.Generator().manual_seed(7)
        self.means = torch.randn(3, *SHAPE[1:], generator=draw, dtype=torch.float64) * 0.3
        self.logits = torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64)
        self.spread = spread

    def __call__(self, x: Tensor, at: Level) -> Tensor:
        """x [B, C, H, W] -> clean [B, C, H, W]."""
        variance = (at.alpha * self.spread) ** 2 + at.sigma**2
        away = x[:, None] - at.alpha * self.means
        scores = self.logits - away.square().flatten(2).sum(2) / (2 * variance)
        shares = scores.softmax(1)[..., None, None, None]
        return (shares * (self.means + at.alpha * self.spread**2 / variance * away)).sum(1)


@dataclass
class Gaussian:
    """Scalars from N(mean, spread^2): the probability-flow ODE has a closed solution."""

    mean: float = 0.3
    spread: float = 0.5

    def deviation(self, at: Level) -> float:
        return math.hypot(at.alpha * self.spread, at.sigma)

    def __call__(self, x: Tensor, at: Level) -> Tensor:
        away = x - at.alpha * self.mean
        return self.mean + at.alpha * self.spread**2 / self.deviation(at) ** 2 * away

    def exact(self, x: Tensor, now: Level, then: Level) -> Tensor:
        scale = self.deviation(then) / self.deviation(now)
        return then.alpha * self.mean + scale * (x - now.alpha * self.mean)


class Listed:
    """A noise source that hands out a prepared list in order, for both sides of a comparison."""

    def __init__(self, shape: Sequence[int] = SHAPE, seed: int = 3) -> None:
        self.shape, self.draw = tuple(shape), torch.Generator().manual_seed(seed)

    def __call__(self, *_: object, **__: object) -> Tensor:
        return torch.randn(self.shape, generator=self.draw, dtype=torch.float64)


def silent(now: Level, then: Level) -> Tensor:
    """The noise source of a solver that must not draw any."""
    raise AssertionError("noise was drawn")


def run(solver: Solver, x: Tensor, grid: Sequence[Level], denoise: Denoise, noise: Noise = silent) -> Tensor:
    """Drive the coroutine to its end."""
    return count_asks(solver, x, grid, denoise, noise)[0]


def count_asks(
    solver: Solver, x: Tensor, grid: Sequence[Level], denoise: Denoise, noise: Noise = silent
) -> tuple[Tensor, list[int]]:
    """The end, and how many asks each step made."""
    walk = sample(solver, x, grid, noise)
    asks, answer = [0], None
    try:
        while True:
            said = walk.send(answer)
            if isinstance(said, Moved):
                asks.append(0)
                answer = None
            else:
                assert isinstance(said, Ask)
                asks[-1] += 1
                answer = denoise(said.x, said.level)
    except StopIteration as stop:
        return stop.value, asks[:-1]


def start(at: Level, shape: Sequence[int] = SHAPE, seed: int = 1) -> Tensor:
    """x at a noisy level: noise of the level's size."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=draw, dtype=torch.float64) * math.hypot(
        at.sigma, 0.5 * at.alpha
    )


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value; not a number where either is not finite."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
