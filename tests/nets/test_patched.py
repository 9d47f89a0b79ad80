"""Thin layers and exchanged parameters: they do what the sum of weights does, row by row, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sumuk.base.errors import BadInput
from sumuk.nets.patched import Thin, with_parameters, with_thin


class Small(nn.Module):
    """Two linear layers, two convolutions, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.wide = nn.Conv2d(12, 8, 3, stride=2, padding=1)
        self.flat = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.first(x))
        return self.flat(self.wide(h.movedim(-1, 1)))


@pytest.fixture
def network() -> Small:
    torch.manual_seed(0)
    return Small().double().requires_grad_(False)


X = torch.randn(3, 5, 7, 6, generator=torch.Generator().manual_seed(1)).double()


def changed(network: Small, **deltas: torch.Tensor) -> torch.Tensor:
    """What the network with other weights makes of X."""
    values = {name: getattr(network, name).weight + delta for name, delta in deltas.items()}
    h = F.linear(X, values.get("first", network.first.weight), network.first.bias)
    h = network.norm(h).movedim(-1, 1)
    h = F.conv2d(h, values.get("wide", network.wide.weight), network.wide.bias, 2, 1)
    return F.conv2d(h, values.get("flat", network.flat.weight), network.flat.bias)


def thin(layer: str, down: tuple[int, ...], up: tuple[int, ...], rows: tuple[int, int] | None = None) -> Thin:
    torch.manual_seed(len(layer))
    return Thin(layer, torch.randn(down).double(), torch.randn(up).double(), 0.5, rows)


def product(one: Thin, shape: torch.Size) -> torch.Tensor:
    """The weight that a thin pair stands for."""
    delta = 0.5 * one.up.flatten(1) @ one.down.flatten(1)
    full = torch.zeros(shape).double()
    begin, end = one.rows or (0, shape[0])
    full[begin:end] = delta.reshape(end - begin, *shape[1:])
    return full


@pytest.mark.parametrize(
    "one",
    [
        thin("first", (2, 6), (12, 2)),
        thin("first", (2, 6), (4, 2), (8, 12)),
        thin("wide", (2, 12, 3, 3), (8, 2, 1, 1)),
        thin("wide", (2, 12, 3, 3), (8, 2)),
        thin("flat", (2, 8), (8, 2)),
        thin("flat", (2, 8, 1, 1), (3, 2, 1, 1), (0, 3)),
    ],
    ids=["linear", "part of a stack", "3x3", "3x3 with a flat up", "1x1 flat", "1x1, part"],
)
def test_a_thin_pair_is_its_product(network: Small, one: Thin) -> None:
    delta = product(one, getattr(network, one.layer).weight.shape)
    with with_thin(network, [(one, [0.7] * 3)]):
        torch.testing.assert_close(
            network(X), changed(network, **{one.layer: 0.7 * delta}), rtol=1e-12, atol=1e-12
        )


def test_each_row_has_its_own_strength_and_0_is_untouched_bit_for_bit(network: Small) -> None:
    before = network(X)
    ink, wash = thin("first", (2, 6), (12, 2)), thin("wide", (2, 12, 3, 3), (8, 2, 1, 1))
    with with_thin(network, [(ink, [0.0, 0.7, -1.0]), (wash, [0.0, 0.0, 2.0])]):
        after = network(X)
    a, b = product(ink, network.first.weight.shape), product(wash, network.wide.weight.shape)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], changed(network, first=0.7 * a)[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after[2], changed(network, first=-a, wide=2 * b)[2], rtol=1e-12, atol=1e-12)
    assert torch.equal(network(X), before)


def test_what_acts_on_no_row_is_not_even_attached(network: Small) -> None:
    with with_thin(network, [(thin("first", (2, 6), (12, 2)), [0.0, 0.0, 0.0])]):
        assert not any(module._forward_hooks for module in network.modules())


def test_hooks_go_also_when_the_forward_fails(network: Small) -> None:
    with pytest.raises(RuntimeError), with_thin(network, [(thin("first", (2, 6), (12, 2)), [1.0] * 3)]):
        network(X[..., :5])
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("layer", ["norm", "nowhere"])
def test_layers_that_cannot_be_added_to_are_refused(network: Small, layer: str) -> None:
    with (
        pytest.raises(BadInput, match=layer),
        with_thin(network, [(thin(layer, (2, 6), (12, 2)), [1.0] * 3)]),
    ):
        pass


def test_parameters_are_exchanged_and_the_very_same_come_back(network: Small) -> None:
    before, old = network(X), dict(network.named_parameters())
    weight = torch.randn(12, 6).double()
    with with_parameters(network, {"first.weight": weight, "norm.bias": torch.ones(12).double()}):
        assert torch.equal(network.first.weight, weight) and not torch.equal(network(X), before)
    assert all(value is old[name] for name, value in network.named_parameters())
    assert torch.equal(network(X), before)


def test_unknown_parameters_are_refused_and_the_others_come_back(network: Small) -> None:
    old = network.first.weight
    some = {"first.weight": torch.zeros(12, 6).double(), "first.scale": torch.zeros(1)}
    with pytest.raises(BadInput, match=r"first\.scale"), with_parameters(network, some):
        pass
    assert network.first.weight is old
    with pytest.raises(BadInput, match="no layer 'other'"), with_parameters(network, {"other.weight": old}):
        pass
