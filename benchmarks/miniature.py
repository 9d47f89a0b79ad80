"""Measure the miniature: does a prompt bring the right object in the right style? Writes docs/miniature.md's figures.

Run from the root of the repository, after ``recipes/miniature/data.py``::

    python -m benchmarks.miniature [--model FILE] [--pairs 300] [--quick]

What likeness means stands in ``benchmarks/likeness.py``. Drawn pictures are kept under build/ by the model's hash, so a
stopped run goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.drawing import Drawer, Drawing, ask, choose, rebuild
from benchmarks.likeness import Gallery, Pair, Pictures, features, pairs_of, report, shuffled, validate
from benchmarks.page import PAGE, SPACE, blocks, describe_model, fill, judged_table, machine
from benchmarks.sheets import Tile, sheet, verdict
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import sumuk
from sumuk.generate.api import MINIATURE
from sumuk.train.config import read_config
from sumuk.train.data import Record, read_pixels, read_records
from sumuk.weights.model import Model

RECIPE = Path("recipes/miniature/model.toml")
RUNS = Path("build/miniature")
FIGURES = Path("benchmarks/miniature.json")
SHEETS = Path("docs/images")

SOLVERS = (
    "euler",
    "heun",
    "deis",
    "dpmpp-2m",
    "unipc",
    "euler-ancestral",
    "dpmpp-2m-sde",
    "dpmpp-3m-sde",
)
STEPS = (4, 8, 12, 20, 40)
GUIDANCES = (2.0, 3.0, 4.0, 5.0, 7.5)
STRANGE = (
    "a bicycle made of glass, 3d",
    "two foxes and a red car, 3d",
    "an astronaut riding a horse, 3d",
    "quantum computer, flat",
    "a portrait of my grandmother, flat",
    "초록색 사과 세 개, 3d",
    "눈 내리는 서울의 밤, 플랫",
    "asdf qwer",
)
"""Prompts that name nothing of the set, or more than one thing, to show what is drawn then."""


@dataclass(frozen=True)
class Bench:
    """What is measured, against what."""

    model: Model
    records: list[Record]
    real: Pictures
    gallery: Gallery
    draw: Drawer
    guidance: float

    @cached_property
    def styles(self) -> list[str]:
        return list(dict.fromkeys(record.style for record in self.records))

    @cached_property
    def picture(self) -> dict[Pair, NDArray[np.uint8]]:
        return dict(zip(self.gallery.pairs, self.real, strict=True))

    def judge(self, pictures: Pictures, wanted: Sequence[Pair]) -> dict[str, Any]:
        seen = features(pictures)
        row = report(self.gallery.marks(self.gallery.look(seen), wanted), wanted)
        return row | {"distance": self.gallery.distance(seen, wanted)}


def measure_prompts(
    bench: Bench, trained: list[Record], held: list[Record]
) -> tuple[dict[str, Any], dict[tuple[Pair, str], NDArray[np.uint8]]]:
    """Trained and held-out pairs in both languages, the shuffled control; and the pictures."""
    figures: dict[str, Any] = {}
    drawn: dict[tuple[Pair, str], NDArray[np.uint8]] = {}
    for name, some in (("trained", trained), ("held-out", held)):
        wanted = pairs_of(some)
        for language in ("en", "ko"):
            asked = [ask(record, language, bench.guidance) for record in some]
            pictures, _ = bench.draw(f"{name}, {language}", asked)
            figures[f"{name} {language}"] = bench.judge(pictures, wanted)
            drawn |= {(pair, language): each for pair, each in zip(wanted, pictures, strict=True)}
            if (name, language) == ("trained", "en"):
                figures["shuffled"] = shuffled(bench.gallery, bench.gallery.look(features(pictures)), wanted)
    return figures, drawn


def measure_guidance(bench: Bench, some: Sequence[Record], scales: Sequence[float]) -> dict[str, Any]:
    rows = {}
    for scale in scales:
        pictures, _ = bench.draw(f"guidance {scale:g}", [ask(record, "en", scale) for record in some])
        rows[f"{scale:g}"] = bench.judge(pictures, pairs_of(some))
    return rows


def measure_solvers(
    bench: Bench, some: Sequence[Record], solvers: Sequence[str], steps: Sequence[int]
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for solver in solvers:
        rows[solver] = {}
        for count in steps:
            asked = [replace(ask(r, "en", bench.guidance), solver=solver, steps=count) for r in some]
            pictures, seconds = bench.draw(f"{solver}, {count} steps", asked)
            judged = bench.judge(pictures, pairs_of(some))
            rows[solver][str(count)] = {
                "five": judged["five"],
                "distance": judged["distance"],
                "seconds": round(seconds, 3),
            }
    return rows


def measure_strange(bench: Bench, names: Mapping[str, str]) -> tuple[list[dict[str, Any]], Image.Image]:
    """What comes of prompts outside the set, and what is nearest to it."""
    pictures, _ = bench.draw("outside the set", [Drawing(prompt, 1, bench.guidance) for prompt in STRANGE])
    seen = bench.gallery.look(features(pictures))
    rows, tiles = [], []
    for number, (prompt, picture, near, best) in enumerate(
        zip(STRANGE, pictures, seen.nearest, seen.best, strict=True), start=1
    ):
        pair = bench.gallery.pairs[near]
        rows.append(
            {
                "prompt": prompt,
                "nearest": f"{names[pair.object]}, {pair.style}",
                "likeness": round(float(best.max()), 3),
            }
        )
        tiles.append((f"prompt {number}", [Tile(picture), Tile(bench.picture[pair])]))
    return rows, sheet(("drawn", "nearest"), tiles, "The prompts stand in docs/miniature.md.", blocks=4)


def main_sheet(
    bench: Bench, objects: Sequence[str], names: Mapping[str, str], drawn: Mapping[tuple[Pair, str], Any]
) -> Image.Image:
    """Each object in each style: the real picture, then drawn from English and from Korean."""
    held = {Pair(r.object, r.style) for r in bench.records if r.split != "train"}
    rows = []
    for name in objects:
        tiles: list[Tile | None] = []
        marks = []
        for style in bench.styles:
            pair = Pair(name, style)
            tiles += [
                Tile(bench.picture[pair]),
                *(judged(bench, pair, drawn.get((pair, k))) for k in ("en", "ko")),
            ]
            marks += [f"({style} held out)"] if pair in held else []
        rows.append((" ".join([names[name], *marks]), tiles))
    heads = [text for style in bench.styles for text in (f"{style}: real", "English", "Korean")]
    return sheet(heads, rows, LEGEND)


def held_sheet(
    bench: Bench, some: Sequence[Record], names: Mapping[str, str], drawn: Mapping[tuple[Pair, str], Any]
) -> Image.Image:
    """Held-out pairs: the same object in a style that was trained, what was drawn, and what was never shown."""
    rows = []
    for record in some:
        pair = Pair(record.object, record.style)
        twin = next(p for p in bench.gallery.pairs if p.object == pair.object and p.style != pair.style)
        tiles = [Tile(bench.picture[twin]), *(judged(bench, pair, drawn[pair, k]) for k in ("en", "ko"))]
        rows.append((f"{names[pair.object]}, {pair.style}", [*tiles, Tile(bench.picture[pair])]))
    return sheet(("trained on", "English", "Korean", "never seen"), rows, LEGEND, blocks=3)


LEGEND = (
    "Bar: green, the nearest of all real pictures shows this object; amber, one of the five nearest objects does; "
    "red, none. Seed and objects were not picked by hand."
)


def judged(bench: Bench, pair: Pair, picture: NDArray[np.uint8] | None) -> Tile | None:
    if picture is None:
        return None
    seen = bench.gallery.look(features(picture[None]))
    return Tile(picture, verdict(bench.gallery.marks(seen, [pair])[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, default=MINIATURE, help="the miniature of the package by default"
    )
    parser.add_argument("--pairs", type=int, default=300, help="trained pairs; sweeps take a share of them")
    parser.add_argument("--quick", action="store_true", help="a small part of everything; writes no page")
    parser.add_argument(
        "--space", action="store_true", help="the feature space only; draws and writes nothing"
    )
    given = parser.parse_args()
    console = Console()
    config = read_config(RECIPE)
    records = read_records(config.data)
    real = read_pixels(config.data.root, records, config.data.size).permute(0, 2, 3, 1).contiguous().numpy()
    others = read_records(config.data.model_copy(update={"styles": ("noto",)}))
    foreign = read_pixels(config.data.root, others, config.data.size).permute(0, 2, 3, 1).contiguous().numpy()
    names = {record.object: record.captions["en"][0].rpartition(", ")[0] for record in records}
    model = sumuk.load(given.model)
    gallery = Gallery(real, pairs_of(records))
    objects, trained, held = choose(records, 32 if given.quick else given.pairs)
    held = held[:32] if given.quick else held
    count = len(gallery.objects)
    figures: dict[str, Any] = {
        "model": describe_model(model, config.out),
        "data": {
            "list": str(config.data.objects),
            "objects": count,
            "pictures": len(records),
            "held-out": sum(record.split != "train" for record in records),
        },
        "space": validate(gallery, real, rebuild(model, real), (foreign, pairs_of(others))),
        "chance": {"object": 100 / count, "five": 500 / count},
    }
    console.print(judged_table(figures["space"], SPACE), soft_wrap=True)
    if given.space:
        return
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        draw = Drawer(model, RUNS / "drawn", bar)
        bench = Bench(model, records, real, gallery, draw, model.defaults.guidance)

        def keep() -> None:
            """After each part, so that a stopped run leaves a page that says what is missing."""
            figures["made"] = machine(model) | {
                "pictures": draw.drawn,
                "minutes": round(draw.seconds / 60, 2),
            }
            if not given.quick:
                FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
                PAGE.write_text(fill(PAGE.read_text("utf-8"), blocks(figures)), "utf-8")

        def save(picture: Image.Image, name: str) -> None:
            root = RUNS if given.quick else SHEETS
            picture.quantize(255, dither=Image.Dither.NONE).save(root / name, optimize=True)

        figures["prompts"], drawn = measure_prompts(bench, trained, held)
        save(main_sheet(bench, objects[:20], names, drawn), "miniature-sheet.png")
        save(held_sheet(bench, held[:30], names, drawn), "miniature-held-out.png")
        keep()
        figures["strange"], strange = measure_strange(bench, names)
        save(strange, "miniature-outside.png")
        keep()
        few = trained[: max(16, given.pairs // 5)] if not given.quick else trained[:16]
        scales = sorted({bench.guidance, *GUIDANCES}) if not given.quick else (2.0, bench.guidance)
        figures["guidance"] = measure_guidance(bench, few, scales)
        keep()
        some = trained[: max(16, 4 * given.pairs // 25)] if not given.quick else trained[:16]
        choice = (SOLVERS, STEPS) if not given.quick else (("euler", "dpmpp-2m"), (4, 20))
        figures["solvers"] = measure_solvers(bench, some, *choice)
        keep()
    for name, text in blocks(figures).items():
        console.print(f"{name}\n{text}\n", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
