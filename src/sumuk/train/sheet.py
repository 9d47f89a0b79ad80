"""Contact sheets: many pictures in one, to look at a run."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[N, 3, H, W] in -1..1 (values outside are clipped) -> N pictures."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(each) for each in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def tile(pixels: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """[N, 3, H, W] in -1..1 as one picture, row by row."""
    images = to_images(pixels)
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * (width + gap), place // columns * (height + gap)))
    return sheet
