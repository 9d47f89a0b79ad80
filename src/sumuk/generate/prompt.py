r"""The prompt grammar of A1111's web UI: text in, a frozen value out. Needs no torch.

====================================  ===============================================================
``(x)``, ``[x]``, ``(x:1.3)``         weight times 1.1, 1 / 1.1, 1.3; nesting multiplies
``\( \) \[ \] \\``                    the character itself; any other lone backslash vanishes
``BREAK``                             ends the chunk of tokens
``a AND b :0.8``                      sub-prompts, each with a weight (1 unless given)
``[from:to:when]``                    "from" while step <= when, then "to"; when: a step, or with a
``[to:when]``, ``[from::when]``       "." a fraction of the steps; whole steps, so 0.5 of 7 is 3
``[a|b|]``                            one option a step, in turn; options may be empty
``<lora:name:0.8>``                   an extra network, taken out of the text into ``Prompt.tags``
====================================  ===============================================================

An unclosed bracket applies to the end. What only resembles a schedule (``[a:b]``, ``[a:b:c:3]``, unbalanced
brackets inside) is text. The text is read in two passes, as there: schedules first, which leave another text
at each step, then weights; so ``(x:[1.1|1.3])`` has a weight that alternates. Two differences: a bar outside
an alternation is text here, where A1111 gives up every schedule of the sub-prompt without a word; and BREAK
ends the chunk inside brackets too, where it becomes a word there.

Every pass walks the text once; nothing recurses with its depth and no pattern backtracks, so hostile text
takes linear time. Schedules count steps from 1.

Source: AUTOMATIC1111 stable-diffusion-webui, wiki page "Features" and the behaviour of version 1.10.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby, pairwise
from typing import Final, TypeAlias

from sumuk.base.errors import BadInput
from sumuk.generate.tags import LONGEST_NUMBER, MOST_WEIGHT, Tag, read_number, take_tags

MOST_CHARACTERS = 50_000
"""Of a prompt; about 160 chunks of 75 tokens of plain English."""
MOST_DEPTH = 64
"""Brackets open at one place."""
MOST_SUBPROMPTS = 32
"""Joined by AND; each is a row for the network at every step."""
MOST_SCHEDULED = 1000
"""Schedules and alternations of a prompt."""

_UP, _DOWN = 1.1, 1 / 1.1
_BLANK = "\0"  # stands where schedule marks were, so that no weight is read across them

_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b")
_AND_WEIGHT = re.compile(r"[-+]?(?:[0-9]+\.?|[0-9]*\.[0-9]+)")
_WHEN = re.compile(r"\s*+([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*+")
_MARK = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]++|\\", re.DOTALL)
_ATOM = re.compile(
    r"\\[()\[\]\\]?|[()\[\]]"
    r"|:\s*+([-+]?[.0-9]++(?:[eE][-+]?[0-9]++)?)\s*+\)"
    r"|[^\\()\[\]:]++|:"
)


Where: TypeAlias = Callable[[int], str]
"""Names the place of a character in messages."""


class Break(Enum):
    """The word that ends a chunk of tokens."""

    BREAK = "BREAK"


BREAK: Final = Break.BREAK


@dataclass(frozen=True, slots=True)
class Segment:
    """Text with one weight; brackets and escapes are resolved."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SubPrompt:
    """What one side of AND says at one step; at least one segment, maybe of no text."""

    weight: float
    segments: tuple[Segment | Break, ...]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """``[before:after:when]``; ``fraction``: ``when`` is a share of the steps."""

    before: Tree
    after: Tree
    when: float
    fraction: bool

    def last(self, steps: int, base: int | None) -> int:
        """The last step of ``before``; below 1 if it never shows."""
        if self.fraction:
            return min(steps, int((self.when - (base is not None)) * steps))
        return min(steps, int(self.when - (base or 0)))


@dataclass(frozen=True, slots=True)
class Alternated:
    """``[a|b|...]``."""

    options: tuple[Tree, ...]


Node: TypeAlias = str | Scheduled | Alternated
Tree: TypeAlias = tuple[Node, ...]
"""Text, weights still in it as brackets, around what changes from step to step."""


@dataclass(frozen=True, slots=True)
class Part:
    """One side of AND."""

    weight: float
    tree: Tree


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that was read: ``text`` as given, what AND joins, and the extra networks that it names."""

    text: str
    parts: tuple[Part, ...]
    tags: tuple[Tag, ...] = ()

    def at(self, step: int, steps: int, base: int | None = None) -> tuple[SubPrompt, ...]:
        """What holds at one step.

        Args:
            step: 1 to ``steps``.
            steps: steps of this pass.
            base: in a second pass, the steps of the first: it goes on where that ended, so that ``when`` 1.5
                or ``base`` + half the steps is the middle of the second.

        Raises:
            BadInput: a step outside its range; a weight that a schedule completes is malformed or too large.
        """
        place = f"of what step {step} reads"
        return tuple(
            SubPrompt(part.weight, _weigh(text, lambda offset: f"character {offset + 1} {place}"))
            for part, text in zip(self.parts, self._texts(step, steps, base), strict=True)
        )

    def changes(self, steps: int, base: int | None = None) -> list[int]:
        """Steps whose text is not that of the step before; the first is always 1."""
        candidates = {1}
        for node in _changing(self.parts):
            if isinstance(node, Alternated):
                candidates.update(range(1, steps + 1))
                break
            candidates.add(node.last(steps, base) + 1)
        found: list[int] = []
        before: tuple[str, ...] | None = None
        for step in sorted(step for step in candidates if 1 <= step <= steps):
            texts = self._texts(step, steps, base)
            if texts != before:
                found.append(step)
            before = texts
        return found

    def _texts(self, step: int, steps: int, base: int | None) -> tuple[str, ...]:
        if not 1 <= step <= steps:
            raise BadInput(f"step {step} is outside 1..{steps}")
        return tuple(_flatten(part.tree, step, steps, base) for part in self.parts)


def parse(text: str, *, conjunction: bool = True) -> Prompt:
    """Read a prompt.

    Args:
        text: as typed.
        conjunction: False for a negative prompt, where A1111 reads AND and a trailing ``:0.8`` as text.

    Raises:
        BadInput: it is too long or too deep, a weight is no number or too large; names the place, from 1.
    """
    if len(text) > MOST_CHARACTERS:
        raise BadInput(f"the prompt has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    clean, tags, origin = take_tags(text)
    parts: list[Part] = []
    ands = [found.span() for found in _AND.finditer(clean)] if conjunction else []  # even inside brackets
    for (_, start), (end, _) in pairwise([(0, 0), *ands, (len(clean), 0)]):

        def where(offset: int, start: int = start) -> str:
            return f"character {origin(start + offset) + 1}"

        if len(parts) == MOST_SUBPROMPTS:
            raise BadInput(f"AND joins more than {MOST_SUBPROMPTS} sub-prompts at {where(0)}; leave some out")
        side, weight = _and_weight(clean[start:end], where) if conjunction else (clean[start:end], 1.0)
        tree, still = _grow(side, where)
        _weigh(still, where)  # every weight that stands in the text is good, or refused here and not midway
        parts.append(Part(weight, tree))
    if sum(1 for _ in _changing(parts)) > MOST_SCHEDULED:
        raise BadInput(f"the prompt schedules more than {MOST_SCHEDULED} places; leave some out")
    return Prompt(text, tuple(parts), tags)


def _and_weight(side: str, where: Where) -> tuple[str, float]:
    """A sub-prompt without the space and the weight at its end, and that weight."""
    side = side.rstrip()
    body, colon, tail = side.rpartition(":")
    number = tail.lstrip()
    if not colon or not _AND_WEIGHT.fullmatch(number):
        return side, 1.0
    return body.rstrip(), read_number(number, "weight of the sub-prompt", where(len(body)))


def _too_deep(place: str) -> BadInput:
    return BadInput(f"brackets are nested deeper than {MOST_DEPTH} at {place}; close some")


@dataclass(slots=True)
class _Open:
    """A bracket that waits for its partner: its kind, its place among the nodes, the marks directly in it."""

    kind: str
    index: int
    colons: list[int] = field(default_factory=list)
    bars: list[int] = field(default_factory=list)


def _grow(text: str, where: Where) -> tuple[Tree, str]:
    """The tree of a sub-prompt, and its text with the marks of schedules blanked.

    A closing bracket without its partner leaves everything that is open unbalanced, so none of that can be a
    schedule any more; it stays text.
    """
    nodes: list[Node] = []
    starts: list[int] = []
    waiting: list[_Open] = []
    blanks: list[int] = []
    for found in _MARK.finditer(text):
        mark = found[0]
        nodes.append(mark)
        starts.append(found.start())
        if mark in ("(", "["):
            if len(waiting) == MOST_DEPTH:
                raise _too_deep(where(found.start()))
            waiting.append(_Open(mark, len(nodes) - 1))
        elif mark in (":", "|") and waiting:
            (waiting[-1].colons if mark == ":" else waiting[-1].bars).append(len(nodes) - 1)
        elif mark in (")", "]") and waiting:
            opened = waiting.pop()
            if (opened.kind == "(") != (mark == ")") or (mark == ")" and len(opened.colons) > 1):
                waiting.clear()
            elif mark == ")":
                continue
            elif (node := _schedule(nodes, opened, where(starts[opened.index]))) is not None:
                blanks += [starts[index] for index in (opened.index, *opened.colons, *opened.bars)]
                blanks += range(starts[opened.colons[-1]] if opened.colons else found.start(), found.end())
                nodes[opened.index :] = [node]
                starts[opened.index :] = [starts[opened.index]]
            elif opened.colons or opened.bars:
                waiting.clear()
    still = list(text)
    for index in blanks:
        still[index] = _BLANK
    return _tree(nodes), "".join(still)


def _schedule(nodes: list[Node], opened: _Open, place: str) -> Scheduled | Alternated | None:
    """What the square bracket that just closed (the last node) means; None if it is emphasis or text."""
    cuts = [opened.index, *(opened.colons or opened.bars), len(nodes) - 1]
    if (opened.colons and opened.bars) or len(cuts) < 3 or len(opened.colons) > 2:
        return None
    if opened.bars:
        return Alternated(tuple(_tree(nodes[a + 1 : b]) for a, b in pairwise(cuts)))
    last = nodes[cuts[-2] + 1 : -1]
    found = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if found is None:
        return None
    when = float(found[1]) if len(found[1]) <= LONGEST_NUMBER else math.inf
    if not math.isfinite(when):
        raise BadInput(f"schedule at {place} changes at {found[1]!r:.40}; give a step or a fraction")
    *before, after = [_tree(nodes[a + 1 : b]) for a, b in pairwise(cuts[:-1])]
    return Scheduled(before[0] if before else (), after, when, "." in found[1])


def _tree(nodes: list[Node]) -> Tree:
    """The nodes, neighbouring texts joined."""
    joined: list[Node] = []
    for is_text, some in groupby(nodes, lambda node: isinstance(node, str)):
        run = list(some)
        joined += ["".join(map(str, run))] if is_text else run
    return tuple(joined)


def _flatten(tree: Tree, step: int, steps: int, base: int | None) -> str:
    """The text that a tree leaves at a step."""
    texts: list[str] = []
    todo = list(reversed(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, Scheduled):
            todo += reversed(node.before if step <= node.last(steps, base) else node.after)
        else:
            todo += reversed(node.options[(step - 1) % len(node.options)])
    return "".join(texts)


def _changing(parts: Iterable[Part]) -> Iterator[Scheduled | Alternated]:
    """Everything in the trees that is not text."""
    todo = [node for part in parts for node in part.tree]
    while todo:
        node = todo.pop()
        if not isinstance(node, str):
            yield node
            trees = node.options if isinstance(node, Alternated) else (node.before, node.after)
            todo += (inner for tree in trees for inner in tree)


def _weigh(text: str, where: Where) -> tuple[Segment | Break, ...]:
    """Segments of equal weight. Round and square brackets are matched apart and may overlap."""
    pieces: list[str | Break] = []
    weights: list[float] = []
    places: list[int] = []
    waiting: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(kind: str, factor: float) -> None:  # a piece is in at most MOST_DEPTH brackets: linear time
        for index in range(waiting[kind].pop(), len(pieces)):
            weights[index] *= factor

    for found in _ATOM.finditer(text):
        atom, number = found[0], found[1]
        if atom in ("(", "["):
            if len(waiting["("]) + len(waiting["["]) == MOST_DEPTH:
                raise _too_deep(where(found.start()))
            waiting[atom].append(len(pieces))
        elif number is not None and waiting["("]:
            weight = read_number(number, "weight", where(found.start()))
            if "e" in number.lower():
                raise BadInput(f"weight at {where(found.start())} has an exponent, {number}; write it out")
            multiply("(", weight)
        elif atom == ")" and waiting["("]:
            multiply("(", _UP)
        elif atom == "]" and waiting["["]:
            multiply("[", _DOWN)
        else:
            new = [atom[1:]] if atom[0] == "\\" else _broken(atom)
            pieces += new
            weights += [1.0] * len(new)
            places += [found.start()] * len(new)
    for kind, factor in (("(", _UP), ("[", _DOWN)):
        while waiting[kind]:
            multiply(kind, factor)
    for weight, place in zip(weights, places, strict=True):
        if abs(weight) > MOST_WEIGHT:
            raise BadInput(f"nested weights exceed {MOST_WEIGHT:g} at {where(place)}; lower them")
    return _joined(pieces, weights)


def _broken(text: str) -> list[str | Break]:
    """A run of text cut at BREAK, which takes the space around it along."""
    first, *others = _BREAK.split(text)
    pieces: list[str | Break] = [first]
    for other in others:
        pieces[-1] = str(pieces[-1]).rstrip()
        pieces += [BREAK, other.lstrip()]
    return pieces


def _joined(pieces: list[str | Break], weights: list[float]) -> tuple[Segment | Break, ...]:
    joined: list[Segment | Break] = []
    pairs = zip(pieces, weights, strict=True)
    for weight, some in groupby(pairs, lambda pair: None if pair[0] is BREAK else pair[1]):
        run = [piece for piece, _ in some]
        if weight is None:
            joined += [BREAK] * len(run)
        elif text := "".join(map(str, run)):
            joined.append(Segment(text, weight))
    return tuple(joined) or (Segment(""),)
