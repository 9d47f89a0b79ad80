from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.flux import flux_rules
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.attention import attention_kernel
from sumuk.nets.flux import Flux, FluxShape, flux_shape, pack, rotation, unpack

DEV = FluxShape(
    in_channels=4,
    out_channels=4,
    width=64,
    head=32,
    double=3,
    single=4,
    context_dim=24,
    vector_dim=20,
)
SCHNELL = replace(DEV, guidance=False, head=16, double=1, single=2)
FILL = replace(DEV, in_channels=4 + 4 + 64, double=2, single=1)
CONTROL = replace(DEV, in_channels=4 + 4, double=1, single=1)
WIDE = replace(DEV, width=128, head=128, double=1, single=1, context_dim=40)  # the published heads
SHAPES = {"dev": DEV, "schnell": SCHNELL, "fill": FILL, "control": CONTROL, "wide": WIDE}
EVERY = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def trained(shape: FluxShape, seed: int = 0) -> Flux:
    """A network in which every parameter matters, none being zero or one."""
    torch.manual_seed(seed)
    net = Flux(shape).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(float(name.endswith("scale")), 0.3)
    return net


def inputs(
    shape: FluxShape, batch: int = 2, size: tuple[int, int] = (6, 10), words: int = 7
) -> dict[str, Tensor]:
    torch.manual_seed(1)
    given = {
        "x": torch.randn(batch, shape.in_channels, *size),
        "t": torch.rand(batch) * 1000,
        "context": torch.randn(batch, words, shape.context_dim),
        "y": torch.randn(batch, shape.vector_dim),
    }
    if shape.guidance:
        given["guidance"] = 1 + 5 * torch.rand(batch)
    return given


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((got - want).abs().max() / want.abs().max())


# -- names and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "guidance"),
    [
        ("flux1_dev", 16, True),
        ("flux1_schnell", 16, False),
        ("flux1_canny_depth_dev", 32, True),
        ("flux1_fill_dev", 96, True),
    ],
)
def test_published_names_and_shapes(name: str, channels: int, guidance: bool) -> None:
    published = inventory(name)
    shape = flux_shape(published)
    assert shape == FluxShape(in_channels=channels, guidance=guidance)
    assert (shape.heads, shape.axes, shape.patch) == (24, (16, 56, 56), 2)
    with torch.device("meta"):
        assert shapes_of(Flux(shape)) == published


@EVERY
def test_a_miniature_takes_the_same_path(shape: FluxShape) -> None:
    with torch.device("meta"):
        assert flux_shape(shapes_of(Flux(shape))) == shape


@pytest.mark.parametrize("head", [6, 8, 10, 16, 24, 32, 48, 64, 96, 128, 256])
def test_axes_share_out_a_head(head: int) -> None:
    axes = FluxShape(width=head, head=head).axes
    assert sum(axes) == head and min(axes) >= 2 and not any(axis % 2 for axis in axes)
    assert axes[1] == axes[2]


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("img_in.weight", None),
        ("img_in.weight", (64,)),
        ("img_in.weight", (64, 18)),
        ("img_in.weight", (2**40, 16)),
        ("txt_in.weight", None),
        ("txt_in.weight", (64, 0)),
        ("vector_in.in_layer.weight", None),
        ("final_layer.linear.weight", None),
        ("final_layer.linear.weight", (3, 64)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", None),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (48,)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (4,)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (7,)),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(key: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(Flux(DEV))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile, match=r"FLUX|head") as caught:
        flux_shape(shapes)
    assert key in str(caught.value)


@pytest.mark.parametrize("change", [{"head": 24}, {"head": 15}, {"head": 4}, {"double": 0}, {"width": 0}])
def test_contradictory_shapes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"FLUX|head"):
        replace(DEV, **change)


# -- numbers -------------------------------------------------------------------------------------------------


def oracle(shape: FluxShape) -> tuple[nn.Module, Flux]:
    """diffusers' network, all of its parameters random, and ours with the same weights through our layout."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=4 * shape.in_channels,
        out_channels=4 * shape.out_channels,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=shape.head,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.context_dim,
        pooled_projection_dim=shape.vector_dim,
        guidance_embeds=shape.guidance,
        axes_dims_rope=shape.axes,
    )
    theirs.eval().requires_grad_(False)
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(0.5, 0.3)
    state = {name: lazy(tensor) for name, tensor in theirs.state_dict().items()}
    moved = Layout(*flux_rules(state)).forward(state)
    moved.refuse_leftovers("diffusers")
    with torch.device("meta"):
        ours = Flux(shape)
    ours.load_state_dict({name: one.load() for name, one in moved.tensors.items()}, strict=True, assign=True)
    return theirs, ours.eval().requires_grad_(False)


def answer(theirs: nn.Module, given: dict[str, Tensor], packed: Tensor | None = None, **more: Any) -> Tensor:
    """What diffusers makes of the same inputs, with the pipeline's own packing and places."""
    from diffusers import FluxPipeline

    batch, channels, height, width = given["x"].shape
    if packed is None:
        packed = FluxPipeline._pack_latents(given["x"], batch, channels, height, width)
    out = theirs(
        hidden_states=packed,
        encoder_hidden_states=given["context"],
        pooled_projections=given["y"],
        timestep=given["t"] / 1000,
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(given["context"].shape[1], 3),
        guidance=given.get("guidance"),
        **more,
    ).sample
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)


@EVERY
@pytest.mark.parametrize("size", [(6, 10), (14, 2), (8, 8)], ids=["wide", "tall", "square"])
@torch.no_grad()
def test_equals_diffusers(shape: FluxShape, size: tuple[int, int]) -> None:
    theirs, net = oracle(shape)
    given = inputs(shape, size=size)
    want = answer(theirs, given)
    got = net(**given)
    assert got.shape == (2, shape.out_channels, *size)
    assert error(got, want) <= 3e-6


@torch.no_grad()
def test_fill_is_packed_as_diffusers_packs_it() -> None:
    """Latent, masked latent and mask are packed apart and then joined; here joined and then packed."""
    theirs, net = oracle(FILL)
    from diffusers import FluxFillPipeline

    given = inputs(FILL)
    latent, masked = torch.randn(2, 2, 4, 6, 10).unbind()
    mask = torch.rand(2, 1, 48, 80).round()
    cells = mask[:, 0].view(2, 6, 8, 10, 8).permute(0, 2, 4, 1, 3).reshape(2, 64, 6, 10)
    rows = [FluxFillPipeline._pack_latents(x, 2, x.shape[1], 6, 10) for x in (latent, masked, cells)]
    want = answer(theirs, given, packed=torch.cat(rows, dim=2))
    given["x"] = torch.cat((latent, masked, F.pixel_unshuffle(mask, 8)), dim=1)
    assert error(net(**given), want) <= 3e-6


@pytest.mark.parametrize(("double", "single"), [(3, 4), (2, 3), (1, 1), (2, 0), (0, 2)])
@torch.no_grad()
def test_control_residuals_equal_diffusers(double: int, single: int) -> None:
    """One for each block, or fewer that are spread over them."""
    theirs, net = oracle(DEV)
    given = inputs(DEV)
    extra = torch.randn(double + single, 2, 15, 64).unbind()
    residuals = (extra[:double], extra[double:])
    want = answer(
        theirs,
        given,
        controlnet_block_samples=residuals[0] or None,
        controlnet_single_block_samples=residuals[1] or None,
    )
    got = net(**given, residuals=residuals)
    assert error(got, want) <= 3e-6
    assert error(got, net(**given)) > 0.01


def test_rotation_equals_diffusers() -> None:
    pytest.importorskip("diffusers")
    from diffusers import FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.cat(
        (torch.zeros(5, 3), FluxPipeline._prepare_latent_image_ids(1, 40, 64, "cpu", torch.float32))
    )
    want = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(ids)
    got = rotation(FluxShape(), 40, 64, 5, torch.device("cpu"))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours[:, 0].repeat_interleave(2, dim=1), theirs)


def test_packing_there_and_back() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(x)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())  # row 1, column 1
    assert torch.equal(unpack(tokens, 2, 3), x)


# -- laws ----------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_a_batch_equals_its_members(shape: FluxShape) -> None:
    net, given = trained(shape), inputs(shape, batch=3)
    together = net(**given)
    for i in range(3):
        alone = net(**{name: tensor[i : i + 1] for name, tensor in given.items()})
        assert error(alone, together[i : i + 1]) <= 1e-5


@EVERY
@torch.no_grad()
def test_every_input_and_parameter_matters(shape: FluxShape) -> None:
    net, given = trained(shape), inputs(shape)
    before = net(**given)
    for name, tensor in given.items():
        assert error(net(**given | {name: tensor + 0.5}), before) > 1e-4, name
    given["x"].requires_grad_()
    net.requires_grad_(True)
    with torch.enable_grad():
        net(**given).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@EVERY
@pytest.mark.parametrize("size", [(2, 2), (2, 12), (10, 6)])
@pytest.mark.parametrize("words", [0, 1])
@torch.no_grad()
def test_any_even_size_runs(shape: FluxShape, size: tuple[int, int], words: int) -> None:
    out = trained(shape)(**inputs(shape, size=size, words=words))
    assert out.shape == (2, shape.out_channels, *size)
    assert out.isfinite().all()


@torch.no_grad()
def test_lower_precision_changes_only_the_rounding() -> None:
    net, given = trained(DEV), inputs(DEV)
    want = net(**given)
    low = trained(DEV).bfloat16()
    for kernel in ("auto", "sdpa", "matmul"):
        with attention_kernel(kernel):  # type: ignore[arg-type]
            got = low(**given | {"x": given["x"].bfloat16()})
        assert got.dtype == torch.bfloat16
        assert error(got.float(), want) <= 0.05


@torch.no_grad()
def test_times_and_scales_stay_exact_in_lower_precision() -> None:
    """bfloat16 cannot tell 999 from 1000, nor 3.5 from 3.51."""
    low, given = trained(DEV).bfloat16(), inputs(DEV)
    given["x"] = given["x"].bfloat16()
    one = low(**given | {"t": torch.full((2,), 999.0), "guidance": torch.full((2,), 3.5)})
    for other in ({"t": torch.full((2,), 1000.0)}, {"guidance": torch.full((2,), 3.502)}):
        both = {"t": torch.full((2,), 999.0), "guidance": torch.full((2,), 3.5)} | other
        assert not torch.equal(low(**given | both), one)


def test_meta_gives_the_shape_without_the_numbers() -> None:
    with torch.device("meta"):
        net = Flux(replace(FluxShape(in_channels=96), double=1, single=1))
    given = {name: tensor.to("meta") for name, tensor in inputs(net.shape, size=(64, 96)).items()}
    assert net(**given).shape == (2, 16, 64, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 6, 10)}, r"\[B, 4, H, W\]"),
        ({"x": torch.zeros(4, 6, 10)}, r"\(4, 6, 10\)"),
        ({"x": torch.zeros(2, 4, 5, 10)}, "even, not 5x10"),
        ({"x": torch.zeros(2, 4, 6, 7)}, "even, not 6x7"),
        ({"x": torch.zeros(2, 4, 0, 8)}, "even, not 0x8"),
        ({"t": torch.zeros(1)}, r"\[2\], not \(1,\)"),
        ({"context": torch.zeros(2, 7, 25)}, r"\[2, M, 24\]"),
        ({"context": torch.zeros(2, 24)}, r"\[2, M, 24\]"),
        ({"y": torch.zeros(2, 21)}, r"\[2, 20\]"),
        ({"y": torch.zeros(1, 20)}, r"\[2, 20\]"),
        ({"guidance": None}, "needs a guidance"),
        ({"guidance": torch.zeros(2, 1)}, r"\[2\], not \(2, 1\)"),
        ({"residuals": ([torch.zeros(2, 15, 64)] * 4, [])}, "4 control residuals .* 3 double blocks"),
        ({"residuals": ([], [torch.zeros(2, 15, 64)] * 5)}, "5 control residuals .* 4 single blocks"),
        ({"residuals": ([torch.zeros(2, 14, 64)], [])}, r"\(2, 14, 64\)"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(BadInput, match=message):
        trained(DEV)(**{**inputs(DEV), **change})


def test_schnell_takes_no_guidance() -> None:
    with pytest.raises(BadInput, match="takes no guidance"):
        trained(SCHNELL)(**inputs(SCHNELL), guidance=torch.ones(2))
