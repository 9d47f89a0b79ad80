"""A request made definite: every default filled in from the model, every name made canonical.

These are the values that the receipt states, so that nothing which shaped a picture is left unsaid.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sumuk.base.errors import BadInput, nearest
from sumuk.diffusion.grid import GRIDS, make_grid, part
from sumuk.diffusion.guidance import Cfg, Guidance, Plain, SkipLayers
from sumuk.diffusion.solver import Solver
from sumuk.diffusion.solvers import SOLVERS, Listing
from sumuk.generate.prompt import Prompt, parse
from sumuk.generate.request import MOST_PIXELS, Hyper, Request, Wear
from sumuk.generate.wear import Wardrobe, acts
from sumuk.generate.wear import wardrobe as make_wardrobe
from sumuk.weights.model import Model


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A request with nothing left open."""

    request: Request
    prompt: Prompt
    negative: Prompt
    width: int
    height: int
    steps: int
    solver: str
    grid: str
    guidance_scale: float
    seed: int
    walked: int
    """Steps of the first pass after strength shortened them."""
    rewalked: int | None = None
    """The same of the second pass; None without one."""
    larger: tuple[int, int] | None
    """Width and height of the second pass."""
    kind: str = "classifier-free"
    """How the family is guided: see ``Family.guidance``."""
    guided: int | None = None
    """How many channels guidance acts on: see ``Family.guided``."""
    decoder_steps: int | None = None
    decoder_guidance: float | None = None
    """Of the second stage, for models that have one."""
    noise_level: int | None = None
    """Of what the model is shown; None where it is shown nothing."""
    refiner_start: float | None = None
    """From which share of the noise's way the refiner draws; None without one."""
    wardrobe: Wardrobe
    """The LoRAs and hypernetworks that are worn."""

    @property
    def listing(self) -> Listing:
        return SOLVERS[self.solver]

    def make_solver(self) -> Solver:
        """A fresh solver with the request's settings."""
        eta = self.request.eta
        return self.listing() if eta is None else self.listing(eta=eta)

    @property
    def passes(self) -> tuple[tuple[int, int | None], ...]:
        """How the prompt's schedules are read: the steps of every pass, and of the one that it goes on from."""
        every = ((self.walked, None), (self.rewalked, self.walked), (self.decoder_steps, None))
        return tuple((steps, base) for steps, base in every if steps)

    @property
    def guidance(self) -> Guidance:
        """How the rows of an ask are combined."""
        wanted, usual = self.request, self._usual_guidance()
        if not wanted.skip_layers:
            return usual
        return SkipLayers(usual, wanted.skip_scale, wanted.skip_start, wanted.skip_end)

    @property
    def later_guidance(self) -> Guidance:
        """The same in the second stage of a model that has one."""
        scale = self.decoder_guidance
        return Plain() if scale is None or scale == 1.0 else Cfg(scale=scale)

    def _usual_guidance(self) -> Cfg | Plain:
        wanted = self.request
        if self.guidance_scale == 1.0 or self.kind != "classifier-free":
            return Plain()
        return Cfg(
            channels=self.guided,
            scale=self.guidance_scale,
            rescale=wanted.rescale,
            start=wanted.guidance_start,
            end=wanted.guidance_end,
        )

    def as_dict(self, image: int) -> dict[str, Any]:
        """The request as JSON, with what was left open filled in, for picture ``image`` of its batch."""
        values = self.request.model_dump(mode="json")
        if values["hires"] is not None:
            values["hires"]["steps"] = values["hires"]["steps"] or self.steps
        return values | {
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "solver": self.solver,
            "grid": self.grid,
            "eta": getattr(self.make_solver(), "eta", None) if "eta" in self.listing.settings else None,
            "guidance": self.guidance_scale,
            "decoder_steps": self.decoder_steps,
            "decoder_guidance": self.decoder_guidance,
            "refiner_start": self.refiner_start,
            "noise_level": self.noise_level,
            "seed": (self.seed + image) % 2**64,
            "count": 1,
            "preview": 0,
        }


def resolve(request: Request, model: Model) -> Settings:
    """Fill in what a request leaves open.

    Raises:
        BadInput: a name that is not known (with the nearest one), a size or number of steps that the model cannot
            draw, an extra network that cannot be applied, or a setting that would do nothing.
    """
    defaults = model.defaults
    solver = SOLVERS.canonical(defaults.solver if request.solver is None else request.solver)
    listing = SOLVERS[solver]
    grid = GRIDS.canonical(defaults.grid or listing.grid if request.grid is None else request.grid)
    if request.eta is not None and "eta" not in listing.settings:
        having = ", ".join(name for name in SOLVERS if "eta" in SOLVERS[name].settings)
        raise BadInput(f"solver {solver!r} has no eta; leave it out or take one of {having}")
    prompt, negative = parse(request.prompt), parse(request.negative, conjunction=False)
    wardrobe = make_wardrobe(request, prompt, negative, model)
    _check_model(request, model)
    steps = defaults.steps if request.steps is None else request.steps
    scale = float(defaults.guidance if request.guidance is None else request.guidance)
    width, height = _size(request, model)
    walks = _walks(request, model, grid, steps)
    _check_guidance(request, model, scale, walks)
    _check_windows(request, wardrobe, walks)
    if request.preview and any(walks) and request.preview >= max(walks):
        raise BadInput(f"a preview every {request.preview} steps never comes in {max(walks)} steps; lower it")
    later = model.stages[1].family.defaults if len(model.stages) > 1 else None
    return Settings(
        request=request,
        prompt=prompt,
        negative=negative,
        width=width,
        height=height,
        steps=steps,
        solver=solver,
        grid=grid,
        guidance_scale=scale,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        walked=walks[0],
        rewalked=walks[1] if len(walks) > 1 else None,
        larger=_larger(request, model, width, height),
        kind=model.family.guidance,
        guided=model.family.guided,
        decoder_steps=None if later is None else request.decoder_steps or later.steps,
        decoder_guidance=None if later is None else _or(request.decoder_guidance, later.guidance),
        noise_level=_noise_level(request, model),
        refiner_start=None if model.refiner is None else _or(request.refiner_start, 0.8),
        wardrobe=wardrobe,
    )


def _or(said: float | None, usual: float) -> float:
    return usual if said is None else said


def _noise_level(request: Request, model: Model) -> int | None:
    if "noise_level" not in model.family.takes:
        return None
    return model.family.level if request.noise_level is None else request.noise_level


def _check_model(request: Request, model: Model) -> None:
    """Refuse what this model cannot follow, and what it cannot do without."""
    family = model.family
    name = f"{family.title} ({family.variant})"
    for reading in model.readings:
        if reading.words == "clip":
            shape = model.networks[reading.part].shape
            layers = shape.depth - (reading.layer_of(shape) - 1)
            if request.clip_skip > layers:
                raise BadInput(
                    f"clip_skip {request.clip_skip} is more than the {layers} layers of this model's text tower"
                )
    if not model.readings:
        for field in ("prompt", "negative"):
            if getattr(request, field):
                raise BadInput(f"{name} reads no text, so that the {field} would do nothing; leave it out")
    taken = {"label"} if family.classes else set()
    for field in ("label", "hint", "like", "noise_level"):
        if getattr(request, field) is not None and field not in taken | set(family.takes):
            raise BadInput(f"{field} does nothing for {name}; leave it out")
    if request.quick and "tiny_decoder" not in model.networks:
        raise BadInput(
            "quick needs a tiny decoder; load the model with one, parts={'tiny_decoder': 'taesd_decoder.safetensors'}"
        )
    if request.skip_layers:
        if "skip_layers" not in family.takes:
            raise BadInput(f"skip_layers does nothing for {name}, whose network cannot leave layers out")
        if (far := max(request.skip_layers)) >= (depth := model.denoiser.shape.depth):
            raise BadInput(f"skip_layers {far} is not one of the {depth} layers 0 to {depth - 1}")
    for field in ("decoder_steps", "decoder_guidance"):
        if getattr(request, field) is not None and len(model.stages) == 1:
            raise BadInput(f"{field} does nothing for {name}, which draws in one stage; leave it out")
    if request.refiner_start is not None and model.refiner is None:
        raise BadInput(
            "refiner_start does nothing without a refiner; load the model with one, or leave it out"
        )
    for field in ("original", "crop"):
        if getattr(request, field) is not None and "sizes" not in family.takes:
            raise BadInput(f"{field} does nothing for {name}, which is not told sizes; leave it out")
    if request.label is not None and request.label >= (classes := model.denoiser.shape.null):
        raise BadInput(f"label {request.label} is not one of the classes 0 to {classes - 1}")
    if "low" in family.beside and request.strength != Request.model_fields["strength"].default:
        raise BadInput(f"strength does nothing for {name}, which draws its picture anew; leave it out")
    for each in request.steer:
        if each.control not in model.controls:
            hint = nearest(each.control, model.controls)
            raise BadInput(f"the model was loaded without a control {each.control!r}{hint}")
    if request.init is not None and request.strength == 0.0 and request.hires is None:
        _check_untouched(request, model)
    if request.init is None and {"mask", "masked", "image", "low"} & set(family.beside):
        raise BadInput(f"{name} needs an init image")
    if request.hint is None and "hint" in family.takes:
        raise BadInput(f"{name} needs a hint, the picture that it follows")


def _check_untouched(request: Request, model: Model) -> None:
    """Refuse what does nothing where no step is walked; a second stage still reads the prompt."""
    idle = ["steer"] if len(model.stages) > 1 else ["prompt", "negative", "steer", "like", "mask"]
    for field in idle:
        if getattr(request, field) not in (None, "", ()):
            raise BadInput(f"{field} does nothing at strength 0, where no step is taken; leave it out")


def _check_windows(request: Request, wardrobe: Wardrobe, walks: list[int]) -> None:
    """Refuse what would act in no step of any pass."""

    def none_acts(acts: Callable[[int, int], bool]) -> bool:
        return not any(acts(step, steps) for steps in walks for step in range(steps))

    told = " and ".join(map(str, walks))
    low, high = request.skip_start, request.skip_end
    if request.skip_layers and none_acts(lambda i, n: low < i / n < high):
        raise BadInput(f"no step of {told} lies between skip_start {low:g} and skip_end {high:g}")
    for each in request.steer:
        if none_acts(lambda i, n, each=each: each.start <= i / n and (i + 1) / n <= each.end):  # type: ignore[misc]
            raise BadInput(
                f"no step of {told} lies from start {each.start:g} to end {each.end:g} of {each.control!r}"
            )
    worn: tuple[Wear | Hyper, ...] = (*wardrobe.loras, *wardrobe.hypers)
    for guest in worn:
        if none_acts(lambda i, n, guest=guest: acts(guest, i, n)):  # type: ignore[misc]
            raise BadInput(
                f"no step of {told} lies from start {guest.start:g} to end {guest.end:g} of {guest.name!r}"
            )


def _walks(request: Request, model: Model, grid: str, steps: int) -> list[int]:
    """How many steps each pass takes."""
    first = make_grid(grid, model.schedule, steps)  # how many levels there are does not depend on the size
    whole = request.init is None or "low" in model.family.beside
    strength = 1.0 if whole else request.strength
    walks = [part(first, strength) if strength > 0 else first[:1]]
    if request.hires is not None:
        second = make_grid(grid, model.schedule, request.hires.steps or steps)
        walks.append(part(second, request.hires.strength))
    return [len(levels) - 1 for levels in walks]


def _check_guidance(request: Request, model: Model, scale: float, walks: list[int]) -> None:
    """Refuse what guidance would leave without effect."""
    kind, title = model.family.guidance, model.family.title
    if model.family.classes and request.label is None and scale != 1.0:
        raise BadInput(f"guidance {scale:g} of {title} needs a label, the class to draw; or use guidance 1")
    if kind == "none" and scale != 1.0:
        raise BadInput(
            f"{title} is drawn without guidance; guidance {scale:g} would do nothing, leave it out"
        )
    if kind == "embedded":
        for name in ("negative", "rescale", "guidance_start", "guidance_end"):
            if getattr(request, name) != Request.model_fields[name].default:
                raise BadInput(
                    f"{name} does nothing for {title}, whose guidance is part of the network; leave it out"
                )
        return
    if scale == 0.0 and request.prompt:
        raise BadInput("the prompt does nothing at guidance 0; 1 is no guidance")
    if scale == 1.0:
        for name in ("negative", "rescale", "guidance_start", "guidance_end"):
            if getattr(request, name) != Request.model_fields[name].default:
                what = "a negative prompt" if name == "negative" else f"{name} {getattr(request, name):g}"
                raise BadInput(f"{what} does nothing at guidance 1; raise the guidance or leave it out")
    start, end = request.guidance_start, request.guidance_end
    if any(walks) and not any(start <= step / steps < end for steps in walks for step in range(steps)):
        raise BadInput(
            f"no step of {' and '.join(map(str, walks))} lies from guidance_start {start:g} to guidance_end {end:g}"
        )


def _size(request: Request, model: Model) -> tuple[int, int]:
    """Width and height: as asked, else the init image's (down to whole patches; upscalers larger), else the model's."""
    step = _step(model)
    if request.init is not None:
        larger = round(model.latent.stride) if "low" in model.family.beside else 1
        width, height = (max(step, side * larger // step * step) for side in request.init.size)
    else:
        width = height = model.defaults.size
    width, height = request.width or width, request.height or height
    for name, side in (("width", width), ("height", height)):
        if side % step:
            raise BadInput(f"{name} {side} is not a multiple of {step}, which this model draws in")
    return _bounded("the picture", width, height)


def _step(model: Model) -> int:
    """Pixels that both sides of a picture are a multiple of: of 8, of whole latent cells, of whole patches."""
    stride = Fraction(model.latent.stride).limit_denominator(10)  # Cascade's 42.67 is 128 / 3
    return math.lcm(8, stride.numerator * getattr(model.denoiser.shape, "patch", 1))


def _larger(request: Request, model: Model, width: int, height: int) -> tuple[int, int] | None:
    """Width and height of the second pass."""
    if request.hires is None:
        return None
    step, scale = _step(model), request.hires.scale
    larger = (round(width * scale / step) * step, round(height * scale / step) * step)
    if larger == (width, height):
        raise BadInput(f"hires scale {scale:g} leaves {width} x {height} as it is; use a larger one")
    return _bounded("the second pass", *larger)


def _bounded(what: str, width: int, height: int) -> tuple[int, int]:
    if width * height > MOST_PIXELS:
        raise BadInput(f"{what} would have {width} x {height} pixels; at most {MOST_PIXELS:,} are drawn")
    return width, height
