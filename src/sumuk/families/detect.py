"""Which kind of file a header belongs to: a pure function of names and shapes that loads no tensor.

Every arrangement of every kind is considered. One of which no network's key is there is passed over at once. For the
others the names are moved to their native places, each network's once for all that name it alike, and each variant
says whether what arrived is its own. Exactly one may remain; where several do, the one that leaves fewer names
unexplained; where that ties, the answer says so instead of choosing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import sumuk.families
from sumuk.base.errors import BadFile
from sumuk.families.family import FAMILIES, Arrangement, Family, Kind, Part
from sumuk.files.layout import Layout, Moved, Rule, some
from sumuk.files.tensors import Lazy, Tensors

HINTS = (
    ("distilled_guidance_layer.", "Chroma, which is not among the families here"),
    ("diffusion_modelinput_blocks", "averaged weights without the plain ones, whose dots their names have lost"),
    ("pretrained.model.blocks.", "MiDaS, which makes depth maps of pictures: give the depth map itself"),
    ("sqrt_alphas_cumprod", "the tables of a noise schedule without a network"),
    ("lora_", "a LoRA for a model that is not among the families here"),
    (".lora.", "a LoRA for a model that is not among the families here"),
    (".hada_w1", "a LoRA (LoHa) for a model that is not among the families here"),
    (".lokr_w", "a LoRA (LoKr) for a model that is not among the families here"),
)  # fmt: skip
"""Pieces of names that tell what a file may be that no family recognises."""

SHARE = 4
"""A kind that draws nothing by itself is one only if it explains this many times what it leaves over: of a whole model
whose network nobody knows, the autoencoder is not all. A network without its key is worth a word from this part of the
file on."""

LARGEST = 20_000
"""Tensors of a file that is looked at; no published one has half as many, and the work grows with their number."""

LARGE = 6_000
"""Tensors of a file that is searched for a network without its key as well, which asks every kind of network."""

REASONS = 4
"""Reasons in one line."""

T = TypeVar("T")


@dataclass(frozen=True)
class Near:
    """A kind whose network's key is there, and why it is not the answer."""

    family: str
    why: str


@dataclass(frozen=True)
class Match:
    """One family, one arrangement.

    Attributes:
        family: the variant.
        arrangement: how the file puts its parts together.
        moved: its tensors by native name, lazily, and what is left over.
        near: others that were considered.
    """

    family: Kind
    arrangement: Arrangement
    moved: Moved
    near: tuple[Near, ...] = ()


@dataclass(frozen=True)
class Unknown:
    """No family, or no single one.

    Attributes:
        why: what is missing, or what tied.
        parts: networks that are there all the same.
        arrangement: how they are named, None without any.
        moved: their tensors by native name.
        near: families that were considered.
    """

    why: str
    parts: tuple[Part, ...] = ()
    arrangement: Arrangement | None = None
    moved: Moved = field(default_factory=Moved)
    near: tuple[Near, ...] = ()


@dataclass(frozen=True)
class Tried:
    """One kind in one arrangement: the parts that are there, and why it is not the answer; None: it may be."""

    family: Kind
    arrangement: Arrangement
    moved: Moved
    present: tuple[Part, ...]
    reason: str | None

    @property
    def leftover(self) -> int:
        """Tensors that it does not explain."""
        return len(self.moved.unknown) + len(self.moved.halves)

    @property
    def first(self) -> int:
        """Tensors of the file that become its first network's."""
        own = f"{self.family.parts[0].name}." if self.family.parts else ""
        return sum(len(names) for name, names in self.moved.origin.items() if name.startswith(own))

    @property
    def is_near(self) -> bool:
        """Whether its first network is there, or it has none."""
        return not self.family.parts or self.family.parts[0] in self.present


def families() -> list[Kind]:
    """All kinds. Every module of this package is imported and registers its own, so there is no list."""
    for module in pkgutil.iter_modules(sumuk.families.__path__):
        importlib.import_module(f"sumuk.families.{module.name}")
    return [FAMILIES[name] for name in FAMILIES]


def detect(tensors: Mapping[str, Lazy], among: Sequence[Kind] | None = None) -> Match | Unknown:
    """The family and arrangement of a file or folder.

    Args:
        tensors: its tensors by their names in the file; in a diffusers folder ``unet/conv_in.weight``.
        among: families to consider, all by default.
    """
    kinds = families() if among is None else among
    if len(tensors) > LARGEST:
        return Unknown(f"it has {len(tensors):,} tensors; files of at most {LARGEST:,} are looked at")
    file = _File(tensors)
    tried = _candidates(file, kinds)
    fit = [each for each in tried if each.reason is None]
    least = min((each.leftover for each in fit), default=0)
    best = [each for each in fit if each.leftover == least]
    first = best[0] if best else None
    if first is not None and all(each.family is first.family for each in best):
        return Match(first.family, first.arrangement, first.moved, _near(tried, first))
    if best:
        tied = ", ".join(f"{each.family.key} as {each.arrangement.name}" for each in best)
        return Unknown(f"several families fit alike: {tied}", near=_near(tried, None))
    return _unknown(file, tried, kinds)


def candidates(tensors: Mapping[str, Lazy], among: Sequence[Kind] | None = None) -> list[Tried]:
    """Every kind in every arrangement of which something is there.

    Args:
        tensors: as for :func:`detect`.
        among: kinds to consider, all by default.
    """
    return _candidates(_File(tensors), families() if among is None else among)


def _candidates(file: _File, kinds: Sequence[Kind]) -> list[Tried]:
    tried: list[Tried] = []
    for kind in kinds:
        for arrangement in kind.arrangements:
            if not file.holds(arrangement):
                continue
            here = file.moved(arrangement)
            present = tuple(part for part in kind.parts if f"{part.name}.{part.key}" in here.tensors)
            if not present and (kind.parts or not here.tensors):
                continue
            reason = kind.recognise({name: tensor.shape for name, tensor in here.tensors.items()})
            if reason == "":
                continue  # not even near
            one = Tried(kind, arrangement, here, present, reason)
            if reason is None and isinstance(kind, Family) and not one.is_near:
                one = replace(one, reason=f"there is no {kind.parts[0].key!r} of its {kind.parts[0].title}")
            elif (
                reason is None
                and not isinstance(kind, Family)
                and one.leftover * (SHARE + 1) > len(file.tensors)
            ):
                rest = f"it leaves {one.leftover} of {len(file.tensors)} tensors unexplained"
                one = replace(one, reason=rest)
            tried.append(one)
    return tried


def moved(arrangement: Arrangement, tensors: Mapping[str, Lazy]) -> Moved:
    """A file's tensors at the places that an arrangement gives them; all unknown where it does not fit at all."""
    return _File(tensors).moved(arrangement)


class _File:
    """One header, and what was moved of it already."""

    def __init__(self, tensors: Mapping[str, Lazy]) -> None:
        self.tensors = tensors
        self.known: dict[Hashable, object] = {}

    def holds(self, arrangement: Arrangement) -> bool:
        """Whether the key of some network may be there; of an arrangement without networks, whether any name is."""
        if not arrangement.parts:
            return bool(self.special(arrangement.ignored))
        return any(self.has_key(part, prefix, arrangement.dialect) for part, prefix in arrangement.parts)

    def has_key(self, part: Part, prefix: str, dialect: str) -> bool:
        """Whether what becomes a part's key is there, by any of its rules."""
        if dialect == "original":
            if f"{prefix}{part.key}" in self.tensors:
                return True
            rules: Iterable[Rule] = part.aliases
        elif not (inner := self.under(prefix)):
            return False
        else:
            rules = self.rules(part, prefix, dialect, inner)
        return any(prefix + name in self.tensors for rule in rules for name in _sources(rule, part.key))

    def keyless(self, kinds: Sequence[Kind]) -> tuple[int, str]:
        """A kind's first network that is there but for its key: how many tensors, and what to say of it."""
        found: list[tuple[int, str, str, str]] = []
        for kind in kinds if len(self.tensors) <= LARGE else ():
            for arrangement in kind.arrangements:
                for part, prefix in arrangement.parts[:1]:
                    own = self.part(part, prefix, arrangement.dialect)
                    if own is None or part.key in own.tensors:
                        continue
                    rules = self.rules(part, prefix, arrangement.dialect, self.under(prefix))
                    lost = next((names for rule in rules if (names := _sources(rule, part.key))), [part.key])
                    found.append((len(_claimed(own, prefix)), prefix + lost[0], part.title, kind.name))
        most, lost_one, title, _ = max(found, default=(0, "", "", ""))
        kinds_named = dict.fromkeys(
            name for count, lost, _, name in found if (count, lost) == (most, lost_one)
        )
        if SHARE * most <= len(self.tensors):
            return 0, ""
        return most, f"it has most of the {title} ({', '.join(kinds_named)}) but lacks {lost_one!r}"

    def under(self, prefix: str) -> Tensors:
        """The tensors below a prefix, without it."""

        def find() -> Tensors:
            return {n[len(prefix) :]: one for n, one in self.tensors.items() if n.startswith(prefix)}

        return self._once(("under", prefix), find)

    def rules(self, part: Part, prefix: str, dialect: str, inner: Tensors) -> list[Rule]:
        """A part's rules for the names below a prefix."""
        return self._once(("rules", prefix, *_spelling(part, dialect)), lambda: part.rules(dialect, inner))

    def part(self, part: Part, prefix: str, dialect: str) -> Moved | None:
        """A part's tensors as if all below the prefix were its own; None: its rules cannot cut them."""

        def move() -> Moved | None:
            inner = self.under(prefix)
            return _forward(self.rules(part, prefix, dialect, inner), inner) if inner else Moved()

        return self._once(("part", prefix, *_spelling(part, dialect)), move)

    def special(self, rules: tuple[Rule, ...]) -> Tensors:
        """The tensors that an arrangement treats before its parts."""

        def find() -> Tensors:
            patterns = [pattern for rule in rules for pattern in rule.foreign]
            heads = tuple(pattern.head for pattern in patterns if pattern.head != pattern.text)
            names = {pattern.text for pattern in patterns}
            return {
                n: one for n, one in self.tensors.items() if n in names or (heads and n.startswith(heads))
            }

        return self._once(("special", id(rules)), find)

    def moved(self, arrangement: Arrangement) -> Moved:
        """The same as its layout makes of the file, from what other arrangements share with it."""

        def move() -> Moved:
            whole = self._put_together(arrangement)
            return Moved(unknown=list(self.tensors)) if whole is None else whole

        return self._once(("moved", id(arrangement)), move)

    def _put_together(self, arrangement: Arrangement) -> Moved | None:
        whole = _forward(arrangement.ignored, self.special(arrangement.ignored))
        if whole is None:
            return None
        taken = set(whole.ignored).union(*whole.origin.values())
        for part, prefix in arrangement.parts:
            own = self.part(part, prefix, arrangement.dialect)
            if taken and (own is None or not taken.isdisjoint(_claimed(own, prefix))):
                inner = self.under(prefix)  # what was taken before is not for this part
                free = {name: one for name, one in inner.items() if prefix + name not in taken}
                own = _forward(self.rules(part, prefix, arrangement.dialect, inner), free)
            if own is None:
                return None
            taken.update(_claimed(own, prefix))
            whole.ignored += [prefix + name for name in own.ignored]
            whole.halves += [
                ([prefix + n for n in there], [prefix + n for n in lost]) for there, lost in own.halves
            ]
            for name, one in own.tensors.items():
                whole.tensors[f"{part.name}.{name}"] = one
                whole.origin[f"{part.name}.{name}"] = [prefix + each for each in own.origin[name]]
        whole.unknown = [name for name in self.tensors if name not in taken]
        return whole

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]  # type: ignore[return-value]  # what make() of this key returned


def _spelling(part: Part, dialect: str) -> tuple[Hashable, ...]:
    """What two parts have in common that are named alike."""
    return (part.original, id(part.aliases)) if dialect == "original" else (id(part.diffusers),)


def _forward(rules: Sequence[Rule], tensors: Tensors) -> Moved | None:
    try:
        return Layout(*rules).forward(tensors)
    except BadFile:  # shapes that its rules cannot cut: some other layout's names
        return None


def _sources(rule: Rule, native: str) -> list[str]:
    """The foreign names that a rule makes a native one of; none if it makes others."""
    for pattern in rule.native:
        if (places := pattern.read(native)) is not None:
            return [foreign.fill(places) for foreign in rule.foreign]
    return []


def _claimed(own: Moved, prefix: str) -> set[str]:
    """Names in the file that a part has a use for."""
    names = set(own.ignored).union(*own.origin.values(), *(there for there, _ in own.halves))
    return {prefix + name for name in names}


def _near(tried: Sequence[Tried], answer: Tried | None) -> tuple[Near, ...]:
    """The near ones, each with its first reason; the answer is none of them."""
    found: dict[str, str] = {}
    for each in tried:
        if each.is_near and (answer is None or each.family is not answer.family):
            found.setdefault(each.family.key, each.reason or f"it leaves {each.leftover} tensors unexplained")
    return tuple(Near(*pair) for pair in found.items())


def _unknown(file: _File, tried: Sequence[Tried], kinds: Sequence[Kind]) -> Unknown:
    tensors, near = file.tensors, _near(tried, None)
    drawing = [each for each in tried if isinstance(each.family, Family)]
    most, lost = file.keyless(kinds)
    if most > max((each.first for each in tried if each.is_near), default=0):
        return Unknown(lost, near=near)
    # A denoiser that nobody recognises is another model; without one, what is there may serve as a part.
    if parts := [] if any(each.is_near for each in drawing) else [each for each in drawing if each.present]:
        best = min(parts, key=lambda each: each.leftover)
        titles = " and ".join(part.title for part in best.present)
        why = f"only the {titles}, no denoiser: give it to load() beside a model"
        if best.moved.unknown:
            why += f"; besides, {len(best.moved.unknown)} unknown tensors: {some(best.moved.unknown)}"
        return Unknown(why, best.present, best.arrangement, best.moved, near)
    closest = sorted((each for each in tried if each.is_near), key=lambda each: each.leftover)
    if reasons := list(dict.fromkeys(f"not {each.family.name}: {each.reason}" for each in closest)):
        more = f"; and {len(reasons) - REASONS} more reasons" if len(reasons) > REASONS else ""
        return Unknown("; ".join(reasons[:REASONS]) + more, near=near)
    for piece, what in HINTS:
        if any(piece in name for name in tensors):
            return Unknown(f"looks like {what}; saw {some(list(tensors))}", near=near)
    return Unknown(f"no known network in {len(tensors)} tensors: saw {some(list(tensors)) or 'none'}")
