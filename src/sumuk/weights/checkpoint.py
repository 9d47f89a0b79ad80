"""Loading a checkpoint as a model, in any layout that its family has.

Read the header, build the networks on the ``meta`` device, check every name and shape against them, then put
the memory-mapped tensors in their place. Nothing is copied unless the dtype or device changes, and then one
tensor at a time. Saving is the way back, see :mod:`~sumuk.weights.writing`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sumuk.base.errors import BadFile, BadInput, MissingFile, nearest
from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.families.autoencoder import DECODER
from sumuk.families.cascade_parts import IMAGE
from sumuk.families.detect import Match, Unknown
from sumuk.families.family import Family, Latent, Part
from sumuk.files.tensors import Tensors, torch_dtype
from sumuk.nets.tokens import ClipTokens
from sumuk.weights import inspect, vocabulary
from sumuk.weights.building import Place, build, check_config, fill, refuse_leftovers
from sumuk.weights.control import load_control
from sumuk.weights.found import Told
from sumuk.weights.guests import with_guests
from sumuk.weights.inspect import Opened
from sumuk.weights.licences import said_in
from sumuk.weights.model import Model, WeightFile, Words
from sumuk.weights.source import Source, read
from sumuk.weights.supply import supply
from sumuk.weights.writing import save

__all__ = ["load", "save"]

LENT = (IMAGE, DECODER)
"""Parts that serve any family: CLIP's image tower, with which IP-Adapters see, and a tiny decoder for quick looks."""
FLOATS = ("F32", "BF16", "F16", "F64")


def load(
    path: Place,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    prediction: str | None = None,
    *,
    vae: Place | None = None,
    text: Place | None = None,
    parts: Mapping[str, Place] | None = None,
    refiner: Place | None = None,
    controls: Mapping[str, Place] | None = None,
    loras: Mapping[str, Place] | None = None,
    hypernets: Mapping[str, Place] | None = None,
    embeddings: Mapping[str, Place] | None = None,
    partial: Collection[str] = (),
    packed: bool = False,
    ema: bool = False,
    variant: str | None = None,
    ignore: Sequence[str] = (),
) -> Model:
    """Load a model.

    Args:
        path: a weight file (safetensors, GGUF, ``.ckpt``), an ``.index.json``, or a folder.
        device: where to.
        dtype: of all networks. By default the one that most of the denoiser's tensors are stored in,
            except that float16 and 8-bit floats become float32 on the CPU, which computes in them slowly or
            not at all.
        prediction: what the denoiser predicts (``eps``, ``v``), overruling the file and the family.
        vae: another file that supplies the autoencoder, in place of the one in ``path`` if there is one.
        text: another file that supplies the first text tower.
        parts: further files, by the part that each supplies (``{"text_2": ..., "text_3": ...}``).
        refiner: a whole model of the same latents that draws the last part of the way (SDXL's).
        controls: ControlNets, by the names under which requests shall ask for them.
        loras: LoRAs and their like, by the names that ``<lora:name>`` in prompts and ``Request.loras`` use.
        hypernets: hypernetworks, by the names that ``<hypernet:name>`` and ``Request.hypers`` use.
        embeddings: textual inversions, by the words that stand for them in prompts.
        partial: names of LoRAs that may be applied though only a part of them fits this model.
        packed: keep quantised weights as they are stored, and expand each whenever it is used: less memory, more work.
        ema: take the averaged weights of the denoiser (``model_ema.*``) instead of the plain ones.
        variant: which weights of a diffusers folder, ``fp16`` for ``model.fp16.safetensors``.
        ignore: patterns of further tensor names to do without (``"embedding_manager.*"``).

    Returns:
        The model, in evaluation mode and without gradients.

    Raises:
        MissingFile: a file is not there, or the checkpoint lacks a network and no other file supplies it.
        BadFile: the file is damaged, of no known family, or holds tensors that the family does not explain.
        BadInput: an unknown prediction, dtype, device or part.
    """
    place = _device(device)
    source = read(path, variant)
    opened = inspect.recognise(source)
    if isinstance(opened.answer, Unknown):
        raise BadFile(f"{path}: unknown model: {opened.answer.why}", "model.unknown")
    if not isinstance(opened.answer.family, Family):
        title = opened.answer.family.title
        raise BadFile(
            f"{path}: is {title}, which does not draw by itself; load a model with it", "model.kind"
        )
    family = opened.family
    if "denoiser" not in (part.name for part in family.parts):
        raise BadFile(
            f"{path}: is {family.title}, which goes on from another model's latents; load that one with it, as "
            f"parts={{{family.parts[0].name!r}: {str(path)!r}}}",
            "model.kind",
        )
    chosen = PREDICTIONS[prediction or opened.prediction().value]
    wanted_parts = _parts(family, parts or {})
    supplied = _supplied(family, wanted_parts, {"vae": vae, "text": text, **(parts or {})})
    sources = (source, *(other.source for other in supplied.values()))
    plans: dict[str, tuple[nn.Module, Tensors]] = {}
    for part in wanted_parts:
        origin = supplied.get(part.name, opened)
        if not origin.has(part):
            if part.optional:
                continue
            raise MissingFile(f"{path}: has no {part.title} ({part.name}); it is supplied by {part.supplier}")
        tensors = origin.tensors(part.name)
        if ema and part.name == "denoiser":
            tensors = _averaged(opened, tensors)
        plans[part.name] = (build(part, tensors, origin), tensors)
        check_config(part, tensors, origin)
    for origin in (opened, *supplied.values()):
        refuse_leftovers(origin, ignore)
    networks = {name: network for name, (network, _) in plans.items()}
    words: dict[str, Words] = {}
    for reading in family.readings:
        if (tower := networks.get(reading.part)) is not None:
            tokens = vocabulary.read(supplied.get(reading.part, opened), reading, tower.shape)
            words[reading.part] = tokens
            if isinstance(tokens, ClipTokens):
                tower.eos = tokens.eos  # type: ignore[assignment]  # a CLIP tower has it
    latent = _fitting(family, opened.latent(), networks, sources[-1].path)
    wanted = _dtype(plans["denoiser"][1], place, dtype)
    if packed and not any(one.packed for _, tensors in plans.values() for one in tensors.values()):
        raise BadInput(f"packed does nothing for {path}: none of its weights are quantised; leave it out")
    for network, tensors in plans.values():
        fill(network, tensors, place, wanted, packed)
    loaded = Model(
        family=family,
        networks=networks,
        words=words,
        schedule=opened.schedule(),
        prediction=chosen,
        latent=latent,
        size=opened.size(),
        metadata=dict(source.metadata),
        found=inspect.describe(opened),
        files=tuple(
            WeightFile(file, told)
            for each, told in ((source, opened.licence()), *((one, _licence(one)) for one in sources[1:]))
            for file in each.files
        ),
        ema=ema,
    )
    if refiner is not None:
        other = load(refiner, device, dtype, prediction)
        loaded = replace(loaded, refiner=_agreeing(loaded, other, refiner))
    guests = {name: load_control(place, loaded) for name, place in (controls or {}).items()}
    loaded = replace(loaded, controls=guests)
    return with_guests(loaded, loras=loras, hypernets=hypernets, embeddings=embeddings, partial=partial)


def _licence(source: Source) -> Told | None:
    """That of a file which supplies a part: it was read as one of the model's family, whose licence is not its own."""
    alone = inspect.recognise(source)
    return alone.licence() if isinstance(alone.answer, Match) else said_in(source.metadata)


def _agreeing(base: Model, refiner: Model, where: Place) -> Model:
    """The refiner, if it can go on where the base stops."""
    for what, here, there in (
        ("latents", base.latent, refiner.latent),
        ("prediction", base.prediction.name, refiner.prediction.name),
        ("most noise", base.schedule.noisiest, refiner.schedule.noisiest),
        ("least noise", base.schedule.least, refiner.schedule.least),
    ):
        if here != there:
            raise BadFile(
                f"{where}: cannot refine, its {what} are {there}, the base's {here}", "model.refiner"
            )
    return refiner


def _fitting(family: Family, latent: Latent, networks: Mapping[str, Any], where: Path) -> Latent:
    """The latent with the autoencoder's stride, if both networks agree on its channels."""
    tiny = networks.get(DECODER.name)
    if tiny is not None and tiny.shape.channels != latent.channels:
        raise BadFile(
            f"{where}: a tiny decoder of {tiny.shape.channels} latent channels does not fit latents of "
            f"{latent.channels}",
            "model.part",
        )
    vae = networks.get("vae")
    if vae is None or family.then is not None:  # there the autoencoder is a later stage's
        return latent
    if latent.channels != (made := vae.shape.channels):
        raise BadFile(
            f"{where}: an autoencoder of {made} latent channels does not fit a denoiser that predicts "
            f"{latent.channels}",
            "model.part",
        )
    return replace(latent, stride=vae.stride)


def _parts(family: Family, given: Mapping[str, Place]) -> tuple[Part, ...]:
    """The family's parts, and those of the guests' that are given and it has none of its own."""
    own = {part.name: part for part in family.parts}
    guests = {part.name: part for part in LENT if part.name in given}
    return tuple({**guests, **own}.values())


def _supplied(family: Family, parts: Sequence[Part], places: Mapping[str, Place | None]) -> dict[str, Opened]:
    """The files that supply parts, each read once."""
    known = {part.name: part for part in parts}
    opened: dict[str, Opened] = {}
    for name, place in places.items():
        if place is None:
            continue
        if name not in known:
            raise BadInput(f"{family.title} has no part {name!r}{nearest(name, known)}")
        opened[name] = supply(family, read(place), known[name])
    return opened


def _averaged(opened: Opened, tensors: Tensors) -> Tensors:
    """The denoiser's running averages, whose names are those of the training module with all dots removed."""
    averages = {name: "model_ema.diffusion_model" + name.replace(".", "") for name in tensors}
    lost = [name for name in averages.values() if name not in opened.source.tensors]
    if lost:
        raise BadFile(
            f"{opened.source.path}: lacks {len(lost)} averaged weights, such as {lost[0]!r}; "
            "load with ema=False",
            "model.ema",
        )
    return {name: opened.source.tensors[average] for name, average in averages.items()}


def _device(name: str | torch.device) -> torch.device:
    """A device that is there; asked before files are read."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).to("cpu")
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown; not built in or not there; meta
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise BadInput(f"device {str(name)!r} is not here; there is {', '.join(here)}") from None
    return device


def _dtype(denoiser: Tensors, device: torch.device, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return torch_dtype(dtype)
    counts = dict.fromkeys(FLOATS, 0)
    for tensor in denoiser.values():
        if (
            tensor.packed is None and tensor.dtype in counts
        ):  # packed ones are expanded to whatever is asked for
            counts[tensor.dtype] += 1
    stored = max(counts, key=lambda name: counts[name])
    slow = device.type == "cpu" and stored == "F16"
    return torch.float32 if slow or not counts[stored] else torch_dtype(stored)
