"""The verb that trains: a progress bar over images seen, Ctrl-C saves and stops."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sumuk.base.errors import BadInput
from sumuk.train.config import read_config
from sumuk.train.loop import Tick
from sumuk.train.run import run

console = Console(markup=False)  # paths may hold square brackets


def run_train(path: Path, images: int | None, threads: int | None) -> None:
    """Train to the end or to the first interrupt; a second interrupt does not wait for the save."""
    config = read_config(path, images=images)
    if threads is not None:
        if threads < 1:
            raise BadInput(f"threads {threads} is below 1")
        torch.set_num_threads(threads)
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        console.print("stopping after this step; the state is saved")

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    mean: list[float] = []
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(config.recipe.kind, total=config.images, told="")

            def tick(each: Tick) -> None:
                # One batch's loss says little; the mean of the last ones is what people watch.
                mean.append(each.loss)
                del mean[:-100]
                figures = " ".join(f"{name} {value:.3g}" for name, value in each.figures.items())
                told = f"loss {sum(mean) / len(mean):.4f} {figures} {config.batch / each.seconds:.0f}/s"
                bar.update(task, completed=each.images, told=told)

            run(config, tell=console.print, tick=tick, stop=lambda: bool(asked))
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
