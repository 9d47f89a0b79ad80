"""What some models see beside the latent: masks, masked pictures, pictures to edit, depth maps.

A family names them in order (``Family.beside``); each is a function from the request to channels [1, K, h, w].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sumuk.base.registry import Registry
from sumuk.generate.pixels import to_mask, to_pixels
from sumuk.generate.request import Request
from sumuk.weights.model import Model

Beside = Callable[[Model, Request, int, int], Tensor]
"""(model, request, width, height in pixels) -> channels [1, K, h, w]."""

BESIDE: Registry[Beside] = Registry("channels beside the latent")


def channels(model: Model, request: Request, width: int, height: int) -> Tensor | None:
    """Everything that the model's family wants beside the latent, [1, K, h, w]; None if it wants nothing."""
    rows = [BESIDE[name](model, request, width, height) for name in model.family.beside]
    return torch.cat(rows, dim=1) if rows else None


def latent(model: Model, pixels: Tensor) -> Tensor:
    """Pixels [1, 3, H, W] as the denoiser knows them, on the CPU in float32."""
    return model.encode_latent(pixels.to(model.device)).to("cpu", torch.float32)


def _picture(image: Image.Image | None, width: int, height: int) -> Tensor:
    assert image is not None  # settings refuse a request without it
    return to_pixels(image, width, height)


def _hole(request: Request, width: int, height: int) -> Tensor:
    """1 where the picture is drawn anew [1, 1, height, width]; everywhere without a mask."""
    if request.mask is None:
        return torch.ones(1, 1, height, width)
    return to_mask(request.mask, width, height).round()


def mask(model: Model, request: Request, width: int, height: int) -> Tensor:
    """Where to draw, in latent cells (SD 1 and 2 inpainting)."""
    cells = (model.latent.cells(height), model.latent.cells(width))
    return F.interpolate(_hole(request, width, height), cells, mode="nearest")


def masked(model: Model, request: Request, width: int, height: int) -> Tensor:
    """The latent of what is kept; grey where it is drawn anew."""
    return latent(model, _picture(request.init, width, height) * (1 - _hole(request, width, height)))


def unshuffled_mask(model: Model, request: Request, width: int, height: int) -> Tensor:
    """Where to draw, every pixel of a cell as a channel of its own (FLUX.1 Fill)."""
    return F.pixel_unshuffle(_hole(request, width, height), round(model.latent.stride))


def image(model: Model, request: Request, width: int, height: int) -> Tensor:
    """The unscaled latent of the picture to edit (Brooks et al. 2023)."""
    return latent(model, _picture(request.init, width, height)) / model.latent.scale


def control(model: Model, request: Request, width: int, height: int) -> Tensor:
    """The latent of the hint: edges or depth as a picture (FLUX.1 Canny and Depth)."""
    return latent(model, _picture(request.hint, width, height))


def depth(model: Model, request: Request, width: int, height: int) -> Tensor:
    """The hint as a depth map in -1..1, near is bright (SD 2 depth)."""
    cells = (model.latent.cells(height), model.latent.cells(width))
    grey = _picture(request.hint, width, height).mean(dim=1, keepdim=True)
    map_ = F.interpolate(grey, cells, mode="bicubic", align_corners=False)
    low, high = map_.amin(), map_.amax()
    return 2 * (map_ - low) / (high - low).clamp(min=1e-6) - 1


def low(model: Model, request: Request, width: int, height: int) -> Tensor:
    """The small picture with a little noise on it, a pixel a cell (x4 upscaler)."""
    cells = (model.latent.cells(width), model.latent.cells(height))
    picture = _picture(request.init, *cells)
    level = model.schedule.level(model.family.level if request.noise_level is None else request.noise_level)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(LOW_SEED))
    return level.alpha * picture + level.sigma * noise


LOW_SEED = 4
"""Of the noise on small pictures: the same for each, so that only a request's own seed changes what is drawn."""

for name, function in {
    "mask": mask,
    "masked": masked,
    "unshuffled-mask": unshuffled_mask,
    "image": image,
    "control": control,
    "depth": depth,
    "low": low,
}.items():
    BESIDE.add(name, function)
