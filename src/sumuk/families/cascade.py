"""Stable Cascade (Pernias et al. 2023, Würstchen; Stability AI 2024): a picture in two diffusions and a decoder.

Stage C draws a latent of 42.67 pixels a cell from text and pictures, stage B from that one a latent of 4 pixels a cell,
and stage A, a vector-quantised autoencoder, makes pixels of it::

    text, pictures -> stage C -> [16, H/42.67, W/42.67] -> stage B -> [4, H/4, W/4] -> stage A -> pixels

Each is a file of its own. The family that draws is stage C's; stage B is a diffusion of its own with its own noise,
steps and inputs, and a part of it (``decoder``). The EfficientNet encoder makes stage C's latent of a picture, the
previewer a small picture of that latent.

Both stages predict noise of a cosine process. Stage C's walk is shifted by 2 towards noise.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.base.errors import BadInput
from sumuk.diffusion.cosine import ContinuousCosine
from sumuk.families.cascade_parts import (
    DECODER,
    EFFNET,
    IMAGE,
    PREVIEWER,
    PRIOR,
    STAGE_A,
    STAGE_A_SCALE,
    TEXT,
)
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Kind, Latent, Part, Shapes
from sumuk.families.reading import Given, Reading
from sumuk.families.sd import POSITIONS
from sumuk.files.layout import alias, ignore, transpose

if TYPE_CHECKING:
    from torch import Tensor

CELL = 42.67
"""Pixels a side of one cell of stage C's latent: 24 cells for 1024 pixels."""

LICENCE = "stable-cascade-nc-community"

# -- arrangements --------------------------------------------------------------------------------------------------

G = "text_encoder.clip_g."
COMFY_EXTRAS = (
    alias(transpose(f"{G}text_projection", "text.text_projection.weight")),  # as older versions saved it
    ignore(f"{G}logit_scale"),
    *(ignore(f"{G}transformer.{name}") for name in POSITIONS),
    ignore("clip_l_vision.vision_model.embeddings.position_ids"),
)
SINGLE_C = Arrangement(
    name="single",
    title="single file (ComfyUI)",
    dialect="original",
    parts=(
        (PRIOR, "model.diffusion_model."),
        (TEXT, f"{G}transformer."),
        (IMAGE, "clip_l_vision."),
        (EFFNET, "vae.encoder."),
        (PREVIEWER, "vae.previewer."),
        # ComfyUI keeps these two in a file of their own, so their places here are Sumuk's.
        (DECODER, "stage_b."),
        (STAGE_A, "stage_a."),
    ),
    ignored=COMFY_EXTRAS,
)
SINGLE_B = replace(
    SINGLE_C,
    parts=((DECODER, "model.diffusion_model."), (TEXT, f"{G}transformer."), (STAGE_A, "vae.")),
)
SMALL = tuple(ignore(f"{name}_lite/*") for name in ("prior", "decoder"))
"""The 1B and 700M networks beside the large ones in the published folders."""

FOLDER_TEXT = tuple(ignore(f"text_encoder/{name}") for name in POSITIONS)
DIFFUSERS_C = Arrangement(
    name="diffusers",
    title="diffusers folder",
    dialect="diffusers",
    parts=(
        (PRIOR, "prior/"),
        (TEXT, "text_encoder/"),
        (IMAGE, "image_encoder/"),
        (DECODER, "decoder/"),  # of the second published folder, for those who lay both together
        (STAGE_A, "vqgan/"),
        (EFFNET, "effnet/"),  # Sumuk's own places: nobody publishes these two in folders
        (PREVIEWER, "previewer/"),
    ),
    ignored=(*SMALL, *FOLDER_TEXT, ignore("image_encoder/vision_model.embeddings.position_ids")),
)
DIFFUSERS_B = replace(
    DIFFUSERS_C,
    parts=((DECODER, "decoder/"), (TEXT, "text_encoder/"), (STAGE_A, "vqgan/")),
    ignored=(*SMALL, *FOLDER_TEXT),
)


def _alone(part: Part) -> Arrangement:
    title = "single network, original names without prefix"
    return Arrangement(name="bare", title=title, dialect="original", parts=((part, ""),))


def _alone_diffusers(part: Part) -> Arrangement:
    title = "single network, diffusers names"
    return Arrangement(name="bare-diffusers", title=title, dialect="diffusers", parts=((part, ""),))


# -- what they are -------------------------------------------------------------------------------------------------


def _recognise_c(shapes: Shapes) -> str | None:
    for name in (PRIOR.key, "clip_img_mapper.weight", "clf.1.weight", "down_blocks.0.0.depthwise.weight"):
        if f"denoiser.{name}" not in shapes:
            return f"there is no {name!r} of Cascade's stage C"
    return _read_alike("stage C", shapes[f"denoiser.{PRIOR.key}"][-1:], shapes)


def _recognise_b(shapes: Shapes) -> str | None:
    for name in (DECODER.key, "effnet_mapper.0.weight", "clf.1.weight", "down_blocks.0.0.depthwise.weight"):
        if f"decoder.{name}" not in shapes:
            return f"there is no {name!r} of Cascade's stage B"
    return _read_alike("stage B", shapes[f"decoder.{DECODER.key}"][-1:], shapes)


def _read_alike(stage: str, reads: tuple[int, ...], shapes: Shapes) -> str | None:
    writes = shapes.get("text.text_projection.weight", reads)[:1]
    return None if writes == reads else f"{stage} reads text of width {reads}, its text tower writes {writes}"


def _recognise_part(part: Part, names: tuple[str, ...], shapes: Shapes) -> str | None:
    missing = next((name for name in (part.key, *names) if f"{part.name}.{name}" not in shapes), None)
    return f"there is no {missing!r} of Cascade's {part.title}" if missing else None


def _pooled(given: Given) -> Tensor:
    pooled = given.texts["text"].pooled
    if pooled is None:
        raise BadInput("Cascade needs the text tower's projected sentence, and this tower has no projection")
    return pooled[:, None]


def _condition_c(given: Given) -> dict[str, Tensor]:
    import torch

    said = given.texts["text"].z
    image = given.image
    if image is None:
        image = torch.zeros(1, 1, given.shape.image_width, dtype=said.dtype, device=said.device)
    image = image[:, None] if image.ndim == 2 else image
    if given.negative:
        image = torch.zeros_like(image)
    return {"clip_text": said, "clip_text_pooled": _pooled(given), "clip_img": image}


def _condition_b(given: Given) -> dict[str, Tensor]:
    """Stage C's latent ``[1, 16, h, w]`` comes as ``given.coarse``; the side to go away from sees none of it."""
    import torch

    if given.coarse is None:
        raise BadInput("stage B draws from stage C's latent, and none was given")
    effnet = torch.zeros_like(given.coarse) if given.negative else given.coarse
    return {"effnet": effnet, "clip_text_pooled": _pooled(given)}


def _folder(pipeline: str, parts: dict[str, list[str | None]], facts: Facts) -> dict[str, dict[str, Any]]:
    return {
        "model_index.json": {
            "_class_name": pipeline,
            "_diffusers_version": "0.30.0",
            "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            **parts,
        },
        # It knows no shift: a walk there is that of shift 1.
        "scheduler/scheduler_config.json": {
            "_class_name": "DDPMWuerstchenScheduler",
            "s": 0.008,
            "scaler": 1.0,
        },
    }


READING = Reading(part="text", norm=False, pool="projected", masked=True)

STAGE_C = Family(
    name="cascade",
    variant="stage-c",
    title="Stable Cascade",
    architecture="stable-cascade-v1-stage-c",
    arrangements=(SINGLE_C, DIFFUSERS_C, _alone(PRIOR), _alone_diffusers(PRIOR)),
    recognise=_recognise_c,
    latent=Latent(channels=16, stride=CELL, scale=1.0),
    schedule=partial(ContinuousCosine, 2.0),
    prediction="eps",
    readings=(READING,),
    condition=_condition_c,
    guidance="classifier-free",
    then="cascade/stage-b",
    takes=("like",),
    defaults=Defaults(size=1024, steps=20, guidance=4.0, solver="ddpm", grid="uniform"),
    licence=LICENCE,
    folder=partial(
        _folder,
        "StableCascadePriorPipeline",
        {
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "prior": ["diffusers", "StableCascadeUNet"],
        },
    ),
)
STAGE_B = replace(
    STAGE_C,
    variant="stage-b",
    title="Stable Cascade, stage B",
    architecture="stable-cascade-v1-stage-b",
    arrangements=(SINGLE_B, DIFFUSERS_B, _alone(DECODER), _alone_diffusers(DECODER)),
    recognise=_recognise_b,
    latent=Latent(channels=4, stride=4, scale=1 / STAGE_A_SCALE),
    schedule=ContinuousCosine,
    condition=_condition_b,
    then=None,
    takes=(),
    defaults=replace(STAGE_C.defaults, steps=10, guidance=1.1),
    folder=partial(
        _folder,
        "StableCascadeDecoderPipeline",
        {"decoder": ["diffusers", "StableCascadeUNet"], "vqgan": ["diffusers", "PaellaVQModel"]},
    ),
)


def _kind(part: Part, variant: str, *names: str, diffusers: bool = False) -> Kind:
    layouts = (_alone(part), _alone_diffusers(part)) if diffusers else (_alone(part),)
    return Kind(
        name="cascade",
        variant=variant,
        title=f"Stable Cascade, {part.title}",
        architecture=f"stable-cascade-v1-{variant}",
        arrangements=layouts,
        recognise=partial(_recognise_part, part, names),
        licence=LICENCE,
    )


KIND_A = _kind(STAGE_A, "stage-a", "in_block.1.weight", "out_block.0.weight", diffusers=True)
KIND_EFFNET = _kind(EFFNET, "effnet", "backbone.0.0.weight", "mapper.1.running_mean")
KIND_PREVIEWER = _kind(PREVIEWER, "previewer", "blocks.2.running_mean", "blocks.24.weight")

FAMILIES.add("cascade/stage-c", STAGE_C, "cascade")
for _family in (STAGE_B, KIND_A, KIND_EFFNET, KIND_PREVIEWER):
    FAMILIES.add(_family.key, _family)
