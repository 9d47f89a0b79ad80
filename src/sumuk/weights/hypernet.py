"""Hypernetworks in files: A1111's pickled ``.pt``, and the same tensors under flat names in ``.safetensors``.

A ``.pt`` holds for each width, an integer, the tensors of keys and of values, and beside them how the networks are
built (``layer_structure``, ``activation_func``, ...). Flat, that is ``768.0.linear.0.weight`` (1: values), and in
safetensors files the rest stands in the metadata under the same names, as JSON. The first files have ``linear1`` and
``linear2`` for ``linear.0`` and ``linear.1``.

Source: AUTOMATIC1111 stable-diffusion-webui 1.10. What files leave out is taken as it is there: layers 1, 2, 1, no
activation, an activation (if there is one) after the last layer too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.ckpt import read_ckpt
from sumuk.files.layout import some
from sumuk.files.safetensors import read_header, regular
from sumuk.files.tensors import Tensors, from_header, write
from sumuk.nets.hypernet import HypernetShape, Hypernetwork
from sumuk.nets.unfilled import unfilled
from sumuk.weights.licences import said_in
from sumuk.weights.model import WeightFile
from sumuk.weights.source import PICKLES

FLOATS = ("F16", "BF16", "F32", "F64")
TRAINED = 0.3
"""The share that A1111 drops where a file says only that it does."""
MOST_WIDTHS, MOST_WIDTH = 16, 4096
"""A1111 trains for up to five, of 320 to 1280."""
BUILT = (
    "layer_structure", "activation_func", "is_layer_norm", "activate_output", "use_dropout", "last_layer_dropout",
    "dropout_structure",
)  # fmt: skip
_NAME = re.compile(r"([1-9][0-9]{0,4})\.([01])\.(linear(?:\.[0-9]{1,3}|[12]))\.(weight|bias)")
_BESIDE = ("optimizer_state_dict.",)


@dataclass(frozen=True, eq=False)
class Hypernet:
    """A hypernetwork that was read.

    Attributes:
        name: what prompts call it.
        network: it, in float32 and ready to draw.
        path: its file; None if it has none.
        step: steps of training, as the file tells.
        model: the model that it was trained on, as the file tells.
        metadata: further texts of the file.
    """

    name: str
    network: Hypernetwork
    path: Path | None = None
    step: int | None = None
    model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def file(self) -> WeightFile | None:
        """Its file, for its hash and its licence."""
        return None if self.path is None else WeightFile(self.path, said_in(self.metadata))


def read_hypernet(path: str | os.PathLike[str], name: str | None = None) -> Hypernet:
    """Read a hypernetwork.

    Args:
        path: its file; its ending tells of which kind.
        name: how prompts shall name it; None takes the file's name without extension.

    Raises:
        MissingFile: no such file.
        BadFile: no hypernetwork, or a damaged one; code ``hypernet.*``, or of the reader of its kind of file.
    """
    path = regular(path)
    tensors, told = _stored(path)
    native: dict[str, str] = {}
    for theirs in tensors:
        if theirs.startswith(_BESIDE):
            continue
        match = _NAME.fullmatch(theirs)
        if match is None:
            _refuse(path, "tensors", f"tensor {theirs!r:.90} is of no hypernetwork")
        width, side, layer, leaf = match.groups()
        layer = layer if "." in layer else f"linear.{int(layer[-1]) - 1}"
        own = f"{width}.{side}.{layer}.{leaf}"
        if own in native:
            _refuse(path, "tensors", f"has {own!r} twice, as {native[own]!r} and {theirs!r}")
        native[own] = theirs
    shape = _shape(path, told, sorted({int(own.partition(".")[0]) for own in native}))
    network = _filled(path, shape, {own: tensors[theirs] for own, theirs in native.items()})
    step, trained = told.get("step"), told.get("sd_checkpoint_name")
    metadata = {key: each for key, each in told.items() if isinstance(each, str) and key not in BUILT}
    return Hypernet(
        name=path.stem if name is None else name,
        network=network,
        path=path,
        step=step if type(step) is int and 0 <= step < 10**15 else None,
        model=trained if isinstance(trained, str) else None,
        metadata=metadata,
    )


def _refuse(path: Path, code: str, what: str) -> NoReturn:
    raise BadFile(f"{path}: {what}", f"hypernet.{code}")


def _stored(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file and what it says beside them."""
    if path.suffix.lower() in PICKLES:
        pickled = read_ckpt(path)
        return pickled.tensors, pickled.values
    header = read_header(path)
    told: dict[str, Any] = dict(header.metadata)
    for key in {*BUILT, "step"} & told.keys():
        try:
            told[key] = json.loads(told[key])
        except (ValueError, RecursionError):
            _refuse(path, "structure", f"says {key} {told[key]!r:.60}, which is no JSON")
    return from_header(header), told


def _shape(path: Path, told: Mapping[str, Any], widths: list[int]) -> HypernetShape:
    """How the networks are built."""
    if not 1 <= len(widths) <= MOST_WIDTHS or widths[-1] > MOST_WIDTH:
        _refuse(
            path,
            "tensors",
            f"has networks for {len(widths)} widths ({widths!s:.40}), not for 1 to {MOST_WIDTHS} up to {MOST_WIDTH}",
        )
    layers = _numbers(path, "layer_structure", told.get("layer_structure", [1, 2, 1]))
    said = {key: told.get(key) for key in BUILT if key not in ("layer_structure", "dropout_structure")}
    activation = said.pop("activation_func")
    if activation is not None and not isinstance(activation, str):
        _refuse(path, "structure", f"says activation_func {activation!r:.60}, which is no name")
    for key, value in said.items():
        if value is not None and not isinstance(value, bool):
            _refuse(path, "structure", f"says {key} {value!r:.60}, which is neither true nor false")
    dropout = told.get("dropout_structure")
    if dropout is None and said["use_dropout"]:
        dropout = [0.0, *[TRAINED] * (len(layers) - 3), TRAINED * bool(said["last_layer_dropout"]), 0.0]
        dropout = dropout[-len(layers) :]  # with one layer, there is none to drop after
    try:
        return HypernetShape(
            widths=tuple(widths),
            layers=layers,
            activation=activation or "linear",
            activate_output=bool(told.get("activate_output", True)),
            norm=bool(said["is_layer_norm"]),
            dropout=() if dropout is None else _numbers(path, "dropout_structure", dropout),
        )
    except BadInput as error:
        _refuse(path, "structure", str(error))


def _numbers(path: Path, key: str, said: object) -> tuple[float, ...]:
    if not isinstance(said, list) or not all(type(each) in (int, float) for each in said):
        _refuse(path, "structure", f"says {key} {said!r:.60}, which is no list of numbers")
    try:
        return tuple(float(each) for each in said)
    except OverflowError:
        _refuse(path, "structure", f"says {key} {said!r:.60}, which is beyond all numbers")


def _filled(path: Path, shape: HypernetShape, tensors: Tensors) -> Hypernetwork:
    """The network without numbers first, each name and shape checked, then filled."""
    with unfilled():
        network = Hypernetwork(shape)
    expected = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    built = f"layers {list(shape.layers)}, {shape.activation}{', with norms' if shape.norm else ''}"
    if lost := sorted(expected.keys() - tensors.keys()):
        _refuse(path, "missing", f"lacks {len(lost)} tensors that {built} call for: {some(lost)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        _refuse(path, "extra", f"has {len(extra)} tensors for which {built} have no place: {some(extra)}")
    for name, wanted in expected.items():
        each = tensors[name]
        if each.shape != wanted or each.dtype not in FLOATS:
            said = f"{each.dtype} {list(each.shape)!s:.60}"
            _refuse(path, "shape", f"{name!r} is {said}; {built} call for {list(wanted)}")
    state = {name: each.load().to(torch.float32, copy=True) for name, each in tensors.items()}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            _refuse(path, "numbers", f"{name!r} holds NaN or infinity")
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def write_hypernet(hypernet: Hypernet, path: str | os.PathLike[str]) -> None:
    """Write it as safetensors, complete or not at all.

    Args:
        hypernet: what to write.
        path: a ``.safetensors`` file, replaced when the new one is complete.

    Raises:
        BadInput: another kind of file.
        BadFile: writing failed.
    """
    if Path(path).suffix != ".safetensors":
        raise BadInput(f"hypernetworks are written as .safetensors files, not {str(path)!r}")
    shape = hypernet.network.shape
    built: dict[str, Any] = {
        "layer_structure": list(shape.layers),
        "activation_func": shape.activation,
        "activate_output": shape.activate_output,
        "is_layer_norm": shape.norm,
        "dropout_structure": list(shape.dropout) or None,
        "step": hypernet.step,
    }
    texts = {key: json.dumps(each) for key, each in built.items() if each is not None}
    texts |= {} if hypernet.model is None else {"sd_checkpoint_name": hypernet.model}
    write(
        path,
        hypernet.network.state_dict(),
        {"format": "pt"} | dict(hypernet.metadata) | {"name": hypernet.name} | texts,
    )
