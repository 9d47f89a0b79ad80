"""What a merge will do with every tensor, before any is read: inputs aligned by native names, a rate for each.

Networks that only some models have (an autoencoder) come from the first that has them, and it is said. Within a network
a tensor that one lacks, or another shape, is refused by name.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.families.detect import Unknown
from sumuk.families.family import Family
from sumuk.files.direct import Memory
from sumuk.files.layout import some
from sumuk.files.tensors import Lazy, Tensors, length, torch_dtype
from sumuk.weights.blocks import Blocks, Rates
from sumuk.weights.building import check_config, refuse_leftovers
from sumuk.weights.inspect import Opened
from sumuk.weights.merge_methods import Method, Values, spread
from sumuk.weights.merge_recipe import Recipe

INPUTS = ("denoiser.input_blocks.0.0.weight", "denoiser.img_in.weight", "denoiser.x_embedder.proj.weight")
"""Where a network takes its channels; models of one family differ here by what is laid beside the latent."""
ALONE = ("denoiser.guidance_in.",)
"""What some models of a family lack by design: FLUX.1 schnell is told no guidance."""
PIECE = 1 << 18
"""Numbers merged at a time where each stands for itself: all that they become stays in the processor's cache, and they
are enough that the calls themselves cost little."""
_PARTS = ("denoiser", "text", "vae")


@dataclass
class Told:
    """What comes to light while numbers are computed.

    Attributes:
        beyond: tensors with numbers that are not finite.
        remarks: of the method, one for each tensor that it has one for.
    """

    beyond: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that can be written.

    Attributes:
        inputs: the models, the first of which gives layout and facts.
        native: the result's tensors by native name, computed when they are loaded.
        weights: bytes of memory that computing each takes.
        mixed: names that several models flow into.
        kept: names that the first model gives as it is.
        lone: names that come from one model, as others lack them.
        notes: what is worth knowing before.
        told: what is worth knowing after.
        survey: methods that look at the whole model first do so here, before a tensor is loaded; it is given what to
            call with the bytes of each tensor read, which are ``surveyed`` in all.
        surveyed: 0 for other methods.
    """

    inputs: tuple[Opened, ...]
    native: Tensors
    weights: dict[str, int]
    mixed: tuple[str, ...]
    kept: tuple[str, ...]
    lone: tuple[str, ...]
    notes: tuple[str, ...]
    told: Told
    survey: Callable[[Callable[[int], None]], None]
    surveyed: int


def plan(recipe: Recipe, inputs: Sequence[Opened]) -> Plan:
    """Work out what becomes of every tensor.

    Args:
        recipe: how to merge.
        inputs: the models, recognised, in the recipe's order.

    Raises:
        BadFile: a model that nobody knows, or with tensors of no place.
        BadInput: models that do not fit each other, or a rate that would do nothing.
    """
    method, told = recipe.rule, Told()
    alike(inputs)
    notes = [f"{input_.source.path.name}: {note}" for input_ in inputs for note in input_.source.notes]
    notes += [note for input_ in inputs for note in _left(input_)]
    groups, lone = _aligned(inputs)
    notes += _lent(inputs, lone)
    whole = {name: [group[0]] for name, group in groups.items() if not _floats(group)}
    if whole:
        notes.append(f"{len(whole)} tensors of whole numbers are the first model's: {some(list(whole))}")
    _fit(groups, recipe, inputs, notes)
    rates = _Settled(recipe, Blocks.of(groups), notes)
    plan_rates = {
        name: rates.of(name)
        for name in groups
        if name not in whole
        and name not in lone
        and not name.startswith(tuple(f"{p}." for p in method.skips))
    }
    rates.refuse_idle()
    mixed = {n: r for n, r in plan_rates.items() if r or not method.neutral}
    if not mixed:
        raise BadInput("every rate is 0: nothing of the other models would be in the result")
    if len(lone) == len(groups):
        raise BadInput("the models have no network in common")
    dtype = None if recipe.dtype is None else torch_dtype(recipe.dtype)
    mixer = _Mixer(method, recipe.values, told)
    seen = [groups[name] for name in mixed] if method.survey is not None else []
    native, weights = {}, {}
    for name, group in groups.items():
        first = group[0]
        target = first if dtype is None else first.cast(dtype)
        if name in mixed:
            load = partial(mixer.mix, name, tuple(group), mixed[name], target.dtype)
            native[name] = Lazy(first.shape, target.dtype, load, first.source)
            weights[name] = mixer.weigh(group, native[name])
        else:
            load = partial(mixer.cast, name, first, target.dtype)
            native[name] = first if target is first else target.become(load)
            weights[name] = 8 * first.parameters
    packed = Counter(one.stored for one in inputs[0].moved.tensors.values() if one.packed is not None)
    if packed and dtype is None:
        shown = ", ".join(f"{count} {scheme}" for scheme, count in packed.items())
        notes.append(f"the first model is quantised ({shown}); the result is not, and so larger")
    kept = tuple(name for name in groups if name not in mixed and name not in lone)
    return Plan(
        inputs=tuple(inputs),
        native=native,
        weights=weights,
        mixed=tuple(mixed),
        kept=kept,
        lone=tuple(lone),
        notes=tuple(notes),
        told=told,
        survey=partial(mixer.survey, seen),
        surveyed=sum(length(one) for group in seen for one in group),
    )


# -- inputs ----------------------------------------------------------------------------------------------------------


def alike(inputs: Sequence[Opened]) -> None:
    """Refuse models that nobody knows, or that are not of one family."""
    for each in inputs:
        path = each.source.path
        if isinstance(each.answer, Unknown):
            raise BadFile(f"{path}: unknown model: {each.answer.why}", "merge.unknown")
        if not each.answer.family.parts:
            raise BadInput(
                f"{path}: is {each.answer.family.title}, which is no network that could be merged here"
            )
        refuse_leftovers(each, ())
        for part in each.answer.family.parts:
            if own := each.own(part.name):
                check_config(part, own, each)
    kinds = [each.answer.family for each in inputs if not isinstance(each.answer, Unknown)]
    first = inputs[0].source.path
    for each, kind in zip(inputs, kinds, strict=True):
        if kind.name != kinds[0].name:
            raise BadInput(
                f"{each.source.path} is {kind.title} ({kind.key}), {first} is {kinds[0].title} ({kinds[0].key}); "
                "only models of one family can be merged"
            )
    if isinstance(kinds[0], Family):
        said = [(each.source.path, told.value) for each in inputs if (told := each.prediction()).sure]
        for path, value in said:
            if value != said[0][1]:
                raise BadInput(
                    f"{path} predicts {value}, {said[0][0]} predicts {said[0][1]}; what lies between predicts neither"
                )


def _left(input_: Opened) -> Iterator[str]:
    """What of an input has no place in a result."""
    path = input_.source.path.name
    ignored = input_.moved.ignored
    for name in ignored:
        if name.endswith("position_ids"):
            one = input_.source.tensors[name]
            value = one.load().reshape(-1)
            odd = int((value != torch.arange(len(value))).sum())
            if one.dtype != "I64" or odd:
                wrong = f", {odd} of them wrong" if odd else ""
                yield (
                    f"{path}: {name} are {one.dtype} instead of I64{wrong}, as careless merges leave them; they are "
                    f"not taken over, so that the result counts 0 to {len(value) - 1} again"
                )
    if averaged := sum(name.startswith("model_ema.") for name in ignored):
        yield f"{path}: {averaged} averaged weights (model_ema) are left away"


def _aligned(inputs: Sequence[Opened]) -> tuple[dict[str, list[Lazy]], list[str]]:
    """Each native name with the models' tensors in order, and the names that not all have."""
    tables = [each.moved.tensors for each in inputs]
    names = dict.fromkeys(name for table in tables for name in table)
    groups = {name: [table[name] for table in tables if name in table] for name in names}
    lone = [name for name, group in groups.items() if len(group) < len(inputs)]
    for each, table in zip(inputs, tables, strict=True):
        parts = {_part(name) for name in table}
        lost = [name for name in lone if name not in table and _part(name) in parts]
        if lost := [name for name in lost if not name.startswith(ALONE)]:
            # What the model's own layout would leave away cannot be asked of it.
            arrangement = each.answer.arrangement
            assert arrangement is not None
            whole = {name: group[0] for name, group in groups.items()}
            by_design = set(arrangement.layout(whole, backward=True).backward(whole).ignored)
            lost = [name for name in lost if name not in by_design]
        if lost:
            raise BadInput(
                f"{each.source.path} lacks {len(lost)} tensors that another of the models has: {some(lost)}; "
                "they are not of one shape"
            )
    return groups, lone


def _lent(inputs: Sequence[Opened], lone: Sequence[str]) -> Iterator[str]:
    """Where tensors come from that not all models have."""
    holders = {name: next(each for each in inputs if name in each.moved.tensors) for name in lone}
    for (path, part), count in Counter(
        (one.source.path.name, _part(n)) for n, one in holders.items()
    ).items():
        lacking = [
            each.source.path.name
            for each in inputs
            if any(n not in each.moved.tensors for n in lone if _part(n) == part)
        ]
        yield f"{part}: {count} tensors are those of {path}, as {' and '.join(lacking)} lack them"


def _part(name: str) -> str:
    return name.partition(".")[0]


def _floats(group: Sequence[Lazy]) -> bool:
    return all(one.dtype.startswith(("F", "BF")) for one in group) and group[0].parameters > 0


def _fit(groups: dict[str, list[Lazy]], recipe: Recipe, inputs: Sequence[Opened], notes: list[str]) -> None:
    """Refuse shapes that differ, but for further channels of the first model's input where they may stay."""
    odd = [name for name, group in groups.items() if len({one.shape for one in group}) > 1]
    wider = [name for name in odd if name in INPUTS and _wider(groups[name])]
    if odd and odd == wider and recipe.extra_channels:
        first, other = (groups[odd[0]][i].shape[1] for i in (0, -1))
        notes.append(f"of the {first} input channels of the first model, {first - other} stay as they are")
        return
    if odd:
        shapes = " and ".join(
            str(list(shape)) for shape in dict.fromkeys(one.shape for one in groups[odd[0]])
        )
        hint = ""
        if all(name in INPUTS for name in odd):
            hint = "; give the one that takes more channels first, and extra_channels='keep' to merge what they share"
        raise BadInput(
            f"{len(odd)} tensors differ in shape between {' and '.join(each.source.path.name for each in inputs)}: "
            f"{some(odd)} is {shapes}{hint}"
        )
    if recipe.extra_channels:
        raise BadInput("extra_channels='keep' would do nothing: the models take the same channels")


def _wider(group: Sequence[Lazy]) -> bool:
    first, *others = (one.shape for one in group)
    rests = {shape[:1] + shape[2:] for shape in (first, *others)}
    return len(rests) == 1 and len({shape[1] for shape in others}) == 1 and first[1] > others[0][1]


# -- rates -----------------------------------------------------------------------------------------------------------


class _Settled:
    """The rate of every tensor, and which of those that were given have mattered."""

    def __init__(self, recipe: Recipe, blocks: Blocks, notes: list[str]) -> None:
        self.recipe, self.blocks, self.method = recipe, blocks, recipe.rule
        self.rates = None if recipe.blocks is None else Rates.parse(recipe.blocks, blocks)
        for block, rate in self.rates.values.items() if self.rates else ():
            self.method.alpha.check(f"the rate of {block},", rate)
        if self.rates is not None and self.rates.note:
            notes.append(self.rates.note)
        self.used: set[str] = set()

    def of(self, native: str) -> float:
        part, _, name = native.partition(".")
        parts = self.recipe.parts
        key = part if part in parts else "text" if part.startswith("text") and "text" in parts else ""
        block = self.blocks.block(part, name)
        if key and part != "denoiser":
            return self._use(f"{key}=", parts[key])
        if self.rates is not None and block in self.rates.values:
            return self._use(block, self.rates.values[block])
        if key:
            return self._use(f"{key}=", parts[key])
        if self.recipe.alpha is not None:
            return self._use("alpha", self.recipe.alpha)
        if self.rates is not None:
            raise BadInput(
                f"the block rates leave out {block} ({native!r}); name it, or give alpha for the rest"
            )
        assert self.method.alpha.default is not None
        return self.method.alpha.default

    def _use(self, what: str, rate: float) -> float:
        self.used.add(what)
        return rate

    def refuse_idle(self) -> None:
        """Raise BadInput for a rate that no tensor asked for."""
        given = [f"{part}=" for part in self.recipe.parts] + sorted(self.rates.named if self.rates else ())
        given += ["alpha"] if self.recipe.alpha is not None else []
        for what in given:
            if what not in self.used:
                part = what.removesuffix("=")
                hint = nearest(part, _PARTS) if part != what and part not in _PARTS else ""
                raise BadInput(f"the rate {what} would do nothing: no merged tensor asks for it{hint}")


# -- numbers ---------------------------------------------------------------------------------------------------------


def _width(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    wide = _width(tensors)
    return [each.to(wide) for each in tensors]


class _Mixer:
    """Computes one tensor of the result."""

    def __init__(self, method: Method, values: Values, told: Told) -> None:
        self.method, self.values, self.told = method, values, told
        self.own = threading.local()
        self.memory = Memory()

    def survey(self, groups: Sequence[Sequence[Lazy]], told: Callable[[int], None]) -> None:
        """Look at all tensors for what the method must know of the whole model."""
        found = []
        for group in groups:
            assert self.method.survey is not None
            found.append(self.method.survey(_wide([one.load() for one in group])))
            told(sum(map(length, group)))
        if found:
            self.values = {**self.values, **spread(found)}

    def weigh(self, group: Sequence[Lazy], made: Lazy) -> int:
        """Bytes of memory, roughly."""
        if self.method.elementwise:
            return sum(map(length, group)) + length(made)
        return group[0].parameters * 8 * (len(group) + 1)

    def mix(self, name: str, group: Sequence[Lazy], rate: float, dtype: str) -> Tensor:
        models = [one.load() for one in group]
        first, shared = models[0], models[-1].shape
        if first.shape == shared:
            return self._mix(name, models, rate, dtype)
        channels = shared[1]
        made = self._mix(name, [first[:, :channels], *models[1:]], rate, dtype)
        return torch.cat([made, first[:, channels:].to(made.dtype)], 1)

    def _mix(self, name: str, models: Sequence[Tensor], rate: float, dtype: str) -> Tensor:
        out = self._blank(models[0].shape, _TYPES[dtype])
        limit = torch.finfo(out.dtype).max
        pieces = [each.reshape(-1).split(PIECE) for each in models] if self.method.elementwise else None
        low = high = 0.0
        if pieces is None:
            made, remark = self.method.mix(_wide(models), rate, self.values, name)
            low, high = (float(each) for each in torch.aminmax(made))
            out.copy_(made)
            if remark:
                self.told.remarks.append(remark)
        else:
            for place, *group in zip(out.view(-1).split(PIECE), *pieces, strict=True):
                made = self.method.mix(self._widened(group), rate, self.values, name).tensor
                ends = [float(each) for each in torch.aminmax(made)]
                low, high = min(low, ends[0]), max(high, ends[1])
                if math.isnan(ends[0]):
                    low = -math.inf
                place.copy_(made)
        if not math.isfinite(low) or not math.isfinite(high):
            self.told.beyond.append(name)
        elif max(-low, high) > limit:
            raise _too_large(name, max(-low, high), dtype)
        return out

    def _blank(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled, in memory that the last ones have left."""
        if not (count := math.prod(shape)):
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.from_numpy(self.memory.take(count * dtype.itemsize)).view(dtype).reshape(tuple(shape))

    def _widened(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """As :func:`_wide`, into memory that each thread has once: to ask for new would cost more than the sums."""
        wide = _width(pieces)
        store: list[Tensor] = self.own.__dict__.setdefault(str(wide), [])
        while len(store) < len(pieces):
            store.append(torch.empty(PIECE, dtype=wide))
        return [
            each if each.dtype == wide else place[: len(each)].copy_(each)
            for each, place in zip(pieces, store, strict=False)
        ]

    def cast(self, name: str, one: Lazy, dtype: str) -> Tensor:
        """A tensor that is only stored in fewer bits."""
        before = one.load()
        made = before.to(_TYPES[dtype])
        if before.element_size() == 1:
            return made  # every other type holds what 8 bits do
        if bool((made.isinf() & before.isfinite()).any()):
            raise _too_large(name, float(before.abs().max()), dtype)
        return made


def _too_large(name: str, value: float, dtype: str) -> BadInput:
    return BadInput(
        f"{name!r} would hold {value:g}, and {dtype} ends at {torch.finfo(_TYPES[dtype]).max:g}; give a wider dtype, "
        "such as bfloat16"
    )


_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
