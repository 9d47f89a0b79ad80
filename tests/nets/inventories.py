"""Key inventories of the published files, where they lie beside the checkout; without them the test is skipped."""

import json
from pathlib import Path

import pytest
import torch

KEYS = Path(__file__).parents[2].parent / "shared" / "facts" / "keys"


def inventory(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one published file."""
    path = KEYS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name} inventory absent")
    return {key: tuple(size) for key, size in json.loads(path.read_text())["tensors"].items()}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}
