"""Which family a header belongs to: a pure function of names and shapes that loads no tensor.

Every arrangement of every family is tried. The names are moved to their native places, and each variant says
whether what arrived is its own. Exactly one may remain; where several do, the one that leaves fewer names
unexplained; where that ties, the answer says so instead of choosing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field

import sumuk.families
from sumuk.base.errors import BadFile
from sumuk.families.family import FAMILIES, Arrangement, Kind, Part
from sumuk.files.layout import Moved, some
from sumuk.files.tensors import Lazy

ADAPTER = "which changes a model and is none by itself"
OTHER = "which is not among the families here"
KINDS = (
    ("lora_controlnet", f"a Control-LoRA, {ADAPTER}"),
    ("lora_unet_", f"a LoRA, {ADAPTER}"),
    ("lora_te", f"a LoRA, {ADAPTER}"),
    ("lora_transformer_", f"a LoRA, {ADAPTER}"),
    (".lora_A.", f"a LoRA, {ADAPTER}"),
    (".lora_up.", f"a LoRA, {ADAPTER}"),
    (".lora.down.", f"a LoRA, {ADAPTER}"),
    ("control_model.", f"a ControlNet, {ADAPTER}"),
    ("zero_convs.", f"a ControlNet, {ADAPTER}"),
    ("controlnet_", f"a ControlNet, {ADAPTER}"),
    ("emb_params", f"a textual inversion, {ADAPTER}"),
    ("string_to_param", f"a textual inversion, {ADAPTER}"),
    ("double_blocks.", f"FLUX, {OTHER}"),
    ("joint_blocks.", f"Stable Diffusion 3, {OTHER}"),
    ("conditioner.embedders.", f"SDXL, {OTHER}"),
    ("cond_stage_model.model.", f"Stable Diffusion 2, {OTHER}"),
)
"""Pieces of names that tell what a file may be that no family recognises."""


@dataclass(frozen=True)
class Match:
    """One family, one arrangement.

    Attributes:
        family: the variant.
        arrangement: how the file puts its parts together.
        moved: its tensors by native name, lazily, and what is left over.
    """

    family: Kind
    arrangement: Arrangement
    moved: Moved


@dataclass(frozen=True)
class Unknown:
    """No family, or no single one.

    Attributes:
        why: what is missing, or what tied.
        parts: networks that are there all the same (a stand-alone autoencoder).
        arrangement: how they are named, None without any.
        moved: their tensors by native name.
    """

    why: str
    parts: tuple[Part, ...] = ()
    arrangement: Arrangement | None = None
    moved: Moved = field(default_factory=Moved)


def families() -> list[Kind]:
    """All families. Every module of this package is imported and registers its own, so there is no list."""
    for module in pkgutil.iter_modules(sumuk.families.__path__):
        importlib.import_module(f"sumuk.families.{module.name}")
    return [FAMILIES[name] for name in FAMILIES]


def detect(tensors: Mapping[str, Lazy], among: list[Kind] | None = None) -> Match | Unknown:
    """The family and arrangement of a file or folder.

    Args:
        tensors: its tensors by their names in the file; in a diffusers folder ``unet/conv_in.weight``.
        among: families to consider, all by default.
    """
    done: dict[int, Moved] = {}
    matches: list[Match] = []
    partial: list[Unknown] = []
    reasons: list[str] = []
    for family in families() if among is None else among:
        for arrangement in family.arrangements:
            if id(arrangement) not in done:
                done[id(arrangement)] = moved(arrangement, tensors)
            here = done[id(arrangement)]
            present = tuple(part for part in family.parts if f"{part.name}.{part.key}" in here.tensors)
            if not present:
                continue
            reason = family.recognise({name: tensor.shape for name, tensor in here.tensors.items()})
            if reason is None:
                matches.append(Match(family, arrangement, here))
            else:
                reasons.append(f"not {family.name}: {reason}")
                partial.append(Unknown(reason, present, arrangement, here))
    if matches:
        return _best(matches)
    return _unknown(tensors, partial, reasons)


def moved(arrangement: Arrangement, tensors: Mapping[str, Lazy]) -> Moved:
    """A file's tensors at the places that an arrangement gives them; all unknown where it does not fit at all."""
    try:
        return arrangement.layout(tensors).forward(tensors)
    except BadFile:  # shapes that its rules cannot cut: some other layout's names
        return Moved(unknown=list(tensors))


def _leftover(moved: Moved) -> int:
    return len(moved.unknown) + len(moved.halves)


def _best(matches: list[Match]) -> Match | Unknown:
    least = min(_leftover(match.moved) for match in matches)
    best = [match for match in matches if _leftover(match.moved) == least]
    if len(best) > 1:
        tied = ", ".join(f"{match.family.key} as {match.arrangement.name}" for match in best)
        return Unknown(f"several families fit alike: {tied}")
    return best[0]


def _unknown(tensors: Mapping[str, Lazy], partial: list[Unknown], reasons: list[str]) -> Unknown:
    for piece, kind in KINDS:
        if any(piece in name for name in tensors):
            return Unknown(f"looks like {kind}; saw {some(list(tensors))}")
    # A denoiser that nobody recognises is another model; without one, what is there may serve as a part.
    bare = [unknown for unknown in partial if not any(part.name == "denoiser" for part in unknown.parts)]
    if bare and len(bare) == len(partial):
        best = min(bare, key=lambda unknown: _leftover(unknown.moved))
        titles = " and ".join(part.title for part in best.parts)
        return Unknown(
            f"only the {titles}, no denoiser: give it to load() beside a model",
            best.parts,
            best.arrangement,
            best.moved,
        )
    if reasons:
        return Unknown("; ".join(dict.fromkeys(reasons)))
    return Unknown(f"no known network in {len(tensors)} tensors: saw {some(list(tensors)) or 'none'}")
