"""Stable Cascade's encoder and previewer: published names, parity with references written on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.effnet import (
    MEAN,
    STD,
    BackboneShape,
    EffNet,
    EffNetShape,
    InvertedBlock,
    Previewer,
    PreviewerShape,
    StageShape,
    effnet_pixels,
    effnet_shape,
    previewer_shape,
)

SMALL = EffNetShape(
    backbone=BackboneShape(
        stem=8,
        stages=(
            StageShape(fused=True, width=8, depth=1, expand=1),
            StageShape(fused=True, width=12, depth=2, expand=2),
            StageShape(fused=True, width=12, depth=1, expand=4),
            StageShape(fused=False, width=16, depth=2, expand=2),
            StageShape(fused=False, width=16, depth=2, expand=3),
            StageShape(fused=False, width=20, depth=1, expand=2),
        ),
        features=40,
    ),
    channels=6,
)
TINY_PREVIEW = PreviewerShape(channels=5, width=16, colours=2)

# torchvision's table of efficientnet_v2_s: fused, stride, output channels, blocks. Expansion follows from the weights.
V2_S = [
    (True, 1, 24, 2),
    (True, 2, 48, 4),
    (True, 2, 64, 4),
    (False, 2, 128, 6),
    (False, 1, 160, 9),
    (False, 2, 256, 15),
]


def shaken(net: nn.Module, seed: int = 0) -> Any:
    """Statistics and biases off their 0 and 1; weights small enough that forty blocks do not magnify rounding."""
    torch.manual_seed(seed)
    net.eval().requires_grad_(False)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif value.ndim == 1:
            value.add_(0.3 * torch.randn_like(value))
        else:
            value.normal_(0, value[0].numel() ** -0.5)
    return net


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# -- a reference by functions alone: weights by name, arithmetic from torchvision's published definition --------------


def normed(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
    if f"{name}.weight" in state:
        x = x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
    return x


def layer(
    state: dict[str, Tensor],
    name: str,
    x: Tensor,
    stride: int = 1,
    pad: int | None = None,
    active: bool = True,
) -> Tensor:
    weight = state[f"{name}.0.weight"]
    pad = weight.shape[-1] // 2 if pad is None else pad
    x = F.conv2d(x, weight, stride=stride, padding=pad, groups=x.shape[1] // weight.shape[1])
    x = normed(state, f"{name}.1", x, 1e-3)
    return x * torch.sigmoid(x) if active else x


def reference_backbone(
    state: dict[str, Tensor], x: Tensor, table: list[tuple[bool, int, int, int]], pad: int = 1
) -> Tensor:
    """What torchvision's ``efficientnet_v2_s().features`` computes, from ``backbone.*``."""
    x = layer(state, "backbone.0", x, 2, pad)
    for place, (fused, stride, width, blocks) in enumerate(table, start=1):
        for index in range(blocks):
            name, given, step = f"backbone.{place}.{index}.block", x, stride if index == 0 else 1
            if fused and f"{name}.1.0.weight" in state:
                x = layer(state, f"{name}.0", x, step)
                x = layer(state, f"{name}.1", x, active=False)
            elif fused:
                x = layer(state, f"{name}.0", x, step)
            else:
                x = layer(state, f"{name}.0", x)
                x = layer(state, f"{name}.1", x, step)
                h = x.mean((2, 3))
                h = h @ state[f"{name}.2.fc1.weight"].flatten(1).T + state[f"{name}.2.fc1.bias"]
                h = h * torch.sigmoid(h)
                h = h @ state[f"{name}.2.fc2.weight"].flatten(1).T + state[f"{name}.2.fc2.bias"]
                x = layer(state, f"{name}.3", x * torch.sigmoid(h)[:, :, None, None], active=False)
            assert x.shape[1] == width
            if step == 1 and given.shape == x.shape:
                x = x + given
    return layer(state, f"backbone.{len(table) + 1}", x)


def table_of(shape: BackboneShape) -> list[tuple[bool, int, int, int]]:
    steps = [step for _, step, _, _ in V2_S]
    return [(s.fused, step, s.width, s.depth) for s, step in zip(shape.stages, steps, strict=True)]


# -- names and shapes ----------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_published_ones() -> None:
    published = inventory("cascade_effnet")
    shape = effnet_shape(published)
    assert shape == EffNetShape()
    with torch.device("meta"):
        net = EffNet(shape)
    assert shapes_of(net) == published
    assert sum(value.numel() for value in net.parameters()) == 20_197_968
    assert table_of(shape.backbone) == V2_S and [s.expand for s in shape.backbone.stages] == [
        1,
        4,
        4,
        4,
        6,
        6,
    ]


def test_previewer_names_and_shapes_are_the_published_ones() -> None:
    published = inventory("cascade_previewer")
    shape = previewer_shape(published)
    assert shape == PreviewerShape()
    with torch.device("meta"):
        assert shapes_of(Previewer(shape)) == published


def test_shapes_are_read_back_from_any_header() -> None:
    with torch.device("meta"):
        assert effnet_shape(shapes_of(EffNet(SMALL))) == SMALL
        assert previewer_shape(shapes_of(Previewer(TINY_PREVIEW))) == TINY_PREVIEW


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("backbone.0.0.weight", None),
        ("backbone.0.0.weight", (8,)),
        ("backbone.3.0.block.0.0.weight", None),
        ("backbone.3.0.block.0.0.weight", (47, 12, 3, 3)),
        ("backbone.4.0.block.0.0.weight", (12, 12, 1, 1)),
        ("backbone.5.0.block.3.0.weight", None),
        ("backbone.7.0.weight", (0, 20, 1, 1)),
        ("mapper.0.weight", None),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(key: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(EffNet(SMALL))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile, match="tensor ") as caught:
        effnet_shape(shapes)
    assert key in str(caught.value)


def test_contradictory_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match="6 stages, not 0"):
        BackboneShape(stages=())
    with pytest.raises(BadInput, match="not fused widens"):
        StageShape(fused=False, width=8, depth=1, expand=1)
    with pytest.raises(BadInput, match="depth=0"):
        StageShape(fused=True, width=8, depth=0, expand=1)
    with pytest.raises(BadInput, match="width=6"):
        PreviewerShape(width=6)
    with pytest.raises(BadFile, match=r"blocks\.24\.weight"):
        previewer_shape({"blocks.0.weight": (8, 4, 1, 1)})


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (45, 70), (1, 33)], ids=["even", "odd", "thin"])
@torch.no_grad()
def test_equals_the_reference(size: tuple[int, int]) -> None:
    net = shaken(EffNet(SMALL))
    pixels = torch.randn(2, 3, *size)
    state = net.state_dict()
    features = reference_backbone(state, pixels, table_of(SMALL.backbone))
    want = normed(state, "mapper.1", F.conv2d(features, state["mapper.0.weight"]), 1e-5)
    got = net(pixels)
    assert got.shape == (2, 6, -(-size[0] // 32), -(-size[1] // 32))
    assert relative(net.backbone(pixels), features) <= 2e-6
    assert relative(got, want) <= 2e-6


@torch.no_grad()
def test_the_published_sizes_equal_the_reference() -> None:
    net = shaken(EffNet(EffNetShape()))
    pixels = torch.randn(1, 3, 64, 96)
    want = reference_backbone(net.state_dict(), pixels, V2_S)
    assert relative(net.backbone(pixels), want) <= 2e-6


@pytest.mark.parametrize(("after", "stride"), [(16, 1), (24, 1), (24, 2)])
@torch.no_grad()
def test_a_block_equals_that_of_transformers(after: int, stride: int) -> None:
    """transformers has EfficientNet's first version: the blocks that are not fused are the same."""
    pytest.importorskip("transformers")
    from transformers import EfficientNetConfig
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetBlock

    config = EfficientNetConfig()  # SiLU, eps 1e-3, a quarter of the input in the excitation
    theirs = EfficientNetBlock(
        config, 16, after, stride, 4, kernel_size=3, drop_rate=0.0, id_skip=after != 16, adjust_padding=False
    )
    ours = shaken(InvertedBlock(16, StageShape(fused=False, width=after, depth=1, expand=4), stride))
    names = {
        "expansion.expand_conv": "0.0",
        "expansion.expand_bn": "0.1",
        "depthwise_conv.depthwise_conv": "1.0",
        "depthwise_conv.depthwise_norm": "1.1",
        "squeeze_excite.reduce": "2.fc1",
        "squeeze_excite.expand": "2.fc2",
        "projection.project_conv": "3.0",
        "projection.project_bn": "3.1",
    }
    state = ours.block.state_dict()
    renamed = {}
    for key in theirs.state_dict():
        part, last = key.rsplit(".", 1)
        renamed[key] = state.pop(f"{names[part]}.{last}")
    assert not state
    theirs.eval().load_state_dict(renamed)
    x = torch.randn(2, 16, 13, 9)
    assert relative(ours(x), theirs(x)) <= 2e-6


@torch.no_grad()
def test_the_previewer_equals_the_reference() -> None:
    net = shaken(Previewer(TINY_PREVIEW))
    state = net.state_dict()
    latent = torch.randn(2, 5, 3, 7)
    x = latent
    for place in range(0, 24, 3):
        weight, bias = state[f"blocks.{place}.weight"], state[f"blocks.{place}.bias"]
        if place in (6, 12, 18):  # doubling: each position becomes two by two, nothing overlaps
            parts = torch.einsum("bchw,cdij->bdhiwj", x, weight)
            x = parts.reshape(*parts.shape[:2], 2 * x.shape[2], 2 * x.shape[3]) + bias[:, None, None]
        else:
            x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        x = normed(state, f"blocks.{place + 2}", x, 1e-5)
    want = F.conv2d(x, state["blocks.24.weight"], state["blocks.24.bias"])
    got = net(latent)
    assert got.shape == (2, 2, 24, 56)
    assert relative(got, want) <= 2e-6


def test_pixels_are_normalised() -> None:
    black, white = (
        effnet_pixels(-torch.ones(1, 3, 1, 1)).flatten(),
        effnet_pixels(torch.ones(1, 3, 1, 1)).flatten(),
    )
    torch.testing.assert_close(black, -torch.tensor(MEAN) / torch.tensor(STD))
    torch.testing.assert_close(white - black, 1 / torch.tensor(STD))
    with pytest.raises(BadInput, match=r"\[B, 3, height, width\]"):
        effnet_pixels(torch.zeros(1, 1, 8, 8))


# -- laws ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stored_statistics_are_used_and_kept_in_training() -> None:
    net, pixels = shaken(EffNet(SMALL)), torch.randn(2, 3, 40, 40)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calm = net.eval()(pixels)
    assert torch.equal(net.train()(pixels), calm)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@torch.no_grad()
def test_bfloat16_changes_only_the_rounding() -> None:
    net, pixels = shaken(EffNet(SMALL)), torch.randn(1, 3, 64, 64)
    want = net(pixels)
    got = net.bfloat16()(pixels.bfloat16())
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), want) <= 0.1
    preview = shaken(Previewer(TINY_PREVIEW)).bfloat16()
    assert preview(torch.randn(1, 5, 2, 2, dtype=torch.bfloat16)).isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    with torch.device("meta"):
        net, previewer = EffNet(SMALL), Previewer(TINY_PREVIEW)
        assert (net.stride, previewer.stride) == (32, 8)
        for wrong in (torch.zeros(1, 4, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 0, 32)):
            with pytest.raises(BadInput, match=r"\[B, 3, height, width\]"):
                net(wrong)
        with pytest.raises(BadInput, match=r"\[B, 5, height, width\]"):
            previewer(torch.zeros(1, 16, 4, 4))
