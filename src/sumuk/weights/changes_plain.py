"""What an adapter does to one tensor, and the plain ways of it: low rank, whole differences, replacement.

``W' = W + delta(W, strength)``. A LoRA (Hu et al. 2021) adds ``strength * alpha / rank * up @ down``; of a convolution
the kernel goes with ``down``, or with a small core between two 1x1 factors (LyCORIS's Tucker form, ``lora_mid``).
Factors keep the names that kohya's and LyCORIS's files give them. No input or output here: layouts are read in
:mod:`~sumuk.weights.lora`, methods told apart in :mod:`~sumuk.weights.changes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.tensors import Shape

MOST_RANK = 1 << 14
"""No weight of a published model has a larger rank than 4,096 (T5's); sums of several LoRAs may."""

MOST_GROWTH = 16
"""Times that a weight may grow; Black Forest Labs's control LoRAs double one."""

MOST_SIDES = 8
"""Dimensions of a weight."""

WHOLE_NUMBERS = ("on_input", "reshape_weight", "bias_indices", "bias_size", "alpha")
"""Factors that may be stored as integers."""

SPARSE = ("bias_indices", "bias_values", "bias_size")
"""What an extraction by LyCORIS leaves of a difference beside its low rank: places, numbers, the shape."""


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """What an adapter does to one tensor.

    Attributes:
        method: its usual name.
        reads_weight: whether the delta depends on the weight that it is added to.
        shape: of the weight that it fits.
        where: the layer that it was made for, for messages.
        factors: its tensors by kohya's and LyCORIS's suffixes.
    """

    method: ClassVar[str]
    reads_weight: ClassVar[bool] = False
    shape: Shape
    where: str
    factors: Mapping[str, Tensor]

    @property
    def result(self) -> Shape:
        """Shape of the changed weight: ``shape``, unless a ``reshape_weight`` pads it with zeros first."""
        return self.shape

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """What is added to ``weight``: of the shape :attr:`result`, in float32, or float64 if ``weight`` is.

        Nothing at strength 0, and what was trained at strength 1.

        Raises:
            BadInput: the weight has another shape, or the strength is no finite number.
        """
        if tuple(weight.shape) != self.shape:
            raise BadInput(
                f"{self.where}: a change of a weight {list(self.shape)} cannot be added to {list(weight.shape)}"
            )
        if not isfinite(strength):
            raise BadInput(f"{self.where}: strength {strength} is not a finite number")
        work = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        return self._delta(padded(work, self.result), strength)

    @abstractmethod
    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        """The same of a weight of the result's shape, in the type to compute in."""

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """``(down [r, in, ...], up [out, r], scale)`` if the delta is ``strength * scale * up @ down`` whatever the
        weight is, so that it can be applied beside it; else None.
        """
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Its factors as a file of kohya's or LyCORIS's names holds them."""
        return dict(self.factors)

    def _like(self, name: str, weight: Tensor) -> Tensor:
        return self.factors[name].to(weight.device, weight.dtype)


def padded(weight: Tensor, shape: Shape) -> Tensor:
    """A weight that grows by zeros at the ends of its sides."""
    if tuple(weight.shape) == shape:
        return weight
    ends = [end for new, old in zip(shape, weight.shape, strict=True) for end in (new - old, 0)]
    return functional.pad(weight, ends[::-1])


class Factors:
    """The factors of one layer while they are checked.

    Args:
        given: by kohya's and LyCORIS's suffixes.
        shape: of the weight that they change.
        where: the layer, for messages.
    """

    def __init__(self, given: Mapping[str, Tensor], shape: Shape, where: str) -> None:
        self.given = dict(given)
        self.shape = shape
        self.where = where

    def bad(self, message: str, code: str) -> BadFile:
        return BadFile(f"{self.where}: {message}", f"lora.{code}")

    def misfit(self, name: str, wants: str) -> BadFile:
        return self.bad(
            f"{name} is {list(self.given[name].shape)}, but a weight {list(self.shape)} needs {wants}; "
            "it was made for another model, or is damaged",
            "shape",
        )

    def only(self, needed: tuple[str, ...], allowed: tuple[str, ...] = ()) -> None:
        """All of the needed and some of the allowed factors and nothing else, of floating-point type."""
        for name in needed:
            if name not in self.given:
                there = ", ".join(sorted(self.given))
                raise self.bad(f"{name} is not there, without which {there} are of no use", "half")
        for name in sorted({*self.given} - {*needed, *allowed}):
            raise self.bad(f"{name} has no meaning beside {needed[0]}", "unknown")
        for name, factor in self.given.items():
            if factor.is_complex() or not (factor.is_floating_point() or name in WHOLE_NUMBERS):
                raise self.bad(f"{name} is {factor.dtype}, not of a floating-point type", "type")

    def matrix(self, name: str, rows: int | None = None, columns: int | None = None) -> tuple[int, int]:
        """Sizes of a factor whose sides after the second are 1, or that is flattened; checked against what is
        known.
        """
        shape = tuple(self.given[name].shape)
        if len(shape) < 2 or min(shape) < 1:
            raise self.misfit(name, "a matrix")
        found = shape[0], prod(shape[1:])
        for has, wants, side in zip(found, (rows, columns), ("rows", "columns"), strict=True):
            if wants is not None and has != wants:
                raise self.misfit(name, f"{wants} {side} in it")
        return found

    def outer(self) -> tuple[int, int]:
        """Rows, and columns with the kernel flattened, of the weight."""
        if len(self.shape) < 2:
            raise self.bad(f"a weight {list(self.shape)} has no factors, it is not a matrix", "shape")
        return self.shape[0], prod(self.shape[1:])

    def kernel(self, name: str) -> None:
        """Refuse a factor whose kernel is spelt out and is another than the weight's."""
        shape = tuple(self.given[name].shape)
        if len(shape) > 2 and shape[2:] != self.shape[2:] and prod(shape[2:] + self.shape[2:]) != 1:
            raise self.misfit(name, f"a kernel {list(self.shape[2:])}")

    def rank(self, value: int) -> int:
        if value > MOST_RANK:
            raise self.bad(f"rank {value:,} is absurd; at most {MOST_RANK:,} is read", "rank")
        return value

    def number(self, name: str) -> float:
        value = self.given[name]
        number = float(value) if value.numel() == 1 else float("nan")
        if not isfinite(number):
            said = str(number) if value.numel() == 1 else f"a tensor {list(value.shape)}"
            raise self.bad(f"{name} is {said}, not one finite number", name)
        return number

    def scale(self, rank: int) -> float:
        """``alpha / rank``, 1 without alpha.

        Trainers take alpha 0 for "no scaling" and store the rank then; of a stored 0 some programs make the rank
        and some nothing at all, so it is refused.
        """
        if "alpha" not in self.given:
            return 1.0
        alpha = self.number("alpha")
        if alpha == 0:
            raise self.bad(
                "alpha is 0, by which nothing would change; if no scaling was meant, take it out of the file",
                "alpha",
            )
        return alpha / rank


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """LoRA and LoCon, with a Tucker core if there is one, and LyCORIS's sparse rest of an extraction (``bias_*``,
    scaled as the product is).
    """

    method = "LoRA"
    scale: float
    grown: Shape

    @property
    def result(self) -> Shape:
        return self.grown

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return int(self.factors["lora_down.weight"].shape[0])

    @classmethod
    def read(cls, given: Factors) -> LowRank:
        """Factors whose shapes fit.

        Raises:
            BadFile: they do not.
        """
        given.only(
            ("lora_down.weight", "lora_up.weight"), ("lora_mid.weight", "alpha", "reshape_weight", *SPARSE)
        )
        grown = _grown(given)
        wide = Factors(given.given, grown, given.where)
        rows, columns = wide.outer()
        if "lora_mid.weight" in given.given:
            rank, _ = wide.matrix("lora_down.weight", columns=grown[1])
            core = (rank, rank, *grown[2:])
            if tuple(given.given["lora_mid.weight"].shape) != core:
                raise wide.misfit("lora_mid.weight", f"a core {list(core)}")
        else:
            rank, _ = wide.matrix("lora_down.weight", columns=columns)
            wide.kernel("lora_down.weight")
        wide.matrix("lora_up.weight", rows, wide.rank(rank))
        _check_sparse(wide)
        return cls(given.shape, given.where, given.given, wide.scale(rank), grown)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        if self.grown != self.shape or "bias_values" in self.factors:
            return None
        down = self.factors["lora_down.weight"]
        # A core is folded in here, for which float16 is too coarse; without one the factors stay what they are.
        down, up = self._pair(down.float() if "lora_mid.weight" in self.factors else down)
        return down, up, self.scale

    def _pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        down = self._like("lora_down.weight", like).flatten(1)
        up = self._like("lora_up.weight", like).flatten(1)
        if "lora_mid.weight" in self.factors:
            down = torch.einsum("pq...,qj->pj...", self._like("lora_mid.weight", like), down)
        return down.reshape(self.rank, *self.grown[1:]), up

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        down, up = self._pair(weight)
        product = (up @ down.flatten(1)).reshape(self.grown)
        if "bias_values" in self.factors:
            at = self.factors["bias_indices"].to(weight.device, torch.int64)
            rest = weight.new_zeros(self.factors["bias_size"].tolist())
            product += rest.index_put_(tuple(at), self._like("bias_values", weight), True).reshape(self.grown)
        return product * (self.scale * strength)


def lora_of(down: Tensor, up: Tensor, shape: Shape, where: str) -> LowRank:
    """The LoRA of scale 1 with ``down`` [r, in * kernel] and ``up`` [out, r]; its alpha is the rank."""
    rank = len(down)
    factors = {
        "lora_down.weight": down.reshape(rank, *shape[1:]).contiguous(),
        "lora_up.weight": up.reshape(*up.shape, *(1 for _ in shape[2:])).contiguous(),
        "alpha": torch.tensor(float(rank)),
    }
    return LowRank.read(Factors(factors, shape, where))


def _grown(given: Factors) -> Shape:
    if "reshape_weight" not in given.given:
        return given.shape
    sizes = _sizes(given, "reshape_weight")
    if (
        len(sizes) != len(given.shape)
        or any(new < old for new, old in zip(sizes, given.shape, strict=True))
        or prod(sizes) > MOST_GROWTH * prod(given.shape)
    ):
        raise given.bad(
            f"reshape_weight {list(sizes)} does not enlarge a weight {list(given.shape)}", "shape"
        )
    return sizes


def _sizes(given: Factors, name: str) -> Shape:
    """A factor that holds a shape, whatever type its numbers have."""
    stored = given.given[name]
    numbers = stored.flatten().tolist() if stored.numel() <= MOST_SIDES else []
    if not numbers or not all(0 < each < 2**31 for each in numbers):  # NaN is neither
        raise given.bad(f"{name}, {numbers or list(stored.shape)}, is no shape", "shape")
    return tuple(int(each) for each in numbers)


def _check_sparse(given: Factors) -> None:
    there = [name for name in SPARSE if name in given.given]
    if not there:
        return
    if len(there) < len(SPARSE):
        lost = next(name for name in SPARSE if name not in there)
        raise given.bad(f"{lost} is not there, without which {', '.join(there)} are of no use", "half")
    indices, values = given.given["bias_indices"], given.given["bias_values"]
    sizes = torch.tensor(_sizes(given, "bias_size"))
    if prod(sizes.tolist()) != prod(given.shape):
        raise given.bad(f"bias_size {sizes.tolist()} does not hold a weight {list(given.shape)}", "shape")
    if tuple(indices.shape) != (len(sizes), values.numel()) or values.ndim != 1:
        raise given.misfit("bias_indices", f"{len(sizes)} rows and a column for each of bias_values")
    if not ((indices >= 0) & (indices < sizes[:, None])).all():  # NaN is neither
        raise given.bad(f"bias_indices point outside of bias_size {sizes.tolist()}", "shape")


@dataclass(frozen=True, eq=False)
class Whole(Change):
    """A difference stored whole: of a weight, a bias or a norm."""

    method = "full"
    name: str

    @classmethod
    def read(cls, given: Factors, name: str) -> Whole:
        """The factor of this name in the weight's shape; a 1x1 kernel may be spelt out or not."""
        given.only((name,))
        _same_numbers(given, name)
        return cls(given.shape, given.where, given.given, name)

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        return self._like(self.name, weight).reshape(self.shape) * strength


class Norm(Whole):
    """The same of a normalisation layer."""

    method = "norm"


@dataclass(frozen=True, eq=False)
class Replacement(Change):
    """Another tensor in the place of the weight; at strength s, s of the way there."""

    method = "set"
    reads_weight = True

    @classmethod
    def read(cls, given: Factors) -> Replacement:
        """A ``set_weight`` of the weight's shape."""
        given.only(("set_weight",))
        _same_numbers(given, "set_weight")
        return cls(given.shape, given.where, given.given)

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        return (self._like("set_weight", weight).reshape(self.shape) - weight) * strength


def _same_numbers(given: Factors, name: str) -> None:
    shape = tuple(given.given[name].shape)
    if [side for side in shape if side != 1] != [side for side in given.shape if side != 1]:
        raise given.misfit(name, "the same shape")
