"""Key layouts as reversible rules: read forward to load, backward to save.

The *foreign* side is how some file names and cuts its tensors, the *native* side how the networks here do
(which is how the original publication did). Every tensor is moved once, ignored by name, or refused aloud::

    Layout(
        rename("blocks.{i}.out.0.*", "double.{i}.proj.*"),
        fuse(["blocks.{i}.q.*", "blocks.{i}.k.*", "blocks.{i}.v.*"], "double.{i}.qkv.*"),
        swap_halves("norm_out.*", "final.mod.*"),
        ignore("position_ids"),
    )

``{i}`` stands for digits, a final ``*`` for any rest of a name. Rules are tried in order and the first that
fits counts. All of it works on :class:`~sumuk.files.tensors.Lazy`, hence on headers alone, and a conversion
streams one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from sumuk.base.errors import BadFile, nearest
from sumuk.files.tensors import Lazy, Shape, Tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """A name with places for digits (``{i}``) and for the rest (``*``, at the end)."""

    text: str
    head: str = field(init=False, repr=False)
    match: Callable[[str], re.Match[str] | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        head, match = _compiled(self.text)
        object.__setattr__(self, "head", head)
        object.__setattr__(self, "match", match)

    def read(self, name: str) -> dict[str, str] | None:
        """What stands at each place of ``name``, None if it does not fit."""
        found = self.match(name) if name.startswith(self.head) else None
        return found.groupdict() if found else None

    def fill(self, places: Mapping[str, str]) -> str:
        """The name with these things at its places."""
        return re.sub(r"\{(\w+)\}|\*$", lambda piece: places[piece[1] or "rest"], self.text)


@lru_cache(maxsize=1 << 16)  # the same few thousand patterns are made for every header that is looked at
def _compiled(text: str) -> tuple[str, Callable[[str], re.Match[str] | None]]:
    """What a pattern begins with, and its match."""
    pieces = re.split(r"(\{\w+\}|\*$)", text)
    return pieces[0], re.compile("".join(map(_regex, pieces)), re.DOTALL).fullmatch


def _regex(piece: str) -> str:
    if piece == "*":
        return "(?P<rest>.+)"
    return f"(?P<{piece[1:-1]}>[0-9]+)" if piece.startswith("{") else re.escape(piece)


@dataclass(frozen=True)
class Cut:
    """How one side's tensors become the other's; the plain one hands a single tensor through.

    Attributes:
        join: several foreign tensors to one native, lazily.
        part: one native tensor to the foreign one of a given index.
    """

    join: Callable[[Sequence[Lazy]], Lazy]
    part: Callable[[Lazy, int], Lazy]


@dataclass(frozen=True)
class Rule:
    """One movement of tensors that belong together, and its way back.

    Attributes:
        foreign: their patterns; one except for :func:`fuse`.
        native: patterns of what they become; several for :func:`split`, none to drop them.
        cut: what happens to the numbers.
        writes: whether saving uses the rule; False for old spellings that are only understood.
        splits: read the other way round: one foreign tensor becomes several native ones (:func:`split`).
    """

    foreign: tuple[Pattern, ...]
    native: tuple[Pattern, ...]
    cut: Cut
    writes: bool = True
    splits: bool = False

    def under(self, foreign: str, native: str) -> Rule:
        """The same rule below prefixes."""
        return replace(
            self,
            foreign=tuple(Pattern(foreign + pattern.text) for pattern in self.foreign),
            native=tuple(Pattern(native + pattern.text) for pattern in self.native),
        )


PLAIN = Cut(lambda group: group[0], lambda one, _: one)


def rename(foreign: str, native: str) -> Rule:
    """The same tensor under another name."""
    return Rule((Pattern(foreign),), (Pattern(native),), PLAIN)


def alias(rule: Rule) -> Rule:
    """A rule for an older spelling, which is read but never written."""
    return replace(rule, writes=False)


def ignore(foreign: str) -> Rule:
    """Tensors that are known and of no use; each is listed in :attr:`Moved.ignored`."""
    return Rule((Pattern(foreign),), (), PLAIN, writes=False)


def fuse(foreign: Sequence[str], native: str, parts: Sequence[int] | None = None) -> Rule:
    """Several tensors stacked along their first dimension.

    Args:
        foreign: patterns, in the order of stacking; all have the same places.
        native: pattern of the stack.
        parts: their relative heights, for cutting the stack again; equal by default.
    """
    cut = _stacked(parts or [1] * len(foreign))
    return Rule(tuple(map(Pattern, foreign)), (Pattern(native),), cut)


def split(foreign: str, native: Sequence[str], parts: Sequence[int] | None = None) -> Rule:
    """One tensor cut along its first dimension: :func:`fuse` with the sides exchanged."""
    cut = _stacked(parts or [1] * len(native))
    return Rule((Pattern(foreign),), tuple(map(Pattern, native)), cut, splits=True)


def swap_halves(foreign: str, native: str) -> Rule:
    """Upper and lower half exchanged: (scale, shift) against (shift, scale)."""

    def swapped(one: Lazy) -> Lazy:
        half = _rows(one, [1, 1])[1]
        return one.become(lambda: one.load().roll(half, 0))

    return _single(foreign, native, swapped, swapped)


def transpose(foreign: str, native: str) -> Rule:
    """A matrix turned over."""

    def turned(one: Lazy) -> Lazy:
        if len(one.shape) != 2:
            raise BadFile(
                f"{foreign!r} should be a matrix, but has the shape {list(one.shape)}", "layout.shape"
            )
        return one.become(lambda: one.load().t(), shape=one.shape[::-1])

    return _single(foreign, native, turned, turned)


def linear_to_conv(foreign: str, native: str) -> Rule:
    """A linear layer, ``[N, C]``, that is natively a 1x1 convolution, ``[N, C, 1, 1]``; biases stay."""

    def wide(one: Lazy) -> Lazy:
        return _reshaped(one, (*one.shape, 1, 1)) if len(one.shape) == 2 else one

    def flat(one: Lazy) -> Lazy:
        return _reshaped(one, one.shape[:2]) if one.shape[2:] == (1, 1) else one

    return _single(foreign, native, wide, flat)


def _single(foreign: str, native: str, read: Callable[[Lazy], Lazy], write: Callable[[Lazy], Lazy]) -> Rule:
    cut = Cut(lambda group: read(group[0]), lambda one, _: write(one))
    return Rule((Pattern(foreign),), (Pattern(native),), cut)


def _reshaped(one: Lazy, shape: Shape) -> Lazy:
    return one.become(lambda: one.load().reshape(shape), shape=shape)


def _rows(stack: Lazy, parts: Sequence[int]) -> list[int]:
    """Where the parts of a stack begin, and its height at the end."""
    height = stack.shape[0] if stack.shape else 0
    if height % sum(parts):
        raise BadFile(f"{stack.source}: {height} rows cannot be cut into parts {list(parts)}", "layout.shape")
    edges = [0]
    for part in parts:
        edges.append(edges[-1] + part * height // sum(parts))
    return edges


def _stacked(parts: Sequence[int]) -> Cut:
    def join(group: Sequence[Lazy]) -> Lazy:
        first = group[0]
        if len({(one.shape[1:], one.dtype, len(one.shape)) for one in group}) > 1 or not first.shape:
            kinds = ", ".join(f"{one.dtype} {list(one.shape)}" for one in group)
            raise BadFile(f"{first.source}: tensors that belong together do not fit: {kinds}", "layout.shape")
        heights = [one.shape[0] for one in group]
        if any(h * parts[0] != heights[0] * p for h, p in zip(heights, parts, strict=True)):
            raise BadFile(
                f"{first.source}: heights {heights} are not in the ratio {list(parts)}", "layout.shape"
            )

        def load() -> Tensor:
            import torch  # here, as looking at names and shapes needs no torch

            return torch.cat([one.load() for one in group])

        return first.become(load, shape=(sum(heights), *first.shape[1:]))

    def part(stack: Lazy, index: int) -> Lazy:
        begin, end = _rows(stack, parts)[index : index + 2]
        return stack.become(lambda: stack.load()[begin:end], shape=(end - begin, *stack.shape[1:]))

    return Cut(join, part)


@dataclass
class Moved:
    """What became of every tensor.

    Attributes:
        tensors: by their new names.
        ignored: names that a rule drops.
        unknown: names that no rule fits.
        halves: sets that lack a member: (names that are there, names that are not).
        origin: new name -> the names that it came from.
    """

    tensors: Tensors = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    halves: list[tuple[list[str], list[str]]] = field(default_factory=list)
    origin: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, tensor: Lazy, origin: list[str]) -> None:
        """Put a tensor at its new place, once."""
        if name in self.tensors:
            there, here = self.origin[name][0], origin[0]
            raise BadFile(f"{tensor.source}: both {there!r} and {here!r} stand for {name!r}", "layout.twice")
        self.tensors[name] = tensor
        self.origin[name] = origin

    def refuse_leftovers(self, where: str, known: Sequence[str] = ()) -> None:
        """Raise BadFile for halves and for unknown names.

        Args:
            where: the file, for the message.
            known: names that would have been expected, to hint at a misspelling.
        """
        if self.halves:
            there, lost = self.halves[0]
            raise BadFile(f"{where}: holds {there[0]!r} without {lost[0]!r}, its other part", "layout.half")
        if self.unknown:
            hint = nearest(self.unknown[0], known) if known else ""
            raise BadFile(
                f"{where}: {len(self.unknown)} unknown tensors: {some(self.unknown)}{hint}", "layout.unknown"
            )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names."""
    shown = ", ".join(repr(name) for name in sorted(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


class Layout:
    """A list of rules, tried in order."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    def forward(self, tensors: Mapping[str, Lazy]) -> Moved:
        """From the foreign side to the native one. Leftovers are reported, not raised: ask the result."""
        return self._move(tensors, backward=False)

    def backward(self, tensors: Mapping[str, Lazy]) -> Moved:
        """From the native side to the foreign one."""
        return self._move(tensors, backward=True)

    def _move(self, tensors: Mapping[str, Lazy], backward: bool) -> Moved:
        moved = Moved()
        groups: dict[tuple[int, str], tuple[Rule, dict[str, str], dict[int, str]]] = {}
        rules = [rule for rule in self.rules if rule.writes or not backward]
        sides = [(rule.native, rule.foreign) if backward else (rule.foreign, rule.native) for rule in rules]
        entries = [
            (pattern.head, pattern, number, place)
            for number, (here, _) in enumerate(sides)
            for place, pattern in enumerate(here)
        ]
        for name, tensor in tensors.items():
            for head, pattern, number, place in entries:
                places = pattern.read(name) if name.startswith(head) else None
                if places is None:
                    continue
                here, there = sides[number]
                rule = rules[number]
                if not there:
                    moved.ignored.append(name)
                elif len(here) == 1:
                    cutting = backward != rule.splits
                    for index, to in enumerate(there):  # several where the tensor is cut
                        one = rule.cut.part(tensor, index) if cutting else rule.cut.join([tensor])
                        moved.add(to.fill(places), one, [name])
                else:
                    key = (number, there[0].fill(places))
                    groups.setdefault(key, (rule, places, {}))[2][place] = name
                break
            else:
                moved.unknown.append(name)
        for (number, target), (rule, places, members) in groups.items():
            here = sides[number][0]
            names = [pattern.fill(places) for pattern in here]
            if len(members) < len(here):
                moved.halves.append((list(members.values()), [n for n in names if n not in tensors]))
                continue
            moved.add(target, rule.cut.join([tensors[n] for n in names]), names)
        return moved
