"""Guidance: a coroutine around a coroutine. One ask becomes rows for the network, their answers become one.

    out = negative + scale * sum_i w_i (positive_i - negative)

Ho & Salimans 2022, eq. 6, with scale = 1 + their w; several weighted positives as in composable diffusion
(Liu et al. 2022, eq. 11), the web UI's ``AND``. It is applied to the network's raw output; the clean estimate
comes after it.

A model with *embedded* guidance (FLUX dev) has learnt what the scale does: the number travels inside the
condition and one row is asked, :class:`Plain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.prediction import Prediction
from sumuk.diffusion.sample import Moved
from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import Ask


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batched forward.

    Attributes:
        x: what the network sees, (1, C, h, w), not scaled for any network yet.
        level: its noise.
        condition: whatever the family's network takes beside x; never looked into here.
    """

    x: Tensor
    level: Level
    condition: Any


@dataclass(frozen=True, slots=True)
class Conditions:
    """What one step is steered by.

    Attributes:
        positive: what to draw, each with its weight; more than one is composition (``AND``).
        negative: what to draw away from, usually the empty or the negative prompt.
        weakened: the first positive one asked of a network that leaves layers out, see :class:`SkipLayers`.
    """

    positive: tuple[tuple[Any, float], ...]
    negative: Any | None = None
    weakened: Any | None = None

    def __post_init__(self) -> None:
        if not self.positive:
            raise BadInput("at least one positive condition is needed, got none")
        for _, weight in self.positive:
            if not math.isfinite(weight):
                raise BadInput(f"the weight of a condition must be finite, got {weight}")


Mix = Generator[list[Any], list[Tensor], Tensor]
"""Yields conditions to be asked in one batch, is sent the raw outputs in their order, returns one output."""


class Guidance(Protocol):
    """How the answers to several conditions become one; a frozen value."""

    def mix(self, given: Conditions, progress: float) -> Mix:
        """One ask.

        Args:
            given: the conditions of this step.
            progress: steps done / steps, in [0, 1).
        """
        ...


@dataclass(frozen=True)
class Plain:
    """No guidance: distilled models, embedded guidance. A negative condition is not asked.

    Several positives are averaged by weight.
    """

    def mix(self, given: Conditions, progress: float) -> Mix:
        total = sum(weight for _, weight in given.positive)
        if total == 0:
            raise BadInput("weights of composed conditions add up to 0; without guidance they must not")
        outputs = yield [condition for condition, _ in given.positive]
        if len(outputs) == 1:
            return outputs[0]
        return _weighted(outputs, [weight / total for _, weight in given.positive])


@dataclass(frozen=True)
class SkipLayers:
    """Guidance away from what the network says without some of its layers; added to another guidance.

        out = guidance(...) + scale (positive - weakened)

    As Stable Diffusion 3.5 medium is drawn (Stability AI 2024; after Hong et al. 2023, perturbed attention).

    Attributes:
        guidance: the other one.
        scale: factor.
        start, end: the part of the steps that it acts in, both ends left out.
    """

    guidance: Cfg | Plain
    scale: float
    start: float = 0.01
    end: float = 0.2

    def mix(self, given: Conditions, progress: float) -> Mix:
        if given.weakened is None or not self.start < progress < self.end:
            return (yield from self.guidance.mix(given, progress))
        inner = self.guidance.mix(given, progress)
        asked = next(inner)
        *outputs, weak = yield [*asked, given.weakened]
        first = next(index for index, each in enumerate(asked) if each is given.positive[0][0])
        try:
            inner.send(outputs)
        except StopIteration as stop:
            return stop.value + self.scale * (outputs[first] - weak)
        raise AssertionError("a guidance that asks twice cannot be weakened")


@dataclass(frozen=True)
class Cfg:
    """Classifier-free guidance.

    Where the negative cancels out of the formula (scale 1 and weights that add up to 1) no row is spent on
    it.

    Attributes:
        scale: 1 is no guidance.
        rescale: phi in [0, 1], how much of the standard deviation of the unguided output is restored (Lin et
            al. 2024, eq. 14-16), against overexposure at high scales.
        channels: how many channels of the output are guided, from the first; the others are the unguided answer's
            (DiT: 3). None: all.
        start, end: the part of the steps that is guided, step i of n being at i / n; elsewhere the scale is 1
            (Kynkaanniemi et al. 2024).
    """

    scale: float
    rescale: float = 0.0
    channels: int | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise BadInput(f"guidance scale must be a finite number, got {self.scale}")
        if not 0.0 <= self.rescale <= 1.0:
            raise BadInput(f"guidance rescale must lie between 0 and 1, got {self.rescale}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise BadInput(
                f"guidance must run from a start to an end with 0 <= start <= end <= 1, "
                f"got {self.start} to {self.end}"
            )

    def mix(self, given: Conditions, progress: float) -> Mix:
        scale = self.scale if self.start <= progress < self.end else 1.0
        conditions = [condition for condition, _ in given.positive]
        weights = [weight for _, weight in given.positive]
        cancels = math.isclose(scale * sum(weights), 1.0, rel_tol=1e-9)
        if cancels and (scale == 1.0 or (self.rescale == 0.0 and self.channels is None)):
            outputs = yield conditions
            return _weighted(outputs, [scale * weight for weight in weights])
        if given.negative is None:
            raise BadInput(
                f"guidance scale {scale:g} with weights {', '.join(f'{w:g}' for w in weights)} needs a "
                "negative condition (the empty prompt will do); without one use scale 1"
            )
        negative, *outputs = yield [given.negative, *conditions]
        towards = _weighted([output - negative for output in outputs], weights)
        guided = negative + scale * towards
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], (negative + towards)[:, self.channels :]], dim=1)
        if self.rescale == 0.0 or scale == 1.0:
            return guided
        return _rescaled(guided, negative + towards, self.rescale)


def _weighted(outputs: list[Tensor], weights: list[float]) -> Tensor:
    first, *others = (
        output if weight == 1.0 else weight * output for output, weight in zip(outputs, weights, strict=True)
    )
    for other in others:
        first = first + other
    return first


def _rescaled(guided: Tensor, unguided: Tensor, phi: float) -> Tensor:
    """``guided``, its standard deviation moved by ``phi`` towards that of ``unguided``; a flat one stays."""
    dims = list(range(1, guided.ndim))
    is_, should = guided.std(dims, keepdim=True), unguided.std(dims, keepdim=True)
    factor = torch.where(is_ > 0, should / is_, torch.ones_like(is_))
    return phi * (guided * factor) + (1.0 - phi) * guided


def guided(
    asks: Generator[Ask | Moved, Tensor | None, Tensor],
    prediction: Prediction,
    conditions: Callable[[int], Conditions],
    guidance: Guidance,
    *,
    steps: int,
    amend: Callable[[Tensor, Ask], Tensor] | None = None,
) -> Generator[list[Row] | Moved, Any, Tensor]:
    """Drive one image's sampling coroutine; what comes out needs only a network.

    Args:
        asks: a coroutine of :func:`sumuk.diffusion.sample.sample`.
        prediction: what the network's output means.
        conditions: the conditions of step 0, 1, ...
        guidance: how answers are combined.
        steps: how many steps ``asks`` takes, to tell the guidance how far it is.
        amend: (clean estimate, ask) -> the clean estimate that the solver gets: masks that keep a known
        region.

    Yields:
        a list of rows, to be answered with the list of the network's raw outputs in the same order (any
        dtype: they are combined in the dtype of x); and :class:`Moved`, whose answer goes down to the sampler
        as it is.

    Returns:
        x at the last level of the grid.

    Raises:
        BadInput: steps below 1, or the guidance needs a condition that is not there.
    """
    if steps < 1:
        raise BadInput(f"steps must be at least 1, got {steps}")
    done = 0
    reply: Tensor | None = None
    try:
        while True:
            try:
                event = asks.send(reply)
            except StopIteration as stop:
                return stop.value
            if isinstance(event, Moved):
                done = event.step
                reply = yield event
                continue
            output = yield from _asked(event, guidance.mix(conditions(done), done / steps))
            reply = prediction.clean(event.x, output, event.level)
            if amend is not None:
                reply = amend(reply, event)
    finally:
        asks.close()


def _asked(ask: Ask, mix: Mix) -> Generator[list[Row], list[Tensor], Tensor]:
    """Turn a guidance's conditions into rows, and hand it their outputs."""
    outputs: list[Tensor] | None = None
    while True:
        try:
            wanted = next(mix) if outputs is None else mix.send(outputs)
        except StopIteration as stop:
            return stop.value
        answers = yield [Row(ask.x, ask.level, condition) for condition in wanted]
        if len(answers) != len(wanted):
            raise ValueError(f"{len(wanted)} rows were asked, {len(answers)} outputs came back")
        outputs = [answer.to(ask.x.dtype) for answer in answers]
