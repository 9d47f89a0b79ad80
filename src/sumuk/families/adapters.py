"""Kinds without a network of their own: what changes a model by few numbers, known by its tensors' names.

A LoRA (Hu et al. 2021) names a layer of the model and a factor of what is added to it; layouts differ in how they
spell both. Textual inversions (Gal et al. 2022) are a few rows of a token table, hypernetworks small networks beside
attention's inputs.

Native names here are the file's own behind a tag that says how they are spelt (``kohya.``, ``peft.``, ...), so one
function reads them all. Which model it was made for is read off layers and widths; where Stable Diffusion 1 and 2
look alike, the kind is ``lora/sd``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from sumuk.families.family import FAMILIES, Arrangement, Kind, Shapes
from sumuk.files.layout import rename
from sumuk.files.tensors import Shape

# -- how they are spelt --------------------------------------------------------------------------------------------

FACTORS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "rescale", "on_input",
    "w_norm", "b_norm", "diff", "diff_b", "set_weight", "reshape_weight", "bias_indices", "bias_values", "bias_size",
    "weight",
)  # fmt: skip
"""What kohya's and LyCORIS's scripts write of a layer."""

PEFT = ("A", "B", "A.default", "B.default")
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "kohya": FACTORS,
    "dotted": FACTORS[:-1],  # a plain weight there is a network's
    "peft": (
        *(f"lora_{each}.weight" for each in PEFT), "lora_B.bias", "lora_B.default.bias", "alpha", "dora_scale",
        "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight",
    ),
    "diffusers": ("lora.down.weight", "lora.up.weight", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight",
                  "alpha"),
    "bfl": ("lora_A.weight", "lora_B.weight", "lora_B.bias", "query_norm.scale", "key_norm.scale"),
    "cascade": ("lora_down", "lora_up", "embeddings", "indices"),
}  # fmt: skip
"""Last pieces of a tensor's name, by spelling; the first pieces name the layer."""

INNER = re.compile(
    r"(?P<layer>.+?)\.(?:processor\.)?(?P<which>\w+)_(?P<suffix>lora[12]?\.(?:down|up)\.weight)"
)
"""Spellings with an underscore before the factor: ``attn1.processor.to_q_lora.down.weight``."""

HALVES = (
    ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"), ("lora_down", "lora_up"),
    ("lora_A.default.weight", "lora_B.default.weight"), ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"),
    *((f"lora{n}.down.weight", f"lora{n}.up.weight") for n in (1, 2)),
)  # fmt: skip
"""Factors that are of no use without one another; the first has the rank as its rows, except in ``hada`` and
``lokr``."""

OTHER = dict(HALVES) | {second: first for first, second in HALVES}
WHOLE = ("diff", "w_norm", "oft_blocks", "lokr_w1", "set_weight", "a1.weight", "on_input")
"""Factors that stand by themselves."""

READERS = ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight", "hada_w1_b", "diff",
           "lora_linear_layer.down.weight", "lora1.down.weight", "lora_down")  # fmt: skip
"""Factors whose second side is what the layer takes."""

MOST_FACTORS = 20_000
"""Tensors of one at most: SDXL's with all its convolutions has 6,000 in LyCORIS's longest spelling."""

DOTTED = ("unet.*", "transformer.*", "text_encoder.*", "text_encoder_2.*", "text_encoder_3.*", "base_model.model.*",
          "diffusion_model.*", "prior.*")  # fmt: skip
LEVELS = ("down_blocks.*", "mid_block.*", "up_blocks.*")
DEPTHS = ("transformer_blocks.*", "single_transformer_blocks.*")
BFL = ("img_in.*", "txt_in.*", "time_in.*", "vector_in.*", "guidance_in.*", "double_blocks.*", "single_blocks.*",
       "final_layer.*")  # fmt: skip


def _spelt(tag: str, title: str, *names: str) -> Arrangement:
    rules = tuple(rename(name, f"{tag}.{name}") for name in names)
    return Arrangement(name=tag, title=title, dialect="original", parts=(), ignored=rules)


LORA_FILES = (
    _spelt(
        "kohya", "kohya's and LyCORIS's names, dots turned into _",
        *(f"lora_{net}_*" for net in ("unet", "te", "te1", "te2", "te3", "transformer", "prior_unet", "prior_te")),
        "lycoris_*", "bundle_emb.*",
    ),
    _spelt("dotted", "LyCORIS's factors on names with dots, as ComfyUI writes them", *DOTTED, "text_encoders.*"),
    _spelt("peft", "PEFT's names, as diffusers writes them today", *DOTTED, *LEVELS, *DEPTHS),
    _spelt("diffusers", "names of diffusers up to 0.21", *DOTTED),
    _spelt("processor", "names of the first diffusers with LoRA", *DOTTED, *LEVELS),
    _spelt("xlabs", "XLabs's names", "double_blocks.{i}.processor.*", "single_blocks.{i}.processor.*"),
    _spelt("bfl", "Black Forest Labs's names", *BFL),
    _spelt(
        "cascade", "Stable Cascade's own, layers by number",
        "embeddings.embeddings", "embeddings.indices", "weights.{i}.lora_down", "weights.{i}.lora_up",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """What names and shapes say of a LoRA.

    Attributes:
        target: the models that it was made for, a variant of ``lora``; empty: none that is known here.
        method: LoRA, LoHa, LoKr, ...
        ranks: of its factors, ascending.
        layers: how many of each network.
        lacking: a name that is not there though its other half is; None: all are there.
    """

    target: str
    method: str
    ranks: tuple[int, ...]
    layers: Mapping[str, int]
    lacking: str | None


def read_lora(shapes: Shapes) -> Lora | None:
    """A LoRA from tagged names; None if some of them is no LoRA's."""
    return _read(tuple(shapes.items()))


@lru_cache(maxsize=2)  # each variant asks for the same
def _read(entries: tuple[tuple[str, Shape], ...]) -> Lora | None:
    if len(entries) > MOST_FACTORS:
        return None
    layers: dict[str, dict[str, Shape]] = {}
    lacking = None
    names = {name for name, _ in entries}
    for name, shape in entries:
        tag, _, rest = name.partition(".")
        if rest.startswith("bundle_emb."):
            continue  # embeddings that came with it
        cut = _cut(tag, rest)
        if cut is None:
            return None
        layers.setdefault(cut[0], {})[cut[1]] = shape
        if (other := OTHER.get(cut[1])) and (lost := name.removesuffix(cut[1]) + other) not in names:
            lacking = lost.partition(".")[2]
    factors = {suffix for layer in layers.values() for suffix in layer}
    if not factors & {*OTHER, *WHOLE}:
        return None
    networks = Counter(_network(layer) for layer in layers if layer != "embeddings")
    return Lora(_target(layers), _method(factors), _ranks(layers), dict(networks), lacking)


def _cut(tag: str, name: str) -> tuple[str, str] | None:
    """A tensor's layer, dots turned into ``_``, and what it is of it."""
    if tag in ("processor", "xlabs"):
        found = INNER.fullmatch(name)
        return (f"{found['layer']}_{found['which']}".replace(".", "_"), found["suffix"]) if found else None
    for suffix in SUFFIXES[tag]:
        if name.endswith(f".{suffix}"):
            return name[: -len(suffix) - 1].replace(".", "_"), suffix
    return None


NETWORKS = (
    (
        re.compile(r"lora_te_|text_encoder_(?!\d_)|lora_te1_|lora_prior_te_|base_model_model_text_model_"),
        "text tower",
    ),
    (re.compile(r"lora_te2_|text_encoder_2_"), "second text tower"),
    (re.compile(r"lora_te3_|text_encoder_3_"), "third text tower"),
)


def _network(layer: str) -> str:
    return next((title for pattern, title in NETWORKS if pattern.match(layer)), "denoiser")


METHODS = (
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_blocks", "OFT"),
    ("a1.weight", "GLoRA"),
    ("on_input", "IA3"),
)


def _method(factors: set[str]) -> str:
    found = [title for piece, title in METHODS if any(factor.startswith(piece) for factor in factors)]
    if any(factor.startswith("lora") for factor in factors):
        found.insert(0, "LoRA")
    if "dora_scale" in factors or any("magnitude" in factor for factor in factors):
        found.append("DoRA")
    return " and ".join(found) or "whole differences"


def _ranks(layers: Mapping[str, Mapping[str, Shape]]) -> tuple[int, ...]:
    found: set[int] = set()
    for factors in layers.values():
        for first, _ in HALVES:
            if shape := factors.get(first):
                found.add(shape[-1] if first.startswith(("hada", "lokr")) else shape[0])
    return tuple(sorted(found))


# -- which model it was made for -----------------------------------------------------------------------------------

UNET_LAYERS = re.compile(r"(?:down|up|input|output)_blocks_\d|(?:mid|middle)_block_")
CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl"}
"""Width of the text that a published U-Net reads; 1280 is SDXL's refiner."""
TOWERS = {768: "sd1", 1024: "sd2"}


def _target(layers: Mapping[str, Mapping[str, Shape]]) -> str:
    names = " ".join(layers)
    if "weights_0" in layers or "lora_prior_" in names:
        return "cascade"
    if re.search(r"(?:double|single|single_transformer)_blocks_\d", names):
        return "flux"
    if "joint_blocks_" in names:
        return "sd3"
    if UNET_LAYERS.search(names):
        return _unet_target(layers)
    if re.search(r"(?:^|[ _])transformer_blocks_\d+_(?:attn_|ff_|norm1_)", names):
        width = _takes(layers, "transformer_blocks_", "_attn_to_q", "_attn_add_q_proj")
        return {3072: "flux", 1536: "sd3", 2432: "sd3"}.get(width, "")
    return _tower_target(layers)


def _unet_target(layers: Mapping[str, Mapping[str, Shape]]) -> str:
    if found := CONTEXTS.get(_takes(layers, "_attn2_", "_to_k", "_to_v")):
        return found
    if any(re.search(r"_transformer_blocks_[1-9]", layer) for layer in layers):
        return "sdxl"  # the only one with several in a row
    tower = _tower_target(layers)
    return tower or "sd"


def _tower_target(layers: Mapping[str, Mapping[str, Shape]]) -> str:
    networks = {_network(layer) for layer in layers}
    wide = max(_takes(layers, "lora_te2_", *QUERIES), _takes(layers, "text_encoder_2_", *QUERIES))
    if "third text tower" in networks:
        return ""  # Stable Diffusion 3 or FLUX.1
    if "second text tower" in networks:
        return "sdxl" if wide == 1280 else ""
    if any(layer.startswith("lora_te1_") for layer in layers):
        return ""  # SDXL, Stable Diffusion 3 or FLUX.1
    return TOWERS.get(_takes(layers, "text_model_", *QUERIES), "")


QUERIES = ("_q_proj", "_to_q")
"""Ends of layers that take a tower's whole width."""


def _takes(layers: Mapping[str, Mapping[str, Shape]], piece: str, *ends: str) -> int:
    """The width that layers take whose name has this piece and one of these ends; 0 if none tells."""
    for layer, factors in layers.items():
        if piece in layer and layer.endswith(ends):
            for reader in READERS:
                if len(shape := factors.get(reader, ())) > 1:
                    return shape[1]
    return 0


def _recognise_lora(target: str, shapes: Shapes) -> str | None:
    lora = read_lora(shapes)
    if lora is None or lora.target != target:
        return ""
    return None if lora.lacking is None else f"it is a LoRA that lacks {lora.lacking!r}, half of a pair"


def _tell_lora(shapes: Shapes) -> Mapping[str, str]:
    lora = read_lora(shapes)
    assert lora is not None  # it was recognised
    ranks = lora.ranks
    said = {
        "method": lora.method,
        "rank": "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "layers": ", ".join(f"{count} of the {name}" for name, count in lora.layers.items()),
    }
    bundled = {name.split(".")[2] for name in shapes if ".bundle_emb." in name}
    return said | ({"embeddings": ", ".join(sorted(bundled))} if bundled else {})


def _add(
    name: str,
    variant: str,
    title: str,
    architecture: str,
    files: tuple[Arrangement, ...],
    recognise: Callable[[Shapes], str | None],
    tells: Callable[[Shapes], Mapping[str, str]],
) -> None:
    kind = Kind(
        name=name,
        variant=variant,
        title=title,
        architecture=f"{architecture}/{name}",
        arrangements=files,
        recognise=recognise,
        licence="unknown",
        tells=tells,
    )
    FAMILIES.add(kind.key, kind)


MODELS = (
    ("sd1", "Stable Diffusion 1.x", "stable-diffusion-v1"),
    ("sd2", "Stable Diffusion 2.x", "stable-diffusion-v2-768-v"),
    ("sd", "Stable Diffusion 1.x or 2.x (its layers do not tell which)", "stable-diffusion"),
    ("sdxl", "SDXL", "stable-diffusion-xl-v1-base"),
    ("sd3", "Stable Diffusion 3 or 3.5", "stable-diffusion-3-m"),
    ("flux", "FLUX.1", "flux-1-dev"),
    ("cascade", "Stable Cascade", "stable-cascade-v1-stage-c"),
)
"""Variant, the models in words, their modelspec name."""

for _variant, _title, _architecture in MODELS:
    _add(
        "lora", _variant, f"LoRA for {_title}", _architecture, LORA_FILES,
        partial(_recognise_lora, _variant), _tell_lora,
    )  # fmt: skip

# -- textual inversion ---------------------------------------------------------------------------------------------

EMBEDDING_FILES = (
    _spelt("a1111", "A1111's and kohya's names", "emb_params", "string_to_param.*"),
    _spelt("towers", "a table for each text tower", "clip_l", "clip_g", "t5xxl"),
    _spelt("token", "the token itself as the name, as diffusers writes it", "*"),
)
MOST = 128
"""Vectors of one embedding at most; a text has 75."""
NO_TOKENS = ("weight", "bias", "emb_params", "clip_l", "clip_g", "t5xxl")
WIDTHS = {(768,): "sd1", (1024,): "sd2", (768, 1280): "sdxl", (768, 1280, 4096): "sd3"}


def _embedding(shapes: Shapes) -> str:
    """The models that an embedding was made for; ``other`` without a published width, empty if it is none."""
    if len(shapes) > 3 or any(len(shape) not in (1, 2) or 0 in shape for shape in shapes.values()):
        return ""
    if any(len(shape) == 2 and shape[0] > MOST for shape in shapes.values()):
        return ""
    widths = tuple(sorted(shape[-1] for shape in shapes.values()))
    token = next(iter(shapes)).removeprefix("token.")
    if token != next(iter(shapes)):  # any name could be a token's: only a published width makes it one
        plausible = len(shapes) == 1 and "." not in token and token not in NO_TOKENS
        return WIDTHS.get(widths, "") if plausible else ""
    return WIDTHS.get(widths, "other")


def _recognise_embedding(target: str, shapes: Shapes) -> str | None:
    return None if _embedding(shapes) == target else ""


def _tell_embedding(shapes: Shapes) -> Mapping[str, str]:
    counts = {shape[0] if len(shape) == 2 else 1 for shape in shapes.values()}
    said = {"vectors": " or ".join(map(str, sorted(counts)))}
    token = next(iter(shapes)).partition("token.")[2]
    return said | ({"token": token} if token else {})


for _variant, _title, _architecture in (
    *MODELS[:2],
    *MODELS[3:5],
    ("other", "a text tower of another width", "stable-diffusion"),
):
    _add(
        "textual-inversion", _variant, f"textual inversion for {_title}", _architecture, EMBEDDING_FILES,
        partial(_recognise_embedding, _variant), _tell_embedding,
    )  # fmt: skip

# -- hypernetworks -------------------------------------------------------------------------------------------------

HYPERNETWORK_FILES = (
    _spelt(
        "a1111", "A1111's, its nested tables made flat: width, keys 0 or values 1, layer",
        *(f"{{width}}.{{side}}.{layer}.*" for layer in ("linear", "linear1", "linear2")),
    ),
)  # fmt: skip


def _hypernetwork(shapes: Shapes) -> str:
    widths = {int(name.split(".")[1]) for name in shapes}
    sides = {name.split(".")[2] for name in shapes}
    if sides != {"0", "1"} or not widths <= {320, 640, 768, 1024, 1280}:
        return ""
    return "sd1" if 768 in widths else "sd2" if 1024 in widths else ""


def _recognise_hypernetwork(target: str, shapes: Shapes) -> str | None:
    return None if _hypernetwork(shapes) == target else ""


def _tell_hypernetwork(shapes: Shapes) -> Mapping[str, str]:
    return {"widths": ", ".join(map(str, sorted({int(name.split(".")[1]) for name in shapes})))}


for _variant, _title, _architecture in MODELS[:2]:
    _add(
        "hypernetwork", _variant, f"hypernetwork for {_title}", _architecture, HYPERNETWORK_FILES,
        partial(_recognise_hypernetwork, _variant), _tell_hypernetwork,
    )  # fmt: skip
