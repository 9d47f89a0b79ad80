"""The average of weights: its half-life is in images, whatever the batch, and swapping is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sumuk.train.ema import Ema

LATE = 1_000_000
"""Images after which the start is long forgotten, so that the full half-life applies."""


def pair() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(3, 2), nn.Linear(2, 2)


@pytest.mark.parametrize("batch", [1, 4, 20, 100])
def test_after_a_half_life_an_old_weight_counts_half(batch: int):
    net, _ = pair()
    start = net.weight.detach().clone()
    ema = Ema({"net": net}, half_life=100)
    with torch.no_grad():
        net.weight.zero_()
    for step in range(100 // batch):
        ema.update(LATE + step * batch, batch)
    assert torch.allclose(ema.weights["net.weight"], start / 2, rtol=1e-5)
    for step in range(100 // batch):
        ema.update(LATE + step * batch, batch)
    assert torch.allclose(ema.weights["net.weight"], start / 4, rtol=1e-5)


def test_early_the_average_is_short():
    """After 50 images the half-life is 5, not 10,000: the random start is gone soon."""
    net, _ = pair()
    ema = Ema({"net": net}, half_life=10_000)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.zero_()
    ema.update(50, 5)
    assert torch.allclose(ema.weights["net.weight"], start / 2, rtol=1e-5)
    ema.update(4, 4)  # never shorter than a batch
    assert torch.allclose(ema.weights["net.weight"], start / 4, rtol=1e-5)


def test_equal_weights_stay_equal():
    net, _ = pair()
    ema = Ema({"net": net}, half_life=7)
    for step in range(1, 50):
        ema.update(step * 3, 3)
    assert torch.equal(ema.weights["net.weight"], net.weight)


def test_swapping_twice_restores_every_bit():
    one, two = pair()
    ema = Ema({"one": one, "two": two}, half_life=100)
    with torch.no_grad():
        for parameter in (*one.parameters(), *two.parameters()):
            parameter.add_(torch.randn_like(parameter))
    ema.update(LATE, 10)
    present = {f"one.{k}": v.clone() for k, v in one.state_dict().items()}
    present |= {f"two.{k}": v.clone() for k, v in two.state_dict().items()}
    averages = {name: value.clone() for name, value in ema.weights.items()}
    assert averages.keys() == present.keys()
    ema.swap()
    assert all(torch.equal(one.state_dict()[k], averages[f"one.{k}"]) for k in one.state_dict())
    assert all(torch.equal(ema.weights[k], present[k]) for k in present)
    assert not torch.equal(one.weight, present["one.weight"])
    ema.swap()
    assert all(torch.equal(two.state_dict()[k], present[f"two.{k}"]) for k in two.state_dict())
    assert all(torch.equal(ema.weights[k], averages[k]) for k in averages)


def test_the_average_is_a_copy():
    net, _ = pair()
    ema = Ema({"net": net}, half_life=10)
    before = ema.weights["net.weight"].clone()
    with torch.no_grad():
        net.weight.add_(1)
    assert torch.equal(ema.weights["net.weight"], before)
    assert not ema.weights["net.weight"].requires_grad
