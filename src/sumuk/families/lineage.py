"""The lineage of diffusion models, from DDPM to FLUX.1: what people compare when they choose one.

Data and nothing else. Which of them Sumuk can draw with is asked of :data:`~sumuk.families.family.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sumuk.base.registry import Registry
from sumuk.families.family import FAMILIES, Family

LIMITS: Mapping[str, tuple[str, str]] = {
    "FLUX.1-dev-Non-Commercial": (
        "no", "the weights are not for commercial use; what may be done with pictures the licence says"
    ),
    "stable-cascade-nc-community": ("no", "for research, not for commercial use"),
    "Stability-AI-NC-Research": ("no", "for research, not for commercial use; Stability AI may have changed it since"),
    "CC-BY-NC-4.0": ("no", "not for commercial use"),
    "Stability-AI-Community": (
        "bounded", "free for commercial use below a yearly revenue of one million US dollars, else it takes a licence"
    ),
}  # fmt: skip
"""Licences that forbid or bound commercial use: which of both, and in plain words."""

EITHER = ("sd1", "sd2", "sdxl")
"""Families of which weights with the same names and shapes were published that predict noise (eps), and that predict
v. A file of theirs that does not say which cannot be known."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """One model or method of the lineage.

    Attributes:
        name: as one types it.
        title: in words.
        year: of its publication.
        by: who made it.
        family: key of the kind that its files are, empty if no file of it is known here.
        counts: numbers in the denoiser's tensors, tables included, of each published size.
        parameters: the same, rounded; empty for a method without weights.
        backbone: its network.
        text: what reads the prompt.
        resolution: pixels a side that it was trained for.
        prediction: what its network predicts.
        steps: usual number.
        licence: of its published weights.
        good: what it is good for.
        bad: what it is not good for.
        note: what else one should know.
    """

    name: str
    title: str
    year: int
    by: str
    family: str = ""
    counts: tuple[int, ...] = ()
    parameters: str = ""
    backbone: str
    text: str = "none"
    resolution: str
    prediction: str
    steps: str
    licence: str
    good: str
    bad: str
    note: str = ""

    @property
    def status(self) -> str:
        """What Sumuk does today: ``draws`` with it, knows its ``files``, or ``no``."""
        if self.family not in FAMILIES:
            return "no"
        return "draws" if isinstance(FAMILIES[self.family], Family) else "files"

    @property
    def commercial(self) -> str:
        """Whether its licence allows commercial use: ``yes``, ``no``, ``bounded``; empty for a method."""
        return LIMITS.get(self.licence, ("yes", ""))[0] if self.parameters else ""


LINEAGE: Registry[Known] = Registry("model")
"""All of it, roughly by age."""


def alike(family: str, count: int) -> Iterator[Known]:
    """The models whose files are of a kind and size; several where their tensors do not tell them apart."""
    every = (LINEAGE[name] for name in LINEAGE)
    return (known for known in every if known.family == family and count in known.counts)


def _add(name: str, *aliases: str, **facts: Any) -> None:
    LINEAGE.add(name, Known(name=name, **facts), *aliases)


LATENT_UNET, PIXEL_UNET = "U-Net on latents", "U-Net on pixels"
RAIL, RAILPP = "CreativeML-OpenRAIL-M", "CreativeML-OpenRAIL++-M"
STABILITY, RESEARCH, FLUX_NC = (
    "Stability-AI-Community",
    "Stability-AI-NC-Research",
    "FLUX.1-dev-Non-Commercial",
)
BY_NAME = "Its tensors are those of {}: a file is known by its name or its metadata."

# -- before latents ------------------------------------------------------------------------------------------------

_add(
    "ddpm",
    title="DDPM", year=2020, by="Ho, Jain, Abbeel", family="ddpm/cifar10", counts=(35_746_307,),
    parameters="36M to 114M", backbone=PIXEL_UNET, resolution="32 to 256", prediction="eps", steps="1000",
    licence="Apache-2.0",
    good="learning how diffusion works; small pictures of one kind",
    bad="prompts; anything but the one kind of picture that it saw",
    note="35.7M for CIFAR-10, 78.7M for CelebA, 114M for LSUN and CelebA-HQ; drawn with DDIM, in 50 steps.",
)  # fmt: skip
_add(
    "ddim",
    title="DDIM", year=2020, by="Song, Meng, Ermon", family="ddpm/pixel", backbone="that of the model it walks",
    resolution="any", prediction="any", steps="10-100", licence="a method, without weights",
    good="the same models in a twentieth of the steps; the same picture from the same noise",
    bad="the variety that fresh noise at every step brings",
    note="A solver: sumuk generate --solver ddim, with any model.",
)  # fmt: skip
_add(
    "score-sde", "ncsn++",
    title="Score SDE (NCSN++, DDPM++)", year=2020, by="Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole",
    parameters="several", backbone=PIXEL_UNET, resolution="32 to 1024", prediction="score", steps="1000+",
    licence="Apache-2.0",
    good="the theory: one equation behind DDPM (VP) and noise-conditional scores (VE)",
    bad="prompts; speed",
)  # fmt: skip
_add(
    "ldm", "latent-diffusion",
    title="Latent diffusion", year=2021, by="Rombach, Blattmann, Lorenz, Esser, Ommer",
    parameters="400M to 1.45B", backbone=LATENT_UNET, text="BERT-like", resolution="256", prediction="eps",
    steps="50-200", licence="MIT",
    good="the step that made large pictures affordable: diffusion in an autoencoder's latents",
    bad="prompts of several things; its successors are better throughout",
    note="The larger number counts the text tower, which was trained along.",
)  # fmt: skip

# -- Stable Diffusion 1 --------------------------------------------------------------------------------------------

SD1: dict[str, Any] = {
    "year": 2022, "by": "CompVis, Runway, Stability AI", "family": "sd1/text-to-image", "counts": (859_520_964,),
    "parameters": "860M", "backbone": LATENT_UNET, "text": "CLIP L", "resolution": "512", "prediction": "eps",
    "steps": "20-50", "licence": RAIL,
}  # fmt: skip
EARLY = "pictures: later versions went on from it"
_add("sd-1.1", **SD1, title="Stable Diffusion 1.1", good="comparing with the later ones", bad=EARLY)
_add("sd-1.2", **SD1, title="Stable Diffusion 1.2", good="comparing with the later ones", bad=EARLY)
_add("sd-1.3", **SD1, title="Stable Diffusion 1.3", good="comparing with the later ones", bad=EARLY)
_add(
    "sd-1.4", **SD1,
    title="Stable Diffusion 1.4", good="results of papers that used it", bad="new work: 1.5 was trained longer",
)  # fmt: skip
_add(
    "sd-1.5", **SD1,
    title="Stable Diffusion 1.5", good="small machines; the most LoRAs, ControlNets and fine-tuned models of all",
    bad="hands, text in pictures, long prompts, more than 768 pixels without a second pass",
)  # fmt: skip
_add(
    "sd-1.5-inpainting", "sd-inpainting",
    **SD1 | {
        "title": "Stable Diffusion 1.5 inpainting", "by": "Runway", "family": "sd1/inpainting",
        "counts": (859_535_364,),
    },
    good="filling a hole so that it fits its surroundings", bad="pictures from text alone",
)  # fmt: skip
_add(
    "instruct-pix2pix", "pix2pix",
    **SD1 | {
        "title": "InstructPix2Pix", "by": "Brooks, Holynski, Efros", "family": "sd1/instruct-pix2pix",
        "counts": (859_532_484,), "licence": "that of Stable Diffusion 1.5, from which it was trained",
    },
    good="changing a picture by an order: 'make it winter'", bad="moving or counting things, other shapes",
)  # fmt: skip

# -- Stable Diffusion 2 --------------------------------------------------------------------------------------------

SD2: dict[str, Any] = {
    "year": 2022, "by": "Stability AI", "family": "sd2/text-to-image", "counts": (865_910_724,), "parameters": "866M",
    "backbone": LATENT_UNET, "text": "OpenCLIP H", "resolution": "768", "prediction": "v", "steps": "20-50",
    "licence": RAILPP,
}  # fmt: skip
SAME2 = "The text-to-image models of version 2 have the same tensors: whether it predicts eps or v a file must say."
BASE2: dict[str, Any] = {"resolution": "512", "prediction": "eps"}
_add(
    "sd-2.0", **SD2, title="Stable Diffusion 2.0", note=SAME2,
    good="768 pixels on a small machine", bad="people and styles that its training data left out",
)  # fmt: skip
_add(
    "sd-2.0-base", **SD2 | BASE2, title="Stable Diffusion 2.0 base", note=SAME2,
    good="a start for fine-tuning at 512 pixels", bad="people and styles that its training data left out",
)  # fmt: skip
_add(
    "sd-2.1", **SD2, title="Stable Diffusion 2.1", note=SAME2,
    good="768 pixels on a small machine; landscapes", bad="the many LoRAs made for 1.5",
)  # fmt: skip
_add(
    "sd-2.1-base", **SD2 | BASE2, title="Stable Diffusion 2.1 base", note=SAME2,
    good="a start for fine-tuning at 512 pixels", bad="the many LoRAs made for 1.5",
)  # fmt: skip
_add(
    "sd-2-inpainting", **SD2 | BASE2 | {"family": "sd2/inpainting", "counts": (865_925_124,)},
    title="Stable Diffusion 2 inpainting",
    good="filling a hole so that it fits its surroundings", bad="pictures from text alone",
)  # fmt: skip
_add(
    "sd-2-depth", **SD2 | BASE2 | {"family": "sd2/depth", "counts": (865_913_604,)},
    title="Stable Diffusion 2 depth",
    good="another picture of the same space, from a depth map", bad="pictures without a depth map",
)  # fmt: skip
_add(
    "sd-x4-upscaler", "x4-upscaler",
    **SD2 | {
        "family": "sd2/x4-upscaler", "counts": (473_398_020,), "parameters": "473M", "resolution": "128 to 512",
    },
    title="Stable Diffusion x4 upscaler",
    good="four times the pixels a side, with detail made up to a prompt", bad="faithful enlargement; speed",
)  # fmt: skip
_add(
    "sd-2.1-unclip", "unclip",
    **SD2 | {"year": 2023, "family": "sd2/unclip-h", "counts": (870_173_124,), "parameters": "870M"},
    title="Stable Diffusion 2.1 unCLIP",
    good="variations of a picture", bad="keeping its details",
    note="Also told by the picture through CLIP H; a second version by CLIP L (sd2/unclip-l).",
)  # fmt: skip
_add(
    "sd-turbo", **SD2 | BASE2 | {"year": 2023, "steps": "1-4", "licence": RESEARCH}, title="SD Turbo",
    good="a picture in one step", bad="guidance and negative prompts, which it does not follow",
    note=BY_NAME.format("Stable Diffusion 2.1"),
)  # fmt: skip

# -- SDXL ----------------------------------------------------------------------------------------------------------

SDXL: dict[str, Any] = {
    "year": 2023, "by": "Stability AI", "family": "sdxl/base", "counts": (2_567_463_684,), "parameters": "2.57B",
    "backbone": LATENT_UNET, "text": "CLIP L, bigG", "resolution": "1024", "prediction": "eps", "steps": "20-50",
    "licence": RAILPP,
}  # fmt: skip
_add(
    "sdxl", "sdxl-base", **SDXL, title="SDXL 1.0 base",
    good="1024 pixels on a common graphics card; the widest choice of styles and fine-tuned models",
    bad="text in pictures, long prompts, 512 pixels",
)  # fmt: skip
_add(
    "sdxl-refiner",
    **SDXL | {
        "family": "sdxl/refiner", "counts": (2_259_526_660,), "parameters": "2.26B", "text": "bigG", "steps": "5-10",
    },
    title="SDXL 1.0 refiner",
    good="the last steps of a picture that SDXL began", bad="whole pictures; fine-tuned models seldom need it",
)  # fmt: skip
_add(
    "sdxl-inpainting", **SDXL | {"by": "diffusers", "family": "sdxl/inpainting", "counts": (2_567_478_084,)},
    title="SDXL inpainting 0.1",
    good="filling a hole at 1024 pixels", bad="pictures from text alone; a strength of 1",
)  # fmt: skip
_add(
    "sdxl-turbo", **SDXL | {"resolution": "512", "steps": "1-4", "licence": RESEARCH}, title="SDXL Turbo",
    good="pictures while one types", bad="1024 pixels, guidance, negative prompts", note=BY_NAME.format("SDXL"),
)  # fmt: skip
_add(
    "sdxl-lightning", **SDXL | {"year": 2024, "by": "ByteDance", "steps": "2, 4, 8"}, title="SDXL Lightning",
    good="1024 pixels in few steps", bad="guidance; another number of steps than the file was made for",
    note=BY_NAME.format("SDXL") + " Also published as LoRAs.",
)  # fmt: skip
_add(
    "lcm", "lcm-sdxl",
    **SDXL | {"by": "Luo, Tan, Huang, Li, Zhao", "family": "", "counts": (), "steps": "2-8"},
    title="Latent consistency models (LCM)",
    good="few steps; as a LoRA over any model of its family", bad="fine detail; strong guidance",
    note="The LoRAs are LoRAs like others (lora/sd1, lora/sdxl). The whole models' U-Nets take the guidance scale as "
    "one more input (time_embedding.cond_proj), which is not known here.",
)  # fmt: skip

# -- beside them ---------------------------------------------------------------------------------------------------

_add(
    "dit", "dit-xl-2",
    title="DiT XL/2", year=2022, by="Peebles, Xie", family="dit/class-conditional",
    counts=(675_129_632, 676_014_368), parameters="675M", backbone="transformer on latents", text="none",
    resolution="256, 512", prediction="eps", steps="50-250", licence="CC-BY-NC-4.0",
    good="the 1000 classes of ImageNet; the step to transformers", bad="prompts: it is told a class",
)  # fmt: skip
_add(
    "controlnet",
    title="ControlNet", year=2023, by="Zhang, Rao, Agrawala", family="controlnet/sd15", counts=(361_279_120,),
    parameters="361M to 1.25B", backbone="copy of a U-Net's first half", text="the model's",
    resolution="the model's", prediction="none", steps="any", licence=RAIL,
    good="following edges, depth, pose, scribbles", bad="models of another family than it was trained for",
    note="361M for SD 1.5, 364M for SD 2.1, 1.25B for SDXL. Also for SD 3, FLUX.1 and Cascade.",
)  # fmt: skip
_add(
    "cascade", "stable-cascade", "wuerstchen",
    title="Stable Cascade", year=2024, by="Pernias, Rampas, Richter, Pal, Aubreville; Stability AI",
    family="cascade/stage-c", counts=(3_589_103_632, 1_030_785_040), parameters="1.03B or 3.59B",
    backbone="two diffusions on latents, of convolutions and attention", text="bigG", resolution="1024",
    prediction="eps", steps="20 + 10", licence="stable-cascade-nc-community",
    good="cheap steps and training, on latents of 24 by 24; some text in pictures",
    bad="commercial use; few adapters",
    note="These are stage C's. Stage B has 1.56B or 699M, stage A (the autoencoder) 18.4M. Pictures may be part of the "
    "prompt, through CLIP L.",
)  # fmt: skip

# -- flows ---------------------------------------------------------------------------------------------------------

SD3: dict[str, Any] = {
    "year": 2024, "by": "Stability AI", "backbone": "MMDiT, a transformer of two streams",
    "text": "CLIP L, bigG, T5", "resolution": "1024", "prediction": "flow", "licence": STABILITY,
}  # fmt: skip
LARGE: dict[str, Any] = {"family": "sd3/3.5-large", "counts": (8_146_280_768,), "parameters": "8.06B"}
_add(
    "sd-3-medium", "sd3-medium", **SD3, title="Stable Diffusion 3 medium", family="sd3/medium",
    counts=(2_084_951_104,), parameters="2.03B", steps="28",
    good="text in pictures, prompts of several things", bad="people lying down; few adapters",
)  # fmt: skip
_add(
    "sd-3.5-large", **SD3, **LARGE, title="Stable Diffusion 3.5 large", steps="28-40",
    good="variety of styles, long prompts, fine-tuning", bad="small machines",
)  # fmt: skip
_add(
    "sd-3.5-large-turbo", **SD3, **LARGE, title="Stable Diffusion 3.5 large turbo", steps="4",
    good="the same in four steps", bad="guidance, fine-tuning", note=BY_NAME.format("3.5 large"),
)  # fmt: skip
_add(
    "sd-3.5-medium", **SD3, title="Stable Diffusion 3.5 medium", family="sd3/3.5-medium",
    counts=(2_469_663_936,), parameters="2.24B", steps="40",
    good="text in pictures on a common graphics card; 256 to 1440 pixels", bad="fine anatomy; few adapters",
)  # fmt: skip
FLUX: dict[str, Any] = {
    "year": 2024, "by": "Black Forest Labs", "family": "flux/dev", "counts": (11_901_408_320,),
    "parameters": "11.9B", "backbone": "transformer, of two streams and then one", "text": "CLIP L, T5",
    "resolution": "1024", "prediction": "flow", "steps": "28-50", "licence": FLUX_NC,
}  # fmt: skip
_add(
    "flux-dev", "flux", "flux.1-dev", **FLUX, title="FLUX.1 [dev]",
    good="prompts, hands, text in pictures, up to two megapixels; many LoRAs",
    bad="commercial use of the weights; small machines; true negative prompts",
)  # fmt: skip
_add(
    "flux-schnell", "flux.1-schnell",
    **FLUX | {"family": "flux/schnell", "counts": (11_891_178_560,), "steps": "1-4", "licence": "Apache-2.0"},
    title="FLUX.1 [schnell]",
    good="a picture in four steps, under a free licence", bad="guidance, fine-tuning; small machines",
)  # fmt: skip
_add(
    "flux-fill", **FLUX | {"family": "flux/fill", "counts": (11_902_391_360,)}, title="FLUX.1 Fill [dev]",
    good="filling holes, and going on beyond the edge", bad="pictures from text alone",
)  # fmt: skip
_add(
    "flux-control", "flux-canny", "flux-depth",
    **FLUX | {"family": "flux/control", "counts": (11_901_604_928,)}, title="FLUX.1 Canny and Depth [dev]",
    good="following edges or a depth map closely", bad="pictures from text alone",
    note="Canny's and Depth's tensors look alike: a file is known by its name or its metadata.",
)  # fmt: skip
_add(
    "flux-krea", **FLUX | {"year": 2025}, title="FLUX.1 Krea [dev]",
    good="pictures that look less like a machine's", bad="commercial use of the weights",
    note=BY_NAME.format("FLUX.1 [dev]"),
)  # fmt: skip
_add(
    "flux-kontext", **FLUX | {"year": 2025}, title="FLUX.1 Kontext [dev]",
    good="changing a picture by an order, keeping who is in it", bad="commercial use of the weights",
    note=BY_NAME.format("FLUX.1 [dev]") + " Here it draws from text as dev does; the picture to change, which it takes "
    "as further tokens, cannot be given to it yet.",
)  # fmt: skip
