"""The training loop: one screen, the same for every recipe.

It yields a :class:`Tick` after each optimizer step; saving, sheets and progress bars listen to ticks, and
stopping between two ticks loses nothing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from sumuk.base.errors import SumukError
from sumuk.train.config import TrainConfig
from sumuk.train.data import seeded
from sumuk.train.ema import Ema
from sumuk.train.optim import make_optimizer, rate_at
from sumuk.train.state import TrainState


class Recipe(Protocol):
    """Which parameters, what batch, what loss."""

    modules: dict[str, nn.Module]
    """The networks that learn, by the name under which they are saved."""

    def batch(self, images: int, size: int, random: torch.Generator) -> Any:
        """The batch that follows after ``images``; all randomness from ``random``."""
        ...

    def loss(self, batch: Any, random: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """A scalar to minimise, and named figures to show."""
        ...

    def sheet(self) -> Image.Image:
        """A picture of what the present weights do."""
        ...

    def export(self, path: Path) -> None:
        """Write the present weights as a checkpoint that others can open, complete or not at all."""
        ...


@dataclass(frozen=True)
class Tick:
    """One optimizer step was taken."""

    images: int
    loss: float
    rate: float
    figures: Mapping[str, float]
    seconds: float


class Diverged(SumukError):
    """The loss or a gradient is no longer finite; the last save is good."""


def fingerprint(config: TrainConfig) -> str:
    """What must stay equal for a resumed run to be the same run: all but its length, cadence, places and labels."""
    labels = {"start", "title", "licence", "guidance", "sheet_prompts"}  # start: a save has its own weights
    # Settings that came after the first saves: left at what was done before there were any, they change nothing.
    later = {"decoder_of": None, "latent_noise": 0.0}
    labels |= {name for name, usual in later.items() if getattr(config.recipe, name, usual) == usual}
    fixed = config.model_dump_json(
        exclude={"images": True, "every": True, "out": True, "data": {"root"}, "recipe": labels}
    )
    return hashlib.sha256(fixed.encode()).hexdigest()[:16]


def begin(config: TrainConfig, recipe: Recipe) -> TrainState:
    """A fresh state for a recipe."""
    parameters = [p for module in recipe.modules.values() for p in module.parameters()]
    return TrainState(
        modules=recipe.modules,
        optimizer=make_optimizer(parameters, config.optim),
        ema=Ema(recipe.modules, config.ema.half_life),
    )


def train(config: TrainConfig, recipe: Recipe, state: TrainState) -> Iterator[Tick]:
    """Train until ``config.images`` images were seen.

    Raises:
        Diverged: the loss or the gradient norm is not finite; says after how many images.
    """
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    while state.images < config.images:
        began = time.perf_counter()
        random = seeded(config.seed, state.images)
        cast = torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext()
        with cast:
            loss, figures = recipe.loss(recipe.batch(state.images, config.batch, random), random)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip)
        value = float(loss.detach())
        if not math.isfinite(value + float(norm)):
            raise Diverged(f"loss {value} and gradient norm {float(norm)} after {state.images} images")
        rate = rate_at(config.optim, state.images, config.images)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.images += config.batch
        state.ema.update(state.images, config.batch)
        seconds = time.perf_counter() - began
        state.seconds += seconds
        yield Tick(state.images, value, rate, figures, seconds)
