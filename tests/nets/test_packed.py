"""Packed layers: the same numbers as expanded ones, types that no cast touches, and reads of ``weight`` that work.

The scheme of these tests is none that files have: whole numbers times a float for each row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadInput
from sumuk.nets.packed import PackedLinear, pack, packable, packed_weights, shapes
from sumuk.nets.t5 import T5Encoder, T5Shape

CPU = torch.device("cpu")


def expand(stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    assert stored["rows"].dtype == torch.float32 and stored["numbers"].dtype == torch.int8
    assert stored["eighth"].dtype == torch.float8_e5m2
    return (stored["numbers"] * stored["rows"] * stored["eighth"].float()).to(dtype)


@dataclass(frozen=True)
class Value:
    stored: Callable[[], dict[str, Tensor]]
    scheme: str = "rows"
    expand: Callable[[Mapping[str, Tensor], torch.dtype], Tensor] = expand


def value(*shape: int) -> Value:
    torch.manual_seed(0)
    stored = {
        "numbers": torch.randint(-127, 128, shape, dtype=torch.int8),
        "rows": torch.rand(shape[0], *[1] * (len(shape) - 1)) / 127,
        "eighth": torch.tensor(0.125).to(torch.float8_e5m2),
    }
    return Value(lambda: stored)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8, padding_idx=1)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 5, bias=False)])

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[1](self.layers[0](self.table(ids)).tanh()), self.conv(x)


NAMES = {
    "table.weight": (10, 8),
    "conv.weight": (6, 4, 3, 3),
    "layers.0.weight": (12, 8),
    "layers.1.weight": (5, 12),
}


def pair(dtype: torch.dtype = torch.float32) -> tuple[Net, Net]:
    """The same network with its weights expanded and packed."""
    torch.manual_seed(1)
    plain = Net().to(dtype)
    packed = copy.deepcopy(plain)
    for name, shape in NAMES.items():
        one = value(*shape)
        plain.get_parameter(name).data = expand(one.stored(), dtype)
        pack(packed, name, one, CPU, dtype)
    return plain.requires_grad_(False), packed.requires_grad_(False)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randint(0, 10, (2, 3)), torch.randn(2, 4, 7, 6).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_and_expanded_answer_the_same(dtype: torch.dtype):
    plain, packed = pair(dtype)
    for one, other in zip(plain(*inputs(dtype)), packed(*inputs(dtype)), strict=True):
        assert one.dtype == dtype and torch.equal(one, other)


def test_no_cast_touches_what_is_stored():
    """Eight-bit floats and scales are floats, which ``.to(dtype)`` would cast and round."""
    _, packed = pair()
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items() if ".packed." in name}
    bf16 = packed.to(torch.bfloat16)
    for change in (bf16.half, bf16.double, bf16.float, bf16.bfloat16):
        change()
    after = packed.state_dict()
    for name, old in before.items():
        assert after[name].dtype == old.dtype and after[name].shape == old.shape
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), old.reshape(-1).view(torch.uint8))
    assert packed.conv.bias.dtype == torch.bfloat16
    assert packed.layers[0].weight.dtype == torch.bfloat16
    plain, _ = pair(torch.bfloat16)
    assert torch.equal(packed.table(torch.arange(10)), plain.table(torch.arange(10)))


def test_what_is_stored_moves_with_its_layer():
    _, packed = pair()
    packed.to("meta")
    assert all(tensor.is_meta for tensor in packed.state_dict().values())
    assert packed.layers[0](torch.empty(3, 8, device="meta")).shape == (3, 12)


def test_the_state_is_what_is_stored():
    plain, packed = pair()
    state = packed.state_dict()
    own = {f"layers.0.packed.{name}" for name in ("numbers", "rows", "eighth")}
    assert {name for name in state if name.startswith("layers.0.")} == own | {"layers.0.bias"}
    assert not any(name.endswith("weight") for name, _ in packed.named_parameters())
    assert shapes(packed) == shapes(plain) == {name: tuple(v.shape) for name, v in plain.state_dict().items()}
    assert {name: one.shape for name, one in packed_weights(packed).items()} == NAMES
    assert packed_weights(plain) == {}
    _, other = pair()
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(*inputs(torch.float32))[0], packed(*inputs(torch.float32))[0])


def test_copies_are_their_own():
    _, packed = pair()
    other = copy.deepcopy(packed)
    packed.get_buffer("layers.0.packed.numbers").zero_()
    assert other.layers[0].weight.abs().max() > 0 and packed.layers[0].weight.abs().max() == 0


def test_weights_are_read_and_not_written():
    plain, packed = pair()
    layer = packed.layers[0]
    assert isinstance(layer, nn.Linear) and isinstance(layer, PackedLinear)
    assert torch.equal(layer.weight, plain.layers[0].weight) and "rows, shape=[12, 8], bytes=145" in repr(
        packed
    )
    with pytest.raises(RuntimeError, match="inference tensor"):
        layer.weight.add_(1.0)
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(12, 8))


def test_hooks_stay_and_gradients_reach_the_input():
    plain, packed = pair()
    seen = []
    packed.layers[0].register_forward_hook(lambda layer, x, out: seen.append(out) or 2 * out)
    x = torch.randn(3, 8, requires_grad=True)
    packed.layers[0](x).sum().backward()
    assert len(seen) == 1 and x.grad is not None
    assert torch.equal(x.grad, 2 * torch.ones(3, 12) @ plain.layers[0].weight)


def test_a_hook_set_before_packing_is_called_after_it():
    net = Net()
    seen = []
    net.layers[1].register_forward_hook(lambda *_: seen.append(1))
    pack(net, "layers.1.weight", value(5, 12), CPU, torch.float32)
    net.layers[1](torch.zeros(1, 12))
    assert seen == [1]


def test_a_network_without_numbers_can_be_packed():
    with torch.device("meta"):
        net = Net()
    made = pack(net, "layers.1.weight", value(5, 12), CPU, torch.float32)
    assert sorted(made) == [f"layers.1.packed.{name}" for name in ("eighth", "numbers", "rows")]
    assert net.layers[1](torch.ones(2, 12)).shape == (2, 5)
    assert list(pack(nn.Linear(2, 3), "weight", value(3, 2), CPU, torch.float32)) == [
        "packed.numbers",
        "packed.rows",
        "packed.eighth",
    ]


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.square())


def test_other_layers_cannot_stay_packed():
    odd = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "odd": Odd(2, 2),
            "norm": nn.LayerNorm(4),
            "turned": nn.ConvTranspose2d(2, 2, 1),
            "clipped": nn.Embedding(3, 2, max_norm=1.0),
            "fine": nn.Linear(2, 2),
        }
    )
    names = [name for name, _ in odd.named_parameters()]
    assert [name for name in names if packable(odd, name)] == ["fine.weight"]
    assert not packable(odd, "nothing.weight") and not packable(odd, "fine.packed")
    with pytest.raises(BadInput, match=r"'attention\.out_proj\.weight' cannot stay packed"):
        pack(odd, "attention.out_proj.weight", value(8, 8), CPU, torch.float32)
    pack(odd, "fine.weight", value(2, 2), CPU, torch.float32)
    with pytest.raises(BadInput):
        pack(odd, "fine.weight", value(2, 2), CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_that_reads_its_weights_itself(dtype: torch.dtype):
    """T5 takes types and, in float16, a whole product from ``.weight``."""
    torch.manual_seed(0)
    plain = T5Encoder(T5Shape(vocabulary=30, width=64, depth=2, hidden=128, heads=4, head=16)).to(dtype)
    packed = copy.deepcopy(plain)
    for name, parameter in plain.named_parameters():
        if parameter.ndim == 2:
            one = value(*parameter.shape)
            parameter.data = expand(one.stored(), dtype)
            pack(packed, name, one, CPU, dtype)
    assert len(packed_weights(packed)) == 16
    ids = torch.randint(0, 30, (2, 5))
    with torch.no_grad():
        for more in ({}, {"embeddings": torch.randn(2, 5, 64)}):
            assert torch.equal(plain(ids, **more).last, packed(ids, **more).last)
