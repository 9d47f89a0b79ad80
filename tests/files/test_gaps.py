"""Names that a file's own pattern calls for: found where blocks repeat, and never where nothing is missing."""

from __future__ import annotations

import random

import pytest
from tests.nets.inventories import KEYS, inventory

from sumuk.files.gaps import gaps

PUBLISHED = sorted(path.name.removesuffix(".json") for path in KEYS.glob("*.json"))
BLOCKS = [
    f"net.blocks.{i}.{layer}.{leaf}"
    for i in range(4)
    for layer in ("a.0", "b")
    for leaf in ("weight", "bias")
]


def test_a_missing_name_is_named() -> None:
    assert gaps(BLOCKS) == ([], [])
    for lost in BLOCKS:
        assert gaps([name for name in BLOCKS if name != lost])[0] == [lost]


def test_a_renamed_one_too() -> None:
    for old in BLOCKS:
        new = f"{old}s"
        missing, instead = gaps([new if name == old else name for name in BLOCKS])
        assert missing == [old] and instead == [new]


def test_blocks_that_differ_by_more_are_another_kind() -> None:
    without = [name for name in BLOCKS if not name.startswith("net.blocks.3.b")]
    assert gaps(without) == ([], [])
    first = [*BLOCKS, "net.blocks.0.only_here.weight"]  # T5's table of positions, a ResNet's shortcut
    assert gaps(first) == ([], [])


def test_two_blocks_are_no_pattern() -> None:
    assert gaps(["blocks.0.a", "blocks.0.b", "blocks.1.a"]) == ([], [])


def test_a_bias_without_its_weight() -> None:
    assert gaps(["norm.bias", "out.weight", "out.bias"]) == (["norm.weight"], [])
    assert gaps(["layer.up", "layer.down", "layer.bias"]) == ([], []), "a Control-LoRA's"
    assert gaps([]) == ([], [])


def test_numbers_within_words_are_none() -> None:
    assert gaps([f"lora_unet_down_blocks_{i}_to_q.alpha" for i in range(5)]) == ([], [])


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_missing_in_what_was_published(name: str) -> None:
    assert gaps(inventory(name)) == ([], [])


def test_how_much_is_seen() -> None:
    """Nine names of ten, over all networks; the rest stand where no block is like another."""
    if not PUBLISHED:
        pytest.skip("the inventories of published files are not here")
    pick = random.Random(0)
    seen = count = 0
    for name in PUBLISHED:
        names = list(inventory(name))
        if len(names) < 60 or name == "sd15_model_ema":
            continue
        for lost in pick.sample(names, 4):
            missing, _ = gaps([each for each in names if each != lost])
            assert set(missing) <= {lost}, "nothing else is called missing"
            seen += missing == [lost]
            count += 1
    assert seen / count > 0.9
