"""A network that waits for its numbers costs nothing, least of all torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from sumuk.nets.unfilled import unfilled

SCRIPT = """
import sys
from torch import nn
from sumuk.nets.unfilled import unfilled
with unfilled():
    made = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64), nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    nn.init.normal_(made[1].weight, std=0.02)
print([name for name in sys.modules if name.startswith("torch._dynamo.")])
"""


def test_names_and_shapes_without_numbers() -> None:
    with unfilled():
        made = nn.Linear(3, 2)
    assert {name: tuple(each.shape) for name, each in made.state_dict().items()} == {
        "weight": (2, 3),
        "bias": (2,),
    }
    assert all(each.is_meta for each in made.parameters())
    there = nn.Linear(3, 2)
    before = there.weight.clone()
    with unfilled():
        nn.init.normal_(there.weight)
    assert not torch.equal(there.weight, before), "what has numbers draws them"


def test_the_compiler_is_left_alone() -> None:
    said = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "[]"
