"""Write docs/parity.md: how far networks and whole pipelines are from diffusers and transformers, measured now.

Run from the root of the repository: ``PYTHONPATH=src python -m benchmarks.parity``. It takes a few minutes and prints
each row as it is measured.

What is measured is what the tests assert. A network's row runs its tests of equality, all their cases, and keeps the
largest number that they compare with a limit; a pipeline's row is a case of ``tests/parity/test_pipelines_*.py``.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
import transformers
from tests.parity import test_pipelines_dit, test_pipelines_lora, test_pipelines_sd
from tests.parity.pipelines import Case

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
MEASURES = ("error", "relative", "worst", "parity")
"""What the tests of networks call the functions that compare."""
HERE = "a reference written in the test"


@dataclass(frozen=True)
class Net:
    """A network, what it is compared with, and the tests that do it, with some of their cases if not all."""

    title: str
    ours: str
    theirs: str
    module: str
    tests: tuple[str, ...] = ("test_equals_diffusers",)
    only: tuple[str, ...] = ()
    """Names of shapes in the test's module; empty: all."""


UNET, MMDIT, FLUX = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
NETS = (
    Net("U-Net, SD 1", "unet.UNet", UNET, "test_unet", only=("SD1",)),
    Net("U-Net, SD 2", "unet.UNet", UNET, "test_unet", only=("SD2",)),
    Net("U-Net, SDXL", "unet.UNet", UNET, "test_unet", only=("SDXL",)),
    Net("U-Net, x4 upscaler", "unet.UNet", UNET, "test_unet", only=("UPSCALER",)),
    Net("Autoencoder, 4 channels", "vae.Vae", "AutoencoderKL", "test_vae", only=("SMALL",)),
    Net("Autoencoder, 16 channels", "vae.Vae", "AutoencoderKL", "test_vae", only=("RAW16",)),
    Net("CLIP text", "clip.ClipText", "CLIPTextModel(WithProjection)", "test_clip",
        ("test_equals_transformers", "test_mask_hides_tokens_as_transformers_does")),
    Net("OpenCLIP text", "clip.OpenClipText", "CLIPTextModel(WithProjection)", "test_clip",
        ("test_openclip_equals_transformers",)),
    Net("CLIP vision", "clip_vision.ClipVision", "CLIPVisionModelWithProjection", "test_clip_vision",
        ("test_equals_transformers",)),
    Net("T5 encoder", "t5.T5Encoder", "T5EncoderModel", "test_t5",
        ("test_equals_transformers", "test_equals_transformers_with_heads_of_64")),
    Net("MMDiT, SD 3 medium", "mmdit.MMDiT", MMDIT, "test_mmdit", only=("MEDIUM",)),
    Net("MMDiT, SD 3.5 large", "mmdit.MMDiT", MMDIT, "test_mmdit", only=("LARGE",)),
    Net("MMDiT, SD 3.5 medium", "mmdit.MMDiT", MMDIT, "test_mmdit", only=("MEDIUM_35",)),
    Net("FLUX.1 dev", "flux.Flux", FLUX, "test_flux", only=("DEV", "WIDE")),
    Net("FLUX.1 schnell", "flux.Flux", FLUX, "test_flux", only=("SCHNELL",)),
    Net("FLUX.1 Fill", "flux.Flux", FLUX, "test_flux", only=("FILL",)),
    Net("FLUX.1 Canny, Depth", "flux.Flux", FLUX, "test_flux", only=("CONTROL",)),
    Net("DiT", "dit.DiT", "DiTTransformer2DModel", "test_dit"),
    Net("DDPM", "ddpm.PixelUNet", "UNet2DModel", "test_ddpm"),
    Net("Cascade, stages B and C", "cascade.StageB, StageC", "StableCascadeUNet", "test_cascade",
        ("test_equals_diffusers", "test_what_is_rarely_told_equals_diffusers")),
    Net("Cascade, stage A", "paella.Paella", "PaellaVQModel", "test_paella",
        ("test_equals_diffusers", "test_full_width_equals_diffusers")),
    Net("ControlNet, U-Net", "controlnet.ControlNet", "ControlNetModel", "test_controlnet",
        ("test_equals_diffusers", "test_with_its_unet_equals_diffusers")),
    Net("ControlNet, FLUX.1", "control_dit.FluxControlNet", "FluxControlNetModel", "test_control_dit",
        ("test_flux_equals_diffusers",)),
    Net("ControlNet, SD 3", "control_dit.SD3ControlNet", "SD3ControlNetModel", "test_control_dit",
        ("test_sd3_equals_diffusers",)),
    Net("T2I-Adapter", "adapters.T2IAdapter", "T2IAdapter", "test_adapters",
        ("test_t2i_equals_diffusers", "test_unet_with_features_equals_diffusers")),
    Net("IP-Adapter", "ip_adapter.IPAdapter", "UNet2DConditionModel with image prompts", "test_adapters",
        ("test_ip_adapter_equals_diffusers", "test_two_pictures_equal_diffusers")),
    Net("Cascade, EfficientNet encoder", "effnet.EffNet", HERE, "test_effnet",
        ("test_equals_the_reference", "test_the_published_sizes_equal_the_reference")),
    Net("Cascade, previewer", "effnet.Previewer", HERE, "test_effnet",
        ("test_the_previewer_equals_the_reference",)),
    Net("Cascade, ControlNets", "cascade_control.CascadeControl", HERE, "test_cascade_control",
        ("test_equals_the_reference",)),
)  # fmt: skip


class Asserted(float):
    """A measured difference that is kept where a test says that it must be small, and only there."""

    seen: ClassVar[list[float]] = []

    def __le__(self, limit: float) -> bool:
        Asserted.seen.append(float(self))
        return super().__le__(limit)


def marked(measure: Callable[..., float]) -> Callable[..., Asserted]:
    return lambda *args, **named: Asserted(measure(*args, **named))


def cases(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Every combination of a test's parameters."""
    axes = []
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names, values = mark.args
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            rows = [getattr(value, "values", value) if hasattr(value, "marks") else value for value in values]
            axes.append(
                [dict(zip(names, row if len(names) > 1 or hasattr(value, "marks") else (row,), strict=True))
                 for row, value in zip(rows, values, strict=True)]
            )  # fmt: skip
    for chosen in itertools.product(*axes):
        yield {name: value for part in chosen for name, value in part.items()}


def measured(net: Net) -> tuple[float, int]:
    """The largest difference, and how many cases were run."""
    module = importlib.import_module(f"tests.nets.{net.module}")
    shapes = [getattr(module, name) for name in net.only]
    Asserted.seen.clear()
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in MEASURES:
            if hasattr(module, name):
                patch.setattr(module, name, marked(getattr(module, name)))
        for name in net.tests:
            test = getattr(module, name)
            for given in cases(test):
                if shapes and not any(value is shape for value in given.values() for shape in shapes):
                    continue
                if "monkeypatch" in inspect.signature(test).parameters:
                    given["monkeypatch"] = patch
                try:
                    test(**given)
                except pytest.skip.Exception:
                    continue
                count += 1
    return max(Asserted.seen), count


def whole(case: Case) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return case.measure(Path(folder))


def number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def machine() -> str:
    """In words, as far as the operating system tells."""
    cores = os.cpu_count() or 1
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {cores} core{'s' * (cores > 1)}, {gpu}"


TEXT = """\
# Parity with diffusers and transformers

Written by `python -m benchmarks.parity`; numbers as measured, in float32, with torch {torch}, diffusers {diffusers},
transformers {transformers} on {machine}. Solvers have a page of their own, [solvers.md](solvers.md).

Both sides have the same random weights in all parameters, in small networks of the published kind. A number is the
largest difference in units of the largest value, max |ours - theirs| / max |theirs|, the worst of all cases. Float32
resolves 1.2e-7; 0 means the same bits, where both ask the same kernels of torch in the same order.

What this does not show: numbers of the published weights, which are no part of these tests. Names and shapes are
tested against inventories of the published files, numbers in small.

## Networks

{nets}

## Whole pipelines

A pipeline of diffusers is made small and random, saved as a folder, and opened with `sumuk.load`. Both draw the same
prompt from the same noise, 96 x 128 pixels (DiT 128 x 128, Cascade 256 x 256) in 5 steps, and the latents that the
decoder gets are compared, or pixels where it says so.

{pipelines}

## Where both differ by design

The tests bring the two sides together in these places, on the side that is named.

- **The start.** Where diffusers begins with noise at its full strength, we begin at the first level's sigma, which in
  Stable Diffusion is 0.2 % less. The pipeline is given that.
- **The end.** A walk here ends at the clean picture, in diffusers `set_alpha_to_one=True`. Published DDIM and PNDM
  configurations of SD 1 and 2 stop at the least trained level instead.
- **Pictures given** (image to image, inpainting, ControlNet's latents): diffusers draws a latent from the
  autoencoder's Gaussian, we take its mean. The pipeline is given the mean.
- **Inpainting at strength 1**: diffusers then begins with noise alone, we with noise on the picture, as at any
  other strength. The comparison is at 0.8.
- **DiT**: two constants of diffusers' class are not the original's, the frequencies of time and an epsilon; the oracle
  is given the original's. Its pipeline guides all four channels, the original's code and ours three; ours is told four.
- **Cascade**: diffusers' scheduler knows no shift, the original's stage C walks with a shift of 2; ours is told 1. Its
  first step tells the network time 1 and its last step keeps 1 % of noise, the original's do neither; the oracle is
  told so. Stage A's latents are scaled by 0.43, as in the original, where a diffusers folder says 0.3764.
"""


def main() -> None:
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    nets, pipelines = [], []
    for net in NETS:
        value, count = measured(net)
        theirs = net.theirs if net.theirs == HERE else f"`{net.theirs}`"
        nets.append([net.title, f"`{net.ours}`", theirs, str(count), number(value)])
        print(*nets[-1], sep="  ", flush=True)
    for case in (*test_pipelines_sd.HERE, *test_pipelines_dit.HERE, *test_pipelines_lora.HERE):
        value = whole(case)
        excess = f" (**fails**: limit {number(case.limit)})" if value > case.limit else ""
        pipelines.append([case.name, f"`{case.pipeline}`", case.how, number(value) + excess])
        print(*pipelines[-1], sep="  ", flush=True)
    text = TEXT.format(
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        machine=machine(),
        nets="\n".join(table(["network", "ours", "compared with", "cases", "difference"], nets)),
        pipelines="\n".join(table(["model", "pipeline", "how", "difference"], pipelines)),
    )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
