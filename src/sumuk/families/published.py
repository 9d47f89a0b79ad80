"""The published models: the shape of each of their networks, and how their files are put together.

Nothing is drawn from this: shapes are read from files. It says what full-size files look like, for headers to show and
for counting what a forward costs. A network is built when it is asked for, on torch's present default device; on
``meta`` that takes no memory.

Where a release lies in several files (FLUX.1, Stable Cascade) its parts are listed as the family's first arrangement
holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sumuk.files.tensors import Shape, lazy

if TYPE_CHECKING:
    from torch import nn

Make = Callable[[], "nn.Module"]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A published model.

    Attributes:
        family: its key in ``FAMILIES``.
        parts: its networks by the names of the family's parts.
        dtype: in which its floating-point tensors were stored.
        size: pixels a side of its usual picture; 0 for what draws nothing.
    """

    family: str
    parts: Mapping[str, Make]
    dtype: str = "F16"
    size: int = 0

    def network(self, part: str) -> nn.Module:
        """One network, built with its published shape."""
        return self.parts[part]()

    def header(self) -> dict[str, tuple[str, Shape]]:
        """Dtype and shape of each tensor, by its name in a file of the family's first arrangement."""

        from sumuk.families.detect import families
        from sumuk.nets.unfilled import unfilled

        kind = next(kind for kind in families() if kind.key == self.family)
        with unfilled():
            networks = {part: self.network(part) for part in self.parts}
        native = {
            f"{part}.{name}": lazy(value)
            for part, network in networks.items()
            for name, value in network.state_dict().items()
        }
        moved = kind.arrangements[0].layout(native, backward=True).backward(native)
        moved.refuse_leftovers(self.family)
        return {
            name: (self.dtype if one.dtype == "F32" else one.dtype, one.shape)
            for name, one in moved.tensors.items()
        }


def _unet(**shape: Any) -> nn.Module:
    from sumuk.nets.unet import UNet, UNetShape

    return UNet(UNetShape(**shape))


def _vae(**shape: Any) -> nn.Module:
    from sumuk.nets.vae import Vae, VaeShape

    return Vae(VaeShape(**shape))


def _clip(activation: Any = "quick_gelu", **shape: Any) -> nn.Module:
    from sumuk.nets.clip import ClipShape, ClipText

    return ClipText(ClipShape(**shape), activation=activation)


def _open_clip(**shape: Any) -> nn.Module:
    from sumuk.nets.clip import ClipShape, OpenClipText

    return OpenClipText(ClipShape(**shape))


def _t5() -> nn.Module:
    from sumuk.nets.t5 import T5Encoder, T5Shape

    return T5Encoder(T5Shape())


def _mmdit(**shape: Any) -> nn.Module:
    from sumuk.nets.mmdit import MMDiT, MMDiTShape

    return MMDiT(MMDiTShape(context=4096, pooled=2048, **shape))


def _flux(**shape: Any) -> nn.Module:
    from sumuk.nets.flux import Flux, FluxShape

    return Flux(FluxShape(**shape))


def _dit(**shape: Any) -> nn.Module:
    from sumuk.nets.dit import DiT, DiTShape

    return DiT(DiTShape(**shape))


def _ddpm(**shape: Any) -> nn.Module:
    from sumuk.nets.ddpm import PixelUNet, PixelUNetShape

    return PixelUNet(PixelUNetShape(model_channels=128, **shape))


def _stage_c(width: int, groups: tuple[int, int]) -> nn.Module:
    from sumuk.nets.cascade import StageC
    from sumuk.nets.cascade_shape import StageCShape

    return StageC(
        StageCShape(
            in_channels=16,
            out_channels=16,
            patch=1,
            widths=(width, width),
            down=groups,
            up=groups,
            attends=(True, True),
            down_repeats=(1, 1),
            up_repeats=(1, 1),
            cond_width=width,
            times=("sca", "crp"),
        )
    )


def _stage_b(widths: tuple[int, ...], groups: tuple[int, ...], repeats: tuple[int, ...]) -> nn.Module:
    from sumuk.nets.cascade import StageB
    from sumuk.nets.cascade_shape import StageBShape

    return StageB(
        StageBShape(
            in_channels=4,
            out_channels=4,
            patch=2,
            widths=widths,
            down=groups,
            up=groups,
            attends=(False, False, True, True),
            down_repeats=(1, 1, 1, 1),
            up_repeats=repeats,
            cond_width=1280,
        )
    )


def _stage_a() -> nn.Module:
    from sumuk.nets.paella import Paella, PaellaShape

    return Paella(PaellaShape())


def _effnet() -> nn.Module:
    from sumuk.nets.effnet import EffNet, EffNetShape

    return EffNet(EffNetShape())


def _previewer() -> nn.Module:
    from sumuk.nets.effnet import Previewer, PreviewerShape

    return Previewer(PreviewerShape())


def _vision() -> nn.Module:
    from sumuk.nets.clip_vision import ClipVision, ClipVisionShape

    return ClipVision(ClipVisionShape())


def _tiny(encodes: bool, channels: int) -> nn.Module:
    from sumuk.nets.tiny import TinyDecoder, TinyEncoder, TinyShape

    return (TinyEncoder if encodes else TinyDecoder)(TinyShape(channels=channels))


def _controlnet(**shape: Any) -> nn.Module:
    from sumuk.nets.controlnet import ControlNet, ControlNetShape

    return ControlNet(ControlNetShape(**shape))


def _flux_controlnet(**shape: Any) -> nn.Module:
    from sumuk.nets.control_dit import FluxControlNet, FluxControlShape

    return FluxControlNet(FluxControlShape(double=5, **shape))


def _sd3_controlnet(**shape: Any) -> nn.Module:
    from sumuk.nets.control_dit import SD3ControlNet, SD3ControlShape

    return SD3ControlNet(SD3ControlShape(**shape))


# -- shapes that several releases share ------------------------------------------------------------------------------

SD1: dict[str, Any] = {
    "model_channels": 320,
    "channel_mult": (1, 2, 4, 4),
    "transformer_depth": (1, 1, 1, 0),
    "middle_depth": 1,
    "context_dim": 768,
    "heads": 8,
}
SD2 = {key: value for key, value in SD1.items() if key != "heads"} | {
    "context_dim": 1024,
    "head_channels": 64,
    "linear": True,
}
SDXL: dict[str, Any] = {
    "model_channels": 320,
    "channel_mult": (1, 2, 4),
    "transformer_depth": (0, 2, 10),
    "middle_depth": 10,
    "context_dim": 2048,
    "head_channels": 64,
    "linear": True,
    "adm_in_channels": 2816,
}
REFINER = SDXL | {
    "model_channels": 384,
    "channel_mult": (1, 2, 4, 4),
    "transformer_depth": (0, 4, 4, 0),
    "middle_depth": 4,
    "context_dim": 1280,
    "adm_in_channels": 2560,
}
X4: dict[str, Any] = {
    "in_channels": 7,
    "model_channels": 256,
    "channel_mult": (1, 2, 2, 4),
    "transformer_depth": (0, 1, 1, 1),
    "middle_depth": 1,
    "context_dim": 1024,
    "heads": 8,
    "linear": True,
    "cross_only": (False, True, True, False),
    "num_classes": 1000,
}
G: dict[str, Any] = {"width": 1280, "depth": 32, "hidden": 5120, "projection": 1280}

KL, KL_16 = _vae, partial(_vae, latent=16, quantised=None)
CLIP_L, CLIP_L_PROJECTED = _clip, partial(_clip, projection=768)
CLIP_H = partial(_open_clip, width=1024, depth=24, hidden=4096, projection=1024)
CLIP_G, CLIP_G_PLAIN = partial(_open_clip, **G), partial(_clip, activation="gelu", **G)
STAGE_B = partial(_stage_b, (320, 640, 1280, 1280), (2, 6, 28, 6), (2, 2, 3, 3))
STAGE_B_LITE = partial(_stage_b, (320, 576, 1152, 1152), (2, 4, 14, 4), (2, 2, 2, 2))

# -- releases --------------------------------------------------------------------------------------------------------


def _sd1(variant: str, **unet: Any) -> Release:
    parts: dict[str, Make] = {"denoiser": partial(_unet, **SD1, **unet), "vae": KL, "text": CLIP_L}
    return Release(family=f"sd1/{variant}", parts=parts, size=512)


def _sd2(variant: str, size: int, **unet: Any) -> Release:
    parts: dict[str, Make] = {"denoiser": partial(_unet, **SD2, **unet), "vae": KL, "text": CLIP_H}
    return Release(family=f"sd2/{variant}", parts=parts, size=size)


def _sdxl(variant: str, **unet: Any) -> Release:
    parts: dict[str, Make] = {
        "denoiser": partial(_unet, **SDXL, **unet),
        "vae": KL,
        "text": CLIP_L,
        "text_2": CLIP_G,
    }
    return Release(family=f"sdxl/{variant}", parts=parts, size=1024)


def _sd3(variant: str, **mmdit: Any) -> Release:
    towers: dict[str, Make] = {"text": CLIP_L_PROJECTED, "text_2": CLIP_G_PLAIN, "text_3": _t5}
    parts: dict[str, Make] = {"denoiser": partial(_mmdit, **mmdit), "vae": KL_16, **towers}
    return Release(family=f"sd3/{variant}", parts=parts, size=1024)


def _flux1(variant: str, **flux: Any) -> Release:
    parts: dict[str, Make] = {"denoiser": partial(_flux, **flux), "vae": KL_16, "text": CLIP_L, "text_2": _t5}
    return Release(family=f"flux/{variant}", parts=parts, dtype="BF16", size=1024)


def _cascade_c(width: int, groups: tuple[int, int]) -> Release:
    parts: dict[str, Make] = {
        "denoiser": partial(_stage_c, width, groups),
        "text": CLIP_G_PLAIN,
        "image": _vision,
        "effnet": _effnet,
        "previewer": _previewer,
    }
    return Release(family="cascade/stage-c", parts=parts, dtype="BF16", size=1024)


def _cascade_b(stage_b: Make) -> Release:
    parts: dict[str, Make] = {"decoder": stage_b, "text": CLIP_G_PLAIN, "vae": _stage_a}
    return Release(family="cascade/stage-b", parts=parts, dtype="BF16", size=1024)


def _dits(size: int, width: int, depth: int, heads: int) -> Release:
    make = partial(_dit, width=width, depth=depth, heads=heads, tokens=(size // 16) ** 2)
    return Release(
        family="dit/class-conditional", parts={"denoiser": make, "vae": KL}, dtype="F32", size=size
    )


def _pixels(variant: str, size: int, *mult: int) -> Release:
    attends = tuple(size >> level == 16 for level in range(len(mult)))
    make = partial(_ddpm, channel_mult=mult, attends=attends)
    return Release(family=f"ddpm/{variant}", parts={"denoiser": make}, dtype="F32", size=size)


def _one(family: str, part: str, make: Make) -> Release:
    return Release(family=family, parts={part: make})


RELEASES: dict[str, Release] = {
    "sd1.5": _sd1("text-to-image"),
    "sd1.5-inpainting": _sd1("inpainting", in_channels=9),
    "instruct-pix2pix": _sd1("instruct-pix2pix", in_channels=8),
    "sd2.1": _sd2("text-to-image", 768),
    "sd2-inpainting": _sd2("inpainting", 512, in_channels=9),
    "sd2-depth": _sd2("depth", 512, in_channels=5),
    "sd2.1-unclip-l": _sd2("unclip-l", 768, adm_in_channels=2 * 768),
    "sd2.1-unclip-h": _sd2("unclip-h", 768, adm_in_channels=2 * 1024),
    "x4-upscaler": Release(
        family="sd2/x4-upscaler",
        parts={"denoiser": partial(_unet, **X4), "vae": partial(_vae, multiples=(1, 2, 4)), "text": CLIP_H},
        size=512,
    ),
    "sdxl-base": _sdxl("base"),
    "sdxl-inpainting": _sdxl("inpainting", in_channels=9),
    "sdxl-refiner": Release(
        family="sdxl/refiner",
        parts={"denoiser": partial(_unet, **REFINER), "vae": KL, "text_2": CLIP_G},
        size=1024,
    ),
    "cascade-c": _cascade_c(2048, (8, 24)),
    "cascade-c-lite": _cascade_c(1536, (4, 12)),
    "cascade-b": _cascade_b(STAGE_B),
    "cascade-b-lite": _cascade_b(STAGE_B_LITE),
    "cascade-a": _one("cascade/stage-a", "vae", _stage_a),
    "cascade-effnet": _one("cascade/effnet", "effnet", _effnet),
    "cascade-previewer": _one("cascade/previewer", "previewer", _previewer),
    "sd3-medium": _sd3("medium", width=1536, depth=24, positions=192),
    "sd3.5-medium": _sd3("3.5-medium", width=1536, depth=24, positions=384, qk_norm=True, dual=13),
    "sd3.5-large": _sd3("3.5-large", width=2432, depth=38, positions=192, qk_norm=True),
    "flux1-dev": _flux1("dev"),
    "flux1-schnell": _flux1("schnell", guidance=False),
    "flux1-fill-dev": _flux1("fill", in_channels=96),
    "flux1-canny-dev": _flux1("control", in_channels=32),
    "dit-xl-2-256": _dits(256, 1152, 28, 16),
    "dit-xl-2-512": _dits(512, 1152, 28, 16),
    "dit-l-2": _dits(256, 1024, 24, 16),
    "dit-b-2": _dits(256, 768, 12, 12),
    "dit-s-2": _dits(256, 384, 12, 6),
    "ddpm-cifar10": _pixels("cifar10", 32, 1, 2, 2, 2),
    "ddpm-celeba": _pixels("celeba", 64, 1, 2, 2, 2, 4),
    "ddpm-lsun": _pixels("lsun", 256, 1, 1, 2, 2, 4, 4),
    "controlnet-sd1.5": _one("controlnet/sd15", "control", partial(_controlnet, **SD1)),
    "controlnet-sd2.1": _one("controlnet/sd21", "control", partial(_controlnet, **SD2)),
    "controlnet-sdxl": _one("controlnet/sdxl", "control", partial(_controlnet, **SDXL)),
    "controlnet-flux-canny": _one("controlnet/flux", "control", partial(_flux_controlnet, single=0)),
    "controlnet-flux-union": _one(
        "controlnet/flux", "control", partial(_flux_controlnet, single=10, modes=7)
    ),
    "controlnet-sd3": _one("controlnet/sd3", "control", partial(_sd3_controlnet, width=1536, depth=6)),
    "vae-kl-f8": _one("vae/kl-f8", "vae", KL),
    "vae-kl-f8-16ch": _one("vae/kl-f8-16ch", "vae", KL_16),
    "clip-l": _one("text-encoder/clip-l", "text", CLIP_L),
    "openclip-g": _one("text-encoder/openclip-g", "text_2", CLIP_G),
    "t5-xxl": _one("text-encoder/t5", "text_3", _t5),
    "taesd-decoder": _one("tiny-vae/taesd", "tiny_decoder", partial(_tiny, False, 4)),
    "taesd3-decoder": _one("tiny-vae/taesd3", "tiny_decoder", partial(_tiny, False, 16)),
}
"""By a short name. Turbos and other fine-tunes have the shapes of what they grew from."""
