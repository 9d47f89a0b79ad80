"""The DiT against the published names, and against diffusers' DiTTransformer2DModel with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.dit import dit_rules
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.dit import DiT, DiTShape, dit_heads, dit_shape, positions

TWO = DiTShape(width=128, depth=3, heads=2, classes=11, tokens=16)
FOUR = DiTShape(width=64, depth=2, heads=1, classes=6, tokens=16, patch=4, out_channels=4)
XL = DiTShape(width=1152, depth=1, heads=16, classes=4, tokens=16, patch=8, in_channels=3, out_channels=6)
SMALL = pytest.mark.parametrize("shape", [TWO, FOUR], ids=["two", "four"])
EVERY = pytest.mark.parametrize("shape", [TWO, FOUR, XL], ids=["two", "four", "xl-wide"])


def randomise(net: nn.Module) -> None:
    """Every parameter matters, none being zero; copies of an embedder stay copies."""
    torch.manual_seed(0)
    drawn: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(False)
        key = name.split(".emb.")[-1] if ".emb." in name else name
        if key not in drawn:
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            drawn[key] = torch.randn(parameter.shape) * (1.0 if "embedding_table" in name else spread)
        parameter.copy_(drawn[key])


def trained(shape: DiTShape) -> DiT:
    net = DiT(shape).eval()
    randomise(net)
    return net


def inputs(shape: DiTShape, grid: tuple[int, int] = (4, 4), batch: int = 3) -> dict[str, Tensor]:
    """The last of the batch has no class."""
    torch.manual_seed(1)
    size = [n * shape.patch for n in grid]
    y = torch.tensor([*torch.randint(0, shape.null, (batch - 1,)).tolist(), shape.null])
    return {"x": torch.randn(batch, shape.in_channels, *size), "t": torch.rand(batch) * 999, "y": y}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def oracle(shape: DiTShape, side: int) -> nn.Module:
    """Their network for a square of ``side`` tokens.

    Two of its constants are not those of the original: the time's frequencies fall to ``10000^-1`` in one step less,
    and the second norm's epsilon is 1e-5 unless one says otherwise. The weights were trained with the original's.
    """
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        num_layers=shape.depth,
        sample_size=side * shape.patch,
        patch_size=shape.patch,
        num_embeds_ada_norm=shape.null,
        norm_eps=1e-6,
    ).eval()
    randomise(net)
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return net


def converted(theirs: nn.Module, shape: DiTShape) -> DiT:
    """Ours with their numbers, brought over by the layout's rules."""
    state = {name: lazy(value) for name, value in theirs.state_dict().items()}
    moved = Layout(*dit_rules(state)).forward(state)
    assert not moved.unknown and not moved.halves and not moved.ignored
    tokens = moved.tensors["pos_embed"].shape[1]
    with torch.device("meta"):
        net = DiT(replace(shape, tokens=tokens))
    net.load_state_dict({name: one.load() for name, one in moved.tensors.items()}, assign=True)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "heads", "tokens"),
    [
        ("dit_s_2", 6, 256),
        ("dit_b_2", 12, 256),
        ("dit_l_2", 16, 256),
        ("dit_xl_2", 16, 256),
        ("dit_xl_2_512", 16, 1024),
    ],
)
def test_published_names_and_shapes(name: str, heads: int, tokens: int) -> None:
    published = inventory(name)
    shape = dit_shape(published)
    with torch.device("meta"):
        net = DiT(shape)
        assert net.pos_embed.is_meta
    assert shapes_of(net) == published
    assert (shape.heads, shape.tokens, shape.null, shape.patch) == (heads, tokens, 1000, 2)
    assert (shape.in_channels, shape.out_channels) == (4, 8)


def test_heads_are_the_published_ones() -> None:
    assert [dit_heads(width) for width in (384, 768, 1024, 1152)] == [6, 12, 16, 16]


@EVERY
def test_a_miniature_takes_the_same_path(shape: DiTShape) -> None:
    with torch.device("meta"):
        assert dit_shape(shapes_of(DiT(shape))) == shape


@EVERY
@pytest.mark.parametrize("side", [4, 6, 32], ids=lambda side: f"{side}x{side}")
@torch.no_grad()
def test_equals_diffusers(shape: DiTShape, side: int) -> None:
    """On the grid of the stored positions and on others; for classes and for none."""
    if side != 4 and shape is XL:
        pytest.skip("slow, and nothing new")
    theirs = oracle(shape, side)
    ours, given = converted(theirs, shape), inputs(shape, (side, side))
    want = theirs(given["x"], given["t"], given["y"]).sample
    got = ours(**given)
    assert got.shape == want.shape == (3, shape.out_channels, side * shape.patch, side * shape.patch)
    assert error(got, want) <= 1e-5


@torch.no_grad()
def test_no_square_equals_diffusers() -> None:
    """Theirs puts patches together as a square; so their patches are taken and put together here."""
    theirs = oracle(TWO, 4)
    ours, given = converted(theirs, TWO), inputs(TWO, (2, 8))
    theirs.pos_embed.pos_embed = positions(2, 8, TWO.width)
    theirs.pos_embed.height, theirs.pos_embed.width = 2, 8
    kept: list[Tensor] = []
    theirs.proj_out_2.register_forward_hook(lambda _module, _given, out: kept.append(out))
    theirs(given["x"], given["t"], given["y"])
    want = torch.empty(3, 8, 4, 16)
    for token, patch in enumerate(kept[0].unbind(1)):
        row, column = 2 * (token // 8), 2 * (token % 8)
        want[:, :, row : row + 2, column : column + 2] = patch.reshape(3, 2, 2, 8).permute(0, 3, 1, 2)
    assert error(ours(**given), want) <= 1e-5


@torch.no_grad()
def test_their_own_constants_would_change_the_answer() -> None:
    """How far diffusers as it stands is from the original, with weights drawn at random."""
    theirs = oracle(TWO, 4)
    given = inputs(TWO)
    want = converted(theirs, TWO)(**given)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert error(theirs(given["x"], given["t"], given["y"]).sample, want) > 1e-3


# -- positions -----------------------------------------------------------------------------------------------


def test_positions_equal_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    for side in (1, 4, 16, 32):
        want = embeddings.get_2d_sincos_pos_embed(72, side, base_size=side).float()[None]
        assert torch.equal(positions(side, side, 72), want)


def test_a_smaller_grid_is_a_corner_of_a_larger_one() -> None:
    whole = positions(6, 6, 8).reshape(6, 6, 8)
    assert torch.equal(positions(2, 5, 8).reshape(2, 5, 8), whole[:2, :5])
    column, row = whole[:, 3, :4], whole[3, :, 4:]
    assert (column == column[0]).all() and (row == row[0]).all()
    assert not torch.equal(whole[:, 3, 4:], whole[:, 2, :4])


@torch.no_grad()
def test_stored_positions_are_used_on_their_grid_only() -> None:
    net, here, there = trained(TWO), inputs(TWO, (4, 4)), inputs(TWO, (4, 3))
    before = net(**here), net(**there)
    net.pos_embed += torch.randn(net.pos_embed.shape)
    assert error(net(**here), before[0]) > 1e-3
    assert torch.equal(net(**there), before[1])


# -- laws ----------------------------------------------------------------------------------------------------


@SMALL
@torch.no_grad()
def test_a_batch_equals_its_members(shape: DiTShape) -> None:
    net, given = trained(shape), inputs(shape)
    together = net(**given)
    for i in range(3):
        alone = net(**{name: tensor[i : i + 1] for name, tensor in given.items()})
        assert error(alone, together[i : i + 1]) <= 1e-5


@SMALL
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2)])
@torch.no_grad()
def test_any_grid_runs(shape: DiTShape, grid: tuple[int, int]) -> None:
    out = trained(shape)(**inputs(shape, grid))
    assert out.shape == (3, shape.out_channels, grid[0] * shape.patch, grid[1] * shape.patch)
    assert out.isfinite().all()


@pytest.mark.parametrize("grid", [(4, 4), (2, 3)], ids=["stored", "other"])
@torch.no_grad()
def test_bfloat16_changes_only_the_rounding(grid: tuple[int, int]) -> None:
    net, given = trained(TWO), inputs(TWO, grid)
    want = net(**given)
    got = net.bfloat16()(given["x"].bfloat16(), given["t"], given["y"])
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert error(got.float(), want) <= 0.05


@torch.no_grad()
def test_every_input_matters() -> None:
    net, given = trained(TWO), inputs(TWO)
    before = net(**given)
    for name, tensor in given.items():
        other = (tensor + 1) % TWO.classes if name == "y" else tensor + 0.5
        assert error(net(**given | {name: other}), before) > 1e-3, name


def test_meta_gives_the_shape_without_the_numbers() -> None:
    with torch.device("meta"):
        net = DiT(TWO)
    for grid in ((4, 4), (2, 3)):
        given = {name: tensor.to("meta") for name, tensor in inputs(TWO, grid).items()}
        assert net(**given).shape == (3, 8, 2 * grid[0], 2 * grid[1])


def test_an_untrained_network_predicts_zero_and_learns() -> None:
    net, given = DiT(TWO), inputs(TWO)
    assert net(**given).abs().max() == 0
    (net(**given) - 1).square().mean().backward()
    grad = net.final_layer.linear.bias.grad
    assert grad is not None and grad.abs().min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 3, 8, 8)}, r"\(3, 3, 8, 8\)"),
        ({"x": torch.zeros(3, 4, 8, 7)}, "multiples of 2"),
        ({"x": torch.zeros(3, 4, 0, 8)}, "multiples of 2"),
        ({"x": torch.zeros(4, 8, 8)}, r"\(4, 8, 8\)"),
        ({"t": torch.zeros(2)}, r"time of shape \(2,\)"),
        ({"y": torch.zeros(3)}, "float32"),
        ({"y": torch.zeros(1, dtype=torch.long)}, r"\(1,\)"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        DiT(TWO)(**inputs(TWO) | change)


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("x_embedder.proj.weight", None),
        ("x_embedder.proj.weight", (128,)),
        ("x_embedder.proj.weight", (130, 4, 2, 2)),
        ("x_embedder.proj.weight", (2**40, 4, 2, 2)),
        ("pos_embed", None),
        ("pos_embed", (1, 15, 128)),
        ("final_layer.linear.weight", (33, 128)),
        ("blocks.0.attn.qkv.weight", None),
        ("y_embedder.embedding_table.weight", None),
        ("y_embedder.embedding_table.weight", (0, 128)),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(key: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(DiT(TWO))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile) as caught:
        dit_shape(shapes)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 130}, "130"),
        ({"heads": 3}, "3 heads"),
        ({"tokens": 12}, "12 stored positions"),
        ({"depth": 0}, "at least 1"),
        ({"classes": 0}, "at least 1"),
    ],
)
def test_contradictory_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(TWO, **change)
