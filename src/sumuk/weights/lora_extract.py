"""A LoRA taken out of two checkpoints: what leads from the one to the other, as far as a LoRA's file can say it.

::

    extract_lora("base.safetensors", "tuned/", "tuned-lora.safetensors", Wanted(rank=64))

The checkpoints may be of any layout and precision; they are aligned by native names. Each layer that the new file
names is factored by itself: of a stack of q, k and v each has its own rank. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.files.hashes import Progress
from sumuk.files.layout import some
from sumuk.files.tensors import Shape, Tensors, lazy, length
from sumuk.weights.changes import make_change
from sumuk.weights.encoding import read_dtype
from sumuk.weights.lora import Patch
from sumuk.weights.lora_names import Index
from sumuk.weights.lora_names import Place as Spot
from sumuk.weights.lora_tools import Wanted, extract
from sumuk.weights.lora_work import Host, Losses, Made, Place, Work, cast, host, refuse_over
from sumuk.weights.lora_writing import LAYOUTS
from sumuk.weights.merge_plan import ALONE

HALF_STEPS = 2.0**-8 + 2.0**-11
"""Of bfloat16 and float16, relative: by so much two roundings of a number to them may lie apart."""
TINY = 2.0**-24
"""The smallest number of float16."""


@dataclass(frozen=True)
class LeftOut:
    """A tensor that differs and is not in the file.

    Attributes:
        name: native, with the part in front.
        share: size of its difference relative to that of all differences (Frobenius norms), 0 to 1.
    """

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class LoraExtracted(Made):
    """What was done.

    Attributes:
        kept: share of the energy (squared norm) of all differences that the file holds, before its numbers are rounded.
        error: relative error of the layers in it (Frobenius norm).
        worst: the layer that lost most, and its error.
        whole: how many differences of vectors are stored as they are.
        same: tensors that do not differ, or only by the rounding of their types.
        left: tensors that differ and are not in the file, the largest first.
    """

    kept: float
    error: float
    worst: tuple[str, float] | None
    whole: int
    same: int
    left: tuple[LeftOut, ...]


def extract_lora(
    before: Place,
    after: Place,
    out: Place,
    wanted: Wanted,
    *,
    layout: str = "kohya",
    dtype: str | torch.dtype = "float16",
    whole: bool = False,
    parts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> LoraExtracted:
    """Write the LoRA that makes the one checkpoint of the other.

    Numbers that are stored in different types are compared in the coarser one, so that a float16 file of the same
    float32 numbers does not differ from them.

    Args:
        before: the model to which it will be added.
        after: the same, trained further.
        out: the new ``.safetensors`` file.
        wanted: how much of each layer to keep.
        layout: ``kohya`` or ``peft``.
        dtype: type of the factors.
        whole: whether differences of biases, norms and other vectors are stored as they are; else they are left out
            and told. Only kohya's names have a place for them.
        parts: networks to look at (``denoiser``, ``text``, ...); all by default.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        BadInput: the models are not of one family and shape; they do not differ, or not in a part that was named, or
            only in what is left out; a setting that would do nothing.
        BadFile: a file that nobody knows; numbers that are not finite or too large for the type.
        MissingFile: no such file.
    """
    kind = read_dtype(dtype)
    if whole and layout == "peft":
        raise BadInput(
            "PEFT's names have no place for whole differences; write the layout kohya, or leave whole away"
        )
    homes = host(before), host(after)
    _check_alike(*homes)
    files = [file for home in homes for file in home.opened.source.files]
    refuse_over(Path(out), files)
    index = Index(homes[0].family, homes[0].native)
    chosen = _chosen(parts, index, homes)
    names, notes = _aligned(*homes, chosen)
    work = Work(out, homes[0], files, layout, progress)
    diff = _Differences(wanted, whole, _spots(index, layout), homes[0].native)
    first, second = (home.opened.moved.tensors for home in homes)
    patches = []
    for name in names:
        found = diff.of(name, first, second)
        patches += [cast(patch, kind) for patch in found]
        work.meter.add(length(first[name]) + length(second[name]))
    diff.refuse_nothing(homes, patches, parts)
    stems = [home.path.stem for home in homes]
    said = {"modelspec.title": f"{stems[1]} from {stems[0]}", "sumuk.extracted": _origin(homes, work, wanted)}
    return LoraExtracted(
        **work.write(patches, said),
        notes=(*notes, *_quantised(homes)),
        kept=diff.kept,
        error=diff.losses.error,
        worst=diff.losses.worst,
        whole=diff.wholes,
        same=diff.same,
        left=diff.left_out(),
    )


# -- alignment -------------------------------------------------------------------------------------------------------


def _check_alike(first: Host, second: Host) -> None:
    if first.family.name != second.family.name:
        raise BadInput(
            f"{second.path} is {second.family.title} ({second.family.key}), {first.path} is {first.family.title} "
            f"({first.family.key}); a LoRA leads from one model to another of its family"
        )
    odd = [name for name, shape in first.native.items() if second.native.get(name, shape) != shape]
    if odd:
        shapes = (
            f"{list(first.native[odd[0]])} in {first.path} and {list(second.native[odd[0]])} in {second.path}"
        )
        raise BadInput(f"{len(odd)} tensors differ in shape: {odd[0]!r} is {shapes}")


def _chosen(parts: Sequence[str] | None, index: Index, homes: tuple[Host, Host]) -> tuple[str, ...]:
    """The parts to look at; by default also those that no LoRA names, to tell of them."""
    if parts is None:
        return tuple(part.name for part in homes[0].family.parts)
    for part in parts:
        if part not in index.paths or not any(name.startswith(f"{part}.") for name in homes[1].native):
            raise BadInput(
                f"parts: no {part!r} that a LoRA could change is in both models{nearest(part, index.paths)}"
            )
    return tuple(parts)


def _aligned(first: Host, second: Host, parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that both have, sorted, and what is to be told of the others.

    Raises:
        BadInput: within a part one lacks what the other has.
    """
    names, notes = [], []
    for part in parts:
        own = [{name for name in each.native if name.startswith(f"{part}.")} for each in (first, second)]
        names += sorted(own[0] & own[1])
        for here, there, home in ((own[0], own[1], second), (own[1], own[0], first)):
            lost = here - there
            if not there and lost:
                notes.append(f"{home.path.name} has no {part}, with which it could be compared")
            elif lost:
                notes.append(
                    f"{home.path.name} lacks {len(lost)} tensors of the {part}, by design: {some([*lost])}"
                )
                _refuse_lost(lost, home, first if home is second else second)
    return names, notes


def _refuse_lost(lost: set[str], home: Host, other: Host) -> None:
    """Raise BadInput for tensors that a model lacks for another reason than its layout or variant."""
    arrangement, table = home.opened.answer.arrangement, other.opened.moved.tensors
    assert arrangement is not None
    by_design = set(arrangement.layout(table, backward=True).backward(table).ignored)
    if odd := [name for name in lost - by_design if not name.startswith(ALONE)]:
        raise BadInput(
            f"{home.path} lacks {len(odd)} tensors that {other.path} has: {some(odd)}; they are not of one shape"
        )


def _spots(index: Index, layout: str) -> dict[str, list[Spot]]:
    """Native names, part in front, and the layers of a layout that each consists of."""
    if layout not in LAYOUTS:
        raise BadInput(f"LoRAs cannot be written in the layout {layout!r}{nearest(layout, LAYOUTS)}")
    speller, found = LAYOUTS[layout](index), dict[str, list[Spot]]()
    for part, paths in index.paths.items():
        for spot in speller.paths(paths).values():
            found.setdefault(f"{part}.{spot.name}", []).append(spot)
    return found


def _quantised(homes: Sequence[Host]) -> Iterator[str]:
    for home in homes:
        packed = Counter(one.stored for one in home.opened.moved.tensors.values() if one.packed is not None)
        if packed:
            shown = ", ".join(f"{count} {scheme}" for scheme, count in packed.items())
            yield f"{home.path.name} is quantised ({shown}): what that cost is part of the differences"


def _origin(homes: Sequence[Host], work: Work, wanted: Wanted) -> str:
    said: dict[str, Any] = {}
    for key, home in zip(("before", "after"), homes, strict=True):
        digests = [work.source[str(file)].sha256 for file in home.opened.source.files]
        said[key] = {"name": home.path.name, "sha256": digests[0] if len(digests) == 1 else digests}
    bounds = {key: getattr(wanted, key) for key in ("rank", "error", "share")}
    return json.dumps(said | {key: bound for key, bound in bounds.items() if bound is not None})


# -- differences -----------------------------------------------------------------------------------------------------


@dataclass
class _Differences:
    """The account of all tensors while they are compared."""

    wanted: Wanted
    whole: bool
    spots: Mapping[str, Sequence[Spot]]
    native: Mapping[str, Shape]
    losses: Losses = field(default_factory=Losses)
    total: float = 0.0
    wholes: int = 0
    held: float = 0.0
    same: int = 0
    left: list[tuple[str, float]] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """Share of the energy of all differences that is in the file."""
        return (
            min(1.0, (self.losses.energy - self.losses.lost + self.held) / self.total) if self.total else 1.0
        )

    def left_out(self) -> tuple[LeftOut, ...]:
        """What is not in the file, the largest first."""
        found = sorted(self.left, key=lambda each: (-each[1], each[0]))
        return tuple(
            LeftOut(name, (energy / self.total) ** 0.5 if self.total else 0.0) for name, energy in found
        )

    def of(self, name: str, before: Tensors, after: Tensors) -> list[Patch]:
        """What a LoRA says of the difference of one tensor."""
        one, other = before[name].load(), after[name].load()
        if alike(one, other):
            self.same += 1
            return []
        if not (one.is_floating_point() and other.is_floating_point()):
            self.left.append((name, 0.0))
            return []
        energy = _energy(one, other)
        if not math.isfinite(energy):
            raise BadFile(f"{after[name].source}: {name} minus the same before is not finite", "lora.values")
        self.total += energy
        spots = self.spots.get(name, ())
        if one.ndim in (2, 4):
            patches, rest = self._layers(name, one, other, spots), energy
            for patch in patches:
                rest -= _energy(*(_rows(each, patch.rows) for each in (one, other)))
            if rest > 1e-9 * energy:
                self.left.append((name, rest))
            return patches
        if not (self.whole and spots):
            self.left.append((name, energy))
            return []
        self.wholes += 1
        self.held += energy
        part, _, own = name.partition(".")
        factors = {self._kind(name): (other.float() - one.float())}
        return [Patch(part, own, None, make_change(factors, tuple(one.shape), name), name)]

    def _layers(self, name: str, one: Tensor, other: Tensor, spots: Sequence[Spot]) -> list[Patch]:
        part, _, own = name.partition(".")
        patches = []
        for spot in spots:
            first, second = _rows(one, spot.rows), _rows(other, spot.rows)
            label = name if spot.rows is None else f"{name}[{spot.rows[0]}:{spot.rows[1]}]"
            (found,) = extract({label: lazy(first)}, {label: lazy(second)}, self.wanted)
            if found.change is not None and found.kept is not None:
                self.losses.add(label, found.kept)
                patches.append(Patch(part, own, spot.rows, found.change, label))
        return patches

    def _kind(self, name: str) -> str:
        """What files call a whole difference of this tensor."""
        stem, _, leaf = name.rpartition(".")
        is_norm = len(self.native.get(f"{stem}.weight", (0, 0))) == 1
        if leaf.endswith("bias"):
            return "b_norm" if is_norm else "diff_b"
        return "w_norm" if is_norm and leaf == "weight" else "diff"

    def refuse_nothing(
        self, homes: Sequence[Host], patches: Sequence[Patch], parts: Sequence[str] | None
    ) -> None:
        """Raise BadInput if there is nothing to write, of all or of a part that was asked for, or nothing whole."""
        both = f"{homes[0].path} and {homes[1].path}"
        if not self.total and not self.left:
            raise BadInput(f"{both} hold the same numbers, but for rounding; there is nothing to extract")
        if not patches:
            raise BadInput(
                f"{both} differ only in what such a file does not hold: {some([name for name, _ in self.left])}"
                + ("" if self.whole else "; vectors are stored with whole=True")
            )
        for part in parts or ():
            if not any(patch.part == part for patch in patches):
                raise BadInput(
                    f"parts: the {part} of {both} has no difference that such a file holds; leave it out"
                )
        if self.whole and not self.wholes:
            raise BadInput(f"whole would do nothing: no vectors of {both} differ")


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors hold the same numbers, but for the rounding of their types."""
    if one.dtype == other.dtype or not (one.is_floating_point() and other.is_floating_point()):
        return torch.equal(one, other.to(one.dtype))
    fine, coarse = sorted((one, other), key=lambda each: torch.finfo(each.dtype).eps)
    if torch.equal(fine.to(coarse.dtype), coarse):
        return True
    if {fine.dtype, coarse.dtype} != {torch.float16, torch.bfloat16}:
        return False
    # Neither holds the other: both may be roundings of a third.
    a, b = fine.float(), coarse.float()
    return bool(((a - b).abs() <= torch.maximum(a.abs(), b.abs()) * HALF_STEPS + TINY).all())


def _rows(tensor: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return tensor if rows is None else tensor[slice(*rows)]


def _energy(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(other.float() - one.float(), dtype=torch.float64)) ** 2
