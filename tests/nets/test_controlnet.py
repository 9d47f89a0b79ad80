"""ControlNets of the U-Nets: names, numbers against diffusers, scaling, and those stored as changes."""

from __future__ import annotations

import gzip
import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from tests.nets.inventories import KEYS, inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.controlnet import controlnet_rules
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.control_lora import COPIED, control_lora, from_difference
from sumuk.nets.controlnet import ControlNet, ControlNetShape, controlnet_shape, scaled, summed
from sumuk.nets.layers import timestep_embedding
from sumuk.nets.unet import UNet, UNetShape

COMMON: dict[str, Any] = {"model_channels": 32, "context_dim": 24}
SD1 = ControlNetShape(
    **COMMON,
    channel_mult=(1, 2, 2),
    transformer_depth=(1, 1, 0),
    middle_depth=1,
    heads=8,
    hint_widths=(8, 12, 16),
)
SDXL = ControlNetShape(
    **COMMON,
    channel_mult=(1, 2, 2),
    transformer_depth=(0, 2, 3),
    middle_depth=3,
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


def configuration(shape: UNetShape) -> dict[str, Any]:
    """What diffusers calls such a network."""
    kinds = ["CrossAttn" if depth else "" for depth in shape.transformer_depth]
    widths = tuple(shape.model_channels * mult for mult in shape.channel_mult)
    config: dict[str, Any] = {
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "block_out_channels": widths,
        "cross_attention_dim": shape.context_dim,
        "transformer_layers_per_block": tuple(max(1, depth) for depth in shape.transformer_depth),
        "attention_head_dim": tuple(shape.heads or width // (shape.head_channels or 1) for width in widths),
        "use_linear_projection": shape.linear,
    }
    if shape.adm_in_channels:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape.adm_in_channels,
        }
    return config


def oracle(shape: ControlNetShape) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.ControlNetModel(
        **configuration(shape), conditioning_embedding_out_channels=shape.hint_widths
    )
    randomise(theirs)
    return theirs.eval().requires_grad_(False)


def ours(theirs: nn.Module, shape: ControlNetShape) -> ControlNet:
    state = {name: lazy(tensor) for name, tensor in theirs.state_dict().items()}
    moved = Layout(*controlnet_rules(state)).forward(state)
    moved.refuse_leftovers("diffusers")
    tensors = {name: one.load() for name, one in moved.tensors.items()}
    read = controlnet_shape(
        {name: tuple(one.shape) for name, one in moved.tensors.items()},
        heads=shape.heads,
        head_channels=shape.head_channels,
    )
    assert read == shape
    net = ControlNet(read)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def inputs(
    shape: ControlNetShape, size: tuple[int, int] = (16, 8)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Ours, and what diffusers wants beside x, t and context."""
    torch.manual_seed(1)
    given = {
        "x": torch.randn(2, 4, *size),
        "t": torch.rand(2) * 999,
        "hint": torch.rand(2, 3, *(side * shape.stride for side in size)),
        "context": torch.randn(2, 7, shape.context_dim or 0),
    }
    if not shape.adm_in_channels:
        return given, {}
    pooled, ids = torch.randn(2, shape.adm_in_channels - 6 * 256), torch.rand(2, 6) * 1024
    given["y"] = torch.cat((pooled, timestep_embedding(ids.flatten(), 256).reshape(2, -1)), dim=1)
    return given, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def worst(got: tuple[list[Tensor], Tensor], want: tuple[list[Tensor], Tensor]) -> float:
    assert len(got[0]) == len(want[0])
    return max(error(a, b) for a, b in zip([*got[0], got[1]], [*want[0], want[1]], strict=True))


# -- names and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads"), [("controlnet_sd15", {"heads": 8}), ("controlnet_sd21", {"head_channels": 64})]
)
def test_published_names_and_shapes(name: str, heads: dict[str, int]) -> None:
    published = inventory(name)
    with torch.device("meta"):
        net = ControlNet(controlnet_shape(published, **heads))
    assert shapes_of(net) == published
    assert net.shape.stride == 8 and net.shape.hint_channels == 3


@pytest.mark.parametrize("name", ["controlnet_sd15", "controlnet_sdxl"])
def test_published_diffusers_names(name: str) -> None:
    theirs = {
        key: lazy(torch.empty(size, device="meta")) for key, size in inventory(f"{name}.diffusers").items()
    }
    moved = Layout(*controlnet_rules(theirs)).forward(theirs)
    moved.refuse_leftovers(name)
    native = {key: tuple(one.shape) for key, one in moved.tensors.items()}
    with torch.device("meta"):
        net = ControlNet(
            controlnet_shape(native, **({"head_channels": 64} if "xl" in name else {"heads": 8}))
        )
    assert shapes_of(net) == native
    back = Layout(*controlnet_rules(native)).backward(moved.tensors)
    back.refuse_leftovers(name)
    assert {key: one.shape for key, one in back.tensors.items()} == {
        key: one.shape for key, one in theirs.items()
    }
    truth = KEYS / "maps" / f"{name}__to_diffusers.json.gz"
    if truth.exists():
        assert {key: one[0] for key, one in back.origin.items()} == json.loads(
            gzip.decompress(truth.read_bytes())
        )["map"]


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("input_hint_block.0.weight", None),
        ("input_hint_block.6.weight", None),
        ("input_hint_block.4.weight", (12,)),
        ("input_blocks.0.0.weight", None),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(key: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(ControlNet(SD1))
    shapes.pop(key)
    shapes |= {key: size} if size else {}
    with pytest.raises(BadFile, match="tensor ") as caught:
        controlnet_shape(shapes, heads=8)
    assert key in str(caught.value)


# -- numbers -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [(16, 8), (11, 7)], ids=["even", "odd"])
@torch.no_grad()
def test_equals_diffusers(shape: ControlNetShape, size: tuple[int, int]) -> None:
    theirs = oracle(shape)
    net = ours(theirs, shape)
    given, more = inputs(shape, size)
    for guess in (False, True):
        want = theirs(
            given["x"],
            given["t"],
            given["context"],
            given["hint"],
            conditioning_scale=0.7,
            guess_mode=guess,
            return_dict=False,
            **more,
        )
        assert worst(scaled(net(**given), 0.7, guess=guess), want) <= 1e-5


@BOTH
@torch.no_grad()
def test_with_its_unet_equals_diffusers(shape: ControlNetShape) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = oracle(shape)
    kinds = configuration(shape)["down_block_types"]
    ups = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    unet = diffusers.UNet2DConditionModel(**configuration(shape), up_block_types=ups)
    randomise(unet, seed=5)
    state = {name: lazy(tensor) for name, tensor in unet.state_dict().items()}
    moved = Layout(*controlnet_rules(state)).forward(state)
    moved.refuse_leftovers("unet")
    net = UNet(UNetShape(**{field.name: getattr(shape, field.name) for field in fields(UNetShape)}))
    net.load_state_dict({name: one.load() for name, one in moved.tensors.items()})
    given, more = inputs(shape, (11, 7))
    x, t, context, hint = (given[name] for name in ("x", "t", "context", "hint"))
    down, middle = theirs(x, t, context, hint, return_dict=False, **more)
    want = unet(
        x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle, **more
    ).sample
    alone = {name: tensor for name, tensor in given.items() if name != "hint"}
    got = net(**alone, residuals=ours(theirs, shape)(**given))
    assert error(got, want) <= 1e-5
    assert error(net(**alone), want) > 0.01


@torch.no_grad()
def test_layout_there_and_back_is_the_identity() -> None:
    net = ours(oracle(SDXL), SDXL)
    native = {name: lazy(tensor) for name, tensor in net.state_dict().items()}
    there = Layout(*controlnet_rules(native)).backward(native)
    there.refuse_leftovers("native")
    back = Layout(*controlnet_rules(there.tensors)).forward(there.tensors)
    back.refuse_leftovers("diffusers")
    assert back.tensors.keys() == native.keys()
    assert all(torch.equal(one.load(), native[name].load()) for name, one in back.tensors.items())
    lost = dict(there.tensors)
    lost["controlnet_mid_blok.weight"] = lost.pop("controlnet_mid_block.weight")
    with pytest.raises(BadFile, match="controlnet_mid_blok"):
        Layout(*controlnet_rules(lost)).forward(lost).refuse_leftovers("diffusers")


@torch.no_grad()
def test_scaling_and_adding() -> None:
    net, (given, _) = ours(oracle(SD1), SD1), inputs(SD1)
    once = net(**given)
    ramp = 10 ** torch.linspace(-1, 0, len(once[0]) + 1)
    guessed = scaled(once, 2.0, guess=True)
    for factor, got, want in zip(ramp, [*guessed[0], guessed[1]], [*once[0], once[1]], strict=True):
        torch.testing.assert_close(got, want * 2 * factor)
    assert worst(summed([once, scaled(once, 0.5)]), scaled(once, 1.5)) <= 1e-6
    assert worst(summed([once]), once) == 0
    pooled = scaled(once, 0.5, pooled=True, guess=True)
    assert pooled[1].shape[2:] == (1, 1)
    torch.testing.assert_close(pooled[0][3], 0.5 * once[0][3].mean((2, 3), keepdim=True))
    both = summed([once, pooled])
    assert [each.shape for each in both[0]] == [each.shape for each in once[0]]
    with pytest.raises(BadInput, match=r"\[9, 8\]"):
        summed([once, (once[0][:-1], once[1])])
    with pytest.raises(BadInput, match="one or more"):
        summed([])


@torch.no_grad()
def test_every_input_matters_and_one_picture_serves_all() -> None:
    net, (given, _) = ours(oracle(SDXL), SDXL), inputs(SDXL)
    before = net(**given)
    for name, tensor in given.items():
        assert worst(net(**given | {name: tensor + 0.5}), before) > 1e-4, name
    one = given | {"hint": given["hint"][:1]}
    both = given | {"hint": given["hint"][:1].expand(2, -1, -1, -1)}
    assert worst(net(**one), net(**both)) <= 1e-5


@torch.no_grad()
def test_bfloat16_runs_and_an_untrained_one_adds_nothing() -> None:
    net, (given, _) = ours(oracle(SD1), SD1), inputs(SD1)
    want = net(**given)
    low = net.bfloat16()(**given | {"x": given["x"].bfloat16()})
    assert all(each.dtype == torch.bfloat16 and each.isfinite().all() for each in [*low[0], low[1]])
    assert worst(([each.float() for each in low[0]], low[1].float()), want) <= 0.1
    fresh = ControlNet(SD1)(**given)
    assert not any(each.any() for each in [*fresh[0], fresh[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hint": torch.zeros(2, 3, 16, 8)}, r"\[2, 3, 64, 32\]"),
        ({"hint": torch.zeros(3, 3, 64, 32)}, r"not \[3, 3, 64, 32\]"),
        ({"x": torch.zeros(2, 9, 16, 8)}, r"\[B, 4, H, W\]"),
        ({"context": None}, "not None"),
        ({"y": torch.zeros(2, 3)}, "takes no vector"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given, _ = inputs(SD1)
    with pytest.raises(BadInput, match=message):
        ControlNet(SD1)(**given | change)


# -- stored as changes ---------------------------------------------------------------------------------------


def base_and_control() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shape = {field.name: getattr(SDXL, field.name) for field in fields(UNetShape)}
    unet, control = UNet(UNetShape(**shape)), ControlNet(SDXL)
    randomise(unet, 1)
    randomise(control, 2)
    return dict(unet.state_dict()), dict(control.state_dict())


def test_a_control_lora_becomes_a_controlnet() -> None:
    base, control = base_and_control()
    file: dict[str, Tensor] = {"lora_controlnet": torch.empty(0)}
    whole = {}
    for name, tensor in control.items():
        if name.startswith(COPIED) and tensor.ndim > 1:
            up, down = torch.randn(len(tensor), 3), torch.randn(3, tensor[0].numel())
            if tensor.ndim == 4:  # stored as convolutions
                up, down = up[:, :, None, None], down.unflatten(1, tensor.shape[1:])
            file[name.replace(".weight", ".up")], file[name.replace(".weight", ".down")] = up, down
            whole[name] = base[name] + torch.einsum("or,r...->o...", up.flatten(1), down)
        else:
            file[name] = whole[name] = tensor
    made = control_lora(base, file)
    assert made.keys() == control.keys()
    assert max(error(made[name], tensor) for name, tensor in whole.items()) <= 1e-6
    ControlNet(SDXL).load_state_dict(made)
    assert controlnet_shape({name: tuple(t.shape) for name, t in made.items()}, head_channels=16) == SDXL

    up = "input_blocks.4.1.transformer_blocks.1.attn2.to_k.up"
    for change, message in [
        ({up: None}, "to_k.down.*other half"),
        ({up: torch.zeros(63, 3)}, "made for another model"),
        ({up.replace(".up", ".down"): torch.zeros(2, 24)}, "made for another model"),
        ({"input_blocks.0.0.bias": torch.zeros(31)}, "input_blocks.0.0.bias.*another model"),
        ({"elsewhere.up": torch.zeros(1), "elsewhere.down": torch.zeros(1)}, "elsewhere.up.*lacks"),
        ({"stranger": torch.zeros(1)}, "stranger"),
    ]:
        with pytest.raises(BadFile, match=message):
            control_lora(base, {name: t for name, t in (file | change).items() if t is not None})


def test_a_control_lora_keeps_the_dtype_of_its_base() -> None:
    base, _ = base_and_control()
    base = {name: tensor.half() for name, tensor in base.items()}
    file = {"time_embed.0.up": torch.randn(128, 2).half(), "time_embed.0.down": torch.randn(2, 32).half()}
    made = control_lora(base, file)
    want = (
        base["time_embed.0.weight"].float()
        + file["time_embed.0.up"].float() @ file["time_embed.0.down"].float()
    )
    assert torch.equal(made["time_embed.0.weight"], want.half())
    assert torch.equal(made["time_embed.2.weight"], base["time_embed.2.weight"])
    assert not any(name.startswith("out") for name in made)


def test_differences_become_a_controlnet() -> None:
    base, control = base_and_control()
    file = {
        name: tensor - base[name] if name.startswith(COPIED) else tensor for name, tensor in control.items()
    }
    made = from_difference(base, file | {"difference": torch.ones(1)})
    assert made.keys() == control.keys()
    assert max(error(made[name], tensor) for name, tensor in control.items()) <= 1e-6
    name = "input_blocks.4.0.in_layers.2.weight"
    with pytest.raises(BadFile, match=name):
        from_difference({key: tensor for key, tensor in base.items() if key != name}, file)
    with pytest.raises(BadFile, match="another model"):
        from_difference(base | {name: torch.zeros(1)}, file)
