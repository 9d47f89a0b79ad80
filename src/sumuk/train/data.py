"""Captioned pictures from a folder, in an order that depends only on (seed, images seen).

The folder holds ``captions.jsonl``, one picture a line::

    {"file": "images/3d/1f98a.png", "object": "1f98a", "style": "3d", "split": "train",
     "captions": {"en": ["a fox, 3d"], "ko": ["여우, 3d"]}}

``split`` other than "train" is held out. Nothing is skipped silently: a line without a picture is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput, MissingFile, nearest
from sumuk.train.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Record:
    """One captioned picture."""

    file: str
    object: str
    style: str
    split: str
    captions: dict[str, tuple[str, ...]]
    """Language -> prompts that describe the picture."""


def read_records(config: DataConfig) -> list[Record]:
    """Every record of the folder that the configuration selects, held-out ones included.

    Raises:
        MissingFile: no ``captions.jsonl``, or no object list where the configuration names one.
        BadFile: a line that is no record, by its number.
        BadInput: a style that no picture has, or a selection that leaves nothing to train on.
    """
    index = config.root / "captions.jsonl"
    if not index.is_file():
        raise MissingFile(
            f"no captions.jsonl in {config.root}; build the data set first (recipes/miniature/README.md)"
        )
    wanted: set[str] | None = None
    if config.objects is not None:
        if not config.objects.is_file():
            raise MissingFile(f"no object list at {config.objects}")
        lines = config.objects.read_text("utf-8").splitlines()
        wanted = {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}
    records, styles = [], set()
    for number, line in enumerate(index.read_text("utf-8").splitlines(), start=1):
        try:
            record = _record(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(f"{index} line {number}: {error!r}", "captions") from None
        styles.add(record.style)
        styled = not config.styles or record.style in config.styles
        if styled and (wanted is None or record.object in wanted):
            records.append(record)
    for style in config.styles:
        if style not in styles:
            raise BadInput(f"no picture in {config.root} has the style {style!r}{nearest(style, styles)}")
    if not any(record.split == "train" for record in records):
        held = f"all {len(records)} are held out" if records else "the object list selects none"
        raise BadInput(f"no picture in {config.root} is left to train on: {held}")
    return records


def _record(entry: Any) -> Record:
    captions = entry["captions"]
    if not isinstance(captions, dict) or not captions:
        raise ValueError(f"captions are {captions!r:.40}, not a table of languages")
    for tongue, texts in captions.items():
        # One text in place of a list would pass as a list of its letters.
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"captions in {tongue!r} are {texts!r:.40}, not a list of prompts")
    return Record(
        file=entry["file"],
        object=entry["object"],
        style=entry["style"],
        split=entry["split"],
        captions={tongue: tuple(texts) for tongue, texts in captions.items()},
    )


def read_pixels(root: Path, records: Sequence[Record], size: int) -> Tensor:
    """The pictures as uint8 [N, 3, size, size], resized with Lanczos's filter.

    Raises:
        MissingFile, BadFile: a picture is absent; it cannot be read.
    """
    stack = np.empty((len(records), size, size, 3), np.uint8)
    for row, record in enumerate(records):
        path = root / record.file
        if not path.is_file():
            raise MissingFile(f"{root / 'captions.jsonl'} names {record.file}, which does not exist")
        try:
            with Image.open(path) as image:
                stack[row] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
        except OSError as error:
            raise BadFile(f"{path} is not a picture that can be read: {error}", "picture") from None
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, the range that autoencoders work in."""
    return pixels.float() / 127.5 - 1.0


class Order:
    """An endless shuffled order over ``count`` items: a new permutation each epoch, addressed by images seen.

    Holding no state, it resumes by construction: the batch at 12,000 images is the same batch on any day.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def at(self, images: int) -> int:
        """The index of the item that is seen after ``images`` others."""
        epoch, place = divmod(images, self.count)
        if epoch != self._epoch:
            generator = seeded(self.seed, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=generator)
        return int(self._permutation[place])

    def batch(self, images: int, size: int) -> list[int]:
        return [self.at(images + offset) for offset in range(size)]


def seeded(seed: int, position: int) -> torch.Generator:
    """A CPU generator that depends on the run's seed and a position, and on nothing else."""
    words = np.random.SeedSequence([seed, position]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
