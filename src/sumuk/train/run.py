"""A whole run: from a configuration to an exported checkpoint, with progress, saves, sheets, resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from sumuk.train.config import TrainConfig, VaeRecipe
from sumuk.train.loop import Recipe, Tick, begin, fingerprint, train
from sumuk.train.state import TrainState, resume


def make_recipe(config: TrainConfig) -> Recipe:
    """The recipe that a configuration asks for, its networks drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(config.recipe, VaeRecipe):
            from sumuk.train.recipes.vae import VaeTraining

            return VaeTraining(config, config.recipe)
        from sumuk.train.recipes.text_to_image import TextToImageTraining

        return TextToImageTraining(config, config.recipe)


def run(
    config: TrainConfig,
    *,
    tell: Callable[[str], None] = print,
    tick: Callable[[Tick], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train to the end and export, going on from the newest whole save below ``config.out``.

    Args:
        config: the run.
        tell: takes one sentence at a time.
        tick: called after each optimizer step, for progress bars.
        stop: asked after each step; True saves and leaves.

    Returns:
        The exported checkpoint, or None when stopped before the end.
    """
    recipe = make_recipe(config)
    state = begin(config, recipe)
    mark = fingerprint(config)
    for sentence in resume(state, config.out, mark):
        tell(sentence)
    count = sum(p.numel() for module in recipe.modules.values() for p in module.parameters())
    tell(f"{count:,} parameters learn; {state.images:,} of {config.images:,} images seen")
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "log.jsonl").open("a") as log:
        for each in train(config, recipe, state):
            if tick is not None:
                tick(each)
            before = each.images - config.batch
            if each.images // 1000 > before // 1000:
                row = {"images": each.images, "loss": each.loss, "rate": each.rate, **each.figures}
                log.write(json.dumps(row) + "\n")
                log.flush()
            if each.images // config.every.sheet > before // config.every.sheet:
                draw_sheet(recipe, state, config.out / f"sheet-{each.images:010d}.png")
            if each.images // config.every.save > before // config.every.save:
                state.save(config.out, mark)
            if stop():
                state.save(config.out, mark)
                tell(f"stopped after {state.images:,} images; the same command goes on from here")
                return None
    state.save(config.out, mark)
    draw_sheet(recipe, state, config.out / f"sheet-{state.images:010d}.png")
    target = config.out / "model.safetensors"
    state.ema.swap()
    recipe.export(target)
    tell(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return target


def draw_sheet(recipe: Recipe, state: TrainState, path: Path) -> None:
    """A sheet made with the averaged weights."""
    state.ema.swap()
    try:
        recipe.sheet().save(path)
    finally:
        state.ema.swap()
