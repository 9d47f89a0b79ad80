"""Tensors that a file's own pattern calls for: names that its blocks have, all but one.

Networks repeat blocks, so most names stand in several of them. Where one block lacks a single name that others of the
same kind have, that name is missing, and a single name that only it has stands in its place. This is read off names
alone. What no other block has (a first or last layer) cannot be missed this way; building the network tells that.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import islice

_NUMBER = re.compile(r"[0-9]+")
MOST_NAMES, MOST_NUMBERS = 20_000, 8
"""No published file has as many, nor a name that is nested as deep; a hostile one might."""


def gaps(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Names that are missing, and names that stand in their place, both sorted.

    Args:
        names: of all tensors.
    """
    if len(names) > MOST_NAMES:
        return [], []
    # A block is a name up to one of its numbers; blocks are of one kind if they differ in numbers alone.
    blocks: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        for number in islice(_NUMBER.finditer(name), MOST_NUMBERS):
            begin, end = number.span()
            if name[end : end + 1] == "." and (begin == 0 or name[begin - 1] == "."):
                block = name[:end]
                blocks[_NUMBER.sub("#", block)][block].add(name[end:])
    missing: set[str] = set()
    instead: set[str] = set()
    for alike in blocks.values():
        if len(alike) > 2:
            lost, odd = _unlike(alike)
            missing |= lost
            instead |= odd
    leaves = Counter(name.rpartition(".")[0] for name in names)
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if leaf == "bias" and leaves[layer] == 1:  # what is added to the product with no weight?
            missing.add(f"{layer}.weight")
    return sorted(missing), sorted(instead)


def _unlike(alike: dict[str, set[str]]) -> tuple[set[str], set[str]]:
    """Of blocks of one kind: names that are missing, and names in their place."""
    kinds = Counter(map(frozenset, alike.values()))
    usual = [kind for kind, count in kinds.items() if count > 1]
    missing: set[str] = set()
    instead: set[str] = set()
    for block, rest in alike.items():
        if kinds[frozenset(rest)] > 1:
            continue
        for kind in usual:
            lost, odd = kind - rest, rest - kind
            if len(lost) == 1 and len(odd) <= 1:
                missing.add(block + next(iter(lost)))
                instead.update(block + each for each in odd)
                break
    return missing, instead
