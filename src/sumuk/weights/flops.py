"""What one forward of a network costs, counted on the ``meta`` device: no numbers, no memory, no weights needed.

A multiply-add is two operations. Matrix products, convolutions and attention are counted; norms, activations and sums
are not. One forward is one row: classifier-free guidance asks for two of them a step.

Some papers count multiply-adds and call them FLOPs; their figures are half of these (DiT, for one).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode


def flops(network: nn.Module, **inputs: Any) -> int:
    """Floating-point operations of one forward.

    Args:
        network: on any device; it is left as it is.
        inputs: what its ``forward`` takes, by name. Of tensors only shapes and dtypes matter.

    Raises:
        BadInput: the network refuses inputs of these shapes.
    """
    here = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    state, given = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("meta"), (here, inputs))
    counter = FlopCounterMode(display=False)
    # What a network makes on the way (positions, say) has to be on the same device.
    with torch.device("meta"), torch.no_grad(), counter:
        functional_call(network, state, kwargs=given)
    return counter.get_total_flops()
