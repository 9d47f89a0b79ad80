"""Extra networks that a prompt names, ``<lora:name:0.8>``: taken out of the text as values. Needs no torch."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from sumuk.base.errors import BadInput

MOST_WEIGHT = 1000.0
"""Magnitude of any weight, and of the product of nested ones."""
MOST_TAGS = 256
"""Extra networks named in a prompt."""
LONGEST_NUMBER = 32
"""Characters of a number."""

SORTS = {"lora": "lora", "lyco": "lora", "hypernet": "hypernet"}
"""Kind of a tag -> what it names."""

_TAG = re.compile(r"<(\w++):([^>]++)>")


@dataclass(frozen=True, slots=True)
class Tag:
    """An extra network, ``<kind:name:0.8:unet=0.5>``.

    Attributes:
        kind, name: as written; the name is no path yet, and may be hostile.
        weights: each with what it was called, "" where only its turn tells.
        blocks: rates of the network's blocks, ``lbw=MIDD`` or ``lbw=1,0,0.5,...``, as written.
        place: where the tag stood, counted from 1.
    """

    kind: str
    name: str
    weights: tuple[tuple[str, float], ...] = ()
    blocks: str = ""
    place: int = field(default=1, compare=False)

    @property
    def sort(self) -> str:
        """``lora`` or ``hypernet``; empty: no kind of extra network."""
        return SORTS.get(self.kind, "")


def may_name(text: str, embedding: str) -> bool:
    """Whether a text may name an embedding, so that it has to be there; its tokens tell whether it does."""
    return embedding.lower() in text.lower()


def take_tags(text: str) -> tuple[str, tuple[Tag, ...], Callable[[int], int]]:
    """The text without its tags, the tags, and where a character of the first stood in ``text``."""
    kept: list[str] = []
    tags: list[Tag] = []
    lengths, gaps = [0], [0]
    start = 0
    for found in _TAG.finditer(
        text, 0, text.rfind(">") + 1
    ):  # without the bound, each "<a:" would look for it
        if len(tags) == MOST_TAGS:
            raise BadInput(f"the prompt names more than {MOST_TAGS} extra networks; leave some out")
        tags.append(_tag(found[1], found[2], found.start() + 1))
        kept.append(text[start : found.start()])
        start = found.end()
        lengths.append(lengths[-1] + len(kept[-1]))
        gaps.append(start - lengths[-1])
    kept.append(text[start:])
    return "".join(kept), tuple(tags), lambda offset: offset + gaps[bisect_right(lengths, offset) - 1]


def _tag(kind: str, rest: str, place: int) -> Tag:
    name, *values = rest.split(":")
    if not name:
        raise BadInput(f"the extra network at character {place} has no name; write <lora:name:0.8>")
    weights, blocks = [], ""
    for value in values:
        key, _, said = value.rpartition("=")
        if key in ("lbw", "blocks"):
            blocks = said.strip()
            continue
        weights.append((key, read_number(said.strip(), "weight of the extra network", f"character {place}")))
    return Tag(kind, name, tuple(weights), blocks, place)


def read_number(text: str, what: str, place: str) -> float:
    """A number as people write it in a prompt; BadInput names ``what`` it is and its ``place``."""
    try:
        value = float(text) if len(text) <= LONGEST_NUMBER and text.isascii() else math.nan
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise BadInput(f"{what} at {place} is no number: {text!r:.40}; write one, or \\: for the colon")
    if abs(value) > MOST_WEIGHT:
        raise BadInput(f"{what} at {place} is {text}; it must lie within {-MOST_WEIGHT:g}..{MOST_WEIGHT:g}")
    return value
