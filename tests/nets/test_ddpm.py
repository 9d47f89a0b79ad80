"""The DDPM U-Net against the published names, and against diffusers' UNet2DModel with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.ddpm import pixel_unet_rules
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.ddpm import PixelUNet, PixelUNetShape, pixel_unet_shape

CIFAR10 = PixelUNetShape(
    model_channels=32, channel_mult=(1, 2, 2, 2), attends=(False, True, False, False), num_res_blocks=1
)
LSUN = PixelUNetShape(
    model_channels=32, channel_mult=(1, 1, 2, 4), attends=(False, False, True, False), num_res_blocks=2
)
ODD = PixelUNetShape(
    in_channels=1,
    out_channels=2,
    model_channels=64,
    channel_mult=(1, 3),
    attends=(True, True),
    num_res_blocks=3,
)
FLAT = PixelUNetShape(model_channels=32, channel_mult=(1,), attends=(False,), num_res_blocks=1)
EVERY = pytest.mark.parametrize("shape", [CIFAR10, LSUN, ODD, FLAT], ids=["cifar10", "lsun", "odd", "flat"])


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Every parameter matters, none being zero."""
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(float("norm" in name and "weight" in name), 0.1)


def trained(shape: PixelUNetShape) -> PixelUNet:
    net = PixelUNet(shape).eval()
    randomise(net)
    return net


def inputs(shape: PixelUNetShape, size: tuple[int, int] = (16, 8), batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(batch, shape.in_channels, *size), "t": torch.rand(batch) * 999}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def oracle(shape: PixelUNetShape) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        block_out_channels=shape.widths,
        layers_per_block=shape.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in shape.attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(shape.attends)),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ).eval()
    randomise(net)
    return net


def converted(theirs: nn.Module, shape: PixelUNetShape) -> PixelUNet:
    """Ours with their numbers, brought over by the layout's rules."""
    state = {name: lazy(value) for name, value in theirs.state_dict().items()}
    moved = Layout(*pixel_unet_rules(state)).forward(state)
    assert not moved.unknown and not moved.halves and not moved.ignored
    with torch.device("meta"):
        net = PixelUNet(shape)
    net.load_state_dict({name: one.load() for name, one in moved.tensors.items()}, assign=True)
    return net.eval()


@pytest.mark.parametrize("name", ["ddpm_cifar10", "ddpm_celeba", "ddpm_lsun_bedroom", "ddpm_lsun_church"])
def test_published_names_and_shapes(name: str) -> None:
    published = inventory(name)
    with torch.device("meta"):
        net = PixelUNet(pixel_unet_shape(published))
    assert shapes_of(net) == published
    assert net.shape.model_channels == 128 and net.shape.num_res_blocks == 2
    assert net.shape.attends.count(True) == 1


@pytest.mark.parametrize("shape", [CIFAR10, LSUN, ODD, FLAT, replace(ODD, channel_mult=(2, 1))])
def test_a_miniature_takes_the_same_path(shape: PixelUNetShape) -> None:
    with torch.device("meta"):
        assert pixel_unet_shape(shapes_of(PixelUNet(shape))) == shape


@EVERY
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=["square", "wide"])
@torch.no_grad()
def test_equals_diffusers(shape: PixelUNetShape, size: tuple[int, int]) -> None:
    theirs = oracle(shape)
    ours, given = converted(theirs, shape), inputs(shape, size)
    got, want = ours(**given), theirs(given["x"], given["t"]).sample
    assert got.shape == (2, shape.out_channels, *size)
    assert error(got, want) <= 1e-5


@torch.no_grad()
def test_halving_pads_right_and_below_only() -> None:
    """With a pixel of padding on each side the answer would be another one."""
    theirs = oracle(LSUN)
    given = inputs(LSUN)
    want = converted(theirs, LSUN)(**given)
    for block in theirs.down_blocks[:-1]:
        block.downsamplers[0].padding = 1
        block.downsamplers[0].conv.padding = (1, 1)
    assert error(theirs(given["x"], given["t"]).sample, want) > 0.01


@EVERY
@torch.no_grad()
def test_a_batch_equals_its_members(shape: PixelUNetShape) -> None:
    net, given = trained(shape), inputs(shape, batch=3)
    together = net(**given)
    for i in range(3):
        alone = net(**{name: tensor[i : i + 1] for name, tensor in given.items()})
        assert error(alone, together[i : i + 1]) <= 1e-5


@EVERY
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (15, 8)])
@torch.no_grad()
def test_any_size_runs(shape: PixelUNetShape, size: tuple[int, int]) -> None:
    out = trained(shape)(**inputs(shape, size))
    assert out.shape == (2, shape.out_channels, *size)
    assert out.isfinite().all()


@torch.no_grad()
def test_bfloat16_changes_only_the_rounding() -> None:
    net, given = trained(CIFAR10), inputs(CIFAR10)
    want = net(**given)
    got = net.bfloat16()(given["x"].bfloat16(), given["t"])
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert error(got.float(), want) <= 0.05


@torch.no_grad()
def test_time_and_picture_matter() -> None:
    net, given = trained(CIFAR10), inputs(CIFAR10)
    before = net(**given)
    for name, tensor in given.items():
        assert error(net(**given | {name: tensor + 0.5}), before) > 1e-4, name


def test_an_untrained_network_predicts_zero_and_learns() -> None:
    net = PixelUNet(CIFAR10)
    given = inputs(CIFAR10)
    assert net(**given).abs().max() == 0
    (net(**given) - 1).square().mean().backward()
    assert net.conv_out.weight.grad is not None and net.conv_out.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 8\)"),
        ({"x": torch.zeros(3, 8, 8)}, r"\(3, 8, 8\)"),
        ({"x": torch.zeros(2, 3, 8, 7)}, "at least 8"),
        ({"t": torch.zeros(3)}, r"time of shape \(3,\)"),
        ({"t": torch.zeros(())}, "time of shape"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PixelUNet(CIFAR10)(**inputs(CIFAR10, (8, 8)) | change)


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("conv_in.weight", None),
        ("conv_in.weight", (32,)),
        ("conv_in.weight", (33, 3, 3, 3)),
        ("conv_in.weight", (2**40, 3, 3, 3)),
        ("conv_out.weight", None),
        ("conv_out.weight", (0, 32, 3, 3)),
        ("down.0.block.0.conv1.weight", None),
        ("down.1.block.0.conv1.weight", (65, 32, 3, 3)),
        ("down.2.block.0.conv1.weight", (0, 64, 3, 3)),
        ("down.2.block.1.conv1.weight", None),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(key: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(PixelUNet(LSUN))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile) as caught:
        pixel_unet_shape(shapes)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": 40}, "40"),
        ({"attends": (True,)}, "one entry per level"),
        ({"channel_mult": (), "attends": ()}, "one entry per level"),
        ({"num_res_blocks": 0}, "at least 1"),
        ({"channel_mult": (1, 2, 0, 2)}, "at least 1"),
    ],
)
def test_contradictory_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(CIFAR10, **change)
