"""Pictures to tensors and back; masks; what surrounds a mask is pasted back untouched."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from sumuk.generate.request import Request


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture as [1, 3, height, width] in -1..1, resized where it has another size; transparency over white."""
    array = np.asarray(flat(image).resize((width, height), Image.Resampling.LANCZOS), np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1)[None].contiguous()


def flat(image: Image.Image) -> Image.Image:
    """RGB, transparent parts over white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("RGB")


def to_image(pixels: Tensor) -> Image.Image:
    """[1, 3, H, W] in about -1..1 as a picture; values outside are clipped."""
    scaled = ((pixels[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).cpu().numpy())


def to_mask(mask: Image.Image, width: int, height: int, blur: float = 0.0) -> Tensor:
    """A mask as [1, 1, height, width] in 0..1, 1 where the picture is drawn anew."""
    grey = soften(mask, blur).resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(grey, np.float32) / 255.0)[None, None].contiguous()


def soften(mask: Image.Image, blur: float) -> Image.Image:
    """A mask in grey with a blurred edge (Gaussian radius in pixels)."""
    grey = mask.convert("L")
    return grey.filter(ImageFilter.GaussianBlur(blur)) if blur > 0 else grey


def keep_outside(drawn: Image.Image, request: Request) -> Image.Image:
    """Paste the init picture back where the mask is black, so that what was to be kept is kept to the bit."""
    if request.mask is None or request.init is None:
        return drawn
    size = drawn.size
    kept = (
        flat(request.init).resize(size, Image.Resampling.LANCZOS)
        if request.init.size != size
        else flat(request.init)
    )
    edge = soften(request.mask, request.mask_blur)
    return Image.composite(
        drawn, kept, edge.resize(size, Image.Resampling.BILINEAR) if edge.size != size else edge
    )
