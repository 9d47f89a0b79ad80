"""Ways to merge models: each a pure function of the tensors of one name, computed in float32 or float64.

    weighted-sum      (1-t) A + t B
    sigmoid           the same with t = 3a^2 - 2a^3; inverse-sigmoid with t = 1/2 - sin(asin(1-2a)/3)
    weighted-average  sum of w_i M_i, with the w_i scaled to a sum of 1 or not
    add-difference    A + a (B - C)
    train-difference  A + 1.8 a (B - C) |B-A| / (|B-A| + |B-C|)
    slerp             along the great circle between A and B (Shoemake 1985); nearly parallel ones linearly
    cosine-a, -b      A k + B (1-k), k from the likeness of columns, scaled over the whole model, less a
    ties              base + a (mean of what remains of the M_i - base) (Yadav et al. 2023, arXiv 2306.01708)
    dare              base + a sum of (M_i - base) dropped out and rescaled (Yu et al. 2023, arXiv 2311.03099)

The sigmoids are those of the first A1111 checkpoint mergers. train-difference and the cosines are those of supermerger
(https://github.com/hako-mikan/sd-webui-supermerger); what they do is written at each.

The rate ``a`` (alpha) of every method but the cosines leaves the first model as it is where it is 0; it may differ by
block. Equal models give the same model, bit for bit: each formula is written as the first model less a difference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sumuk.base.errors import BadInput, nearest
from sumuk.base.registry import Registry

Values = Mapping[str, float | bool | tuple[float, ...]]
"""Settings of a method by name."""

PARALLEL = 0.9995
"""Cosine from which on two tensors are taken for parallel by :func:`slerp`, as other mergers do."""
TRAIN = 1.8
"""supermerger's factor of trainDifference."""
_PIECE = 1 << 20


class Mixed(NamedTuple):
    """A merged tensor, and what is worth counting of how it came about."""

    tensor: Tensor
    remark: str = ""


@dataclass(frozen=True)
class Setting:
    """A number of a method.

    Attributes:
        default: taken if none is given; None: it must be given.
        least: smallest value.
        most: largest value.
        open: whether the ends themselves are outside.
    """

    default: float | None
    least: float
    most: float
    open: bool = False

    def check(self, name: str, value: object) -> float:
        """The value as a number.

        Raises:
            BadInput: it is none, or outside.
        """
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        inside = self.least < number < self.most if self.open else self.least <= number <= self.most
        if not inside:
            ends = "between" if self.open else "from"
            to = "and" if self.open else "to"
            raise BadInput(f"{name} {value!r} is not a number {ends} {self.least:g} {to} {self.most:g}")
        return number


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to merge.

    Attributes:
        name: under which it is found.
        formula: what it computes.
        roles: what the inputs are, in order; the last may come several times if ``most`` allows.
        most: most inputs.
        mix: tensors of one shape in float32 or float64, alpha, settings, the tensor's name -> the merged one.
        alpha: the rate.
        settings: further numbers.
        weighted: whether it takes ``weights``, one for each model, and ``normalise``.
        elementwise: whether each number comes from those at its own place, so that tensors can be merged in pieces.
        neutral: whether alpha 0 leaves the first model as it is.
        seeded: whether it draws random numbers.
        skips: parts that it leaves as the first model has them.
        survey: tensors -> likenesses that :func:`spread` turns into settings, over the whole model; None: no need.
    """

    name: str
    formula: str
    roles: tuple[str, ...]
    mix: Callable[[Sequence[Tensor], float, Values, str], Mixed]
    alpha: Setting
    most: int = 2
    settings: Mapping[str, Setting] = field(default_factory=dict)
    weighted: bool = False
    elementwise: bool = False
    neutral: bool = True
    seeded: bool = False
    skips: tuple[str, ...] = ()
    survey: Callable[[Sequence[Tensor]], Tensor] | None = None

    def check(self, given: Mapping[str, object], models: int) -> dict[str, float | bool | tuple[float, ...]]:
        """All settings, those given and the defaults of the others.

        Raises:
            BadInput: a number of models that it does not take, an unknown setting, one out of bounds, one missing.
        """
        if not len(self.roles) <= models <= self.most:
            wants = f"{len(self.roles)}" + (f" to {self.most}" if self.most > len(self.roles) else "")
            raise BadInput(f"{self.name} takes {wants} models ({', '.join(self.roles)}), not {models}")
        known = {*self.settings, *(("weights", "normalise") if self.weighted else ())}
        for name in given:
            if name not in known:
                hint = nearest(name, known) if known else "; it has none but alpha"
                raise BadInput(f"{self.name} has no setting {name!r}{hint}")
        made: dict[str, float | bool | tuple[float, ...]] = {}
        for name, setting in self.settings.items():
            value = given.get(name, setting.default)
            if value is None:
                raise BadInput(f"{self.name} needs {name}, from {setting.least:g} to {setting.most:g}")
            made[name] = setting.check(name, value)
        return made | (_weights(given, models) if self.weighted else {})


def _weights(given: Mapping[str, object], models: int) -> dict[str, float | bool | tuple[float, ...]]:
    weights, normalise = given.get("weights", [1.0] * models), given.get("normalise", True)
    if not isinstance(normalise, bool):
        raise BadInput(f"normalise {normalise!r} is not true or false")
    if not isinstance(weights, list | tuple) or len(weights) != models:
        raise BadInput(f"weights {weights!r} are not a list of {models} numbers, one for each model")
    numbers = tuple(Setting(None, -4, 4).check(f"weights[{i}]", each) for i, each in enumerate(weights))
    if normalise and sum(numbers) <= 0:
        raise BadInput(
            f"weights {list(numbers)} cannot be scaled to a sum of 1; normalise=False adds them as they are"
        )
    for i, weight in enumerate(numbers):
        if weight == 0:
            raise BadInput(f"weights[{i}] is 0, so that the model would do nothing; leave it out")
    return {"weights": numbers, "normalise": normalise}


METHODS: Registry[Method] = Registry("merge method")


# -- between two models ----------------------------------------------------------------------------------------------


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``(1-t) a + t b``: ``a`` for 0, ``b`` for 1, and the same bits for ``(b, a, 1-t)``."""
    if t in (0.0, 1.0):
        return b if t else a
    if t == 0.5:
        return (a + b).mul_(0.5)
    return _away(a, a - b, t) if t < 0.5 else _away(b, b - a, 1 - t)


def _away(first: Tensor, difference: Tensor, rate: float) -> Tensor:
    """``first - difference * rate`` in the difference's memory, as new memory costs more than the sum."""
    return torch.sub(first, difference.mul_(rate), out=difference)


def _weighted_sum(models: Sequence[Tensor], alpha: float, _: Values, __: str) -> Mixed:
    return Mixed(lerp(models[0], models[1], alpha))


def _sigmoid(models: Sequence[Tensor], alpha: float, _: Values, __: str) -> Mixed:
    return Mixed(lerp(models[0], models[1], alpha * alpha * (3 - 2 * alpha)))


def _inverse_sigmoid(models: Sequence[Tensor], alpha: float, _: Values, __: str) -> Mixed:
    t = 0.5 - math.sin(math.asin(1 - 2 * alpha) / 3)
    return Mixed(lerp(models[0], models[1], alpha if alpha in (0.0, 1.0) else t))


def slerp(a: Tensor, b: Tensor, t: float) -> Mixed:
    """Along the great circle between the directions of two tensors, each as one long vector.

    ``(sin((1-t) w) a + sin(t w) b) / sin(w)``, ``w`` their angle. Nearly parallel or opposite ones, and zeros, have no
    such circle that numbers of this precision could tell: they are merged linearly, with the remark ``linear``.
    """
    if t in (0.0, 1.0):
        return Mixed(lerp(a, b, t))
    lengths = math.sqrt(_dot(a, a)) * math.sqrt(_dot(b, b))
    cosine = _dot(a, b) / lengths if lengths else 1.0
    if not abs(cosine) <= PARALLEL:  # also where it is no number
        return Mixed(lerp(a, b, t), "linear")
    angle = math.acos(cosine)
    scale = math.sin(angle)
    return Mixed(a * (math.sin((1 - t) * angle) / scale) + b * (math.sin(t * angle) / scale))


def _slerp(models: Sequence[Tensor], alpha: float, _: Values, __: str) -> Mixed:
    return slerp(models[0], models[1], alpha)


def _dot(a: Tensor, b: Tensor) -> float:
    """In float64, piece by piece: the same with any number of threads, to the last bit that counts in float32."""
    return sum(float(torch.dot(x.double(), y.double())) for x, y in _pieces(a.reshape(-1), b.reshape(-1)))


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both, about a million numbers at a time."""
    rows = max(1, _PIECE * len(a) // max(1, a.numel()))
    return zip(a.split(rows), b.split(rows), strict=True)


# -- differences -----------------------------------------------------------------------------------------------------


def _add_difference(models: Sequence[Tensor], alpha: float, _: Values, __: str) -> Mixed:
    a, b, c = models
    return Mixed(_away(a, c - b, alpha))


def _train_difference(models: Sequence[Tensor], alpha: float, _: Values, __: str) -> Mixed:
    """The difference counts for more where B is farther from A than from C, as if A were trained on what B was."""
    a, b, c = models
    far, near = (b - a).abs(), (b - c).abs()
    both = far + near
    scale = torch.where(both > 0, far / both, 0.0)
    return Mixed(a - (c - b) * scale * (TRAIN * alpha))


def _average(models: Sequence[Tensor], alpha: float, values: Values, _: str) -> Mixed:
    weights = values["weights"]
    assert isinstance(weights, tuple)
    first, *others = models
    if not values["normalise"]:
        whole = first * weights[0]
        for model, weight in zip(others, weights[1:], strict=True):
            whole = whole + model * weight
        return Mixed(lerp(first, whole, alpha))
    total = math.fsum(weights)
    away = sum((first - model) * (weight / total) for model, weight in zip(others, weights[1:], strict=True))
    return Mixed(first - away * alpha)


# -- several models trained from one ---------------------------------------------------------------------------------


def _ties(models: Sequence[Tensor], alpha: float, values: Values, _: str) -> Mixed:
    """Of each difference the ``density`` largest numbers remain; where they disagree in sign, the heavier side wins."""
    base, *others = models
    density = values["density"]
    assert isinstance(density, float)
    kept = [_trimmed(other - base, density) for other in others]
    side = torch.sign(sum(kept, torch.zeros_like(base)))
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for each in kept:
        agrees = (torch.sign(each) == side) & (each != 0)
        total += torch.where(agrees, each, 0.0)
        count += agrees
    mean = total / count.clamp(min=1)
    return Mixed(torch.where(mean == 0, base, base + mean * alpha))


def _trimmed(difference: Tensor, density: float) -> Tensor:
    """A difference with its smallest numbers set to zero; of equal ones at the border all remain."""
    sizes = difference.abs()
    kept = max(1, round(density * sizes.numel()))
    if kept >= sizes.numel():
        return difference
    border = sizes.reshape(-1).kthvalue(sizes.numel() - kept + 1).values
    return torch.where(sizes >= border, difference, 0.0)


def _dare(models: Sequence[Tensor], alpha: float, values: Values, name: str) -> Mixed:
    base, *others = models
    drop, seed = values["drop"], values["seed"]
    assert isinstance(drop, float)
    change = torch.zeros_like(base)
    for i, other in enumerate(others):
        keep = kept(int(seed), name, i, base.shape, drop)  # type: ignore[arg-type]  # it was checked to be a number
        change += torch.where(keep, (other - base) / (1 - drop), 0.0)
    return Mixed(torch.where(change == 0, base, base + change * alpha))


def kept(seed: int, name: str, model: int, shape: Sequence[int], drop: float) -> Tensor:
    """What DARE does not drop of a model's difference: true with probability ``1 - drop``.

    The numbers depend on the tensor's native name, so on neither the file's order nor on other tensors.
    """
    digest = hashlib.sha256(f"{seed}:{model}:{name}".encode()).digest()
    dice = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(tuple(shape), generator=dice) >= drop


# -- by likeness -----------------------------------------------------------------------------------------------------


def _likeness(a: Tensor, b: Tensor, unit: bool) -> tuple[Tensor, float]:
    """Cosine of each column (along the first dimension), and of the whole; ``unit``: of columns scaled to length 1."""
    x, y = (each.reshape(len(each), -1) if each.ndim else each.reshape(1, 1) for each in (a, b))
    dots, xx, yy = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(3))
    for p, q in _pieces(x, y):
        p, q = p.double(), q.double()
        dots += (p * q).sum(0)
        xx += (p * p).sum(0)
        yy += (q * q).sum(0)
    lengths = (xx * yy).sqrt()
    columns = torch.where(lengths > 0, dots / lengths, 0.0)
    if unit:
        whole, scale = columns.sum(), ((xx > 0).sum() * (yy > 0).sum()).double().sqrt()
    else:
        whole, scale = dots.sum(), (xx.sum() * yy.sum()).sqrt()
    return columns, float(whole / scale) if scale > 0 else 0.0


def _survey_a(models: Sequence[Tensor]) -> Tensor:
    return _likeness(models[0], models[1], unit=True)[0]


def _survey_b(models: Sequence[Tensor]) -> Tensor:
    columns, whole = _likeness(models[0], models[1], unit=False)
    return (columns + whole) / 2


def spread(likenesses: Sequence[Tensor]) -> dict[str, float]:
    """The range of a model's likenesses without the hundredth at either end: the settings ``low`` and ``high``."""
    every = np.concatenate([each.reshape(-1).numpy() for each in likenesses])
    every = every[every >= np.percentile(every, 1, method="midpoint")]
    every = every[every <= np.percentile(every, 99, method="midpoint")]
    return {"low": float(every.min()), "high": float(every.max())}


def _cosine(models: Sequence[Tensor], alpha: float, values: Values, unit: bool) -> Mixed:
    """``k = (likeness - low) / (high - low) - alpha`` in 0..1, likeness the mean of a column's and the whole's.

    The more alike, the more of A. Models that are alike everywhere have no range; there ``k = 1 - alpha``.
    """
    a, b = models
    columns, whole = _likeness(a, b, unit)
    low, high = values["low"], values["high"]
    assert isinstance(low, float) and isinstance(high, float)
    scaled = ((columns + whole) / 2 - low) / (high - low) if high > low else torch.ones_like(columns)
    t = 1 - (scaled - alpha).clamp(0, 1).to(a.dtype).reshape(a.shape[1:])
    return Mixed(torch.where(t < 0.5, a - (a - b) * t, b - (b - a) * (1 - t)))


def _cosine_a(models: Sequence[Tensor], alpha: float, values: Values, _: str) -> Mixed:
    return _cosine(models, alpha, values, unit=True)


def _cosine_b(models: Sequence[Tensor], alpha: float, values: Values, _: str) -> Mixed:
    return _cosine(models, alpha, values, unit=False)


# -- the table -------------------------------------------------------------------------------------------------------

MOST = 10
"""Most models of one merge."""
_BETWEEN = Setting(0.5, 0, 1)
_CHANGE = Setting(1.0, -2, 2)
_TWO, _THREE, _MANY = ("A", "B"), ("A", "B", "C"), ("base", "model", "model")


def _add(name: str, *aliases: str, **more: object) -> None:
    METHODS.add(name, Method(name=name, **more), *aliases)  # type: ignore[arg-type]


_add(
    "weighted-sum", "sum", "weight-sum", "linear",
    formula="(1-alpha) A + alpha B", roles=_TWO, mix=_weighted_sum, alpha=_BETWEEN, elementwise=True,
)  # fmt: skip
_add(
    "sigmoid", "smooth", "smoothstep",
    formula="(1-t) A + t B, t = 3 alpha^2 - 2 alpha^3", roles=_TWO, mix=_sigmoid, alpha=_BETWEEN, elementwise=True,
)  # fmt: skip
_add(
    "inverse-sigmoid", "inverse smoothstep",
    formula="(1-t) A + t B, t = 1/2 - sin(asin(1 - 2 alpha) / 3)", roles=_TWO, mix=_inverse_sigmoid, alpha=_BETWEEN,
    elementwise=True,
)  # fmt: skip
_add(
    "weighted-average", "average",
    formula="A + alpha (sum of w_i M_i - A)", roles=_TWO, most=MOST, mix=_average, alpha=Setting(1.0, 0, 1),
    weighted=True, elementwise=True,
)  # fmt: skip
_add(
    "add-difference",
    formula="A + alpha (B - C)", roles=_THREE, most=3, mix=_add_difference, alpha=_CHANGE, elementwise=True,
)  # fmt: skip
_add(
    "train-difference", "trainDifference",
    formula="A + 1.8 alpha (B - C) |B-A| / (|B-A| + |B-C|)", roles=_THREE, most=3, mix=_train_difference,
    alpha=_CHANGE, elementwise=True,
)  # fmt: skip
_add("slerp", formula="along the great circle from A to B", roles=_TWO, mix=_slerp, alpha=_BETWEEN)
for _name, _mix, _survey in (("cosine-a", _cosine_a, _survey_a), ("cosine-b", _cosine_b, _survey_b)):
    _add(
        _name, _name.replace("-", ""),
        formula="A k + B (1-k), k = likeness scaled to 0..1, less alpha", roles=_TWO, mix=_mix, alpha=_BETWEEN,
        neutral=False, skips=("vae",), survey=_survey,
    )  # fmt: skip
_add(
    "ties",
    formula="base + alpha (mean of the trimmed differences that agree in sign)", roles=_MANY, most=MOST, mix=_ties,
    alpha=_CHANGE, settings={"density": Setting(0.2, 0.001, 1)},
)  # fmt: skip
_add(
    "dare",
    formula="base + alpha (sum of the differences with a share dropped, the rest scaled up)", roles=_MANY[:2],
    most=MOST, mix=_dare, alpha=_CHANGE, settings={"drop": Setting(0.9, 0, 1, open=True)}, seeded=True,
)  # fmt: skip
