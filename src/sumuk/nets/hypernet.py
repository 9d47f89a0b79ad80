"""Hypernetworks of A1111's kind: small networks that change what a U-Net's attentions look at.

For the context c of an attention, its width picks two networks f and g, and keys and values are made of what they
change, at strength s::

    k = to_k(c + s f(c)),    v = to_v(c + s g(c))

Self-attention is changed too; there c is the sequence itself. f and g are linear layers, each of which may be followed
by an activation, a norm and a dropout, numbered in one row. They attach from outside, and leave the U-Net as it was,
bit for bit.

Source: AUTOMATIC1111 stable-diffusion-webui 1.10, hypernetworks. Parameter names are those of its files, made flat:
``768.0.linear.0.weight`` is of width 768, keys (1: values), first place.

Letters: B batch, M tokens of the context, D its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadInput, nearest
from sumuk.nets.attention import CrossAttention

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "tanh": nn.Tanh,
    "swish": nn.Hardswish,  # that is what A1111 calls so; the usual swish is "silu"
    "sigmoid": nn.Sigmoid, "celu": nn.CELU, "gelu": nn.GELU, "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "hardtanh": nn.Hardtanh, "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish, "prelu": nn.PReLU, "relu6": nn.ReLU6, "rrelu": nn.RReLU, "selu": nn.SELU, "silu": nn.SiLU,
    "softplus": nn.Softplus, "softshrink": nn.Softshrink, "softsign": nn.Softsign, "tanhshrink": nn.Tanhshrink,
}  # fmt: skip
"""By the names in files: all of torch's that act on each number by itself."""
MIXING = ("softmax", "softmin", "softmax2d", "logsoftmax")
"""Activations that A1111 lists, where they run over the batch: a picture would depend on its company."""
MOST_LAYERS = 32
MOST_FACTOR = 64.0
"""Of a layer's width against the context's; published files have 4 at most."""

Strength = float | Sequence[float] | Tensor
"""Of a hypernetwork: one for all rows, or one for each row of the batch; a row of strength 0 is left alone, exactly."""


@dataclass(frozen=True, kw_only=True)
class HypernetShape:
    """What a file says of its networks.

    Attributes:
        widths: of the contexts that it changes.
        layers: widths before, between and after the linear layers, as multiples of the context's; first and last 1.
        activation: name in :data:`ACTIVATIONS`; ``linear`` is none.
        activate_output: whether the activation follows the last layer too.
        norm: whether a layer norm follows each layer.
        dropout: for each of ``layers`` the share that training drops there, which drawing does not; empty: none.

    Raises:
        BadInput: any of it is not what A1111 makes.
    """

    widths: tuple[int, ...]
    layers: tuple[float, ...] = (1.0, 2.0, 1.0)
    activation: str = "linear"
    activate_output: bool = True
    norm: bool = False
    dropout: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 for width in self.widths):
            raise BadInput(f"a hypernetwork needs widths of at least 1, not {list(self.widths)}")
        inside = all(0 < factor <= MOST_FACTOR for factor in self.layers)
        if not 2 <= len(self.layers) <= MOST_LAYERS or not inside or {self.layers[0], self.layers[-1]} != {1}:
            raise BadInput(
                f"layers {list(self.layers)!s:.80} must begin and end with 1, be 2 to {MOST_LAYERS} numbers and at "
                f"most {MOST_FACTOR:g} each"
            )
        if any(int(width * factor) < 1 for width in self.widths for factor in self.layers):
            raise BadInput(f"layers {list(self.layers)!s:.80} leave no channel of width {min(self.widths)}")
        if self.activation in MIXING:
            raise BadInput(
                f"activation {self.activation!r} mixes the pictures of a batch, and is not supported"
            )
        if self.activation not in ACTIVATIONS:
            raise BadInput(
                f"unknown activation {self.activation!r:.40}{nearest(self.activation, ACTIVATIONS)}"
            )
        good = all(0 <= share < 1 for share in self.dropout)
        if self.dropout and (len(self.dropout) != len(self.layers) or not good):
            raise BadInput(
                f"dropout {list(self.dropout)!s:.80} must be {len(self.layers)} shares from 0 to below 1, one for each "
                "layer"
            )


class Side(nn.Module):
    """What is added to the context on its way to the keys, or to the values; ``[B, M, D]`` to the same."""

    def __init__(self, width: int, shape: HypernetShape) -> None:
        super().__init__()
        sizes = [int(width * factor) for factor in shape.layers]
        layers: list[nn.Module] = []
        for turn, (before, after) in enumerate(pairwise(sizes), start=1):
            layers.append(nn.Linear(before, after))
            last = turn == len(sizes) - 1
            if shape.activation != "linear" and (shape.activate_output or not last):
                layers.append(ACTIVATIONS[shape.activation]())
            if shape.norm:
                layers.append(nn.LayerNorm(after))
            if shape.dropout and shape.dropout[turn]:
                layers.append(nn.Dropout(shape.dropout[turn]))
        self.linear = nn.Sequential(*layers)

    def forward(self, context: Tensor) -> Tensor:
        return self.linear(context)


class Hypernetwork(nn.ModuleDict):
    """For each width two networks, of keys and values; a U-Net is told of them by :func:`with_hypernets`.

    Args:
        shape: see :class:`HypernetShape`.
    """

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__(
            {str(width): nn.ModuleList([Side(width, shape), Side(width, shape)]) for width in shape.widths}
        )
        self.shape = shape


@contextmanager
def with_hypernets(unet: nn.Module, worn: Sequence[tuple[Hypernetwork, Strength]]) -> Iterator[None]:
    """Let hypernetworks change what a network's attentions look at until the block ends.

    Several act one after the other, in their order. They touch neither the picture's tokens of an IP-Adapter nor its
    layers, so both can be attached, one inside the other, either way.

    Args:
        unet: the network; its :class:`~sumuk.nets.attention.CrossAttention` layers are changed.
        worn: each with its strength.

    Raises:
        BadInput: a hypernetwork for no width that this network has, or on another device; a strength that is no
            number; in a forward, strengths for another number of rows.
    """
    places = [each for each in unet.modules() if isinstance(each, CrossAttention)]
    widths = sorted({each.to_k.in_features for each in places})
    with ExitStack() as stack:
        for hypernet, strength in worn:
            strengths = _numbers(strength)
            _check(hypernet, widths, places)
            if not any(strengths if isinstance(strengths, list) else (strengths,)):
                continue
            for place in places:
                if (width := str(place.to_k.in_features)) in hypernet:
                    for layer, side in zip((place.to_k, place.to_v), _sides(hypernet, width), strict=True):
                        handle = layer.register_forward_pre_hook(_changing(side, strengths))
                        stack.callback(handle.remove)
        yield


def _sides(hypernet: Hypernetwork, width: str) -> list[nn.Module]:
    return [*hypernet[width].children()]


def _numbers(strength: Strength) -> float | list[float]:
    """One number, or a list with one for each row."""
    given = [float(strength)] if isinstance(strength, int | float) else [float(each) for each in strength]
    if wrong := [each for each in given if not isfinite(each)]:
        raise BadInput(f"strength {wrong[0]} of a hypernetwork is no finite number")
    return given[0] if isinstance(strength, int | float) else given


def _check(hypernet: Hypernetwork, widths: Sequence[int], places: Sequence[CrossAttention]) -> None:
    if not set(widths) & set(hypernet.shape.widths):
        has = f"attends to widths {', '.join(map(str, widths))}" if widths else "has no such attention"
        made = ", ".join(map(str, hypernet.shape.widths))
        raise BadInput(f"a hypernetwork for the widths {made} changes nothing in this network, which {has}")
    here, there = next(hypernet.parameters()).device, places[0].to_k.weight.device
    if here != there:
        raise BadInput(f"the hypernetwork is on {here}, the network on {there}; move it there with .to()")


def _changing(side: nn.Module, strengths: float | list[float]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    dtype = next(side.parameters()).dtype

    def changed(context: Tensor, strength: float | Tensor) -> Tensor:
        own = context.to(dtype)
        return (own + side(own) * strength).to(context.dtype)

    def change(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        context: Tensor = given[0]
        if isinstance(strengths, float):
            return (changed(context, strengths),)
        if len(strengths) != len(context):
            raise BadInput(
                f"{len(strengths)} strengths of a hypernetwork do not fit a batch of {len(context)} rows"
            )
        active = [row for row, strength in enumerate(strengths) if strength]
        factors = torch.tensor([strengths[row] for row in active], dtype=dtype, device=context.device)
        if len(active) == len(strengths):
            return (changed(context, factors[:, None, None]),)
        whole = context.clone()  # what others still read, and the rows that are left alone
        whole[active] = changed(context[active], factors[:, None, None])
        return (whole,)

    return change
