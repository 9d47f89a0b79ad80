"""Sheets: rows of small pictures with a name each, and a bar under each that says how it was judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

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
