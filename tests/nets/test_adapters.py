"""T2I-Adapter and IP-Adapter: numbers against diffusers, and that the U-Net is left as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.nets.inventories import shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.controlnet import controlnet_rules, t2i_rules
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.adapters import T2IAdapter, T2IShape, t2i_shape, with_features
from sumuk.nets.ip_adapter import IPAdapter, IPShape, ip_shape, with_image
from sumuk.nets.layers import timestep_embedding
from sumuk.nets.unet import UNet, UNetShape

FULL = T2IShape(widths=(32, 64, 128, 128))
XL = T2IShape(colours=1, factor=16, widths=(32, 64, 128, 128))
LIGHT = T2IShape(widths=(32, 64, 128, 128), rows=4, light=True)
KINDS = {"full_adapter": FULL, "full_adapter_xl": XL, "light_adapter": LIGHT}
SD1 = UNetShape(
    model_channels=32,
    channel_mult=(1, 2, 4, 4),
    transformer_depth=(1, 1, 1, 0),
    middle_depth=1,
    context_dim=24,
    heads=8,
)
SDXL = UNetShape(
    model_channels=32,
    channel_mult=(1, 2, 4),
    transformer_depth=(0, 2, 3),
    middle_depth=3,
    context_dim=24,
    head_channels=16,
    linear=True,
    adm_in_channels=20 + 6 * 256,
)
BOTH = pytest.mark.parametrize("shape", [SD1, SDXL], ids=["sd1", "sdxl"])


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Every parameter matters, none being zero."""
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.data.normal_(float("norm" in name), 0.1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def theirs_and_ours(shape: UNetShape) -> tuple[nn.Module, UNet]:
    """The same random U-Net twice."""
    diffusers = pytest.importorskip("diffusers")
    kinds = ["CrossAttn" if depth else "" for depth in shape.transformer_depth]
    widths = tuple(shape.model_channels * mult for mult in shape.channel_mult)
    more: dict[str, Any] = {}
    if shape.adm_in_channels:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape.adm_in_channels,
        }
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        transformer_layers_per_block=tuple(max(1, depth) for depth in shape.transformer_depth),
        cross_attention_dim=shape.context_dim,
        attention_head_dim=tuple(shape.heads or width // (shape.head_channels or 1) for width in widths),
        use_linear_projection=shape.linear,
        **more,
    )
    randomise(theirs, 3)
    state = {name: lazy(tensor) for name, tensor in theirs.state_dict().items()}
    moved = Layout(*controlnet_rules(state)).forward(state)
    moved.refuse_leftovers("unet")
    with torch.device("meta"):
        net = UNet(shape)
    net.load_state_dict({name: one.load() for name, one in moved.tensors.items()}, assign=True)
    return theirs.eval().requires_grad_(False), net.eval().requires_grad_(False)


def inputs(shape: UNetShape, size: tuple[int, int] = (16, 8)) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Ours, and what diffusers wants beside x, t and context."""
    torch.manual_seed(1)
    given = {"x": torch.randn(2, 4, *size), "t": torch.rand(2) * 999, "context": torch.randn(2, 7, 24)}
    if not shape.adm_in_channels:
        return given, {}
    pooled, ids = torch.randn(2, shape.adm_in_channels - 6 * 256), torch.rand(2, 6) * 1024
    given["y"] = torch.cat((pooled, timestep_embedding(ids.flatten(), 256).reshape(2, -1)), dim=1)
    return given, {"text_embeds": pooled, "time_ids": ids}


# -- T2I-Adapter ---------------------------------------------------------------------------------------------


def t2i_oracle(kind: str) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    shape = KINDS[kind]
    theirs = diffusers.T2IAdapter(
        in_channels=shape.colours,
        channels=list(shape.widths[:-1] if shape.light else shape.widths),
        num_res_blocks=shape.rows,
        downscale_factor=shape.factor,
        adapter_type=kind,
    )
    randomise(theirs)
    return theirs.eval().requires_grad_(False)


def t2i(theirs: nn.Module) -> T2IAdapter:
    state = {name: lazy(tensor) for name, tensor in theirs.state_dict().items()}
    moved = Layout(*t2i_rules(state)).forward(state)
    moved.refuse_leftovers("diffusers")
    with torch.device("meta"):
        net = T2IAdapter(t2i_shape({name: one.shape for name, one in moved.tensors.items()}))
    net.load_state_dict({name: one.load() for name, one in moved.tensors.items()}, assign=True)
    return net.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(128, 64), (80, 176)], ids=["even", "odd"])
@torch.no_grad()
def test_t2i_equals_diffusers(kind: str, size: tuple[int, int]) -> None:
    theirs = t2i_oracle(kind)
    net = t2i(theirs)
    assert net.shape == KINDS[kind]
    hint = torch.rand(2, net.shape.colours, *size)
    want, got = theirs(hint), net(hint)
    assert len(got) == len(want) == 4
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_t2i_layout_there_and_back_is_the_identity(kind: str) -> None:
    net = T2IAdapter(KINDS[kind])
    native = {name: lazy(tensor) for name, tensor in net.state_dict().items()}
    there = Layout(*t2i_rules(native)).backward(native)
    there.refuse_leftovers("native")
    assert there.tensors.keys() == t2i_oracle(kind).state_dict().keys()
    back = Layout(*t2i_rules(there.tensors)).forward(there.tensors)
    assert back.tensors.keys() == native.keys() and not back.unknown
    assert all(torch.equal(one.load(), native[name].load()) for name, one in back.tensors.items())


def test_t2i_names_are_the_original_ones() -> None:
    names = set(T2IAdapter(FULL).state_dict())
    assert {"conv_in.weight", "body.2.in_conv.weight", "body.4.in_conv.bias", "body.7.block2.weight"} <= names
    assert "body.6.in_conv.weight" not in names and "body.1.in_conv.weight" not in names
    assert "body.3.body.2.block1.weight" in T2IAdapter(LIGHT).state_dict()
    wide = T2IAdapter(replace(FULL, kernel=3))
    assert t2i_shape(shapes_of(wide)).kernel == 3


@pytest.mark.parametrize(
    ("kind", "shape"), [("full_adapter", SD1), ("light_adapter", SD1), ("full_adapter_xl", SDXL)]
)
@torch.no_grad()
def test_unet_with_features_equals_diffusers(kind: str, shape: UNetShape) -> None:
    (theirs, net), adapter = theirs_and_ours(shape), t2i(t2i_oracle(kind))
    given, added = inputs(shape)
    found = adapter(torch.rand(2, adapter.shape.colours, 128, 64))
    before = net(**given)
    want = theirs(
        given["x"],
        given["t"],
        given["context"],
        added_cond_kwargs=added,
        down_intrablock_additional_residuals=[each.clone() for each in found],
    ).sample
    with with_features(net, found, xl=adapter.shape.xl):
        got = net(**given)
        with pytest.raises(BadInput, match="size of the drawing"):
            net(**given | {"x": torch.zeros(2, 4, 8, 8)})
    assert error(got, want) <= 1e-5
    assert error(got, before) > 0.01
    assert torch.equal(net(**given), before)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("conv_in.weight", None),
        ("conv_in.weight", (32, 100, 3, 3)),
        ("body.0.block2.weight", None),
        ("body.7.block1.weight", None),
    ],
)
def test_a_senseless_t2i_header_is_refused(key: str, size: tuple[int, ...] | None) -> None:
    shapes = shapes_of(T2IAdapter(FULL))
    shapes.pop(key)
    with pytest.raises(BadFile):
        t2i_shape(shapes | ({key: size} if size else {}))


def test_what_does_not_fit_t2i_is_refused() -> None:
    with pytest.raises(BadInput, match="8 h, 8 w"):
        T2IAdapter(FULL)(torch.zeros(1, 3, 64, 60))
    with pytest.raises(BadInput, match="4 levels"), with_features(UNet(SD1), [torch.zeros(1)] * 5):
        pass
    low = T2IAdapter(FULL).bfloat16()(torch.rand(1, 3, 64, 64).bfloat16())
    assert all(each.dtype == torch.bfloat16 and each.isfinite().all() for each in low)


# -- IP-Adapter ----------------------------------------------------------------------------------------------


def widths_of(net: UNet) -> tuple[int, ...]:
    """Of each attention to the text, counted as the published files do."""
    names = [name for name in net.state_dict() if name.endswith("attn2.to_q.weight")]
    order = {"input_blocks": 0, "output_blocks": 1, "middle_block": 2}
    names.sort(key=lambda name: order[name.split(".")[0]])  # stable: within, as registered
    return tuple(net.state_dict()[name].shape[0] for name in names)


def ip(net: UNet, kind: str, seed: int = 7) -> IPAdapter:
    shape = IPShape(kind=kind, image_dim=40, context_dim=24, widths=widths_of(net))
    if kind == "plus":
        shape = replace(shape, tokens=6, inner=48, depth=4, heads=2)
    elif kind == "image":
        shape = replace(shape, tokens=4)
    adapter = IPAdapter(shape)
    randomise(adapter, seed)
    assert ip_shape(shapes_of(adapter)) == shape
    return adapter.requires_grad_(False)


def nested(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """As the published .bin files have it, and as diffusers loads it."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in adapter.state_dict().items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


@pytest.mark.parametrize("kind", ["image", "plus", "full"])
@BOTH
@torch.no_grad()
def test_ip_adapter_equals_diffusers(kind: str, shape: UNetShape) -> None:
    theirs, net = theirs_and_ours(shape)
    adapter = ip(net, kind)
    theirs._load_ip_adapter_weights([nested(adapter)], low_cpu_mem_usage=False)
    given, added = inputs(shape, (11, 7))
    image = torch.randn(2, 40) if kind == "image" else torch.randn(2, 9, 40)
    projected = theirs.encoder_hid_proj.image_projection_layers[0](image)
    tokens = adapter(image)
    assert error(tokens, projected) <= 1e-5
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.6]
    want = theirs(
        given["x"], given["t"], given["context"], added_cond_kwargs=added | {"image_embeds": [image[:, None]]}
    ).sample
    before = net(**given)
    with with_image(net, adapter) as prompt:
        prompt.tokens, prompt.scale = tokens, 0.6
        got = net(**given)
    assert error(got, want) <= 1e-5
    assert error(got, before) > 0.01


@torch.no_grad()
def test_two_pictures_equal_diffusers() -> None:
    theirs, net = theirs_and_ours(SD1)
    first, second = ip(net, "image"), ip(net, "plus", seed=8)
    theirs._load_ip_adapter_weights([nested(first), nested(second)], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.6, 0.3]
    given, _ = inputs(SD1)
    images = torch.randn(2, 40), torch.randn(2, 9, 40)
    want = theirs(
        given["x"],
        given["t"],
        given["context"],
        added_cond_kwargs={"image_embeds": [image[:, None] for image in images]},
    ).sample
    with with_image(net, first) as one, with_image(net, second) as two:
        one.tokens, one.scale = first(images[0]), 0.6
        two.tokens, two.scale = second(images[1]), 0.3
        assert error(net(**given), want) <= 1e-5


@torch.no_grad()
def test_the_unet_is_left_as_it_was() -> None:
    _, net = theirs_and_ours(SD1)
    adapter, (given, _) = ip(net, "image"), inputs(SD1)
    modules, names, before = list(net.modules()), list(net.state_dict()), net(**given)
    with pytest.raises(RuntimeError, match="on purpose"), with_image(net, adapter) as prompt:
        assert list(net.state_dict()) == names
        assert torch.equal(net(**given), before)  # no tokens: nothing, exactly
        prompt.tokens = adapter(torch.randn(1, 40))
        assert error(net(**given), before) > 0.01
        prompt.tokens = torch.cat((prompt.tokens, torch.zeros_like(prompt.tokens)))
        told = net(**given)  # zeros tell nothing, row by row
        assert error(told[0], before[0]) > 0.01 and error(told[1], before[1]) <= 1e-5
        prompt.tokens, prompt.scale = prompt.tokens[:1], torch.tensor([1.0, 0.0])
        assert error(net(**given), told) <= 1e-5
        prompt.tokens = torch.zeros(3, 4, 24)
        with pytest.raises(BadInput, match=r"1 or 2 rows"):
            net(**given)
        raise RuntimeError("on purpose")
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert list(net.state_dict()) == names and torch.equal(net(**given), before)


def test_ip_names_are_the_published_ones() -> None:
    adapter = ip(UNet(SD1), "image")
    numbers = sorted(
        {int(name.split(".")[1]) for name in adapter.state_dict() if name.startswith("ip_adapter")}
    )
    assert numbers == list(range(1, 2 * 16, 2))  # 16 attentions to the text, as in SD 1.5
    plus = set(ip(UNet(SD1), "plus").state_dict())
    assert {
        "image_proj.latents",
        "image_proj.layers.3.0.norm2.bias",
        "image_proj.layers.0.0.to_kv.weight",
        "image_proj.layers.1.1.0.weight",
        "image_proj.layers.1.1.3.weight",
        "image_proj.norm_out.weight",
    } <= plus
    assert "image_proj.layers.0.0.to_out.bias" not in plus and "image_proj.layers.0.1.1.bias" not in plus


@pytest.mark.parametrize(
    ("kind", "key", "size"),
    [
        ("image", "image_proj.proj.weight", None),
        ("image", "image_proj.proj.weight", (97, 40)),
        ("image", "ip_adapter.1.to_k_ip.weight", None),
        ("plus", "image_proj.layers.0.0.to_q.weight", (100, 48)),
        ("plus", "image_proj.proj_in.weight", (48,)),
    ],
)
def test_a_senseless_ip_header_is_refused(kind: str, key: str, size: tuple[int, ...] | None) -> None:
    shapes = shapes_of(ip(UNet(SD1), kind))
    shapes.pop(key)
    with pytest.raises(BadFile) as caught:
        ip_shape(shapes | ({key: size} if size else {}))
    assert key in str(caught.value)


def test_what_does_not_fit_ip_is_refused() -> None:
    adapter = ip(UNet(SD1), "plus")
    with pytest.raises(BadInput, match=r"\[B, n, 40\]"):
        adapter(torch.zeros(2, 40))
    with pytest.raises(BadInput, match="does not fit"), with_image(UNet(SDXL), adapter):
        pass
    low = adapter.bfloat16()(torch.randn(1, 9, 40).bfloat16())
    assert low.dtype == torch.bfloat16 and low.shape == (1, 6, 24) and low.isfinite().all()
