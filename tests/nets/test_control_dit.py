"""ControlNets of FLUX.1 and SD3: names, numbers against diffusers, and that each network takes what they say."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.control_dit import (
    FluxControlNet,
    FluxControlShape,
    SD3ControlNet,
    SD3ControlShape,
    flux_control_shape,
    sd3_control_shape,
)
from sumuk.nets.flux import Flux, FluxShape, pack
from sumuk.nets.mmdit import MMDiT, MMDiTShape

FLUX = FluxControlShape(
    in_channels=4,
    out_channels=4,
    hint_channels=4,
    width=64,
    head=32,
    double=2,
    single=0,
    context_dim=24,
    vector_dim=20,
)
UNION = FluxControlShape(
    in_channels=4,
    out_channels=4,
    hint_channels=4,
    width=96,
    head=32,
    double=1,
    single=2,
    context_dim=24,
    vector_dim=20,
    guidance=False,
    modes=5,
)
SD3 = SD3ControlShape(width=128, depth=3, context_dim=24, vector_dim=20, places=9)
MASKED = SD3ControlShape(
    width=64, head=32, depth=2, hint_channels=17, context_dim=24, vector_dim=20, places=8, normed=True
)
BOTH_FLUX = pytest.mark.parametrize("shape", [FLUX, UNION], ids=["canny", "union"])
BOTH_SD3 = pytest.mark.parametrize("shape", [SD3, MASKED], ids=["canny", "masked"])
SIZES = pytest.mark.parametrize("size", [(8, 8), (10, 6)], ids=["square", "oblong"])


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Every tensor matters, none being zero."""
    torch.manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5)
        else:
            tensor.normal_(float("norm" in name and name.endswith("weight")), 0.1)


def flux_oracle(shape: FluxControlShape) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FluxControlNetModel(
        in_channels=4 * shape.in_channels,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=shape.head,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.context_dim,
        pooled_projection_dim=shape.vector_dim,
        guidance_embeds=shape.guidance,
        axes_dims_rope=shape.axes,
        num_mode=shape.modes,
    )
    randomise(theirs)
    return theirs.eval().requires_grad_(False)


def sd3_oracle(shape: SD3ControlShape) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.SD3ControlNetModel(
        sample_size=16,
        in_channels=shape.in_channels,
        num_layers=shape.depth,
        attention_head_dim=shape.head,
        num_attention_heads=shape.width // shape.head,
        joint_attention_dim=shape.context_dim,
        caption_projection_dim=shape.width,
        pooled_projection_dim=shape.vector_dim,
        pos_embed_max_size=shape.places,
        extra_conditioning_channels=shape.hint_channels - shape.in_channels,
        qk_norm="rms_norm" if shape.normed else None,
    )
    randomise(theirs)
    return theirs.eval().requires_grad_(False)


def flux(shape: FluxControlShape, theirs: nn.Module | None = None) -> FluxControlNet:
    with torch.device("cpu" if theirs is None else "meta"):
        net = FluxControlNet(shape)
    if theirs is None:
        randomise(net)
    else:
        assert flux_control_shape(shapes_of(theirs)) == shape
        net.load_state_dict(theirs.state_dict(), assign=True)
    return net.eval().requires_grad_(False)


def sd3(shape: SD3ControlShape, theirs: nn.Module | None = None) -> SD3ControlNet:
    with torch.device("cpu" if theirs is None else "meta"):
        net = SD3ControlNet(shape)
    if theirs is None:
        randomise(net)
    else:
        assert sd3_control_shape(shapes_of(theirs)) == shape
        net.load_state_dict(theirs.state_dict(), assign=True)
    return net.eval().requires_grad_(False)


def flux_inputs(shape: FluxControlShape, size: tuple[int, int] = (8, 6)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    given = {
        "x": torch.randn(2, shape.in_channels, *size),
        "t": torch.rand(2) * 1000,
        "hint": torch.randn(2, shape.hint_channels, *size),
        "context": torch.randn(2, 5, shape.context_dim),
        "y": torch.randn(2, shape.vector_dim),
    }
    if shape.guidance:
        given["guidance"] = torch.tensor([3.5, 1.0])
    if shape.modes:
        given["mode"] = torch.tensor([1, 4])
    return given


def sd3_inputs(shape: SD3ControlShape, size: tuple[int, int] = (8, 6)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(2, shape.in_channels, *size),
        "t": torch.rand(2) * 1000,
        "hint": torch.randn(2, shape.hint_channels, *size),
        "context": torch.randn(2, 5, shape.context_dim),
        "y": torch.randn(2, shape.vector_dim),
    }


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    assert len(got) == len(want) > 0
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


# -- names and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_controlnet_canny_instantx", "flux_controlnet_union_instantx"])
def test_published_flux_names_and_shapes(name: str) -> None:
    published = inventory(f"{name}.diffusers")
    shape = flux_control_shape(published)
    with torch.device("meta"):
        assert shapes_of(FluxControlNet(shape)) == published
    assert (shape.in_channels, shape.hint_channels, shape.head, shape.guidance) == (16, 16, 128, True)
    assert shape.axes == (16, 56, 56)
    assert (shape.single, shape.modes) == ((10, 7) if "union" in name else (0, None))


def test_published_sd3_names_and_shapes() -> None:
    published = inventory("sd3_controlnet.diffusers")
    shape = sd3_control_shape(published)
    with torch.device("meta"):
        assert shapes_of(SD3ControlNet(shape)) == published
    assert shape == SD3ControlShape(width=1536, depth=6)


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("x_embedder.weight", None),
        ("x_embedder.weight", (64, 15)),
        ("transformer_blocks.0.attn.norm_q.weight", (48,)),
        ("time_text_embed.text_embedder.linear_1.weight", (64,)),
    ],
)
def test_a_senseless_flux_header_is_refused(key: str, size: tuple[int, ...] | None) -> None:
    shapes = shapes_of(flux(FLUX))
    shapes.pop(key)
    with pytest.raises(BadFile) as caught:
        flux_control_shape(shapes | ({key: size} if size else {}))
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("key", "size"), [("pos_embed.proj.weight", (100, 16, 2, 2)), ("pos_embed.pos_embed", None)]
)
def test_a_senseless_sd3_header_is_refused(key: str, size: tuple[int, ...] | None) -> None:
    shapes = shapes_of(sd3(SD3))
    shapes.pop(key)
    with pytest.raises(BadFile) as caught:
        sd3_control_shape(shapes | ({key: size} if size else {}))
    assert key in str(caught.value)


# -- numbers -------------------------------------------------------------------------------------------------


@BOTH_FLUX
@SIZES
@torch.no_grad()
def test_flux_equals_diffusers(shape: FluxControlShape, size: tuple[int, int]) -> None:
    theirs, given = flux_oracle(shape), flux_inputs(shape, size)
    places = torch.zeros(size[0] // 2, size[1] // 2, 3)
    places[..., 1] += torch.arange(size[0] // 2)[:, None]
    places[..., 2] += torch.arange(size[1] // 2)
    double, single = theirs(
        hidden_states=pack(given["x"]),
        controlnet_cond=pack(given["hint"]),
        controlnet_mode=given["mode"][:, None] if shape.modes else None,
        encoder_hidden_states=given["context"],
        pooled_projections=given["y"],
        timestep=given["t"] / 1000,
        guidance=given.get("guidance"),
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )
    got = flux(shape, theirs)(**given)
    assert worst(got[0], double) <= 1e-5
    assert len(got[1]) == shape.single == len(single or ())
    assert not single or worst(got[1], single) <= 1e-5


@BOTH_SD3
@SIZES
@torch.no_grad()
def test_sd3_equals_diffusers(shape: SD3ControlShape, size: tuple[int, int]) -> None:
    theirs, given = sd3_oracle(shape), sd3_inputs(shape, size)
    (want,) = theirs(
        hidden_states=given["x"],
        controlnet_cond=given["hint"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["y"],
        timestep=given["t"],
        return_dict=False,
    )
    assert worst(sd3(shape, theirs)(**given), list(want)) <= 1e-5


@torch.no_grad()
def test_flux_takes_what_its_controlnet_says() -> None:
    big = Flux(
        FluxShape(**{f.name: getattr(UNION, f.name) for f in fields(FluxShape)} | {"double": 3, "single": 5})
    )
    randomise(big)
    given = flux_inputs(UNION)
    told = {name: tensor for name, tensor in given.items() if name not in ("hint", "mode")}
    alone, controlled = big(**told), big(**told, residuals=flux(UNION)(**given))
    assert worst([controlled], [alone]) > 0.01
    nothing = big(**told, residuals=FluxControlNet(UNION)(**given))
    assert torch.equal(nothing, alone)


@torch.no_grad()
def test_sd3_takes_what_its_controlnet_says() -> None:
    big = MMDiT(MMDiTShape(width=128, depth=4, context=24, pooled=20, positions=9))
    randomise(big)
    given = sd3_inputs(SD3, (7, 6))
    told = {name: tensor for name, tensor in given.items() if name != "hint"}
    alone, controlled = big(**told), big(**told, residuals=sd3(SD3)(**given))
    assert worst([controlled], [alone]) > 0.01
    assert torch.equal(big(**told, residuals=SD3ControlNet(SD3)(**given)), alone)


@BOTH_FLUX
@torch.no_grad()
def test_every_input_of_flux_matters(shape: FluxControlShape) -> None:
    net, given = flux(shape), flux_inputs(shape)
    before = net(**given)
    for name, tensor in given.items():
        other = (tensor + 1) % 5 if name == "mode" else tensor + 0.5
        after = net(**given | {name: other})
        assert worst(after[0] + after[1], before[0] + before[1]) > 1e-4, name
    one = net(**given | {"hint": given["hint"][:1]})
    two = net(**given | {"hint": given["hint"][:1].expand(2, -1, -1, -1)})
    assert worst(one[0], two[0]) <= 1e-5


@torch.no_grad()
def test_every_input_of_sd3_matters() -> None:
    net, given = sd3(MASKED), sd3_inputs(MASKED)
    before = net(**given)
    for name, tensor in given.items():
        assert worst(net(**given | {name: tensor + 0.5}), before) > 1e-4, name


@torch.no_grad()
def test_bfloat16_runs() -> None:
    given = flux_inputs(UNION)
    want = flux(UNION)(**given)
    got = flux(UNION).bfloat16()(**given | {"x": given["x"].bfloat16()})
    assert all(each.dtype == torch.bfloat16 for each in got[0] + got[1])
    assert worst([each.float() for each in got[0] + got[1]], want[0] + want[1]) <= 0.1
    low = sd3(MASKED).bfloat16()(**sd3_inputs(MASKED) | {"x": sd3_inputs(MASKED)["x"].bfloat16()})
    assert worst([each.float() for each in low], sd3(MASKED)(**sd3_inputs(MASKED))) <= 0.1


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        (FLUX, {"x": torch.zeros(2, 4, 7, 6), "hint": torch.zeros(2, 4, 7, 6)}, "even"),
        (FLUX, {"hint": torch.zeros(2, 4, 8, 8)}, r"\[2, 4, 8, 6\]"),
        (FLUX, {"context": torch.zeros(1, 5, 24)}, r"\[2, M, 24\]"),
        (FLUX, {"y": torch.zeros(2, 19)}, r"\[2, 20\]"),
        (FLUX, {"guidance": None}, "needs a guidance"),
        (FLUX, {"mode": torch.tensor([1, 2])}, "takes no mode"),
        (UNION, {"guidance": torch.ones(2)}, "takes no guidance"),
        (UNION, {"mode": None}, "needs a mode"),
        (UNION, {"mode": torch.ones(2)}, "dtype long"),
        (UNION, {"mode": torch.tensor([1, 5])}, "among the 5"),
    ],
)
def test_what_does_not_fit_flux_is_refused(
    shape: FluxControlShape, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        flux(shape)(**flux_inputs(shape) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 16, 20, 2), "hint": torch.zeros(2, 16, 20, 2)}, "9x9 places"),
        ({"hint": torch.zeros(2, 17, 8, 6)}, r"\[2, 16, 8, 6\]"),
        ({"x": torch.zeros(2, 4, 8, 6)}, r"\[B, 16, H, W\]"),
        ({"t": torch.zeros(1)}, r"\[2\]"),
    ],
)
def test_what_does_not_fit_sd3_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        sd3(SD3)(**sd3_inputs(SD3) | change)
