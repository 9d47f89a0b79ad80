"""Reading a network's shape off a header: one size of one tensor, how many blocks there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sumuk.base.errors import BadFile

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names and shapes."""

WIDEST = 2**20
"""More channels than any layer has; a hostile header may say so."""


def missing(name: str, what: str, code: str) -> BadFile:
    """The error for a tensor that ``what`` must have."""
    return BadFile(f"tensor {name!r} is missing; the file is incomplete or no {what}", f"{code}.missing")


def reader(what: str, code: str) -> Callable[..., int]:
    """What reads sizes for one kind of network.

    Args:
        what: the kind in words, for messages ("DiT").
        code: first half of its error codes.

    Returns:
        ``size(shapes, name, axis, unit=1)``: the size of tensor ``name`` along ``axis`` in units. BadFile where the
        tensor is missing, or its size cannot be that of a layer, or is no whole number of units.
    """

    def size(shapes: Shapes, name: str, axis: int, unit: int = 1) -> int:
        if name not in shapes:
            raise missing(name, what, code)
        shape = shapes[name]
        if axis >= len(shape) or not 0 < shape[axis] <= WIDEST or shape[axis] % unit:
            raise BadFile(
                f"tensor {name!r} has the shape {list(shape)}, which no {what} has", f"{code}.shape"
            )
        return shape[axis] // unit

    return size


def count(shapes: Shapes, pattern: str) -> int:
    """How many of ``pattern.format(0)``, ``pattern.format(1)``, ... are there, up to the first that is not."""
    found = 0
    while pattern.format(found) in shapes:
        found += 1
    return found
