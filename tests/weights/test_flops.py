"""Counted operations against figures that were counted by others, from other implementations of the networks."""

from __future__ import annotations

import pytest
import torch
from benchmarks.flops import TERA, forwards
from torch import nn

from sumuk.families import published
from sumuk.families.published import RELEASES
from sumuk.weights.flops import flops

FORWARDS = forwards()
KNOWN = {
    "sd1-512": 0.803,
    "sd2-512": 0.804,
    "sd2-768": 2.149,
    "sdxl-1024": 6.761,
    "sdxl-512": 1.589,
    "sd3-medium": 8.90,
    "sd3.5-medium": 11.25,
    "sd3.5-large": 31.12,
    "flux-dev": 74.39,
    "flux-schnell": 69.47,
    "cascade-c": 4.08,
    "cascade-b": 6.17,
    "stage-a-1024": 2.17,
    "dit-xl-256": 0.237,
    "dit-xl-512": 1.049,
    "vae-512": 2.51,
    "vae-1024": 10.47,
    "vae16-1024": 10.47,
    "taesd-512": 0.14,
    "taesd-1024": 0.57,
    "t5-512": 4.85,
    "dit-l-256": 2 * 0.0807,  # these three were counted in multiply-adds
    "dit-b-256": 2 * 0.0230,
    "dit-s-256": 2 * 0.0061,
}
"""TFLOP of one forward."""


@pytest.mark.parametrize("name", KNOWN)
def test_known_figures(name: str) -> None:
    assert FORWARDS[name].count() / TERA == pytest.approx(KNOWN[name], rel=0.015)


def test_the_small_stage_b_with_the_large_ones_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known 2.82 is of blocks that are run 3, 3, 2, 2 times, as the large stage B's. The small one's run twice."""
    repeats = {
        2.82: published._cascade_b(
            lambda: published._stage_b((320, 576, 1152, 1152), (2, 4, 14, 4), (2, 2, 3, 3))
        ),
        2.22: RELEASES["cascade-b-lite"],
    }
    for known, release in repeats.items():
        monkeypatch.setitem(RELEASES, "cascade-b-lite", release)
        assert FORWARDS["cascade-b-lite"].count() / TERA == pytest.approx(known, rel=0.015)


def test_a_multiply_add_is_two() -> None:
    assert flops(nn.Linear(3, 5), input=torch.ones(7, 3)) == 2 * 7 * 3 * 5
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    assert flops(conv, input=torch.ones(1, 2, 8, 8)) == 2 * 2 * 4 * 9 * 64


class Attends(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_attention_is_counted() -> None:
    assert flops(Attends(), q=torch.ones(1, 2, 16, 8)) == 2 * (2 * 2 * 16 * 16 * 8)


def test_the_network_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert flops(network, input=torch.ones(4, 3)) == 2 * 4 * 9
    assert all(value.device.type == "cpu" for value in network.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
