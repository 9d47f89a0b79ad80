"""Build the miniature's captioned pictures from openly licensed icon sets.

``python recipes/miniature/data.py --out build/miniature/data``

Packages are fetched by the ordinary npm client at pinned versions, checked against their SHA-256, and
read without being unpacked or run. A picture is the icon on white, 128 x 128: drawn (SVG) or decoded
(WebP) at 256 x 256, scaled about the centre of its canvas so that the usual icon of each style spans
seven eighths of the frame, then reduced by Lanczos. Relative sizes inside a style stay as its designers
made them. Words and hold-out: ``captioning.py``.

Nothing is dropped silently: every exclusion has a rule, every missing picture a name (``report.json``,
the table).
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import resvg_py
from captioning import (
    DEFAULT_STYLES,
    LANGUAGES,
    STYLES,
    Named,
    claim_words,
    held_out,
    prompts,
    read_objects,
    read_words,
    select,
)
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sources import (
    DERIVED,
    GROUPS,
    NAMES,
    SETS,
    BuildError,
    Entry,
    fetch,
    read_entries,
    read_names,
    read_pictures,
)

HERE = Path(__file__).parent
SIDE = 128
DRAWN = 256


def draw(data: bytes, scale: float) -> Image.Image:
    """An icon on white: RGB, 128 x 128."""
    if data[:4] == b"RIFF":
        icon = Image.open(io.BytesIO(data)).convert("RGBA")
    else:
        text = data.decode()
        drawn = resvg_py.svg_to_bytes(svg_string=text, width=DRAWN, height=DRAWN, skip_system_fonts=True)
        icon = Image.open(io.BytesIO(drawn)).convert("RGBA")
    side = round(DRAWN * scale)
    if icon.size != (side, side):
        # Pillow resizes RGBA with premultiplied alpha, so transparent pixels lend no colour to the edge.
        icon = icon.resize((side, side), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (DRAWN, DRAWN), "white")
    corner = (DRAWN - side) // 2
    page.alpha_composite(icon, (corner, corner))
    return page.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write(path: Path, data: bytes) -> None:
    """Write the whole file or nothing: a training run may be reading the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def contact_sheet(root: Path, records: Iterable[Mapping[str, Any]], path: Path, seed: int = 0) -> None:
    """A hundred random pictures, ten by ten, for the eye."""
    files = [record["file"] for record in records]
    sheet = Image.new("RGB", (10 * SIDE, 10 * SIDE), "white")
    for place, file in enumerate(random.Random(seed).sample(files, min(100, len(files)))):
        with Image.open(root / file) as picture:
            sheet.paste(picture, (place % 10 * SIDE, place // 10 * SIDE))
    sheet.save(path)


class Builder:
    """One build: what is kept, what it is called, and what went wrong, by name."""

    def __init__(self, out: Path, cache: Path, styles: tuple[str, ...]) -> None:
        self.out, self.cache, self.styles = out, cache, styles
        self.console = Console()
        self.missing: dict[str, list[str]] = {}
        self.failed: dict[str, list[str]] = {}

    def catalogue(self) -> None:
        """Read the lists and settle the words of every object."""
        entries, self.left_out = read_entries(fetch(GROUPS, self.cache))
        archives = fetch(NAMES, self.cache), fetch(DERIVED, self.cache)
        cldr = {language: read_names(*archives, language) for language in LANGUAGES}
        nameless = [e.object for e in entries if any(e.object not in cldr[tongue] for tongue in LANGUAGES)]
        named = [
            Named(
                entry.object,
                entry.subgroup,
                {tongue: cldr[tongue][entry.object] for tongue in LANGUAGES},
            )
            for entry in entries
            if entry.object not in nameless
        ]
        table = read_words((HERE / "words.txt").read_text("utf-8"))
        strangers = sorted(set(table) - {one.object for one in named})
        if strangers:
            raise BuildError(f"words.txt names {', '.join(strangers)}, which the set does not have")
        self.words = claim_words(named, table)
        self.names = {one.object: dict(one.name) for one in named}
        wordless = [code for code, words in self.words.items() if not all(words.values())]
        for rule, codes in (("no CLDR name", nameless), ("no word of its own", wordless)):
            self.left_out[rule] = len(codes)
            self.missing[rule] = [self.label(code) for code in codes]
        self.entries = [e for e in entries if e.object not in {*nameless, *wordless}]

    def label(self, code: str) -> str:
        """An object as reports name it."""
        return f"{code} {self.names.get(code, {}).get('en', '')}".strip()

    def record(self, entry: Entry, style: str, available: list[str]) -> dict[str, Any]:
        """One line of ``captions.jsonl``."""
        words = self.words[entry.object]
        return {
            "file": f"images/{style}/{entry.object}.png",
            "object": entry.object,
            "emoji": entry.emoji,
            "style": style,
            "group": entry.group,
            "subgroup": entry.subgroup,
            "name": self.names[entry.object],
            "captions": {tongue: prompts(words[tongue], style, tongue) for tongue in LANGUAGES},
            "split": "held-out" if held_out(entry.object, style, available) else "train",
        }

    def build(self) -> list[dict[str, Any]]:
        """Draw everything, the default styles first: ``READY`` appears once their selection is complete."""
        self.catalogue()
        wanted = {entry.object for entry in self.entries}
        pictures = {
            style: read_pictures(SETS[style], fetch(SETS[style].package, self.cache), wanted)
            for style in self.styles
        }
        available = {code: [style for style in self.styles if code in pictures[style]] for code in wanted}
        records: list[dict[str, Any]] = []
        for style in self.styles:
            drawn = list(self.render(style, pictures[style], available))
            records += drawn
            contact_sheet(self.out, drawn, self.out.parent / f"sheet_{style}.png")
            if set(DEFAULT_STYLES) <= {record["style"] for record in records}:
                self.publish(records)
        self.publish(records)
        return records

    def render(
        self, style: str, pictures: Mapping[str, bytes], available: Mapping[str, list[str]]
    ) -> Iterator[dict[str, Any]]:
        """Draw a style, yielding the records of the pictures that were written."""
        withheld = SETS[style].withheld
        self.missing[style] = [
            self.label(e.object) + (" (withheld: no licence)" if e.object in withheld else "")
            for e in self.entries
            if e.object not in pictures
        ]
        self.failed[style] = []
        for entry in track(self.entries, f"drawing {style}", console=self.console):
            if entry.object not in pictures:
                continue
            record = self.record(entry, style, available[entry.object])
            try:
                picture = draw(pictures[entry.object], SETS[style].scale)
            except (ValueError, OSError, RuntimeError) as error:
                self.failed[style].append(f"{self.label(entry.object)}: {error}")
                continue
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            write(self.out / record["file"], stream.getvalue())
            yield record

    def publish(self, records: list[dict[str, Any]]) -> None:
        """Write the captions, and ``READY`` once every object of ``objects.txt`` has its default styles."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write(self.out / "captions.jsonl", lines.encode())
        listed = read_objects((HERE / "objects.txt").read_text("utf-8"))
        built = {record["style"] for record in records}
        if not set(DEFAULT_STYLES) <= built:
            return
        chosen = {(r["object"], r["style"]) for r in select(records, DEFAULT_STYLES, objects=set(listed))}
        lacking = [f"{code} {s}" for code in listed for s in DEFAULT_STYLES if (code, s) not in chosen]
        if lacking:
            raise BuildError(f"objects.txt lists what has no picture: {', '.join(lacking)}; take it off")
        styles = ", ".join(style for style in STYLES if style in built)
        write(self.out / "READY", f"{len(listed)} objects, {styles}\n".encode())

    def report(self, records: list[dict[str, Any]]) -> None:
        """Print what was found, left out and missing; keep the names in ``report.json``."""
        packages = [GROUPS, NAMES, DERIVED, *(SETS[style].package for style in self.styles)]
        split = Counter((record["style"], record["split"]) for record in records)
        counts = {s: {k: split[s, k] for k in ("train", "held-out")} for s in self.styles}
        facts = {
            "packages": [asdict(package) for package in packages],
            "objects": len(self.entries),
            "left out": dict(self.left_out),
            "pictures": counts,
            "missing": self.missing,
            "failed": self.failed,
        }
        write(self.out / "report.json", json.dumps(facts, ensure_ascii=False, indent=1).encode())
        table = Table("what", "count", title=f"miniature data in {self.out}")
        table.add_row("objects kept", str(len(self.entries)))
        for rule, count in sorted(self.left_out.items()):
            table.add_row(f"left out: {rule}", str(count))
        for style in self.styles:
            table.add_row(f"{style}: in training", str(counts[style]["train"]))
            table.add_row(f"{style}: held out", str(counts[style]["held-out"]))
            table.add_row(f"{style}: missing", str(len(self.missing[style])))
            table.add_row(f"{style}: failed", str(len(self.failed[style])))
        self.console.print(table)
        for rule in ("no CLDR name", "no word of its own"):
            if self.missing[rule]:
                self.console.print(f"{rule}: {', '.join(self.missing[rule])}")
        for style in self.styles:
            for kind, names in (("missing", self.missing[style]), ("failed", self.failed[style])):
                if names:
                    self.console.print(f"{style} {kind}: {', '.join(names)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the miniature's captioned pictures.")
    parser.add_argument("--out", type=Path, default=Path("build/miniature/data"))
    parser.add_argument("--cache", type=Path, default=Path("build/miniature/cache"))
    parser.add_argument("--styles", default=",".join(STYLES), help="comma-separated; default: %(default)s")
    given = parser.parse_args()
    asked = given.styles.split(",")
    unknown = [style for style in asked if style not in STYLES]
    if unknown:
        parser.error(f"unknown style {unknown[0]!r}; known: {', '.join(STYLES)}")
    builder = Builder(given.out, given.cache, tuple(style for style in STYLES if style in asked))
    try:
        builder.report(builder.build())
    except (BuildError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
