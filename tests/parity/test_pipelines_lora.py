"""LoRAs in whole pipelines: worn live and fused here, and loaded by diffusers (with PEFT) there, from the same file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.pipelines import (
    CASES,
    GUIDED,
    PROMPT,
    SIZED,
    Case,
    asked,
    beginning,
    case,
    difference,
    drawn,
    saved,
    unit,
)
from tests.parity.test_pipelines_dit import sd3, sd3_transformer
from tests.parity.test_pipelines_sd import sd1, sdxl
from torch import Tensor, nn

import sumuk
from sumuk.files.tensors import write
from sumuk.weights.live import Worn, fuse

pytest.importorskip("peft")

BEFORE = len(CASES)
RANK, STRENGTH = 3, 0.8


def lora_of(folder: Path, networks: Mapping[str, nn.Module]) -> Path:
    """A file of today's diffusers names for the layers of attentions."""
    torch.manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for prefix, network in networks.items():
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(LAYERS):
                # Gates keep what a transformer's block adds small, so that it takes more to show.
                size = (6 if prefix == "transformer" else 3) * layer.weight.std().item()
                size /= (RANK * layer.in_features) ** 0.5
                tensors[f"{prefix}.{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features)
                tensors[f"{prefix}.{name}.lora_B.weight"] = size * torch.randn(layer.out_features, RANK)
    path = folder / "lora.safetensors"
    write(path, tensors, {"format": "pt"})
    return path


def measured(
    folder: Path,
    pipe: Any,
    parts: tuple[str, ...],
    *,
    fused: bool = False,
    latents: Tensor | None = None,
    **more: Any,
) -> float:
    """One picture by both, with the LoRA at work in each; the plain picture must be another one."""
    saved(pipe, folder / "model")
    path = lora_of(folder, {part: getattr(pipe, part) for part in parts})
    given = {"latents": beginning(pipe.scheduler, unit()) if latents is None else latents, **SIZED}
    plain = asked(pipe, **given)
    pipe.load_lora_weights(str(folder), weight_name=path.name, adapter_name="ink")
    pipe.set_adapters(["ink"], [STRENGTH])
    theirs = asked(pipe, **given)
    assert difference(plain, theirs) > 0.005, "the LoRA would do nothing"
    model = sumuk.load(folder / "model", loras={"ink": path})
    if fused:
        fuse(model, [Worn(model.loras["ink"], "ink", STRENGTH)])
    words = PROMPT if fused else f"{PROMPT}<lora:ink:{STRENGTH}>"
    ours = drawn(model, **(GUIDED | SIZED | {"prompt": words} | more))
    return difference(ours.latents[-1], theirs)


LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "q_proj", "out_proj", "fc1", "fc2")
TOWER, TOWERS = ("unet", "text_encoder"), ("unet", "text_encoder", "text_encoder_2")
LEADING = {"solver": "ddim", "grid": "leading"}


@case("SD 1 with a LoRA, live", "StableDiffusionPipeline", "DDIM, leading, U-Net and text", 2e-5)
def sd1_live(folder: Path) -> float:
    return measured(folder, sd1(), TOWER, **LEADING)


@case("SD 1 with a LoRA, fused", "StableDiffusionPipeline", "DDIM, leading, U-Net and text", 2e-5)
def sd1_fused(folder: Path) -> float:
    return measured(folder, sd1(), TOWER, fused=True, **LEADING)


@case("SDXL with a LoRA, live", "StableDiffusionXLPipeline", "Euler, leading, U-Net and both towers", 2e-5)
def sdxl_live(folder: Path) -> float:
    return measured(folder, sdxl(), TOWERS, solver="euler", grid="leading")


@case("SD 3 with a LoRA, live", "StableDiffusion3Pipeline", "flow Euler, transformer", 2e-5)
def sd3_live(folder: Path) -> float:
    return measured(folder, sd3(sd3_transformer()), ("transformer",), latents=unit(16))


HERE = CASES[BEFORE:]


@pytest.mark.parametrize("case", HERE, ids=lambda case: f"{case.name}, {case.how}")
def test_equals_diffusers(case: Case, tmp_path: Path) -> None:
    assert case.measure(tmp_path) <= case.limit
