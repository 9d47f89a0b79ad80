"""ControlNets and adapters at work: what they look at, when, and what they change about the model's network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from sumuk.base.errors import BadInput, MissingFile
from sumuk.generate.pixels import to_mask, to_pixels
from sumuk.generate.request import Request, Steer
from sumuk.nets.adapters import T2IAdapter, with_features
from sumuk.nets.cascade_control import CascadeControl
from sumuk.nets.clip_vision import clip_pixels
from sumuk.nets.control_dit import FluxControlNet, SD3ControlNet
from sumuk.nets.controlnet import ControlNet, scaled
from sumuk.nets.ip_adapter import IPAdapter, with_image
from sumuk.weights.model import Model

Seen = tuple[Tensor, ...]
"""What a guest looks at, or what it found in it where that is the same for all steps; each of batch 1."""


@dataclass(frozen=True, eq=False)
class Steering:
    """A request's :class:`Steer` for one size of picture and one side of guidance."""

    steer: Steer
    seen: Seen

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with equal keys can be steered in one forward."""
        steer = self.steer
        return (steer.control, steer.weight, steer.guess, steer.mode, *(each.shape for each in self.seen))

    def acts(self, step: int, steps: int) -> bool:
        """Whether it steers step ``step`` of ``steps`` (from 0)."""
        return self.steer.start <= step / steps and (step + 1) / steps <= self.steer.end


def _picture(model: Model, steer: Steer, width: int, height: int, negative: bool) -> Seen:
    """RGB in 0..1 (ControlNets of U-Nets)."""
    return ((to_pixels(steer.hint, width, height) + 1) / 2,)


def _latent(model: Model, steer: Steer, width: int, height: int, negative: bool) -> Seen:
    """The picture's latent as the denoiser knows latents (FLUX.1)."""
    return (
        model.encode_latent(to_pixels(steer.hint, width, height).to(model.device)).to("cpu", torch.float32),
    )


def _unshifted(model: Model, steer: Steer, width: int, height: int, negative: bool) -> Seen:
    """The picture's latent, scaled but not shifted (InstantX's for SD3)."""
    (latent,) = _latent(model, steer, width, height, negative)
    return (latent + model.latent.shift * model.latent.scale,)


def _features(model: Model, steer: Steer, width: int, height: int, negative: bool) -> Seen:
    """What a T2I-Adapter finds in the picture; the same at all steps, and on both sides."""
    network = model.controls[steer.control].network
    (picture,) = _picture(model, steer, width, height, negative)
    grey = picture.mean(dim=1, keepdim=True) if network.shape.colours == 1 else picture
    return tuple(each.to("cpu", torch.float32) for each in network(grey.to(model.device, model.dtype)))


def _tokens(model: Model, steer: Steer, width: int, height: int, negative: bool) -> Seen:
    """The picture through CLIP's image tower and an IP-Adapter; to go away from: what it makes of nothing."""
    network, tower = model.controls[steer.control].network, model.networks.get("image")
    if tower is None:
        raise MissingFile(
            f"{steer.control!r} sees a picture through CLIP's image tower; give that to load() as "
            'parts={"image": FILE}, for SD 1.x image_encoder/model.safetensors of the IP-Adapter repository'
        )
    pixels = clip_pixels(to_pixels(steer.hint, *steer.hint.size), tower.shape.size).to(
        next(tower.parameters())
    )
    plain = network.shape.kind == "image"
    if negative and not plain:
        pixels = torch.zeros_like(pixels)
    view = tower(pixels)
    view = view.projected if plain else view.penultimate
    view = torch.zeros_like(view) if negative and plain else view
    return (network(view.to(model.device, model.dtype)).to("cpu", torch.float32),)


def _maps(model: Model, steer: Steer, width: int, height: int, negative: bool) -> Seen:
    """What a ControlNet of Stable Cascade finds; the same at all steps, and on both sides.

    One channel is edges; four are a picture and its mask, transparent where it is to be painted; sixteen are the
    EfficientNet's latent of the picture at half its size.
    """
    network = model.controls[steer.control].network
    (picture,) = _picture(model, steer, width, height, negative)
    channels = network.shape.backbone.channels
    if channels == 1:
        hint = picture.mean(dim=1, keepdim=True)
    elif channels == 4:
        hint = torch.cat([picture, to_mask(_hole(steer), width, height)], dim=1)
    else:
        half = to_pixels(steer.hint, width // 2, height // 2)
        small = model.encode_latent(half.to(model.device)).to("cpu", torch.float32)
        cells = (model.latent.cells(height), model.latent.cells(width))
        hint = F.interpolate(small, cells, mode="nearest")
    return tuple(each.to("cpu", torch.float32) for each in network(hint.to(model.device, model.dtype)))


def _hole(steer: Steer) -> Image.Image:
    """White where a picture is transparent."""
    if "A" not in steer.hint.getbands():
        raise BadInput(
            f"{steer.control!r} paints where its picture is transparent, and this one is nowhere; give a PNG with a "
            "transparent part"
        )
    return ImageOps.invert(steer.hint.getchannel("A"))


LOOKS: dict[type, Callable[[Model, Steer, int, int, bool], Seen]] = {
    ControlNet: _picture,
    FluxControlNet: _latent,
    SD3ControlNet: _unshifted,
    T2IAdapter: _features,
    IPAdapter: _tokens,
    CascadeControl: _maps,
}
"""What each kind of guest looks at."""


def steerings(
    model: Model, request: Request, width: int, height: int
) -> tuple[tuple[Steering, ...], tuple[Steering, ...]]:
    """Everything that steers a request: what it goes towards, and what it goes away from.

    Guess mode leaves the second side alone. Only an IP-Adapter tells the two different things; all else is looked at
    once for both.
    """
    towards, away = [], []
    for steer in request.steer:
        kind = type(model.controls[steer.control].network)
        one = Steering(steer, LOOKS[kind](model, steer, width, height, False))
        towards.append(one)
        if not steer.guess:
            other = kind is IPAdapter
            away.append(Steering(steer, _tokens(model, steer, width, height, True)) if other else one)
    return tuple(towards), tuple(away)


@contextmanager
def at_work(
    model: Model, rows: Sequence[Sequence[Steering]], x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """Attach the guests of some rows with equal keys for one forward of the denoiser.

    Args:
        model: whose guests.
        rows: the steerings of each row, alike but for what they see.
        x: latents [B, C, h, w] without further channels.
        t: network times [B].
        inputs: what the denoiser takes beside them.

    Yields:
        What the denoiser's forward takes in addition.
    """
    found = None
    with ExitStack() as stack:
        for same in zip(*rows, strict=True):
            steer, network = same[0].steer, model.controls[same[0].steer.control].network
            seen = [torch.cat(parts).to(x) for parts in zip(*(each.seen for each in same), strict=True)]
            if isinstance(network, T2IAdapter):
                found_here = [each * steer.weight for each in seen]
                stack.enter_context(with_features(model.denoiser, found_here, xl=network.shape.xl))
            elif isinstance(network, IPAdapter):
                prompt = stack.enter_context(with_image(model.denoiser, network))
                prompt.tokens, prompt.scale = seen[0], steer.weight
            elif isinstance(network, CascadeControl):
                maps: list[Tensor | None] = [None] * (max(network.shape.places) + 1)
                for place, each in zip(network.shape.places, seen, strict=True):
                    maps[place] = each * steer.weight
                found = maps if found is None else _plus(found, maps)
            else:
                answer = _residuals(network, steer, seen[0], x, t, inputs)
                found = answer if found is None else _plus(found, answer)
        yield {} if found is None else {"residuals": found}


def _residuals(
    network: Any, steer: Steer, hint: Tensor, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]
) -> Any:
    """What a ControlNet adds, in the form that the denoiser takes it."""
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
        return scaled(answer, steer.weight, guess=steer.guess)
    return _times(answer, steer.weight)


def _times(tree: Any, weight: float) -> Any:
    """A tensor, or lists of them, times a number."""
    return tree * weight if isinstance(tree, Tensor) else type(tree)(_times(each, weight) for each in tree)


def _plus(one: Any, other: Any) -> Any:
    """Two answers of the same form, added; None adds nothing."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Tensor):
        return one + other
    if len(one) != len(other):
        raise BadInput(
            f"controls of {len(one)} and {len(other)} residuals cannot be added; use one at a time"
        )
    return type(one)(_plus(a, b) for a, b in zip(one, other, strict=True))
