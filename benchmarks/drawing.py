"""Pictures to judge: which are asked for, drawn in chunks and kept; and real ones through the autoencoder.

Drawn pictures are kept by the model's hash and by all code that they depend on, so a stopped run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.likeness import Pictures
from numpy.typing import NDArray
from rich.progress import Progress

import sumuk
from sumuk.generate.engine import Engine, Failed, Finished
from sumuk.generate.request import make_request
from sumuk.train.data import Record
from sumuk.weights.model import Model

CHUNK = 16
"""Pictures that are drawn and kept together; with guidance, 32 rows of one forward."""


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


def rebuild(model: Model, pictures: Pictures) -> Pictures:
    """Through the autoencoder and back."""
    made = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 32):
            pixels = torch.from_numpy(pictures[start : start + 32]).permute(0, 3, 1, 2) / 127.5 - 1
            back = model.decode_latent(model.encode_latent(pixels.to(model.device))).float().cpu()
            made.append(((back.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(made)
