"""Saving a model: the rules of its layout read backward, one tensor at a time, complete or not at all.

What is no tensor goes where the layout has a place for it: into the header's metadata (modelspec names, and
``sumuk.*`` for what those lack), or into the JSON files of a diffusers folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sumuk.base.errors import BadInput, nearest
from sumuk.diffusion.schedule import ContinuousVP, VarianceExploding
from sumuk.families.family import Arrangement, Family
from sumuk.files.atomic import creating, replacing
from sumuk.files.tensors import Tensors, lazy, torch_dtype, write
from sumuk.weights import vocabulary
from sumuk.weights.model import Model

MODELSPEC = "1.0.1"
PREDICTION = {"eps": "epsilon", "v": "v", "clean": "sample", "flow": "flow"}
"""Names in the table of predictions -> what ``modelspec.prediction_type`` calls them."""


def save(
    model: Model,
    path: str | os.PathLike[str],
    layout: str = "single",
    dtype: str | torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Save a model.

    Args:
        model: what to save; a trained one is ``dataclasses.replace(model, networks=...)`` or a new ``Model``.
        path: a ``.safetensors`` file, replaced when the new one is complete; for ``diffusers`` a new folder.
        layout: ``single`` (the original publication's) or ``diffusers``.
        dtype: floating-point type to store; as the networks are by default.
        metadata: further texts for the header, over those that the model had.

    Returns:
        Names of tensors that the layout leaves away by design, usually none: diffusers folders of Stable Diffusion 2
        end its text tower where it is read.

    Raises:
        BadInput: a layout that the family does not have, a dtype that is none, a folder that is not empty,
            metadata that contradict the model.
        BadFile: writing failed; what was there before is as it was.
    """
    arrangement = _arrangement(model.family, layout)
    if homeless := sorted(model.networks.keys() - {part.name for part, _ in arrangement.parts}):
        raise BadInput(
            f"{arrangement.title} has no place for the {', '.join(homeless)} of {model.family.title}; save them as "
            "a single file, or leave them out of the model's networks"
        )
    native: Tensors = {}
    for part in model.family.parts:
        network = model.networks.get(part.name)
        for name, value in network.state_dict().items() if network is not None else ():
            one = lazy(value)
            native[f"{part.name}.{name}"] = one if dtype is None else one.cast(torch_dtype(dtype))
    moved = arrangement.layout(native, backward=True).backward(native)
    moved.refuse_leftovers(str(path))
    texts = _texts(model, metadata or {})
    if arrangement.dialect == "original":
        _single(model, Path(path), moved.tensors, texts)
    else:
        _folder(model, Path(path), arrangement, moved.tensors, texts)
    return tuple(moved.ignored)


def _arrangement(family: Family, name: str) -> Arrangement:
    whole = {each.name: each for each in family.arrangements if not each.name.startswith("bare")}
    if name not in whole:
        raise BadInput(f"{family.title} cannot be saved in the layout {name!r}{nearest(name, whole)}")
    return whole[name]


def _texts(model: Model, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file: what the model had, what the caller adds, and what the model is."""
    facts = model.facts
    anew = (vocabulary.META, "sumuk.latent_", "sumuk.schedule")  # said below as the model has it now
    kept = {key: text for key, text in model.metadata.items() if not key.startswith(anew)}
    said = {
        "format": "pt",
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": model.family.architecture,
        "modelspec.prediction_type": PREDICTION[facts.prediction],
    }
    if isinstance(model.schedule, VarianceExploding):
        said["sumuk.schedule"] = f"ve {model.schedule.first!r} {model.schedule.last!r}"
    if isinstance(model.schedule, ContinuousVP):
        said["sumuk.schedule"] = f"vp {model.schedule.start!r} {model.schedule.end!r}"
    if facts.latent.scale != model.family.latent.scale:
        said["sumuk.latent_scale"] = repr(facts.latent.scale)
    if facts.latent.shift != model.family.latent.shift:
        said["sumuk.latent_shift"] = repr(facts.latent.shift)
    for key, text in metadata.items():
        if said.get(key, text) != text:
            raise BadInput(f"metadata {key} {text!r:.60} contradicts the model, which has {said[key]!r:.60}")
    usual = {
        "modelspec.title": model.family.title,
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.resolution": f"{facts.size}x{facts.size}",
    }
    return usual | kept | dict(metadata) | said


def _single(model: Model, path: Path, tensors: Tensors, texts: dict[str, str]) -> None:
    for reading in model.readings:
        tokens = model.words[reading.part]
        if not vocabulary.is_usual(tokens, reading, model.networks[reading.part].shape):
            texts[vocabulary.meta(reading.part)] = tokens.to_json()
    marker = lazy(torch.empty(0))
    if model.facts.prediction == "v":
        tensors["v_pred"] = marker
    if model.facts.zero_snr:
        tensors["ztsnr"] = marker
    write(path, tensors, texts)


def _folder(
    model: Model, path: Path, arrangement: Arrangement, tensors: Tensors, texts: dict[str, str]
) -> None:
    said = model.family.folder(model.facts)
    with creating(path) as folder:
        for part, prefix in arrangement.parts:
            if part.name not in model.networks:
                continue
            place = folder / prefix
            place.mkdir()
            own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
            write(place / part.file, own, texts if part.name == "denoiser" else {"format": "pt"})
            shapes = {name: tuple(one.shape) for name, one in model.networks[part.name].state_dict().items()}
            said[f"{prefix}config.json"] = part.config(shapes) | said.get(f"{prefix}config.json", {})
        index = said.get("model_index.json", {})
        for reading in model.family.readings:
            if reading.part not in model.networks:
                inside = next(prefix for part, prefix in arrangement.parts if part.name == reading.part)
                index |= {inside.strip("/"): [None, None], vocabulary.folder(reading.part): [None, None]}
        for name, table in said.items():
            (folder / name).parent.mkdir(exist_ok=True)
            _json(folder / name, table)
        for reading in model.readings:
            words = folder / vocabulary.folder(reading.part)
            vocabulary.write_folder(model.words[reading.part], words)


def _json(path: Path, table: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(table, indent=2, sort_keys=True) + "\n").encode())
