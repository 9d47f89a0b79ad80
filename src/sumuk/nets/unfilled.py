"""Networks without numbers: built for their names and shapes, before a file's numbers come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

_DRAWN = (
    Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_, init.kaiming_uniform_,
    init.kaiming_normal_, init.xavier_uniform_, init.xavier_normal_,
)  # fmt: skip


@contextmanager
def unfilled() -> Iterator[None]:
    """What is built meanwhile has no numbers (torch's device ``meta``), and draws none to begin with.

    Drawing them would only be noted, but for the first one torch brings in its compiler, which takes over a second.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if (
            func in _DRAWN
            and isinstance(tensor := args[0] if args else named.get("tensor"), Tensor)
            and tensor.is_meta
        ):
            return tensor
        return func(*args, **named)
