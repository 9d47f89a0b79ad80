"""From what A1111's clients send to an order: what is asked for there, said in our words, or refused by name."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fastapi import Request

from sumuk.base.errors import BadInput
from sumuk.serve.a1111_names import (
    LATENT_UPSCALERS,
    USUAL_VAES,
    Choices,
    Walk,
    entry_of,
    walk_of,
)
from sumuk.serve.a1111_pictures import Scene, Shape, by_hand, opened, png_of, scene, shaped
from sumuk.serve.a1111_schema import (
    MOST_PICTURES,
    Img2Img,
    Options,
    ToImage,
    Txt2Img,
    Unit,
    shown,
)
from sumuk.serve.calls import caller_of, desk_of, picture_of
from sumuk.serve.order import Order
from sumuk.serve.wire import Entry

KEPT = "a1111"
"""Under which an owner's options stand among its settings."""
MOST_UNITS = 16
SAME = (None, "", "None", "Use same sampler", "Use same scheduler", "Use same checkpoint")
SHAPES: dict[object, Shape] = {
    "Just Resize": 0,
    "Crop and Resize": 1,
    "Scale to Fit (Inner Fit)": 1,
    "Inner Fit (Scale to Fit)": 1,
    "Resize and Fill": 2,
    "Envelope (Outer Fit)": 2,
    "Outer Fit (Shrink to Fit)": 2,
}
"""Names of a unit's ``resize_mode``, old ones too."""


@dataclass(frozen=True)
class Plan:
    """What a call asks for.

    Attributes:
        order: to submit.
        options: that hold for it.
        back: makes the whole picture of a drawn part; None: what is drawn is the whole.
    """

    order: Order
    options: Options
    back: Callable[[bytes], bytes] | None = None


async def kept_options(request: Request) -> dict[str, Any]:
    """The options that the caller has set."""
    settings = await desk_of(request).settings(caller_of(request).owner)
    return dict(settings.get(KEPT, {}))


async def keep_options(request: Request, changes: Mapping[str, Any]) -> None:
    """Change some of the caller's options, for its later calls.

    Raises:
        BadInput: one is not here, or has a value that cannot be followed; none is changed.
    """
    desk, owner = desk_of(request), caller_of(request).owner
    options = Options.read(changes)
    named(options, await desk.catalogue())
    settings = await desk.settings(owner)
    await desk.keep_settings(owner, {**settings, KEPT: settings.get(KEPT, {}) | options.said})


def named(options: Options, entries: Sequence[Entry]) -> tuple[str | None, str | None]:
    """The names here of the checkpoint and the autoencoder that options say; None: the usual one.

    Raises:
        BadInput: one of them is not here.
    """
    model, vae = options.sd_model_checkpoint, options.sd_vae
    return (
        entry_of(model, "model", entries, "sd_model_checkpoint").name if model else None,
        None if vae in USUAL_VAES else entry_of(vae, "vae", entries, "sd_vae").name,
    )


async def planned(request: Request, sent: Txt2Img | Img2Img) -> Plan:
    """What a call asks for, with the caller's options.

    Raises:
        BadInput, Refused: something of it cannot be followed; names the field.
    """
    desk = desk_of(request)
    entries, choices = await desk.catalogue(), await desk.choices()
    overrides = Options.read(sent.override_settings, "override_settings: ")
    options = Options.read(await kept_options(request) | overrides.said)
    model, vae = named(options, entries)
    walk = walk_of(sent.sampler, sent.scheduler or None, choices)
    values = _values(request, sent, walk, options)
    drawn_on = None
    if isinstance(sent, Txt2Img):
        if sent.enable_hr:
            values["hires"] = _hires(sent, walk, choices)
    else:
        drawn_on = await _drawn_on(request, sent)
        values |= {"init": drawn_on.init, "strength": sent.denoising_strength}
        if drawn_on.mask is not None:
            values |= {"mask": drawn_on.mask, "mask_blur": _mask_blur(sent)}
    units = _units(sent.alwayson_scripts)
    controls = {}
    if units:
        if drawn_on is not None and drawn_on.back is not None:
            raise BadInput("ControlNet beside inpaint_full_res true is not supported; send it false")
        values["steer"] = [await _steer(request, sent, unit, entries) for unit in units]
        controls = {each["control"]: each["control"] for each in values["steer"]}
    refiner = sent.refiner and entry_of(sent.refiner, "model", entries, "refiner_checkpoint").name
    if refiner and sent.refiner_switch_at is not None:
        values["refiner_start"] = sent.refiner_switch_at
    order = Order(
        values=values,
        model=model,
        vae=vae,
        refiner=refiner,
        controls=controls,
        attached=True,
        shown=True,
    )
    return Plan(order, options, None if drawn_on is None else drawn_on.back)


def _values(request: Request, sent: ToImage, walk: Walk, options: Options) -> dict[str, Any]:
    """What is the same for text and for pictures."""
    if sent.count > MOST_PICTURES:
        raise BadInput(
            f"batch_size {sent.batch_size} times n_iter {sent.n_iter} are {sent.count} pictures; "
            f"one call draws {MOST_PICTURES}"
        )
    values: dict[str, Any] = {
        "prompt": sent.prompt,
        "negative": sent.negative_prompt,
        "width": sent.width,
        "height": sent.height,
        "steps": sent.steps,
        "guidance": sent.cfg_scale,
        "solver": walk.solver,
        "grid": walk.grid,
        "eta": _eta(sent, walk),
        "seed": None if sent.seed < 0 else sent.seed,
    }
    values = {name: value for name, value in values.items() if value not in (None, "")}
    values["count"] = sent.count
    if options.CLIP_stop_at_last_layers != 1:
        values["clip_skip"] = options.CLIP_stop_at_last_layers
    if sent.subseed_strength > 0:
        if sent.count > 1:
            raise BadInput(
                f"subseed_strength {sent.subseed_strength:g} is followed for one picture a call, not for {sent.count}"
            )
        values["variation_seed"] = _any_seed(request) if sent.subseed < 0 else sent.subseed
        values["variation"] = sent.subseed_strength
    return values


def _any_seed(request: Request) -> int:
    """A seed for what the caller leaves to chance; the same again where a call is repeated under its key."""
    key = request.headers.get("idempotency-key")
    return secrets.randbelow(2**32) if key is None else int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)


def _eta(sent: ToImage, walk: Walk) -> float | None:
    if walk.eta or sent.eta in (None, 0.0, 1.0):
        return sent.eta if walk.eta else None
    what = f"sampler {sent.sampler!r}" if sent.sampler else "the model's usual sampler, since none is named"
    raise BadInput(f"eta {sent.eta:g} does nothing for {what}; leave it out")


def _hires(sent: Txt2Img, walk: Walk, choices: Choices) -> dict[str, Any]:
    """The second pass."""
    if sent.hr_upscaler is not None and sent.hr_upscaler not in LATENT_UPSCALERS:
        raise BadInput(
            f"hr_upscaler {sent.hr_upscaler[:60]!r} is not here; the second pass enlarges latents: send 'Latent'"
        )
    for name in ("hr_resize_x", "hr_resize_y"):
        if getattr(sent, name):
            raise BadInput(f"{name} {getattr(sent, name)} is not supported; say hr_scale")
    if sent.hr_checkpoint_name not in SAME:
        raise BadInput(f"hr_checkpoint_name {shown(sent.hr_checkpoint_name)} is not supported; leave it out")
    for name in ("prompt", "negative_prompt"):
        if getattr(sent, f"hr_{name}") not in ("", getattr(sent, name)):
            raise BadInput(f"hr_{name} is not supported; both passes draw the same prompt, so leave it out")
    sampler = None if sent.hr_sampler_name in SAME else sent.hr_sampler_name
    scheduler = None if sent.hr_scheduler in SAME else sent.hr_scheduler
    if sampler is not None and walk_of(sampler, None, choices).solver != walk.solver:
        raise BadInput(f"hr_sampler_name {sampler[:60]!r} is not supported; both passes use the same sampler")
    if scheduler is not None and walk_of(None, scheduler, choices).grid != walk.grid:
        raise BadInput(
            f"hr_scheduler {scheduler[:60]!r} is not supported; both passes use the same scheduler"
        )
    return {"scale": sent.hr_scale, "steps": sent.hr_second_pass_steps, "strength": sent.denoising_strength}


def _mask_blur(sent: Img2Img) -> int:
    if sent.mask_blur is not None:
        return sent.mask_blur
    if sent.mask_blur_x != sent.mask_blur_y:
        raise BadInput(
            f"mask_blur_x {sent.mask_blur_x} and mask_blur_y {sent.mask_blur_y} must be the same here"
        )
    return sent.mask_blur_x


async def _drawn_on(request: Request, sent: Img2Img) -> Scene:
    """The picture that is drawn on, and its mask."""
    if len(sent.init_images) != 1:
        raise BadInput(f"init_images has {len(sent.init_images)} pictures; one call draws on one")
    init = await picture_of(request, sent.init_images[0], "init_images.0")
    mask = None
    if sent.mask:
        if sent.inpainting_fill > 1:
            raise BadInput(
                f"inpainting_fill {sent.inpainting_fill} is not supported; send 0 (what is around) or 1 (what is there)"
            )
        if sent.inpaint_full_res and desk_of(request).config.sign is not None:
            raise BadInput("inpaint_full_res true makes pictures that this server cannot sign; send it false")
        mask = await picture_of(request, sent.mask, "mask")
    return await by_hand(
        lambda: scene(
            init,
            mask,
            width=sent.width,
            height=sent.height,
            resize_mode=sent.resize_mode,
            invert=bool(sent.inpainting_mask_invert),
            blur=_mask_blur(sent),
            fill=sent.inpainting_fill == 0,
            only_masked=sent.inpaint_full_res,
            padding=sent.inpaint_full_res_padding,
        )
    )


def _units(scripts: Mapping[str, Any]) -> list[Unit]:
    """The ControlNet units that are switched on."""
    found: list[Unit] = []
    for name, about in scripts.items():
        if name.lower() != "controlnet":
            raise BadInput(f"alwayson_scripts: script {name[:60]!r} is not here; leave it out")
        units = about.get("args", []) if isinstance(about, dict) else about
        if not isinstance(units, list) or not all(isinstance(each, dict) for each in units):
            raise BadInput('alwayson_scripts: ControlNet is {"args": [units]}, each unit a table')
        if len(units) > MOST_UNITS:
            raise BadInput(f"alwayson_scripts: ControlNet has {len(units)} units; at most {MOST_UNITS}")
        for number, unit in enumerate(units):
            read = Unit.read(unit, f"ControlNet unit {number}: ")
            if read.enabled:
                found.append(read)
    return found


async def _steer(request: Request, sent: ToImage, unit: Unit, entries: Sequence[Entry]) -> dict[str, Any]:
    """A unit, as a request says it."""
    if unit.module.lower() not in ("none", ""):
        raise BadInput(
            f"ControlNet module {unit.module[:60]!r} is not here: send the finished picture (edges, depth, pose) "
            "with module 'none'"
        )
    if unit.hr_option.rpartition(".")[2].lower() != "both":
        raise BadInput(f"ControlNet hr_option {unit.hr_option[:60]!r} is not supported; send 'Both'")
    if unit.control_mode in (1, "My prompt is more important"):
        raise BadInput(f"ControlNet control_mode {unit.control_mode!r} is not supported; send 'Balanced'")
    end = unit.guidance_end if unit.guidance_end is not None else unit.guidance
    return {
        "control": entry_of(unit.model, "control", entries, "ControlNet model").name,
        "hint": await _hint(request, sent, unit),
        "weight": unit.weight,
        "start": unit.guidance_start,
        "end": 1.0 if end is None else end,
        "guess": unit.guessmode or unit.control_mode in (2, "ControlNet is more important"),
    }


async def _hint(request: Request, sent: ToImage, unit: Unit) -> bytes:
    """What a unit looks at; where it brings no picture, the one that is drawn on."""
    text, what = unit.image or unit.input_image, "the ControlNet image"
    if not text:
        if not isinstance(sent, Img2Img):
            raise BadInput("a ControlNet unit has no image to follow; send one, or set enabled to false")
        text, what = sent.init_images[0], "init_images.0"
    png = await picture_of(request, text, what)
    size = sent.width and sent.height and (sent.width, sent.height)
    mode = SHAPES.get(unit.resize_mode, unit.resize_mode)
    if mode not in (None, 0, 1, 2):
        raise BadInput(f"ControlNet resize_mode {unit.resize_mode!r} is not known; send 'Just Resize'")
    if mode and not size:
        raise BadInput(f"ControlNet resize_mode {unit.resize_mode!r} needs width and height; say them")
    if mode == 0 or not size:
        return png
    shape = cast(Shape, 1 if mode is None else mode)  # cropping is the extension's own choice
    return await by_hand(lambda: png_of(shaped(opened(png), *size, shape)))
