"""MMDiT: published names and shapes, diffusers' numbers, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.sd3 import mmdit_rules
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.mmdit import MMDiT, MMDiTShape, mmdit_shape

MEDIUM = MMDiTShape(width=128, depth=3, context=40, pooled=24, positions=12)
LARGE = replace(MEDIUM, depth=4, qk_norm=True)
MEDIUM_35 = replace(LARGE, dual=2, positions=9)
EVERY = pytest.mark.parametrize(
    "shape", [MEDIUM, LARGE, MEDIUM_35], ids=["medium", "3.5-large", "3.5-medium"]
)


def trained(shape: MMDiTShape, seed: int = 0) -> MMDiT:
    """A network in which every parameter matters, none being zero."""
    generator = torch.Generator().manual_seed(seed)
    net = MMDiT(shape).eval().requires_grad_(False)
    for name, value in net.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        spread = value[0].numel() ** -0.5 if value.ndim > 1 and name != "pos_embed" else 0.5
        value.copy_(1 + 0.3 * noise if "ln_" in name else spread * noise)
    return net


def inputs(shape: MMDiTShape, size: tuple[int, int] = (8, 8), batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch, shape.channels, *size, generator=generator),
        "t": 1000 * torch.rand(batch, generator=generator),
        "context": torch.randn(batch, 7, shape.context, generator=generator),
        "y": torch.randn(batch, shape.pooled, generator=generator),
    }


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def oracle(net: MMDiT) -> Any:
    """The same weights in diffusers' network, through our layout."""
    diffusers = pytest.importorskip("diffusers")
    shape = net.shape
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=shape.patch,
        in_channels=shape.channels,
        out_channels=shape.out_channels,
        num_layers=shape.depth,
        attention_head_dim=64,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.context,
        caption_projection_dim=shape.width,
        pooled_projection_dim=shape.pooled,
        pos_embed_max_size=shape.positions,
        dual_attention_layers=tuple(range(shape.dual)),
        qk_norm="rms_norm" if shape.qk_norm else None,
    )
    native = {name: lazy(value) for name, value in net.state_dict().items()}
    moved = Layout(*mmdit_rules(native)).backward(native)
    assert not moved.unknown and not moved.halves
    theirs.load_state_dict({name: one.load() for name, one in moved.tensors.items()}, strict=True)
    return theirs.eval().requires_grad_(False)


def asked(theirs: Any, given: dict[str, Tensor], **more: Any) -> Tensor:
    return theirs(
        hidden_states=given["x"],
        timestep=given["t"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["y"],
        **more,
    ).sample


# -- names and shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "positions", "qk_norm", "dual"),
    [
        ("sd3_medium_mmdit", 24, 192, False, 0),
        ("sd35_large_mmdit", 38, 192, True, 0),
        ("sd35_medium_mmditx", 24, 384, True, 13),
    ],
)
def test_published_names_and_shapes(name: str, depth: int, positions: int, qk_norm: bool, dual: int) -> None:
    published = inventory(name)
    shape = mmdit_shape(published)
    assert shape == MMDiTShape(
        width=64 * depth,
        depth=depth,
        context=4096,
        pooled=2048,
        positions=positions,
        qk_norm=qk_norm,
        dual=dual,
    )
    assert shape.heads == depth
    with torch.device("meta"):
        assert shapes_of(MMDiT(shape)) == published


@EVERY
def test_a_small_one_is_read_off_its_own_header(shape: MMDiTShape) -> None:
    with torch.device("meta"):
        assert mmdit_shape(shapes_of(MMDiT(shape))) == shape


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("x_embedder.proj.weight", None),
        ("x_embedder.proj.weight", (100, 16, 2, 2)),
        ("x_embedder.proj.weight", (128, 16)),
        ("pos_embed", (1, 143, 128)),
        ("pos_embed", None),
        ("final_layer.linear.weight", (65, 128)),
        ("context_embedder.weight", None),
        ("y_embedder.mlp.0.weight", (128, 0)),
        ("joint_blocks.0.x_block.attn.qkv.weight", None),
        ("joint_blocks.0.x_block.attn.ln_q.weight", (32,)),
    ],
)
def test_a_senseless_header_is_refused_by_name(name: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(MMDiT(MEDIUM_35))
    shapes[name] = size or ()
    if size is None:
        del shapes[name]
    with pytest.raises(BadFile) as caught:
        mmdit_shape(shapes)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 96}, "96"),
        ({"depth": 0}, "depth 0"),
        ({"dual": 4}, "4 blocks"),
        ({"patch": 0}, "at least 1"),
    ],
)
def test_contradictory_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(MEDIUM, **change)


# -- numbers -------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("size", [(8, 8), (6, 16), (18, 2), (14, 10)])
@torch.no_grad()
def test_equals_diffusers(shape: MMDiTShape, size: tuple[int, int]) -> None:
    net, given = trained(shape), inputs(shape, size)
    assert error(net(**given), asked(oracle(net), given)) <= 2e-6


@EVERY
@torch.no_grad()
def test_skipped_layers_and_residuals_equal_diffusers(shape: MMDiTShape) -> None:
    net, given = trained(shape), inputs(shape)
    theirs, plain = oracle(net), net(**given)
    for skipped in ([1], [0, 2], [shape.depth - 1]):
        got = net(**given, skip_layers=skipped)
        assert error(got, asked(theirs, given, skip_layers=skipped)) <= 2e-6
        assert error(got, plain) > 0.01
    generator = torch.Generator().manual_seed(2)
    for count in range(1, shape.depth + 1):
        extra = [torch.randn(2, 16, shape.width, generator=generator) for _ in range(count)]
        got = net(**given, residuals=extra, skip_layers=[1])
        want = asked(theirs, given, block_controlnet_hidden_states=extra, skip_layers=[1])
        assert error(got, want) <= 2e-6
        assert error(got, plain) > 0.01


# -- laws ----------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_every_input_matters_and_a_batch_equals_its_members(shape: MMDiTShape) -> None:
    net, given = trained(shape), inputs(shape)
    together = net(**given)
    for name, tensor in given.items():
        assert error(net(**given | {name: tensor + 0.5}), together) > 1e-3, name
    for i in range(2):
        alone = net(**{name: tensor[i : i + 1] for name, tensor in given.items()})
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_parameter_matters() -> None:
    shape = replace(MEDIUM_35, depth=3, dual=1)
    net, given = trained(shape), inputs(shape)
    before = net(**given)
    for name, value in net.state_dict().items():
        kept = value.clone()
        value.copy_(kept.flip(0) if value.ndim == 1 else kept.neg())
        after = net(**given)
        value.copy_(kept)
        # The last text is only looked at: what it asks matters to nobody.
        unheard = name == "joint_blocks.2.context_block.attn.ln_q.weight"
        assert (error(after, before) > 1e-5) != unheard, name


@pytest.mark.parametrize("size", [(1, 1), (7, 8), (5, 11)])
@torch.no_grad()
def test_an_odd_size_is_worked_on_with_its_edge_repeated(size: tuple[int, int]) -> None:
    net, given = trained(MEDIUM), inputs(MEDIUM, size)
    rows, columns = ([*range(side), side - 1][: side + side % 2] for side in size)
    even = net(**given | {"x": given["x"][:, :, rows][..., columns]})
    assert torch.equal(net(**given), even[..., : size[0], : size[1]])


@torch.no_grad()
def test_positions_are_those_of_the_middle() -> None:
    """A whole table for a picture of the largest size, and its middle for a smaller one."""
    net = trained(MEDIUM)
    table = net.pos_embed.reshape(12, 12, -1)
    assert torch.equal(net._crop(12, 12)[0], net.pos_embed[0])
    assert torch.equal(net._crop(3, 4)[0], table[4:7, 4:8].flatten(0, 1))
    untrained = MMDiT(replace(MEDIUM, positions=192)).pos_embed.reshape(192, 192, -1)
    assert untrained[64, 64, :32].allclose(torch.ones(32))  # cos 0: where 1024 pixels begin
    assert not untrained[64, 64, 32:64].any() and not untrained[64, 65, 96:].any()
    assert len(untrained[60:132, 60:132].flatten(0, 1).unique(dim=0)) == 72**2


@EVERY
@torch.no_grad()
def test_bfloat16_changes_only_the_rounding(shape: MMDiTShape) -> None:
    given = inputs(shape, (7, 10))
    want = trained(shape)(**given)
    given["x"] = given["x"].bfloat16()
    got = trained(shape).bfloat16()(**given)
    assert got.dtype == torch.bfloat16
    assert error(got.float(), want) <= 0.05


@EVERY
def test_an_untrained_network_predicts_zero_and_learns(shape: MMDiTShape) -> None:
    torch.manual_seed(0)
    net, given = MMDiT(shape), inputs(shape)
    assert not net(**given).any()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = (net(**given) - given["x"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_meta_gives_the_shape_without_the_numbers() -> None:
    with torch.device("meta"):
        net = MMDiT(replace(MEDIUM_35, width=1536, depth=24, positions=384))
    given = {name: tensor.to("meta") for name, tensor in inputs(MEDIUM, (9, 8)).items()}
    assert net(**given).shape == (2, 16, 9, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 8, 8)}, r"\[B, 16, H, W\]"),
        ({"x": torch.zeros(2, 16, 0, 8)}, r"\(2, 16, 0, 8\)"),
        ({"x": torch.zeros(2, 16, 8, 25)}, "8 x 25 is too large.* 24 a side"),
        ({"t": torch.zeros(1)}, r"\[2\], not \(1,\)"),
        ({"context": torch.zeros(2, 7, 41)}, r"\[2, M, 40\]"),
        ({"context": torch.zeros(1, 7, 40)}, r"\[2, M, 40\]"),
        ({"y": torch.zeros(2, 23)}, r"\[2, 24\]"),
        ({"skip_layers": [3]}, r"\[3\].*0 to 2"),
        ({"residuals": []}, "0 control residuals"),
        ({"residuals": [torch.zeros(2, 16, 128)] * 4}, "4 control residuals"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        MMDiT(MEDIUM)(**{**inputs(MEDIUM), **change})
