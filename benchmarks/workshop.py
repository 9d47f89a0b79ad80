"""The pictures of docs/files.md: LoRA, merging, types and embeddings on the miniature, drawn from what ships.

    python -m benchmarks.workshop          # writes docs/images/files-*.png, prints the figures of the page

Nothing but the package is needed: the second model of the merges is the miniature with its LoRA baked in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks.sheets import Tile, sheet
from PIL import Image

import sumuk
from sumuk.generate.api import MINIATURE
from sumuk.weights.convert import convert
from sumuk.weights.embedding import Embedding, write_embedding
from sumuk.weights.guests import with_guests
from sumuk.weights.lora_bake import bake_loras
from sumuk.weights.merge import merge
from sumuk.weights.model import Model

IMAGES = Path("docs/images")
LORA = MINIATURE.with_stem("porcelain")
PROMPTS = ("fox, flat", "a red heart, 3d style", "pizza, 3d", "apple, 3d")
SEED = 7


def tile(picture: Image.Image) -> Tile:
    return Tile(np.asarray(picture.convert("RGB")))


def save(name: str, heads: Sequence[str], rows: Mapping[str, Sequence[Image.Image]], legend: str) -> None:
    """A sheet, written to the documentation's images."""
    made = sheet(heads, [(title, [tile(each) for each in some]) for title, some in rows.items()], legend, 1)
    made.save(IMAGES / f"files-{name}.png", optimize=True)
    print(f"docs/images/files-{name}.png")


def drawn(model: Model, tail: str = "") -> list[Image.Image]:
    """Each prompt, all with the same seed."""
    return [sumuk.draw(f"{prompt}{tail}", model=model, seed=SEED) for prompt in PROMPTS]


def lora_sheet(plain: Model) -> None:
    """Strengths, windows and blocks of one LoRA."""
    worn = with_guests(plain, loras={"porcelain": LORA})
    tags = {
        "none": "",
        ":0.5": " <lora:porcelain:0.5>",
        ":1": " <lora:porcelain:1>",
        ":1.5": " <lora:porcelain:1.5>",
        ":-0.7": " <lora:porcelain:-0.7>",
        "first half": " <lora:porcelain:1:end=0.5>",
        "second half": " <lora:porcelain:1:start=0.5>",
    }
    columns = [drawn(worn, tag) for tag in tags.values()]
    rows = {prompt: [column[row] for column in columns] for row, prompt in enumerate(PROMPTS)}
    save("lora", list(tags), rows, "<lora:porcelain:...> on the miniature, seed 7")


def merge_sheet(folder: Path) -> None:
    """Ways between the miniature and itself with the LoRA baked in."""
    blue = folder / "blue.safetensors"
    bake_loras(MINIATURE, [(LORA, 1.2, None, None)], blue)
    ways = {
        "0.25": {"alpha": 0.25},
        "0.5": {"alpha": 0.5},
        "0.75": {"alpha": 0.75},
        "slerp 0.5": {"method": "slerp", "alpha": 0.5},
        "IN only": {"blocks": "IN*:1", "denoiser": 0.0, "text": 0.0, "vae": 0.0},
        "OUT only": {"blocks": "OUT*:1", "denoiser": 0.0, "text": 0.0, "vae": 0.0},
    }
    columns = [drawn(sumuk.load(MINIATURE))]
    for number, how in enumerate(ways.values()):
        out = folder / f"merged-{number}.safetensors"
        merge([MINIATURE, blue], out, **how)  # type: ignore[arg-type]
        columns.append(drawn(sumuk.load(out)))
    columns.append(drawn(sumuk.load(blue)))
    heads = ["A", *ways, "B"]
    rows = {prompt: [column[row] for column in columns] for row, prompt in enumerate(PROMPTS)}
    save("merge", heads, rows, "sumuk merge A B; A: the miniature, B: with the LoRA baked in, seed 7")


def type_sheet(folder: Path, plain: Model) -> None:
    """The same model in other types, and how far its pictures move."""
    kinds: dict[str, dict[str, str]] = {
        "bfloat16": {"dtype": "bfloat16"},
        "fp8-scaled": {"quantise": "fp8-scaled"},
        "fp8": {"quantise": "fp8"},
    }
    before = drawn(plain)
    columns, heads = [before], ["float16"]
    print(f"float16 (as shipped): {MINIATURE.stat().st_size / 1e6:.1f} MB")
    for name, how in kinds.items():
        out = folder / f"{name}.safetensors"
        done = convert(MINIATURE, out, **how)  # type: ignore[arg-type]
        pictures = drawn(sumuk.load(out, dtype="float32"))
        gaps = [
            np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))
            for a, b in zip(before, pictures, strict=True)
        ]
        far, mean = max(int(gap.max()) for gap in gaps), float(np.mean([gap.mean() for gap in gaps]))
        print(f"{name}: {done.after / 1e6:.1f} MB, pictures differ by {mean:.2f} of 255, at most {far}")
        columns.append(pictures)
        heads.append(name)
    rows = {prompt: [column[row] for column in columns] for row, prompt in enumerate(PROMPTS)}
    save("types", heads, rows, "one model in four types, seed 7")


def embedding_sheet(folder: Path, plain: Model) -> None:
    """A word that was made: the mean of two others' vectors."""
    rows: dict[str, list[Image.Image]] = {}
    for one, other in (("cat", "heart"), ("apple", "heart"), ("star", "cat")):
        a, b = (plain.text.embed(torch.tensor(plain.tokens.encode(word))) for word in (one, other))
        name = f"{one}-{other}"
        write_embedding(Embedding(name, {"text": (a + b) / 2}), folder / f"{name}.safetensors", plain.family)
        learnt = with_guests(plain, embeddings={name: folder / f"{name}.safetensors"})
        prompts = [f"{one}, 3d", f"embedding:{name}, 3d", f"{other}, 3d"]
        rows[f"{one} and {other}"] = [sumuk.draw(prompt, model=learnt, seed=SEED) for prompt in prompts]
    save("embedding", ["one word", "their mean", "the other"], rows, "embedding:NAME, 3d; seed 7")


def main() -> None:
    """Draw all sheets."""
    plain = sumuk.load(MINIATURE)
    lora_sheet(plain)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merge_sheet(folder)
        type_sheet(folder, plain)
        embedding_sheet(folder, plain)


if __name__ == "__main__":
    main()
