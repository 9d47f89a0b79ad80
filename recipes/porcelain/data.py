"""The pictures of the porcelain LoRA: those of the miniature, painted over in cobalt blue on white (청화백자).

    python recipes/porcelain/data.py --of build/miniature/data --out build/porcelain/data

Each picture becomes shades of one blue: deep where it was dark or colourful, white where it was light. Prompts are the
same, so that what a model learns from them is the manner alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

BLUE = np.array([20.0, 60.0, 170.0])


def paint(picture: Image.Image) -> Image.Image:
    """A picture on white as blue on white, of the same size."""
    rgb = np.asarray(picture.convert("RGB"), np.float64) / 255
    grey = rgb @ np.array([0.3, 0.55, 0.15])
    colour = rgb.max(axis=2) - rgb.min(axis=2)
    amount = np.clip(1.0 - grey + 0.2 * colour, 0.0, 1.0)[..., None]
    return Image.fromarray((255 * (1 - amount) + BLUE * amount).round().astype(np.uint8))


def main() -> None:
    """Paint everything that the miniature was trained on, and write the list anew."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--of", type=Path, default=Path("build/miniature/data"))
    arguments.add_argument("--out", type=Path, default=Path("build/porcelain/data"))
    chosen = arguments.parse_args()
    lines = []
    for line in track((chosen.of / "captions.jsonl").read_text("utf-8").splitlines(), "painting"):
        record = json.loads(line)
        if record["style"] not in ("3d", "flat"):
            continue
        target = chosen.out / record["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(chosen.of / record["file"]) as picture:
            paint(picture).save(target)
        lines.append(line)
    (chosen.out / "captions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
