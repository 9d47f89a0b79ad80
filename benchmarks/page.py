"""The written parts of docs/miniature.md: tables of the figures, and the facts of the model and of the run.

A part stands between ``<!-- written: NAME -->`` and ``<!-- end -->``; all other text of the page is written by hand.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.drawing import CHUNK

from sumuk.base.errors import BadInput
from sumuk.weights.model import Model

PAGE = Path("docs/miniature.md")
ROWS = {
    "trained en": "trained pairs, English",
    "trained ko": "the same pairs, Korean",
    "held-out en": "held-out pairs, English",
    "held-out ko": "the same pairs, Korean",
    "shuffled": "control: trained, English, judged by another prompt",
}
SPACE = {
    "rebuilt": "each real picture through the autoencoder and back",
    "moved": "each real picture moved by 3 pixels left and down",
    "across": "each real picture, only the other style allowed",
    "foreign": "Noto's picture of the object, a style outside the set",
}


def percent(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.1f} ({value[1]:.1f}-{value[2]:.1f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = "|".join(["---", *["--:"] * (len(heads) - 1)])
    return "\n".join(
        f"| {' | '.join(row)} |" if row is not None else f"|{line}|" for row in (heads, None, *rows)
    )


def judged_table(rows: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    heads = (
        "%, with 95 % interval",
        "pictures",
        "object first",
        "object among five",
        "style",
        "object and style",
    )
    keys = ("object", "five", "style", "both")
    cells = [(titles[k], str(v["pictures"]), *(percent(v[key]) for key in keys)) for k, v in rows.items()]
    return table(heads, cells)


def blocks(figures: Mapping[str, Any]) -> dict[str, str]:
    """The page's written parts by name; a part that was not measured says so."""
    missing = "*Not measured in the last run.*"
    model, made = figures["model"], figures["made"]
    parts = {"model": model_block(figures), "made": made_block(model, made)}
    parts["space"] = judged_table(figures["space"], SPACE)
    parts["chance"] = (
        f"By chance the object is first in {figures['chance']['object']:.2f} %, among five in "
        f"{figures['chance']['five']:.2f} %; a style is right in 50 %."
    )
    parts["prompts"] = judged_table(figures["prompts"], ROWS) if "prompts" in figures else missing
    parts["guidance"] = parts["solvers"] = parts["strange"] = missing
    if "guidance" in figures:
        rows = figures["guidance"].items()
        parts["guidance"] = table(
            ("guidance", "object first", "object among five", "style", "mean distance"),
            [
                (g, *(percent(r[k]) for k in ("object", "five", "style")), f"{r['distance']:.3f}")
                for g, r in rows
            ],
        )
    if "solvers" in figures:
        solvers = figures["solvers"]
        steps = next(iter(solvers.values()))
        parts["solvers"] = table(
            ("among five %, distance, s a picture", *(f"{count} steps" for count in steps)),
            [(f"`{name}`", *map(solver_cell, cells.values())) for name, cells in solvers.items()],
        )
    if "strange" in figures:
        parts["strange"] = table(
            ("prompt", "nearest real picture", "likeness"),
            [
                (f"{number}. {row['prompt']}", row["nearest"], f"{row['likeness']:.2f}")
                for number, row in enumerate(figures["strange"], start=1)
            ],
        )
    return parts


def solver_cell(cell: Mapping[str, Any]) -> str:
    return f"{cell['five'][0]:.0f}, {cell['distance']:.3f}, {cell['seconds']:.2f}"


def describe_model(model: Model, out: Path) -> dict[str, Any]:
    saves = sorted(out.glob("state-*/manifest.json"))
    run = json.loads(saves[-1].read_text("utf-8")) if saves else None
    return {
        "sha256": model.files[0].sha256,
        "bytes": model.files[0].path.stat().st_size,
        "parameters": {
            title: sum(p.numel() for p in model.networks[part].parameters())
            for part, title in (("denoiser", "U-Net"), ("vae", "autoencoder"), ("text", "text tower"))
        },
        "guidance": model.defaults.guidance,
        "training": run and {"images": run["images"], "hours": round(run["seconds"] / 3600, 2)},
    }


def model_block(figures: Mapping[str, Any]) -> str:
    model, data = figures["model"], figures["data"]
    seen = "unknown here: the training folder is absent"
    if model["training"]:
        run = model["training"]
        seen = f"{run['images']:,} pictures in {run['hours']:.1f} hours (the newest save of the run)"
    sizes = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in model["parameters"].items())
    total = sum(model["parameters"].values()) / 1e6
    return table(
        ("what", "value"),
        [
            ("file", f"{model['bytes'] / 1e6:.1f} MB, sha256 `{model['sha256']}`"),
            ("parameters, millions", f"{total:.1f}: {sizes}"),
            ("training has seen", seen),
            (
                "data set",
                f"{data['objects']} objects ([list](../{data['list']})), {data['pictures']} pictures, "
                f"{data['held-out']} of them held out",
            ),
            ("guidance that it is drawn with", f"{model['guidance']:g}"),
        ],
    )


def machine(model: Model) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.miniature", *sys.argv[1:]]),
        "cpu": named[0] if named else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def made_block(model: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    return (
        f"Made on {made['date']} by `{made['command']}`: {made['pictures']:,} pictures in "
        f"{made['minutes']:.1f} minutes of drawing, on {made['cpu']}, {made['cores']} cores, {made['threads']} "
        f"thread{'s' * (made['threads'] != 1)}, Python {made['python']}, torch {made['torch']}, {made['dtype']}, "
        f"{2 * CHUNK} rows a forward. All figures: [benchmarks/miniature.json](../benchmarks/miniature.json)."
    )


def fill(page: str, parts: Mapping[str, str]) -> str:
    """Put each part between ``<!-- written: NAME -->`` and ``<!-- end -->``.

    Raises:
        BadInput: the page lacks a part's markers.
    """
    for name, text in parts.items():
        begin, end = f"<!-- written: {name} -->", "<!-- end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise BadInput(f"{PAGE} has no {begin} ... {end}; put the markers back")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page
