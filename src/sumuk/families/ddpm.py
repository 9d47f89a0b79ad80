"""DDPM (Ho et al. 2020): a U-Net that draws pixels out of noise, told nothing but the time.

The variants are the shapes that were published (CIFAR-10, CelebA, LSUN) and any other; they differ in nothing but the
usual size of a picture, which no tensor shows. What was published is ancestral sampling in 1000 steps; the default is
DDIM in 50, which Song et al. (2021, table 1) found to come close.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.diffusion.schedule import linear
from sumuk.families.diffusers import ATTENTION, OLD_ATTENTION
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Latent, Part, Shapes
from sumuk.files.layout import Rule, alias, linear_to_conv, rename

if TYPE_CHECKING:
    from torch import nn

COLOURS = 3


def pixel_unet_rules(names: Collection[str]) -> list[Rule]:
    """The diffusers library's names for this U-Net (``UNet2DModel``), from either side's names.

    Its way up is numbered in the order of running, its attention is stored as linear layers.
    """
    found = (re.match(r"down(?:_blocks)?\.([0-9]{1,2})\.", name) for name in names)
    levels = len({match[1] for match in found if match})
    rules = [
        rename("time_embedding.linear_1.*", "temb.dense.0.*"),
        rename("time_embedding.linear_2.*", "temb.dense.1.*"),
        rename("conv_in.*", "conv_in.*"),
        rename("conv_norm_out.*", "norm_out.*"),
        rename("conv_out.*", "conv_out.*"),
        *_resnet("mid_block.resnets.0", "mid.block_1"),
        *_resnet("mid_block.resnets.1", "mid.block_2"),
        *_attention("mid_block.attentions.0", "mid.attn_1"),
        *_level("down_blocks.{level}", "down.{level}"),
        rename("down_blocks.{level}.downsamplers.0.conv.*", "down.{level}.downsample.conv.*"),
    ]
    for level in range(levels):
        up = f"up_blocks.{levels - 1 - level}"
        rules += _level(up, f"up.{level}")
        rules.append(rename(f"{up}.upsamplers.0.conv.*", f"up.{level}.upsample.conv.*"))
    return rules


def _level(foreign: str, native: str) -> list[Rule]:
    return [
        *_resnet(f"{foreign}.resnets.{{block}}", f"{native}.block.{{block}}"),
        *_attention(f"{foreign}.attentions.{{block}}", f"{native}.attn.{{block}}"),
    ]


def _resnet(foreign: str, native: str) -> list[Rule]:
    return [
        rename(f"{foreign}.time_emb_proj.*", f"{native}.temb_proj.*"),
        rename(f"{foreign}.conv_shortcut.*", f"{native}.nin_shortcut.*"),
        *(
            rename(f"{foreign}.{same}.*", f"{native}.{same}.*")
            for same in ("norm1", "conv1", "norm2", "conv2")
        ),
    ]


def _attention(foreign: str, native: str) -> list[Rule]:
    return [
        rename(f"{foreign}.group_norm.*", f"{native}.norm.*"),
        *(linear_to_conv(f"{foreign}.{a}.*", f"{native}.{b}.*") for a, b in ATTENTION),
        *(alias(linear_to_conv(f"{foreign}.{a}.*", f"{native}.{b}.*")) for a, b in OLD_ATTENTION),
    ]


def _build(shapes: Shapes) -> nn.Module:
    from sumuk.nets.ddpm import PixelUNet, pixel_unet_shape

    # The way down tells the rest, which the loader then compares with the file, name by name.
    return PixelUNet(pixel_unet_shape(shapes))


def _config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.ddpm import EPS, pixel_unet_shape

    shape = pixel_unet_shape(shapes)
    return {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "attention_head_dim": None,  # one head
        "block_out_channels": list(shape.widths),
        "center_input_sample": False,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in shape.attends],
        "downsample_padding": 0,  # means: right and below only
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": shape.in_channels,
        "layers_per_block": shape.num_res_blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": EPS,
        "norm_num_groups": 32,
        "out_channels": shape.out_channels,
        "time_embedding_type": "positional",
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(shape.attends)],
    }


UNET = Part(
    name="denoiser",
    title="pixel U-Net",
    key="temb.dense.0.weight",
    original=("temb.dense.*", "conv_in.*", "down.*", "mid.*", "up.*", "norm_out.*", "conv_out.*"),
    diffusers=pixel_unet_rules,
    supplier="any DDPM pixel model, or unet/ of its diffusers folder",
    build=_build,
    config=_config,
    # The diffusers library's own defaults differ in all of these, and change no tensor.
    fixed=(
        "attention_head_dim",
        "downsample_padding",
        "flip_sin_to_cos",
        "freq_shift",
        "norm_eps",
        "norm_num_groups",
        "time_embedding_type",
    ),
)

SINGLE = Arrangement(
    name="single",
    title="original single file",
    dialect="original",
    parts=((UNET, ""),),
)
DIFFUSERS = Arrangement(
    name="diffusers",
    title="diffusers folder",
    dialect="diffusers",
    parts=((UNET, "unet/"),),
)
BARE_PARALLEL = Arrangement(
    name="bare-parallel",
    title="state of a training on several devices, original names",
    dialect="original",
    parts=((UNET, "module."),),
)
BARE_DIFFUSERS = Arrangement(
    name="bare-diffusers",
    title="single network, diffusers names",
    dialect="diffusers",
    parts=((UNET, ""),),
)


@dataclass(frozen=True)
class Plan:
    """What tells one published shape from another.

    Attributes:
        multiples: width of each level in units of the first's.
        attends: the level with attention; None: several or none.
    """

    multiples: tuple[float, ...]
    attends: int | None

    @classmethod
    def read(cls, unet: Shapes) -> Plan:
        """From names and shapes."""
        widths: list[int] = []
        while shape := unet.get(f"down.{len(widths)}.block.0.conv1.weight"):
            widths.append(shape[0])
        attends = [level for level in range(len(widths)) if f"down.{level}.attn.0.q.weight" in unet]
        multiples = tuple(width / widths[0] for width in widths if widths[0])
        return cls(multiples, attends[0] if len(attends) == 1 else None)


CIFAR10_PLAN = Plan((1, 2, 2, 2), 1)
CELEBA_PLAN = Plan((1, 2, 2, 2, 4), 2)
LSUN_PLAN = Plan((1, 1, 2, 2, 4, 4), 4)
PUBLISHED = (CIFAR10_PLAN, CELEBA_PLAN, LSUN_PLAN)


def _recognise(plan: Plan | None, shapes: Shapes) -> str | None:
    """Whether native names and shapes are a DDPM of this plan; None: of none of those that were published."""
    unet = {
        name.removeprefix("denoiser."): shape for name, shape in shapes.items() if name[:9] == "denoiser."
    }
    for name in (UNET.key, "mid.block_1.temb_proj.weight", "norm_out.weight"):
        if name not in unet:
            return f"there is no {name!r} of a DDPM pixel model"
    for name in ("conv_in.weight", "mid.attn_1.q.weight", "conv_out.weight"):
        if len(unet.get(name, ())) != 4:
            return f"there is no convolution {name!r} of a DDPM pixel model"
    width, given = unet["conv_in.weight"][:2]
    if unet[UNET.key] != (4 * width, width):
        return f"the time is read from {list(unet[UNET.key])} numbers, not {[4 * width, width]} as in DDPM"
    if (given, made := unet["conv_out.weight"][0]) != (COLOURS, COLOURS):
        return f"the U-Net takes {given} channels and makes {made}, where pixels have {COLOURS}"
    found = Plan.read(unet)
    if plan is None:
        return f"its levels {found} are a published shape's" if found in PUBLISHED else None
    return None if found == plan else f"its levels {found} are not {plan}"


def _folder(facts: Facts) -> dict[str, dict[str, Any]]:
    return {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": "0.30.0",  # whose layout this is; without a version it cannot be opened
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDPMScheduler",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": True,
            "num_train_timesteps": 1000,
            "prediction_type": {"eps": "epsilon", "v": "v_prediction", "clean": "sample"}[facts.prediction],
            "rescale_betas_zero_snr": facts.zero_snr,
            "variance_type": "fixed_large",
        },
        "unet/config.json": {"sample_size": facts.size},
    }


PIXEL = Family(
    name="ddpm",
    variant="pixel",
    title="DDPM",
    architecture="ddpm",
    arrangements=(SINGLE, DIFFUSERS, BARE_PARALLEL, BARE_DIFFUSERS),
    recognise=partial(_recognise, None),
    latent=Latent(channels=COLOURS, stride=1, scale=1.0),
    clips=True,
    schedule=linear,
    prediction="eps",
    readings=(),
    condition=lambda given: {},
    guidance="none",
    defaults=Defaults(size=64, steps=50, guidance=1.0, solver="ddim"),
    licence="Apache-2.0",
    folder=_folder,
)
CIFAR10 = replace(
    PIXEL,
    variant="cifar10",
    title="DDPM (CIFAR-10)",
    architecture="ddpm-cifar10",
    recognise=partial(_recognise, CIFAR10_PLAN),
    defaults=replace(PIXEL.defaults, size=32),
)
CELEBA = replace(
    PIXEL,
    variant="celeba",
    title="DDPM (CelebA)",
    architecture="ddpm-celeba",
    recognise=partial(_recognise, CELEBA_PLAN),
)
LSUN = replace(
    PIXEL,
    variant="lsun",
    title="DDPM (LSUN, CelebA-HQ)",
    architecture="ddpm-lsun",
    recognise=partial(_recognise, LSUN_PLAN),
    defaults=replace(PIXEL.defaults, size=256),
)

FAMILIES.add("ddpm/pixel", PIXEL, "ddpm")
FAMILIES.add("ddpm/cifar10", CIFAR10)
FAMILIES.add("ddpm/celeba", CELEBA)
FAMILIES.add("ddpm/lsun", LSUN)
