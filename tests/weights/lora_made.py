"""Checkpoints and LoRAs of the zoo's tiny models as files, and what a LoRA's file adds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tests.weights.lora_files import SPELLINGS, applied, make, model, natives, save, shapes
from tests.weights.tiny import weights
from torch import Tensor

import sumuk
from sumuk.weights.changes import make_change
from sumuk.weights.lora import Lora, Patch, read_lora
from sumuk.weights.lora_writing import write_lora

SD1 = "sd1/text-to-image"
KEYS = (SD1, "sdxl/base", "flux/dev", "sd3/medium")
EVEN = "denoiser.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
"""A matrix of SD1."""


@cache
def spelt(key: str, spelling: str = "kohya", seed: int = 0) -> dict[str, Tensor]:
    return make(key, SPELLINGS[spelling], seed)[0]


def lora(
    path: Path, key: str = SD1, spelling: str = "kohya", seed: int = 0, only: str = "", **more: Any
) -> Path:
    return save(path, {n: one for n, one in spelt(key, spelling, seed).items() if only in n}, **more)


def checkpoint(path: Path, key: str = SD1, layout: str = "single", **more: Any) -> Path:
    sumuk.save(model(key), path, layout=layout, **more)
    return path


def loaded(path: Path) -> dict[str, Tensor]:
    return weights(sumuk.load(path))


def read(path: Path, key: str = SD1) -> Lora:
    return read_lora(path, model(key).family, shapes(natives(key)))


def deltas(path: Path, key: str = SD1) -> dict[str, Tensor]:
    """What a LoRA adds to each native tensor, in float64."""
    zeros = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in natives(key).items()}
    made = applied(zeros, read(path, key).patches)
    return {name: one for name, one in made.items() if bool(one.any())}


def size(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(one.double().square().sum()) for one in tensors.values()) ** 0.5


def error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative, of all tensors together."""
    assert found.keys() == expected.keys()
    return size({name: found[name] - expected[name] for name in found}) / size(expected)


def loha(path: Path) -> Path:
    """Of two layers, one of which is zero."""
    torch.manual_seed(1)
    patches = []
    for i, which in enumerate(("to_q", "to_k")):
        name = EVEN.replace("to_q", which).partition(".")[2]
        sides = natives(SD1)[f"denoiser.{name}"].shape
        factors = {f"hada_{w}_{s}": torch.randn(*((sides[0], 3) if s == "a" else (3, sides[1])))
                   for w in ("w1", "w2") for s in "ab"}  # fmt: skip
        factors["hada_w1_a"] *= 1 - i
        patches.append(Patch("denoiser", name, None, make_change(factors, tuple(sides), name), name))
    write_lora(path, patches, "kohya", model(SD1).family, shapes(natives(SD1)))
    return path
