"""Write docs/flops.md: what one forward of each published network costs, and a whole picture.

Run from the root of the repository: ``PYTHONPATH=src python -m benchmarks.flops > docs/flops.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sumuk.families.published import RELEASES
from sumuk.weights.flops import flops

TERA = 1e12
CLIP, T5 = 77, 256
"""Rows of text: of CLIP, and of T5 beside it in SD3."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward of a published network.

    Attributes:
        title: what it is.
        size: of the picture, or of the text.
        release: name in ``RELEASES``.
        part: which of its networks.
        inputs: shapes of what it is given, by name.
        make: the network that is asked, where that is a part of it.
    """

    title: str
    size: str
    release: str
    part: str = "denoiser"
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    make: Callable[[nn.Module], nn.Module] = lambda network: network

    def count(self) -> int:
        """Its floating-point operations."""
        with torch.device("meta"):
            network = self.make(RELEASES[self.release].network(self.part))
            given = {name: _input(name, shape) for name, shape in self.inputs.items()}
        return flops(network, **given)

    def parameters(self) -> int:
        """Of the whole network."""
        with torch.device("meta"):
            return sum(
                value.numel() for value in self.make(RELEASES[self.release].network(self.part)).parameters()
            )


def _input(name: str, shape: tuple[int, ...]) -> Tensor:
    whole = name == "ids" or (name == "y" and len(shape) == 1)  # tokens; classes
    return torch.empty(shape, dtype=torch.int64 if whole else torch.float32)


class Decode(nn.Module):
    """An autoencoder's way to pixels as a forward."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)  # type: ignore[operator]


def _unet(title: str, release: str, size: int, context: int, vector: int = 0, cells: int = 8) -> Forward:
    with torch.device("meta"):
        channels = RELEASES[release].network("denoiser").shape.in_channels  # type: ignore[union-attr]
    side = size // cells
    inputs: dict[str, tuple[int, ...]] = {
        "x": (1, channels, side, side),
        "t": (1,),
        "context": (1, CLIP, context),
    }
    if vector:
        inputs["y"] = (1, vector) if vector > 1 else (1,)
    return Forward(title=title, size=f"{size} x {size}", release=release, inputs=inputs)


def _sd3(title: str, release: str, size: int) -> Forward:
    side = size // 8
    inputs = {"x": (1, 16, side, side), "t": (1,), "context": (1, CLIP + T5, 4096), "y": (1, 2048)}
    return Forward(
        title=title, size=f"{size} x {size}, {CLIP + T5} rows of text", release=release, inputs=inputs
    )


def _flux(title: str, release: str, size: int, rows: int, channels: int = 16) -> Forward:
    side = size // 8
    inputs = {"x": (1, channels, side, side), "t": (1,), "context": (1, rows, 4096), "y": (1, 768)}
    if release != "flux1-schnell":
        inputs["guidance"] = (1,)
    return Forward(title=title, size=f"{size} x {size}, {rows} rows of text", release=release, inputs=inputs)


def _stage_c(title: str, release: str) -> Forward:
    inputs = {
        "x": (1, 16, 24, 24),
        "t": (1,),
        "clip_text": (1, CLIP, 1280),
        "clip_text_pooled": (1, 1, 1280),
        "clip_img": (1, 1, 768),
    }
    return Forward(title=title, size="1024 x 1024", release=release, inputs=inputs)


def _stage_b(title: str, release: str) -> Forward:
    inputs = {"x": (1, 4, 256, 256), "t": (1,), "effnet": (1, 16, 24, 24), "clip_text_pooled": (1, 1, 1280)}
    return Forward(title=title, size="1024 x 1024", release=release, part="decoder", inputs=inputs)


def _dit(title: str, release: str, size: int) -> Forward:
    inputs = {"x": (1, 4, size // 8, size // 8), "t": (1,), "y": (1,)}
    return Forward(title=title, size=f"{size} x {size}", release=release, inputs=inputs)


def _ddpm(title: str, release: str, size: int) -> Forward:
    inputs = {"x": (1, 3, size, size), "t": (1,)}
    return Forward(title=title, size=f"{size} x {size}", release=release, inputs=inputs)


def _decoder(
    title: str, release: str, size: int, channels: int, part: str = "vae", cells: int = 8
) -> Forward:
    shape = (1, channels, size // cells, size // cells)
    tiny = part != "vae"
    return Forward(
        title=title,
        size=f"{size} x {size}",
        release=release,
        part=part,
        inputs={"latent" if tiny else "z": shape},
        make=(lambda network: network) if tiny else Decode,
    )


def _tower(title: str, release: str, part: str, rows: int) -> Forward:
    return Forward(title=title, size=f"{rows} tokens", release=release, part=part, inputs={"ids": (1, rows)})


def forwards() -> dict[str, Forward]:
    """What is counted, by a short name."""
    return {
        "sd1-512": _unet("SD 1.5 U-Net", "sd1.5", 512, 768),
        "sd1-inpainting-512": _unet("SD 1.5 inpainting U-Net", "sd1.5-inpainting", 512, 768),
        "sd2-512": _unet("SD 2.1 U-Net", "sd2.1", 512, 1024),
        "sd2-768": _unet("SD 2.1 U-Net", "sd2.1", 768, 1024),
        "x4-512": _unet("x4 upscaler U-Net", "x4-upscaler", 512, 1024, vector=1, cells=4),
        "sdxl-512": _unet("SDXL U-Net", "sdxl-base", 512, 2048, vector=2816),
        "sdxl-1024": _unet("SDXL U-Net", "sdxl-base", 1024, 2048, vector=2816),
        "refiner-1024": _unet("SDXL refiner U-Net", "sdxl-refiner", 1024, 1280, vector=2560),
        "cascade-c": _stage_c("Stable Cascade C, 3.6 B", "cascade-c"),
        "cascade-c-lite": _stage_c("Stable Cascade C, 1 B", "cascade-c-lite"),
        "cascade-b": _stage_b("Stable Cascade B, 1.5 B", "cascade-b"),
        "cascade-b-lite": _stage_b("Stable Cascade B, 700 M", "cascade-b-lite"),
        "sd3-medium": _sd3("SD3 medium", "sd3-medium", 1024),
        "sd3.5-medium": _sd3("SD3.5 medium", "sd3.5-medium", 1024),
        "sd3.5-large": _sd3("SD3.5 large", "sd3.5-large", 1024),
        "flux-dev": _flux("FLUX.1 dev", "flux1-dev", 1024, 512),
        "flux-schnell": _flux("FLUX.1 schnell", "flux1-schnell", 1024, 256),
        "flux-fill": _flux("FLUX.1 Fill", "flux1-fill-dev", 1024, 512, channels=96),
        "dit-xl-256": _dit("DiT-XL/2", "dit-xl-2-256", 256),
        "dit-xl-512": _dit("DiT-XL/2", "dit-xl-2-512", 512),
        "dit-l-256": _dit("DiT-L/2", "dit-l-2", 256),
        "dit-b-256": _dit("DiT-B/2", "dit-b-2", 256),
        "dit-s-256": _dit("DiT-S/2", "dit-s-2", 256),
        "ddpm-cifar10": _ddpm("DDPM CIFAR-10", "ddpm-cifar10", 32),
        "ddpm-celeba": _ddpm("DDPM CelebA", "ddpm-celeba", 64),
        "ddpm-lsun": _ddpm("DDPM LSUN", "ddpm-lsun", 256),
        "vae-256": _decoder("KL decoder, 4 channels", "sd1.5", 256, 4),
        "vae-512": _decoder("KL decoder, 4 channels", "sd1.5", 512, 4),
        "vae-768": _decoder("KL decoder, 4 channels", "sd1.5", 768, 4),
        "vae-1024": _decoder("KL decoder, 4 channels", "sd1.5", 1024, 4),
        "vae16-1024": _decoder("KL decoder, 16 channels", "flux1-dev", 1024, 16),
        "stage-a-1024": _decoder("Stable Cascade A", "cascade-a", 1024, 4, cells=4),
        "taesd-512": _decoder("TAESD decoder", "taesd-decoder", 512, 4, part="tiny_decoder"),
        "taesd-1024": _decoder("TAESD decoder", "taesd-decoder", 1024, 4, part="tiny_decoder"),
        "clip-l": _tower("CLIP L", "sd1.5", "text", CLIP),
        "clip-h": _tower("OpenCLIP H", "sd2.1", "text", CLIP),
        "clip-g": _tower("OpenCLIP bigG", "sdxl-base", "text_2", CLIP),
        "t5-256": _tower("T5 XXL", "sd3-medium", "text_3", 256),
        "t5-512": _tower("T5 XXL", "flux1-dev", "text_2", 512),
    }


PICTURES = (
    # what, [(forward, how often)]
    ("SD 1.5, 512 x 512, 25 steps", (("sd1-512", 50), ("vae-512", 1), ("clip-l", 2))),
    ("SD 2.1, 768 x 768, 25 steps", (("sd2-768", 50), ("vae-768", 1), ("clip-h", 2))),
    ("SDXL, 1024 x 1024, 30 steps", (("sdxl-1024", 60), ("vae-1024", 1), ("clip-l", 2), ("clip-g", 2))),
    ("Stable Cascade, 1024 x 1024, 20 and 10 steps", (
        ("cascade-c", 40), ("cascade-b", 20), ("stage-a-1024", 1), ("clip-g", 2),
    )),
    ("SD3 medium, 1024 x 1024, 28 steps", (("sd3-medium", 56), ("vae16-1024", 1), ("t5-256", 2))),
    ("SD3.5 large, 1024 x 1024, 28 steps", (("sd3.5-large", 56), ("vae16-1024", 1), ("t5-256", 2))),
    ("FLUX.1 dev, 1024 x 1024, 28 steps", (("flux-dev", 28), ("vae16-1024", 1), ("t5-512", 1))),
    ("FLUX.1 schnell, 1024 x 1024, 4 steps", (("flux-schnell", 4), ("vae16-1024", 1), ("t5-256", 1))),
    ("DiT-XL/2, 256 x 256, 50 steps", (("dit-xl-256", 100), ("vae-256", 1))),
)  # fmt: skip
"""Whole pictures with each family's own steps and guidance: two rows a step, one where guidance is none or embedded."""

HEAD = """# What a forward costs

Floating-point operations of one forward, batch 1, at the published widths. **A multiply-add counts as two.** Matrix
products, convolutions and attention are counted; norms, activations and sums are not. Some papers count multiply-adds
and call them FLOPs (DiT's do): double those to compare.

Nothing is run for it: networks are built and asked on the `meta` device, from the shapes in
`src/sumuk/families/published.py`. For a model of yours:

```python
import torch
from sumuk.weights.flops import flops

flops(model.denoiser, x=torch.empty(1, 4, 64, 64), t=torch.empty(1), context=torch.empty(1, 77, 768))
```

This page is written by `PYTHONPATH=src python -m benchmarks.flops > docs/flops.md`.

## One forward

Classifier-free guidance asks for two a step; FLUX.1, and anything at guidance 1, for one. Parameters are those of the
whole network, with an autoencoder's encoder.

| network | parameters | at | TFLOP |
|---|--:|---|--:|
"""
PICTURE_HEAD = """
## One picture

With each family's own steps and guidance, from text to pixels. Divided by what your machine does a second, it is the
least time that a picture can take there.

| picture | TFLOP |
|---|--:|
"""


def main() -> None:
    counted: dict[str, int] = {}
    print(HEAD, end="")
    for name, forward in forwards().items():
        counted[name] = forward.count()
        size = forward.parameters()
        words = f"{size / 1e9:.3f} B" if size >= 1e9 else f"{size / 1e6:.1f} M"
        print(f"| {forward.title} | {words} | {forward.size} | {counted[name] / TERA:.4g} |")
    print(PICTURE_HEAD, end="")
    for title, asked in PICTURES:
        print(f"| {title} | {sum(counted[name] * times for name, times in asked) / TERA:.4g} |")


if __name__ == "__main__":
    main()
