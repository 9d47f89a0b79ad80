"""What all work on LoRA files has in common: the model that they are for, the account of what is done, the writing.

A LoRA's names mean something only beside a model: of any checkpoint of the family, in any layout, the header is read.
Whatever of a LoRA does not fit it is refused, as it would be lost.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.families.family import Family
from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.layout import some
from sumuk.files.metered import Meter
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import Shape
from sumuk.weights.changes import Change, make_change
from sumuk.weights.contents import whole
from sumuk.weights.encoding import plain_floats
from sumuk.weights.inspect import Opened, recognise
from sumuk.weights.lora import Lora, Patch, read_lora
from sumuk.weights.lora_names import Index, cut
from sumuk.weights.lora_tools import Kept
from sumuk.weights.lora_writing import LAYOUTS, write_lora
from sumuk.weights.prune import check_suffix
from sumuk.weights.source import Source, read

Place = str | os.PathLike[str]
FIRST = "denoiser.img_in.weight"
"""FLUX.1's first layer, which reads the numbers of a token."""
DOWN = ("lora_down.weight", "lora_A.weight")
"""Ends of names whose first side is a rank."""


@dataclass(frozen=True)
class Host:
    """The model that LoRAs are for.

    Attributes:
        opened: its header, recognised.
        family: what it is.
        native: native names of its tensors, with the part in front, and their shapes.
    """

    opened: Opened
    family: Family
    native: Mapping[str, Shape]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.opened.source.path


def host(path: Place) -> Host:
    """Read the header of a model.

    Raises:
        MissingFile, BadFile: no such file; nobody knows it.
        BadInput: it is no model: an adapter, or a network that draws nothing by itself.
    """
    source = read(path)
    return _host(recognise(replace(source, tensors=plain_floats(source.tensors))))


def _host(opened: Opened) -> Host:
    kind = whole(opened).family
    if not isinstance(kind, Family):
        path = opened.source.path
        raise BadInput(f"{path}: is {kind.title}, where the checkpoint of a model is wanted")
    return Host(opened, kind, {name: one.shape for name, one in opened.moved.tensors.items()})


def widened(home: Host, loras: Iterable[Place]) -> Host:
    """The model with room for a second picture beside each token, where a LoRA brings the weights that read it.

    FLUX.1 Canny and Depth come as LoRAs for FLUX.1 dev as well (Black Forest Labs 2024), whose first layer reads twice
    as many numbers. What the model lacks of it is zero, so that it hears nothing of them by itself.

    Raises:
        BadFile: with so many numbers it is no model that is known.
    """
    if FIRST not in home.native:
        return home
    index, rows, has = Index(home.family, home.native), *home.native[FIRST]
    wanted = max((_reads(source, index) for source in map(read, loras)), default=0)
    if wanted <= has:
        return home
    opened = home.opened
    (name,) = opened.moved.origin[FIRST]
    one = opened.source.tensors[name]
    wide = one.become(lambda: F.pad(one.load(), (0, wanted - has)), shape=(rows, wanted))
    return _host(recognise(replace(opened.source, tensors=opened.source.tensors | {name: wide})))


def _reads(source: Source, index: Index) -> int:
    """How many numbers a token has for a LoRA's first layer; 0 if it has none."""
    for name, tensor in source.tensors.items():
        piece = cut(name)
        if piece is not None and piece.factor == "lora_down.weight" and len(tensor.shape) == 2:
            place = index.find(piece.layer)
            if place is not None and f"{place.part}.{place.name}" == FIRST:
                return tensor.shape[1]
    return 0


def fitting(path: Place, home: Host) -> Lora:
    """Read a LoRA all of which fits a model.

    Raises:
        MissingFile, BadFile: no such file; no LoRA; something of it fits nothing in the model.
    """
    lora = read_lora(path, home.family, home.native)
    if lost := (*lora.unmatched, *lora.misshapen):
        raise BadFile(
            f"{path}: {len(lost)} of its tensors fit nothing in {home.path}, {home.family.title}, and would be lost: "
            f"{some(lost)}",
            "lora.partial",
        )
    return lora


def refuse_over(out: Path, files: Iterable[Path]) -> None:
    """Refuse to write over a file that somebody will miss."""
    if out.exists() and (file := next((each for each in files if out.samefile(each)), None)):
        raise BadInput(f"{str(out)!r} is {str(file)!r}, which is read; give another name")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A LoRA file that was written.

    Attributes:
        path: the file.
        title: the model that it is for, in words.
        layout: ``kohya`` or ``peft``.
        layers: how many changes of tensors it holds of each part.
        ranks: of its products -> how many have it.
        notes: what else is good to know.
        source: digests of the files that were read.
        target: of the new one.
        before: bytes of those files.
        after: bytes of the new one.
        seconds: how long it took.
    """

    path: Path
    title: str
    layout: str
    layers: Mapping[str, int]
    ranks: Mapping[int, int]
    notes: tuple[str, ...]
    source: Mapping[str, Hashes]
    target: Hashes
    before: int
    after: int
    seconds: float


class Work:
    """What all of these functions do before and after: look at the names, count bytes, hash, write.

    Args:
        out: the new file.
        home: the model.
        paths: what is read.
        layout: of the new file.
        progress: told of the bytes of what is read, twice: hashed and worked on.
    """

    def __init__(
        self, out: Place, home: Host, paths: Sequence[Path], layout: str, progress: Progress | None
    ) -> None:
        self.began, self.out, self.home, self.layout = time.monotonic(), Path(out), home, layout
        if layout not in LAYOUTS:
            raise BadInput(f"LoRAs cannot be written in the layout {layout!r}{nearest(layout, LAYOUTS)}")
        check_suffix(self.out)
        self.before = sum(path.stat().st_size for path in paths)
        self.meter = Meter(progress, 2 * self.before)
        self.source = {str(path): hashes(path, self.meter.reading()) for path in paths}

    def done(self, change: Change) -> None:
        """One change more is worked on."""
        self.meter.add(sum(factor.nbytes for factor in change.factors.values()))

    def write(
        self, patches: Sequence[Patch], metadata: Mapping[str, str], embeddings: Any = None
    ) -> dict[str, Any]:
        """Write the file; the fields of :class:`Made` but ``notes``."""
        home, meter = self.home, self.meter
        meter.add(meter.total - meter.done)
        write_lora(self.out, patches, self.layout, home.family, home.native, metadata, embeddings)
        header = read_header(self.out)
        ranks = Counter(one.shape[0] for name, one in header.tensors.items() if name.endswith(DOWN))
        return {
            "path": self.out,
            "title": home.family.title,
            "layout": self.layout,
            "layers": dict(Counter(patch.part for patch in patches)),
            "ranks": dict(sorted(ranks.items())),
            "source": self.source,
            "target": hashes(self.out),
            "before": self.before,
            "after": self.out.stat().st_size,
            "seconds": time.monotonic() - self.began,
        }


# -- changes ---------------------------------------------------------------------------------------------------------


@dataclass
class Losses:
    """What changes of rank cost in all.

    Attributes:
        energy: squared norm of everything.
        lost: of what went.
        worst: the layer that lost most, and its relative error.
    """

    energy: float = 0.0
    lost: float = 0.0
    worst: tuple[str, float] | None = None

    def add(self, name: str, kept: Kept) -> None:
        """One matrix."""
        self.energy += kept.norm**2
        self.lost += kept.norm**2 * (1 - kept.share)
        if kept.norm and (self.worst is None or kept.error > self.worst[1]):
            self.worst = (name, kept.error)

    @property
    def error(self) -> float:
        """Relative Frobenius error of all matrices together."""
        return math.sqrt(max(self.lost, 0.0) / self.energy) if self.energy else 0.0


def cast(patch: Patch, dtype: torch.dtype | None) -> Patch:
    """A change with its factors in another type; alpha, which is one number, stays as it is.

    Raises:
        BadFile: a number is too large for the type, or all of a factor becomes zero.
    """
    if dtype is None:
        return patch
    made = {}
    for name, factor in patch.change.tensors().items():
        made[name] = factor
        if factor.is_floating_point() and name != "alpha":
            made[name] = factor.to(dtype)
            if not bool(made[name].isfinite().all()) or (bool(factor.any()) and not bool(made[name].any())):
                raise BadFile(
                    f"{patch.source}: {name} is up to {float(factor.abs().max()):g}, for which {dtype} has no numbers; "
                    "write float32",
                    "lora.values",
                )
    change = patch.change
    return replace(patch, change=make_change(made, change.shape, change.where))


def type_of(change: Change) -> torch.dtype:
    """The type of its numbers, of 16 bits or more; alpha is float32 in many files whose factors are not."""
    kinds = [f.dtype for name, f in change.factors.items() if f.is_floating_point() and name != "alpha"]
    return torch.float16 if kinds[0].itemsize < 2 else kinds[0]


def is_matrix(change: Change) -> bool:
    """Whether it changes a matrix or a kernel, not a vector."""
    return sum(side > 1 for side in change.shape) > 1 or len(change.shape) > 2


def is_zero(change: Change) -> bool:
    """Whether it adds nothing to any weight."""
    return not bool(change.delta(torch.zeros(change.shape)).any())


def told(patches: Sequence[Patch]) -> str:
    """Layers and their methods, for a message."""
    methods = " and ".join(sorted({patch.change.method for patch in patches}))
    return f"{methods} in {len(patches)} layers ({some([patch.source for patch in patches], 2)})"
