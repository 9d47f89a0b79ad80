"""A zoo: a tiny random model of every family, in both layouts, and headers of the full-size files.

    python examples/zoo.py --out build/zoo          # writes, loads and draws with each, in seconds
    python examples/zoo.py --headers build/headers  # files that are a header and a hole: gigabytes that take no disk

The models draw noise, but noise that listens: their picture changes with the seed, the prompt and whatever else their
family is told. Point any tool at them to see how it treats a family whose weights you do not have::

    sumuk inspect build/zoo/flux-dev.safetensors
    sumuk generate "a fox" -m build/zoo/sdxl-base --steps 2 -o fox.png
    for file in build/headers/*; do sumuk inspect "$file"; done
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops, ImageDraw
from torch import nn

import sumuk
from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.families.detect import families
from sumuk.families.family import Family
from sumuk.families.published import RELEASES
from sumuk.files import tensors as weight_files
from sumuk.files.safetensors import BITS
from sumuk.generate.engine import Failed, Finished
from sumuk.nets.cascade import StageB, StageC
from sumuk.nets.cascade_shape import StageBShape, StageCShape
from sumuk.nets.clip import ClipShape, ClipText, OpenClipText
from sumuk.nets.clip_vision import ClipVision, ClipVisionShape, ViewStatistics
from sumuk.nets.control_dit import FluxControlNet, FluxControlShape, SD3ControlNet, SD3ControlShape
from sumuk.nets.controlnet import ControlNet, ControlNetShape
from sumuk.nets.ddpm import PixelUNet, PixelUNetShape
from sumuk.nets.dit import DiT, DiTShape
from sumuk.nets.effnet import BackboneShape, EffNet, EffNetShape, Previewer, PreviewerShape, StageShape
from sumuk.nets.flux import Flux, FluxShape
from sumuk.nets.mmdit import MMDiT, MMDiTShape
from sumuk.nets.paella import Paella, PaellaShape
from sumuk.nets.t5 import T5Encoder, T5Shape
from sumuk.nets.tokens import ClipTokens
from sumuk.nets.unet import UNet, UNetShape
from sumuk.nets.unigram import SPACE, T5Tokens
from sumuk.nets.vae import Vae, VaeShape
from sumuk.weights.model import Model, Words

KINDS = {kind.key: kind for kind in families()}
TEXT = "a fox in the snow, a fox and a fish, the sea and the snow and the fox in the sea"
WIDTH = 64
"""Of every text tower but T5 in SD3, whose rows are as wide as both CLIP towers together."""
TABLE = 520
"""Words of a CLIP tower: all bytes, and six merges."""

# -- vocabularies ----------------------------------------------------------------------------------------------------


def clip_words(pad: int | None = None) -> ClipTokens:
    """A vocabulary of CLIP's kind, learnt from one line."""
    learnt = ClipTokens.train([TEXT], size=TABLE, length=16)
    return ClipTokens(learnt.vocabulary, learnt.merges, pad=pad, length=learnt.length)


def t5_words(length: int) -> T5Tokens:
    """A vocabulary of T5's kind: the words of one line, and letters for all others."""
    words = [SPACE + word for word in sorted(set(TEXT.replace(",", "").split()) - {"a"})]
    letters = [SPACE, *map(chr, range(33, 127))]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -3.0) for word in words] + [(letter, -6.0) for letter in letters]
    return T5Tokens(pieces, length=length)


# -- networks --------------------------------------------------------------------------------------------------------


def clip(width: int = WIDTH, projection: int | None = None, kind: type = ClipText, **more: Any) -> nn.Module:
    shape = ClipShape(
        vocabulary=TABLE, length=16, width=width, depth=3, hidden=2 * width, projection=projection
    )
    return kind(shape, **more)


def t5(width: int) -> nn.Module:
    shape = T5Shape(vocabulary=t5_words(8).size, width=width, depth=1, heads=2, head=16, hidden=width)
    return T5Encoder(shape)


def vae(**more: Any) -> nn.Module:
    """Stride 4, but for the x4 upscaler's, which has 4 as published."""
    return Vae(VaeShape(width=32, multiples=(1, 1, 2), blocks=1, **more))


def vision(projection: int) -> nn.Module:
    shape = ClipVisionShape(width=32, depth=1, hidden=64, patch=32, side=7, projection=projection, heads=1)
    return ClipVision(shape)


def sd1(**more: Any) -> dict[str, nn.Module]:
    unet = UNetShape(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 0), middle_depth=1,
        context_dim=WIDTH, heads=8, **more,
    )  # fmt: skip
    return {"denoiser": UNet(unet), "vae": vae(), "text": clip()}


def sd2(**more: Any) -> dict[str, nn.Module]:
    usual: dict[str, Any] = {"model_channels": 64, "channel_mult": (1, 1), "head_channels": 64}
    shape = {
        "num_res_blocks": 1,
        "transformer_depth": (1, 0),
        "middle_depth": 1,
        "context_dim": WIDTH,
        "linear": True,
    }
    unet = UNetShape(**(usual | shape | more))
    # A whole tower, as published; folders leave away its last block and the projection.
    return {"denoiser": UNet(unet), "vae": vae(), "text": clip(projection=WIDTH, kind=OpenClipText)}


def upscaler() -> dict[str, nn.Module]:
    return sd2(
        in_channels=7, model_channels=32, channel_mult=(1, 2), heads=8, head_channels=None, num_classes=1000,
        cross_only=(True, False),
    )  # fmt: skip


def unclip(projection: int) -> dict[str, nn.Module]:
    return sd2(adm_in_channels=2 * projection) | {
        "image": vision(projection),
        "statistics": ViewStatistics(projection),
    }


def sdxl(
    levels: tuple[int, ...] = (0, 1),
    numbers: int = 6,
    towers: tuple[str, ...] = ("text", "text_2"),
    **more: Any,
) -> dict[str, nn.Module]:
    unet = UNetShape(
        model_channels=32, channel_mult=(1, 2, 2)[: len(levels)], num_res_blocks=1, transformer_depth=levels,
        middle_depth=1, context_dim=WIDTH * len(towers), head_channels=64, linear=True,
        adm_in_channels=WIDTH + 256 * numbers, **more,
    )  # fmt: skip
    every = {"text": clip(), "text_2": clip(projection=WIDTH, kind=OpenClipText)}
    return {"denoiser": UNet(unet), "vae": vae(), **{tower: every[tower] for tower in towers}}


def sd3(**more: Any) -> dict[str, nn.Module]:
    shape = MMDiTShape(width=64, depth=2, context=2 * WIDTH, pooled=2 * WIDTH, positions=16, **more)
    return {
        "denoiser": MMDiT(shape),
        "vae": vae(latent=16, quantised=None),
        "text": clip(projection=WIDTH),
        "text_2": clip(projection=WIDTH, activation="gelu"),
        "text_3": t5(2 * WIDTH),
    }


def flux(**more: Any) -> dict[str, nn.Module]:
    shape = FluxShape(width=64, head=32, double=1, single=2, context_dim=WIDTH, vector_dim=WIDTH, **more)
    return {
        "denoiser": Flux(shape),
        "vae": vae(latent=16, quantised=None),
        "text": clip(),
        "text_2": t5(WIDTH),
    }


def cascade() -> dict[str, nn.Module]:
    stage_c = StageCShape(
        in_channels=16, out_channels=16, patch=1, widths=(64, 64), down=(1, 1), up=(1, 1), attends=(True, True),
        down_repeats=(1, 1), up_repeats=(1, 1), cond_width=WIDTH, pooled_width=WIDTH, text_width=WIDTH,
        image_width=48, times=("sca", "crp"),
    )  # fmt: skip
    stages = [(True, 8, 1), (True, 12, 2), (True, 12, 4), (False, 16, 2), (False, 16, 3), (False, 20, 2)]
    rows = tuple(
        StageShape(fused=fused, width=width, depth=1, expand=times) for fused, width, times in stages
    )
    backbone = BackboneShape(stem=8, stages=rows, features=40)
    return {
        "denoiser": StageC(stage_c),
        "text": clip(projection=WIDTH, activation="gelu"),
        "image": vision(48),
        "effnet": EffNet(EffNetShape(backbone=backbone)),
        "previewer": Previewer(PreviewerShape(width=32)),
        **{name: network for name, network in stage_b().items() if name != "text"},
    }


def stage_b() -> dict[str, nn.Module]:
    shape = StageBShape(
        in_channels=4, out_channels=4, patch=2, widths=(32, 64), down=(1, 1), up=(1, 1), attends=(False, True),
        down_repeats=(1, 1), up_repeats=(2, 1), cond_width=WIDTH, pooled_width=WIDTH,
    )  # fmt: skip
    text = clip(projection=WIDTH, activation="gelu")
    return {"decoder": StageB(shape), "text": text, "vae": Paella(PaellaShape(width=32, blocks=1, codes=64))}


def dit() -> dict[str, nn.Module]:
    # Positions as those of the published 256 pixels, which folders do not store.
    shape = DiTShape(width=64, depth=2, heads=1, classes=11, tokens=256)
    return {"denoiser": DiT(shape), "vae": vae()}


def pixels(*mult: int, attends: int) -> dict[str, nn.Module]:
    levels = tuple(level == attends for level in range(len(mult)))
    shape = PixelUNetShape(model_channels=32, channel_mult=mult, num_res_blocks=1, attends=levels)
    return {"denoiser": PixelUNet(shape)}


# -- the animals -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Animal:
    """A tiny model of one family.

    Attributes:
        networks: makes its networks, untrained.
        asks: what a request must bring beside a prompt: names of :data:`PICTURES`, or values.
        says: whether it reads a prompt.
        size: pixels a side of its picture.
    """

    networks: Callable[[], dict[str, nn.Module]]
    asks: Mapping[str, Any] = field(default_factory=dict)
    says: bool = True
    size: int = 32


def picture(side: int) -> Image.Image:
    """A disc on a slope, to begin from or to follow."""
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, 3 * side // 4, 3 * side // 4), fill=(200, 60, 30))
    return image


def hole() -> Image.Image:
    """White where a picture is drawn anew: its right half."""
    image = Image.new("L", (32, 32))
    image.paste(255, (16, 0, 32, 32))
    return image


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "disc": lambda: picture(32),
    "small": lambda: picture(8),
    "hole": hole,
}
INPAINT = {"init": "disc", "mask": "hole"}

ZOO: dict[str, Animal] = {
    "sd1/text-to-image": Animal(sd1),
    "sd1/inpainting": Animal(lambda: sd1(in_channels=9), INPAINT),
    "sd1/instruct-pix2pix": Animal(lambda: sd1(in_channels=8), {"init": "disc"}),
    "sd2/text-to-image": Animal(sd2),
    "sd2/inpainting": Animal(lambda: sd2(in_channels=9), INPAINT),
    "sd2/depth": Animal(lambda: sd2(in_channels=5), {"hint": "disc"}),
    "sd2/x4-upscaler": Animal(upscaler, {"init": "small"}),
    "sd2/unclip-l": Animal(lambda: unclip(48), {"like": "disc"}),
    "sd2/unclip-h": Animal(lambda: unclip(WIDTH), {"like": "disc"}),
    "sdxl/base": Animal(sdxl),
    "sdxl/refiner": Animal(lambda: sdxl((0, 1, 0), 5, ("text_2",))),
    "sdxl/inpainting": Animal(lambda: sdxl(in_channels=9), INPAINT),
    "sd3/medium": Animal(sd3),
    "sd3/3.5-medium": Animal(lambda: sd3(qk_norm=True, dual=1)),
    "sd3/3.5-large": Animal(lambda: sd3(qk_norm=True)),
    "flux/dev": Animal(flux),
    "flux/schnell": Animal(lambda: flux(guidance=False)),
    "flux/fill": Animal(lambda: flux(in_channels=16 + 16 + 4**2), INPAINT),
    "flux/control": Animal(lambda: flux(in_channels=32), {"hint": "disc"}),
    "cascade/stage-c": Animal(cascade, size=128),
    "cascade/stage-b": Animal(stage_b, size=128),
    "dit/class-conditional": Animal(dit, {"label": 3}, says=False),
    "ddpm/pixel": Animal(lambda: pixels(1, 2, attends=1), says=False),
    "ddpm/cifar10": Animal(lambda: pixels(1, 2, 2, 2, attends=1), says=False),
    "ddpm/celeba": Animal(lambda: pixels(1, 2, 2, 2, 4, attends=2), says=False),
    "ddpm/lsun": Animal(lambda: pixels(1, 1, 2, 2, 4, 4, attends=4), says=False),
}
"""By the family's key."""

COMPLETES = ("cascade/stage-b",)
"""Families that go on from another's latents, and draw nothing by themselves."""


def flux_guest() -> nn.Module:
    shape = FluxControlShape(width=64, head=32, double=1, single=0, context_dim=WIDTH, vector_dim=WIDTH)
    return FluxControlNet(shape)


def sd3_guest() -> nn.Module:
    shape = SD3ControlShape(width=64, depth=1, context_dim=2 * WIDTH, vector_dim=2 * WIDTH, places=16)
    return SD3ControlNet(shape)


def unet_guest(unet: Any) -> nn.Module:
    """A ControlNet of that U-Net; its picture is halved as often as a tiny autoencoder halves."""
    shape = {name: getattr(unet.shape, name) for name in unet.shape.__dataclass_fields__}
    return ControlNet(ControlNetShape(**shape, hint_widths=(8, 16, 16)))


GUESTS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "controlnet-sd1": ("sd1/text-to-image", lambda: unet_guest(sd1()["denoiser"])),
    "controlnet-sd2": ("sd2/text-to-image", lambda: unet_guest(sd2()["denoiser"])),
    "controlnet-sdxl": ("sdxl/base", lambda: unet_guest(sdxl()["denoiser"])),
    "controlnet-flux": ("flux/dev", flux_guest),
    "controlnet-sd3": ("sd3/medium", sd3_guest),
}
"""ControlNets: the family that each steers, and its network."""


def enliven(network: nn.Module, seed: int) -> nn.Module:
    """Random numbers everywhere, also where an untrained network has zeros, of a size that keeps signals alive."""
    dice = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=dice)
        if parameter.ndim > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            ones = bool((parameter.data == 1).all())  # scales of norms
            parameter.data = float(ones) + 0.1 * noise
    return network.eval().requires_grad_(False)


def tiny(key: str, seed: int = 0) -> Model:
    """A model of a family with random weights and vocabularies of its own."""
    family, animal = KINDS[key], ZOO[key]
    assert isinstance(family, Family)
    networks = {part: enliven(each, seed + i) for i, (part, each) in enumerate(animal.networks().items())}
    words: dict[str, Words] = {}
    for reading in family.readings:
        clips = reading.words == "clip"
        words[reading.part] = clip_words(reading.pad) if clips else t5_words(reading.length or 16)
        if clips:
            networks[reading.part].eos = words[reading.part].eos
    latent = family.latent
    if "vae" in networks and not key.startswith("cascade/"):
        latent = replace(latent, stride=networks["vae"].stride)
    return Model(
        family=family,
        networks=networks,
        words=words,
        schedule=family.schedule(),
        prediction=PREDICTIONS[family.prediction],
        latent=latent,
        size=animal.size,
    )


def asked(key: str, out: Path) -> dict[str, Any]:
    """What a request to this model must bring beside its prompt, pictures as files in ``out``."""
    values: dict[str, Any] = {}
    for name, value in ZOO[key].asks.items():
        if value in PICTURES:
            path = out / f"{value}.png"
            if not path.exists():
                PICTURES[value]().save(path)
            value = path
        values[name] = value
    return values


def write(key: str, out: Path, seed: int = 0) -> tuple[Path, Path]:
    """Save a tiny model in both layouts; returns the file and the folder."""
    model = tiny(key, seed)
    file, folder = out / f"{key.replace('/', '-')}.safetensors", out / key.replace("/", "-")
    sumuk.save(model, file)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    sumuk.save(model, folder, layout="diffusers")
    return file, folder


def write_guest(name: str, out: Path, seed: int = 0) -> Path:
    """Save a tiny ControlNet."""
    network = enliven(GUESTS[name][1](), seed)
    path = out / f"{name}.safetensors"
    weight_files.write(path, network.state_dict())
    return path


def draw(
    model: Model, key: str, out: Path, prompt: str = "a fox in the snow", seed: int = 0, **more: Any
) -> Image.Image:
    """Two steps."""
    values = asked(key, out) | {"steps": 2, "seed": seed} | ({"prompt": prompt} if ZOO[key].says else {})
    for event in sumuk.generate(model, sumuk.Request(**(values | more))):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return event.picture
    raise AssertionError("the engine ended without a picture")


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, of 255.

    Files put tensors at other places in memory than folders do, and kernels round by where they lie: 1 is nothing.
    """
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def stock(out: Path) -> None:
    """Write every animal and guest, load each in both layouts, and draw."""
    out.mkdir(parents=True, exist_ok=True)
    drawing = [key for key, kind in KINDS.items() if isinstance(kind, Family)]
    for key in drawing:
        began = time.perf_counter()
        file, folder = write(key, out)
        said = "draws on from another's latents"
        if key not in COMPLETES:
            one, other = (draw(sumuk.load(place), key, out) for place in (file, folder))
            one.save(out / f"{key.replace('/', '-')}.png")
            said = f"largest difference {apart(one, other)} of 255"
        count = sum(
            value.numel() for network in tiny(key).networks.values() for value in network.parameters()
        )
        print(f"{key:24} {count / 1e6:5.2f} M  {said}  {time.perf_counter() - began:.1f} s")
    for name, (key, _) in GUESTS.items():
        model = sumuk.load(
            out / f"{key.replace('/', '-')}.safetensors", controls={"edges": write_guest(name, out)}
        )
        plain = draw(model, key, out)
        steered = draw(model, key, out, steer=[{"control": "edges", "hint": asked("sd2/depth", out)["hint"]}])
        print(f"{name:24} steers {key} by up to {apart(plain, steered)} of 255")


# -- headers ---------------------------------------------------------------------------------------------------------


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """A safetensors file whose data is a hole of the right length; returns its length in bytes."""
    table, at = {}, 0
    for name in sorted(tensors, key=lambda name: (-BITS[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = at + torch.Size(shape).numel() * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return 8 + len(text) + at


def write_headers(out: Path) -> None:
    """All published files, as headers."""
    out.mkdir(parents=True, exist_ok=True)
    for name, release in RELEASES.items():
        length = write_header(out / f"{name}.safetensors", release.header())
        print(f"{name:24} {length / 1e9:7.2f} GB  {release.family}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="folder for tiny models")
    parser.add_argument("--headers", type=Path, help="folder for full-size headers")
    chosen = parser.parse_args()
    if chosen.out is None and chosen.headers is None:
        parser.error("give --out, --headers, or both")
    if chosen.out is not None:
        stock(chosen.out)
    if chosen.headers is not None:
        write_headers(chosen.headers)


if __name__ == "__main__":
    main()
