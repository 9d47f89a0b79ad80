"""Every spelling of a LoRA's names, and the layer of the model that each means.

All spellings reduce to (network, path of the layer, factor). What differs is the prefix of the network, whether dots
became ``_``, whose names the path has, and how the factor is called::

    lora_unet_input_blocks_4_1_proj_in.lora_down.weight           kohya
    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight         PEFT
    down_blocks.1.attentions.0...attn1.processor.to_q_lora.down.weight

The paths need no table. A family's own layout rules, read backward on probes that carry their row numbers, say how
the diffusers library names each native tensor and which rows of it (its ``to_q`` is the first third of a native
``qkv``); dots turned into ``_`` make kohya's paths of either side's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from sumuk.families.adapters import FACTORS, INNER
from sumuk.families.family import Family, Part
from sumuk.files.layout import Layout, Rule
from sumuk.files.tensors import Lazy, Shape

# -- places ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a tensor of some spelling lies in the model.

    Attributes:
        part: ``denoiser``, ``text``, ...
        name: the native tensor of that part.
        rows: which of its rows; None: all.
        rolled: by how many rows it is turned round against the spelling's: half of all, where halves are swapped.
        turned: whether it is the spelling's transposed.
    """

    part: str
    name: str
    rows: tuple[int, int] | None = None
    rolled: int = 0
    turned: bool = False


WEIGHTS, BIASES = "weight", "bias"
_KIND = re.compile(r"(.+)[._](weight|bias|scale)")


def layer_of(name: str) -> tuple[str, str]:
    """A tensor's layer and whether it is its weight or its bias; a tensor without layer is the weight of one."""
    found = _KIND.fullmatch(name)
    if found is None:
        return name, WEIGHTS
    return found[1], BIASES if found[2] == "bias" else WEIGHTS


class Paths:
    """All names of one network's tensors, native and diffusers', old and new.

    Args:
        part: the network.
        native: its native names and shapes, without the part in front.
    """

    def __init__(self, part: Part, native: Mapping[str, Shape]) -> None:
        self.part = part.name
        self.native = {name: Place(part.name, name) for name in native}
        diffusers = part.rules("diffusers", native)
        probes = {name: _probe(shape) for name, shape in native.items() if shape}
        self.diffusers = self._spelt(probes, [rule for rule in diffusers if rule.writes])
        old = [rule for rule in (*part.rules("original", native), *diffusers) if not rule.writes]
        self.old = self._spelt(probes, [replace(rule, writes=True) for rule in old if rule.native])
        # Where a name is one on both sides, as the tower's projection, a LoRA means diffusers' tensor.
        self._found: dict[tuple[str, str], Place] = {}
        for table in (self.native, self.old, self.diffusers):
            for name, place in table.items():
                layer, kind = layer_of(name)
                self._found[layer.replace(".", "_"), kind] = place

    def find(self, layer: str, kind: str = WEIGHTS) -> Place | None:
        """The place of a layer's weight or bias, dots in its name or ``_``."""
        return self._found.get((layer.replace(".", "_"), kind))

    def _spelt(self, probes: Mapping[str, Lazy], rules: list[Rule]) -> dict[str, Place]:
        moved = Layout(*rules).backward(probes)
        return {
            name: self._place(origins[0], probes[origins[0]], moved.tensors[name])
            for name, origins in moved.origin.items()
            if len(origins) == 1
        }

    def _place(self, name: str, probe: Lazy, seen: Lazy) -> Place:
        if seen is probe:
            return Place(self.part, name)
        height = probe.shape[0]
        rows = seen.load()
        turned = rows.ndim == 2 and rows.shape[0] == 1 < height
        rows = rows.flatten()
        first, count = int(rows[0]), len(rows)
        if torch.equal(rows, torch.arange(first, first + count)):
            whole = count == height
            return Place(self.part, name, None if whole else (first, first + count), turned=turned)
        assert 2 * first == height and torch.equal(rows, torch.arange(height).roll(first)), (
            f"{name}: rows out of order"
        )
        return Place(self.part, name, rolled=first, turned=turned)


def _probe(shape: Shape) -> Lazy:
    """A stand-in that holds the number of each row, and is one number wide."""
    thin = (shape[0], *(1 for _ in shape[1:]))
    return Lazy(thin, "I64", partial(_count, thin))


def _count(shape: Shape) -> torch.Tensor:
    return torch.arange(shape[0]).reshape(shape)


# -- networks --------------------------------------------------------------------------------------------------------

DENOISER_PREFIXES = (
    "lora_unet_", "lora_transformer_", "lora_prior_unet_", "unet.", "transformer.", "prior.", "diffusion_model.",
)  # fmt: skip
TOWER_PREFIXES = (
    ("lora_te_", "text"), ("lora_te1_", "text"), ("lora_prior_te_", "text"), ("text_encoder.", "text"),
    ("lora_te2_", "text_2"), ("text_encoder_2.", "text_2"), ("lora_te3_", "text_3"), ("text_encoder_3.", "text_3"),
)  # fmt: skip
EMBEDDINGS = {
    "string_to_param": "text", "emb_params": "text", "clip_l": "text", "clip_g": "text_2", "t5xxl": "text_3",
}  # fmt: skip
"""Text towers, by what an embedding calls its rows for them."""
SHARED_PREFIXES = ("base_model.model.", "lycoris_", "")
"""Prefixes of whichever network was trained."""

INNER_TOWER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What the first diffusers called a text tower's projections."""

XLABS = re.compile(r"(?P<block>(?P<kind>double|single)_blocks\.[0-9]+)\.(?P<which>qkv|proj)(?P<stream>[12]?)")
"""XLabs's layers: of both streams of a double block, or of a single one."""


class Index:
    """The layers of one model under every name.

    Args:
        family: its family.
        native: its tensors, native names (``denoiser.input_blocks.0.0.weight``) and shapes.
    """

    def __init__(self, family: Family, native: Mapping[str, Shape]) -> None:
        self.family = family
        self.native = native
        self.paths: dict[str, Paths] = {}
        self.denoiser = family.parts[0].name
        for part in family.parts:
            if part.name == self.denoiser or part.name.startswith("text"):
                head = f"{part.name}."
                own = {name[len(head) :]: shape for name, shape in native.items() if name.startswith(head)}
                if own:
                    self.paths[part.name] = Paths(part, own)
        self.towers = tuple(part for part in self.paths if part != self.denoiser)
        prefixes = [(prefix, self.denoiser) for prefix in DENOISER_PREFIXES]
        prefixes += [(prefix, self._tower(part)) for prefix, part in TOWER_PREFIXES]
        prefixes += [(prefix, part.name) for part, prefix in family.arrangements[0].parts if prefix]
        self._prefixes = sorted(prefixes, key=lambda each: -len(each[0]))

    def tower(self, key: str) -> Part | None:
        """The text tower that an embedding is for, by its name in files: ``clip_l``, ``clip_g``, ``t5xxl``."""
        kinds = {
            "clip_l": "text",
            "string_to_param": "text",
            "emb_params": "text",
            "clip_g": "text_2",
            "t5xxl": "text_3",
        }
        alone = len(self.towers) == 1 and key == "clip_g"  # SDXL's refiner, Cascade
        name = self.towers[0] if alone else self._tower(kinds.get(key, ""))
        return next((part for part in self.family.parts if part.name == name and name in self.paths), None)

    def _tower(self, part: str) -> str:
        """kohya counts FLUX.1's T5 as the third tower, as if bigG were there; everybody else as the second."""
        known = {each.name for each in self.family.parts}
        return "text_2" if part == "text_3" and part not in known else part

    def shape(self, place: Place) -> Shape:
        """Of a tensor, or of its rows that are meant."""
        whole = self.native[f"{place.part}.{place.name}"]
        return whole if place.rows is None else (place.rows[1] - place.rows[0], *whole[1:])

    def find(self, layer: str, kind: str = WEIGHTS) -> Place | None:
        """What a layer of a file is in the model.

        Args:
            layer: as the file spells it, with its prefix, as :func:`cut` gives it.
            kind: its ``weight`` or its ``bias``.
        """
        for part, path in self._candidates(layer):
            if part in self.paths and (place := self._within(part, path, kind)) is not None:
                return place
        return None

    def _candidates(self, layer: str) -> Iterator[tuple[str, str]]:
        """Networks that a name may belong to, with the rest of it."""
        for prefix, part in self._prefixes:
            if layer.startswith(prefix):
                yield part, layer[len(prefix) :].removeprefix("base_model.model.")
                return
        shared = next(prefix for prefix in SHARED_PREFIXES if layer.startswith(prefix))
        # A tower's names tell that it is one, but not which of several.
        for part in (self.denoiser, *(self.towers if len(self.towers) == 1 else ())):
            yield part, layer[len(shared) :]

    def _within(self, part: str, path: str, kind: str) -> Place | None:
        paths = self.paths[part]
        if found := XLABS.fullmatch(path):
            return self._xlabs(paths, found, kind)
        layer, _, inner = path.rpartition(".")
        others = (f"{path}.0", f"{layer}.{INNER_TOWER[inner]}") if inner in INNER_TOWER else ()
        return next((place for each in (path, *others) if (place := paths.find(each, kind))), None)

    def _xlabs(self, paths: Paths, found: re.Match[str], kind: str) -> Place | None:
        block, which = found["block"], found["which"]
        if found["kind"] == "double":
            return paths.find(f"{block}.{'txt' if found['stream'] == '2' else 'img'}_attn.{which}", kind)
        place = paths.find(f"{block}.linear{1 if which == 'qkv' else 2}", kind)
        if place is None or which == "proj":
            return place
        return replace(place, rows=(0, 3 * self.shape(place)[-1]))  # the rest is the feed-forward part's


# -- factors ---------------------------------------------------------------------------------------------------------

BIAS, MAGNITUDE = "lora_B.bias", "magnitude"
"""Factors that only PEFT has: what is added to a bias, and the lengths of rows (DoRA)."""

_PEFT = {
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_B.bias": BIAS,
    "lora_A.default.weight": "lora_down.weight", "lora_B.default.weight": "lora_up.weight", "lora_B.default.bias": BIAS,
    "lora_magnitude_vector": MAGNITUDE, "lora_magnitude_vector.weight": MAGNITUDE,
    "lora_magnitude_vector.default.weight": MAGNITUDE,
}  # fmt: skip
_DIFFUSERS = {
    "lora.down.weight": "lora_down.weight", "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight", "lora_linear_layer.up.weight": "lora_up.weight",
}  # fmt: skip
_CASCADE = {"lora_down": "lora_down.weight", "lora_up": "lora_up.weight"}
_FACTORS = {name: name for name in FACTORS} | _PEFT | _DIFFUSERS | {"scale": "set_weight"}
_CUT = re.compile(rf"(?P<layer>.+?)\.(?P<suffix>{'|'.join(map(re.escape, _FACTORS))})")
_NUMBERED = re.compile(r"(?P<layer>weights\.[0-9]{1,5})\.(?P<suffix>lora_down|lora_up)")
_BARE = ("double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.",
         "final_layer.")  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A tensor's name, understood.

    Attributes:
        layer: the layer that it belongs to, as the file spells it.
        factor: what it is of it, as kohya and LyCORIS call it, or :data:`BIAS` or :data:`MAGNITUDE`.
        spelling: whose names these are; empty where it does not show (``alpha``).
    """

    layer: str
    factor: str
    spelling: str


def cut(name: str) -> Piece | None:
    """A tensor's layer and factor; None if it is no factor's name."""
    if found := _NUMBERED.fullmatch(name):
        return Piece(found["layer"], _CASCADE[found["suffix"]], "cascade")
    if found := INNER.fullmatch(name):
        stream = found["suffix"].partition(".")[0].removeprefix("lora")
        factor = "lora_down.weight" if ".down." in found["suffix"] else "lora_up.weight"
        flux = re.search(r"(?:double|single)_blocks\.", found["layer"])
        return Piece(f"{found['layer']}.{found['which']}{stream}", factor, "xlabs" if flux else "processor")
    if found := _CUT.fullmatch(name):
        return Piece(found["layer"], _FACTORS[found["suffix"]], _spelling(found["layer"], found["suffix"]))
    return None


def _spelling(layer: str, suffix: str) -> str:
    if suffix in ("alpha", "dora_scale"):
        return ""
    if suffix in _DIFFUSERS:
        return "diffusers"
    if suffix in _PEFT or suffix == "scale":
        return "bfl" if f"{layer}.".startswith(_BARE) else "peft"
    return "dotted" if "." in layer else "kohya"
