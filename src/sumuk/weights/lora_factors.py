"""A LoRA's factors turned to the sides of the native tensor, cut into rows of a stack, and laid together to one.

A product ``up @ down`` has its rows from ``up`` alone, so rows are cut, exchanged or stacked there, exactly::

    (up @ down)[a:b] = up[a:b] @ down          [up_q 0; 0 up_k] @ [down_q; down_k] = [up_q @ down_q; up_k @ down_k]

The same holds for both products of a LoHa. Where a method has no rows of its own (a Kronecker product), it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sumuk.base.errors import BadFile
from sumuk.files.tensors import Shape
from sumuk.weights.changes import Change, stacked
from sumuk.weights.lora_names import MAGNITUDE, Place

Factors = Mapping[str, Tensor]

ROWS = ("lora_up.weight", "hada_w1_a", "hada_w2_a", "diff", "diff_b", "w_norm", "b_norm", "set_weight")
"""Factors whose first side is the tensor's rows; LoHa's only without a core."""
ROWLESS = ("alpha", "lora_down.weight", "lora_mid.weight", "hada_w1_b", "hada_w2_b")
"""Factors that are the same for all rows."""
SWAPPED = dict(
    pair
    for a, b in (
        ("lora_down.weight", "lora_up.weight"),
        ("hada_w1_a", "hada_w1_b"),
        ("hada_w2_a", "hada_w2_b"),
        ("lokr_w1_a", "lokr_w1_b"),
        ("lokr_w2_a", "lokr_w2_b"),
    )
    for pair in ((a, b), (b, a))
) | {name: name for name in ("diff", "set_weight", "dora_scale", "lokr_w1", "lokr_w2")}
"""What each factor is of the transposed tensor, transposed itself."""


def native_sides(factors: Factors, place: Place, where: str) -> dict[str, Tensor]:
    """Factors of a file's tensor as those of the native one, and the other way round: each turn is its own inverse.

    Args:
        factors: by kohya's and LyCORIS's suffixes.
        place: how the native tensor is turned against it.
        where: the layer, for messages.

    Raises:
        BadFile: the method cannot be turned like that.
    """
    made = dict(factors)
    if place.rolled:
        made = _by_rows(made, lambda factor: factor.roll(place.rolled, 0), where)
    return _transposed(made, where) if place.turned else made


def _by_rows(factors: Factors, act: Callable[[Tensor], Tensor], where: str) -> dict[str, Tensor]:
    made = {}
    core = any(name.startswith("hada_t") for name in factors)
    for name, factor in factors.items():
        if (name in ROWS and not core) or (name == "dora_scale" and factor.shape[:1] != (1,)):
            if not factor.ndim:
                raise BadFile(
                    f"{where}: {name} is a single number, not a row for each of the weight's", "lora.shape"
                )
            made[name] = act(factor)
        elif name == "dora_scale" or (name in ROWLESS and not core):
            made[name] = factor
        else:
            raise BadFile(f"{where}: {name} cannot be cut into the rows of a stack", "lora.rows")
    return made


def _transposed(factors: Factors, where: str) -> dict[str, Tensor]:
    made = {}
    for name, factor in factors.items():
        if name == "alpha":
            made[name] = factor
        elif factor.ndim < 2:
            raise BadFile(
                f"{where}: {name} is {list(factor.shape)}, no matrix that could be transposed", "lora.shape"
            )
        elif name in SWAPPED:
            made[SWAPPED[name]] = factor.flatten(1).t().contiguous()
        else:
            raise BadFile(f"{where}: {name} cannot be transposed", "lora.rows")
    return made


def from_peft(factors: Factors, alpha: float | None, axes: int) -> dict[str, Tensor]:
    """PEFT's factors with kohya's meaning: alpha from its configuration, lengths of rows as a column.

    Args:
        factors: by kohya's suffixes, :data:`~sumuk.weights.lora_names.MAGNITUDE` among them.
        alpha: what the configuration says; None: nothing, so it is the rank.
        axes: of the tensor that they change.
    """
    made = dict(factors)
    if (lengths := made.pop(MAGNITUDE, None)) is not None:
        made["dora_scale"] = lengths.reshape(-1, *(1 for _ in range(axes - 1)))
    if alpha is not None and "alpha" not in made:
        made["alpha"] = torch.tensor(alpha)
    return made


def shaped(factors: Factors, shape: Shape) -> dict[str, Tensor]:
    """A product's factors with as many sides as the tensor has, as a linear layer's or a convolution's."""
    made = dict(factors)
    if not {"lora_up.weight", "lora_down.weight"} <= made.keys() or "reshape_weight" in made:
        return made
    up, down = made["lora_up.weight"], made["lora_down.weight"]
    ones = tuple(1 for _ in shape[2:])
    kernel = ones if "lora_mid.weight" in made else shape[2:]
    made["lora_up.weight"] = up.reshape(*up.shape[:2], *ones)
    made["lora_down.weight"] = down.reshape(len(down), shape[1], *kernel)
    return made


def sliced(factors: Factors, begin: int, end: int, where: str) -> dict[str, Tensor]:
    """Factors of some rows. A column of ``up`` that is nothing there goes, as it was another row's of the stack.

    Raises:
        BadFile: the method has no rows of its own.
    """
    if "dora_scale" in factors and len(factors["dora_scale"]) == 1:
        raise BadFile(f"{where}: dora_scale goes over the rows of the whole stack", "lora.rows")
    made = _by_rows(factors, lambda factor: factor[begin:end].contiguous(), where)
    up = made.get("lora_up.weight")
    if up is None or "lora_mid.weight" in made:
        return made
    used = up.flatten(1).any(0)
    rank, kept = len(used), int(used.sum())
    if 0 < kept < rank:
        made["lora_up.weight"], made["lora_down.weight"] = up[:, used], made["lora_down.weight"][used]
        made["alpha"] = made.get("alpha", torch.tensor(float(rank))) * (kept / rank)
    return made


def is_nothing(factors: Factors) -> bool:
    """Whether a product adds nothing at all."""
    up = factors.get("lora_up.weight")
    return up is not None and not bool(up.any()) and "dora_scale" not in factors


def joined(pieces: Sequence[tuple[int, Change]], shape: Shape, where: str) -> dict[str, Tensor]:
    """Several changes of a tensor's rows as the factors of one, in the type of the first.

    Args:
        pieces: first row of each, and the change.
        shape: of the whole tensor.
        where: the layer, for messages.

    Raises:
        BadInput: they cannot be one layer's.
        BadFile: two of them change the same rows.
    """
    # alpha is float32 in many files whose factors are not.
    dtype = next(one.dtype for name, one in pieces[0][1].tensors().items() if name != "alpha")
    names = {name for _, change in pieces for name in change.tensors()}
    if len(names) == 1 and names <= {"diff", "diff_b"}:
        total = torch.zeros(shape, dtype=dtype)
        for first, change in pieces:
            (difference,) = change.tensors().values()
            total[first : first + len(difference)] += difference.reshape(-1, *shape[1:])
        return {names.pop(): total}
    factors = stacked(pieces, shape, where).tensors()
    return {name: factor if name == "alpha" else factor.to(dtype) for name, factor in factors.items()}
