"""Text and image towers in files of their own, as many interfaces keep them: one file for several models.

CLIP's three text towers share their names at the transformers library, so there the width tells them apart: 768 is
OpenAI's L, 1024 OpenCLIP's H, 1280 its bigG. The image towers likewise: 1024, 1280, 1664. A tower of another width is
no published one, and is not guessed at; beside the model that it belongs to it is read all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from sumuk.families.cascade_parts import IMAGE
from sumuk.families.family import FAMILIES, Arrangement, Kind, Part, Shapes
from sumuk.families.openclip import EXTRAS, OPENCLIP_G, OPENCLIP_H
from sumuk.families.sd import POSITIONS
from sumuk.families.sd3 import CLIP_G, CLIP_L, T5
from sumuk.files.layout import Rule, ignore, rename

ALONE = "single network, names of the transformers library"
OPENCLIP_ALONE = "single network, OpenCLIP's names"
FOLDER = "{} of a diffusers folder"
WITHIN = "a tower of a single file, below {}"

OTHER_HALF = ("vision_model.*", "visual_projection.weight", "visual.*", "logit_scale")
"""What a whole CLIP holds beside its text tower."""

POSITION = "vision_model.embeddings.position_ids"


def _ignored(prefix: str, *more: str) -> tuple[Rule, ...]:
    """What towers leave below their prefix that is known and of no use; without a prefix also a whole CLIP's."""
    names = (*POSITIONS, *EXTRAS, *more, *(() if prefix else OTHER_HALF))
    return tuple(ignore(prefix + name) for name in names)


def _bare(part: Part, title: str = ALONE) -> Arrangement:
    return Arrangement(
        name="bare", title=title, dialect="original", parts=((part, ""),), ignored=_ignored("")
    )


def _bare_diffusers(part: Part) -> Arrangement:
    """For the towers whose native names are OpenCLIP's."""
    return Arrangement(
        name="bare-diffusers", title=ALONE, dialect="diffusers", parts=((part, ""),), ignored=_ignored("")
    )


def _below(part: Part, prefix: str, dialect: str = "original", *more: str) -> Arrangement:
    name, title = ("diffusers", FOLDER) if prefix.endswith("/") else ("single", WITHIN)
    return Arrangement(
        name=name,
        title=title.format(prefix),
        dialect=dialect,
        parts=((part, prefix),),
        ignored=_ignored(prefix, *more),
    )


T5_BLOCK = (
    ("attn_q", "layer.0.SelfAttention.q"),
    ("attn_k", "layer.0.SelfAttention.k"),
    ("attn_v", "layer.0.SelfAttention.v"),
    ("attn_o", "layer.0.SelfAttention.o"),
    ("attn_rel_b", "layer.0.SelfAttention.relative_attention_bias"),
    ("attn_norm", "layer.0.layer_norm"),
    ("ffn_gate", "layer.1.DenseReluDense.wi_0"),
    ("ffn_up", "layer.1.DenseReluDense.wi_1"),
    ("ffn_down", "layer.1.DenseReluDense.wo"),
    ("ffn_norm", "layer.1.layer_norm"),
)
"""Parts of a block: llama.cpp, T5."""
T5_LLAMA = (
    rename("token_embd.weight", "shared.weight"),
    rename("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
    *(
        rename(f"enc.blk.{{i}}.{theirs}.weight", f"encoder.block.{{i}}.{ours}.weight")
        for theirs, ours in T5_BLOCK
    ),
)
LLAMA = Arrangement(
    name="gguf",
    title="single network, names of llama.cpp",
    dialect="diffusers",  # the one of a part that is not its original
    parts=((replace(T5, diffusers=lambda names: T5_LLAMA), ""),),
)


def _recognise(part: Part, width: int, shapes: Shapes) -> str | None:
    """Whether a text tower is there and has this width."""
    here = shapes.get(f"{part.name}.{part.key}", ())
    if len(here) != 2:
        return f"there is no table {part.key!r} of tokens"
    return None if here[1] == width else f"its width is {here[1]}, not {width}"


def _recognise_vision(width: int, shapes: Shapes) -> str | None:
    here = shapes.get(f"{IMAGE.name}.{IMAGE.key}", ())
    if len(here) != 4:
        return f"there is no convolution {IMAGE.key!r} of an image tower"
    return None if here[0] == width else f"its width is {here[0]}, not {width}"


def _recognise_t5(shapes: Shapes) -> str | None:
    for name in ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"):
        if f"{T5.name}.{name}" not in shapes:
            return f"there is no {name!r} of T5's encoder"
    if f"{T5.name}.encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in shapes:
        return "its feed-forward part is not gated: T5 before version 1.1"
    if f"{T5.name}.encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes:
        return "each block has positions of its own: UMT5"
    return None


TOWERS = (CLIP_L, CLIP_G, T5)


def _recognise_bundle(shapes: Shapes) -> str | None:
    here = [part for part in TOWERS if f"{part.name}.{part.key}" in shapes]
    if len(here) < 2:
        return "it has one tower, not several"
    reasons = (
        _recognise(part, width, shapes) for part, width in ((CLIP_L, 768), (CLIP_G, 1280)) if part in here
    )
    return next((reason for reason in reasons if reason), _recognise_t5(shapes) if T5 in here else None)


def _depth(part: Part, block: str, shapes: Shapes) -> int:
    count = 0
    while any(name.startswith(f"{part.name}.{block.format(count)}.") for name in shapes):
        count += 1
    return count


def _text_tells(part: Part, block: str, serves: str, shapes: Shapes) -> Mapping[str, str]:
    table = shapes[f"{part.name}.{part.key}"]
    return {
        "tower": f"{_depth(part, block, shapes)} blocks, width {table[1]}, {table[0]} words",
        "serves": serves,
    }


CLIP_BLOCK, OPENCLIP_BLOCK = "text_model.encoder.layers.{}", "transformer.resblocks.{}"
NAME, UNSAID = "text-encoder", "unknown"

CLIP_L_KIND = Kind(
    name=NAME,
    variant="clip-l",
    title="CLIP L's text tower",
    architecture="clip-l",
    arrangements=(
        _bare(CLIP_L),
        _below(CLIP_L, "cond_stage_model.transformer."),
        _below(CLIP_L, "conditioner.embedders.0.transformer."),
        _below(CLIP_L, "text_encoders.clip_l.transformer."),
        _below(CLIP_L, "text_encoder/"),
    ),
    recognise=partial(_recognise, CLIP_L, 768),
    licence="MIT",
    tells=partial(
        _text_tells,
        CLIP_L,
        CLIP_BLOCK,
        "Stable Diffusion 1, SDXL (text), Stable Diffusion 3 (text), FLUX.1 (text)",
    ),
)
CLIP_H_KIND = Kind(
    name=NAME,
    variant="openclip-h",
    title="OpenCLIP H's text tower",
    architecture="openclip-h",
    arrangements=(
        _bare(OPENCLIP_H, OPENCLIP_ALONE),
        _bare_diffusers(OPENCLIP_H),
        _below(OPENCLIP_H, "cond_stage_model.model."),
        _below(OPENCLIP_H, "text_encoder/", "diffusers"),
    ),
    recognise=partial(_recognise, OPENCLIP_H, 1024),
    licence=UNSAID,
    tells=partial(_text_tells, OPENCLIP_H, OPENCLIP_BLOCK, "Stable Diffusion 2"),
)
CLIP_G_KIND = Kind(
    name=NAME,
    variant="openclip-g",
    title="OpenCLIP bigG's text tower",
    architecture="openclip-g",
    arrangements=(
        _bare(OPENCLIP_G, OPENCLIP_ALONE),
        _bare_diffusers(OPENCLIP_G),
        _below(OPENCLIP_G, "conditioner.embedders.1.model."),
        _below(OPENCLIP_G, "conditioner.embedders.0.model."),  # the refiner's
        _below(OPENCLIP_G, "text_encoders.clip_g.transformer.", "diffusers"),
        _below(OPENCLIP_G, "text_encoder_2/", "diffusers"),
    ),
    recognise=partial(_recognise, OPENCLIP_G, 1280),
    licence=UNSAID,
    tells=partial(
        _text_tells, OPENCLIP_G, OPENCLIP_BLOCK,
        "SDXL and its refiner (text_2), Stable Diffusion 3 (text_2), Stable Cascade (text)",
    ),
)  # fmt: skip
T5_KIND = Kind(
    name=NAME,
    variant="t5",
    title="T5's encoder",
    architecture="t5",
    arrangements=(
        _bare(T5),
        LLAMA,
        _below(T5, "text_encoders.t5xxl.transformer."),
        _below(T5, "text_encoder_2/"),
        _below(T5, "text_encoder_3/"),
    ),
    recognise=_recognise_t5,
    licence="Apache-2.0",
    tells=partial(
        _text_tells, T5, "encoder.block.{}", "Stable Diffusion 3 (text_3), FLUX.1 (text_2), if T5 XXL's"
    ),
)
BUNDLE = Kind(
    name=NAME,
    variant="bundle",
    title="text towers of Stable Diffusion 3 or FLUX.1",
    architecture="text-encoders",
    arrangements=(
        Arrangement(
            name="single",
            title="several towers of a single file",
            dialect="original",
            parts=tuple(
                (part, f"text_encoders.{name}.transformer.")
                for part, name in zip(TOWERS, ("clip_l", "clip_g", "t5xxl"), strict=True)
            ),
            ignored=tuple(
                ignore(f"text_encoders.{name}.{each}")
                for name in ("clip_l", "clip_g", "t5xxl")
                for each in ("logit_scale", *(f"transformer.{position}" for position in POSITIONS))
            ),
        ),
    ),
    recognise=_recognise_bundle,
    licence=UNSAID,
    tells=lambda shapes: {"serves": "Stable Diffusion 3 (CLIP L, CLIP bigG, T5), FLUX.1 (CLIP L, T5)"},
)

for _kind in (CLIP_L_KIND, CLIP_H_KIND, CLIP_G_KIND, T5_KIND, BUNDLE):
    FAMILIES.add(_kind.key, _kind)

VISION = (
    ("clip-l", "CLIP L's image tower", 1024, "MIT", "Stable Cascade, Stable Diffusion 2.1 unCLIP L"),
    ("openclip-h", "OpenCLIP H's image tower", 1280, UNSAID, "IP-Adapter for Stable Diffusion 1, unCLIP H"),
    ("openclip-g", "OpenCLIP bigG's image tower", 1664, UNSAID, "IP-Adapter for SDXL"),
)
"""Variant, title, width, licence, what it serves."""

VISION_FILES = tuple(
    Arrangement(
        name=name,
        title=title,
        dialect="original",
        parts=((IMAGE, prefix),),
        ignored=(ignore(prefix + POSITION),),
    )
    for name, title, prefix in (
        ("bare", ALONE, ""),
        ("single", WITHIN.format("clip_l_vision."), "clip_l_vision."),
        ("diffusers", FOLDER.format("image_encoder/"), "image_encoder/"),
    )
)


def _vision(variant: str, title: str, width: int, licence: str, serves: str) -> Kind:
    return Kind(
        name="image-encoder",
        variant=variant,
        title=title,
        architecture=f"{variant}-vision",
        arrangements=VISION_FILES,
        recognise=partial(_recognise_vision, width),
        licence=licence,
        tells=lambda shapes: {"serves": serves},
    )


for _row in VISION:
    _kind = _vision(*_row)
    FAMILIES.add(_kind.key, _kind)
