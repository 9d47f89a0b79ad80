"""What is added to single layers of a network from outside, for one forward, each row of the batch by its own strength.

A low-rank adapter (Hu et al. 2021) adds to a layer's output what two thin layers make of its input::

    y = W x + s up(down(x))

so rows with different adapters, and rows with none, can share a forward: what belongs to some rows is worked out for
these alone. Where an adapter changes weights in a way that is no such sum (a norm, a decomposed weight), the parameter
itself is exchanged for the length of the forward, for all rows. Either way the network is afterwards what it was, bit
for bit, since nothing of it was written to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadInput


@dataclass(frozen=True, eq=False)
class Thin:
    """A product of two thin layers that is added to a layer's output.

    Attributes:
        layer: the layer's name in its network: ``input_blocks.1.1.proj_in``.
        down: ``[r, in]``, or ``[r, in, kh, kw]`` for a convolution.
        up: ``[out, r]``, or ``[out, r, 1, 1]``.
        scale: factor of the product.
        rows: which outputs of a layer that is a stack (q, k, v) it is added to; None: all.
    """

    layer: str
    down: Tensor
    up: Tensor
    scale: float = 1.0
    rows: tuple[int, int] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Thin:
        """The same on a device, in a dtype."""
        return Thin(self.layer, self.down.to(device, dtype), self.up.to(device, dtype), self.scale, self.rows)

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What the layer's input ``x`` of some rows becomes."""
        if isinstance(layer, nn.Conv2d):
            down = self.down if self.down.ndim == 4 else self.down[..., None, None]
            up = self.up if self.up.ndim == 4 else self.up[..., None, None]
            # The thin layer looks at the same places as the layer itself; the second has a kernel of 1.
            y = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
            return F.conv2d(y, up) * self.scale
        return F.linear(F.linear(x, self.down.flatten(1)), self.up.flatten(1)) * self.scale


Strengths = Sequence[float]
"""One for each row of the batch; a row of strength 0 is left alone, bit for bit."""


@contextmanager
def with_thin(network: nn.Module, worn: Sequence[tuple[Thin, Strengths]]) -> Iterator[None]:
    """Add thin layers to a network's layers until the block ends.

    Args:
        network: whose layers; their inputs and outputs begin with the batch.
        worn: what is added, with the strength for each row of the batch.

    Raises:
        BadInput: a layer that the network does not have, or that is neither linear nor a convolution.
    """
    additions: dict[str, list[tuple[Thin, Strengths]]] = defaultdict(list)
    for thin, strengths in worn:
        if any(strengths):
            additions[thin.layer].append((thin, strengths))
    with ExitStack() as stack:
        for name, here in additions.items():
            try:
                layer = network.get_submodule(name)
            except AttributeError:
                raise BadInput(f"the network has no layer {name!r} to add to") from None
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                raise BadInput(f"thin layers cannot be added to {name!r}, which is a {type(layer).__name__}")
            stack.callback(layer.register_forward_hook(_adding(here)).remove)
        yield


def _adding(here: Sequence[tuple[Thin, Strengths]]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        x: Tensor = given[0]
        axis = 1 if isinstance(layer, nn.Conv2d) else out.ndim - 1
        for thin, strengths in here:
            assert len(x) == len(strengths)  # layers of a denoiser see the batch first
            active = [row for row, strength in enumerate(strengths) if strength]
            whole = len(active) == len(strengths)
            more = thin(layer, x if whole else x[active])
            factor = torch.tensor([strengths[row] for row in active], dtype=more.dtype, device=more.device)
            more = more * factor.view(-1, *([1] * (more.ndim - 1)))
            begin, end = thin.rows or (0, out.shape[axis])
            place = out.narrow(axis, begin, end - begin)
            if whole:
                place += more
            else:
                place[active] += more
        return out

    return add


@contextmanager
def with_parameters(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Exchange parameters of a network until the block ends; the old ones are put back, not copied.

    Args:
        network: whose parameters.
        values: by their names; of the same shape.

    Raises:
        BadInput: a parameter that the network does not have.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            module, leaf = home(network, name)
            old = module._parameters[leaf]
            assert old is not None and old.shape == value.shape
            before.append((module, leaf, old))
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, leaf, old in reversed(before):
            module._parameters[leaf] = old


def home(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and what it calls it.

    Raises:
        BadInput: there is no such parameter, or it is kept packed, as it is stored.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = network.get_submodule(path)
    except AttributeError:
        raise BadInput(f"the network has no layer {path!r}") from None
    if module._parameters.get(leaf) is None:
        raise BadInput(
            f"the network has no parameter {name!r} that could be changed; if its weights are kept packed, "
            "load the model with them expanded"
        )
    return module, leaf
