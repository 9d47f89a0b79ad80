"""Autoencoders in files of their own: between pixels and the latents of a model.

The KL autoencoders (Rombach et al. 2022, section 3.1) are told apart by their levels and their latent's channels, and
by nothing else. So Stable Diffusion 1, 2 and SDXL share one kind, Stable Diffusion 3 and FLUX.1 another: within a kind
the names, shapes and even the widths are alike, and only scale and shift of the latents differ. Which model such a
file belongs to is said by its metadata or configuration, or by nobody.

The tiny ones (O. Boer Bohan, TAESD, 2023) come as a decoder, as an encoder, or both in one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.families.family import FAMILIES, Arrangement, Kind, Part, Shapes
from sumuk.families.sd import VAE
from sumuk.files.layout import Rule, ignore, rename

if TYPE_CHECKING:
    from torch import nn

LICENCE = "unknown"
"""The same tensors were published under several."""

# -- KL ------------------------------------------------------------------------------------------------------------

TRAINED = ("loss.*", "model_ema.*")
"""What the training of a stand-alone autoencoder leaves beside it."""


def _within(name: str, title: str, prefix: str, dialect: str = "original") -> Arrangement:
    ignored = tuple(ignore(prefix + each) for each in TRAINED)
    return Arrangement(name=name, title=title, dialect=dialect, parts=((VAE, prefix),), ignored=ignored)


KL_FILES = (
    _within("bare", "single network, original names without prefix", ""),
    _within("bare-diffusers", "single network, diffusers names", "", "diffusers"),
    _within("single", "the autoencoder of a single file, below first_stage_model.", "first_stage_model."),
    _within("single", "the autoencoder of a single file, below vae.", "vae."),
    _within("diffusers", "vae/ of a diffusers folder", "vae/", "diffusers"),
)


def _recognise_kl(levels: int, channels: int, quantised: bool, shapes: Shapes) -> str | None:
    """Whether native names and shapes are a KL autoencoder of so many levels and latent channels."""
    for name in ("encoder.conv_in.weight", "encoder.mid.attn_1.q.weight", "decoder.conv_in.weight"):
        if len(shapes.get(f"vae.{name}", ())) != 4:
            return f"there is no convolution {name!r} of a KL autoencoder"
    found = {
        int(each[1]) for name in shapes if (each := re.match(r"vae\.encoder\.down\.([0-9]{1,4})\.", name))
    }
    if len(found) != levels:
        return f"it has {len(found)} levels, not {levels}"
    if (here := shapes["vae.decoder.conv_in.weight"][1]) != channels:
        return f"its latent has {here} channels, not {channels}"
    if ("vae.quant_conv.weight" in shapes) != quantised:
        return f"it has {'no' if quantised else 'a'} quant_conv"
    return None


def _kl(
    variant: str, title: str, levels: int, channels: int, quantised: bool, serves: str, *aliases: str
) -> Kind:
    said = {
        "latent": f"{channels} channels, {2 ** (levels - 1)} pixels a cell",
        "serves": serves,
    }
    kind = Kind(
        name="vae",
        variant=variant,
        title=title,
        architecture="vae",
        arrangements=KL_FILES,
        recognise=partial(_recognise_kl, levels, channels, quantised),
        licence=LICENCE,
        tells=lambda shapes: said,
    )
    return FAMILIES.add(kind.key, kind, *aliases)


KL_F8 = _kl(
    "kl-f8", "KL autoencoder of Stable Diffusion 1, 2 or SDXL", 4, 4, True,
    "Stable Diffusion 1 and 2, DiT (latent scale 0.18215) or SDXL (0.13025); its tensors do not tell which", "vae",
)  # fmt: skip
KL_F4 = _kl(
    "kl-f4", "KL autoencoder of the x4 upscaler", 3, 4, True,
    "Stable Diffusion x4 upscaler (latent scale 0.08333)",
)  # fmt: skip
KL_16 = _kl(
    "kl-f8-16ch", "KL autoencoder of Stable Diffusion 3 or FLUX.1", 4, 16, False,
    "Stable Diffusion 3 and 3.5 (latent scale 1.5305, shift 0.0609) or FLUX.1 (0.3611, 0.1159); its tensors do not "
    "tell which",
)  # fmt: skip

# -- tiny ----------------------------------------------------------------------------------------------------------

PLACES = 20
"""Places in the sequence of either side, those without parameters included."""


def _encoder(shapes: Shapes) -> nn.Module:
    from sumuk.nets.tiny import TinyEncoder, tiny_encoder_shape

    return TinyEncoder(tiny_encoder_shape(shapes))


def _decoder(shapes: Shapes) -> nn.Module:
    from sumuk.nets.tiny import TinyDecoder, tiny_decoder_shape

    return TinyDecoder(tiny_decoder_shape(shapes))


def _layers(shift: int, names: Collection[str]) -> list[Rule]:
    """The diffusers library numbers what has parameters from 0; the decoder's first, which squashes, has none."""
    return [rename(f"layers.{place - shift}.*", f"{place}.*") for place in range(shift, PLACES)]


def _config(shapes: Shapes) -> dict[str, Any]:
    return {"_class_name": "AutoencoderTiny"}


ENCODER = Part(
    name="tiny_encoder",
    title="tiny encoder",
    key="0.weight",
    original=("{place}.*",),
    diffusers=partial(_layers, 0),
    supplier="taesd_encoder.safetensors, taesd3_encoder.safetensors, or a diffusers folder of TAESD",
    build=_encoder,
    config=_config,
    optional=True,
)
DECODER = replace(
    ENCODER,
    name="tiny_decoder",
    title="tiny decoder",
    key="1.weight",
    diffusers=partial(_layers, 1),
    supplier="taesd_decoder.safetensors, taesd3_decoder.safetensors, or a diffusers folder of TAESD",
    build=_decoder,
)
SCALES = tuple(ignore(name) for name in ("vae_scale", "vae_shift"))
"""What ComfyUI stores beside it; latents here are the denoiser's."""

TINY_FILES = (
    Arrangement(
        name="single",
        title="encoder and decoder in one file, original names",
        dialect="original",
        parts=((ENCODER, "taesd_encoder."), (DECODER, "taesd_decoder.")),
        ignored=SCALES,
    ),
    Arrangement(
        name="bare",
        title="decoder alone, original names",
        dialect="original",
        parts=((DECODER, ""),),
        ignored=SCALES,
    ),
    Arrangement(
        name="bare",
        title="encoder alone, original names",
        dialect="original",
        parts=((ENCODER, ""),),
        ignored=SCALES,
    ),
    Arrangement(
        name="bare-diffusers",
        title="encoder and decoder in one file, diffusers names",
        dialect="diffusers",
        parts=((ENCODER, "encoder."), (DECODER, "decoder.")),
    ),
)
ENDS: Mapping[str, tuple[str, str, int]] = {
    # part: first and last convolution, and where the last latent's channels stand
    "tiny_encoder": ("0.weight", "14.weight", 0),
    "tiny_decoder": ("1.weight", "19.weight", 1),
}


def _recognise_tiny(channels: int, pooled: bool, shapes: Shapes) -> str | None:
    """Whether native names and shapes are either side of a tiny autoencoder for latents of so many channels."""
    here = [part for part, (first, _, _) in ENDS.items() if f"{part}.{first}" in shapes]
    for part in here:
        first, last, axis = ENDS[part]
        for name in (first, "3.conv.0.weight", last):
            if len(shapes.get(f"{part}.{name}", ())) != 4:
                return f"there is no convolution {name!r} of a {part.replace('_', ' ')}"
        latent = shapes[f"{part}.{first if axis else last}"][axis]
        if latent != channels:
            return f"its latents have {latent} channels, not {channels}"
    if any(".pool." in name for name in shapes) != pooled:
        return f"its blocks {'do not pool' if pooled else 'pool, as those for FLUX.2 do'}"
    return None if here else "there is neither encoder nor decoder of a tiny autoencoder"


def _tiny(
    variant: str, title: str, recognise: Callable[[Shapes], str | None], serves: str, *aliases: str
) -> None:
    kind = Kind(
        name="tiny-vae",
        variant=variant,
        title=title,
        architecture="tiny-vae",
        arrangements=TINY_FILES,
        recognise=recognise,
        licence="MIT",
        tells=lambda shapes: {"serves": serves},
    )
    FAMILIES.add(kind.key, kind, *aliases)


_tiny(
    "taesd", "TAESD or TAESDXL", partial(_recognise_tiny, 4, False),
    "previews and small machines: Stable Diffusion 1 and 2 (TAESD) or SDXL (TAESDXL); its tensors do not tell which",
    "taesd",
)  # fmt: skip
_tiny(
    "taesd3", "TAESD3 or TAEF1", partial(_recognise_tiny, 16, False),
    "previews and small machines: Stable Diffusion 3 (TAESD3) or FLUX.1 (TAEF1); its tensors do not tell which",
    "taesd3",
)  # fmt: skip
_tiny(
    "taef2", "TAEF2", partial(_recognise_tiny, 32, True),
    "FLUX.2, which is not among the families here", "taef2",
)  # fmt: skip
