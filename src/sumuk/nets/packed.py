"""Layers whose weight stays as it is stored, quantised, and is expanded in each forward.

    y = expand(stored) x + b

What is stored are blocks, codes, scales: tensors of any type, and a function that makes numbers of them. A network is
given packed weights from outside, by name; it does not know, and computes exactly what it would with the same weights
expanded beforehand. It takes the memory of what is stored, and of one expanded weight at a time.

The layers are still ``nn.Linear``, ``nn.Conv2d`` and ``nn.Embedding``, so that hooks and adapters find them. Their
``weight`` is no parameter: it is expanded when it is asked for, to be read only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadInput

Expand = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


class Quantised(Protocol):
    """A weight as it is stored: the name of its scheme, what reads it, and what makes numbers of it."""

    @property
    def scheme(self) -> str: ...

    @property
    def stored(self) -> Callable[[], dict[str, Tensor]]: ...

    @property
    def expand(self) -> Expand: ...


class PackedWeight(nn.Module):
    """What is stored of a weight, as buffers that follow their layer to another device and never change their type.

    Args:
        value: the weight.
        shape: its own, when it is expanded.
        device: where to.
        dtype: the network's, in which ``weight`` is read; ``.to(dtype)`` changes it, and nothing else here.
    """

    _like: Tensor

    def __init__(
        self, value: Quantised, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.scheme, self.shape, self._expand = value.scheme, shape, value.expand
        self.names = []
        for name, tensor in value.stored().items():
            self.register_buffer(name, tensor.to(device))
            self.names.append(name)
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The network's type."""
        return self._like.dtype

    @property
    def size(self) -> int:
        """Bytes of what is stored."""
        return sum(self.get_buffer(name).nbytes for name in self.names)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The numbers, in the weight's shape."""
        return self._expand({name: self.get_buffer(name) for name in self.names}, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """What ``.to`` and its like call. Bytes are shown to it, as it would cast floats, which scales are."""
        for name in self.names:
            kept = self.get_buffer(name)
            moved = fn(kept.reshape(-1).view(torch.uint8))
            assert moved.dtype == torch.uint8
            self._buffers[name] = moved.view(kept.dtype).reshape(kept.shape)
        self._buffers["_like"] = fn(self._like)
        return self

    def extra_repr(self) -> str:
        return f"{self.scheme}, shape={list(self.shape)}, bytes={self.size}"


class _Layer(nn.Module):
    """What the three layers have in common."""

    packed: PackedWeight

    @property
    def weight(self) -> Tensor:
        """The weight in the network's type. A copy: what is written to it would be lost, and torch refuses it."""
        with torch.inference_mode():
            return self.packed.expand(self.packed.dtype)


class PackedLinear(_Layer, nn.Linear):  # type: ignore[override]  # weight is read only
    """``nn.Linear`` with a packed weight; computes in the dtype of ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.packed.expand(x.dtype), bias)


class PackedConv2d(_Layer, nn.Conv2d):  # type: ignore[override]  # weight is read only
    """``nn.Conv2d`` with a packed weight; computes in the dtype of ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.packed.expand(x.dtype), bias)


class PackedEmbedding(_Layer, nn.Embedding):  # type: ignore[override]  # weight is read only
    """``nn.Embedding`` with a packed table, which is expanded whole; answers in the network's type."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.packed.expand(self.packed.dtype), self.padding_idx)


_KINDS: dict[type[nn.Module], type[_Layer]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}


def packable(network: nn.Module, name: str) -> bool:
    """Whether a parameter can stay packed: the weight of a plain linear layer, convolution or embedding.

    Layers that are made of these may do something else with their weight, so they do not count.
    """
    path, _, leaf = name.rpartition(".")
    try:
        layer = network.get_submodule(path)
    except AttributeError:
        return False
    return leaf == "weight" and type(layer) in _KINDS and getattr(layer, "max_norm", None) is None


def pack(
    network: nn.Module, name: str, value: Quantised, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Put a packed weight in the place of a parameter; the layer itself stays, with its bias and its hooks.

    Args:
        network: which has the parameter, perhaps on the ``meta`` device.
        name: of the parameter.
        value: the weight as it is stored; it is read now.
        device: where to.
        dtype: the network's.

    Returns:
        What the network's ``state_dict`` has in its place.

    Raises:
        BadInput: no such parameter, or it cannot stay packed (see :func:`packable`).
    """
    if not packable(network, name):
        raise BadInput(
            f"{name!r} cannot stay packed: it is no weight of a linear layer, convolution or embedding"
        )
    path = name.removesuffix("weight")
    layer: Any = network.get_submodule(path.rstrip("."))
    packed = PackedWeight(value, tuple(layer.weight.shape), device, dtype)
    del layer.weight
    # In place, as torch's lazy layers become what they are: whatever else holds the layer has it packed too.
    layer.__class__ = _KINDS[type(layer)]
    layer.packed = packed
    return {f"{path}packed.{key}": tensor for key, tensor in packed.state_dict().items()}


def packed_weights(network: nn.Module) -> dict[str, PackedWeight]:
    """The weights of a network that are kept packed, by the names that they have unpacked."""
    return {
        f"{path}.weight".lstrip("."): layer.packed
        for path, layer in network.named_modules()
        if isinstance(layer, _Layer)
    }


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors as they are when nothing is packed."""
    packed = packed_weights(network)
    inner = tuple(f"{name.removesuffix('weight')}packed." for name in packed)
    plain = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if not (inner and name.startswith(inner))
    }
    return plain | {name: weight.shape for name, weight in packed.items()}


def value(network: nn.Module, name: str) -> Tensor:
    """A network's tensor as it is when nothing is packed; one that is packed is expanded for it."""
    path, _, leaf = name.rpartition(".")
    found = getattr(network.get_submodule(path), leaf)
    assert isinstance(found, Tensor)
    return found.detach()
