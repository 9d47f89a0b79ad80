"""The picture check: how long it takes, and how often it is wrong about pictures that show nothing.

``python -m benchmarks.safety`` (two minutes on two cores, most of it drawing). It measures false alarms only: of
pictures that should be withheld there are none here, and none could be made with the miniature.
"""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sumuk.generate.api import miniature
from sumuk.generate.engine import Engine, Finished
from sumuk.generate.request import make_request
from sumuk.serve.safety import THRESHOLD, PictureCheck

OBJECTS = Path(__file__).parents[1] / "recipes" / "miniature" / "first-objects.txt"
SKIN = (
    "#ffe0bd",
    "#ffcd94",
    "#eac086",
    "#ffad60",
    "#8d5524",
    "#c68642",
    "#e0ac69",
    "#f1c27d",
    "#ffdbac",
    "#603913",
)
LEVELS = (0.2, 0.3, THRESHOLD, 0.8)
SIDES = (64, 512, 1024, 2048, 4096)
TIMES = 9


def drawn(count: int) -> Iterator[Image.Image]:
    """The miniature's pictures of objects that it knows, both styles, in a fixed shuffle."""
    lines = [line for line in OBJECTS.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    pairs = [f"{' '.join(line.split()[1:])}, {style}" for line in lines for style in ("3d", "flat")]
    random.Random(0).shuffle(pairs)
    engine = Engine(miniature(), mode="fast")
    for seed, prompt in enumerate(pairs[:count]):
        engine.submit(make_request(prompt=prompt, seed=seed, steps=12))
    for event in engine.events():
        if isinstance(event, Finished):
            yield event.picture


def blobs(source: random.Random) -> Image.Image:
    """Soft circles in the colours of skin."""
    image = Image.new("RGB", (512, 512), source.choice(SKIN))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, radius = source.randrange(512), source.randrange(512), source.randrange(20, 190)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=source.choice(SKIN))
    return image.filter(ImageFilter.GaussianBlur(12))


def sets() -> dict[str, list[Image.Image]]:
    """Pictures that show nothing to withhold, by name."""
    noise, source = np.random.default_rng(0), random.Random(0)
    white = [Image.fromarray(noise.integers(0, 256, (512, 512, 3), np.uint8)) for _ in range(50)]
    soft = [each.resize((8, 8)).resize((512, 512), Image.Resampling.BICUBIC) for each in white]
    flat = [Image.new("RGB", (512, 512), tuple(source.randrange(256) for _ in range(3))) for _ in range(50)]
    return {
        "the miniature's objects": list(drawn(200)),
        "white noise": white,
        "soft noise": soft,
        "one colour": flat,
        "one colour of skin": [Image.new("RGB", (512, 512), each) for each in SKIN],
        "soft circles in colours of skin": [blobs(source) for _ in range(50)],
    }


def png(image: Image.Image) -> bytes:
    """It as a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


async def main() -> None:
    """Print both tables."""
    check = PictureCheck()
    print("| pictures | number | largest score |" + "".join(f" from {level:g} |" for level in LEVELS))
    print("|---|--:|--:|" + "--:|" * len(LEVELS))
    for name, images in sets().items():
        scores = [await check.score(png(image)) for image in images]
        over = (sum(score >= level for score in scores) for level in LEVELS)
        print(f"| {name} | {len(scores)} | {max(scores):.2f} |" + "".join(f" {count} |" for count in over))
    print("\n| side | milliseconds of one core, median |\n|--:|--:|")
    for side in SIDES:
        print(f"| {side} | {1000 * await _seconds(check, side):.0f} |")


async def _seconds(check: PictureCheck, side: int) -> float:
    """Of the processor, so that other work on the machine does not count."""
    file = png(Image.linear_gradient("L").resize((side, side)).convert("RGB"))
    spent = []
    for _ in range(TIMES):
        began = time.process_time()
        await check.score(file)
        spent.append(time.process_time() - began)
    return sorted(spent)[TIMES // 2]


if __name__ == "__main__":
    asyncio.run(main())
