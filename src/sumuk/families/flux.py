"""FLUX.1 (Black Forest Labs 2024): a transformer on a 16-channel latent, told by T5 and CLIP, a rectified flow.

Four variants. ``dev`` has learnt to follow a guidance scale that it is given as a number; ``schnell`` was
distilled further, to a few steps, and takes none. ``fill`` and ``control`` are dev with pictures laid beside
the latent: the picture to complete with its mask, or edges or depth to follow. Canny's and Depth's weights look
alike, so the two are one variant.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.diffusion.schedule import Flow, Schedule, resolution_shift
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Latent, Part, Shapes
from sumuk.families.reading import Given, Reading
from sumuk.families.sd import CLIP, POSITIONS, VAE
from sumuk.families.sd3 import T5
from sumuk.files.layout import Rule, fuse, ignore, rename, swap_halves

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKEN = 16
"""Pixels a side that one token stands for: 8 to a latent cell, two cells to a patch."""
MASKS = tuple(4 * stride**2 for stride in (2, 4, 8, 16))
"""Numbers a token that a mask takes: every pixel of four cells. The published autoencoder's stride is 8."""


def _transformer(shapes: Shapes) -> nn.Module:
    from sumuk.nets.flux import Flux, flux_shape

    return Flux(flux_shape(shapes))


def _transformer_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.flux import PATCH, flux_shape

    shape = flux_shape(shapes)
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": shape.head,
        "axes_dims_rope": list(shape.axes),
        "guidance_embeds": shape.guidance,
        "in_channels": PATCH**2 * shape.in_channels,
        "joint_attention_dim": shape.context_dim,
        "num_attention_heads": shape.heads,
        "num_layers": shape.double,
        "num_single_layers": shape.single,
        "out_channels": PATCH**2 * shape.out_channels,
        "patch_size": 1,  # the pipeline cuts the patches, and the network sees tokens
        "pooled_projection_dim": shape.vector_dim,
    }


def _double(ours: str, qkv: tuple[str, str, str], names: Sequence[tuple[str, str]]) -> list[Rule]:
    """One stream of the double blocks."""
    theirs, block = "transformer_blocks.{i}", f"double_blocks.{{i}}.{ours}"
    fused = fuse([f"{theirs}.attn.{name}.*" for name in qkv], f"{block}_attn.qkv.*")
    return [fused, *(rename(f"{theirs}.{foreign}", f"{block}_{native}") for foreign, native in names)]


def flux_rules(names: Collection[str]) -> list[Rule]:
    """The transformer as diffusers names it: attention's three projections apart, last (scale, shift)."""
    single, block = "single_transformer_blocks.{i}", "single_blocks.{i}"
    embedders = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}
    return [
        rename("x_embedder.*", "img_in.*"),
        rename("context_embedder.*", "txt_in.*"),
        *(
            rename(f"time_text_embed.{foreign}_embedder.linear_{number}.*", f"{native}.{layer}_layer.*")
            for foreign, native in embedders.items()
            for number, layer in ((1, "in"), (2, "out"))
        ),
        *_double(
            "img",
            ("to_q", "to_k", "to_v"),
            (
                ("norm1.linear.*", "mod.lin.*"),
                ("attn.norm_q.weight", "attn.norm.query_norm.scale"),
                ("attn.norm_k.weight", "attn.norm.key_norm.scale"),
                ("attn.to_out.0.*", "attn.proj.*"),
                ("ff.net.0.proj.*", "mlp.0.*"),
                ("ff.net.2.*", "mlp.2.*"),
            ),
        ),
        *_double(
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            (
                ("norm1_context.linear.*", "mod.lin.*"),
                ("attn.norm_added_q.weight", "attn.norm.query_norm.scale"),
                ("attn.norm_added_k.weight", "attn.norm.key_norm.scale"),
                ("attn.to_add_out.*", "attn.proj.*"),
                ("ff_context.net.0.proj.*", "mlp.0.*"),
                ("ff_context.net.2.*", "mlp.2.*"),
            ),
        ),
        rename(f"{single}.norm.linear.*", f"{block}.modulation.lin.*"),
        fuse(
            [*(f"{single}.attn.to_{name}.*" for name in "qkv"), f"{single}.proj_mlp.*"],
            f"{block}.linear1.*",
            parts=[1, 1, 1, 4],  # the feed-forward part is four times as wide
        ),
        rename(f"{single}.attn.norm_q.weight", f"{block}.norm.query_norm.scale"),
        rename(f"{single}.attn.norm_k.weight", f"{block}.norm.key_norm.scale"),
        rename(f"{single}.proj_out.*", f"{block}.linear2.*"),
        swap_halves("norm_out.linear.*", "final_layer.adaLN_modulation.1.*"),
        rename("proj_out.*", "final_layer.linear.*"),
    ]


TRANSFORMER_NAMES = (
    "img_in.*", "txt_in.*", "time_in.*", "vector_in.*", "guidance_in.*", "double_blocks.*", "single_blocks.*",
    "final_layer.*",
)  # fmt: skip
TRANSFORMER = Part(
    name="denoiser",
    title="transformer",
    key="double_blocks.0.img_attn.norm.query_norm.scale",
    original=TRANSFORMER_NAMES,
    diffusers=flux_rules,
    supplier="flux1-dev.safetensors or another FLUX.1 transformer, or transformer/ of its diffusers folder",
    build=_transformer,
    config=_transformer_config,
)
AUTOENCODER = replace(VAE, supplier="FLUX.1's ae.safetensors, or vae/ of its diffusers folder")
TEXT = replace(CLIP, supplier="clip_l.safetensors, or text_encoder/ of a FLUX.1 diffusers folder")
TOWER = replace(
    T5,
    name="text_2",
    supplier="t5xxl_fp16.safetensors, or text_encoder_2/ of a FLUX.1 diffusers folder",
    optional=False,
)

UNUSED_TEXT = (*POSITIONS, "text_projection.weight")
"""Of CLIP: FLUX.1 reads its sentence before the projection, which some files hold all the same."""

SINGLE = Arrangement(
    name="single",
    title="single file of everything",
    dialect="original",
    parts=(
        (TRANSFORMER, "model.diffusion_model."),
        (AUTOENCODER, "vae."),
        (TEXT, "text_encoders.clip_l.transformer."),
        (TOWER, "text_encoders.t5xxl.transformer."),
    ),
    ignored=(
        *(ignore(f"text_encoders.clip_l.transformer.{name}") for name in UNUSED_TEXT),
        ignore("text_encoders.clip_l.logit_scale"),
        ignore("text_encoders.t5xxl.logit_scale"),
        ignore("model.model_sampling.sigmas"),
    ),
)
DIFFUSERS = Arrangement(
    name="diffusers",
    title="diffusers folder",
    dialect="diffusers",
    parts=(
        (TRANSFORMER, "transformer/"),
        (AUTOENCODER, "vae/"),
        (TEXT, "text_encoder/"),
        (TOWER, "text_encoder_2/"),
    ),
    ignored=(
        *(ignore(f"text_encoder/{name}") for name in UNUSED_TEXT),
        ignore("image_encoder/*"),
    ),
)
BARE = Arrangement(
    name="bare",
    title="single network, original names without prefix, as published",
    dialect="original",
    parts=((TRANSFORMER, ""), (AUTOENCODER, ""), (TEXT, ""), (TOWER, "")),
    ignored=tuple(map(ignore, (*UNUSED_TEXT, "logit_scale"))),
)
BARE_DIFFUSERS = replace(
    BARE, name="bare-diffusers", title="single network, diffusers names", dialect="diffusers"
)

NEEDED = (
    "img_in.weight", "final_layer.linear.weight", "txt_in.weight", "vector_in.in_layer.weight",
    "time_in.in_layer.weight", "double_blocks.0.img_mod.lin.weight", "double_blocks.0.txt_attn.qkv.weight",
)  # fmt: skip
"""ControlNets and adapters for FLUX.1 lack the last layer, Chroma lacks time, sentence and modulations."""
READS = (
    ("vector_in.in_layer.weight", "text.text_model.embeddings.token_embedding.weight", "CLIP"),
    ("txt_in.weight", "text_2.shared.weight", "T5"),
)
"""What the transformer reads, and the tower whose width that is."""


def _recognise(guided: bool, latents: int, masks: tuple[int, ...], shapes: Shapes) -> str | None:
    """Whether native names and shapes are a FLUX.1 with so many latents and one of these masks beside its own."""
    for name in NEEDED:
        if len(shapes.get(f"denoiser.{name}", ())) != 2:
            return f"there is no {name!r} of a FLUX.1 transformer"
    taken, made = shapes["denoiser.img_in.weight"][1], shapes["denoiser.final_layer.linear.weight"][0]
    if taken - made * (1 + latents) not in masks:
        wanted = " or ".join(str(made * (1 + latents) + mask) for mask in masks)
        return f"the transformer takes {taken} numbers a token where {wanted} are expected"
    if ("denoiser.guidance_in.in_layer.weight" in shapes) != guided:
        return f"the transformer takes {'no' if guided else 'a'} guidance scale (guidance_in)"
    for reader, tower, title in READS:
        read = shapes[f"denoiser.{reader}"][1:]
        written = shapes.get(tower, read)[-1:]
        if read != written:
            return f"the transformer reads {title} of width {list(read)}, the tower writes {list(written)}"
    return None


def _resized(schedule: Schedule, width: int, height: int) -> Schedule:
    """More noise for more tokens, as dev was trained."""
    if not isinstance(schedule, Flow):
        return schedule
    return Flow(resolution_shift((width // TOKEN) * (height // TOKEN)), schedule.scale)


def _condition(given: Given) -> dict[str, Tensor]:
    import torch

    context, sentence = given.texts["text_2"].z, given.texts["text"].pooled
    assert sentence is not None  # the reading asks for it
    named = {"context": context, "y": sentence}
    if given.shape.guidance:
        named["guidance"] = torch.full((1,), given.guidance, dtype=torch.float32, device=context.device)
    return named


def _folder(pipeline: str, shifted: bool, facts: Facts) -> dict[str, dict[str, Any]]:
    return {
        "model_index.json": {
            "_class_name": pipeline,
            "_diffusers_version": "0.32.0",  # the first with all of these pipelines
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0 if shifted else 1.0,  # not looked at where the shift is dynamic
            "use_dynamic_shifting": shifted,
        },
        "vae/config.json": {
            "sample_size": facts.size,
            "scaling_factor": facts.latent.scale,
            "shift_factor": facts.latent.shift,
        },
    }


def _readings(length: int) -> tuple[Reading, ...]:
    return Reading(part="text", pool="pooled"), Reading(part="text_2", words="t5", length=length)


DEV = Family(
    name="flux",
    variant="dev",
    title="FLUX.1 [dev]",
    architecture="flux-1-dev",
    arrangements=(SINGLE, DIFFUSERS, BARE, BARE_DIFFUSERS),
    recognise=partial(_recognise, True, 0, (0,)),
    latent=Latent(channels=16, stride=8, scale=0.3611, shift=0.1159),
    channels=lambda shapes: shapes["final_layer.linear.weight"][0] // 4,
    schedule=Flow,
    resized=_resized,
    prediction="flow",
    readings=_readings(512),
    condition=_condition,
    guidance="embedded",
    defaults=Defaults(size=1024, steps=28, guidance=3.5, solver="euler", grid="uniform"),
    licence="FLUX.1-dev-Non-Commercial",
    folder=partial(_folder, "FluxPipeline", True),
)
SCHNELL = replace(
    DEV,
    variant="schnell",
    title="FLUX.1 [schnell]",
    architecture="flux-1-schnell",
    recognise=partial(_recognise, False, 0, (0,)),
    resized=None,
    readings=_readings(256),
    guidance="none",
    defaults=replace(DEV.defaults, steps=4, guidance=1.0),
    licence="Apache-2.0",
    folder=partial(_folder, "FluxPipeline", False),
)
FILL = replace(
    DEV,
    variant="fill",
    title="FLUX.1 Fill [dev]",
    architecture="flux-1-dev-fill",
    recognise=partial(_recognise, True, 1, MASKS),
    beside=("masked", "unshuffled-mask"),
    defaults=replace(DEV.defaults, steps=50, guidance=30.0),
    folder=partial(_folder, "FluxFillPipeline", True),
)
CONTROL = replace(
    DEV,
    variant="control",
    title="FLUX.1 Canny or Depth [dev] (the weights do not tell which)",
    architecture="flux-1-dev-control",
    recognise=partial(_recognise, True, 1, (0,)),
    beside=("control",),
    takes=("hint",),
    folder=partial(_folder, "FluxControlPipeline", True),
)

FAMILIES.add("flux/dev", DEV, "flux")
FAMILIES.add("flux/schnell", SCHNELL)
FAMILIES.add("flux/fill", FILL)
FAMILIES.add("flux/control", CONTROL)
