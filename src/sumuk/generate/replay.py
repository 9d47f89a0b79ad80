"""Draw a picture again from its receipt and compare: identical, within tolerance, or different, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sumuk.base.errors import BadFile, BadInput
from sumuk.generate.api import generate
from sumuk.generate.engine import Failed, Finished
from sumuk.generate.receipt import NUMERICS, processor
from sumuk.generate.request import PICTURES, Request, image_digest, make_request, read_image
from sumuk.weights.model import Model

TOLERANCE = 2
"""Largest difference of a pixel's channel, of 255, that still counts as the same picture."""


@dataclass(frozen=True)
class Verdict:
    """What came of a replay.

    Attributes:
        kind: ``identical`` (every bit), ``within tolerance`` or ``different``.
        largest: largest difference of any channel of any pixel, of 255.
        psnr: peak signal-to-noise ratio in dB; infinite when identical.
        reasons: what differs between then and now, in words; may explain a difference.
        picture: what was drawn now.
    """

    kind: str
    largest: int
    psnr: float
    reasons: tuple[str, ...]
    picture: Image.Image


def request_of(receipt: dict[str, Any], pictures: Mapping[str, Image.Image | None]) -> Request:
    """The request inside a receipt; the pictures that it used must be given again, and be the same.

    Args:
        receipt: what :func:`sumuk.generate.receipt.read_receipt` found.
        pictures: by field of the request (``init``, ``mask``, ``hint``), and ``steer-1``, ``steer-2``, ... for what
            its controls looked at.

    Raises:
        BadInput: a picture is missing, is not the one that the receipt's digest says, or was not used at all; a
            setting is out of range.
        BadFile: the receipt is damaged.
    """
    values = dict(receipt["settings"])
    if values.get("count", 1) != 1:
        raise BadFile(
            "the receipt is damaged: it tells of one picture, but its count is another", "receipt.damaged"
        )
    steers = values.get("steer") or ()
    if not isinstance(steers, list | tuple) or not all(isinstance(each, dict) for each in steers):
        raise BadFile("the receipt is damaged: it does not describe what steered", "receipt.damaged")
    values["steer"] = [dict(each) for each in steers]
    places = [(values, name, name) for name in PICTURES]
    places += [(each, "hint", f"steer-{number}") for number, each in enumerate(values["steer"], start=1)]
    for place, field, name in places:
        given = pictures.get(name)
        noted = place.pop(field, None)
        if noted is None:
            if given is not None:
                raise BadInput(f"the receipt knows of no {name} picture; leave --{name} out")
            continue
        if not isinstance(noted, dict) or not isinstance(noted.get("sha256"), str):
            raise BadFile(
                f"the receipt is damaged: it does not describe the {name} picture", "receipt.damaged"
            )
        if given is None:
            raise BadInput(f"the picture was made with another, its {name} picture; give it with --{name}")
        given = read_image(given)
        if image_digest(given) != noted["sha256"]:
            raise BadInput(
                f"the {name} picture is not the one that was used (its SHA-256 over pixels differs)"
            )
        place[field] = given
    return make_request(**values)


def same_model(receipt: dict[str, Any], model: Model) -> list[str]:
    """In words, where a loaded model's files are not those of the receipt."""
    then = {each["sha256"] for each in receipt["model"]["files"]}
    now = {each.sha256 for each in model.every_file}
    reasons = [] if then == now else [f"the model files differ ({_short(then)} then, {_short(now)} now)"]
    here: dict[str, dict[str, Any]] = {
        "lora": model.loras,
        "hypernet": model.hypernets,
        "embedding": model.embeddings,
    }
    for each in receipt.get("adapters", ()):
        guest = here.get(each["kind"], {}).get(each["name"])
        digest = None if guest is None or guest.file is None else guest.file.sha256
        if digest != each["sha256"]:
            then_, now_ = ((said or "no file")[:10] for said in (each["sha256"], digest))
            reasons.append(f"the {each['kind']} {each['name']!r} was {then_}, is {now_}")
    if (said := receipt["model"]["prediction"]) != model.prediction.name:
        reasons.append(f"the prediction was {said}, is {model.prediction.name}")
    if receipt["model"]["ema"] != model.ema:
        reasons.append(f"averaged weights were {'on' if receipt['model']['ema'] else 'off'}, are not so now")
    return reasons


def _short(digests: set[str]) -> str:
    return ", ".join(sorted(digest[:10] for digest in digests)) or "none"


def replay(drawn: Image.Image, receipt: dict[str, Any], model: Model, request: Request) -> Verdict:
    """Draw again and compare with the picture that carries the receipt."""
    then = receipt["machine"]
    reasons = same_model(receipt, model)
    now = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processor": processor(model.device),
        "torch": torch.__version__,
    }
    reasons += [
        f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value
    ]
    if then.get("tiled"):
        reasons.append("its autoencoder worked in tiles then, for want of memory")
    if receipt.get("numerics") != NUMERICS:
        reasons.append(f"numeric version was {receipt.get('numerics')}, is {NUMERICS}")
    again = _draw(model, request, then.get("mode"))
    if image_digest(drawn) != (said := receipt["picture"]["sha256"]):
        still = "; drawn again it is as it was" if image_digest(again) == said else ""
        reasons.append(f"the picture was changed after it was made: its pixels are not the receipt's{still}")
    if again.size != drawn.size:
        reasons.append(f"the size was {drawn.size}, is {again.size}")
        return Verdict("different", 255, 0.0, tuple(reasons), again)
    gap = np.abs(np.asarray(drawn.convert("RGB"), np.int16) - np.asarray(again, np.int16))
    largest = int(gap.max())
    mse = float(np.square(gap.astype(np.float64)).mean())
    psnr = float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))
    kind = "identical" if largest == 0 else "within tolerance" if largest <= TOLERANCE else "different"
    return Verdict(kind, largest, psnr, tuple(reasons), again)


def _draw(model: Model, request: Request, mode: Any) -> Image.Image:
    for event in generate(model, request, mode=mode if mode in ("exact", "fast") else None):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return event.picture
    raise AssertionError("the engine ended without a picture")
