"""The rate's curve over images seen, and which parameters decay."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from sumuk.train.config import OptimConfig
from sumuk.train.optim import make_optimizer, rate_at


def config(**rest: object) -> OptimConfig:
    return OptimConfig.model_validate({"rate": 0.5, "warmup": 9} | rest)


@pytest.mark.parametrize("fall", ["constant", "linear", "cosine"])
def test_warm_up_is_linear(fall: str):
    rates = [rate_at(config(fall=fall), images, 109) for images in range(10)]
    assert rates == pytest.approx([0.05 * (images + 1) for images in range(10)])


@pytest.mark.parametrize(
    ("fall", "quarter", "half", "end"),
    [
        ("constant", 0.5, 0.5, 0.5),
        ("linear", 0.375, 0.25, 0.0),
        ("cosine", 0.5 * 0.8535533905932737, 0.25, 0.0),  # (1 + cos(pi / 4)) / 2
    ],
)
def test_after_the_warm_up(fall: str, quarter: float, half: float, end: float):
    rates = [rate_at(config(fall=fall), images, 109) for images in (9, 34, 59, 109, 500)]
    assert rates == pytest.approx([0.5, quarter, half, end, end], abs=1e-12)


def test_the_cosine_only_falls():
    rates = [rate_at(config(fall="cosine"), images, 109) for images in range(9, 110)]
    assert all(a > b for a, b in pairwise(rates))


def test_no_warm_up_and_warm_up_beyond_the_end():
    assert rate_at(config(warmup=0), 0, 100) == 0.5
    assert rate_at(config(warmup=200), 99, 100) == pytest.approx(0.5 * 100 / 201)


def test_only_matrices_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = make_optimizer([*net.parameters(), *frozen.parameters()], config(weight_decay=0.1))
    decays = [(p.ndim, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(decays) == [(1, 0.0)] * 4 + [(2, 0.1), (4, 0.1)]


def test_it_is_adamw():
    """Against Loshchilov & Hutter 2019, algorithm 2, written out in float64."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 2))
    optimizer = make_optimizer([weight], config(betas=(0.9, 0.99), weight_decay=0.1, rate=0.01))
    expected, first, second = weight.detach().double(), torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    for step in range(1, 6):
        slope = torch.randn(3, 2)
        weight.grad = slope.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * slope.double()
        second = 0.99 * second + 0.01 * slope.double() ** 2
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        expected = expected - 0.01 * 0.1 * expected - 0.01 * move
    assert torch.allclose(weight.double(), expected, atol=1e-6)
