"""Small U-Nets of SD 2 and SDXL, and diffusers' network with their weights, converted by our own layout."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch
from tests.nets.inventories import KEYS
from torch import Tensor

import sumuk.families.sd2
import sumuk.families.sdxl  # noqa: F401  # they register themselves
from sumuk.families.family import FAMILIES, Arrangement, Part
from sumuk.files.layout import Layout
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.unet import UNet, UNetShape


def lazies(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> Tensors:
    return {prefix + name: Lazy(shape, "F16", lambda: torch.empty(0)) for name, shape in shapes.items()}


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in tensors.items()}


def truth(name: str) -> dict[str, str]:
    """diffusers key -> original key, from an independent converter."""
    path = KEYS / "maps" / f"{name}__to_diffusers.json.gz"
    if not path.exists():
        pytest.skip(f"{name} map absent")
    return json.loads(gzip.decompress(path.read_bytes()))["map"]


def published_config(name: str) -> dict[str, Any]:
    """What the published ``config.json`` says."""
    path = KEYS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name} inventory absent")
    return json.loads(path.read_text())["config"]


def check_map(part: Part, name: str, published: dict[str, tuple[int, ...]]) -> int:
    """Every published diffusers key lands on its original key, and back; returns how many."""
    wanted = truth(name)
    foreign = Layout(*part.diffusers(published)).backward(lazies(published))
    assert not foreign.unknown and not foreign.ignored
    assert {key: origin for key, (origin,) in foreign.origin.items()} == wanted
    moved = Layout(*part.diffusers(foreign.tensors)).forward(foreign.tensors)
    assert shapes(moved.tensors) == published and not moved.unknown
    assert {origin: key for key, (origin,) in moved.origin.items()} == wanted
    return len(wanted)


NEAR = [FAMILIES[name] for name in FAMILIES if name.startswith(("sd1/", "sd2/", "sdxl/"))]
"""The families with this network; all others are tried where the whole file is."""


def known(arrangement: Arrangement, tensors: Tensors, prefix: str = "") -> list[str]:
    """Which of them recognise what lies under a prefix as a single network; nothing may be left over."""
    own = {name[len(prefix) :]: one for name, one in tensors.items() if name.startswith(prefix)}
    moved = arrangement.layout(own).forward(own)
    assert not moved.unknown and not moved.halves
    return [family.key for family in NEAR if family.recognise(shapes(moved.tensors)) is None]


def trained(shape: UNetShape, seed: int = 0) -> UNet:
    """A U-Net none of whose numbers is zero."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        net = UNet(shape)
    net.to_empty(device="cpu").eval().requires_grad_(False)
    for name, value in net.named_parameters():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        else:
            value.normal_(float("norm" in name or "layers.0.weight" in name or name == "out.0.weight"), 0.1)
    return net


def header(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def oracle(part: Part, net: UNet) -> Any:
    """diffusers' network, made from our ``config.json`` and filled through our layout."""
    diffusers = pytest.importorskip("diffusers")
    native = {name: lazy(value) for name, value in net.state_dict().items()}
    moved = Layout(*part.diffusers(native)).backward(native)
    assert not moved.unknown and not moved.ignored
    config = {key: value for key, value in part.config(header(net)).items() if key != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config)
    theirs.load_state_dict(
        {name: one.load() for name, one in moved.tensors.items()}, strict=True, assign=True
    )
    return theirs.eval().requires_grad_(False)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
