"""Exponential moving average of weights, in images: after ``half_life`` images an old weight counts half."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Float32 averages of every trained parameter of some named modules."""

    def __init__(self, modules: Mapping[str, nn.Module], half_life: int) -> None:
        self.half_life = half_life
        self.modules = modules
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().float().clone() for name, parameter in self._parameters()
        }

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{part}.{name}", parameter)
            for part, module in self.modules.items()
            for name, parameter in module.named_parameters()
        ]

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """Take in the present weights after ``images`` in all, ``batch`` of them new.

        The half-life is held to a tenth of what was seen, so that the average forgets its random start.
        """
        half_life = min(self.half_life, max(images // 10, batch))
        share = 1.0 - 0.5 ** (batch / half_life)
        names, parameters = zip(*self._parameters(), strict=True)
        torch._foreach_lerp_(
            [self.weights[n] for n in names], [p.detach().float() for p in parameters], share
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and present weights; twice restores every bit."""
        for name, parameter in self._parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)
