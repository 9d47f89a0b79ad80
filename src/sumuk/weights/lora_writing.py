"""Writing LoRA files as the field's tools expect them; to convert one is to read it and to write it.

``kohya``: dots turned into ``_``, the diffusers library's paths for Stable Diffusion 1 and 2, the published ones for
SDXL and later, transformers' for text towers; every method. ``peft``: the diffusers library's paths as they are, with
``lora_A`` and ``lora_B``, which is products and DoRA alone; alpha goes into ``lora_B``, as readers differ in where
they look for it.

Where a layout cuts a native tensor into several layers, or holds several patches of it in one, the factors are cut or
laid together, exactly. What it has no place for is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sumuk.base.errors import BadInput, nearest
from sumuk.families.family import Family
from sumuk.files.tensors import Shape, write
from sumuk.weights.changes import Change, make_change
from sumuk.weights.lora import Patch
from sumuk.weights.lora_factors import Factors, is_nothing, joined, native_sides, shaped, sliced
from sumuk.weights.lora_names import BIASES, Index, Paths, Place, layer_of

DIFFUSERS_PATHS = ("sd1", "sd2")
"""Families whose U-Net kohya's scripts name as the diffusers library does."""
KOHYA_TOWERS: Mapping[str, Mapping[str, str]] = {
    "sd1": {"text": "lora_te_"},
    "sd2": {"text": "lora_te_"},
    "cascade": {"text": "lora_prior_te_"},
    "flux": {"text": "lora_te1_", "text_2": "lora_te3_"},
}
USUAL_TOWERS = {"text": "lora_te1_", "text_2": "lora_te2_", "text_3": "lora_te3_"}
IMPLEMENTATIONS = {
    "flux": "https://github.com/black-forest-labs/flux",
    "sd3": "https://github.com/Stability-AI/sd3-ref",
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "cascade": "https://github.com/Stability-AI/StableCascade",
}
"""Whose paths the layers have; those of Stable Diffusion 1 and 2 are the diffusers library's."""
BASES = {"sdxl": {"ss_base_model_version": "sdxl_base_v1-0"}, "sd2": {"ss_v2": "True"}}
"""By which A1111 lists a LoRA under its model; what says neither is taken for Stable Diffusion 1."""
MODELSPEC = "1.0.1"


def write_lora(
    path: str | os.PathLike[str],
    patches: Sequence[Patch],
    layout: str,
    family: Family,
    native: Mapping[str, Shape],
    metadata: Mapping[str, str] | None = None,
    embeddings: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a LoRA.

    Args:
        path: a ``.safetensors`` file, replaced when the new one is complete.
        patches: what it changes.
        layout: ``kohya`` or ``peft``.
        family: of the model that it changes.
        native: native names of that model's tensors, with the part in front, and their shapes.
        metadata: further texts for the header. What they say of the network's ranks, and hashes of another file, are
            replaced or left away.
        embeddings: textual inversions to go with it, as :func:`~sumuk.weights.lora.read_lora` gives them.

    Raises:
        BadInput: an unknown layout, nothing to write, or something that the layout has no place for.
        BadFile: writing failed; what was there before is as it was.
    """
    if layout not in LAYOUTS:
        raise BadInput(f"LoRAs cannot be written in the layout {layout!r}{nearest(layout, LAYOUTS)}")
    if not patches and not embeddings:
        raise BadInput("there is nothing to write: no change and no embedding")
    speller = LAYOUTS[layout](Index(family, native))
    grouped: dict[tuple[str, str], list[Patch]] = {}
    for patch in patches:
        grouped.setdefault((patch.part, patch.name), []).append(patch)
    names = {part: _by_native(speller.paths(paths)) for part, paths in speller.index.paths.items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for (part, name), group in grouped.items():
        if name not in names.get(part, {}):
            raise BadInput(f"{group[0].source}: changes {part}.{name}, for which the layout has no name")
        for layer, factors in _layers(speller, names[part][name], group):
            layers.setdefault(layer, {}).update(factors)
    tensors = {
        f"{layer}.{name}": one
        for layer, some in layers.items()
        for name, one in speller.spell(layer, some).items()
    }
    tensors |= speller.bundle(embeddings or {})
    stale = ("sshs_", "ss_network_", "modelspec.hash_", "lora_adapter_metadata")
    kept = {key: text for key, text in (metadata or {}).items() if not key.startswith(stale)}
    write(path, tensors, speller.texts(kept, layers, [patch.change for patch in patches]))


@dataclass(frozen=True)
class _Kohya:
    """kohya's and LyCORIS's names."""

    index: Index

    def paths(self, paths: Paths) -> dict[str, Place]:
        """The layout's names of a network's tensors, and where they lie."""
        family = self.index.family.name
        if paths.part != self.index.denoiser or family in DIFFUSERS_PATHS:
            return paths.diffusers
        # ComfyUI's for Cascade, whose attention is not stacked: the only published network with old names.
        stacks = {place.name for place in paths.old.values()}
        return {name: place for name, place in paths.native.items() if name not in stacks} | paths.old

    def layer(self, part: str, path: str) -> str:
        """A layer's name in the file."""
        family = self.index.family.name
        towers = KOHYA_TOWERS.get(family, USUAL_TOWERS)
        net = "lora_prior_unet_" if family == "cascade" else "lora_unet_"
        return (net if part == self.index.denoiser else towers[part]) + path.replace(".", "_")

    def spell(self, layer: str, factors: Factors) -> dict[str, Tensor]:
        """Its factors' names."""
        return {name: factor.contiguous() for name, factor in factors.items()}

    def bundle(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Embeddings that go with it."""
        made = {}
        for name, towers in embeddings.items():
            for tower, rows in towers.items():
                keys = (
                    ("clip_l", "clip_g", "t5xxl")
                    if len(self.index.towers) > 1
                    else ("string_to_param", "clip_g")
                )
                found = (
                    key for key in keys if (part := self.index.tower(key)) is not None and part.name == tower
                )
                key = next(found, None)
                if key is None:
                    raise BadInput(
                        f"the embedding {name!r} is for {tower}, which has no name in a LoRA's file"
                    )
                made[f"bundle_emb.{name}.{key}{'.*' if key == 'string_to_param' else ''}"] = rows.contiguous()
        return made

    def texts(
        self, kept: Mapping[str, str], layers: Mapping[str, Factors], changes: Sequence[Change]
    ) -> dict[str, str]:
        """The header's texts: those that it keeps, and what the file holds."""
        family = self.index.family
        methods = sorted({change.method for change in changes})
        plain = set(methods) <= {"LoRA"}
        said = {
            "modelspec.sai_model_spec": MODELSPEC,
            "modelspec.architecture": f"{family.architecture}/lora",
            "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
            "ss_network_dim": _one([_rank(factors) for factors in layers.values()]),
            "ss_network_alpha": _one([_alpha(factors) for factors in layers.values()]),
            **BASES.get(family.name, {}),
        }
        if not plain and len(methods) == 1:
            said["ss_network_args"] = json.dumps({"algo": methods[0].lower()})
        usual = {
            "modelspec.implementation": IMPLEMENTATIONS.get(family.name, "diffusers"),
            "modelspec.resolution": f"{family.defaults.size}x{family.defaults.size}",
            "modelspec.title": f"{' and '.join(methods) or 'embeddings'} for {family.title}",
        }
        return usual | dict(kept) | said


@dataclass(frozen=True)
class _Peft:
    """PEFT's names below those of a diffusers folder's networks."""

    index: Index

    def paths(self, paths: Paths) -> dict[str, Place]:
        """The layout's names of a network's tensors, and where they lie."""
        return paths.diffusers

    def layer(self, part: str, path: str) -> str:
        """A layer's name in the file."""
        folders = next(each for each in self.index.family.arrangements if each.name == "diffusers")
        folder = next(prefix for each, prefix in folders.parts if each.name == part)
        return f"{folder.strip('/')}.{path}"

    def spell(self, layer: str, factors: Factors) -> dict[str, Tensor]:
        """Its factors' names."""
        rest = {name: factor for name, factor in factors.items() if name not in ("diff_b", "dora_scale")}
        if not {"lora_up.weight", "lora_down.weight"} <= rest.keys():
            raise BadInput(
                f"{layer}: {', '.join(factors)} have no place in PEFT's names; write the layout kohya"
            )
        up, down = rest["lora_up.weight"], rest["lora_down.weight"]
        shape = (len(up), down.shape[1], *rest.get("lora_mid.weight", down).shape[2:])
        pair = make_change(rest, shape, layer).low_rank()
        if pair is None:
            raise BadInput(
                f"{layer}: {', '.join(factors)} have no place in PEFT's names; write the layout kohya"
            )
        thin, wide, scale = pair
        made = {
            "lora_A.weight": thin.to(down.dtype).contiguous(),
            "lora_B.weight": (wide.float() * scale)
            .to(up.dtype)
            .reshape(*wide.shape, *(1 for _ in shape[2:])),
        }
        if (bias := factors.get("diff_b")) is not None:
            made["lora_B.bias"] = bias.flatten()
        if (lengths := factors.get("dora_scale")) is not None:
            if len(lengths) != shape[0]:
                raise BadInput(
                    f"{layer}: dora_scale goes over columns, which PEFT's DoRA does not; write kohya"
                )
            sides = (1, -1, *(1 for _ in shape[2:])) if shape[2:] else (-1,)
            made["lora_magnitude_vector"] = lengths.reshape(sides)
        return made

    def bundle(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Refused."""
        if embeddings:
            names = ", ".join(embeddings)
            raise BadInput(f"PEFT's names have no place for the embeddings {names}; save them by themselves")
        return {}

    def texts(
        self, kept: Mapping[str, str], layers: Mapping[str, Factors], changes: Sequence[Change]
    ) -> dict[str, str]:
        """The header's texts."""
        return dict(kept) | {"format": "pt"}


LAYOUTS: Mapping[str, type[_Kohya] | type[_Peft]] = {"kohya": _Kohya, "peft": _Peft}


def _by_native(paths: Mapping[str, Place]) -> dict[str, list[tuple[str, Place]]]:
    """A layout's names of each native tensor: several where it is a stack."""
    made: dict[str, list[tuple[str, Place]]] = {}
    for spelt, place in paths.items():
        made.setdefault(place.name, []).append((spelt, place))
    return made


def _layers(
    speller: _Kohya | _Peft, names: Sequence[tuple[str, Place]], group: Sequence[Patch]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The layers that hold the changes of one native tensor, and their factors."""
    index, part, name = speller.index, group[0].part, group[0].name
    shape = index.native[f"{part}.{name}"]
    tables = [each.key for each in index.family.parts if each.name == part != index.denoiser]
    if name in tables and any(patch.rows for patch in group):
        raise BadInput(f"{group[0].source}: a change of single words has no place in a LoRA's names")
    for spelt, place in names:
        begin, end = place.rows or (0, shape[0])
        path, kind = layer_of(spelt)
        layer = speller.layer(part, path)
        pieces = _pieces(group, begin, end, shape[0])
        if not pieces:
            continue
        whole = len(pieces) == 1 and pieces[0][1].shape[0] == end - begin
        factors = pieces[0][1].tensors() if whole else joined(pieces, index.shape(place), layer)
        if kind == BIASES:
            factors = {"diff_b" if factor == "diff" else factor: one for factor, one in factors.items()}
            if not factors.keys() <= {"diff_b", "b_norm"}:
                raise BadInput(f"{layer}: {', '.join(factors)} of a bias have no name in a LoRA's file")
        yield layer, native_sides(shaped(factors, index.shape(place)), place, layer)


def _pieces(group: Sequence[Patch], begin: int, end: int, height: int) -> list[tuple[int, Change]]:
    """What some patches change of the rows ``begin`` to ``end``, from where on."""
    pieces = []
    for patch in group:
        first, last = patch.rows or (0, height)
        low, high = max(first, begin), min(last, end)
        if low >= high:
            continue
        change = patch.change
        if (low, high) != (first, last):
            factors = sliced(change.tensors(), low - first, high - first, patch.source)
            if is_nothing(factors):
                continue
            change = make_change(factors, (high - low, *change.shape[1:]), patch.source)
        pieces.append((low - begin, change))
    return pieces


def _rank(factors: Factors) -> str:
    for name, side in (("lora_down.weight", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0)):
        if name in factors:
            return str(factors[name].shape[side])
    return ""


def _alpha(factors: Factors) -> str:
    alpha = factors.get("alpha")
    return _rank(factors) if alpha is None else f"{float(alpha):g}"


def _one(values: Sequence[str]) -> str:
    """What all layers have; kohya's scripts say Dynamic where they differ."""
    found = {value for value in values if value}
    return found.pop() if len(found) == 1 else "Dynamic"
