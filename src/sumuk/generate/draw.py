"""One picture as a coroutine: prompt to context, noise to latent, latent to pixels.

It yields the rows that it wants from the network and the moves that it made; text to image, image to image, masks
and the second pass at a larger size are all the same walk down a grid, begun at different places.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sumuk.base.errors import MissingFile
from sumuk.diffusion.grid import make_grid, part
from sumuk.diffusion.guidance import Conditions, Row, guided
from sumuk.diffusion.noise import BrownianPath, ImageNoise
from sumuk.diffusion.sample import Moved, sample
from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import Ask
from sumuk.diffusion.solvers import SOLVERS
from sumuk.families.family import Family
from sumuk.families.reading import Given, Sizes
from sumuk.generate.beside import channels
from sumuk.generate.beside import latent as to_latent
from sumuk.generate.control import Steering, steerings
from sumuk.generate.ladder import Ladder
from sumuk.generate.pixels import to_mask, to_pixels
from sumuk.generate.request import Request
from sumuk.generate.settings import Settings
from sumuk.generate.text import Said, Texts
from sumuk.generate.wear import NOTHING, Outfit
from sumuk.memory.tiles import decode_tiled, encode_tiled
from sumuk.nets.clip_vision import clip_pixels
from sumuk.weights.model import Model, Stage

OVERLAP = 4
"""Of two tiles, where the autoencoder must work in some: this part of a side."""


@dataclass(frozen=True)
class Condition:
    """What a row tells the network beside x and time."""

    model: Model
    """Whose network is asked, with the guests that the picture was begun with."""
    inputs: Mapping[str, Tensor]
    """Each of batch 1, by the names of the network's ``forward``."""
    beside: Tensor | None = None
    """[1, K, h, w]: mask and masked picture of inpainting models, and the like."""
    network: str = "denoiser"
    """Which of the model's networks is asked."""
    options: tuple[tuple[str, Any], ...] = ()
    """Settings of the forward that hold for the whole batch (which layers to skip)."""
    steered: tuple[Steering, ...] = ()
    """ControlNets at work."""
    outfit: Outfit = NOTHING
    """LoRAs and hypernetworks at work."""

    @property
    def networks(self) -> list[Any]:
        """Everything that answers: the network that is asked, then its controls."""
        controls = self.model.controls
        return [self.model.network(self.network), *(controls[s.steer.control].network for s in self.steered)]

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with equal keys can share a forward."""
        shapes = tuple((name, value.shape) for name, value in self.inputs.items())
        beside = None if self.beside is None else self.beside.shape
        guests = (tuple(each.key for each in self.steered), self.outfit.key)
        return (*self.networks, self.network, shapes, beside, self.options, *guests)

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


def draw(
    model: Model, settings: Settings, image: int, ladder: Ladder | None = None
) -> Generator[list[Row] | Moved, Any, Tensor]:
    """Draw picture ``image`` of a request; where memory is full by what ``ladder`` knows to do.

    Yields:
        Lists of rows, to be answered with the network's raw outputs in their order, and moves.

    Returns:
        Pixels [1, 3, H, W], about -1..1.
    """
    request, ladder = settings.request, ladder or Ladder()
    first, *later = model.stages
    walk = _Walk(model, settings, ladder, first, (settings.seed + image) % 2**64)
    known = None
    if request.init is not None and "low" not in model.family.beside:
        known = _encoded(model, to_pixels(request.init, settings.width, settings.height), ladder)
    size = (settings.width, settings.height)
    if known is not None and request.strength == 0.0:
        latent = known
    else:
        latent = yield from walk(*size, known, request.strength, settings.steps)
    if request.hires is not None and settings.larger is not None:
        hires, size = request.hires, settings.larger
        cells = (model.latent.cells(size[1]), model.latent.cells(size[0]))
        larger = F.interpolate(latent, cells, mode="bicubic", align_corners=False, antialias=True)
        steps = hires.steps or settings.steps
        latent = yield from walk(*size, larger, hires.strength, steps, base=settings.walked)
    for stage in later:
        # Another seed, also in the low 32 bits that count: the same noise at two sizes would be no fresh noise.
        walk = _Walk(model, settings, ladder, stage, (walk.seed + 2**31) % 2**64, coarse=latent)
        latent = yield from walk(*size, None, 1.0, settings.decoder_steps or stage.family.defaults.steps)
    return _decoded(model, latent, ladder, quick=request.quick)


def decode(model: Model, latent: Tensor, *, quick: bool = False) -> Tensor:
    """Latents of the last stage to pixels [B, 3, H, W] on the CPU in float32; ``quick``: by the tiny decoder."""
    if quick:
        tiny = model.networks["tiny_decoder"]
        return 2 * tiny(latent.to(next(tiny.parameters()))).to("cpu", torch.float32) - 1  # it paints in 0..1
    return model.decode_latent(latent.to(model.device)).to("cpu", torch.float32)


def _decoded(model: Model, latent: Tensor, ladder: Ladder, *, quick: bool) -> Tensor:
    """The same with little memory."""
    paint, stride = partial(decode, model, quick=quick), round(model.stages[-1].latent.stride)

    def in_tiles(side: int) -> Tensor:
        return decode_tiled(paint, latent, side, side // OVERLAP, stride)

    return ladder.autoencode(model, partial(paint, latent), in_tiles, (latent.shape[2], latent.shape[3]))


def _encoded(model: Model, pixels: Tensor, ladder: Ladder) -> Tensor:
    """Pixels as a latent, with little memory."""
    work = partial(to_latent, model)
    if model.family.then is not None:  # encoded at another size, which does not fall into cells
        return ladder.prepare(model, partial(work, pixels))
    stride = round(model.latent.stride)

    def in_tiles(side: int) -> Tensor:
        return encode_tiled(work, pixels, side, side // OVERLAP, stride)

    cells = (pixels.shape[2] // stride, pixels.shape[3] // stride)
    return ladder.autoencode(model, partial(work, pixels), in_tiles, cells)


def preview(model: Model, clean: Tensor) -> Tensor | None:
    """A clean estimate as pixels; None where an early stage has nothing that shows it."""
    if clean.shape[1] == model.stages[-1].latent.channels:
        return decode(model, clean, quick="tiny_decoder" in model.networks)
    shower = model.networks.get("previewer")
    if shower is None:
        return None
    return 2 * shower(clean.to(next(shower.parameters()))).to("cpu", torch.float32) - 1  # it paints in 0..1


@dataclass(frozen=True)
class _Walk:
    """A walk down a grid, from noise or from a known latent under noise."""

    model: Model
    settings: Settings
    ladder: Ladder
    stage: Stage
    seed: int
    coarse: Tensor | None = None
    """The finished latent of the stage before."""

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
        settings, request, stage = self.settings, self.settings.request, self.stage
        first = self.coarse is None
        usual = stage.family.defaults
        listing = settings.listing if first else SOLVERS[usual.solver]
        spacing = settings.grid if first else usual.grid or listing.grid
        latent = stage.latent
        shape = (1, latent.channels, latent.cells(height), latent.cells(width))
        grid = make_grid(spacing, stage.noise_for(width, height), steps)
        if known is not None:
            grid = part(grid, strength)
        noise = ImageNoise(
            self.seed, shape, subseed=request.variation_seed, subseed_strength=request.variation
        )
        start, unit = grid[0], noise.initial()
        x = start.sigma * unit if known is None else start.alpha * known + start.sigma * unit
        mask = None
        if request.mask is not None and known is not None and "masked" not in stage.family.beside:
            mask = to_mask(request.mask, shape[-1], shape[-2], request.mask_blur)
        path = BrownianPath(self.seed, shape) if listing.noise == "brownian" else noise
        conditions = _Conditions(self, width, height, grid, base)
        walked = yield from guided(
            sample(settings.make_solver() if first else listing(), x, grid, path),
            stage.prediction,
            conditions,
            settings.guidance if first else settings.later_guidance,
            steps=len(grid) - 1,
            amend=_amend(stage, known, mask),
        )
        return walked


class _Conditions:
    """What each step of a walk is steered by; steps that read the same share one value."""

    def __init__(self, walk: _Walk, width: int, height: int, grid: Sequence[Level], base: int | None) -> None:
        settings, request = walk.settings, walk.settings.request
        self._walk, self._grid = walk, grid
        self._sizes = Sizes(
            original=(height, width)
            if request.original is None
            else (request.original[1], request.original[0]),
            crop=(0, 0) if request.crop is None else (request.crop[1], request.crop[0]),
            target=(height, width),
        )
        stage, steps = walk.stage, len(grid) - 1
        readers: dict[str, tuple[Family, Model]] = {stage.network: (stage.family, walk.model)}
        if walk.model.refiner is not None and stage.network == "denoiser":
            readers["refiner"] = (walk.model.refiner.family, walk.model.refiner)
        self._prepare = prepare = partial(walk.ladder.prepare, walk.model)
        self._steered = {
            name: _Steered(family, prepare(partial(Texts, model, settings, steps, base)))
            for name, (family, model) in readers.items()
        }
        self._image = self._beside = None
        self._steerings: dict[bool, tuple[Steering, ...]] = {False: (), True: ()}
        if walk.coarse is None:
            self._image = prepare(partial(_view, walk.model, request, settings, walk.seed))
            self._beside = prepare(partial(channels, walk.model, request, width, height))
            look = partial(steerings, walk.model, request, width, height)
            # A control finds its device by the denoiser, so that one stays there.
            both = walk.ladder.climb(walk.model.device, look)
            self._steerings = dict(zip((False, True), both, strict=True))
        self._known: dict[tuple[Any, ...], Conditions] = {}

    def __call__(self, step: int) -> Conditions:
        name = self._network(step)
        texts = self._steered[name].texts
        here, there = (self._acting(name, step, negative) for negative in (False, True))
        outfit = self._walk.settings.wardrobe.on_network(name, step, len(self._grid) - 1)
        key = (name, texts.since(step), here, there, outfit)
        if key not in self._known:
            wanted, negative = self._prepare(partial(texts.at, key[1]))
            positive = tuple(
                (self._condition(name, said, False, here, outfit), weight) for said, weight in wanted
            )
            away = self._condition(name, negative, True, there, outfit)
            self._known = {key: Conditions(positive, away, self._weakened(positive[0][0]))}
        return self._known[key]

    def _weakened(self, condition: Condition) -> Condition | None:
        layers = self._walk.settings.request.skip_layers
        return replace(condition, options=(("skip_layers", layers),)) if layers else None

    def _acting(self, name: str, step: int, negative: bool) -> tuple[Steering, ...]:
        if name != "denoiser":  # a control knows the residuals of one network
            return ()
        steps = len(self._grid) - 1
        return tuple(each for each in self._steerings[negative] if each.acts(step, steps))

    def _network(self, step: int) -> str:
        """Which network answers: the refiner for the last part of the noise's way (Podell et al. 2023, section 2.5)."""
        start = self._walk.settings.refiner_start
        if "refiner" not in self._steered or start is None:
            return self._walk.stage.network
        level = self._grid[step]
        # As diffusers cuts it, at a whole trained step.
        last = level.schedule.last + 1
        return "refiner" if level.time < round(last * (1.0 - start)) else self._walk.stage.network

    def _condition(
        self, name: str, texts: Said, negative: bool, steered: tuple[Steering, ...], outfit: Outfit
    ) -> Condition:
        family, request = self._steered[name].family, self._walk.settings.request
        given = Given(
            shape=self._walk.model.network(name).shape,
            sizes=self._sizes,
            texts=texts,
            negative=negative,
            empty=not (request.negative if negative else request.prompt),
            guidance=self._walk.settings.guidance_scale,
            label=request.label,
            coarse=self._walk.coarse,
            image=self._image,
            noise_level=self._walk.settings.noise_level or 0,
        )
        return Condition(
            self._walk.model,
            family.condition(given),
            beside=self._beside,
            network=name,
            steered=steered,
            outfit=outfit,
        )


def _view(model: Model, request: Request, settings: Settings, seed: int) -> Tensor | None:
    """What the model is told of the picture that it shall draw like, [1, P]; None without one."""
    if request.like is None:
        return None
    tower = model.networks.get("image")
    if tower is None:
        part = next(part for part in model.family.parts if part.name == "image")
        raise MissingFile(
            f"{model.family.title} sees no picture without its {part.title}, which is supplied by {part.supplier}; "
            'give it to load() as parts={"image": FILE}'
        )
    pixels = to_pixels(request.like, *request.like.size)
    seen = tower(clip_pixels(pixels, tower.shape.size).to(next(tower.parameters()))).projected.to(
        "cpu", torch.float32
    )
    if model.family.view is None:
        return seen
    noise = ImageNoise((seed + 2**30) % 2**64, tuple(seen.shape)).initial()  # not the picture's own noise
    return model.family.view(seen, settings.noise_level or 0, noise, model.networks.get("statistics"))


@dataclass(frozen=True)
class _Steered:
    """A network's own reading of the prompts."""

    family: Family
    texts: Texts


def _amend(stage: Stage, known: Tensor | None, mask: Tensor | None) -> Callable[[Tensor, Ask], Tensor] | None:
    """What is done to every clean estimate: kept where the mask is black, held to the range of pixels."""
    keeps, clips = mask is not None and known is not None, stage.family.clips
    if not keeps and not clips:
        return None

    def amend(clean: Tensor, ask: Ask) -> Tensor:
        clean = clean.clamp(-1.0, 1.0) if clips else clean
        return clean if mask is None or known is None else mask * clean + (1 - mask) * known

    return amend
