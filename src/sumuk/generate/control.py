"""ControlNets at work: what they look at, when, and what they add to the model's network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.generate.pixels import to_pixels
from sumuk.generate.request import Request, Steer
from sumuk.nets.control_dit import FluxControlNet, SD3ControlNet
from sumuk.nets.controlnet import ControlNet, scaled
from sumuk.weights.model import Model


@dataclass(frozen=True, eq=False)
class Steering:
    """A request's :class:`Steer` for one size of picture.

    Attributes:
        steer: what was asked.
        hint: what the network looks at, batch 1.
    """

    steer: Steer
    hint: Tensor

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with equal keys can be steered in one forward."""
        steer = self.steer
        return (steer.control, steer.weight, steer.guess, steer.mode, self.hint.shape)

    def acts(self, step: int, steps: int, negative: bool) -> bool:
        """Whether it steers step ``step`` of ``steps`` (from 0)."""
        if negative and self.steer.guess:
            return False
        return self.steer.start <= step / steps and (step + 1) / steps <= self.steer.end


def _picture(model: Model, steer: Steer, width: int, height: int) -> Tensor:
    """RGB in 0..1 (ControlNets of U-Nets)."""
    return (to_pixels(steer.hint, width, height) + 1) / 2


def _latent(model: Model, steer: Steer, width: int, height: int) -> Tensor:
    """The picture's latent as the denoiser knows latents (FLUX.1)."""
    return model.encode_latent(to_pixels(steer.hint, width, height).to(model.device)).to("cpu", torch.float32)


def _unshifted(model: Model, steer: Steer, width: int, height: int) -> Tensor:
    """The picture's latent, scaled but not shifted (InstantX's for SD3)."""
    return _latent(model, steer, width, height) + model.latent.shift * model.latent.scale


LOOKS: dict[type, Callable[[Model, Steer, int, int], Tensor]] = {
    ControlNet: _picture,
    FluxControlNet: _latent,
    SD3ControlNet: _unshifted,
}
"""What each kind of network looks at."""


def steerings(model: Model, request: Request, width: int, height: int) -> tuple[Steering, ...]:
    """Everything that steers a request."""
    return tuple(
        Steering(steer, LOOKS[type(model.controls[steer.control].network)](model, steer, width, height))
        for steer in request.steer
    )


def residuals(
    model: Model, rows: Sequence[Sequence[Steering]], x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]
) -> Any:
    """What the controls of some rows with equal keys add, as the denoiser takes it; None without controls.

    Args:
        model: whose controls.
        rows: the steerings of each row, alike but for their hints.
        x: latents [B, C, h, w] without further channels.
        t: network times [B].
        inputs: what the denoiser takes beside them.
    """
    found = None
    for same in zip(*rows, strict=True):
        steer, network = same[0].steer, model.controls[same[0].steer.control].network
        hint = torch.cat([each.hint for each in same]).to(x)
        more: dict[str, Any] = dict(inputs)
        if isinstance(network, SD3ControlNet):
            more["y"] = torch.zeros_like(inputs["y"])  # as they were trained
        if isinstance(network, FluxControlNet):
            more["mode"] = None if steer.mode is None else torch.full((len(x),), steer.mode, device=x.device)
            if not network.shape.guidance:
                more.pop("guidance", None)
        elif steer.mode is not None:
            raise BadInput(
                f"mode {steer.mode} does nothing for {steer.control!r}, which knows one kind of picture"
            )
        answer = network(x, t, hint, **more)
        if isinstance(network, ControlNet):
            answer = scaled(answer, steer.weight, guess=steer.guess)
        else:
            answer = _times(answer, steer.weight)
        found = answer if found is None else _plus(found, answer)
    return found


def _times(tree: Any, weight: float) -> Any:
    """A tensor, or lists of them, times a number."""
    return tree * weight if isinstance(tree, Tensor) else type(tree)(_times(each, weight) for each in tree)


def _plus(one: Any, other: Any) -> Any:
    """Two answers of the same form, added."""
    if isinstance(one, Tensor):
        return one + other
    if len(one) != len(other):
        raise BadInput(
            f"controls of {len(one)} and {len(other)} residuals cannot be added; use one at a time"
        )
    return type(one)(_plus(a, b) for a, b in zip(one, other, strict=True))
