"""Every merge method against the same formula in numpy's float64, written anew here."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sumuk.base.errors import BadInput
from sumuk.weights.merge_methods import METHODS, Mixed, kept, slerp, spread

SHAPES = [(7,), (6, 5), (8, 4, 3, 3), ()]
NEAR = 1e-6
"""Of numbers about 1 in float32; measured 3e-7."""


def models(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Numbers about 1, the later ones near the first as fine-tuned models are."""
    dice = torch.Generator().manual_seed(len(shape))
    first = torch.randn(shape, generator=dice, dtype=torch.float64)
    others = [first + 0.3 * torch.randn(shape, generator=dice, dtype=torch.float64) for _ in range(count - 1)]
    return [each.to(dtype) for each in (first, *others)]


def mix(name: str, given: list[torch.Tensor], alpha: float, **settings: object) -> Mixed:
    method = METHODS[name]
    seed = {"seed": settings.pop("seed")} if "seed" in settings else {}
    values = method.check({k: v for k, v in settings.items() if k not in ("low", "high")}, len(given)) | seed
    values |= {k: v for k, v in settings.items() if k in ("low", "high")}
    return method.mix(given, alpha, values, "denoiser.x")


def smoothstep(a: float) -> float:
    return 3 * a**2 - 2 * a**3


def inverse(a: float) -> float:
    """The root of 3t^2 - 2t^3 = a between 0 and 1."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if smoothstep(middle) < a else (low, middle)
    return low


def slerped(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = math.acos(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def trained(a: np.ndarray, b: np.ndarray, c: np.ndarray, alpha: float) -> np.ndarray:
    share = np.abs(b - a) / (np.abs(b - a) + np.abs(b - c))
    return a + 1.8 * alpha * share * (b - c)


def tied(base: np.ndarray, others: list[np.ndarray], alpha: float, density: float) -> np.ndarray:
    changes = []
    for other in others:
        change = (other - base).ravel()
        drop = np.argsort(-np.abs(change), kind="stable")[max(1, round(density * change.size)) :]
        change[drop] = 0
        changes.append(change)
    result = base.copy().ravel()
    for i in range(result.size):
        column = [change[i] for change in changes]
        side = np.sign(sum(column))
        agreeing = [value for value in column if value != 0 and np.sign(value) == side]
        result[i] += alpha * (sum(agreeing) / len(agreeing) if agreeing else 0)
    return result.reshape(base.shape)


TWO: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "weighted-sum": lambda a, b, t: (1 - t) * a + t * b,
    "sigmoid": lambda a, b, t: (1 - smoothstep(t)) * a + smoothstep(t) * b,
    "inverse-sigmoid": lambda a, b, t: (1 - inverse(t)) * a + inverse(t) * b,
}


def wide(given: list[torch.Tensor]) -> list[np.ndarray]:
    return [each.double().numpy() for each in given]


def near(found: Mixed, wanted: np.ndarray) -> None:
    assert found.tensor.shape == wanted.shape
    assert np.abs(found.tensor.double().numpy() - wanted).max(initial=0) < NEAR


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("name", TWO)
def test_between_two(name: str, shape: tuple[int, ...], alpha: float) -> None:
    given = models(shape, 2)
    near(mix(name, given, alpha), TWO[name](*wide(given), alpha))


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_slerp_and_where_it_is_linear(shape: tuple[int, ...], alpha: float) -> None:
    a, b = models(shape, 2)
    found = mix("slerp", [a, b], alpha)
    near(found, slerped(*wide([a, b]), alpha))
    assert found.remark == ""
    for parallel in (a * 1.5, -a, torch.zeros_like(a), a + 1e-4):
        straight = slerp(a, parallel, alpha)
        assert straight.remark == "linear"
        near(straight, (1 - alpha) * a.double().numpy() + alpha * parallel.double().numpy())


def test_slerp_keeps_the_length_of_a_circle() -> None:
    a, b = (each / each.norm() for each in models((40, 40), 2))
    assert abs(float(mix("slerp", [a, b], 0.4).tensor.double().norm()) - 1) < NEAR


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("alpha", [-0.5, 0.3, 1.0, 2.0])
def test_differences(shape: tuple[int, ...], alpha: float) -> None:
    given = models(shape, 3)
    a, b, c = wide(given)
    near(mix("add-difference", given, alpha), a + alpha * (b - c))
    near(mix("train-difference", given, alpha), trained(a, b, c, alpha))


def test_train_difference_where_nothing_was_trained() -> None:
    a, b, _ = models((5, 5), 3)
    assert torch.equal(mix("train-difference", [a, b, b], 1.0).tensor, a)
    assert torch.equal(mix("train-difference", [b, b, b], 1.0).tensor, b)  # 0 / 0


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_average(shape: tuple[int, ...]) -> None:
    given = models(shape, 4)
    each, weights = wide(given), [0.1, 0.5, 0.7, 1.2]
    mean = sum(w * m for w, m in zip(weights, each, strict=True))
    near(mix("weighted-average", given, 1.0, weights=weights), mean / sum(weights))
    near(mix("weighted-average", given, 1.0, weights=weights, normalise=False), mean)
    near(mix("average", given, 0.25), 0.75 * each[0] + 0.25 * np.mean(each, 0))


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(shape: tuple[int, ...], density: float) -> None:
    given = models(shape, 4)
    base, *others = wide(given)
    near(mix("ties", given, 0.7, density=density), tied(base, others, 0.7, density))


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_dare(shape: tuple[int, ...]) -> None:
    given = models(shape, 3)
    base, *others = wide(given)
    masks = [kept(5, "denoiser.x", i, shape, 0.6).numpy() for i in range(2)]
    change = sum(mask * (other - base) / 0.4 for mask, other in zip(masks, others, strict=True))
    near(mix("dare", given, 0.5, drop=0.6, seed=5), base + 0.5 * change)


def test_dare_drops_as_often_as_it_is_told_and_keeps_the_mean() -> None:
    many = (400, 500)
    mask = kept(1, "a", 0, many, 0.9)
    assert abs(float(mask.double().mean()) - 0.1) < 0.003  # four times its spread
    for other in (kept(2, "a", 0, many, 0.9), kept(1, "b", 0, many, 0.9), kept(1, "a", 1, many, 0.9)):
        assert abs(float((mask & other).double().mean()) - 0.01) < 0.001
    base, change = torch.zeros(many), torch.ones(many)
    assert abs(float(mix("dare", [base, change], 1.0, drop=0.9, seed=3).tensor.mean()) - 1) < 0.03


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_cosines_are_those_of_supermerger(shape: tuple[int, ...], alpha: float) -> None:
    """Its steps with the functions that it calls, in float64."""
    given = models(shape, 2)
    a, b = (each.double() for each in given)
    for name, unit in (("cosine-a", True), ("cosine-b", False)):
        x, y = (F.normalize(each, p=2, dim=0) if unit else each for each in (a, b))
        columns = F.cosine_similarity(x, y, dim=0)
        whole = torch.dot(x.reshape(-1), y.reshape(-1)) / (x.norm() * y.norm())
        k = (((columns + whole) / 2 - 0.8) / (0.99 - 0.8) - alpha).clip(0, 1)
        near(mix(name, given, alpha, low=0.8, high=0.99), (b * (1 - k) + a * k).numpy())
        survey = METHODS[name].survey
        assert survey is not None
        wanted = columns if unit else (columns + whole) / 2
        assert torch.allclose(survey(given).reshape(-1), wanted.reshape(-1), atol=NEAR)


def test_the_range_of_likenesses() -> None:
    every = torch.linspace(0, 1, 1001, dtype=torch.float64)
    found = spread([every[:300], every[300:].reshape(1, -1)])
    assert (round(found["low"], 3), round(found["high"], 3)) == (0.01, 0.99)
    a = torch.randn(4, 4)
    near(mix("cosine-a", [a, a + 0], 0.4, low=1.0, high=1.0), a.double().numpy())


@pytest.mark.parametrize("name", METHODS)
def test_float64_is_computed_in_float64(name: str) -> None:
    method = METHODS[name]
    given = models((6, 6), len(method.roles), torch.float64)
    more = {"low": 0.5, "high": 1.0} if method.survey else {"seed": 1} if method.seeded else {}
    found = mix(name, given, 0.3, **more).tensor
    assert found.dtype == torch.float64
    single = mix(name, [each.float() for each in given], 0.3, **more).tensor
    assert 0 < (single.double() - found).abs().max() < NEAR or name in ("ties", "dare")


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].elementwise])
def test_pieces_are_as_good_as_the_whole(name: str) -> None:
    given = models((33, 7), len(METHODS[name].roles))
    pieces = zip(*(each.reshape(-1).split(10) for each in given), strict=True)
    parts = torch.cat([mix(name, list(each), 0.3).tensor for each in pieces])
    assert torch.equal(parts.reshape(33, 7), mix(name, given, 0.3).tensor)


@pytest.mark.parametrize(
    ("name", "count", "settings", "message"),
    [
        ("weighted-sum", 3, {}, "weighted-sum takes 2 models (A, B), not 3"),
        ("add-difference", 2, {}, "add-difference takes 3 models (A, B, C), not 2"),
        ("ties", 2, {}, "ties takes 3 to 10 models"),
        ("ties", 3, {"densty": 0.2}, "ties has no setting 'densty'; did you mean 'density'?"),
        ("slerp", 2, {"t": 0.2}, "slerp has no setting 't'; it has none but alpha"),
        ("ties", 3, {"density": 0}, "density 0 is not a number from 0.001 to 1"),
        ("ties", 3, {"density": "much"}, "density 'much' is not a number"),
        ("dare", 2, {"drop": 1.0}, "drop 1.0 is not a number between 0 and 1"),
        ("dare", 2, {"drop": math.nan}, "drop nan is not a number between 0 and 1"),
        ("average", 2, {"weights": [1]}, "weights [1] are not a list of 2 numbers"),
        ("average", 2, {"weights": [1, -1]}, "cannot be scaled to a sum of 1"),
        ("average", 2, {"weights": [1, 0]}, "weights[1] is 0, so that the model would do nothing"),
        ("average", 2, {"normalise": 1}, "normalise 1 is not true or false"),
    ],
)
def test_what_a_method_does_not_take(name: str, count: int, settings: dict, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        METHODS[name].check(settings, count)
    assert message in str(caught.value)


def test_a_misspelt_method_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean 'weighted-sum'"):
        METHODS["weightedsum"]
