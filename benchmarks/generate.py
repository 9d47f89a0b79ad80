"""How long a picture takes: a table of cold and warm times of the miniature.

Run from the root of the repository: ``python benchmarks/generate.py`` (or ``make bench``). Cold is a new process, from
the shell's line to the written PNG; warm is in a process that has loaded the model and drawn once. Medians of wall
time; OMP_NUM_THREADS sets the threads of all rows alike.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from sumuk.generate.api import miniature
from sumuk.generate.engine import Engine, Failed, Finished, Mode
from sumuk.generate.request import Request, make_request
from sumuk.weights.model import Model

PROMPT, STEPS = "여우, 3d", 20
COMPANY = (
    PROMPT,
    "a fox, flat style",
    "피자, 3d",
    "pizza, flat",
    "고양이, 3d",
    "a cat, flat",
    "로켓, 3d",
    "rocket, flat",
)


def seconds(work: Callable[[], None], times: int) -> list[float]:
    """Wall time of each run."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def shell(*words: str) -> Callable[[], None]:
    """A new process of the command line."""

    def work() -> None:
        subprocess.run([sys.executable, "-m", "sumuk", *words], check=True, capture_output=True)

    return work


def engine(model: Model, requests: list[Request], mode: Mode) -> Callable[[], None]:
    """Requests drawn together; every one must end in a picture."""

    def work() -> None:
        machine = Engine(model, mode=mode)
        for request in requests:
            machine.submit(request)
        events = list(machine.events())
        for event in events:
            if isinstance(event, Failed):
                raise event.error
        assert sum(isinstance(event, Finished) for event in events) == len(requests)

    return work


def main() -> None:
    console = Console()
    one = [make_request(prompt=PROMPT, seed=7, steps=STEPS, solver="dpmpp-2m")]
    eight = [make_request(prompt=text, seed=7, steps=STEPS, solver="dpmpp-2m") for text in COMPANY]
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as bar:
        out = str(Path(folder) / "fox.png")
        cold = (
            "generate",
            PROMPT,
            "--seed",
            "7",
            "--steps",
            str(STEPS),
            "--solver",
            "dpmpp-2m",
            "--out",
            out,
        )
        model = miniature()
        rows: list[tuple[str, Callable[[], None], int, int]] = [
            ("cold: sumuk --help", shell("--help"), 3, 0),
            (f'cold: sumuk generate "{PROMPT}"', shell(*cold), 3, 1),
            ("warm: one request, exact", engine(model, one, "exact"), 5, 1),
            ("warm: one request, fast", engine(model, one, "fast"), 5, 1),
            ("warm: eight requests together, exact", engine(model, eight, "exact"), 3, 8),
            ("warm: eight requests together, fast", engine(model, eight, "fast"), 3, 8),
        ]
        engine(model, one, "fast")()
        table = Table(Column("what", no_wrap=True), "runs", "median s", "least s", "most s", "s a picture")
        task = bar.add_task("measuring", total=len(rows))
        for title, work, times, pictures in rows:
            taken = seconds(work, times)
            each = f"{median(taken) / pictures:.2f}" if pictures else ""
            figures = (f"{value:.2f}" for value in (median(taken), min(taken), max(taken)))
            table.add_row(title, str(times), *figures, each)
            bar.advance(task)
    console.print(table)
    threads = torch.get_num_threads()
    console.print(
        f"{STEPS} steps of dpmpp-2m, guidance {model.defaults.guidance:g}, {model.defaults.size} x "
        f"{model.defaults.size} pixels, {str(model.dtype).removeprefix('torch.')}, model sha256 "
        f"{model.files[0].sha256[:16]}\n"
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, sumuk {version('sumuk')}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
