"""What changes a model by a picture: ControlNets, T2I-Adapters, IP-Adapters. None of them draws by itself.

A ControlNet (Zhang et al. 2023) is one for each U-Net or transformer; for U-Nets it may also come as a change of
the model's own weights, a difference or a Control-LoRA, which :mod:`sumuk.nets.control_lora` makes whole. The
adapters (Mou et al. 2023; Ye et al. 2023) tell by their widths which model they were made for; attaching them
to another is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.base.errors import BadInput
from sumuk.families.diffusers import unet_rules
from sumuk.families.family import FAMILIES, Arrangement, Kind, Part, Shapes
from sumuk.families.sd import SINGLE
from sumuk.files.layout import Rule, ignore, rename

if TYPE_CHECKING:
    from torch import nn

    from sumuk.nets.controlnet import ControlNetShape

HEADS = 8
"""Heads of SD 1.x at every width; the later U-Nets have heads of one width instead."""
HEAD_WIDTH = 64
ZERO, HINT, FIRST = "zero_convs.0.0.weight", "input_hint_block.0.weight", "input_blocks.0.0.weight"
MIDDLE = "middle_block.1.proj_in.weight"
DIFFERENCE_MARK, LORA_MARK = "difference", "lora_controlnet"
COPIED = ("time_embed.*", "label_emb.*", "input_blocks.*", "middle_block.*")
OWN = ("input_hint_block.*", "zero_convs.*", "middle_block_out.*")
MODEL = ("model.diffusion_model.*", "first_stage_model.*", "cond_stage_model.*")
"""The first ControlNets (control_sd15_canny) came inside a whole model."""
BLOCKS = ("time_text_embed.*", "context_embedder.*", "transformer_blocks.*", "controlnet_blocks.*")
FLUX_NAMES = (
    *BLOCKS, "x_embedder.*", "single_transformer_blocks.*", "controlnet_single_blocks.*",
    "controlnet_mode_embedder.*", "controlnet_x_embedder.*",
)  # fmt: skip
SD3_NAMES = (*BLOCKS, "pos_embed.*", "pos_embed_input.*")
IP_NAMES = ("image_proj.*", "ip_adapter.*")


def controlnet_rules(names: Collection[str]) -> list[Rule]:
    """Rules of a U-Net's ControlNet between the diffusers layout and the original one."""
    blocks = 1 + _highest(names, r"controlnet_cond_embedding\.blocks\.(\d{1,2})\.")
    blocks = blocks or max(0, _highest(names, r"input_hint_block\.(\d{1,2})\.") // 2 - 1)
    hint = "controlnet_cond_embedding"
    return [
        rename(f"{hint}.conv_in.*", "input_hint_block.0.*"),
        *(rename(f"{hint}.blocks.{i}.*", f"input_hint_block.{2 * i + 2}.*") for i in range(blocks)),
        rename(f"{hint}.conv_out.*", f"input_hint_block.{2 * blocks + 2}.*"),
        rename("controlnet_down_blocks.{i}.*", "zero_convs.{i}.0.*"),
        rename("controlnet_mid_block.*", "middle_block_out.0.*"),
        rename("add_embedding.linear_1.*", "label_emb.0.0.*"),
        rename("add_embedding.linear_2.*", "label_emb.0.2.*"),
        *unet_rules(names),
    ]


def _highest(names: Collection[str], pattern: str) -> int:
    """The highest number of this kind, -1 without any."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def _same(tops: tuple[str, ...]) -> Callable[[Collection[str]], list[Rule]]:
    """Rules where the diffusers layout is the published one."""
    return lambda names: [rename(top, top) for top in tops]


def t2i_rules(names: Collection[str]) -> list[Rule]:
    """Rules of a T2I-Adapter; the original numbers all blocks in one row, but for the light one's."""
    if any(".out_conv." in name for name in names):
        return [
            rename("adapter.body.{i}.resnets.{j}.*", "body.{i}.body.{j}.*"),
            rename("adapter.body.{i}.in_conv.*", "body.{i}.in_conv.*"),
            rename("adapter.body.{i}.out_conv.*", "body.{i}.out_conv.*"),
        ]
    rules = [rename("adapter.conv_in.*", "conv_in.*")]
    for level in range(16):
        rules.append(rename(f"adapter.body.{level}.in_conv.*", f"body.{2 * level}.in_conv.*"))
        rules += [rename(f"adapter.body.{level}.resnets.{j}.*", f"body.{2 * level + j}.*") for j in (0, 1)]
    return rules


def _shape(shapes: Shapes) -> ControlNetShape:
    from sumuk.nets.controlnet import controlnet_shape

    # No tensor tells the heads; SD 1.x is the only one with convolutions around its transformers.
    if len(shapes.get(MIDDLE, ())) == 4:
        return controlnet_shape(shapes, heads=HEADS)
    return controlnet_shape(shapes, head_channels=HEAD_WIDTH)


def _controlnet(shapes: Shapes) -> nn.Module:
    from sumuk.nets.controlnet import ControlNet

    return ControlNet(_shape(shapes))


def _controlnet_config(shapes: Shapes) -> dict[str, Any]:
    shape = _shape(shapes)
    attends = [depth > 0 for depth in shape.transformer_depth]
    widths = [shape.model_channels * mult for mult in shape.channel_mult]
    vector = shape.adm_in_channels is not None
    return {
        "_class_name": "ControlNetModel",
        "addition_embed_type": "text_time" if vector else None,
        "addition_time_embed_dim": 256 if vector else None,
        # The library calls so the number of heads.
        "attention_head_dim": HEADS if shape.heads else [width // HEAD_WIDTH for width in widths],
        "block_out_channels": widths,
        "conditioning_channels": shape.hint_channels,
        "conditioning_embedding_out_channels": list(shape.hint_widths),
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": shape.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "in_channels": shape.in_channels,
        "layers_per_block": shape.num_res_blocks,
        "projection_class_embeddings_input_dim": shape.adm_in_channels,
        "transformer_layers_per_block": [max(depth, 1) for depth in shape.transformer_depth],
        "use_linear_projection": shape.linear,
    }


def _unfinished(shapes: Shapes) -> nn.Module:
    raise BadInput(
        "a Control-LoRA is no network until control_lora() has added it to the U-Net it was made for"
    )


def _flux(shapes: Shapes) -> nn.Module:
    from sumuk.nets.control_dit import FluxControlNet, flux_control_shape

    return FluxControlNet(flux_control_shape(shapes))


def _flux_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.control_dit import flux_control_shape

    shape = flux_control_shape(shapes)
    return {
        "_class_name": "FluxControlNetModel",
        "attention_head_dim": shape.head,
        "axes_dims_rope": list(shape.axes),
        "guidance_embeds": shape.guidance,
        "in_channels": 4 * shape.in_channels,
        "joint_attention_dim": shape.context_dim,
        "num_attention_heads": shape.heads,
        "num_layers": shape.double,
        "num_mode": shape.modes,
        "num_single_layers": shape.single,
        "patch_size": 1,
        "pooled_projection_dim": shape.vector_dim,
    }


def _sd3(shapes: Shapes) -> nn.Module:
    from sumuk.nets.control_dit import SD3ControlNet, sd3_control_shape

    return SD3ControlNet(sd3_control_shape(shapes))


def _sd3_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.control_dit import sd3_control_shape

    shape = sd3_control_shape(shapes)
    return {
        "_class_name": "SD3ControlNetModel",
        "attention_head_dim": shape.head,
        "caption_projection_dim": shape.width,
        "extra_conditioning_channels": shape.hint_channels - shape.in_channels,
        "in_channels": shape.in_channels,
        "joint_attention_dim": shape.context_dim,
        "num_attention_heads": shape.width // shape.head,
        "num_layers": shape.depth,
        "out_channels": shape.in_channels,
        "patch_size": 2,
        "pooled_projection_dim": shape.vector_dim,
        "pos_embed_max_size": shape.places,
        "qk_norm": "rms_norm" if shape.normed else None,
        "sample_size": 128,
    }


def _t2i(shapes: Shapes) -> nn.Module:
    from sumuk.nets.adapters import T2IAdapter, t2i_shape

    return T2IAdapter(t2i_shape(shapes))


def _t2i_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.adapters import t2i_shape

    shape = t2i_shape(shapes)
    # The library's light adapter ends with a level of the width before, which its list leaves out.
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": "light_adapter" if shape.light else "full_adapter_xl" if shape.xl else "full_adapter",
        "channels": list(shape.widths[:-1] if shape.light else shape.widths),
        "downscale_factor": shape.factor,
        "in_channels": shape.colours,
        "num_res_blocks": shape.rows,
    }


def _ip(shapes: Shapes) -> nn.Module:
    from sumuk.nets.ip_adapter import IPAdapter, ip_shape

    return IPAdapter(ip_shape(shapes))


CONTROL = Part(
    name="control",
    title="ControlNet",
    key=ZERO,
    original=(*COPIED, *OWN),
    diffusers=controlnet_rules,
    supplier="a ControlNet's own file",
    build=_controlnet,
    config=_controlnet_config,
)
DIFFERENCE = replace(CONTROL, original=(*CONTROL.original, DIFFERENCE_MARK))
LORA = replace(
    CONTROL,
    title="Control-LoRA",
    key=LORA_MARK,
    original=(*CONTROL.original, LORA_MARK),
    diffusers=_same((*COPIED, *OWN, LORA_MARK)),
    build=_unfinished,
    config=lambda shapes: {},
)
FLUX = Part(
    name="control",
    title="ControlNet",
    key="controlnet_x_embedder.weight",
    original=FLUX_NAMES,
    diffusers=_same(FLUX_NAMES),
    supplier="a ControlNet's own file",
    build=_flux,
    config=_flux_config,
)
SD3 = replace(
    FLUX,
    key="pos_embed_input.proj.weight",
    original=SD3_NAMES,
    diffusers=_same(SD3_NAMES),
    build=_sd3,
    config=_sd3_config,
)
T2I = Part(
    name="adapter",
    title="T2I-Adapter",
    key="body.0.block1.weight",
    original=("conv_in.*", "body.*"),
    diffusers=t2i_rules,
    supplier="a T2I-Adapter's own file",
    build=_t2i,
    config=_t2i_config,
)
T2I_LIGHT = replace(T2I, key="body.0.body.0.block1.weight", original=("body.*",))
IP = Part(
    name="adapter",
    title="IP-Adapter",
    key="ip_adapter.1.to_k_ip.weight",
    original=IP_NAMES,
    diffusers=_same(IP_NAMES),
    supplier="an IP-Adapter's own file",
    build=_ip,
    config=lambda shapes: {},
)


def _bare(part: Part) -> Arrangement:
    title = "single network, original names without prefix"
    return Arrangement(name="bare", title=title, dialect="original", parts=((part, ""),))


def _bare_diffusers(part: Part) -> Arrangement:
    title = "single network, diffusers names"
    return Arrangement(name="bare-diffusers", title=title, dialect="diffusers", parts=((part, ""),))


def _prefixed(part: Part, prefix: str, *more: Rule) -> Arrangement:
    title = f"original names with the prefix {prefix}"
    return Arrangement(name="single", title=title, dialect="original", parts=((part, prefix),), ignored=more)


WITHIN = (*SINGLE.ignored, *map(ignore, MODEL))
UNETS = (_prefixed(CONTROL, "control_model.", *WITHIN), _bare(CONTROL), _bare_diffusers(CONTROL))
DIFFERENCES = (
    # The mark stands outside of the prefix, and has to be seen by recognise.
    _prefixed(DIFFERENCE, "control_model.", rename(DIFFERENCE_MARK, f"control.{DIFFERENCE_MARK}")),
    _bare(DIFFERENCE),
)


def _lacking(part: str, shapes: Shapes, *names: str) -> str | None:
    """The first of these names that is not there, as a reason."""
    return next((f"there is no {name!r}" for name in names if f"{part}.{name}" not in shapes), None)


def _recognise_unet(vector: bool, linear: bool, shapes: Shapes) -> str | None:
    """Whether it is the ControlNet of a U-Net with such a vector and such transformers."""
    reason = _lacking("control", shapes, ZERO, HINT, FIRST, MIDDLE, "input_blocks.1.0.in_layers.2.weight")
    if reason:
        return reason
    if f"control.{DIFFERENCE_MARK}" in shapes:
        return "it holds differences to a model's weights"
    if ("control.label_emb.0.0.weight" in shapes) != vector:
        return f"it {'lacks' if vector else 'takes'} a vector (label_emb), as only those of SDXL do"
    if not vector and (len(shapes[f"control.{MIDDLE}"]) == 2) != linear:
        return f"{MIDDLE!r} is {'a convolution, as in SD 1' if linear else 'linear, as in SD 2'}"
    return None


def _recognise_names(
    part: str, wanted: tuple[str, ...], unwanted: tuple[str, ...], shapes: Shapes
) -> str | None:
    """Whether some names are there and others are not."""
    there = (f"there is {name!r}" for name in unwanted if f"{part}.{name}" in shapes)
    return _lacking(part, shapes, *wanted) or next(there, None)


def _recognise_t2i(xl: bool, shapes: Shapes) -> str | None:
    reason = _lacking("adapter", shapes, "conv_in.weight", "body.0.block2.weight")
    if reason:
        return reason
    first = shapes["adapter.conv_in.weight"]
    if len(first) != 4 or first[1] % 64 or (first[1] % 256 == 0) != xl:
        return f"{list(first)} takes no picture unshuffled by {16 if xl else 8}"
    return None


def _kind(
    name: str,
    variant: str,
    title: str,
    arrangements: tuple[Arrangement, ...],
    recognise: Callable[[Shapes], str | None],
    architecture: str,
    licence: str,
    *aliases: str,
) -> Kind:
    kind = Kind(
        name=name,
        variant=variant,
        title=title,
        architecture=architecture,
        arrangements=arrangements,
        recognise=recognise,
        licence=licence,
    )
    return FAMILIES.add(kind.key, kind, *aliases)


RAIL, RAILPP, COMMUNITY = "CreativeML-OpenRAIL-M", "CreativeML-OpenRAIL++-M", "Stability-AI-Community"
SD15 = _kind(
    "controlnet", "sd15", "ControlNet for Stable Diffusion 1.x", UNETS,
    partial(_recognise_unet, False, False), "stable-diffusion-v1/controlnet", RAIL, "controlnet",
)  # fmt: skip
SD21 = _kind(
    "controlnet", "sd21", "ControlNet for Stable Diffusion 2.x", UNETS,
    partial(_recognise_unet, False, True), "stable-diffusion-v2-768-v/controlnet", RAILPP,
)  # fmt: skip
SDXL = _kind(
    "controlnet", "sdxl", "ControlNet for SDXL", UNETS[::-1],
    partial(_recognise_unet, True, True), "stable-diffusion-xl-v1-base/controlnet", RAILPP,
)  # fmt: skip
DIFFERENCE_KIND = _kind(
    "controlnet", "difference", "ControlNet as differences to a U-Net", DIFFERENCES,
    partial(_recognise_names, "control", (ZERO, HINT, FIRST, DIFFERENCE_MARK), ()),
    "stable-diffusion-v1/controlnet", RAIL,
)  # fmt: skip
CONTROL_LORA = _kind(
    "controlnet", "control-lora", "Control-LoRA for SDXL", (_bare(LORA),),
    partial(_recognise_names, "control", (LORA_MARK, ZERO, HINT), ()),
    "stable-diffusion-xl-v1-base/control-lora", COMMUNITY,
)  # fmt: skip
FLUX_KIND = _kind(
    "controlnet", "flux", "ControlNet for FLUX.1", (_bare_diffusers(FLUX),),
    partial(
        _recognise_names, "control",
        ("controlnet_blocks.0.weight", "transformer_blocks.0.attn.norm_added_q.weight", "x_embedder.weight"),
        ("input_hint_block.conv_in.weight",),
    ),
    "flux-1-dev/controlnet", "FLUX.1-dev-Non-Commercial",
)  # fmt: skip
SD3_KIND = _kind(
    "controlnet", "sd3", "ControlNet for Stable Diffusion 3", (_bare_diffusers(SD3),),
    partial(
        _recognise_names, "control",
        ("controlnet_blocks.0.weight", "pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        ("transformer_blocks.0.attn2.to_q.weight",),
    ),
    "stable-diffusion-v3-medium/controlnet", COMMUNITY,
)  # fmt: skip

T2I_FILES = (_bare(T2I), _prefixed(T2I, "adapter."), _bare_diffusers(T2I))
T2I_SD = _kind(
    "t2i-adapter", "sd", "T2I-Adapter for Stable Diffusion 1.x and 2.x", T2I_FILES,
    partial(_recognise_t2i, False), "stable-diffusion-v1/t2i-adapter", "Apache-2.0", "t2i-adapter",
)  # fmt: skip
T2I_SDXL = _kind(
    "t2i-adapter", "sdxl", "T2I-Adapter for SDXL", T2I_FILES,
    partial(_recognise_t2i, True), "stable-diffusion-xl-v1-base/t2i-adapter", "Apache-2.0",
)  # fmt: skip
T2I_LIGHT_KIND = _kind(
    "t2i-adapter", "light", "light T2I-Adapter (colour)",
    (_bare(T2I_LIGHT), _prefixed(T2I_LIGHT, "adapter."), _bare_diffusers(T2I_LIGHT)),
    partial(_recognise_names, "adapter", ("body.0.out_conv.weight", "body.0.body.0.block1.weight"), ()),
    "stable-diffusion-v1/t2i-adapter", "Apache-2.0",
)  # fmt: skip

IP_FILES = (_bare(IP),)
FACE = ("ip_adapter.0.to_q_lora.down.weight", "image_proj.perceiver_resampler.proj_in.weight")
"""Names of the FaceID variants, which also change the U-Net's own weights and are not known here."""
IP_IMAGE = _kind(
    "ip-adapter", "image", "IP-Adapter", IP_FILES,
    partial(_recognise_names, "adapter", ("image_proj.proj.weight", IP.key), FACE),
    "stable-diffusion/ip-adapter", "Apache-2.0", "ip-adapter",
)  # fmt: skip
IP_PLUS = _kind(
    "ip-adapter", "plus", "IP-Adapter plus", IP_FILES,
    partial(_recognise_names, "adapter", ("image_proj.latents", IP.key), FACE),
    "stable-diffusion/ip-adapter", "Apache-2.0",
)  # fmt: skip
IP_FULL = _kind(
    "ip-adapter", "full", "IP-Adapter full face", IP_FILES,
    partial(_recognise_names, "adapter", ("image_proj.proj.3.weight", IP.key), FACE),
    "stable-diffusion/ip-adapter", "Apache-2.0",
)  # fmt: skip
