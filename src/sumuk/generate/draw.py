"""One picture as a coroutine: prompt to context, noise to latent, latent to pixels.

It yields the rows that it wants from the network and the moves that it made; text to image, image to image, masks
and the second pass at a larger size are all the same walk down a grid, begun at different places.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sumuk.diffusion.grid import make_grid, part
from sumuk.diffusion.guidance import Conditions, Row, guided
from sumuk.diffusion.noise import BrownianPath, ImageNoise
from sumuk.diffusion.sample import Moved, sample
from sumuk.diffusion.solver import Ask
from sumuk.generate.pixels import to_mask, to_pixels
from sumuk.generate.settings import Settings
from sumuk.generate.text import Texts
from sumuk.weights.model import Model


@dataclass(frozen=True)
class Condition:
    """What a row tells the network beside x: text, an optional vector, channels that are put beside the latent."""

    context: Tensor
    """[1, L, D]"""
    vector: Tensor | None = None
    """[1, V]"""
    channels: Tensor | None = None
    """[1, K, h, w]: mask and masked picture of inpainting models."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with equal keys can share a forward."""
        return tuple(
            None if each is None else each.shape for each in (self.context, self.vector, self.channels)
        )

    def widen(self, x: Tensor) -> Tensor:
        return x if self.channels is None else torch.cat([x, self.channels], dim=1)

    @staticmethod
    def stack(
        some: Sequence[Condition], device: torch.device | str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Contexts and vectors of rows with equal keys, as the network takes them."""
        context = torch.cat([each.context for each in some]).to(device, dtype)
        vectors = [each.vector for each in some if each.vector is not None]
        return context, torch.cat(vectors).to(device, dtype) if vectors else None


def draw(model: Model, settings: Settings, image: int) -> Generator[list[Row] | Moved, Any, Tensor]:
    """Draw picture ``image`` of a request.

    Yields:
        Lists of rows, to be answered with the network's raw outputs in their order, and moves.

    Returns:
        Pixels [1, 3, H, W], about -1..1.
    """
    request = settings.request
    walk = _Walk(model, settings, (settings.seed + image) % 2**64)
    known = None
    if request.init is not None:
        pixels = to_pixels(request.init, settings.width, settings.height)
        known = model.encode_latent(pixels.to(model.device)).to("cpu", torch.float32)
    latent = yield from walk(settings.width, settings.height, known, request.strength, settings.steps)
    if request.hires is not None and settings.larger is not None:
        stride, hires = model.latent.stride, request.hires
        width, height = settings.larger
        larger = F.interpolate(
            latent, (height // stride, width // stride), mode="bicubic", align_corners=False, antialias=True
        )
        steps = hires.steps or settings.steps
        latent = yield from walk(width, height, larger, hires.strength, steps, base=settings.walked)
    return decode(model, latent)


def decode(model: Model, latent: Tensor) -> Tensor:
    """Latents to pixels [B, 3, H, W] on the CPU in float32."""
    return model.decode_latent(latent.to(model.device)).to("cpu", torch.float32)


@dataclass(frozen=True)
class _Walk:
    """A walk down a grid, from noise or from a known latent under noise."""

    model: Model
    settings: Settings
    seed: int

    def __call__(
        self,
        width: int,
        height: int,
        known: Tensor | None,
        strength: float,
        steps: int,
        base: int | None = None,
    ) -> Generator[list[Row] | Moved, Any, Tensor]:
        """Returns the latent [1, C, height / stride, width / stride]."""
        model, settings, request = self.model, self.settings, self.settings.request
        stride = model.latent.stride
        shape = (1, model.latent.channels, height // stride, width // stride)
        grid = make_grid(settings.grid, model.schedule, steps)
        if known is not None:
            grid = part(grid, strength)
        noise = ImageNoise(
            self.seed, shape, subseed=request.variation_seed, subseed_strength=request.variation
        )
        start, unit = grid[0], noise.initial()
        x = start.sigma * unit if known is None else start.alpha * known + start.sigma * unit
        mask = None
        if request.mask is not None:
            mask = to_mask(request.mask, width // stride, height // stride, request.mask_blur)
        channels = self._beside(width, height)
        path = BrownianPath(self.seed, shape) if settings.listing.noise == "brownian" else noise

        texts = Texts(model, settings, len(grid) - 1, base)

        def conditions(step: int) -> Conditions:
            wanted, negative = texts.at(step)
            return Conditions(
                tuple((Condition(context, channels=channels), weight) for context, weight in wanted),
                Condition(negative, channels=channels),
            )

        latent = yield from guided(
            sample(settings.make_solver(), x, grid, path),
            model.prediction,
            conditions,
            settings.guidance,
            steps=len(grid) - 1,
            amend=None if mask is None or known is None or self._fills else _keeper(known, mask),
        )
        return latent

    @property
    def _fills(self) -> bool:
        """Whether the model is an inpainting model, which keeps what is outside the mask by itself."""
        return self.model.denoiser.shape.in_channels == 2 * self.model.latent.channels + 1

    def _beside(self, width: int, height: int) -> Tensor | None:
        """What inpainting (9) and editing (8 channels) models see beside the latent [1, K, h, w]."""
        model, request = self.model, self.settings.request
        if request.init is None or model.denoiser.shape.in_channels == model.latent.channels:
            return None
        pixels = to_pixels(request.init, width, height)
        if not self._fills:  # instruct-pix2pix: the picture's unscaled latent
            return self._latent(pixels) / model.latent.scale
        hole = (
            to_mask(request.mask, width, height).round()
            if request.mask is not None
            else torch.ones(1, 1, height, width)
        )
        seen = self._latent(pixels * (1 - hole))
        return torch.cat([F.interpolate(hole, seen.shape[-2:], mode="nearest"), seen], dim=1)

    def _latent(self, pixels: Tensor) -> Tensor:
        return self.model.encode_latent(pixels.to(self.model.device)).to("cpu", torch.float32)


def _keeper(known: Tensor, mask: Tensor) -> Callable[[Tensor, Ask], Tensor]:
    """Holds every clean estimate to the known latent where the mask is black."""
    return lambda clean, ask: mask * clean + (1 - mask) * known
