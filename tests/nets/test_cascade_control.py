"""Stable Cascade's ControlNets: published names, parity with references written on their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.nets.inventories import inventory, shapes_of
from tests.nets.test_effnet import SMALL, reference_backbone, relative, shaken, table_of
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.cascade_control import (
    PLACES,
    CascadeControl,
    CascadeControlShape,
    PlainShape,
    cascade_control_shape,
)
from sumuk.nets.effnet import BackboneShape

AT = (0, 2, 5)


def effnet_control(channels: int) -> CascadeControlShape:
    return CascadeControlShape(backbone=replace(SMALL.backbone, channels=channels), width=14, places=AT)


PLAIN = CascadeControlShape(
    backbone=PlainShape(channels=4, hidden=48, width=12, depth=2, features=20), width=14, places=AT
)
EVERY = pytest.mark.parametrize(
    "shape", [effnet_control(1), effnet_control(3), effnet_control(4), PLAIN], ids=["1", "rgb", "4", "plain"]
)


def projected(state: dict[str, Tensor], x: Tensor, place: int) -> Tensor:
    h = torch.einsum("bchw,dc->bdhw", x, state[f"projections.{place}.0.weight"].flatten(1))
    h = h.clamp(min=0) + 0.2 * h.clamp(max=0)
    return torch.einsum("bchw,dc->bdhw", h, state[f"projections.{place}.2.weight"].flatten(1))


def plain_backbone(state: dict[str, Tensor], x: Tensor, depth: int) -> Tensor:
    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"backbone.{name}.weight"]
        return F.conv2d(x, weight, state[f"backbone.{name}.bias"], padding=weight.shape[-1] // 2)

    x = conv("0", x)
    x = conv("2", x.clamp(min=0) + 0.2 * x.clamp(max=0))
    for block in range(3, 3 + depth):
        h = x
        for norm, place in ((0, 2), (3, 5)):
            mean, var = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
            name = f"backbone.{block}.blocks.{norm}"
            h = (h - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"][:, None, None]
            h = h + state[f"{name}.bias"][:, None, None]
            h = conv(f"{block}.blocks.{place}", 0.5 * h * (1 + torch.erf(h / 2**0.5)))
        x = x + h
    return conv(str(3 + depth), x)


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("canny", BackboneShape(channels=1)),
        ("inpainting", BackboneShape(channels=4)),
        ("super_resolution", PlainShape()),
    ],
)
def test_names_and_shapes_are_the_published_ones(name: str, backbone: BackboneShape | PlainShape) -> None:
    published = inventory(f"cascade_controlnet_{name}")
    shape = cascade_control_shape(published)
    assert shape == CascadeControlShape(backbone=backbone) and shape.width == 2048
    with torch.device("meta"):
        assert shapes_of(CascadeControl(shape)) == published


@EVERY
def test_shape_is_read_back_from_any_header(shape: CascadeControlShape) -> None:
    with torch.device("meta"):
        shapes = shapes_of(CascadeControl(shape))
    assert cascade_control_shape(shapes, AT) == shape
    with pytest.raises(BadFile, match=r"3 projections.* 8 places"):
        cascade_control_shape(shapes)


@pytest.mark.parametrize(
    "key",
    [
        "backbone.0.weight",
        "backbone.2.weight",
        "backbone.4.blocks.0.weight",
        "projections.0.2.weight",
        "projections.1.2.weight",
    ],
)
def test_a_header_that_lacks_something_is_refused(key: str) -> None:
    with torch.device("meta"):
        shapes = shapes_of(CascadeControl(PLAIN))
    del shapes[key]
    with pytest.raises(BadFile, match=r"tensor|projections"):
        cascade_control_shape(shapes, AT)


@EVERY
@pytest.mark.parametrize("size", [(64, 96), (45, 71)], ids=["even", "odd"])
@torch.no_grad()
def test_equals_the_reference(shape: CascadeControlShape, size: tuple[int, int]) -> None:
    net = shaken(CascadeControl(shape))
    hint = torch.rand(2, shape.backbone.channels, *size)
    state, kind = net.state_dict(), shape.backbone
    if isinstance(kind, PlainShape):
        read = plain_backbone(state, hint, kind.depth)
    else:
        read = reference_backbone(state, hint, table_of(kind), pad=int(kind.channels == 3))
    maps = net(hint)
    assert len(maps) == len(AT)
    for place, found in enumerate(maps):
        assert found.shape == (2, 14, *read.shape[2:])
        assert relative(found, projected(state, read, place)) <= 2e-6


@torch.no_grad()
def test_a_published_size_of_hint_gives_a_map_as_large_as_a_32nd() -> None:
    for channels in (1, 3, 4):
        with torch.device("meta"):
            maps = CascadeControl(effnet_control(channels))(torch.zeros(1, channels, 1024, 768))
        assert {tuple(found.shape) for found in maps} == {(1, 14, 32, 24)}


@EVERY
@torch.no_grad()
def test_an_untrained_one_adds_nothing(shape: CascadeControlShape) -> None:
    net = CascadeControl(shape).eval()
    assert not any(found.any() for found in net(torch.rand(1, shape.backbone.channels, 8, 8)))


@EVERY
@torch.no_grad()
def test_bfloat16_changes_only_the_rounding(shape: CascadeControlShape) -> None:
    net, hint = shaken(CascadeControl(shape)), torch.rand(1, shape.backbone.channels, 40, 64)
    want = net(hint)
    for got, wanted in zip(net.bfloat16()(hint.bfloat16()), want, strict=True):
        assert got.dtype == torch.bfloat16 and relative(got.float(), wanted) <= 0.1


def test_what_does_not_fit_is_refused() -> None:
    with torch.device("meta"):
        canny = CascadeControl(effnet_control(1))
        with pytest.raises(BadInput, match=r"\[B, 1, height, width\]"):
            canny(torch.zeros(1, 3, 64, 64))
        with pytest.raises(BadInput, match="3 a side"):
            canny(torch.zeros(1, 1, 2, 64))
    with pytest.raises(BadInput, match="in order"):
        replace(PLAIN, places=(4, 0))
    with pytest.raises(BadInput, match="places"):
        replace(PLAIN, places=())
    assert PLACES == (0, 4, 8, 12, 51, 55, 59, 63)
