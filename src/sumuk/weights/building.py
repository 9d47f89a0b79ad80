"""Building a network from a file: without numbers first, checked name by name, then filled.

What the loader does for a model it does the same for every guest of one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.families.family import Part
from sumuk.files import layout
from sumuk.files.gaps import gaps
from sumuk.files.tensors import Lazy, Shape, Tensors
from sumuk.nets.packed import pack, packable, packed_weights
from sumuk.nets.unfilled import unfilled
from sumuk.weights.inspect import Opened

Place = str | os.PathLike[str]


def build(part: Part, tensors: Tensors, origin: Opened) -> nn.Module:
    """The network without numbers, each of its names and shapes checked against the file's."""
    where = origin.source.path
    try:
        with unfilled():
            network = part.build({name: tensor.shape for name, tensor in tensors.items()})
    except (BadFile, BadInput) as error:
        _refuse_gaps(part, origin)
        raise BadFile(f"{where}: {part.title}: {error}", "model.shape") from error
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if lost := [name for name in expected if name not in tensors]:
        raise BadFile(
            f"{where}: {part.title} lacks {len(lost)} tensors: "
            f"{layout.some(_as_in_file(origin, part, expected, lost))}",
            "model.missing",
        )
    if extra := [name for name in tensors if name not in expected]:
        _refuse_gaps(part, origin)  # a block that is not whole may have been counted as none
        native = f"{part.name}.{extra[0]}"
        theirs = origin.moved.origin[native][0]
        raise BadFile(
            f"{where}: {part.title} has no place for {len(extra)} tensors, such as {theirs!r}"
            f"{nearest(extra[0], expected)}",
            "model.extra",
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise BadFile(
                f"{where}: {name!r} has the shape {list(tensors[name].shape)}, not {list(shape)}",
                "model.shape",
            )
    return network


def _refuse_gaps(part: Part, origin: Opened) -> None:
    """Name what the file's own blocks call for and it lacks, if anything: nearer to the fault than what follows."""
    missing, instead = gaps([name for names in origin.moved.origin.values() for name in names])
    if missing:
        odd = f"; in its place there is {layout.some(instead)}" if instead else ""
        raise BadFile(
            f"{origin.source.path}: {part.title} lacks {len(missing)} tensors that its other blocks have: "
            f"{layout.some(missing)}{odd}",
            "model.missing",
        )


def check_config(part: Part, tensors: Tensors, origin: Opened) -> None:
    """Refuse a folder whose configuration asks for arithmetic that this network does not do."""
    arrangement = origin.answer.arrangement
    assert arrangement is not None  # it holds the part
    prefix = next((prefix for each, prefix in arrangement.parts if each.name == part.name), "")
    said = origin.source.config(f"{prefix}config.json")
    if not said or not part.fixed:
        return
    ours = part.config({name: tensor.shape for name, tensor in tensors.items()})
    for key in part.fixed:
        if key in said and said[key] != ours.get(key):
            raise BadFile(
                f"{origin.source.path}: {prefix}config.json says {key} {said[key]!r:.60}; "
                f"the {part.title} here has {ours.get(key)!r:.60}, so that it would draw something else",
                "model.config",
            )


def _as_in_file(origin: Opened, part: Part, expected: Mapping[str, Shape], lost: list[str]) -> list[str]:
    """Native names as the file at hand would spell them."""
    arrangement = origin.answer.arrangement
    assert arrangement is not None  # it holds the part
    whole = {f"{part.name}.{name}": Lazy(shape, "F32", _never) for name, shape in expected.items()}
    spelt = arrangement.layout(whole, backward=True).backward(whole)
    native = {f"{part.name}.{name}" for name in lost}
    return [name for name, sources in spelt.origin.items() if native & set(sources)]


def _never() -> torch.Tensor:
    raise AssertionError("only names and shapes are known")


def refuse_leftovers(origin: Opened, ignored: Sequence[str]) -> None:
    moved = origin.moved
    patterns = [layout.Pattern(text) for text in ignored]
    unknown = [name for name in moved.unknown if all(pattern.read(name) is None for pattern in patterns)]
    if unknown:
        hint = nearest(unknown[0], [name for names in moved.origin.values() for name in names])
        hint = hint if hint.startswith("; did") else ""
        raise BadFile(
            f"{origin.source.path}: holds {len(unknown)} tensors that its family does not know: "
            f"{layout.some(unknown)}{hint}; to load without them give their names as ignore=",
            "model.unknown_tensors",
        )
    replace(moved, unknown=[]).refuse_leftovers(str(origin.source.path))


def fill(
    network: nn.Module, tensors: Tensors, device: torch.device, dtype: torch.dtype, keep: bool = False
) -> None:
    """Put the tensors into the network, each in the target's dtype and place.

    Args:
        network: as :func:`build` made it.
        tensors: by the network's names.
        device: where to.
        dtype: of all floating-point numbers.
        keep: leave weights packed that are quantised and whose layer can expand them in each forward, which takes less
            memory and more time. The network computes the same, bit for bit.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.packed is not None and keep and packable(network, name):
            state |= pack(network, name, tensor.packed, device, dtype)
        elif tensor.packed is not None:
            stored = {key: value.to(device) for key, value in tensor.packed.stored().items()}
            state[name] = tensor.packed.expand(stored, dtype)
        else:
            value = tensor.load()
            state[name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    network.load_state_dict(state, strict=True, assign=True)
    network.eval().requires_grad_(False)


@dataclass(frozen=True)
class Kept:
    """What a network keeps packed, and what that saves.

    Attributes:
        weights: how many weights are packed, by scheme.
        packed: bytes that they take.
        expanded: bytes that they would take in the network's dtype.
        total: bytes of the whole network as it is.
    """

    weights: Mapping[str, int]
    packed: int
    expanded: int
    total: int


def kept(network: nn.Module) -> Kept:
    """Count what :func:`fill` left packed in a network."""
    all_packed = packed_weights(network).values()
    return Kept(
        weights=dict(Counter(weight.scheme for weight in all_packed)),
        packed=sum(weight.size for weight in all_packed),
        expanded=sum(prod(weight.shape) * weight.dtype.itemsize for weight in all_packed),
        total=sum(value.nbytes for value in (*network.parameters(), *network.buffers())),
    )
