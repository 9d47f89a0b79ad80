"""What Stable Diffusion 2 and SDXL share: U-Nets whose transformers project by linear layers, in heads of 64 channels.

Such a U-Net may add something to the embedding of its time: a class (``label_emb.weight``) or a vector
(``label_emb.0``). What that is, and what lies beside the latent, tells the variants apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sumuk.families.diffusers import unet_rules
from sumuk.families.family import Arrangement, Facts, Part, Shapes
from sumuk.families.openclip import EXTRAS
from sumuk.families.sd import POSITIONS, SCHEDULE_BUFFERS, _folder, _unet_config
from sumuk.files.layout import Rule, ignore, rename

if TYPE_CHECKING:
    from torch import nn

HEAD = 64
"""Channels of an attention head at every width."""


def vector_unet_rules(added: str, names: Collection[str]) -> list[Rule]:
    """Rules of a U-Net with something added to its time.

    Args:
        added: what diffusers calls the embedding of it: ``class_embedding``, or ``add_embedding`` in SDXL.
        names: of either side.
    """
    return [
        *unet_rules(names),
        rename(f"{added}.weight", "label_emb.weight"),
        rename(f"{added}.linear_1.*", "label_emb.0.0.*"),
        rename(f"{added}.linear_2.*", "label_emb.0.2.*"),
    ]


def linear_unet(shapes: Shapes) -> nn.Module:
    """The U-Net of SD 2 and SDXL."""
    from sumuk.nets.unet import UNet, encoder_shape

    return UNet(encoder_shape(shapes, head_channels=HEAD, out_key="out.2.weight"))


def linear_unet_config(shapes: Shapes) -> dict[str, Any]:
    """Its configuration in diffusers, without what is added to the time."""
    from sumuk.nets.unet import unet_shape

    shape = unet_shape(shapes, head_channels=HEAD)
    config = _unet_config(shapes)
    depths = [max(depth, 1) for depth in shape.transformer_depth]
    depths[-1] = shape.middle_depth or depths[-1]  # diffusers takes the middle's from the last level
    return config | {
        "attention_head_dim": [width // HEAD for width in config["block_out_channels"]],  # number of heads
        "transformer_layers_per_block": depths,
        "use_linear_projection": True,
    }


MARKERS = ("v_pred", "ztsnr")
"""Empty tensors that say what a network predicts and of its noise; :mod:`sumuk.weights.inspect` reads them."""


def arrangements(
    networks: tuple[tuple[Part, str, str], ...], single: tuple[str, ...] = (), folder: tuple[str, ...] = ()
) -> tuple[Arrangement, ...]:
    """The four layouts of a family: single file, diffusers folder, and a single network in either's names.

    Args:
        networks: each part, its prefix in a single file and its folder.
        single: names that its single files hold beside the parts, of no use here.
        folder: the same of its diffusers folders.
    """
    bare = tuple((part, "") for part, _, _ in networks)
    return (
        Arrangement(
            name="single",
            title="original single file",
            dialect="original",
            parts=tuple((part, prefix) for part, prefix, _ in networks),
            ignored=tuple(
                map(ignore, (*SCHEDULE_BUFFERS, *MARKERS, "model_ema.*", "first_stage_model.loss.*", *single))
            ),
        ),
        Arrangement(
            name="diffusers",
            title="diffusers folder",
            dialect="diffusers",
            parts=tuple((part, place) for part, _, place in networks),
            ignored=tuple(map(ignore, ("safety_checker/*", "controlnet/*", *folder))),
        ),
        Arrangement(
            name="bare",
            title="single network, original names without prefix",
            dialect="original",
            parts=bare,
            ignored=tuple(map(ignore, (*POSITIONS, *EXTRAS, *MARKERS, "loss.*", "model_ema.*"))),
        ),
        Arrangement(
            name="bare-diffusers",
            title="single network, diffusers names",
            dialect="diffusers",
            parts=bare,
            ignored=tuple(map(ignore, (*POSITIONS, *EXTRAS))),
        ),
    )


@dataclass(frozen=True)
class Header:
    """What names and shapes say of a U-Net with linear projections.

    Attributes:
        given: channels that it takes.
        latent: channels that it predicts.
        context: width of the text that it reads.
        classes: whether a class is added to its time.
        vector: length of the vector that is added to its time, 0 without one.
        shallow: whether its first level attends.
        deep: whether its last level attends.
    """

    given: int
    latent: int
    context: int
    classes: bool
    vector: int
    shallow: bool
    deep: bool


def read_header(shapes: Shapes) -> Header | str:
    """The U-Net among native names and shapes, or the reason why there is none of this kind."""
    unet = {
        name.removeprefix("denoiser."): shape for name, shape in shapes.items() if name[:9] == "denoiser."
    }
    text, vector = "middle_block.1.transformer_blocks.0.attn2.to_k.weight", "label_emb.0.0.weight"
    needed = {"input_blocks.0.0.weight": 4, "out.2.weight": 4, "middle_block.1.proj_in.weight": 2, text: 2}
    needed |= {vector: 2} if vector in unet else {}
    for name, axes in needed.items():
        if name not in unet:
            return f"there is no {name!r} of a U-Net with text"
        if len(unet[name]) != axes:
            return f"{name!r} has {len(unet[name])} axes instead of {axes}: no U-Net with linear projections"
    rows = 1
    while any(name.startswith(f"input_blocks.{rows}.0.") for name in unet):
        rows += 1
    return Header(
        given=unet["input_blocks.0.0.weight"][1],
        latent=unet["out.2.weight"][0],
        context=unet[text][1],
        classes="label_emb.weight" in unet,
        vector=unet.get(vector, (0, 0))[-1],
        shallow="input_blocks.1.1.proj_in.weight" in unet,
        deep=f"input_blocks.{rows - 1}.1.proj_in.weight" in unet,
    )


def beside(header: Header, latents: int, extra: int) -> str | None:
    """None if ``latents * channels + extra`` channels lie beside the latent, else that it is not so."""
    wanted = header.latent * (1 + latents) + extra
    if header.given == wanted:
        return None
    return f"the U-Net takes {header.given} channels where {wanted} are expected"


PIPELINE = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
"""What all pipelines of Stable Diffusion have."""


def folder(pipeline: str, index: Mapping[str, Any], facts: Facts) -> dict[str, dict[str, Any]]:
    """A diffusers folder's JSON files.

    Args:
        pipeline: name of the class.
        index: what else its ``model_index.json`` lists; ``[None, None]`` for what is not there.
        facts: see :class:`Facts`.
    """
    said = _folder(pipeline, facts)
    kept = {name: said["model_index.json"][name] for name in ("_class_name", "_diffusers_version", *PIPELINE)}
    return said | {"model_index.json": kept | dict(index)}
