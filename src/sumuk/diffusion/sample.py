"""The sampling loop. It stands here once, for every solver, family and interface."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import Ask, Noise, Solver


@dataclass(frozen=True, slots=True)
class Moved:
    """A step was taken: progress, previews, masks and cancellation listen here.

    Whoever drives the coroutine may send back another ``x`` (or None to leave it): latent masks do.
    """

    step: int
    steps: int
    now: Level
    then: Level
    x: Tensor
    clean: Tensor | None
    """The last clean estimate that was asked for, for previews."""


def sample(
    solver: Solver, x: Tensor, grid: Sequence[Level], noise: Noise
) -> Generator[Ask | Moved, Tensor | None, Tensor]:
    """Walk ``x`` down the grid.

    Args:
        solver: the method.
        x: where to start, at level ``grid[0]``.
        grid: levels, noisiest first; usually ends clean.
        noise: this image's noise source.

    Yields:
        :class:`Ask`, to be answered with the clean estimate, and :class:`Moved` after each step.

    Returns:
        x at the last level of the grid.
    """
    past = solver.start(grid)
    steps = len(grid) - 1
    for number, (now, then) in enumerate(pairwise(grid), start=1):
        move = solver.step(x, now, then, past, noise)
        clean: Tensor | None = None
        answer: Tensor | None = None
        while True:
            try:
                ask = move.send(answer) if answer is not None else next(move)
            except StopIteration as stop:
                x, past = stop.value
                break
            answer = clean = yield ask
        replaced = yield Moved(number, steps, now, then, x, clean)
        x = x if replaced is None else replaced
    return x


def drive(asks: Generator[Ask | Moved, Tensor | None, Tensor], answer: Callable[[Ask], Tensor]) -> Tensor:
    """Run one sampling coroutine to its end with a denoiser at hand: for tests, training sheets and teaching.

    Args:
        asks: a coroutine of :func:`sample`.
        answer: the clean estimate for an ask.

    Returns:
        The x that the coroutine ends with.
    """
    reply: Tensor | None = None
    while True:
        try:
            event = asks.send(reply)
        except StopIteration as stop:
            return stop.value
        reply = answer(event) if isinstance(event, Ask) else None
