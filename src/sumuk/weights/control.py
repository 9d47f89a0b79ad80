"""ControlNets, T2I- and IP-Adapters: loading one beside the model that it steers.

Most ControlNet files are whole networks. Two kinds are changes to a copy of the model's own U-Net: differences that
are added to it, and Control-LoRAs; both become a whole ControlNet here.
"""

from __future__ import annotations

from typing import Any

import torch

from sumuk.base.errors import BadFile
from sumuk.families.controlnet import CONTROL_LORA, DIFFERENCE_KIND
from sumuk.families.detect import Match
from sumuk.families.family import Kind, Shapes
from sumuk.nets.control_lora import control_lora, from_difference
from sumuk.nets.controlnet import ControlNet, controlnet_shape
from sumuk.nets.packed import shapes, value
from sumuk.nets.unfilled import unfilled
from sumuk.weights import inspect
from sumuk.weights.building import Place, build, fill, refuse_leftovers
from sumuk.weights.model import Control, Model, WeightFile
from sumuk.weights.source import read

MADE = {CONTROL_LORA.key: control_lora, DIFFERENCE_KIND.key: from_difference}
"""Kinds that are changes to the model's own U-Net -> what makes a whole ControlNet of both."""


GUESTS = ("controlnet", "t2i-adapter", "ip-adapter")
"""Families of what attaches to a model's denoiser and is told a picture."""


def load_control(path: Place, model: Model) -> Control:
    """Load a ControlNet or a picture adapter for a model, on its device and in its dtype.

    Args:
        path: a ``.safetensors`` file or a folder.
        model: what it shall steer.

    Raises:
        MissingFile: nothing there.
        BadFile: it is none of them, is damaged, or was made for another model.
    """
    opened = inspect.recognise(read(path))
    answer = opened.answer
    if not isinstance(answer, Match) or answer.family.name not in GUESTS:
        what = answer.family.title if isinstance(answer, Match) else f"unknown: {answer.why}"
        raise BadFile(f"{path}: is no ControlNet and no picture adapter but {what}", "control.kind")
    refuse_leftovers(opened, ())
    kind, (part,) = answer.family, answer.family.parts
    tensors = opened.tensors(part.name)
    network: Any
    if kind.key in MADE:
        base = {name: value(model.denoiser, name) for name in shapes(model.denoiser)}
        state = MADE[kind.key](base, {name: one.load() for name, one in tensors.items()})
        network = _whole(state, model)
    else:
        network = build(part, tensors, opened)
        fill(network, tensors, model.device, model.dtype)
    _check_fit(kind, network.shape, model, path)
    told = opened.licence()
    return Control(
        kind=kind, network=network, files=tuple(WeightFile(file, told) for file in opened.source.files)
    )


def _whole(state: dict[str, torch.Tensor], model: Model) -> ControlNet:
    shapes: Shapes = {name: tuple(value.shape) for name, value in state.items()}
    shape = model.denoiser.shape
    heads: dict[str, Any] = {"heads": shape.heads} if shape.heads else {"head_channels": shape.head_channels}
    with unfilled():
        network = ControlNet(controlnet_shape(shapes, **heads))
    placed = {name: value.to(model.device, model.dtype) for name, value in state.items()}
    network.load_state_dict(placed, strict=True, assign=True)
    network.eval().requires_grad_(False)
    return network


def _check_fit(kind: Kind, shape: Any, model: Model, path: Place) -> None:
    """Refuse a ControlNet whose residuals, text or vector the model's network does not share."""
    ours = model.denoiser.shape
    for name in (
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "context_dim",
        "adm_in_channels",
        "width",
    ):
        mine, theirs = getattr(ours, name, None), getattr(shape, name, None)
        if name == "width" and mine is None:
            mine = getattr(ours, "widths", (None,))[-1]  # Cascade's ControlNets know the width of its blocks
        if mine is not None and theirs is not None and mine != theirs:
            raise BadFile(
                f"{path}: {kind.title} has {name} {theirs}, {model.family.title} has {mine}; "
                "it was made for another model",
                "control.misfit",
            )
