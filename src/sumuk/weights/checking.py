"""Whether a checkpoint's numbers are sound: every tensor is read once, so checksums of archives are compared too.

Formats allow NaN and infinities, and a network draws nothing but black or noise with them; a header does not tell.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sumuk.files.hashes import Progress
from sumuk.files.streaming import unmapped
from sumuk.files.tensors import Lazy
from sumuk.weights.source import read


@dataclass(frozen=True)
class Checked:
    """What came of it.

    Attributes:
        tensors: how many were read.
        unsound: for each tensor with numbers that are none, what it holds: ``3 NaN, 1 infinite``.
    """

    tensors: int
    unsound: dict[str, str]

    @property
    def warnings(self) -> tuple[str, ...]:
        """In sentences; none if all is well."""
        if not self.unsound:
            return ()
        told = "; ".join(f"{name}: {what}" for name, what in list(self.unsound.items())[:3])
        more = f" and {len(self.unsound) - 3} more" if len(self.unsound) > 3 else ""
        return (
            f"{len(self.unsound)} tensors hold numbers that are none ({told}{more}); it will draw nothing sensible",
        )


def check(path: str | os.PathLike[str], progress: Progress | None = None) -> Checked:
    """Read every number of a checkpoint.

    Args:
        path: file or folder.
        progress: told after each tensor; an exception that it raises stops the work.

    Raises:
        MissingFile: nothing there.
        BadFile: a file that breaks the rules of its format, or whose checksums do not fit what it holds.
    """
    source = read(path)
    every = unmapped({**source.tensors, **source.beside})
    unsound: dict[str, str] = {}
    for number, (name, tensor) in enumerate(every.items(), start=1):
        if what := _unsound(tensor):
            unsound[name] = what
        if progress:
            progress(number, len(every))
    return Checked(len(every), unsound)


def _unsound(tensor: Lazy) -> str:
    value = tensor.load()
    if not value.is_floating_point():
        return ""
    if value.element_size() == 1:  # few operations know 8-bit floats
        value = value.to(torch.float16)
    nan = int(value.isnan().sum())
    infinite = int(value.isinf().sum())
    counts = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    return ", ".join(counts)
