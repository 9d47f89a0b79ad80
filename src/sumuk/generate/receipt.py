"""The receipt: what made a picture, complete enough to make it again, and written into the PNG.

A PNG carries two texts: ``parameters``, which A1111 and every gallery reads, and ``sumuk``, the receipt as JSON with
the hash of every file, every resolved setting, versions and the digest of the pixels. A receipt that comes with a
picture from elsewhere is untrusted: its size is bounded, its fields are checked, no path in it is opened unasked.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.atomic import replacing
from sumuk.generate.infotext import write_infotext
from sumuk.generate.learnt import used
from sumuk.generate.request import image_digest, open_image
from sumuk.generate.settings import Settings
from sumuk.weights.licences import stack
from sumuk.weights.model import Model, WeightFile

FORMAT = 1
"""Of the receipt. Raised when a field changes its meaning."""
NUMERICS = 1
"""Of the arithmetic. Raised when the same settings come to mean other pixels."""
LONGEST = 1_000_000
"""Characters of a receipt that is read."""


def make_receipt(
    model: Model, settings: Settings, image: int, drawn: Image.Image, mode: str, *, tiled: bool = False
) -> dict[str, Any]:
    """What made picture ``image``; hashing the files takes a moment, once a model.

    ``tiled``: its autoencoder worked in tiles for want of memory, which the whole differs from a little.
    """
    return {
        "receipt": FORMAT,
        "numerics": NUMERICS,
        "sumuk": version("sumuk"),
        "model": {
            "title": model.metadata.get("modelspec.title") or model.family.title,
            "family": model.family.key,
            "licence": model.metadata.get("modelspec.license") or model.family.licence,
            "prediction": model.prediction.name,
            "ema": model.ema,
            "files": [{"name": each.path.name, "sha256": each.sha256} for each in model.every_file],
        },
        "licence": stack(model, *_worn(model, settings)).as_dict(),
        "adapters": adapters(model, settings),
        "settings": settings.as_dict(image),
        "machine": {
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "mode": mode,
            "threads": torch.get_num_threads(),
            "processor": processor(model.device),
            "torch": str(torch.__version__),  # a plain text; what reads it may have no torch
            "python": platform.python_version(),
            **({"tiled": True} if tiled else {}),
        },
        "picture": {"width": drawn.width, "height": drawn.height, "sha256": image_digest(drawn)},
    }


def adapters(model: Model, settings: Settings) -> list[dict[str, Any]]:
    """What was worn and which embeddings the prompts name: each with its file's hash and its account."""
    return [
        {
            "kind": kind,
            "name": name,
            "file": None if guest.file is None else guest.file.path.name,
            "sha256": None if guest.file is None else guest.file.sha256,
            "autov3": None if guest.file is None else guest.file.autov3,
            "account": guest.applied.as_dict() if kind == "lora" else {},
        }
        for kind, name, guest in _guests(model, settings)
    ]


def _worn(model: Model, settings: Settings) -> Iterator[WeightFile]:
    """The files that had a part in the picture beside the model's own."""
    for steer in settings.request.steer:
        yield from model.controls[steer.control].files
    yield from (guest.file for _, _, guest in _guests(model, settings) if guest.file is not None)


def _guests(model: Model, settings: Settings) -> list[tuple[str, str, Any]]:
    worn = settings.wardrobe
    guests: list[tuple[str, str, Any]] = [("lora", each.name, model.loras[each.name]) for each in worn.loras]
    guests += [("hypernet", each.name, model.hypernets[each.name]) for each in worn.hypers]
    named = {
        name: None
        for prompt in (settings.prompt, settings.negative)
        for steps, base in settings.passes
        for name in used(prompt, model.embeddings, model.words, steps, base)
    }
    return guests + [("embedding", name, model.embeddings[name]) for name in named]


def processor(device: torch.device) -> str:
    """What computes, as far as bits depend on it: a GPU's name, or a CPU's kind and widest instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def infotext(receipt: dict[str, Any]) -> str:
    """The receipt as A1111 writes it."""
    settings, model = receipt["settings"], receipt["model"]
    values: dict[str, Any] = {
        "Steps": settings["steps"],
        "Sampler": settings["solver"],
        "Schedule type": settings["grid"],
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": model["files"][0]["sha256"][:10] if model["files"] else None,
        "Model": model["title"],
    }
    if settings["variation"]:
        values |= {
            "Variation seed": settings["variation_seed"],
            "Variation seed strength": settings["variation"],
        }
    if settings["init"] is not None:
        values["Denoising strength"] = settings["strength"]
    if settings["mask"] is not None:
        values["Mask blur"] = settings["mask_blur"]
    if settings["hires"] is not None:
        hires = settings["hires"]
        values |= {
            # A1111 has one place for both; where both are there, the first pass has it.
            "Denoising strength" if settings["init"] is None else "Hires strength": hires["strength"],
            "Hires upscale": hires["scale"],
            "Hires steps": hires["steps"],
        }
    if settings["clip_skip"] != 1:
        values["Clip skip"] = settings["clip_skip"]
    if settings["eta"] is not None:
        values["Eta"] = settings["eta"]
    if settings["rescale"]:
        values["CFG Rescale"] = settings["rescale"]
    if (settings["guidance_start"], settings["guidance_end"]) != (0.0, 1.0):
        values |= {"Guidance start": settings["guidance_start"], "Guidance end": settings["guidance_end"]}
    for kind, key, digest in (("lora", "Lora hashes", "autov3"), ("embedding", "TI hashes", "sha256")):
        some = [each for each in receipt["adapters"] if each["kind"] == kind]
        if some:
            digests = (f"{each['name']}: {(each[digest] or each['sha256'] or '')[:12]}" for each in some)
            values[key] = ", ".join(digests)
    values |= {"RNG": "CPU", "Version": f"sumuk {receipt['sumuk']}"}
    return write_infotext(
        settings["prompt"], settings["negative"], {k: v for k, v in values.items() if v is not None}
    )


def check_target(path: Path) -> None:
    """Refuse a place where no PNG can be written, before anything is computed.

    Raises:
        BadInput: the name does not end in .png, or is a folder; the folder around it does not exist.
    """
    if path.suffix.lower() != ".png":
        raise BadInput(f"{path} does not end in .png, the format that carries receipts")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise BadInput(f"the folder {path.parent} does not exist; make it first")


def save_png(drawn: Image.Image, receipt: dict[str, Any] | None, path: Path) -> None:
    """Write a PNG, with both texts if there is a receipt, whole or not at all.

    Raises:
        BadInput: see :func:`check_target`.
        BadFile: it could not be written; what was there before is as it was.
    """
    check_target(path)
    with replacing(path) as file:
        write_png(drawn, receipt, file)


def write_png(drawn: Image.Image, receipt: dict[str, Any] | None, file: BinaryIO) -> None:
    """The same into an open file."""
    info = PngInfo()
    if receipt is not None:
        info.add_itxt("parameters", infotext(receipt))
        info.add_itxt("sumuk", json.dumps(receipt, ensure_ascii=False, allow_nan=False))
    drawn.save(file, "PNG", pnginfo=info)


class _Checked(BaseModel):
    """A part of a receipt from elsewhere; what a later version adds is passed over."""

    model_config = ConfigDict(strict=True)


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Line = Annotated[str, Field(max_length=1000)]


class _File(_Checked):
    name: Line
    sha256: Digest


class _Model(_Checked):
    prediction: Line
    ema: bool
    files: Annotated[list[_File], Field(max_length=1000)]


class _Adapter(_Checked):
    kind: Line
    name: Line
    sha256: Digest | None


class _Machine(_Checked):
    device: Line
    dtype: Line
    mode: Literal["exact", "fast"]
    threads: int
    processor: Line
    torch: Line


class _Picture(_Checked):
    sha256: Digest


class _Receipt(_Checked):
    receipt: int
    numerics: int
    model: _Model
    adapters: Annotated[list[_Adapter], Field(max_length=1000)] = Field(default_factory=list)
    settings: dict[str, Any]
    machine: _Machine
    picture: _Picture


def read_receipt(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """The picture and the receipt inside a PNG that Sumuk made.

    Raises:
        MissingFile, BadFile, BadInput: no such file; no PNG, no receipt in it, or one that is damaged.
    """
    _, image = open_image(path, ("PNG",))
    text = image.info.get("sumuk")
    if not isinstance(text, str):
        raise BadFile(
            f"{path} carries no Sumuk receipt; only pictures that Sumuk wrote can be replayed", "receipt.none"
        )
    if len(text) > LONGEST:
        raise BadFile(
            f"the receipt of {path} has {len(text):,} characters; at most {LONGEST:,}", "receipt.long"
        )
    try:
        receipt = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(receipt, dict):
            raise TypeError(f"it is a {type(receipt).__name__}")
        if isinstance(number := receipt.get("receipt"), int) and number != FORMAT:
            raise BadFile(
                f"{path} has receipt format {number}; this version of Sumuk reads {FORMAT}", "receipt.format"
            )
        _Receipt.model_validate(receipt)
    except BadFile:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadFile(
            f"the receipt of {path} is damaged: {where}: {first['msg'].lower()}", "receipt.damaged"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadFile(f"the receipt of {path} is damaged: {error!s:.100}", "receipt.damaged") from None
    return image.copy(), receipt


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
