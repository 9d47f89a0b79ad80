"""Stable Cascade's stages B and C: published names, diffusers' numbers, and what every denoiser must do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.cascade_parts import DECODER, PRIOR
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.cascade import StageB, StageC, stage_b_shape, stage_c_shape
from sumuk.nets.cascade_blocks import ConvBlock, Response, resized
from sumuk.nets.cascade_shape import CascadeShape, StageBShape, StageCShape

C = StageCShape(
    in_channels=16,
    out_channels=16,
    patch=1,
    widths=(64, 128),
    down=(2, 1),
    up=(1, 2),
    attends=(True, True),
    down_repeats=(1, 1),
    up_repeats=(1, 1),
    cond_width=40,
    pooled_width=24,
    text_width=20,
    image_width=12,
    times=("sca", "crp"),
)
B = StageBShape(
    in_channels=4,
    out_channels=4,
    patch=2,
    widths=(32, 48, 64, 128),
    down=(1, 1, 2, 1),
    up=(1, 2, 1, 1),
    attends=(False, False, True, True),
    down_repeats=(1, 2, 1, 1),
    up_repeats=(3, 3, 2, 2),
    cond_width=40,
    pooled_width=24,
)
STAGES = {"c": (StageC, C, PRIOR, stage_c_shape), "b": (StageB, B, DECODER, stage_b_shape)}
EVERY = pytest.mark.parametrize("stage", STAGES)


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, none of them zero."""
    torch.manual_seed(seed)
    net = net.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in net.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.3
        parameter.normal_(0, spread)
    return net


def built(stage: str) -> Any:
    kind, shape, _, _ = STAGES[stage]
    with torch.device("meta"):
        net = kind(shape)
    return trained(net)


def inputs(stage: str, batch: int = 2, size: tuple[int, int] = (8, 16)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shape: Any = STAGES[stage][1]
    given = {
        "x": torch.randn(batch, shape.in_channels, *size),
        "t": torch.rand(batch),
        "clip_text_pooled": torch.randn(batch, 1, shape.pooled_width),
    }
    if stage == "c":
        given["clip_text"] = torch.randn(batch, 7, shape.text_width)
        given["clip_img"] = torch.randn(batch, 1, shape.image_width)
    else:
        given["effnet"] = torch.randn(batch, shape.effnet_channels, 3, 5)
    return given


SIZES = {"c": [(8, 16), (7, 5), (1, 1)], "b": [(16, 32), (18, 22), (46, 34)]}
EVERY_SIZE = pytest.mark.parametrize(("stage", "size"), [(s, size) for s in SIZES for size in SIZES[s]])


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((got - want).abs().max() / want.abs().max())


# -- names and shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        (
            "cascade_stage_c_3.6b",
            "c",
            StageCShape(
                in_channels=16, out_channels=16, patch=1, widths=(2048, 2048), down=(8, 24), up=(8, 24),
                attends=(True, True), down_repeats=(1, 1), up_repeats=(1, 1), cond_width=2048,
                times=("sca", "crp"),
            ),
        ),
        (
            "cascade_stage_c_1b",
            "c",
            StageCShape(
                in_channels=16, out_channels=16, patch=1, widths=(1536, 1536), down=(4, 12), up=(4, 12),
                attends=(True, True), down_repeats=(1, 1), up_repeats=(1, 1), cond_width=1536,
                times=("sca", "crp"),
            ),
        ),
        (
            "cascade_stage_b_1.5b",
            "b",
            StageBShape(
                in_channels=4, out_channels=4, patch=2, widths=(320, 640, 1280, 1280), down=(2, 6, 28, 6),
                up=(2, 6, 28, 6), attends=(False, False, True, True), down_repeats=(1, 1, 1, 1),
                up_repeats=(2, 2, 3, 3), cond_width=1280,
            ),
        ),
        (
            "cascade_stage_b_700m",
            "b",
            StageBShape(
                in_channels=4, out_channels=4, patch=2, widths=(320, 576, 1152, 1152), down=(2, 4, 14, 4),
                up=(2, 4, 14, 4), attends=(False, False, True, True), down_repeats=(1, 1, 1, 1),
                up_repeats=(2, 2, 2, 2), cond_width=1280,
            ),
        ),
    ],
)  # fmt: skip
def test_published_names_and_shapes(name: str, stage: str, expected: CascadeShape) -> None:
    published = inventory(name)
    kind, _, _, read = STAGES[stage]
    shape = read(dict(sorted(published.items())))  # a file may list its tensors in any order
    assert shape == expected
    with torch.device("meta"):
        assert shapes_of(kind(shape)) == published


@EVERY
def test_a_miniature_takes_the_same_path(stage: str) -> None:
    kind, shape, _, read = STAGES[stage]
    with torch.device("meta"):
        net = kind(shape)
    assert read(shapes_of(net)) == shape and net.shape == shape


ATTENTION = "down_blocks.2.2.attention.attn.in_proj_weight"


@pytest.mark.parametrize(
    ("stage", "key", "size"),
    [
        ("b", "clip_mapper.weight", None),
        ("b", "clip_mapper.weight", (161, 24)),
        ("b", "effnet_mapper.0.weight", None),
        ("b", "embedding.1.weight", (32,)),
        ("b", "embedding.1.weight", (2**40, 16, 1, 1)),
        ("b", "clf.1.weight", (17, 32, 1, 1)),
        ("b", ATTENTION, None),
        ("b", ATTENTION, (192, 63)),
        ("b", "down_blocks.0.0.depthwise.weight", (32, 1, 4, 4)),
        ("b", "down_blocks.0.1.mapper.weight", None),
        ("b", "up_repeat_mappers.0.0.weight", None),
        ("b", "up_blocks.1.0.channelwise.0.weight", (256, 64)),
        ("b", "lora_up.weight", (4, 4)),
        ("c", "clip_txt_mapper.weight", None),
        ("c", "clip_img_mapper.weight", (160,)),
        ("c", "up_upscalers.0.1.blocks.1.weight", None),
        ("c", "down_blocks.0.1.mapper_crp.weight", (128, 63)),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(
    stage: str, key: str, size: tuple[int, ...] | None
) -> None:
    kind, shape, _, read = STAGES[stage]
    with torch.device("meta"):
        shapes = shapes_of(kind(shape))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile, match="tensor ") as caught:
        read(shapes)
    assert key.removesuffix(".weight") in str(caught.value)


@EVERY
def test_headers_of_something_else_are_refused(stage: str) -> None:
    read = STAGES[stage][3]
    for shapes in ({}, {"down_blocks.0.0.depthwise.weight": (64, 1, 3, 3)}):
        with pytest.raises(BadFile, match="missing"):
            read(shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": (1,)}, "every level"),
        ({"widths": (), "attends": ()}, "every level"),
        ({"down_repeats": (1, 0)}, "at least 1"),
        ({"kernel": 2}, "side 2"),
        ({"time_width": 7}, "time_width 7"),
        ({"widths": (64, 100)}, "width 100 is not a multiple of 64"),
    ],
)
def test_contradictory_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(C, **change)


# -- numbers -------------------------------------------------------------------------------------------------------


def pair(stage: str) -> tuple[Any, nn.Module]:
    """Ours and diffusers' network with the same weights, which come from theirs by our layout rules."""
    diffusers = pytest.importorskip("diffusers")
    kind, shape, part, _ = STAGES[stage]
    with torch.device("meta"):
        ours = kind(shape)
    config = part.config(shapes_of(ours))
    assert config.pop("_class_name") == "StableCascadeUNet"
    with torch.device("meta"):
        theirs = diffusers.StableCascadeUNet(**config)
    theirs = trained(theirs)
    foreign = theirs.state_dict()
    moved = Layout(*part.diffusers(foreign)).forward({key: lazy(value) for key, value in foreign.items()})
    moved.refuse_leftovers("diffusers")
    ours.load_state_dict({key: one.load() for key, one in moved.tensors.items()}, strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def asked(theirs: nn.Module, given: Mapping[str, Tensor], **more: Any) -> Tensor:
    named = {**given, "sample": given["x"], "timestep_ratio": given["t"], **more}
    del named["x"], named["t"]
    return theirs(**named).sample


@EVERY_SIZE
@torch.no_grad()
def test_equals_diffusers(stage: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(stage)
    given = inputs(stage, size=size)
    got = ours(**given)
    assert got.shape == given["x"].shape
    assert error(got, asked(theirs, given)) <= 2e-6


@torch.no_grad()
def test_what_is_rarely_told_equals_diffusers() -> None:
    ours, theirs = pair("c")
    given = inputs("c", batch=1)
    given |= {
        "sca": torch.tensor([0.3]),
        "crp": torch.tensor([0.8]),
        "clip_img": torch.randn(1, 3, C.image_width),
    }
    assert error(ours(**given), asked(theirs, given)) <= 2e-6
    ours, theirs = pair("b")
    given = inputs("b", batch=1, size=(18, 22)) | {
        "sca": torch.tensor([0.3]),
        "pixels": torch.rand(1, 3, 7, 6),
    }
    assert error(ours(**given), asked(theirs, given)) <= 2e-6


@EVERY
@torch.no_grad()
def test_control_residuals_enter_each_convolution_block(stage: str) -> None:
    net, given = built(stage), inputs(stage, size=(18, 22))
    plain = net(**given)
    maps: list[Tensor | None] = []

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        extra = torch.randn(2, args[0].shape[1], 3, 4)
        maps.append(extra if len(maps) % 3 else None)  # a control leaves most places out
        return args if maps[-1] is None else (args[0] + resized(extra, args[0].shape[-2:]), *args[1:])

    hooks = [m.register_forward_pre_hook(add) for m in net.modules() if isinstance(m, ConvBlock)]
    want = net(**given)
    for hook in hooks:
        hook.remove()
    shape = STAGES[stage][1]
    runs = [n * r for n, r in zip(shape.down + shape.up, shape.down_repeats + shape.up_repeats, strict=True)]
    assert len(maps) == sum(runs)
    assert error(net(**given, residuals=maps), want) <= 1e-6
    assert error(net(**given, residuals=maps), plain) > 0.01
    assert torch.equal(net(**given, residuals=[None]), plain)
    with pytest.raises(BadInput, match=f"{len(maps) + 2} control residuals, but only {len(maps)} blocks"):
        net(**given, residuals=[*maps, None, None])


def test_response_normalisation_is_the_papers() -> None:
    torch.manual_seed(0)
    norm, x = Response(3), torch.randn(2, 4, 5, 3)
    assert torch.equal(norm(x), x)
    nn.init.normal_(norm.gamma)
    nn.init.normal_(norm.beta)
    length = x.square().sum(dim=(1, 2)).sqrt()
    share = length / length.mean(dim=1, keepdim=True)
    want = norm.gamma * x * share[:, None, None] + norm.beta + x
    torch.testing.assert_close(norm(x), want, atol=1e-5, rtol=1e-5)


# -- laws ----------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_a_batch_equals_its_members(stage: str) -> None:
    net, given = built(stage), inputs(stage, batch=3, size=(16, 22))
    together = net(**given)
    for i in range(3):
        alone = net(**{name: tensor[i : i + 1] for name, tensor in given.items()})
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@EVERY
@torch.no_grad()
def test_every_input_matters(stage: str) -> None:
    net, given = built(stage), inputs(stage, size=(16, 22))
    shape = STAGES[stage][1]
    given |= {name: torch.zeros(2) for name in shape.times}
    if stage == "b":
        given["pixels"] = torch.zeros(2, 3, 4, 4)
    before = net(**given)
    for name, tensor in given.items():
        other = tensor + torch.rand_like(tensor)
        assert error(net(**given | {name: other}), before) > 1e-3, name


@EVERY
@torch.no_grad()
def test_what_is_left_out_is_zero(stage: str) -> None:
    net, given = built(stage), inputs(stage, size=(16, 16))
    shape = STAGES[stage][1]
    more = {name: torch.zeros(2) for name in shape.times}
    if stage == "c":
        more["clip_img"] = torch.zeros(2, 1, C.image_width)
        given.pop("clip_img")
    else:
        more["pixels"] = torch.zeros(2, 3, 8, 8)
    assert error(net(**given, **more), net(**given)) <= 1e-6


@EVERY
@torch.no_grad()
def test_bfloat16(stage: str) -> None:
    net, given = built(stage), inputs(stage, size=(18, 22))
    want = net(**given)
    low = {name: tensor if name == "t" else tensor.bfloat16() for name, tensor in given.items()}
    got = net.bfloat16()(**low)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert error(got.float(), want) <= 0.05
    assert net(**given | {"x": low["x"]}).dtype == torch.bfloat16  # the condition may come in float32


@EVERY
def test_meta_gives_the_shape_without_the_numbers(stage: str) -> None:
    kind, shape, _, _ = STAGES[stage]
    with torch.device("meta"):
        net = kind(shape)
    given = {name: tensor.to("meta") for name, tensor in inputs(stage, size=(16, 18)).items()}
    assert net(**given).shape == given["x"].shape


@EVERY
def test_an_untrained_network_predicts_zero_and_learns(stage: str) -> None:
    torch.manual_seed(0)
    kind, shape, _, _ = STAGES[stage]
    net, given = kind(shape), inputs(stage, size=(16, 16))
    assert not net(**given).any()
    target = torch.randn_like(given["x"])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(5):
        loss = (net(**given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    silent = {"pixels_mapper.0.weight"}  # no pixels, no gradient
    stuck = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(stuck) <= silent


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("c", {"x": torch.zeros(2, 4, 8, 8)}, r"\[B, 16, H, W\], not \(2, 4, 8, 8\)"),
        ("c", {"t": torch.zeros(3)}, r"t of shape \[2\], not \(3,\)"),
        ("c", {"clip_text": torch.zeros(2, 7, 21)}, r"clip_text of shape \[2, n, 20\], not \(2, 7, 21\)"),
        ("c", {"clip_text_pooled": torch.zeros(2, 24)}, r"clip_text_pooled of shape \[2, n, 24\]"),
        ("c", {"clip_img": torch.zeros(1, 1, 12)}, r"clip_img of shape \[2, n, 12\]"),
        ("b", {"x": torch.zeros(2, 4, 17, 16)}, "multiples of 2"),
        ("b", {"x": torch.zeros(2, 4, 14, 16)}, "at least 16 x 16"),
        ("b", {"effnet": torch.zeros(2, 15, 3, 3)}, r"effnet of shape \[2, 16, h, w\], not \(2, 15, 3, 3\)"),
        ("b", {"pixels": torch.zeros(2, 3)}, r"pixels of shape \[2, 3, h, w\]"),
    ],
)
def test_what_does_not_fit_is_refused(stage: str, change: dict[str, Tensor], message: str) -> None:
    kind, shape, _, _ = STAGES[stage]
    with torch.device("meta"):
        net = kind(shape)
    given = {name: one.to("meta") for name, one in {**inputs(stage, size=(16, 16)), **change}.items()}
    with pytest.raises(BadInput, match=message):
        net(**given)


def test_a_time_that_a_stage_does_not_know_is_refused() -> None:
    shape = replace(C, times=("sca",))
    with torch.device("meta"):
        net = StageC(shape)
        given = {name: one.to("meta") for name, one in inputs("c").items()}
        with pytest.raises(BadInput, match="not trained on 'crp'"):
            net(**given, crp=torch.zeros(2))
