"""A stand-in for a device: the CPU's tensors count as being there, and what leaves it becomes unusable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sumuk.memory import offload


class Elsewhere:
    """Replaces what :mod:`sumuk.memory.offload` knows of devices.

    Attributes:
        moves: so many were tried, of single tensors, out and back.
        fail_at: the numbers of those, from 1, for which there is no memory.
        before_returning: is called before each way back.
        most_gone: how many tensors were away at once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moves = self.most_gone = 0
        self.fail_at: set[int] = set()
        self.before_returning: Callable[[], object] = lambda: None
        self._kept: dict[int, Tensor] = {}
        monkeypatch.setattr(offload, "_abroad", lambda tensor: not self.is_gone(tensor))
        monkeypatch.setattr(offload, "_move", self._move)

    def is_gone(self, tensor: Tensor) -> bool:
        return id(tensor) in self._kept

    def gone(self, network: nn.Module) -> bool:
        """Whether all of a network is away; False: none of it."""
        states = {self.is_gone(value) for value in (*network.parameters(), *network.buffers())}
        assert len(states) == 1, "half of it is"
        return states.pop()

    def _move(self, tensor: Tensor, place: torch.device) -> None:
        back = self.is_gone(tensor)
        if back:
            self.before_returning()
        self.moves += 1
        if self.moves in self.fail_at:
            raise MemoryError
        with torch.inference_mode(False):
            if back:
                tensor.data = self._kept.pop(id(tensor))
            else:
                self._kept[id(tensor)] = tensor.data
                tensor.data = torch.full_like(tensor.data, float("nan") if tensor.is_floating_point() else -1)
        self.most_gone = max(self.most_gone, len(self._kept))
