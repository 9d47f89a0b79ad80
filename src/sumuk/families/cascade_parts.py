"""The networks of Stable Cascade: how files name their tensors, and how each is built."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.families.family import Part, Shapes
from sumuk.families.sd3 import CLIP_G
from sumuk.files.layout import Rule, fuse, rename

if TYPE_CHECKING:
    from torch import nn

    from sumuk.nets.cascade_shape import CascadeShape

STAGE_A_SCALE = 0.43
"""What stage A's latents are divided by. The reference and ComfyUI say so; the configuration in the published diffusers
folder has 0.3764, which is that of Würstchen 2."""

# -- names ---------------------------------------------------------------------------------------------------------

BLOCKS = tuple(
    f"{side}_blocks.{{level}}.{{block}}.{inner}.*"
    for side in ("down", "up")
    for inner in ("depthwise", "channelwise", "mapper", "mapper_sca", "mapper_crp", "kv_mapper")
)
TRUNK = (
    "embedding.*", *BLOCKS, "down_downscalers.*", "up_upscalers.*", "down_repeat_mappers.*", "up_repeat_mappers.*",
    "clf.*",
)  # fmt: skip
"""What both stages have under one name on every side: all but their attention."""

ATTENTION = tuple(f"{side}_blocks.{{level}}.{{block}}.attention" for side in ("down", "up"))
STACKED = tuple(
    f"{place}.attn.{inner}"
    for place in ATTENTION
    for inner in ("in_proj_weight", "in_proj_bias", "out_proj.*")
)
READS_C = ("clip_txt_mapper.*", "clip_txt_pooled_mapper.*", "clip_img_mapper.*")
READS_B = ("effnet_mapper.*", "pixels_mapper.*")


def _unstacked(place: str, theirs: str) -> list[Rule]:
    """Query, key and value apart, as all but the reference store them."""
    return [
        fuse([f"{place}.{theirs}to_{letter}.{kind}" for letter in "qkv"], f"{place}.attn.in_proj_{kind}")
        for kind in ("weight", "bias")
    ]


COMFY = tuple(rule for place in ATTENTION for rule in _unstacked(place, "attn."))
"""ComfyUI's spelling of the attention."""


def _stage_rules(own: tuple[tuple[str, str], ...], names: Collection[str]) -> list[Rule]:
    attention = [
        rule
        for place in ATTENTION
        for rule in (*_unstacked(place, ""), rename(f"{place}.to_out.0.*", f"{place}.attn.out_proj.*"))
    ]
    return [*(rename(*pair) for pair in own), *attention, *(rename(name, name) for name in TRUNK)]


prior_rules = partial(_stage_rules, tuple((name, name) for name in READS_C))
"""Rules of stage C in the diffusers layout."""

decoder_rules = partial(
    _stage_rules, (("clip_txt_pooled_mapper.*", "clip_mapper.*"), *((name, name) for name in READS_B))
)
"""Rules of stage B in the diffusers layout."""


def paella_rules(names: Collection[str]) -> list[Rule]:
    """Rules of stage A in the diffusers layout, which only calls the codebook otherwise."""
    alike = ("in_block.*", "down_blocks.*", "up_blocks.*", "out_block.*")
    return [
        rename("vquantizer.embedding.weight", "vquantizer.codebook.weight"),
        *(rename(name, name) for name in alike),
    ]


def _alike(original: tuple[str, ...], names: Collection[str]) -> list[Rule]:
    return [rename(name, name) for name in original]


# -- networks and their configurations -----------------------------------------------------------------------------


def _stage_c(shapes: Shapes) -> nn.Module:
    from sumuk.nets.cascade import StageC, stage_c_shape

    return StageC(stage_c_shape(shapes))


def _stage_b(shapes: Shapes) -> nn.Module:
    from sumuk.nets.cascade import StageB, stage_b_shape

    return StageB(stage_b_shape(shapes))


def _paella(shapes: Shapes) -> nn.Module:
    from sumuk.nets.paella import Paella, paella_shape

    return Paella(paella_shape(shapes))


def _effnet(shapes: Shapes) -> nn.Module:
    from sumuk.nets.effnet import EffNet, effnet_shape

    return EffNet(effnet_shape(shapes))


def _previewer(shapes: Shapes) -> nn.Module:
    from sumuk.nets.effnet import Previewer, previewer_shape

    return Previewer(previewer_shape(shapes))


def _vision(shapes: Shapes) -> nn.Module:
    from sumuk.nets.clip_vision import ClipVision, clip_vision_shape

    return ClipVision(clip_vision_shape(shapes))


def _stage_config(shape: CascadeShape, **own: Any) -> dict[str, Any]:
    """The configuration of diffusers' network, which lists the levels of the way up from the coarsest."""
    group = ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"]
    heads = [width // shape.head_channels for width in shape.widths]
    return {
        "_class_name": "StableCascadeUNet",
        "block_out_channels": list(shape.widths),
        "block_types_per_layer": [group[: 2 + attends] for attends in shape.attends],
        "clip_image_in_channels": None,
        "clip_seq": shape.tokens,
        "clip_text_in_channels": None,
        "clip_text_pooled_in_channels": shape.pooled_width,
        "conditioning_dim": shape.cond_width,
        "down_blocks_repeat_mappers": list(shape.down_repeats),
        "down_num_layers_per_block": list(shape.down),
        "dropout": [0.1 if attends else 0 for attends in shape.attends],
        "effnet_in_channels": None,
        "in_channels": shape.in_channels,
        "kernel_size": shape.kernel,
        "num_attention_heads": [n if attends else 0 for n, attends in zip(heads, shape.attends, strict=True)],
        "out_channels": shape.out_channels,
        "patch_size": shape.patch,
        "pixel_mapper_in_channels": None,
        "self_attn": True,
        "switch_level": None,
        "timestep_conditioning_type": list(shape.times),
        "timestep_ratio_embedding_dim": shape.time_width,
        "up_blocks_repeat_mappers": list(reversed(shape.up_repeats)),
        "up_num_layers_per_block": list(reversed(shape.up)),
        **own,
    }


def _stage_c_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.cascade import stage_c_shape

    shape = stage_c_shape(shapes)
    return _stage_config(
        shape,
        clip_image_in_channels=shape.image_width,
        clip_text_in_channels=shape.text_width,
        switch_level=[False] * (len(shape.widths) - 1),
    )


def _stage_b_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.cascade import stage_b_shape

    shape = stage_b_shape(shapes)
    return _stage_config(
        shape, effnet_in_channels=shape.effnet_channels, pixel_mapper_in_channels=shape.pixel_channels
    )


def _paella_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.paella import FOLD, paella_shape

    shape = paella_shape(shapes)
    return {
        "_class_name": "PaellaVQModel",
        "bottleneck_blocks": shape.blocks,
        "embed_dim": shape.width,
        "in_channels": shape.colours,
        "latent_channels": shape.channels,
        "levels": shape.levels,
        "num_vq_embeddings": shape.codes,
        "out_channels": shape.colours,
        "scale_factor": STAGE_A_SCALE,
        "up_down_scale_factor": FOLD,
    }


def _vision_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.clip_vision import clip_vision_shape, published_activation

    shape = clip_vision_shape(shapes)
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_act": published_activation(shape.width),
        "hidden_size": shape.width,
        "image_size": shape.size,
        "intermediate_size": shape.hidden,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": shape.heads,
        "num_channels": shape.colours,
        "num_hidden_layers": shape.depth,
        "patch_size": shape.patch,
        "projection_dim": shape.projection or shape.width,
    }


def _no_config(shapes: Shapes) -> dict[str, Any]:
    return {}


PRIOR = Part(
    name="denoiser",
    title="stage C",
    key="clip_txt_mapper.weight",
    original=(*READS_C, *TRUNK, *STACKED),
    aliases=COMFY,
    diffusers=prior_rules,
    supplier="stage_c.safetensors, stage_c_lite.safetensors, or prior/ of a diffusers folder",
    build=_stage_c,
    config=_stage_c_config,
)
DECODER = Part(
    name="decoder",
    title="stage B",
    key="clip_mapper.weight",
    original=("clip_mapper.*", *READS_B, *TRUNK, *STACKED),
    aliases=COMFY,
    diffusers=decoder_rules,
    supplier="stage_b.safetensors, stage_b_lite.safetensors, or decoder/ of a diffusers folder",
    build=_stage_b,
    config=_stage_b_config,
)
STAGE_A = Part(
    name="vae",
    title="stage A",
    key="vquantizer.codebook.weight",
    original=("in_block.*", "down_blocks.*", "vquantizer.codebook.weight", "up_blocks.*", "out_block.*"),
    diffusers=paella_rules,
    supplier="stage_a.safetensors, or vqgan/ of a diffusers folder",
    build=_paella,
    config=_paella_config,
)
TEXT = replace(
    CLIP_G,
    name="text",
    supplier="text_encoder/ of a Cascade diffusers folder",
    optional=False,
)
VISION_NAMES = ("vision_model.*", "visual_projection.weight")
IMAGE = Part(
    name="image",
    title="image tower CLIP-L",
    key="vision_model.embeddings.patch_embedding.weight",
    original=VISION_NAMES,
    file="model.safetensors",
    diffusers=partial(_alike, VISION_NAMES),
    supplier="image_encoder/ of a Cascade diffusers folder",
    build=_vision,
    config=_vision_config,
    optional=True,
)
EFFNET = Part(
    name="effnet",
    title="EfficientNet encoder",
    key="mapper.0.weight",
    original=("backbone.*", "mapper.*"),
    diffusers=partial(_alike, ("backbone.*", "mapper.*")),
    supplier="effnet_encoder.safetensors",
    build=_effnet,
    config=_no_config,
    optional=True,
)
PREVIEWER = Part(
    name="previewer",
    title="previewer",
    key="blocks.0.weight",
    original=("blocks.*",),
    diffusers=partial(_alike, ("blocks.*",)),
    supplier="previewer.safetensors",
    build=_previewer,
    config=_no_config,
    optional=True,
)
