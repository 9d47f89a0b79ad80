"""A compare grid as files: a contact sheet with its labels, and the settings of each picture as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sumuk.serve.order import Job

WIDEST = 8192
"""Pixels of a sheet's side; larger pictures are made smaller to fit."""
GAP, SMALLEST = 12, 128
LONGEST = 300
"""Characters of a label that are looked at."""
PAPER, INK = "#faf9f5", "#1d1c1a"
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "NotoSansKR-Regular.otf",
    "NanumGothic.ttf",
    "/usr/share/fonts/truetype/nanum/NanumGothic.ttf",
    "AppleSDGothicNeo.ttc",
    "malgun.ttf",
    "DejaVuSans.ttf",
)
"""Looked for on the server's machine, those with Korean first; Pillow's own is the last."""


@dataclass
class Sheet:
    """A grid.

    Attributes:
        title: what is the same in all of it.
        across, down: what each axis is called (empty: there is none), and its values as they are shown.
        jobs: row by row; None: not taken in yet, or refused.
    """

    title: str
    across: tuple[str, list[str]]
    down: tuple[str, list[str]]
    jobs: list[list[Job | None]] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Every picture: its place, and what made it."""
        found = []
        for row, line in zip(self.down[1], self.jobs, strict=True):
            for column, job in zip(self.across[1], line, strict=True):
                result = job.results[0] if job is not None and job.results else None
                place = {
                    name: value for name, value in ((self.across[0], column), (self.down[0], row)) if name
                }
                made = {} if result is None else result.receipt.get("settings", {})
                about = {
                    "job": None if job is None else job.id,
                    "state": "refused" if job is None else job.state,
                    "settings": made,
                    "model": {} if result is None else result.receipt.get("model", {}),
                }
                found.append({"place": place, **about})
        return found


def as_json(sheet: Sheet) -> str:
    """The settings, whole."""
    told = {"title": sheet.title, "across": sheet.across, "down": sheet.down, "pictures": sheet.rows()}
    return json.dumps(told, ensure_ascii=False, indent=1)


def as_csv(sheet: Sheet) -> str:
    """The settings as a table: the axes first, then what every picture was made with."""
    rows = sheet.rows()
    names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    axes = [name for name in (sheet.across[0], sheet.down[0]) if name]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*axes, "job", "state", "model", *names])
    for row in rows:
        values = [row["settings"].get(name) for name in names]
        shown = [json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for v in values]
        place = [row["place"].get(name) for name in axes]
        cells = [*place, row["job"], row["state"], row["model"].get("title"), *shown]
        writer.writerow([_harmless(cell) for cell in cells])
    return "\ufeff" + file.getvalue()  # spreadsheets take it for UTF-8 then


def _harmless(cell: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def as_png(sheet: Sheet, files: list[list[Path | None]]) -> bytes:
    """The contact sheet.

    Args:
        sheet: with its labels.
        files: the pictures, row by row; None: there is none.
    """
    sizes = [_size(file) for line in files for file in line if file is not None]
    wide = max((width for width, _ in sizes), default=SMALLEST)
    high = max((height for _, height in sizes), default=SMALLEST)
    columns, rows = len(sheet.across[1]), len(sheet.down[1])
    scale = max(1.0, SMALLEST / wide)
    scale = min(scale, (WIDEST - 400) / (columns * (wide + GAP)), (WIDEST - 200) / (rows * (high + GAP)))
    cell = (max(1, round(wide * scale)), max(1, round(high * scale)))
    font = _font(max(13, min(30, cell[0] // 11)))
    labels = [_wrapped(each, font, cell[0]) for each in sheet.across[1]]
    beside = [_wrapped(each, font, max(160, cell[0])) for each in sheet.down[1]]
    title = _wrapped(sheet.title, font, columns * (cell[0] + GAP))
    left = GAP + max((_extent(each, font)[0] for each in beside), default=0) + (GAP if any(beside) else 0)
    top = GAP + _extent(title, font)[1] + 2 * GAP + max(_extent(each, font)[1] for each in labels)
    top += GAP if any(labels) else 0
    paper = Image.new("RGB", (left + columns * (cell[0] + GAP), top + rows * (cell[1] + GAP)), PAPER)
    pen = ImageDraw.Draw(paper)
    pen.multiline_text((left, GAP), title, INK, font)
    for place, label in enumerate(labels):
        across = left + place * (cell[0] + GAP) + cell[0] // 2
        pen.multiline_text((across, top - GAP), label, INK, font, anchor="md", align="center")
    for row, line in enumerate(files):
        down = top + row * (cell[1] + GAP)
        pen.multiline_text(
            (left - GAP, down + cell[1] // 2), beside[row], INK, font, anchor="rm", align="right"
        )
        for column, file in enumerate(line):
            corner = (left + column * (cell[0] + GAP), down)
            if file is None:
                pen.rectangle((*corner, corner[0] + cell[0] - 1, corner[1] + cell[1] - 1), outline="#cbc7bd")
                continue
            with Image.open(file, formats=("PNG",)) as image:
                shown = image.convert("RGB")
            shown = shown.resize(
                (max(1, round(shown.width * scale)), max(1, round(shown.height * scale))),
                Image.Resampling.LANCZOS,
            )
            paper.paste(
                shown, (corner[0] + (cell[0] - shown.width) // 2, corner[1] + (cell[1] - shown.height) // 2)
            )
    saved = io.BytesIO()
    paper.save(saved, "PNG")
    return saved.getvalue()


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file, formats=("PNG",)) as image:
        return image.size


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size, index=1 if name.endswith("CJK-Regular.ttc") else 0)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _extent(label: str, font: Any) -> tuple[int, int]:
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = pen.multiline_textbbox((0, 0), label, font)
    return (int(right - left) + 1, int(bottom - top) + 4) if label else (0, 0)


def _wrapped(label: str, font: Any, width: int) -> str:
    """A label in at most four lines of that many pixels."""
    lines: list[str] = []
    for word in label[:LONGEST].split():
        trial = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(trial) <= width:
            lines[-1] = trial
        else:
            lines.append(word)
    short = []
    for line in lines[:4]:
        while font.getlength(line) > width and len(line) > 1:
            line = line[:-2] + "…"
        short.append(line)
    if len(lines) > 4:
        short[-1] += " …"
    return "\n".join(short)
