"""SDXL (Podell et al. 2023): a larger U-Net, told by two text towers and by the sizes of the picture it imitates.

    context = hidden state before CLIP L's last  ++  the same of OpenCLIP's bigG       [1, n, 768 + 1280]
    y       = bigG's projected sentence  ++  256 features of each of six numbers       [1, 1280 + 1536]

The six are height and width before cropping, rows and columns cut away, height and width wanted. The refiner has bigG
alone, and five numbers: an aesthetic score instead of the last two.

Turbo, Lightning and Hyper models have the same names and shapes; nothing here tells them. CosXL and Playground 2.5
have another noise (``edm_vpred.*``; ``edm_mean``, ``edm_std``): those tensors are not known here, so they are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import scaled_linear
from sumuk.families.diffusers import clip_rules
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Latent, Part, Shapes
from sumuk.families.linear_unet import (
    arrangements,
    beside,
    folder,
    linear_unet_config,
    read_header,
    vector_unet_rules,
)
from sumuk.families.openclip import EXTRAS, OPENCLIP_G, PROJECTION, openclip_rules
from sumuk.families.reading import Encoded, Given, Reading
from sumuk.families.sd import CLIP, POSITIONS, VAE
from sumuk.families.sd2 import LINEAR_UNET
from sumuk.files.layout import Rule

if TYPE_CHECKING:
    from torch import Tensor

FEATURES = 256
"""Features of one of the numbers that tell about the picture."""

AESTHETIC, NOT_AESTHETIC = 6.0, 2.5
"""The score that the refiner is told of what is wanted and of what is not."""


def _config(shapes: Shapes) -> dict[str, Any]:
    return linear_unet_config(shapes) | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": FEATURES,
        "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
    }


def _large_rules(names: Collection[str]) -> list[Rule]:
    """Rules of bigG, whose names are CLIP L's at transformers': a tower by itself is the one that projects."""
    return openclip_rules(names) if {PROJECTION, f"{PROJECTION}.weight"} & set(names) else []


def _small_rules(names: Collection[str]) -> list[Rule]:
    """Rules of CLIP L, which does not."""
    return [] if f"{PROJECTION}.weight" in names else clip_rules(names)


UNET = replace(
    LINEAR_UNET,
    diffusers=partial(vector_unet_rules, "add_embedding"),
    supplier="any SDXL checkpoint, or unet/ of its diffusers folder",
    config=_config,
)
VAE_XL = replace(
    VAE, supplier="any SDXL checkpoint, a stand-alone VAE of SDXL, or vae/ of its diffusers folder"
)
CLIP_L = replace(
    CLIP, diffusers=_small_rules, supplier="any SDXL checkpoint, or text_encoder/ of its diffusers folder"
)
CLIP_G = replace(OPENCLIP_G, diffusers=_large_rules)


def _arrangements(*towers: tuple[Part, str, str], single: Sequence[str]) -> tuple[Arrangement, ...]:
    positions = (f"{place}{name}" for _, _, place in towers for name in POSITIONS)
    networks = ((UNET, "model.diffusion_model.", "unet/"), (VAE_XL, "first_stage_model.", "vae/"), *towers)
    return arrangements(networks, ("denoiser.sigmas", *single), tuple(positions))


BASE_ARRANGEMENTS = _arrangements(
    (CLIP_L, "conditioner.embedders.0.transformer.", "text_encoder/"),
    (CLIP_G, "conditioner.embedders.1.model.", "text_encoder_2/"),
    single=(
        *(f"conditioner.embedders.1.model.{name}" for name in EXTRAS),
        *(f"conditioner.embedders.0.transformer.{name}" for name in POSITIONS),
        # What some tools leave of CLIP L's projection, which SDXL does not read.
        "conditioner.embedders.0.logit_scale",
        "conditioner.embedders.0.text_projection.weight",
    ),
)
REFINER_ARRANGEMENTS = _arrangements(
    (CLIP_G, "conditioner.embedders.0.model.", "text_encoder_2/"),
    single=tuple(f"conditioner.embedders.0.model.{name}" for name in EXTRAS),
)


def _recognise(
    channels: tuple[int, int], towers: tuple[str, ...], numbers: int, shapes: Shapes
) -> str | None:
    """Whether native names and shapes are SDXL.

    Args:
        channels: how many latents, and how many channels more, lie beside the latent.
        towers: the parts that read the prompt.
        numbers: how many numbers tell about the picture.
        shapes: what is there.
    """
    header = read_header(shapes)
    if isinstance(header, str):
        return header
    if header.vector <= numbers * FEATURES or header.shallow:
        return "the U-Net takes no sentence and sizes (label_emb), or attends in its first level: not SDXL"
    # The refiner's vector is as long as its text is wide, and it does not attend in its last level.
    refines = not header.deep and header.vector == header.context + 5 * FEATURES
    if refines != (len(towers) == 1):
        return f"the U-Net is {'the' if refines else 'no'} SDXL refiner's"
    if (reason := beside(header, *channels)) is not None:
        return reason
    keys = {"text": f"text.{CLIP_L.key}", "text_2": f"text_2.{CLIP_G.key}"}
    widths = [shapes[keys[part]][-1:] for part in towers if keys[part] in shapes]
    if len(widths) == len(towers) and sum(sum(width) for width in widths) != header.context:
        return f"the U-Net reads text of width {header.context}, its text towers write {[list(w) for w in widths]}"
    sentence = shapes.get(f"text_2.{PROJECTION}", (header.vector - numbers * FEATURES,))[-1:]
    if sentence != (header.vector - numbers * FEATURES,):
        return f"the U-Net takes a vector of {header.vector}, its text tower projects to {list(sentence)}"
    return None


def vector(sentence: Tensor | None, numbers: Sequence[float]) -> Tensor:
    """What is added to the time: the sentence [1, P] and features of each number, [1, P + 256 n] in float32."""
    import torch

    from sumuk.nets.layers import timestep_embedding

    if sentence is None:
        raise BadInput(f"SDXL's second text tower lacks {PROJECTION!r}, without which it says no sentence")
    features = timestep_embedding(torch.tensor(numbers, device=sentence.device), FEATURES)
    return torch.cat((sentence.float(), features.reshape(1, -1)), dim=1)


def _base(given: Given) -> dict[str, Tensor]:
    import torch

    small, large = given.texts["text"], given.texts["text_2"]
    sizes = given.sizes
    numbers = (*sizes.original, *sizes.crop, *sizes.target)
    if given.negative and given.empty:
        # As it was trained to be drawn without words: with zeros, not with what the towers make of none.
        assert large.pooled is not None
        small, large = (
            Encoded(
                z=torch.zeros_like(each.z),
                pooled=None if each.pooled is None else torch.zeros_like(each.pooled),
            )
            for each in (small, large)
        )
    return {"context": torch.cat((small.z, large.z), dim=-1), "y": vector(large.pooled, numbers)}


def _refiner(given: Given) -> dict[str, Tensor]:
    text, sizes = given.texts["text_2"], given.sizes
    score = NOT_AESTHETIC if given.negative else AESTHETIC
    return {"context": text.z, "y": vector(text.pooled, (*sizes.original, *sizes.crop, score))}


def _folder(pipeline: str, index: dict[str, Any], facts: Facts) -> dict[str, dict[str, Any]]:
    second = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    said = folder(pipeline, second | index, facts)
    said["vae/config.json"]["force_upcast"] = True  # it overflows in float16
    return said


BASE = Family(
    name="sdxl",
    variant="base",
    title="SDXL",
    architecture="stable-diffusion-xl-v1-base",
    arrangements=BASE_ARRANGEMENTS,
    recognise=partial(_recognise, (0, 0), ("text", "text_2"), 6),
    latent=Latent(channels=4, stride=8, scale=0.13025),
    schedule=scaled_linear,
    prediction="eps",
    readings=(
        Reading(part="text", layer=2, norm=False),
        Reading(part="text_2", pad=0, layer=2, norm=False, pool="projected"),
    ),
    condition=_base,
    guidance="classifier-free",
    takes=("sizes",),
    defaults=Defaults(size=1024, steps=30, guidance=5.0),
    licence="CreativeML-OpenRAIL++-M",
    folder=partial(_folder, "StableDiffusionXLPipeline", {"force_zeros_for_empty_prompt": True}),
)
REFINER = replace(
    BASE,
    variant="refiner",
    title="SDXL refiner",
    architecture="stable-diffusion-xl-v1-refiner",
    arrangements=REFINER_ARRANGEMENTS,
    recognise=partial(_recognise, (0, 0), ("text_2",), 5),
    readings=BASE.readings[1:],
    condition=_refiner,
    folder=partial(
        _folder,
        "StableDiffusionXLImg2ImgPipeline",
        {
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        },
    ),
)
INPAINTING = replace(
    BASE,
    variant="inpainting",
    title="SDXL inpainting",
    architecture="stable-diffusion-xl-v1-inpainting",
    recognise=partial(_recognise, (1, 1), ("text", "text_2"), 6),
    beside=("mask", "masked"),
    folder=partial(
        _folder,
        "StableDiffusionXLInpaintPipeline",
        {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False},
    ),
)

FAMILIES.add("sdxl/base", BASE, "sdxl")
FAMILIES.add("sdxl/refiner", REFINER)
FAMILIES.add("sdxl/inpainting", INPAINTING)
