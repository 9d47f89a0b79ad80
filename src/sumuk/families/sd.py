"""Stable Diffusion 1.x (Rombach et al. 2022): a U-Net on an autoencoder's latents, told by CLIP's text tower.

Three variants that differ in what is laid beside the noisy latent: nothing (text-to-image), a mask and the
latent of the masked image (inpainting), the latent of the image to edit (InstructPix2Pix, Brooks et al.
2023).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.diffusion.schedule import scaled_linear
from sumuk.families.diffusers import HEADLESS, clip_rules, unet_rules, vae_rules
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Latent, Part, Shapes
from sumuk.families.reading import Reading
from sumuk.files.layout import ignore

if TYPE_CHECKING:
    from torch import nn

HEADS = 8
"""Attention heads at every width."""


def _unet(shapes: Shapes) -> nn.Module:
    from sumuk.nets.unet import UNet, encoder_shape

    # The encoder tells the rest, which the loader then compares with the file, name by name.
    return UNet(encoder_shape(shapes, heads=HEADS, out_key="out.2.weight"))


def _vae(shapes: Shapes) -> nn.Module:
    from sumuk.nets.vae import Vae, vae_shape

    return Vae(vae_shape(shapes))


def _clip(shapes: Shapes) -> nn.Module:
    from sumuk.nets.clip import ClipText, clip_shape

    return ClipText(clip_shape(shapes))


def _unet_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.unet import unet_shape

    shape = unet_shape(shapes, heads=HEADS)
    attends = [depth > 0 for depth in shape.transformer_depth]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": HEADS,  # means the number of heads, for the models of this age
        "block_out_channels": [shape.model_channels * mult for mult in shape.channel_mult],
        "center_input_sample": False,
        "cross_attention_dim": shape.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shape.in_channels,
        "layers_per_block": shape.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if shape.middle_depth else "UNetMidBlock2D",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": shape.out_channels,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
    }
    if any(depth > 1 for depth in shape.transformer_depth):
        config["transformer_layers_per_block"] = [max(depth, 1) for depth in shape.transformer_depth]
    return config


def _vae_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.vae import vae_shape

    shape = vae_shape(shapes)
    levels = len(shape.multiples)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shape.width * multiple for multiple in shape.multiples],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shape.colours,
        "latent_channels": shape.latent,
        "layers_per_block": shape.blocks,
        "norm_num_groups": shape.groups,
        "out_channels": shape.colours,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": shape.quantised is not None,
        "use_quant_conv": shape.quantised is not None,
    }


def _clip_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.clip import clip_shape

    shape = clip_shape(shapes)
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": shape.vocabulary - 2,
        "eos_token_id": shape.vocabulary - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": shape.length,
        "model_type": "clip_text_model",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.depth,
        "pad_token_id": shape.vocabulary - 1,
        "projection_dim": shape.projection or shape.width,
        "vocab_size": shape.vocabulary,
    }


UNET = Part(
    name="denoiser",
    title="U-Net",
    key="input_blocks.0.0.weight",
    original=("time_embed.*", "label_emb.*", "input_blocks.*", "middle_block.*", "output_blocks.*", "out.*"),
    diffusers=unet_rules,
    supplier="any SD 1.x checkpoint, or unet/ of its diffusers folder",
    build=_unet,
    config=_unet_config,
    fixed=("attention_head_dim", "flip_sin_to_cos", "freq_shift", "norm_eps", "norm_num_groups"),
)
VAE_NAMES = (
    "encoder.conv_in.*", "encoder.down.*", "encoder.mid.*", "encoder.norm_out.*", "encoder.conv_out.*",
    "decoder.conv_in.*", "decoder.up.*", "decoder.mid.*", "decoder.norm_out.*", "decoder.conv_out.*",
    "quant_conv.*", "post_quant_conv.*",
)  # fmt: skip
"""Spelled out, as diffusers calls its halves encoder and decoder as well."""

VAE = Part(
    name="vae",
    title="autoencoder",
    key="decoder.conv_in.weight",
    original=VAE_NAMES,
    diffusers=vae_rules,
    supplier="any SD 1.x checkpoint, a stand-alone VAE (vae-ft-mse-840000), or vae/ of a diffusers folder",
    build=_vae,
    config=_vae_config,
    fixed=("norm_num_groups",),
)
CLIP = Part(
    name="text",
    title="text tower",
    key="text_model.embeddings.token_embedding.weight",
    original=("text_model.*",),
    aliases=HEADLESS,
    file="model.safetensors",
    diffusers=clip_rules,
    supplier="any SD 1.x checkpoint, or text_encoder/ of its diffusers folder",
    build=_clip,
    config=_clip_config,
)

SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "logvar",
)  # fmt: skip
"""Tables that training code leaves in single files; all follow from the schedule."""

POSITIONS = ("text_model.embeddings.position_ids", "embeddings.position_ids")
"""The numbers 0 to 76, stored."""

SINGLE = Arrangement(
    name="single",
    title="original single file",
    dialect="original",
    parts=(
        (UNET, "model.diffusion_model."),
        (VAE, "first_stage_model."),
        (CLIP, "cond_stage_model.transformer."),
    ),
    ignored=(
        *map(ignore, SCHEDULE_BUFFERS),
        *(ignore(f"cond_stage_model.transformer.{name}") for name in POSITIONS),
        ignore("model_ema.*"),
        ignore("first_stage_model.loss.*"),
        ignore("v_pred"),
        ignore("ztsnr"),
    ),
)
DIFFUSERS = Arrangement(
    name="diffusers",
    title="diffusers folder",
    dialect="diffusers",
    parts=((UNET, "unet/"), (VAE, "vae/"), (CLIP, "text_encoder/")),
    ignored=(
        *(ignore(f"text_encoder/{name}") for name in POSITIONS),
        ignore("safety_checker/*"),
        ignore("controlnet/*"),  # of a pipeline with one; it is loaded by itself
        ignore("image_encoder/*"),
    ),
)
BARE = Arrangement(
    name="bare",
    title="single network, original names without prefix",
    dialect="original",
    parts=((UNET, ""), (VAE, ""), (CLIP, "")),
    ignored=tuple(map(ignore, (*POSITIONS, "loss.*", "model_ema.*", "v_pred", "ztsnr"))),
)
BARE_DIFFUSERS = Arrangement(
    name="bare-diffusers",
    title="single network, diffusers names",
    dialect="diffusers",
    parts=((UNET, ""), (VAE, ""), (CLIP, "")),
    ignored=tuple(map(ignore, POSITIONS)),
)


def _recognise(beside: tuple[int, int], shapes: Shapes) -> str | None:
    """Whether native names and shapes are SD 1.x with ``latents * channels + extra`` channels beside the
    latent.
    """
    unet = {
        name.removeprefix("denoiser."): shape for name, shape in shapes.items() if name[:9] == "denoiser."
    }
    for name in ("input_blocks.0.0.weight", "out.2.weight", "middle_block.1.proj_in.weight"):
        if name not in unet:
            return f"there is no {name!r} of a U-Net with text"
        if len(unet[name]) != 4:
            return f"{name!r} is linear, as in SD 2 and SDXL"
    if any(name.startswith("label_emb.") for name in unet):
        return "the U-Net takes a vector (label_emb), as in SDXL and unCLIP"
    given, latent = unet["input_blocks.0.0.weight"][1], unet["out.2.weight"][0]
    latents, extra = beside
    if given != latent * (1 + latents) + extra:
        return f"the U-Net takes {given} channels where {latent * (1 + latents) + extra} are expected"
    context = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", ())[-1:]
    width = shapes.get(f"text.{CLIP.key}", context)[-1:]
    if context != width:
        return f"the U-Net reads text of width {context}, its text tower writes {width}"
    return None


def latent_channels(shapes: Shapes) -> int:
    """What a U-Net of the latent-diffusion lineage predicts."""
    return shapes["out.2.weight"][0]


def _folder(pipeline: str, facts: Facts) -> dict[str, dict[str, Any]]:
    return {
        "model_index.json": {
            "_class_name": pipeline,
            "_diffusers_version": "0.30.0",  # whose layout this is; without a version it cannot be opened
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": {"eps": "epsilon", "v": "v_prediction", "clean": "sample"}[facts.prediction],
            "rescale_betas_zero_snr": facts.zero_snr,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "trailing" if facts.zero_snr else "leading",
        },
        "unet/config.json": {"sample_size": facts.size // facts.latent.stride},
        "vae/config.json": {
            "sample_size": facts.size,
            "scaling_factor": facts.latent.scale,
            "shift_factor": facts.latent.shift or None,
        },
    }


TEXT_TO_IMAGE = Family(
    name="sd1",
    variant="text-to-image",
    title="Stable Diffusion 1.x",
    architecture="stable-diffusion-v1",
    arrangements=(SINGLE, DIFFUSERS, BARE, BARE_DIFFUSERS),
    recognise=partial(_recognise, (0, 0)),
    latent=Latent(channels=4, stride=8, scale=0.18215),
    channels=latent_channels,
    schedule=scaled_linear,
    prediction="eps",
    readings=(Reading(part="text"),),
    condition=lambda given: {"context": given.texts["text"].z},
    guidance="classifier-free",
    defaults=Defaults(size=512, steps=25, guidance=7.5),
    licence="CreativeML-OpenRAIL-M",
    folder=partial(_folder, "StableDiffusionPipeline"),
)
INPAINTING = replace(
    TEXT_TO_IMAGE,
    variant="inpainting",
    title="Stable Diffusion 1.x inpainting",
    architecture="stable-diffusion-v1-inpainting",
    recognise=partial(_recognise, (1, 1)),
    beside=("mask", "masked"),
    folder=partial(_folder, "StableDiffusionInpaintPipeline"),
)
PIX2PIX = replace(
    TEXT_TO_IMAGE,
    variant="instruct-pix2pix",
    title="InstructPix2Pix (Stable Diffusion 1.x)",
    architecture="stable-diffusion-v1-edit",
    recognise=partial(_recognise, (1, 0)),
    beside=("image",),
    folder=partial(_folder, "StableDiffusionInstructPix2PixPipeline"),
)

FAMILIES.add("sd1/text-to-image", TEXT_TO_IMAGE, "sd1")
FAMILIES.add("sd1/inpainting", INPAINTING)
FAMILIES.add("sd1/instruct-pix2pix", PIX2PIX)
