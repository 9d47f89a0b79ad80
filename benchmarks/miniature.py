"""Measure the miniature: does a prompt bring the right object in the right style? Writes docs/miniature.md's figures.

Run from the root of the repository, after ``recipes/miniature/data.py``::

    python benchmarks/miniature.py [--model FILE] [--pairs 300] [--quick]

Every drawn picture is looked up among all pictures of the data set (both styles, held-out ones too) in a feature
space that needs no download and was fixed on real pictures only, before any picture was drawn:

    f = [u(c), u(g)] / sqrt 2        u(v) = v / |v|,    likeness(a, b) = f_a . f_b,    distance = 1 - likeness

c: CIE L*a*b* (D65) minus white paper, blurred with sigma 2 pixels, averaged over 4 x 4 pixels: 16 x 16 x 3 numbers.
g: after Dalal & Triggs (2005): of the L*a*b* picture (sigma 1), the steepest channel's gradient at each pixel, its
   unsigned direction in 8 bins, summed with a Gaussian of sigma 4 at the centres of 8 x 8 cells; square roots.

Objects are ranked by their nearest picture. Intervals: 95 %, bootstrap over objects. Drawn pictures are kept under
build/ by the model's hash, so a stopped run goes on with the same command.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

import sumuk
from sumuk.base.errors import BadInput
from sumuk.generate.api import MINIATURE
from sumuk.generate.engine import Engine, Failed, Finished
from sumuk.generate.request import make_request
from sumuk.train.config import read_config
from sumuk.train.data import Record, read_pixels, read_records
from sumuk.weights.model import Model

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]
"""[N, H, W, 3], sRGB."""

RECIPE = Path("recipes/miniature/model.toml")
RUNS = Path("build/miniature")
PAGE = Path("docs/miniature.md")
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

CHUNK = 16
"""Pictures that are drawn and kept together; with guidance, 32 rows of one forward."""


# ---- the feature space -----------------------------------------------------------------------------------------


def to_lab(pictures: Pictures) -> Floats:
    """sRGB (IEC 61966-2-1) to CIE L*a*b* under D65; L 0..100, [N, H, W, 3]."""
    s = pictures.astype(np.float32) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    ratio = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    d = 6 / 29
    x, y, z = np.moveaxis(np.where(ratio > d**3, np.cbrt(ratio), ratio / (3 * d * d) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def blur(fields: Floats, sigma: float) -> Floats:
    """Gaussian over the two middle axes of [N, H, W, C]; edges are continued."""
    reach = round(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    x = torch.from_numpy(fields).permute(0, 3, 1, 2)
    shape = x.shape
    x = F.pad(x.reshape(-1, 1, *shape[2:]), (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return np.ascontiguousarray(x.reshape(shape).permute(0, 2, 3, 1).numpy())


def colours(lab: Floats) -> Floats:
    """What is on the paper and where: [N, 768] for pictures of 64 x 64."""
    ink = blur(lab - np.array([100, 0, 0], np.float32), 2.0)
    count, height, width, channels = ink.shape
    return ink.reshape(count, height // 4, 4, width // 4, 4, channels).mean((2, 4)).reshape(count, -1)


def gradients(lab: Floats, bins: int = 8, cell: int = 8) -> Floats:
    """Which way edges run and where: [N, 512] for pictures of 64 x 64."""
    smooth = blur(lab, 1.0)
    down, across = np.gradient(smooth, axis=(1, 2))
    steepest = np.hypot(down, across).argmax(-1)[..., None]
    dy, dx = (np.take_along_axis(each, steepest, -1)[..., 0] for each in (down, across))
    place = np.arctan2(dy, dx) % np.pi / np.pi * bins
    low = np.floor(place)
    share, strength = place - low, np.hypot(dy, dx)
    votes = np.zeros((*place.shape, bins), np.float32)
    for which, weight in ((low, 1 - share), (low + 1, share)):  # a direction between two bins votes for both
        index = which.astype(int)[..., None] % bins
        np.put_along_axis(
            votes, index, np.take_along_axis(votes, index, -1) + (strength * weight)[..., None], -1
        )
    cells = blur(votes, cell / 2)[:, cell // 2 :: cell, cell // 2 :: cell]
    return np.sqrt(cells).reshape(len(cells), -1)


def features(pictures: Pictures) -> Floats:
    """Unit vectors [N, D]; their inner product is the likeness, -1..1."""
    rows = []
    for start in range(0, len(pictures), 256):
        lab = to_lab(pictures[start : start + 256])
        parts = [
            each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-6)
            for each in (colours(lab), gradients(lab))
        ]
        rows.append(np.concatenate(parts, axis=1) / np.sqrt(2))
    return np.concatenate(rows).astype(np.float32)


# ---- judging ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An object in a style: what a picture should show."""

    object: str
    style: str


@dataclass(frozen=True)
class Seen:
    """Pictures compared with a gallery: the best likeness of each object [N, O], and each one's nearest picture [N]."""

    best: Floats
    nearest: NDArray[np.int64]


class Gallery:
    """The pictures that others are looked up among.

    Args:
        pictures: [M, 64, 64, 3].
        pairs: what each shows.
    """

    def __init__(self, pictures: Pictures, pairs: Sequence[Pair]) -> None:
        self.pairs, self.features = list(pairs), features(pictures)
        self.objects = list(dict.fromkeys(pair.object for pair in pairs))
        self._column = {name: column for column, name in enumerate(self.objects)}
        self._of = np.array([self._column[pair.object] for pair in pairs])

    def look(self, seen: Floats, allowed: Callable[[int, Pair], bool] | None = None) -> Seen:
        """Compare features [N, D] with all pictures, or with those that are ``allowed`` for query i."""
        likeness = seen @ self.features.T
        if allowed is not None:
            keep = [[allowed(row, pair) for pair in self.pairs] for row in range(len(seen))]
            likeness = np.where(keep, likeness, -2)
        best = np.full((len(seen), len(self.objects)), -2, np.float32)
        np.maximum.at(best.T, self._of, likeness.T)
        return Seen(best, likeness.argmax(1))

    def marks(self, seen: Seen, wanted: Sequence[Pair]) -> NDArray[np.float64]:
        """[N, 4] of 0 and 1: object first, object among five, style of the nearest, its object and style both."""
        rows = []
        for best, nearest, pair in zip(seen.best, seen.nearest, wanted, strict=True):
            rank = int((best > best[self._column[pair.object]]).sum())
            found = self.pairs[nearest]
            rows.append((rank < 1, rank < 5, found.style == pair.style, found == pair))
        return np.array(rows, np.float64)

    def distance(self, seen: Floats, wanted: Sequence[Pair]) -> float:
        """Mean distance to the picture of the wanted pair."""
        place = {pair: row for row, pair in enumerate(self.pairs)}
        own = self.features[[place[pair] for pair in wanted]]
        return round(float(1 - (seen * own).sum(1).mean()), 4)


def interval(marks: NDArray[np.float64], groups: Sequence[str], rounds: int = 2000) -> list[list[float]]:
    """Means of the columns of [N, K] with the 95 % bootstrap interval, in percent; whole groups are drawn again."""
    names, of = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), marks.shape[1]))
    np.add.at(sums, of, marks)
    sizes = np.bincount(of)
    drawn = np.random.default_rng(0).integers(0, len(names), (rounds, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)[:, None]
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return (100 * np.stack([marks.mean(0), low, high], axis=1)).round(1).tolist()


def report(marks: NDArray[np.float64], wanted: Sequence[Pair]) -> dict[str, Any]:
    """A row of a table."""
    values = interval(marks, [pair.object for pair in wanted])
    return {
        "pictures": len(marks),
        **dict(zip(("object", "five", "style", "both"), values, strict=True)),
    }


def validate(
    gallery: Gallery, real: Pictures, rebuilt: Pictures, others: tuple[Pictures, list[Pair]]
) -> dict[str, Any]:
    """What the feature space sees when the answer is known; no drawn picture takes part."""
    pairs = gallery.pairs
    moved = np.pad(real, ((0, 0), (3, 0), (0, 3), (0, 0)), mode="edge")[:, :-3, 3:]
    rows = {}
    for name, pictures in (("rebuilt", rebuilt), ("moved", moved)):
        rows[name] = report(gallery.marks(gallery.look(features(pictures)), pairs), pairs)
    across = gallery.look(gallery.features, lambda row, pair: pair.style != pairs[row].style)
    rows["across"] = report(gallery.marks(across, pairs), pairs)
    foreign, names = others
    rows["foreign"] = report(gallery.marks(gallery.look(features(foreign)), names), names)
    for name in (
        "across",
        "foreign",
    ):  # the picture's own style is no candidate, so there is no style to find
        rows[name].update(style=None, both=None)
    rows["rebuilt"]["distance"] = gallery.distance(features(rebuilt), pairs)
    return rows


def shuffled(gallery: Gallery, seen: Seen, wanted: Sequence[Pair], rounds: int = 100) -> dict[str, Any]:
    """The same pictures judged against the prompt of another picture of another object."""
    order, marks, groups = random.Random(0), [], []
    for _ in range(rounds):
        given = order.sample(wanted, len(wanted))
        keep = [row for row, (a, b) in enumerate(zip(given, wanted, strict=True)) if a.object != b.object]
        marks.append(gallery.marks(Seen(seen.best[keep], seen.nearest[keep]), [given[row] for row in keep]))
        groups += [wanted[row] for row in keep]
    return report(np.concatenate(marks), groups) | {"pictures": len(wanted)}


# ---- drawing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A picture to draw; the same drawing by the same code has the same picture."""

    prompt: str
    seed: int
    guidance: float
    steps: int = 20
    solver: str = "dpmpp-2m"


class Drawer:
    """Draws in chunks, each kept in a file, so that nothing is drawn twice."""

    def __init__(self, model: Model, root: Path, bar: Progress) -> None:
        self.model, self.bar = model, bar
        self.root = root / model.files[0].sha256[:16]
        self.root.mkdir(parents=True, exist_ok=True)
        self.settings = (source_digest(), str(model.dtype), torch.get_num_threads(), torch.__version__)
        self.seconds, self.drawn = 0.0, 0

    def __call__(self, title: str, wanted: Sequence[Drawing]) -> tuple[Pictures, float]:
        """The pictures [N, 64, 64, 3], and seconds a picture."""
        task = self.bar.add_task(title, total=len(wanted))
        pictures, seconds = [], 0.0
        for start in range(0, len(wanted), CHUNK):
            some = wanted[start : start + CHUNK]
            made, took = self._chunk(some)
            pictures.append(made)
            seconds += took
            self.bar.advance(task, len(some))
        self.seconds, self.drawn = self.seconds + seconds, self.drawn + len(wanted)
        return np.concatenate(pictures), seconds / len(wanted)

    def _chunk(self, wanted: Sequence[Drawing]) -> tuple[Pictures, float]:
        text = json.dumps([self.settings, [asdict(each) for each in wanted]])
        path = self.root / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
        if not path.is_file():
            made, seconds = self._draw(wanted)
            half = path.with_suffix(".part.npz")
            np.savez(half, pictures=made, seconds=seconds)
            half.replace(path)
        with np.load(path) as kept:
            return kept["pictures"], float(kept["seconds"])

    def _draw(self, wanted: Sequence[Drawing]) -> tuple[Pictures, float]:
        began = time.perf_counter()
        engine = Engine(self.model, mode="fast", most_rows=2 * CHUNK)
        jobs = [engine.submit(make_request(**asdict(each))) for each in wanted]
        found: dict[int, NDArray[np.uint8]] = {}
        for event in engine.events():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                found[event.job] = np.asarray(event.picture)
        return np.stack([found[job] for job in jobs]), time.perf_counter() - began


def source_digest() -> str:
    """Of all code that a picture depends on."""
    root = Path(sumuk.__file__).parent
    files = (
        file for part in ("diffusion", "nets", "generate") for file in sorted((root / part).glob("*.py"))
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def ask(record: Record, language: str, guidance: float) -> Drawing:
    """The record's first caption, with a seed that depends on its object and style alone."""
    digest = hashlib.sha256(f"{record.object} {record.style}".encode()).digest()
    return Drawing(record.captions[language][0], int.from_bytes(digest[:4]), guidance)


def choose(records: Sequence[Record], count: int) -> tuple[list[str], list[Record], list[Record]]:
    """Objects in a fixed shuffled order, about ``count`` trained pairs of the first ones, and all held-out pairs."""
    order = sorted({record.object for record in records})
    random.Random(0).shuffle(order)
    ranked = sorted(records, key=lambda record: (order.index(record.object), record.style))
    trained = [record for record in ranked if record.split == "train"]
    return order, trained[:count], [record for record in ranked if record.split != "train"]


# ---- sheets ----------------------------------------------------------------------------------------------------

GREEN, AMBER, RED = (46, 139, 87), (230, 159, 0), (192, 57, 43)


@dataclass(frozen=True)
class Tile:
    """A picture on a sheet; the bar under it says how it was judged."""

    picture: NDArray[np.uint8]
    colour: tuple[int, int, int] | None = None


def verdict(marks: NDArray[np.float64]) -> tuple[int, int, int]:
    return GREEN if marks[0] else AMBER if marks[1] else RED


def sheet(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Tile | None]]], legend: str, blocks: int = 2
) -> Image.Image:
    """Rows of pictures with a name each, in blocks side by side under the same column heads."""
    font, side, label, head, gap = ImageFont.load_default(11), 64, 112, 18, 6
    deep = -(-len(rows) // blocks)
    block = label + len(heads) * (side + gap) + 2 * gap
    image = Image.new("RGB", (blocks * block, head + deep * (side + gap + 3) + 2 * head), "white")
    pen = ImageDraw.Draw(image)
    for index, (name, tiles) in enumerate(rows):
        left, top = index // deep * block, head + index % deep * (side + gap + 3)
        if index % deep == 0:
            for column, text in enumerate(heads):
                pen.text(
                    (left + label + column * (side + gap) + side / 2, head / 2),
                    text,
                    "black",
                    font,
                    anchor="mm",
                )
        lines = wrapped(name, 19)
        for line, text in enumerate(lines):
            pen.text(
                (left + gap, top + side / 2 + 13 * (line - (len(lines) - 1) / 2)),
                text,
                "black",
                font,
                anchor="lm",
            )
        for column, tile in enumerate(tiles):
            if tile is not None:
                x = left + label + column * (side + gap)
                image.paste(Image.fromarray(tile.picture), (x, top))
                if tile.colour:
                    pen.rectangle((x, top + side + 1, x + side - 1, top + side + 3), tile.colour)
    pen.text((gap, image.height - head), legend, "black", font, anchor="lm")
    return image


def wrapped(text: str, width: int) -> list[str]:
    """Words in lines of at most ``width`` letters where words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= width or not lines[-1] else [*lines, word]
    return lines


# ---- measuring -------------------------------------------------------------------------------------------------


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


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    return [Pair(record.object, record.style) for record in records]


def rebuild(model: Model, pictures: Pictures) -> Pictures:
    """Through the autoencoder and back."""
    made = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 32):
            pixels = torch.from_numpy(pictures[start : start + 32]).permute(0, 3, 1, 2) / 127.5 - 1
            back = model.decode_latent(model.encode_latent(pixels.to(model.device))).float().cpu()
            made.append(((back.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(made)


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


# ---- the page --------------------------------------------------------------------------------------------------

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


# ---- the run ---------------------------------------------------------------------------------------------------


def describe_model(model: Model, out: Path) -> dict[str, Any]:
    saves = sorted(out.glob("state-*/manifest.json"))
    run = json.loads(saves[-1].read_text("utf-8")) if saves else None
    return {
        "sha256": model.files[0].sha256,
        "bytes": model.files[0].path.stat().st_size,
        "parameters": {
            title: sum(p.numel() for p in model.parts[part].parameters())
            for part, title in (("denoiser", "U-Net"), ("vae", "autoencoder"), ("text", "text tower"))
        },
        "guidance": model.defaults.guidance,
        "training": run and {"images": run["images"], "hours": round(run["seconds"] / 3600, 2)},
    }


def machine(model: Model) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/miniature.py", *sys.argv[1:]]),
        "cpu": named[0] if named else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
