"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a rectified flow through an MMDiT, told by up to three text towers.

Three variants by what the blocks have: ``medium``; ``3.5-large``, which normalises queries and keys (its turbo has the
same tensors and is known only by what its file says, or by hash); ``3.5-medium``, which has second attentions too.

Every tower may be missing. The model was trained with each of them left out at random, and what a missing one would
have said is zero.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import Flow
from sumuk.families.diffusers import clip_rules
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Latent, Part, Shapes
from sumuk.families.reading import Encoded, Given, Reading
from sumuk.families.sd import CLIP, POSITIONS, VAE
from sumuk.files.layout import Rule, fuse, ignore, rename, swap_halves

if TYPE_CHECKING:
    from torch import Tensor, nn

SHIFT = 3.0
"""Of the noise; the published schedulers of all variants say so (the reference code has 1 for SD3 medium)."""

CLIP_ROWS = 77
T5_ROWS = 256
"""Rows of text, also of a missing tower, as diffusers has it. The reference read 77 rows of T5."""

# -- the diffusers layout ------------------------------------------------------------------------------------------

NAMES = (
    ("pos_embed.pos_embed", "pos_embed"),
    ("pos_embed.proj.*", "x_embedder.proj.*"),
    ("time_text_embed.timestep_embedder.linear_1.*", "t_embedder.mlp.0.*"),
    ("time_text_embed.timestep_embedder.linear_2.*", "t_embedder.mlp.2.*"),
    ("time_text_embed.text_embedder.linear_1.*", "y_embedder.mlp.0.*"),
    ("time_text_embed.text_embedder.linear_2.*", "y_embedder.mlp.2.*"),
    ("context_embedder.*", "context_embedder.*"),
    ("proj_out.*", "final_layer.linear.*"),
)
FUSED = (
    ("attn.to_{}", "x_block.attn.qkv"),
    ("attn.add_{}_proj", "context_block.attn.qkv"),
    ("attn2.to_{}", "x_block.attn2.qkv"),
)
BLOCK = (
    ("attn.to_out.0", "x_block.attn.proj"),
    ("attn.norm_q", "x_block.attn.ln_q"),
    ("attn.norm_k", "x_block.attn.ln_k"),
    ("attn.to_add_out", "context_block.attn.proj"),
    ("attn.norm_added_q", "context_block.attn.ln_q"),
    ("attn.norm_added_k", "context_block.attn.ln_k"),
    ("attn2.to_out.0", "x_block.attn2.proj"),
    ("attn2.norm_q", "x_block.attn2.ln_q"),
    ("attn2.norm_k", "x_block.attn2.ln_k"),
    ("ff.net.0.proj", "x_block.mlp.fc1"),
    ("ff.net.2", "x_block.mlp.fc2"),
    ("ff_context.net.0.proj", "context_block.mlp.fc1"),
    ("ff_context.net.2", "context_block.mlp.fc2"),
    ("norm1.linear", "x_block.adaLN_modulation.1"),
    ("norm1_context.linear", "context_block.adaLN_modulation.1"),
)
"""Parts of a block: diffusers, original."""


def mmdit_rules(names: Collection[str]) -> list[Rule]:
    """Rules of the transformer, from either side's names.

    Where a norm has only a shift and a scale (the last one, and the text's in the last block), diffusers stores the
    scale first.
    """
    theirs, ours = "transformer_blocks.{i}", "joint_blocks.{i}"
    rules = [rename(foreign, native) for foreign, native in NAMES]
    rules.append(swap_halves("norm_out.linear.*", "final_layer.adaLN_modulation.1.*"))
    found = (re.match(r"(?:transformer|joint)_blocks\.([0-9]{1,4})\.", name) for name in names)
    last = max((int(block[1]) for block in found if block), default=None)
    if last is not None:
        rules.append(
            swap_halves(
                f"transformer_blocks.{last}.norm1_context.linear.*",
                f"joint_blocks.{last}.context_block.adaLN_modulation.1.*",
            )
        )
    for foreign, native in FUSED:
        parts = [f"{theirs}.{foreign.format(letter)}.*" for letter in "qkv"]
        rules.append(fuse(parts, f"{ours}.{native}.*"))
    return rules + [rename(f"{theirs}.{foreign}.*", f"{ours}.{native}.*") for foreign, native in BLOCK]


def projected_clip_rules(names: Collection[str]) -> list[Rule]:
    """CLIP's text tower with its projection, named alike on both sides."""
    return [rename("text_projection.weight", "text_projection.weight"), *clip_rules(names)]


T5_NAMES = ("shared.weight", "encoder.block.*", "encoder.final_layer_norm.weight")
T5_ALIAS = ignore("encoder.embed_tokens.weight")
"""The table ``shared`` once more; some files hold both names."""

# -- networks and their configurations ------------------------------------------------------------------------------


def _mmdit(shapes: Shapes) -> nn.Module:
    from sumuk.nets.mmdit import MMDiT, mmdit_shape

    return MMDiT(mmdit_shape(shapes))


def _clip_g(shapes: Shapes) -> nn.Module:
    from sumuk.nets.clip import ClipText, clip_shape

    return ClipText(clip_shape(shapes), activation="gelu")


def _t5(shapes: Shapes) -> nn.Module:
    from sumuk.nets.t5 import T5Encoder, t5_shape

    return T5Encoder(t5_shape(shapes))


def _mmdit_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.mmdit import HEAD, mmdit_shape

    shape = mmdit_shape(shapes)
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": HEAD,
        "caption_projection_dim": shape.width,
        "dual_attention_layers": list(range(shape.dual)),
        "in_channels": shape.channels,
        "joint_attention_dim": shape.context,
        "num_attention_heads": shape.heads,
        "num_layers": shape.depth,
        "out_channels": shape.out_channels,
        "patch_size": shape.patch,
        "pooled_projection_dim": shape.pooled,
        "pos_embed_max_size": shape.positions,
        "qk_norm": "rms_norm" if shape.qk_norm else None,
    }


def _clip_config(activation: str, shapes: Shapes) -> dict[str, Any]:
    said = {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": activation}
    return CLIP.config(shapes) | said


def _t5_config(shapes: Shapes) -> dict[str, Any]:
    layer = "encoder.block.{}.layer"
    heads = shapes[f"{layer.format(0)}.0.SelfAttention.relative_attention_bias.weight"]
    inner = shapes[f"{layer.format(0)}.0.SelfAttention.q.weight"][0]
    depth = len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")})
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": shapes[f"{layer.format(0)}.1.DenseReluDense.wo.weight"][1],
        "d_kv": inner // heads[1],
        "d_model": shapes["shared.weight"][1],
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_decoder_layers": depth,
        "num_heads": heads[1],
        "num_layers": depth,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": heads[0],
        "tie_word_embeddings": False,
        "vocab_size": shapes["shared.weight"][0],
    }


MMDIT = Part(
    name="denoiser",
    title="MMDiT",
    key="joint_blocks.0.context_block.attn.qkv.weight",
    original=(
        "pos_embed", "x_embedder.*", "t_embedder.*", "y_embedder.*", "context_embedder.*", "joint_blocks.*",
        "final_layer.*",
    ),
    diffusers=mmdit_rules,
    supplier="any SD 3 checkpoint, or transformer/ of its diffusers folder",
    build=_mmdit,
    config=_mmdit_config,
)  # fmt: skip
VAE16 = replace(VAE, supplier="any SD 3 checkpoint, sd3_vae.safetensors, or vae/ of its diffusers folder")
CLIP_L = replace(
    CLIP,
    title="text tower CLIP-L",
    original=("text_model.*", "text_projection.weight"),
    diffusers=projected_clip_rules,
    supplier="clip_l.safetensors, or text_encoder/ of an SD 3 diffusers folder",
    config=partial(_clip_config, "quick_gelu"),
    optional=True,
)
CLIP_G = replace(
    CLIP_L,
    name="text_2",
    title="text tower CLIP-G",
    supplier="clip_g.safetensors, or text_encoder_2/ of an SD 3 diffusers folder",
    build=_clip_g,
    config=partial(_clip_config, "gelu"),
)
T5 = Part(
    name="text_3",
    title="text tower T5",
    key="shared.weight",
    original=T5_NAMES,
    aliases=(T5_ALIAS,),
    file="model.safetensors",
    diffusers=lambda names: [*(rename(name, name) for name in T5_NAMES), T5_ALIAS],
    supplier="t5xxl_fp16.safetensors, or text_encoder_3/ of an SD 3 diffusers folder",
    build=_t5,
    config=_t5_config,
    optional=True,
)

SINGLE = Arrangement(
    name="single",
    title="original single file",
    dialect="original",
    parts=(
        (MMDIT, "model.diffusion_model."),
        (VAE16, "first_stage_model."),
        (CLIP_L, "text_encoders.clip_l.transformer."),
        (CLIP_G, "text_encoders.clip_g.transformer."),
        (T5, "text_encoders.t5xxl.transformer."),
    ),
    ignored=(
        ignore("model.model_sampling.sigmas"),
        *(ignore(f"text_encoders.{tower}.logit_scale") for tower in ("clip_l", "clip_g", "t5xxl")),
        *(ignore(f"text_encoders.clip_{one}.transformer.{name}") for one in "lg" for name in POSITIONS),
    ),
)
DIFFUSERS = Arrangement(
    name="diffusers",
    title="diffusers folder",
    dialect="diffusers",
    parts=(
        (MMDIT, "transformer/"),
        (VAE16, "vae/"),
        (CLIP_L, "text_encoder/"),
        (CLIP_G, "text_encoder_2/"),
        (T5, "text_encoder_3/"),
    ),
    ignored=tuple(
        ignore(f"{place}/{name}") for place in ("text_encoder", "text_encoder_2") for name in POSITIONS
    ),
)
BARE = Arrangement(
    name="bare",
    title="single network, original names without prefix",
    dialect="original",
    parts=((MMDIT, ""),),
    ignored=tuple(map(ignore, (*POSITIONS, "logit_scale"))),
)
BARE_DIFFUSERS = replace(
    BARE, name="bare-diffusers", title="single network, diffusers names", dialect="diffusers"
)

# -- what the family is ----------------------------------------------------------------------------------------------


def _recognise(variant: str, shapes: Shapes) -> str | None:
    """Whether native names and shapes are this variant of SD 3, and its towers fit it."""
    for name in (MMDIT.key, "pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight"):
        if f"denoiser.{name}" not in shapes:
            return f"there is no {name!r} of an MMDiT"
    block = "denoiser.joint_blocks.0.x_block"
    dual, normed = f"{block}.attn2.qkv.weight" in shapes, f"{block}.attn.ln_q.weight" in shapes
    here = "3.5-medium" if dual else "3.5-large" if normed else "medium"
    if here != variant:
        return f"the blocks are those of SD {here}"
    reads = shapes.get("denoiser.context_embedder.weight", ())[-1:]
    writes = shapes.get(f"text_3.{T5.key}", reads)[-1:]
    if reads != writes:
        return f"the MMDiT reads text of width {reads}, its T5 writes {writes}"
    towers = [shapes.get(f"{tower}.text_projection.weight", ()) for tower in ("text", "text_2")]
    pooled = shapes.get("denoiser.y_embedder.mlp.0.weight", ())[-1:]
    if all(towers) and pooled != (sum(tower[0] for tower in towers),):
        return f"the MMDiT takes a sentence of length {pooled}, its CLIP towers make {towers}"
    return None


def _condition(given: Given) -> dict[str, Tensor]:
    """``context``: rows of L and G side by side, filled up to T5's width, then T5's rows. ``y``: both sentences.

    A missing tower's places are zero. That is 256 rows for T5, as in diffusers; others leave its rows out.
    """
    shape = given.shape
    large, giant, words = (given.texts.get(reading.part) for reading in READINGS)
    clips = [tower for tower in (large, giant) if tower is not None]
    if not clips and words is None:
        raise BadInput("SD 3 has no text tower to read the prompt with; give it CLIP-L, CLIP-G or T5")
    _check(shape, clips, words)
    some = (words or clips[0]).z
    rows = max((tower.z.shape[1] for tower in clips), default=CLIP_ROWS)
    context = some.new_zeros(1, rows + (T5_ROWS if words is None else words.z.shape[1]), shape.context)
    y = some.new_zeros(1, shape.pooled)
    for tower in clips:
        assert tower.pooled is not None  # as checked
        # G comes after L. Without L its place is what G's sentence leaves: L's sentence is as wide as its rows.
        begin = 0 if tower is large else shape.pooled - tower.pooled.shape[1]
        first = large.z.shape[2] if large is not None and tower is giant else begin
        context[:, : tower.z.shape[1], first : first + tower.z.shape[2]] = tower.z
        y[:, begin : begin + tower.pooled.shape[1]] = tower.pooled
    if words is not None:
        context[:, rows:] = words.z
    return {"context": context, "y": y}


def _check(shape: Any, clips: Sequence[Encoded], words: Encoded | None) -> None:
    """Refuse towers that do not fit the network; they may come from other files."""
    sentences = [0 if tower.pooled is None else tower.pooled.shape[1] for tower in clips]
    if not all(sentences):
        raise BadInput("a CLIP tower says nothing of the whole sentence, which SD 3 needs")
    if sum(sentences) > shape.pooled or (len(clips) == 2 and sum(sentences) < shape.pooled):
        raise BadInput(f"SD 3 takes a sentence of {shape.pooled} numbers; its CLIP towers make {sentences}")
    widths = [tower.z.shape[2] for tower in clips]
    if sum(widths) > shape.context or (words is not None and words.z.shape[2] != shape.context):
        widths += [] if words is None else [words.z.shape[2]]
        raise BadInput(f"SD 3 reads text of width {shape.context}; its towers write {widths}")


def _folder(facts: Facts) -> dict[str, dict[str, Any]]:
    clip = ["transformers", "CLIPTextModelWithProjection"]
    return {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "_diffusers_version": "0.31.0",  # the first that knows all three variants
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": clip,
            "text_encoder_2": clip,
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": SHIFT,
        },
        "transformer/config.json": {"sample_size": facts.latent.cells(facts.size)},
        "vae/config.json": {
            "sample_size": facts.size,
            "scaling_factor": facts.latent.scale,
            "shift_factor": facts.latent.shift,
        },
    }


# The sentence is CLIP's projected one, as in diffusers. The reference takes L's and G's before the projection; the
# published stand-alone clip_l.safetensors has no projection at all.
READINGS = (
    Reading(part="text", layer=2, norm=False, pool="projected"),
    Reading(part="text_2", pad=0, layer=2, norm=False, pool="projected"),
    Reading(part="text_3", words="t5", length=T5_ROWS),
)

MEDIUM = Family(
    name="sd3",
    variant="medium",
    title="Stable Diffusion 3 medium",
    architecture="stable-diffusion-3-m",
    arrangements=(SINGLE, DIFFUSERS, BARE, BARE_DIFFUSERS),
    recognise=partial(_recognise, "medium"),
    latent=Latent(channels=16, stride=8, scale=1.5305, shift=0.0609),
    channels=lambda shapes: shapes["x_embedder.proj.weight"][1],
    schedule=partial(Flow, SHIFT),
    prediction="flow",
    readings=READINGS,
    condition=_condition,
    guidance="classifier-free",
    takes=("skip_layers",),
    # "normal" is the published spacing: even times, of which the last is shifted twice.
    defaults=Defaults(size=1024, steps=28, guidance=7.0, solver="euler", grid="normal"),
    licence="Stability-AI-Community",
    folder=_folder,
)
MEDIUM_35 = replace(
    MEDIUM,
    variant="3.5-medium",
    title="Stable Diffusion 3.5 medium",
    architecture="stable-diffusion-3-5-medium",
    recognise=partial(_recognise, "3.5-medium"),
    defaults=replace(MEDIUM.defaults, steps=40, guidance=4.5),
)
LARGE_35 = replace(
    MEDIUM,
    variant="3.5-large",
    title="Stable Diffusion 3.5 large (or its turbo: 4 steps, guidance 1)",
    architecture="stable-diffusion-3-5-large",
    recognise=partial(_recognise, "3.5-large"),
    defaults=replace(MEDIUM.defaults, guidance=3.5),
)

FAMILIES.add("sd3/medium", MEDIUM, "sd3")
FAMILIES.add("sd3/3.5-medium", MEDIUM_35, "sd3.5-medium")
FAMILIES.add("sd3/3.5-large", LARGE_35, "sd3.5-large")
