"""What stands in the page's fields, as an order; and the way back, from a job or a picture's receipt to the fields.

Blank means the model's own. Nothing is dropped in silence: a setting without a field of its own goes into ``further``
as JSON, and what the page cannot hold at all is listed with the reason.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from pydantic import ValidationError

from sumuk.generate.request import PICTURES, Hires, Request
from sumuk.serve.order import Order
from sumuk.serve.page.kept import Kept, named
from sumuk.serve.trouble import Refused, refused
from sumuk.serve.wire import Entry
from sumuk.serve.wish import Wish

Form: TypeAlias = dict[str, Any]
"""Field -> what stands in it."""

WHOLE = ("steps", "width", "height", "count")
PLAIN = ("prompt", "negative", "solver", "grid", *WHOLE, "guidance")
"""Fields that are a setting of the same name."""
BLANK: Form = {
    "prompt": "",
    "negative": "",
    "model": "",
    "vae": "",
    "solver": "",
    "grid": "",
    "steps": None,
    "guidance": None,
    "width": None,
    "height": None,
    "seed": "",
    "count": 1,
    "start": None,
    "strength": 0.75,
    "mask_blur": 2,
    "control": "",
    "hint": None,
    "control_weight": 1.0,
    "hires": False,
    "hires_scale": 2.0,
    "hires_strength": 0.5,
    "hires_steps": 0,
    "further": "",
}
KEPT: Form = BLANK | {"current": "", "grid_shown": ""}
"""What a browser remembers: the fields, which job was started last, and which grid."""
OWN = {*PLAIN, *PICTURES, "seed", "strength", "mask_blur", "hires", "steer", "preview"}
"""Settings that are not to be given as further ones."""
ONLY = "control"
"""The name by which an order's one ControlNet is known in its request."""


def remembered(text: object) -> Form:
    """The fields as the browser kept them; what it cannot have kept is blank.

    Args:
        text: JSON, from the browser's storage: an older page's perhaps, or anybody's.
    """
    try:
        found = json.loads(text) if isinstance(text, str) and len(text) < 10_000_000 else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return dict(KEPT)
    return {name: found[name] if _fits(name, found.get(name)) else usual for name, usual in KEPT.items()}


def formed(names: Iterable[str], values: Iterable[object]) -> Form:
    """The fields, of what the browser sends for them; what none of them can hold is blank."""
    found = dict(zip(names, values, strict=True))
    return {name: found[name] if _fits(name, found[name]) else usual for name, usual in BLANK.items()}


def _fits(name: str, value: object) -> bool:
    usual = KEPT[name]
    if name in ("start", "hint"):
        return (
            isinstance(value, dict) and isinstance(value.get("picture"), str) and _is_mask(value.get("mask"))
        )
    if isinstance(usual, str | bool):
        return isinstance(value, type(usual))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_mask(value: object) -> bool:
    return value is None or isinstance(value, str)


async def order_of(form: Form, kept: Kept, owner: str) -> Order:
    """The order that the fields ask for.

    Args:
        form: all fields.
        kept: where their pictures lie.
        owner: whose they are.

    Raises:
        Refused: a field holds what cannot be meant.
    """
    values: dict[str, Any] = {name: form[name] for name in PLAIN if form[name] not in (None, "")}
    for name in WHOLE:
        if name in values:
            values[name] = _whole(name, values[name])
    if form["seed"].strip():
        values["seed"] = _whole("seed", form["seed"].strip())
    values |= _further(form["further"])
    start, hint = form["start"] or {}, form["hint"] or {}
    if start.get("picture"):
        values |= {"init": await kept.read(owner, start["picture"]), "strength": form["strength"]}
        if start.get("mask"):
            values["mask"] = await kept.read(owner, await kept.take(owner, start["mask"], "mask"))
            values["mask_blur"] = _whole("mask_blur", form["mask_blur"])
    controls: dict[str, str] = {}
    if hint.get("picture"):
        picture = await kept.read(owner, hint["picture"])
        if form["control"]:
            controls[ONLY] = form["control"]
            values["steer"] = [{"control": ONLY, "hint": picture, "weight": form["control_weight"]}]
        else:
            values["hint"] = picture
    elif form["control"]:
        raise refused("bad-value", f"control {form['control']!r} follows a picture; choose one beside it")
    if form["hires"]:
        values["hires"] = {
            "scale": form["hires_scale"],
            "strength": form["hires_strength"],
            "steps": _whole("hires steps", form["hires_steps"]),
        }
    return Order(
        values=values, model=form["model"] or None, vae=form["vae"] or None, controls=controls, shown=True
    )


def _whole(name: str, value: Any) -> int:
    try:
        whole = int(value)
        if isinstance(value, float) and value != whole:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise refused("bad-value", f"{name} {str(value)[:100]!r} is no whole number") from None
    return whole


def _further(text: str) -> dict[str, Any]:
    """The further settings, which are JSON."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no object in braces")
        if own := OWN & found.keys():
            raise ValueError(f"{sorted(own)[0]!r} has its own field")
        return Wish.model_validate(found).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise refused("bad-value", f"further settings: {why[:300]}")


async def form_of(
    values: Mapping[str, Any], kept: Kept, owner: str, controls: Mapping[str, str] | None = None
) -> tuple[Form, dict[str, str]]:
    """The fields that ask for this request, and what has no place in them: name -> why.

    Args:
        values: of an order; its pictures as ``{"sha256": ...}``, found if they are still kept.
        kept: where.
        owner: whose.
        controls: of the order.
    """
    rest = {name: value for name, value in values.items() if value is not None}
    left: dict[str, str] = {}
    form = BLANK | {name: rest.pop(name) for name in PLAIN if name in rest}
    form["seed"] = str(rest.pop("seed", ""))
    for name in ("strength", "mask_blur"):
        form[name] = rest.pop(name, BLANK[name])
    if hires := rest.pop("hires", None):
        whole = Hires(**hires).model_dump()
        form |= {"hires": True} | {f"hires_{name}": value for name, value in whole.items()}
    steers = list(rest.pop("steer", ()))
    if steers:
        first = steers.pop(0)
        form["control"] = (controls or {}).get(first["control"], "")
        form["control_weight"] = first.get("weight", 1.0)
        rest["hint"] = first["hint"]
        beside = sorted(first.keys() - {"control", "hint", "weight"})
        if steers or beside:
            left["steer"] = (
                f"one control network with its weight has fields here, without {', '.join(beside) or 'others'}"
            )
    for name, field in (("init", "start"), ("hint", "hint")):
        if name in rest:
            found = await _found(rest.pop(name), kept, owner)
            form[field] = found and {"picture": found, "mask": None}
            if found is None:
                left[name] = GONE
    if "mask" in rest:
        found = await _found(rest.pop("mask"), kept, owner)
        if found and form["start"]:
            form["start"]["mask"] = as_data(await kept.read(owner, found))
        else:
            left["mask"] = GONE
    if rest.pop("like", None) is not None:
        left["like"] = "the page has no field for it"
    rest.pop("preview", None)  # how often, which the server decides
    plain = {name: value for name, value in rest.items() if not _is_usual(name, value)}
    form["further"] = json.dumps(plain, ensure_ascii=False) if plain else ""
    return form, left


GONE = "the picture is no longer kept; choose it again"


async def _found(value: object, kept: Kept, owner: str) -> str | None:
    """The name under which a picture of an order is kept."""
    digest = value.get("sha256") if isinstance(value, Mapping) else None
    if not isinstance(digest, str):
        return None
    try:
        kept.path(owner, named(digest))
    except Refused:
        return None
    return named(digest)


def _is_usual(name: str, value: object) -> bool:
    usual = Request.model_fields[name].default
    return value == (list(usual) if isinstance(usual, tuple) else usual)


def as_data(png: bytes) -> str:
    """A PNG as a ``data:`` URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def model_named(said: Mapping[str, Any], offered: list[Entry]) -> str | None:
    """The offered model that a picture was drawn with, by its hash, else by its file's name; None: not here."""
    models = [each for each in offered if each.sort == "model"]
    for entry in models:
        digest, short = entry.sha256, str(said.get("sha256") or "")
        if digest and len(short) >= 10 and digest.startswith(short):
            return entry.name
    for entry in models:
        if said.get("file") and entry.file.rpartition("/")[2] == said["file"]:
            return entry.name
    for entry in models:
        if said.get("title") in (entry.title, entry.name) and said.get("title"):
            return entry.name
    return None
