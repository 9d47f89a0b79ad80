"""What a network predicts, as a table: its training target, and the way back to the clean picture.

| predicts | target | clean picture from output y |
|---|---|---|
| clean | x_0 | y |
| eps | eps | (x - sigma y) / alpha |
| v | alpha eps - sigma x_0 | (alpha x - sigma y) / (alpha^2 + sigma^2) |
| flow | eps - x_0 | (x - sigma y) / (alpha + sigma) |

eps: Ho et al. 2020; v: Salimans & Ho 2022, section 4; flow: Liu et al. 2023. Nowhere else is the kind asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.base.registry import Registry
from sumuk.diffusion.schedule import Level


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A row of the table. ``x``, ``clean``, ``noise`` and outputs share one shape; levels are scalars."""

    name: str
    target: Callable[[Tensor, Tensor, Level], Tensor]
    """(clean, noise, level) -> what the network is trained to say."""
    clean: Callable[[Tensor, Tensor, Level], Tensor]
    """(x, output, level) -> the clean picture that the output stands for."""
    output: Callable[[Tensor, Tensor, Level], Tensor]
    """(x, clean, level) -> the inverse of ``clean``: what the network would have said."""


def _clean_from_eps(x: Tensor, y: Tensor, at: Level) -> Tensor:
    if at.is_pure_noise:
        raise BadInput("a network that predicts eps cannot start from pure noise (alpha = 0); use a v model")
    return (x - at.sigma * y) / at.alpha


def _eps_from_clean(x: Tensor, clean: Tensor, at: Level) -> Tensor:
    return (x - at.alpha * clean) / at.sigma


PREDICTIONS: Registry[Prediction] = Registry("prediction")
PREDICTIONS.add(
    "clean",
    Prediction(
        name="clean",
        target=lambda clean, noise, at: clean,
        clean=lambda x, y, at: y,
        output=lambda x, clean, at: clean,
    ),
    "sample",
    "x0",
)
PREDICTIONS.add(
    "eps",
    Prediction(
        name="eps",
        target=lambda clean, noise, at: noise,
        clean=_clean_from_eps,
        output=_eps_from_clean,
    ),
    "epsilon",
)
PREDICTIONS.add(
    "v",
    Prediction(
        name="v",
        target=lambda clean, noise, at: at.alpha * noise - at.sigma * clean,
        clean=lambda x, y, at: (at.alpha * x - at.sigma * y) / (at.alpha**2 + at.sigma**2),
        output=lambda x, clean, at: (at.alpha * x - (at.alpha**2 + at.sigma**2) * clean) / at.sigma,
    ),
    "v_prediction",
    "velocity-vp",
)
PREDICTIONS.add(
    "flow",
    Prediction(
        name="flow",
        target=lambda clean, noise, at: noise - clean,
        clean=lambda x, y, at: (x - at.sigma * y) / (at.alpha + at.sigma),
        output=lambda x, clean, at: (x - (at.alpha + at.sigma) * clean) / at.sigma,
    ),
    "flow_prediction",
)
