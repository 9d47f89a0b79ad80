"""LyCORIS's other ways to change a weight (Yeh et al. 2024, arXiv:2309.14859): products, rotations, scales.

With W the weight, s the strength, a = alpha / rank:

========  =====================================================================================================
LoHa      ``s a (w1_a w1_b) * (w2_a w2_b)``, element by element (Hyeon-Woo et al. 2021)
LoKr      ``s a kron(w1, w2)``, each whole or low rank; both whole: a = 1
GLoRA     ``s a (W a1 a2 + b1 b2)`` (Chavan et al. 2023)
IA3       ``s W * scale``, by rows or by columns (Liu et al. 2022)
OFT       ``diag(1 + s (c - 1)) R(s) W - W``, R turns each block of rows (Qiu et al. 2023)
BOFT      the same with several such turns, over strides that double (Liu et al. 2023)
========  =====================================================================================================

A rotation is ``(I + Q) (I - Q)^-1`` (Cayley) with ``Q = B - B'``; its part at strength s is ``I + s (R - I)``. LyCORIS
leaves the scale c (``rescale``) whole at every strength, so that it changes the weight at strength 0; here it goes
with the strength as R does. At strength 1, and without c at every strength, both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sumuk.weights.changes_plain import Change, Factors


@dataclass(frozen=True, eq=False)
class LoHa(Change):
    """The product, element by element, of two low-rank matrices."""

    method = "LoHa"
    scale: float

    @classmethod
    def read(cls, given: Factors) -> LoHa:
        """Factors whose shapes fit.

        Raises:
            BadFile: they do not.
        """
        cores = tuple(name for name in ("hada_t1", "hada_t2") if name in given.given)
        given.only(
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *(("hada_t1", "hada_t2") if cores else ())),
            ("alpha",),
        )
        rows, columns = given.outer()
        rank = given.rank(given.matrix("hada_w1_b")[0])
        for which in "12":
            if cores:
                given.matrix(f"hada_w{which}_a", rank, rows)
                given.matrix(f"hada_w{which}_b", rank, given.shape[1])
                core = (rank, rank, *given.shape[2:])
                if tuple(given.given[f"hada_t{which}"].shape) != core:
                    raise given.misfit(f"hada_t{which}", f"a core {list(core)}")
            else:
                given.matrix(f"hada_w{which}_a", rows, rank)
                given.matrix(f"hada_w{which}_b", rank, columns)
        return cls(given.shape, given.where, given.given, given.scale(rank))

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        product = self._half("1", weight) * self._half("2", weight)
        return product.reshape(self.shape) * (self.scale * strength)

    def _half(self, which: str, like: Tensor) -> Tensor:
        first = self._like(f"hada_w{which}_a", like).flatten(1)
        second = self._like(f"hada_w{which}_b", like).flatten(1)
        if f"hada_t{which}" in self.factors:
            return _core(self._like(f"hada_t{which}", like), first, second)
        return first @ second


def _core(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``core`` [r, r, ...] between ``first`` [r, out] and ``second`` [r, in] as [out, in * kernel]."""
    return torch.einsum("ij...,ip,jq->pq...", core, first, second).flatten(1)


@dataclass(frozen=True, eq=False)
class LoKr(Change):
    """A Kronecker product of two matrices, each whole or low rank; the second carries the kernel."""

    method = "LoKr"
    scale: float

    @classmethod
    def read(cls, given: Factors) -> LoKr:
        """Factors whose shapes fit; both low rank: of one rank, or alpha would have two meanings.

        Raises:
            BadFile: they do not.
        """
        has = given.given
        needed: tuple[str, ...] = ()
        for which in "12":
            halves = (f"lokr_w{which}_a", f"lokr_w{which}_b")
            low = any(name in has for name in halves) or (which == "2" and "lokr_t2" in has)
            needed += halves if low else (f"lokr_w{which}",)
        given.only(needed, ("alpha", "lokr_t2"))
        rows, columns = given.outer()
        first, ranks = _sides(given, "1", 1)
        second, more = _sides(given, "2", prod(given.shape[2:]))
        ranks = {*ranks, *more}
        if first[0] * second[0] != rows or first[1] * second[1] != columns:
            raise given.bad(
                f"LoKr's {list(first)} times {list(second)} is not a weight {list(given.shape)}; "
                "it was made for another model, or is damaged",
                "shape",
            )
        if len(ranks) > 1:
            raise given.bad(f"LoKr's two halves have the ranks {sorted(ranks)}; they share one alpha", "rank")
        scale = given.scale(given.rank(ranks.pop())) if ranks else 1.0
        return cls(given.shape, given.where, has, scale)

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        first, second = self._half("1", weight), self._half("2", weight)
        return torch.kron(first, second).reshape(self.shape) * (self.scale * strength)

    def _half(self, which: str, like: Tensor) -> Tensor:
        if f"lokr_w{which}" in self.factors:
            return self._like(f"lokr_w{which}", like).flatten(1)
        first = self._like(f"lokr_w{which}_a", like).flatten(1)
        second = self._like(f"lokr_w{which}_b", like).flatten(1)
        if which == "2" and "lokr_t2" in self.factors:
            return _core(self._like("lokr_t2", like), first, second)
        return first @ second


def _sides(given: Factors, which: str, kernel: int) -> tuple[tuple[int, int], set[int]]:
    """Sizes of a half with its kernel flattened, and its rank if it has one."""
    whole, first, second = f"lokr_w{which}", f"lokr_w{which}_a", f"lokr_w{which}_b"
    if whole in given.given:
        sides = given.matrix(whole)
        if which == "2":
            given.kernel(whole)
        ranks: set[int] = set()
    elif which == "2" and "lokr_t2" in given.given:
        rank, rows = given.matrix(first)
        _, columns = given.matrix(second, rank)
        core = (rank, rank, *given.shape[2:])
        if tuple(given.given["lokr_t2"].shape) != core:
            raise given.misfit("lokr_t2", f"a core {list(core)}")
        sides, ranks = (rows, columns * kernel), {rank}
    else:
        rows, rank = given.matrix(first)
        sides, ranks = (rows, given.matrix(second, rank)[1]), {rank}
        if which == "2":
            given.kernel(second)
    if sides[1] % kernel:
        raise given.misfit(whole if whole in given.given else second, f"a kernel {list(given.shape[2:])}")
    return sides, ranks


@dataclass(frozen=True, eq=False)
class GLoRA(Change):
    """A low-rank sum, and the weight times a low-rank matrix. Files of older LyCORIS have the factors of each product
    the other way round: ``b1`` [r, in] and ``b2`` [out, r].
    """

    method = "GLoRA"
    reads_weight = True
    scale: float
    old: bool

    @classmethod
    def read(cls, given: Factors) -> GLoRA:
        """Factors whose shapes fit in one of the two orders.

        Raises:
            BadFile: in neither.
        """
        names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
        given.only(names, ("alpha",))
        rows, columns = given.outer()
        inner = given.shape[1]
        sizes = {name: given.matrix(name) for name in names}
        old = sizes["b1.weight"][0] != rows or sizes["b1.weight"][1] != sizes["b2.weight"][0]
        left, right = ("2", "1") if old else ("1", "2")
        rank = given.rank(given.matrix(f"b{left}.weight", rows)[1])
        given.matrix(f"b{right}.weight", rank, columns)
        given.kernel(f"b{right}.weight")
        given.matrix(f"a{left}.weight", inner, rank)
        given.matrix(f"a{right}.weight", rank, inner)
        return cls(given.shape, given.where, given.given, given.scale(rank), old)

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        left, right = ("2", "1") if self.old else ("1", "2")
        a, b = ([self._like(f"{x}{side}.weight", weight).flatten(1) for side in (left, right)] for x in "ab")
        turned = torch.einsum("oi...,ir,rj->oj...", weight, *a)
        return (turned + (b[0] @ b[1]).reshape(self.shape)) * (self.scale * strength)


@dataclass(frozen=True, eq=False)
class IA3(Change):
    """The weight, each of its rows, or of its columns (``on_input``), by a learnt share."""

    method = "IA3"
    reads_weight = True
    axis: int

    @classmethod
    def read(cls, given: Factors) -> IA3:
        """As many numbers as the weight has rows, or columns.

        Raises:
            BadFile: another number of them.
        """
        given.only(("weight", "on_input"))
        given.outer()
        axis = int(given.number("on_input") != 0)
        if given.given["weight"].numel() != given.shape[axis]:
            raise given.misfit("weight", f"{given.shape[axis]} numbers")
        return cls(given.shape, given.where, given.given, axis)

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        return weight * along(self._like("weight", weight), self.axis, weight.ndim) * strength


def along(numbers: Tensor, axis: int, sides: int) -> Tensor:
    """Numbers as a tensor of so many sides that all but one are 1."""
    return numbers.reshape([-1 if side == axis else 1 for side in range(sides)])


@dataclass(frozen=True, eq=False)
class Rotation(Change):
    """OFT, whose blocks are [n, b, b], and BOFT, whose are [m, n, b, b]."""

    method = "OFT"
    reads_weight = True
    bound: float

    @classmethod
    def read(cls, given: Factors) -> Rotation:
        """Blocks that cover the weight's rows; alpha bounds ``|Q|`` by ``alpha * rows``, 0 does not.

        Raises:
            BadFile: they do not.
        """
        given.only(("oft_blocks",), ("rescale", "alpha"))
        rows, _ = given.outer()
        blocks = tuple(given.given["oft_blocks"].shape)
        if len(blocks) not in (3, 4) or min(blocks) < 1 or blocks[-1] != blocks[-2]:
            raise given.misfit("oft_blocks", "square blocks [n, b, b] or [m, n, b, b]")
        if blocks[-3] * blocks[-1] != rows:
            raise given.misfit("oft_blocks", f"blocks of {rows} rows together")
        if len(blocks) == 4 and (blocks[-1] % 2 or rows % (blocks[-1] << min(blocks[0] - 1, 62))):
            raise given.misfit("oft_blocks", f"even blocks whose strides divide {rows} rows")
        if "rescale" in given.given and given.given["rescale"].numel() != rows:
            raise given.misfit("rescale", f"{rows} numbers")
        bound = given.number("alpha") * rows if "alpha" in given.given else 0.0
        if bound < 0:
            raise given.bad(f"alpha {bound / rows} bounds a norm; it cannot be negative", "alpha")
        kind = Butterfly if len(blocks) == 4 else cls
        return kind(given.shape, given.where, given.given, bound)

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        turns = self._turns(weight) * strength
        moved = self._moved(weight.flatten(1), turns).reshape(weight.shape)
        if "rescale" in self.factors:
            scale = along(self._like("rescale", weight), 0, weight.ndim)
            moved = moved + strength * (scale - 1) * (weight + moved)
        return moved

    def _turns(self, like: Tensor) -> Tensor:
        """R - I of each block; not by a difference, which would lose digits of small turns."""
        blocks = self._like("oft_blocks", like)
        skew = blocks - blocks.mT
        norm = float(torch.linalg.vector_norm(skew))
        if 0 < self.bound < norm:
            skew = skew * (self.bound / norm)
        unit = torch.eye(blocks.shape[-1], dtype=like.dtype, device=like.device)
        return torch.linalg.solve(unit - skew, 2 * skew)

    def _moved(self, rows: Tensor, turns: Tensor) -> Tensor:
        """How far the turns, given less I, move the rows."""
        number, size, _ = turns.shape
        return torch.einsum("knm,knc->kmc", turns, rows.unflatten(0, (number, size))).flatten(0, 1)


class Butterfly(Rotation):
    """BOFT: turn i mixes rows that lie ``2^i * b / 2`` apart."""

    method = "BOFT"

    def _moved(self, rows: Tensor, turns: Tensor) -> Tensor:
        size = turns.shape[-1]
        moved = torch.zeros_like(rows)
        for index, turn in enumerate(turns):
            apart = (2, size // 2 << index)
            paired = (rows + moved).unflatten(0, (-1, *apart)).transpose(1, 2).flatten(0, 2)
            step = (turn @ paired.unflatten(0, (-1, size))).flatten(0, 1)
            moved = moved + step.unflatten(0, (-1, *apart[::-1])).transpose(1, 2).flatten(0, 2)
        return moved
