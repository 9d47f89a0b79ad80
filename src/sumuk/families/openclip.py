"""OpenCLIP's text towers: H of Stable Diffusion 2, bigG of SDXL (Cherti et al. 2023).

Natively they have OpenCLIP's names, as in the published single files. In diffusers folders they have those of the
transformers library, which keeps q, k, v apart and the projection turned over.

Stable Diffusion 2 reads H one block before its end, with the final norm. Its diffusers folders therefore leave the
last of the 24 blocks away, and the projection with it, and read the end of what remains: the same numbers. So a tower
of this family ends where it is read if it has no projection, and one block later if it has; :func:`layer_read` tells.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sumuk.families.family import Part, Shapes
from sumuk.files.layout import PLAIN, Pattern, Rule, alias, fuse, rename, transpose

if TYPE_CHECKING:
    from torch import nn

    from sumuk.nets.clip import ClipShape

PROJECTION = "text_projection"
"""[D, P] natively, [P, D] in ``text_projection.weight`` of the transformers library."""

EXTRAS = ("logit_scale", "attn_mask")
"""What training CLIP needs, and a table that follows from the length: stored beside these towers, of no use here."""

BLOCK = (
    ("layer_norm1", "ln_1"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
"""Parts of a block that only differ by name: transformers, OpenCLIP."""


def openclip_rules(names: Collection[str]) -> list[Rule]:
    """OpenCLIP's tower against transformers' names; without the leading ``text_model.`` they are read as well."""
    whole = transpose(f"{PROJECTION}.weight", PROJECTION)
    return [*_tower("text_model."), whole, *(alias(rule) for rule in _tower(""))]


def shortened_rules(names: Collection[str]) -> list[Rule]:
    """The same for a tower that transformers' side ends where it is read: a whole one loses its last block there."""
    surplus = []
    if PROJECTION in names:
        surplus = [leave_out(f"transformer.resblocks.{_blocks(names) - 1}.*"), leave_out(PROJECTION)]
    return [*surplus, *openclip_rules(names)]


def leave_out(native: str) -> Rule:
    """Native tensors for which the other side has no use; each is listed in ``Moved.ignored`` when saving."""
    return Rule((), (Pattern(native),), PLAIN)


def _tower(head: str) -> list[Rule]:
    theirs, ours = f"{head}encoder.layers.{{i}}", "transformer.resblocks.{i}"
    thirds = [f"{theirs}.self_attn.{third}_proj" for third in "qkv"]
    return [
        rename(f"{head}embeddings.token_embedding.weight", "token_embedding.weight"),
        rename(f"{head}embeddings.position_embedding.weight", "positional_embedding"),
        fuse([f"{third}.weight" for third in thirds], f"{ours}.attn.in_proj_weight"),
        fuse([f"{third}.bias" for third in thirds], f"{ours}.attn.in_proj_bias"),
        *(rename(f"{theirs}.{a}.*", f"{ours}.{b}.*") for a, b in BLOCK),
        rename(f"{head}final_layer_norm.*", "ln_final.*"),
    ]


def _blocks(names: Collection[str]) -> int:
    """How many blocks native names have."""
    count = 0
    while f"transformer.resblocks.{count}.attn.in_proj_weight" in names:
        count += 1
    return count


def layer_read(shape: ClipShape) -> int:
    """Which hidden state from the end Stable Diffusion 2 reads: the last but one of a whole tower."""
    return 1 if shape.projection is None else 2


def _build(shapes: Shapes) -> nn.Module:
    from sumuk.nets.clip import OpenClipText, open_clip_shape

    return OpenClipText(open_clip_shape(shapes))


def _config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.clip import open_clip_shape

    shape = open_clip_shape(shapes)
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": shape.vocabulary - 2,
        "eos_token_id": shape.vocabulary - 1,
        "hidden_act": "gelu",
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": shape.length,
        "model_type": "clip_text_model",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.depth,
        "pad_token_id": 0,
        "projection_dim": shape.projection or shape.width,
        "vocab_size": shape.vocabulary,
    }


def _shortened_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.clip import open_clip_shape

    shape = open_clip_shape(shapes)
    blocks = shape.depth + 1 - layer_read(shape)
    return _config(shapes) | {"architectures": ["CLIPTextModel"], "num_hidden_layers": blocks}


OPENCLIP_G = Part(
    name="text_2",
    title="OpenCLIP text tower",
    key="token_embedding.weight",
    original=(
        "positional_embedding",
        "token_embedding.*",
        "transformer.resblocks.*",
        "ln_final.*",
        PROJECTION,
    ),
    file="model.safetensors",
    diffusers=openclip_rules,
    supplier="any SDXL checkpoint, or text_encoder_2/ of its diffusers folder",
    build=_build,
    config=_config,
)
OPENCLIP_H = replace(
    OPENCLIP_G,
    name="text",
    title="text tower",
    diffusers=shortened_rules,
    supplier="any SD 2.x checkpoint, or text_encoder/ of its diffusers folder",
    config=_shortened_config,
)
