"""One picture as a coroutine: prompt to context, noise to latent, latent to pixels.

It yields the rows that it wants from the network and the moves that it made; text to image, image to image, masks
and the second pass at a larger size are all the same walk down a grid, begun at different places.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
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
from sumuk.families.reading import Given, Sizes
from sumuk.generate.beside import channels
from sumuk.generate.beside import latent as to_latent
from sumuk.generate.pixels import to_mask, to_pixels
from sumuk.generate.settings import Settings
from sumuk.generate.text import Said, Texts
from sumuk.weights.model import Model


@dataclass(frozen=True)
class Condition:
    """What a row tells the network beside x and time."""

    inputs: Mapping[str, Tensor]
    """Each of batch 1, by the names of the network's ``forward``."""
    beside: Tensor | None = None
    """[1, K, h, w]: mask and masked picture of inpainting models, and the like."""
    network: str = "denoiser"
    """Which of the model's networks is asked."""
    options: tuple[tuple[str, Any], ...] = ()
    """Settings of the forward that hold for the whole batch (which layers to skip)."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with equal keys can share a forward."""
        shapes = tuple((name, value.shape) for name, value in self.inputs.items())
        return (self.network, shapes, None if self.beside is None else self.beside.shape, self.options)

    def widen(self, x: Tensor) -> Tensor:
        return x if self.beside is None else torch.cat([x, self.beside], dim=1)

    @staticmethod
    def stack(some: Sequence[Condition], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs of rows with equal keys, as the network takes them; numbers of a picture keep float32."""
        stacked: dict[str, Tensor] = {}
        for name in some[0].inputs:
            value = torch.cat([each.inputs[name] for each in some]).to(device)
            stacked[name] = value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
        return stacked


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
        known = to_latent(model, to_pixels(request.init, settings.width, settings.height))
    latent = yield from walk(settings.width, settings.height, known, request.strength, settings.steps)
    if request.hires is not None and settings.larger is not None:
        hires, (width, height) = request.hires, settings.larger
        cells = (model.latent.cells(height), model.latent.cells(width))
        larger = F.interpolate(latent, cells, mode="bicubic", align_corners=False, antialias=True)
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
        """Returns the latent [1, C, h, w]."""
        model, settings, request = self.model, self.settings, self.settings.request
        shape = (1, model.latent.channels, model.latent.cells(height), model.latent.cells(width))
        grid = make_grid(settings.grid, model.noise_for(width, height), steps)
        if known is not None:
            grid = part(grid, strength)
        noise = ImageNoise(
            self.seed, shape, subseed=request.variation_seed, subseed_strength=request.variation
        )
        start, unit = grid[0], noise.initial()
        x = start.sigma * unit if known is None else start.alpha * known + start.sigma * unit
        mask = None
        if request.mask is not None:
            mask = to_mask(request.mask, shape[-1], shape[-2], request.mask_blur)
        path = BrownianPath(self.seed, shape) if settings.listing.noise == "brownian" else noise

        conditions = _Conditions(model, settings, width, height, len(grid) - 1, base)
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
        return "masked" in self.model.family.beside


class _Conditions:
    """What each step of a pass is steered by; steps that read the same share one value."""

    def __init__(
        self, model: Model, settings: Settings, width: int, height: int, steps: int, base: int | None
    ) -> None:
        self._model, self._settings = model, settings
        request = settings.request
        self._sizes = Sizes(
            original=(height, width)
            if request.original is None
            else (request.original[1], request.original[0]),
            crop=(0, 0) if request.crop is None else (request.crop[1], request.crop[0]),
            target=(height, width),
        )
        self._texts = Texts(model, settings, steps, base)
        self._beside = channels(model, request, width, height)
        self._known: dict[int, Conditions] = {}

    def __call__(self, step: int) -> Conditions:
        first = self._texts.since(step)
        if first not in self._known:
            wanted, negative = self._texts.at(first)
            positive = tuple((self._condition(said, False), weight) for said, weight in wanted)
            self._known = {first: Conditions(positive, self._condition(negative, True))}
        return self._known[first]

    def _condition(self, texts: Said, negative: bool) -> Condition:
        given = Given(
            shape=self._model.denoiser.shape,
            sizes=self._sizes,
            texts=texts,
            negative=negative,
            guidance=self._settings.guidance_scale,
            label=self._settings.request.label,
        )
        return Condition(self._model.family.condition(given), beside=self._beside)


def _keeper(known: Tensor, mask: Tensor) -> Callable[[Tensor, Ask], Tensor]:
    """Holds every clean estimate to the known latent where the mask is black."""
    return lambda clean, ask: mask * clean + (1 - mask) * known
