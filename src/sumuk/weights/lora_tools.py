"""What is done with adapters: take one out of two checkpoints, shrink it, add several up, put them into a weight.

All of it is least squares. The nearest matrix of rank r to D is ``U U' D`` with U the r first left singular vectors
(Eckart-Young), so U is all that is searched for: as eigenvectors of ``D D'`` in float64, or, where few are wanted of a
large matrix, by subspace iteration from a fixed random start (Halko et al. 2011, arXiv:0909.4061). Errors are
relative, in the Frobenius norm: ``|D - UU'D| / |D|``.

One tensor is in memory at a time; there is no input or output here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.layout import some
from sumuk.files.tensors import Lazy, Shape, dtype_name
from sumuk.weights.changes import Change, lora_of, make_change, padded

LARGE = 1 << 20
"""Elements of a matrix from which on a few singular vectors are searched for, not all computed."""

NOISE = 1e-15
"""Eigenvalues of ``D D'`` below this share of the largest are rounding; of singular values, 3e-8."""


@dataclass(frozen=True)
class Wanted:
    """How much of a matrix to keep; at least one is given, and the rank bounds the others.

    Attributes:
        rank: at most.
        error: the least rank whose relative Frobenius error is at most this.
        share: the same by energy: ``1 - error ** 2`` at least.

    Raises:
        BadInput: none is given, both of the others are, or one is out of bounds.
    """

    rank: int | None = None
    error: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.error is None and self.share is None:
            raise BadInput("how much to keep is not said; give a rank, an error or a share of the energy")
        if self.error is not None and self.share is not None:
            raise BadInput(f"error {self.error} and share {self.share} say the same thing twice; give one")
        if self.rank is not None and self.rank < 1:
            raise BadInput(f"rank {self.rank} keeps nothing; it must be 1 or more")
        if self.error is not None and not 0 <= self.error < 1:
            raise BadInput(f"error {self.error} must be at least 0 and less than 1")
        if self.share is not None and not 0 < self.share <= 1:
            raise BadInput(f"share {self.share} must be more than 0 and at most 1")

    @property
    def only_rank(self) -> int | None:
        """The rank if it is all that is asked for."""
        return self.rank if self.error is None and self.share is None else None

    def of(self, energies: Tensor, total: float) -> int:
        """How many of these energies (squared singular values, largest first) to keep."""
        kept = int((energies > NOISE * float(energies[0])).sum())
        lost = self.error**2 if self.error is not None else 1 - self.share if self.share is not None else 0.0
        if lost:
            # What is lost is summed from its small end: as a difference of large sums it would be rounding.
            rests = energies.flip(0).cumsum(0).flip(0) + max(total - float(energies.sum()), 0.0)
            kept = min(kept, int((rests > lost * total).sum()))
        return max(1, min(kept, self.rank or kept))


@dataclass(frozen=True)
class Kept:
    """What is left of a matrix.

    Attributes:
        rank: of what is kept.
        share: of the energy (squared norm), 0 to 1.
        norm: Frobenius norm of the whole.
    """

    rank: int
    share: float
    norm: float

    @property
    def error(self) -> float:
        """Relative Frobenius error."""
        return sqrt(max(0.0, 1 - self.share))


def factored(matrix: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Kept]:
    """``(down [r, n], up [m, r], figures)`` of the nearest matrix of a rank to ``matrix`` [m, n], in float32.

    Singular values go half to each side, so that both suit float16.

    Raises:
        BadInput: it is zero, or not finite.
    """
    if len(matrix) > matrix.shape[1]:
        up, down, kept = factored(matrix.t(), wanted)
        return down.t().contiguous(), up.t().contiguous(), kept
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if not isfinite(total) or total == 0:
        raise BadInput(f"a matrix {list(matrix.shape)} of norm {sqrt(total)} has no factors")
    few = wanted.only_rank
    if few is not None and matrix.numel() >= LARGE and 4 * (few + SPARE) <= len(matrix):
        energies, vectors = _searched(matrix, few, total)
    else:
        energies, vectors = _eigen(_gram(matrix))
    rank = wanted.of(energies, total)
    vectors = vectors[:, :rank]
    roots = energies[:rank].sqrt().sqrt()
    down = torch.cat([vectors.t() @ part.to(vectors.dtype) for part in matrix.split(WIDTH, 1)], 1)
    share = min(1.0, float(energies[:rank].sum()) / total)
    down, up = down / roots[:, None].to(down.dtype), vectors * roots.to(down.dtype)
    return down.float(), up.float(), Kept(rank, share, sqrt(total))


SPARE = 16
"""Vectors that are searched for beyond those wanted, for which the search is then sure."""

WIDTH = 2048
"""Columns that are in float64 at a time."""


def _gram(matrix: Tensor) -> Tensor:
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for part in matrix.split(WIDTH, 1):
        wide = part.double()
        gram.addmm_(wide, wide.t())
    return gram


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and their vectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _searched(matrix: Tensor, rank: int, total: float) -> tuple[Tensor, Tensor]:
    """The same of the first ``rank`` only, until a further round brings less than a thousandth of what is left."""
    matrix = matrix.float()
    random = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank + SPARE, generator=random)
    basis = torch.linalg.qr(matrix @ start).Q
    before = 0.0
    while True:
        rows = basis.t() @ matrix
        energies, turn = _eigen(_gram(rows))
        found = float(energies[:rank].sum())
        if found - before <= 1e-3 * max(total - found, 0.0) or found >= total * (1 - 1e-12):
            return energies, basis @ turn.float()
        before = found
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(rows.t()).Q).Q


@dataclass(frozen=True)
class Extracted:
    """What became of one tensor.

    Attributes:
        name: of it.
        change: what leads from the one to the other; None: nothing that an adapter would hold.
        outcome: ``low rank``, ``whole``, ``same`` or ``left out``.
        norm: Frobenius norm of the difference; 0 for what holds no real numbers.
        weight: that of the tensor before.
        kept: of a low rank.
    """

    name: str
    change: Change | None
    outcome: str
    norm: float
    weight: float
    kept: Kept | None = None


def extract(
    before: Mapping[str, Lazy], after: Mapping[str, Lazy], wanted: Wanted, *, whole: bool = False
) -> Iterator[Extracted]:
    """The adapter that makes the one model of the other, tensor by tensor, sorted by name.

    Args:
        before: the model to which it will be added.
        after: the same, trained further; of the same names and shapes.
        wanted: how much of each matrix to keep.
        whole: whether differences of biases, norms and other vectors are kept as they are; else they are left out.

    Raises:
        BadInput: the models differ in names or shapes.
        BadFile: a difference is not finite.
    """
    for there, here, words in ((before, after, "after"), (after, before, "before")):
        if lost := sorted({*there} - {*here}):
            raise BadInput(f"{len(lost)} tensors are not in the model {words}: {some(lost)}")
    for name in sorted(before):
        one, other = before[name], after[name]
        if one.shape != other.shape:
            raise BadInput(
                f"{name}: is {list(one.shape)} before and {list(other.shape)} after; extract needs equals"
            )
        yield _extracted(name, one, other, wanted, whole)


def _extracted(name: str, one: Lazy, other: Lazy, wanted: Wanted, whole: bool) -> Extracted:
    first, second = one.load(), other.load()
    if not (first.is_floating_point() and second.is_floating_point()):
        return Extracted(name, None, "same" if torch.equal(first, second) else "left out", 0.0, 0.0)
    size = _norm(first)
    difference = second.float() - first.float()
    norm = _norm(difference)
    if not isfinite(norm):
        raise BadFile(
            f"{other.source or one.source}: {name} minus the same before is not finite", "lora.values"
        )
    if norm == 0:
        return Extracted(name, None, "same", 0.0, size)
    if difference.ndim >= 2:
        down, up, kept = factored(difference.flatten(1), wanted)
        return Extracted(name, lora_of(down, up, one.shape, name), "low rank", norm, size, kept)
    if not whole:
        return Extracted(name, None, "left out", norm, size)
    kind = "diff_b" if name.endswith("bias") else "diff"
    return Extracted(name, make_change({kind: difference}, one.shape, name), "whole", norm, size)


def _norm(tensor: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(tensor.to(torch.float32))
    )  # in float64 it would take twenty times as long


def resize(change: Change, wanted: Wanted) -> tuple[Change, Kept]:
    """The nearest LoRA of a rank to a change; a LoRA's product is never formed, and one that is small enough stays
    as it is.

    Raises:
        BadInput: the change is no matrix, or depends on the weight that it is added to.
    """
    if change.reads_weight or change.result != change.shape or len(change.shape) < 2:
        raise BadInput(
            f"{change.where}: {change.method} of {list(change.shape)} has no rank that could be changed"
        )
    factors = change.low_rank()
    if factors is None:
        down, up, kept = factored(change.delta(torch.zeros(change.shape)).flatten(1), wanted)
        return lora_of(down, up, change.shape, change.where), kept
    below, above, scale = factors
    left, core = torch.linalg.qr(above.double())
    right, other = torch.linalg.qr(below.flatten(1).double().t())
    turned, values, back = torch.linalg.svd(core @ other.t() * scale, full_matrices=False)
    energies = values.square()
    total = float(energies.sum())
    if not isfinite(total):
        raise BadFile(f"{change.where}: its factors are not finite", "lora.values")
    rank = wanted.of(energies, total) if total else 1
    if rank >= len(below) or (wanted.only_rank or 0) >= len(below):
        return change, Kept(len(below), 1.0, sqrt(total))
    roots = values[:rank].sqrt()
    up = left @ (turned[:, :rank] * roots)
    down = (roots[:, None] * back[:rank]) @ right.t()
    share = float(energies[:rank].sum()) / total if total else 1.0
    return lora_of(down.float(), up.float(), change.shape, change.where), Kept(rank, share, sqrt(total))


def merge(changes: Sequence[tuple[Change, float]]) -> Change:
    """One change that does what several of the same tensor do together, exactly.

    LoRAs become one whose rank is the sum of theirs, which :func:`resize` makes smaller; if one is of another method,
    the sum is stored whole.

    Args:
        changes: each with its strength.

    Raises:
        BadInput: they change different shapes, one depends on the weight, or one has strength 0.
    """
    if not changes:
        raise BadInput("nothing to merge was given")
    first = changes[0][0]
    for change, strength in changes:
        _check_strength(change, strength)
        if change.shape != first.shape or change.result != first.result:
            raise BadInput(f"{change.where}: changes {list(change.shape)}, {first.where} {list(first.shape)}")
        if change.reads_weight or change.result != change.shape:
            raise BadInput(
                f"{change.where}: {change.method} depends on the weight that it changes, so that it cannot be merged "
                "with others; bake them into the model instead"
            )
    if len(changes) == 1 and changes[0][1] == 1:
        return first
    factors = [(change.low_rank(), strength) for change, strength in changes]
    low = [(found, strength) for found, strength in factors if found is not None]
    if len(low) == len(factors):
        downs = [down.float().flatten(1) for (down, _, _), _ in low]
        ups = [up.float() * (scale * strength) for (_, up, scale), strength in low]
        return lora_of(torch.cat(downs), torch.cat(ups, 1), first.shape, first.where)
    total = torch.zeros(first.shape)
    for change, strength in changes:
        total += change.delta(torch.zeros(first.shape), strength)
    kinds = {name for change, _ in changes for name in change.factors}
    kind = kinds.pop() if len(kinds) == 1 else "diff"
    return make_change({kind: total}, first.shape, first.where)


def _check_strength(change: Change, strength: float) -> None:
    if not isfinite(strength) or strength == 0:
        raise BadInput(f"{change.where}: strength {strength} changes nothing; leave it away, or give another")


def baked(weight: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """A weight with changes, in float32 (float64 if it is). Each change sees the weight as it was, so that their
    order does not matter.
    """
    shape: Shape = tuple(map(max, *(change.result for change, _ in changes), weight.shape))
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = padded(weight.to(kind), shape).clone()
    for change, strength in changes:
        total += padded(change.delta(weight, strength), shape)
    return total


def bake(
    weight: Lazy, changes: Sequence[tuple[Change, float]], *, name: str, dtype: torch.dtype | None = None
) -> Lazy:
    """A weight with changes in it, computed when it is loaded.

    Args:
        weight: the tensor as it is.
        changes: each with its strength.
        name: of the tensor, for messages.
        dtype: of the result; None: as the weight has been read.

    Raises:
        BadInput: a change is of another shape, or has strength 0; or no changes are given.
        BadFile: when it is loaded: a number lies outside of what the type holds, or is none.
    """
    if not changes:
        raise BadInput(f"{name}: no changes to bake into it were given")
    if not weight.dtype.startswith(("F", "BF")):
        raise BadInput(f"{name}: is {weight.dtype}; only floating-point tensors can be changed")
    for change, strength in changes:
        _check_strength(change, strength)
        if change.shape != weight.shape:
            raise BadInput(
                f"{change.where}: changes {list(change.shape)}, but {name} is {list(weight.shape)}"
            )

    def load() -> Tensor:
        stored = weight.load()
        total, kind = baked(stored, changes), dtype or stored.dtype
        # Asked before the cast, as some types of 8 bits take their largest number for what is larger.
        if not bool((total.abs() <= torch.finfo(kind).max).all()):
            raise BadFile(
                f"{weight.source}: {name} with {changes[0][0].where} goes beyond what {dtype_name(kind)} holds; "
                "write a wider type, or give less strength",
                "lora.values",
            )
        return total.to(kind)

    shape = tuple(map(max, *(change.result for change, _ in changes), weight.shape))
    return weight.become(load, shape=shape, dtype=dtype_name(dtype) if dtype else weight.dtype)


def relative_change(change: Change, weight: Tensor, strength: float = 1.0) -> tuple[float, float]:
    """Frobenius norms of a change and of the weight that it changes; of a LoRA without forming its product."""
    factors = change.low_rank()
    if factors is None:
        return _norm(change.delta(weight, strength)), _norm(weight)
    down, up, scale = factors
    down, up = down.flatten(1).double(), up.double()
    energy = float(((up.t() @ up) * (down @ down.t())).sum())
    return abs(scale * strength) * sqrt(max(energy, 0.0)), _norm(weight)
