"""Adapters of every method as changes of one tensor: told apart by their factors' names, checked, made.

``make_change(factors, shape, where).delta(weight, strength)`` is what is added to a weight. On top of another change
DoRA (Liu et al. 2024, arXiv:2402.09353) gives each row, or each column, of the changed weight a learnt norm m::

    W' = m * (W + d) / |W + d|,    delta = strength * (W' - W)

The norm is that of W + d on both axes, as in the paper, PEFT and LyCORIS; ComfyUI has divided rows by the norm of W
alone, by which files that were trained with the others come out wrong. What a strength other than 1 means the paper
does not say, and LyCORIS's modules change the weight at strength 0; the way straight from W to W' is that of ComfyUI,
A1111 and LyCORIS's own ``apply_dora_scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.tensors import Shape
from sumuk.weights.changes_lycoris import IA3, GLoRA, LoHa, LoKr, Rotation, along
from sumuk.weights.changes_plain import Change, Factors, LowRank, Norm, Replacement, Whole, lora_of, padded

__all__ = ["Change", "LowRank", "Whole", "lora_of", "make_change", "padded", "stacked"]


@dataclass(frozen=True, eq=False)
class DoRA(Change):
    """Another change whose result gets learnt norms of its rows (axis 0) or columns (axis 1)."""

    method = "DoRA"
    reads_weight = True
    inner: Change
    axis: int

    @property
    def result(self) -> Shape:
        return self.inner.result

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        changed = weight + self.inner._delta(weight, 1.0)
        others = [side for side in range(changed.ndim) if side != self.axis]
        norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        wanted = along(self._like("dora_scale", weight), self.axis, weight.ndim)
        share = wanted / norms.clamp_min(1e-30)  # a row of zeros stays one
        return (changed * share - weight) * strength


def _dora(given: Factors, inner: Change) -> DoRA:
    if isinstance(inner, Replacement | IA3 | Norm) or len(inner.result) < 2:
        raise given.bad(f"dora_scale has no meaning beside {inner.method}", "unknown")
    scale = given.given["dora_scale"]
    if not scale.is_floating_point():
        raise given.bad(f"dora_scale is {scale.dtype}, not of a floating-point type", "type")
    rows, columns = inner.result[:2]
    sides = tuple(scale.shape)
    if sides[:1] == (rows,) and scale.numel() == rows:
        axis = 0
    elif sides[:2] == (1, columns) and scale.numel() == columns:
        axis = 1
    else:
        raise given.misfit("dora_scale", f"[{rows}, 1, ...] or [1, {columns}, ...]")
    return DoRA(given.shape, given.where, given.given, inner, axis)


METHODS: tuple[tuple[tuple[str, ...], Callable[[Factors], Change]], ...] = (
    (("lora_down.weight", "lora_up.weight", "lora_mid.weight"), LowRank.read),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), LoHa.read),
    (
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        LoKr.read,
    ),
    (("oft_blocks",), Rotation.read),
    (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), GLoRA.read),
    (("weight", "on_input"), IA3.read),
    (("set_weight",), Replacement.read),
    *(((name,), partial(Whole.read, name=name)) for name in ("diff", "diff_b", "lora_B.bias")),
    *(((name,), partial(Norm.read, name=name)) for name in ("w_norm", "b_norm")),
)
"""Names of a method's own factors, and what makes a change of them and of those that others have too."""


def make_change(factors: Mapping[str, Tensor], shape: Shape, where: str) -> Change:
    """The change of one tensor out of an adapter's factors.

    Args:
        factors: of one layer, by kohya's and LyCORIS's suffixes (``lora_down.weight``, ``alpha``, ``hada_w1_a``, ...);
            ``diff_b``, ``b_norm`` and ``lora_B.bias`` change a bias, each by itself.
        shape: of the weight. Factors of a 1x1 convolution may be those of a linear layer, and the other way round.
        where: file and layer, for messages.

    Raises:
        BadFile: unknown or missing factors, shapes that do not fit, or numbers that mean nothing.
    """
    given = Factors(factors, tuple(shape), where)
    inner = Factors(
        {name: each for name, each in factors.items() if name != "dora_scale"}, given.shape, where
    )
    found = [read for names, read in METHODS if not inner.given.keys().isdisjoint(names)]
    if len(found) != 1:
        which = "is no known adapter's" if not found else "are those of more than one method"
        raise given.bad(
            f"{', '.join(sorted(factors)) or 'nothing'} {which}", "method" if found else "unknown"
        )
    change = found[0](inner)
    return _dora(given, change) if "dora_scale" in factors else change


@dataclass(frozen=True, eq=False)
class Bands(Change):
    """Changes of bands of a weight's rows that are not all of low rank."""

    method = "several in bands"
    parts: tuple[tuple[int, Change], ...]

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """Whether one of its parts does."""
        return any(part.reads_weight for _, part in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        """Refused: no file's names have a place for it."""
        kinds = " and ".join(sorted({part.method for _, part in self.parts}))
        raise BadInput(f"{self.where}: {kinds} of parts of a weight cannot be written as one layer's")

    def _delta(self, weight: Tensor, strength: float) -> Tensor:
        whole = torch.zeros_like(weight)
        for begin, part in self.parts:
            rows = slice(begin, begin + part.shape[0])
            whole[rows] = part._delta(weight[rows], strength)
        return whole


def stacked(parts: Sequence[tuple[int, Change]], shape: Shape, where: str) -> Change:
    """Changes of bands of rows of one weight, as of q, k and v that a model holds in one tensor.

    LoRAs become one, ``down`` stacked and ``up`` in blocks; rows that none covers stay as they are.

    Args:
        parts: (its first row, the change).
        shape: of the whole weight.
        where: the layer, for messages.

    Raises:
        BadFile: bands overlap, or do not lie in the weight.
    """
    end = 0
    for begin, part in sorted(parts, key=lambda each: each[0]):
        rows = part.shape[0] if part.shape else 0
        if begin < end or begin + rows > shape[0] or part.shape[1:] != shape[1:] or part.result != part.shape:
            raise BadFile(
                f"{where}: a change {list(part.result)} from row {begin} on is no band of a weight {list(shape)} "
                f"whose first {end} rows are taken",
                "lora.shape",
            )
        end = begin + rows
    factored = [(begin, part.low_rank()) for begin, part in parts]
    whole = [(begin, low) for begin, low in factored if low is not None]
    if len(whole) < len(factored) or not whole:
        return Bands(tuple(shape), where, {}, tuple(parts))
    rank = sum(len(down) for _, (down, _, _) in whole)
    kind = torch.promote_types(torch.float32, whole[0][1][0].dtype)
    ups = torch.zeros(shape[0], rank, dtype=kind)
    at = 0
    for begin, (down, up, scale) in whole:
        ups[begin : begin + len(up), at : at + len(down)] = up.to(kind) * scale
        at += len(down)
    return lora_of(
        torch.cat([down.to(kind).flatten(1) for _, (down, _, _) in whole]), ups, tuple(shape), where
    )
