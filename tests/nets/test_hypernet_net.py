"""Hypernetworks against A1111's construction and its attention, row by row, and that the U-Net is left as it was."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sumuk.base.errors import BadInput
from sumuk.nets.attention import CrossAttention, attend
from sumuk.nets.hypernet import ACTIVATIONS, HypernetShape, Hypernetwork, with_hypernets
from sumuk.nets.ip_adapter import ImageAttention, IPAdapter, IPShape, with_image
from sumuk.nets.unet import UNet, UNetShape

SHAPE = UNetShape(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(1, 1),
    middle_depth=1,
    context_dim=24,
    heads=8,
)
ALL = (24, 32, 64)
"""Widths of text, and of the sequence at both levels."""


def fill(net: nn.Module, seed: int, scale: float = 1.0) -> Any:
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return net.eval().requires_grad_(False)


@cache
def unet() -> UNet:
    return fill(UNet(SHAPE), 0)


def hypernet(seed: int = 1, widths: tuple[int, ...] = ALL, **more: Any) -> Hypernetwork:
    return fill(Hypernetwork(HypernetShape(widths=widths, **more)), seed, 0.5)


@cache
def given(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randn(rows, 4, 8, 8), torch.linspace(50, 900, rows), torch.randn(rows, 6, 24)


@torch.inference_mode()
def asked(*worn: Any, rows: slice = slice(None)) -> Tensor:
    with with_hypernets(unet(), worn):
        return unet()(*(each[rows] for each in given()))


def a1111(width: int, shape: HypernetShape, tensors: dict[str, Tensor]) -> nn.Sequential:
    """One side as FORMATS describes it: linear, activation unless last, norm, dropout, all numbered in one row."""
    kinds = {name.lower(): getattr(nn, name) for name in dir(nn) if isinstance(getattr(nn, name), type)}
    kinds["swish"] = nn.Hardswish
    layers: list[nn.Module] = []
    count = len(shape.layers) - 1
    for i in range(count):
        layers.append(nn.Linear(int(width * shape.layers[i]), int(width * shape.layers[i + 1])))
        if shape.activation != "linear" and not (i == count - 1 and not shape.activate_output):
            layers.append(kinds[shape.activation]())
        if shape.norm:
            layers.append(nn.LayerNorm(int(width * shape.layers[i + 1])))
        if shape.dropout and shape.dropout[i + 1] > 0:
            layers.append(nn.Dropout(p=shape.dropout[i + 1]))
    made = nn.Sequential(*layers)
    made.load_state_dict({name.removeprefix("linear."): value for name, value in tensors.items()})
    return made.eval()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_each_activation_is_a1111s(activation):
    for more in ({}, {"activate_output": False}, {"norm": True, "dropout": (0, 0.3, 0.3, 0)}):
        ours = hypernet(widths=(24,), layers=(1, 2, 1.5, 1), activation=activation, **more)
        for side, each in enumerate(ours["24"]):
            prefix = f"24.{side}."
            tensors = {
                name.removeprefix(prefix): value
                for name, value in ours.state_dict().items()
                if name.startswith(prefix)
            }
            theirs = a1111(24, ours.shape, tensors)
            x = given()[2]
            assert torch.equal(each(x), theirs(x))
            assert not torch.equal(each(x), x)


def test_names_are_those_of_files():
    ours = hypernet(widths=(24, 32), activation="relu", norm=True, dropout=(0, 0.3, 0))
    assert [name for name in ours.state_dict() if name.startswith("32.1")] == [
        f"32.1.linear.{place}.{leaf}" for place in (0, 2, 4, 6) for leaf in ("weight", "bias")
    ]
    assert ours.state_dict()["24.0.linear.0.weight"].shape == (48, 24)
    assert {name.split(".")[2] for name in hypernet().state_dict()} == {"linear"}


def directly(monkeypatch: pytest.MonkeyPatch, *worn: tuple[Hypernetwork, float]) -> None:
    """A1111's attention in place of ours: hypernetworks inside its forward, by the width of the context."""

    def forward(self: CrossAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
        k = v = x if context is None else context
        for each, strength in worn:
            if str(k.shape[2]) in each:
                keys, values = each[str(k.shape[2])]
                k, v = k + keys(k) * strength, v + values(v) * strength
        return self.to_out(attend(self.to_q(x), self.to_k(k), self.to_v(v), self.heads))

    monkeypatch.setattr(CrossAttention, "forward", forward)


@pytest.mark.parametrize("widths", [ALL, (24,), (64, 999)], ids=str)
def test_attention_is_changed_as_a1111_does(monkeypatch, widths):
    one = hypernet(1, widths, activation="relu"), 0.7
    two = hypernet(2, ALL, layers=(1, 3, 1), activation="mish", norm=True), -0.4
    plain, first, both, turned = asked(), asked(one), asked(one, two), asked(two, one)
    with monkeypatch.context() as patch, torch.inference_mode():
        directly(patch, one)
        assert torch.equal(first, unet()(*given()))
        directly(patch, one, two)
        assert torch.equal(both, unet()(*given()))
    for other in (first, both, turned):
        assert float((other - plain).abs().max() / plain.abs().max()) > 1e-3
    assert not torch.equal(both, turned)


def test_the_unet_is_left_as_it_was():
    before = {name: value.clone() for name, value in unet().state_dict().items()}
    plain = asked()
    assert not torch.equal(asked((hypernet(), 1.0)), plain)
    with pytest.raises(BadInput, match="2 strengths of a hypernetwork do not fit a batch of 3 rows"):
        asked((hypernet(), 1.0), (hypernet(), [1.0, 0.5]))
    assert torch.equal(asked(), plain)
    assert all(not each._forward_pre_hooks and not each._forward_hooks for each in unet().modules())
    after = unet().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_each_row_has_its_own_strength():
    one, two = hypernet(1, activation="relu"), hypernet(2)
    mixed = asked((one, [0.0, 1.0, 0.5]), (two, torch.tensor([0.0, 0.0, -1.0])))
    alone = [asked(rows=slice(0, 1)), asked((one, 1.0), rows=slice(1, 2))]
    alone.append(asked((one, [0.5]), (two, [-1.0]), rows=slice(2, 3)))
    for row, single in enumerate(alone):
        assert torch.allclose(mixed[row : row + 1], single, rtol=1e-4, atol=1e-5)
        assert float((mixed[row] - asked()[row]).abs().max()) > 1e-2 or row == 0
    assert torch.equal(mixed[0], asked()[0])  # among rows that are changed, to the bit
    assert torch.equal(asked((one, [0.0] * 3)), asked())
    assert torch.equal(asked((one, [0.7] * 3)), asked((one, 0.7)))
    assert torch.equal(asked((one, 0)), asked())


@pytest.mark.parametrize("inside", [False, True])
def test_with_a_picture_beside_the_text(monkeypatch, inside):
    widths = tuple(each.to_q.in_features for each in unet().modules() if _is_cross(each))
    adapter = fill(
        IPAdapter(IPShape(kind="image", image_dim=5, context_dim=24, widths=_ordered(widths), tokens=4)), 3
    )
    one = hypernet(1, activation="relu"), 0.7
    tokens = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(2))

    def both() -> Tensor:
        with ExitStack() as stack, torch.inference_mode():
            if inside:
                stack.enter_context(with_hypernets(unet(), [one]))
            prompt = stack.enter_context(with_image(unet(), adapter))
            prompt.tokens, prompt.scale = tokens, 0.5
            if not inside:
                stack.enter_context(with_hypernets(unet(), [one]))
            return unet()(*given())

    plain, found = asked(), both()
    assert not torch.equal(found, asked(one))
    assert torch.equal(asked(), plain)
    monkeypatch.setattr(ImageAttention, "forward", _by_hand(*one))
    with with_image(unet(), adapter) as prompt, torch.inference_mode():
        prompt.tokens, prompt.scale = tokens, 0.5
        directly(monkeypatch, one)
        assert torch.equal(unet()(*given()), found)


def _by_hand(hypernet: Hypernetwork, strength: float) -> Any:
    """The attention to text and picture with a hypernetwork on the text alone."""

    def forward(self: Any, x: Tensor, context: Tensor) -> Tensor:
        q = self.to_q(x)
        keys, values = hypernet[str(context.shape[2])]
        k, v = context + keys(context) * strength, context + values(context) * strength
        out = attend(q, self.to_k(k), self.to_v(v), self.heads)
        for layers, prompt in self.pictures:
            seen = prompt.tokens.expand(len(x), -1, -1)
            out = out + attend(q, layers.to_k_ip(seen), layers.to_v_ip(seen), self.heads) * prompt.scale
        return self.to_out(out)

    return forward


def _is_cross(module: nn.Module) -> bool:
    return isinstance(module, CrossAttention) and module.to_k.in_features == 24


def _ordered(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Down, up, middle: the middle's, which stands before the last ones, comes last."""
    down = widths[:2]
    return (*down, *widths[3:], widths[2])


def test_in_half_precision():
    torch.manual_seed(0)
    net = fill(UNet(SHAPE), 0).bfloat16()
    x, t, context = given()
    with torch.inference_mode():
        plain = net(x.bfloat16(), t, context.bfloat16())
        with with_hypernets(net, [(hypernet(), 1.0)]):
            found = net(x.bfloat16(), t, context.bfloat16())
        with with_hypernets(net, [(hypernet().bfloat16(), [0.0, 1.0, 1.0])]):
            same = net(x.bfloat16(), t, context.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found - asked((hypernet(), 1.0))).abs().max() / found.abs().max()) < 0.05
    assert torch.equal(same[0], plain[0])


def test_what_does_nothing_or_is_no_number_is_refused():
    with pytest.raises(
        BadInput, match=r"for the widths 768, 320 changes nothing in this network, which attends to"
    ):
        asked((hypernet(widths=(768, 320)), 1.0))
    with (
        pytest.raises(BadInput, match="which has no such attention"),
        with_hypernets(nn.Linear(2, 2), [(hypernet(), 1.0)]),
    ):
        pass
    for strength in (float("nan"), [1.0, float("inf"), 0.0]):
        with pytest.raises(BadInput, match="is no finite number"):
            asked((hypernet(), strength))
    with pytest.raises(BadInput, match="is on meta, the network on cpu"):
        asked((Hypernetwork(HypernetShape(widths=ALL)).to("meta"), 1.0))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"widths": ()}, "widths of at least 1"),
        ({"layers": (1,)}, "must begin and end with 1"),
        ({"layers": (1, 2)}, "must begin and end with 1"),
        ({"layers": (1, 1e9, 1)}, "at most 64 each"),
        ({"layers": (1, float("nan"), 1)}, "must begin and end with 1"),
        ({"layers": (1, 0.01, 1)}, "leave no channel of width 24"),
        ({"activation": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
        ({"activation": "softmax"}, "'softmax' mixes the pictures of a batch"),
        ({"dropout": (0, 0.5)}, "must be 3 shares"),
        ({"dropout": (0, 1.0, 0)}, "must be 3 shares"),
    ],
)
def test_shapes_that_a1111_does_not_make(wrong, says):
    with pytest.raises(BadInput, match=says):
        HypernetShape(**({"widths": (24,)} | wrong))
