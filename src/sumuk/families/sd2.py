"""Stable Diffusion 2.x: the networks of version 1 with linear projections, told by OpenCLIP's tower H.

Variants differ in what lies beside the noisy latent and in what is added to the time:

    text-to-image   nothing                                nothing
    inpainting      mask, latent of the masked picture     nothing
    depth           depth map                              nothing
    x4-upscaler     the small picture itself, noised       its noise level, as a class
    unclip-l, -h    nothing                                CLIP's view of a picture, noised, and that noise level

Weights do not tell eps from v. Both were published for text-to-image: 2.0 and 2.1 at 768 pixels, on which most later
models build, predict v, their 512-pixel bases eps; without evidence it is v. Inpainting and depth grew from the base
(eps); the upscaler and unCLIP predict v.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import cosine, scaled_linear
from sumuk.families.cascade_parts import IMAGE
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Latent, Part, Shapes
from sumuk.families.linear_unet import (
    Header,
    arrangements,
    beside,
    folder,
    linear_unet,
    linear_unet_config,
    read_header,
    vector_unet_rules,
)
from sumuk.families.openclip import EXTRAS, OPENCLIP_H, layer_read
from sumuk.families.reading import Given, Reading
from sumuk.families.sd import POSITIONS, UNET, VAE, _unet_config
from sumuk.files.layout import ignore, rename

if TYPE_CHECKING:
    from torch import Tensor, nn

X4_HEADS = 8
"""Attention heads of the upscaler at every width."""


def _config(shapes: Shapes) -> dict[str, Any]:
    config = linear_unet_config(shapes) | {"upcast_attention": True}  # 2.1's overflows in float16
    if "label_emb.0.0.weight" in shapes:
        config["class_embed_type"] = "projection"
        config["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    return config


def _x4_unet(shapes: Shapes) -> nn.Module:
    from sumuk.nets.unet import UNet, encoder_shape

    return UNet(encoder_shape(shapes, heads=X4_HEADS, out_key="out.2.weight"))


def _x4_config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.unet import unet_shape

    shape = unet_shape(shapes, heads=X4_HEADS)
    return _unet_config(shapes) | {
        "num_class_embeds": shape.num_classes,
        "only_cross_attention": list(shape.cross_only) or False,
        "use_linear_projection": True,
    }


LINEAR_UNET = replace(
    UNET,
    diffusers=partial(vector_unet_rules, "class_embedding"),
    supplier="any SD 2.x checkpoint, or unet/ of its diffusers folder",
    build=linear_unet,
    config=_config,
)
X4_UNET = replace(LINEAR_UNET, build=_x4_unet, config=_x4_config)


def _statistics(shapes: Shapes) -> nn.Module:
    from sumuk.nets.clip_vision import ViewStatistics

    return ViewStatistics(shapes["mean"][-1])


STATISTICS = Part(
    name="statistics",
    title="statistics of CLIP's views",
    key="mean",
    original=("mean", "std"),
    diffusers=lambda names: [rename("mean", "mean"), rename("std", "std")],
    supplier="image_normalizer/ of an unCLIP diffusers folder",
    build=_statistics,
    config=lambda shapes: {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": shapes["mean"][-1]},
    optional=True,
)
VIEWS = (
    (
        replace(IMAGE, title="image tower", supplier="image_encoder/ of an unCLIP diffusers folder"),
        "image_encoder.",
    ),
    (STATISTICS, "image_normalizer."),
)
"""What unCLIP sees a picture with. The published single files hold it under names that nobody here has seen."""


def _arrangements(unet: Part, views: bool = False) -> tuple[Arrangement, ...]:
    networks = [
        (unet, "model.diffusion_model.", "unet/"),
        (VAE, "first_stage_model.", "vae/"),
        (OPENCLIP_H, "cond_stage_model.model.", "text_encoder/"),
    ]
    single = tuple(f"cond_stage_model.model.{name}" for name in EXTRAS)
    folders = ["depth_estimator/*", *(f"text_encoder/{name}" for name in POSITIONS)]
    if views:
        networks += [(part, prefix, prefix.replace(".", "/")) for part, prefix in VIEWS]
        folders.append("image_encoder/vision_model.embeddings.position_ids")
    else:
        folders.append("image_encoder/*")
    return arrangements(tuple(networks), single, tuple(folders))


def _with(usual: tuple[Arrangement, ...], *names: str) -> tuple[Arrangement, ...]:
    """The same, but its single files also hold these names, of no use here."""
    single, *others = usual
    return (replace(single, ignored=(*single.ignored, *map(ignore, names))), *others)


USUAL = _arrangements(LINEAR_UNET)


def _added(header: Header) -> str:
    """What is added to the time: ``""``, ``class``, ``l`` or ``h`` (vectors beside CLIP's L or H), or ``sizes``."""
    if header.classes or not header.vector:
        return "class" if header.classes else ""
    if not header.shallow:
        return "sizes"  # SDXL, whose first level does not attend
    return "h" if header.vector == 2 * header.context else "l"


def _recognise(channels: tuple[int, int], added: str, shapes: Shapes) -> str | None:
    """Whether native names and shapes are SD 2 with these channels beside the latent and this added to the time."""
    header = read_header(shapes)
    if isinstance(header, str):
        return header
    if _added(header) != added:
        return f"what the U-Net adds to the time (label_emb) is {_added(header) or 'nothing'}, not {added or 'nothing'}"
    if (reason := beside(header, *channels)) is not None:
        return reason
    width = shapes.get(f"text.{OPENCLIP_H.key}", (header.context,))[-1:]
    if width != (header.context,):
        return f"the U-Net reads text of width {header.context}, its text tower writes {list(width)}"
    return None


def _context(given: Given) -> dict[str, Tensor]:
    return {"context": given.texts["text"].z}


def _noised_picture(given: Given) -> dict[str, Tensor]:
    """The upscaler: text, and how much noise lies on the small picture, on both sides of guidance."""
    import torch

    levels = given.shape.num_classes
    if not 0 <= given.noise_level < levels:
        raise BadInput(f"noise level {given.noise_level} is outside 0..{levels - 1}, those of this upscaler")
    return _context(given) | {"y": torch.tensor([given.noise_level])}


def _view(given: Given) -> dict[str, Tensor]:
    """UnCLIP: text, and CLIP's view of a picture ++ features of the noise on it; zeros to go away from."""
    import torch

    from sumuk.nets.layers import timestep_embedding

    width = given.shape.adm_in_channels // 2
    if given.negative:
        return _context(given) | {"y": torch.zeros(1, 2 * width)}
    if given.image is None:
        raise BadInput("an unCLIP model draws after a picture; give one")
    if given.image.shape != (1, width):
        raise BadInput(f"CLIP's view of a picture has the shape {tuple(given.image.shape)}, not {(1, width)}")
    level = timestep_embedding(torch.tensor([given.noise_level], device=given.image.device), width)
    return _context(given) | {"y": torch.cat((given.image.float(), level), dim=1)}


def noised_view(
    view: Tensor, level: int, noise: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0
) -> Tensor:
    """CLIP's view of a picture as unCLIP takes it: with noise, to vary what is drawn.

    Args:
        view: of CLIP's image tower, projected, [1, P].
        level: how much noise, a step 0..999 of the cosine schedule.
        noise: standard normal, [1, P].
        mean, std: of CLIP's views over pictures, [1, P], as noise is laid on normalised ones. Tower L's lie beside
            the published weights (``image_normalizer/`` in a diffusers folder), H's are 0 and 1.
    """
    at = cosine().level(level)
    return (at.alpha * (view - mean) / std + at.sigma * noise) * std + mean


def _noised_view(view: Tensor, level: int, noise: Tensor, statistics: Any) -> Tensor:
    if statistics is None:
        return noised_view(view, level, noise)
    return noised_view(view, level, noise, statistics.mean.float(), statistics.std.float())


def _x4_folder(facts: Facts) -> dict[str, dict[str, Any]]:
    index = {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    said = folder("StableDiffusionUpscalePipeline", index | ABSENT, facts)
    betas = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    said["scheduler/scheduler_config.json"] |= betas
    said["low_res_scheduler/scheduler_config.json"] = {"_class_name": "DDPMScheduler", **betas}
    return said


def _unclip_folder(facts: Facts) -> dict[str, dict[str, Any]]:
    index = {
        "feature_extractor": [None, None],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_normalizer": ["diffusers", "StableUnCLIPImageNormalizer"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    }
    said = folder("StableUnCLIPImg2ImgPipeline", index, facts)
    said["image_noising_scheduler/scheduler_config.json"] = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 1000,
    }
    return said


ABSENT = {"feature_extractor": [None, None], "safety_checker": [None, None]}
UNSAFE = ABSENT | {"image_encoder": [None, None], "requires_safety_checker": False}

TEXT_TO_IMAGE = Family(
    name="sd2",
    variant="text-to-image",
    title="Stable Diffusion 2.x",
    architecture="stable-diffusion-v2-768-v",
    arrangements=USUAL,
    recognise=partial(_recognise, (0, 0), ""),
    latent=Latent(channels=4, stride=8, scale=0.18215),
    schedule=scaled_linear,
    prediction="v",
    # Of a whole tower; one that ends where it is read has no projection, see openclip.layer_read.
    readings=(Reading(part="text", pad=0, layer=layer_read),),
    condition=_context,
    guidance="classifier-free",
    defaults=Defaults(size=768, steps=25, guidance=7.5),
    licence="CreativeML-OpenRAIL++-M",
    folder=partial(folder, "StableDiffusionPipeline", UNSAFE),
)
INPAINTING = replace(
    TEXT_TO_IMAGE,
    variant="inpainting",
    title="Stable Diffusion 2.x inpainting",
    architecture="stable-diffusion-v2-inpainting",
    recognise=partial(_recognise, (1, 1), ""),
    beside=("mask", "masked"),
    prediction="eps",
    defaults=Defaults(size=512, steps=25, guidance=7.5),
    folder=partial(folder, "StableDiffusionInpaintPipeline", UNSAFE),
)
DEPTH = replace(
    INPAINTING,
    variant="depth",
    title="Stable Diffusion 2.x depth",
    architecture="stable-diffusion-v2-depth",
    # MiDaS, which makes depth maps of pictures, lies in these files. It is not read: depth maps are given.
    arrangements=_with(USUAL, "depth_model.*"),
    recognise=partial(_recognise, (0, 1), ""),
    beside=("depth",),
    takes=("hint",),
    folder=partial(
        folder,
        "StableDiffusionDepth2ImgPipeline",
        {"depth_estimator": [None, None], "feature_extractor": [None, None]},
    ),
)
X4_UPSCALER = replace(
    TEXT_TO_IMAGE,
    variant="x4-upscaler",
    title="Stable Diffusion x4 upscaler",
    architecture="stable-diffusion-v2-x4-upscaler",
    # Its low_scale_model holds the tables of the noise that is laid on the small picture: this schedule's.
    arrangements=_with(_arrangements(X4_UNET), "low_scale_model.*"),
    recognise=partial(_recognise, (0, 3), "class"),
    latent=Latent(channels=4, stride=4, scale=0.08333),
    schedule=partial(scaled_linear, start=0.0001, end=0.02),
    condition=_noised_picture,
    beside=("low",),
    takes=("noise_level",),
    level=20,
    defaults=Defaults(size=512, steps=25, guidance=9.0),
    folder=_x4_folder,
)
UNCLIP_L = replace(
    TEXT_TO_IMAGE,
    variant="unclip-l",
    title="Stable Diffusion 2.1 unCLIP, told by CLIP L",
    architecture="stable-diffusion-v2-unclip-l",
    # The single files hold CLIP's image tower and the tables of its noise too; those are not read, the folder's are.
    arrangements=_with(_arrangements(LINEAR_UNET, views=True), "embedder.*", "noise_augmentor.*"),
    recognise=partial(_recognise, (0, 0), "l"),
    condition=_view,
    view=_noised_view,
    takes=("like", "noise_level"),
    defaults=Defaults(size=768, steps=25, guidance=10.0),
    folder=_unclip_folder,
)
UNCLIP_H = replace(
    UNCLIP_L,
    variant="unclip-h",
    title="Stable Diffusion 2.1 unCLIP, told by CLIP H",
    architecture="stable-diffusion-v2-unclip-h",
    recognise=partial(_recognise, (0, 0), "h"),
)

FAMILIES.add("sd2/text-to-image", TEXT_TO_IMAGE, "sd2")
FAMILIES.add("sd2/inpainting", INPAINTING)
FAMILIES.add("sd2/depth", DEPTH)
FAMILIES.add("sd2/x4-upscaler", X4_UPSCALER)
FAMILIES.add("sd2/unclip-l", UNCLIP_L)
FAMILIES.add("sd2/unclip-h", UNCLIP_H)
