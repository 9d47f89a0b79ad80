"""Merging checkpoints: up to ten models of a family, in any layout and precision, in the memory of a few tensors.

::

    merge(["a.safetensors", "b/"], "ab.safetensors", alpha=0.3, vae=0)
    merge([mine, theirs, base], out, method="add-difference", blocks="GRAD_V", dtype="float16")
    run(recipe_of("ab.safetensors"), "again.safetensors", folder="models")    # the same bytes
    verify("ab.safetensors", ["a.safetensors", "b/"])

What a method computes is in :mod:`~sumuk.weights.merge_methods`, the recipe's text in
:mod:`~sumuk.weights.merge_recipe`, how models are aligned in :mod:`~sumuk.weights.merge_plan`. The result says what it
was made of, with the hashes of its parents, so that it can be made again and checked against them.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.families.detect import Match
from sumuk.files.direct import Source, Sum
from sumuk.files.hashes import Progress
from sumuk.files.layout import some
from sumuk.files.metered import Meter
from sumuk.files.streaming import ahead, unmapped
from sumuk.files.streaming import written as in_order
from sumuk.files.tensors import Lazy, length, size
from sumuk.weights.contents import Contents, of_opened
from sumuk.weights.encoding import Encoding
from sumuk.weights.inspect import Opened, recognise
from sumuk.weights.merge_plan import Plan, plan
from sumuk.weights.merge_recipe import A1111, Parent, Recipe, metadata_of, parse, recipe_of
from sumuk.weights.source import read
from sumuk.weights.writing import DIFFUSERS, LAYOUTS, SUFFIX, Arranged, arrange, store

__all__ = ["Merged", "Parent", "Recipe", "Verified", "merge", "parse", "recipe_of", "run", "verify"]

Place = str | os.PathLike[str]
STALE = ("modelspec.date", "modelspec.thumbnail", "modelspec.title", "sumuk.merge", A1111, "sd_merge_models")
"""Metadata of the first model that would be untrue of a result."""
SAMPLE = 64
"""Tensors that :func:`verify` makes again by default."""


@dataclass(frozen=True)
class Merged:
    """What was made.

    Attributes:
        path: the file or folder.
        recipe: with the hash of every parent; it makes the same again.
        family: key of what it is.
        mixed: how many tensors several models flowed into.
        kept: how many the first model gave as they are.
        lone: how many come from one model, as others lack them.
        notes: what is worth knowing, in sentences.
    """

    path: Path
    recipe: Recipe
    family: str
    mixed: int
    kept: int
    lone: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    """How a result compares with what its recipe makes of its parents.

    Attributes:
        checked: how many tensors were made again.
        total: how many there are.
        failed: native names of those that differ, by a bit or more; also of those that one side lacks.
    """

    checked: int
    total: int
    failed: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing differs."""
        return not self.failed


def merge(
    inputs: Sequence[Place],
    out: Place,
    *,
    method: str = "weighted-sum",
    alpha: float | None = None,
    blocks: str | None = None,
    vae: float | None = None,
    text: float | None = None,
    denoiser: float | None = None,
    parts: Mapping[str, float] | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    seed: int | None = None,
    extra_channels: str | None = None,
    progress: Progress | None = None,
    **settings: object,
) -> Merged:
    """Merge models.

    Args:
        inputs: files and folders, in the order that the method asks for.
        out: where to: a ``.safetensors`` file, replaced when the new one is complete; for ``diffusers`` a new folder.
        method: a name in ``METHODS``.
        alpha: the rate.
        blocks: rates of blocks: numbers, a preset, or pairs.
        vae: rate of the autoencoder; 0 keeps the first model's.
        text: rate of the text towers.
        denoiser: rate of the denoiser's blocks that ``blocks`` does not name.
        parts: rates of further parts by name (``text_2``).
        dtype: floating-point type of the result.
        layout: ``single`` or ``diffusers``.
        seed: for methods that draw random numbers.
        extra_channels: ``keep``, see :class:`Recipe`.
        progress: told bytes done and in all; an exception that it raises stops the work, and nothing is left.
        settings: of the method: ``density``, ``drop``, ``weights``, ``normalise``.

    Raises:
        BadInput: models, rates or settings that do not fit, or that would do nothing.
        BadFile: a damaged or unknown model, or writing failed; what was there before is as it was.
        MissingFile: no such file.
    """
    short = {"vae": vae, "text": text, "denoiser": denoiser}
    recipe = Recipe(
        models=tuple(map(Parent, _names(inputs))),
        method=method,
        alpha=alpha,
        settings=settings,
        blocks=blocks,
        parts={name: rate for name, rate in short.items() if rate is not None} | dict(parts or {}),
        dtype=dtype,
        layout=layout,
        seed=seed,
        extra_channels=extra_channels,
    )
    return _make(recipe, [Path(place) for place in inputs], Path(out), progress)


def run(recipe: Recipe, out: Place, *, folder: Place = ".", progress: Progress | None = None) -> Merged:
    """Follow a recipe.

    Args:
        recipe: the same that :func:`recipe_of` reads and :class:`Merged` has.
        out: as for :func:`merge`.
        folder: where its models lie under their names.
        progress: as for :func:`merge`.

    Raises:
        BadFile: also where a model is not the one that the recipe means, by its hash.
    """
    return _make(recipe, [Path(folder) / model.name for model in recipe.models], Path(out), progress)


def verify(
    result: Place,
    parents: Sequence[Place],
    *,
    sample: int | None = SAMPLE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verified:
    """Make tensors of a result again from its parents, and compare them bit for bit.

    Args:
        result: a merged file or folder.
        parents: its models, in the recipe's order.
        sample: how many tensors, chosen by ``seed``; None: all.
        seed: for the choice.
        progress: told bytes done and in all.

    Raises:
        BadFile: the result has no recipe, or a parent is not the one that it was made of.
        BadInput: another number of parents than the recipe has.
    """
    recipe = recipe_of(result)
    if len(parents) != len(recipe.models):
        raise BadInput(f"{result} was made of {len(recipe.models)} models, not {len(parents)}")
    opened = _opened(Path(result))
    inputs = [_opened(Path(place)) for place in parents]
    made = plan(recipe, inputs)
    wanted, found = made.native, opened.moved.tensors
    names = sorted(wanted)
    if sample is not None and sample < len(names):
        names = sorted(random.Random(seed).sample(names, sample))
    meter = Meter(
        progress, sum(map(_on_disk, inputs)) + made.surveyed + sum(length(wanted[name]) for name in names)
    )
    _hashed(recipe, inputs, _sums(inputs, meter))
    made.survey(meter.add)
    arrangement = opened.answer.arrangement
    away = (
        set() if arrangement is None else arrangement.layout(wanted, backward=True).backward(wanted).ignored
    )
    failed = (wanted.keys() ^ found.keys()) - set(away)
    for name in names:
        if name in found and not _same(wanted[name], found[name]):
            failed.add(name)
        meter.add(length(wanted[name]))
    return Verified(len(names), len(wanted), tuple(sorted(failed)))


# -- reading ---------------------------------------------------------------------------------------------------------


def _opened(path: Path, sums: Mapping[Path, Sum] | None = None) -> Opened:
    source = read(path)
    return recognise(replace(source, tensors=unmapped(source.tensors, sums)))


def _on_disk(opened: Opened) -> int:
    return sum(file.stat().st_size for file in opened.source.files)


def _same(one: Lazy, other: Lazy) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    a, b = (each.load().contiguous().reshape(-1) for each in (one, other))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if len(a) else True


def _names(places: Sequence[Place]) -> list[str]:
    """The models' names in the recipe: those of their files, with the folder's where two are called alike."""
    names = [Path(place).resolve().name for place in places]
    twice = {name for name in names if names.count(name) > 1}
    return [
        f"{Path(place).resolve().parent.name}/{name}" if name in twice else name
        for place, name in zip(places, names, strict=True)
    ]


def _sums(inputs: Sequence[Opened], meter: Meter) -> dict[Path, Sum]:
    """The sum of each file, nothing of which is hashed yet."""
    files = dict.fromkeys(file for each in inputs for file in each.source.files)
    return {file: Sum(Source(file), meter.add) for file in files}


def _hashed(recipe: Recipe, inputs: Sequence[Opened], sums: Mapping[Path, Sum]) -> Recipe:
    """The recipe with the hash of every model; what was not hashed before is read, two files at a time."""
    with ThreadPoolExecutor(2, thread_name_prefix="hash") as pool:
        found = dict(zip(sums, pool.map(Sum.hexdigest, sums.values()), strict=True))
    models = []
    for model, each in zip(recipe.models, inputs, strict=True):
        path = each.source.path
        own = {file: found[file] for file in each.source.files}
        if len(own) == 1:
            (sha256,) = own.values()
        else:
            lines = [f"{value}  {file.relative_to(_root(path)).as_posix()}\n" for file, value in own.items()]
            sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        if model.sha256 not in (None, sha256):
            raise BadFile(
                f"{path}: is not the {model.name!r} of the recipe, its SHA-256 is {sha256[:12]}..., not "
                f"{str(model.sha256)[:12]}...",
                "merge.parent",
            )
        models.append(Parent(model.name, sha256))
    return replace(recipe, models=tuple(models))


def _unhashed(recipe: Recipe) -> Recipe:
    """The recipe with something in the place of every hash, as long as one and unlike the others."""
    return replace(
        recipe, models=tuple(Parent(model.name, f"{at:064d}") for at, model in enumerate(recipe.models))
    )


def _root(path: Path) -> Path:
    return path if path.is_dir() else path.parent


# -- writing ---------------------------------------------------------------------------------------------------------


def _make(recipe: Recipe, places: Sequence[Path], out: Path, progress: Progress | None) -> Merged:
    sums: dict[Path, Sum] = {}
    inputs = [_opened(place, sums) for place in places]
    if any(
        out.exists() and out.samefile(file)
        for each in inputs
        for file in (each.source.path, *each.source.files)
    ):
        raise BadInput(f"{out} is one of the models to merge; give the result another name")
    made = plan(recipe, inputs)
    parts = {name.partition(".")[0] for name in made.native}
    layout = _layout(recipe, inputs[0], len(parts), out)
    # What the first model says of itself, and its words, with the numbers of all.
    contents = of_opened(inputs[0], folder=layout in DIFFUSERS)
    said = {key: text for key, text in contents.metadata.items() if not key.startswith(STALE)}
    contents = replace(contents, tensors=made.native, metadata=said)
    arranged = arrange(contents, layout, Encoding())
    meter = Meter(progress, sum(map(_on_disk, inputs)) + made.surveyed + size(arranged.tensors))
    made.survey(meter.add)
    out.parent.mkdir(parents=True, exist_ok=True)
    sums |= _sums(inputs, meter)

    def told(known: Recipe) -> dict[str, str]:
        parents = {m.sha256 or "": each.source.metadata for m, each in zip(known.models, inputs, strict=True)}
        title = " + ".join(Path(m.name).stem for m in known.models)
        return metadata_of(known, parents) | {"modelspec.title": title}

    # A folder's texts are written first, and a recipe's models are checked before anything is. But a file's header
    # keeps room for hashes, which come about while its parents are read.
    single = layout not in DIFFUSERS
    if not single or any(model.sha256 for model in recipe.models):
        recipe = _hashed(recipe, inputs, sums)

    def settled() -> dict[str, str]:
        return told(_hashed(recipe, inputs, sums))

    with ahead(arranged.tensors, _order(arranged), lambda name: _weight(made, arranged, name)) as ready:
        store(
            replace(arranged, tensors=ready),
            out,
            metadata=told(_unhashed(recipe) if single else recipe),
            settle=settled if single else None,
            meter=meter,
        )
    recipe = _hashed(recipe, inputs, sums)
    counts = (len(made.mixed), len(made.kept), len(made.lone))
    return Merged(out, recipe, contents.kind.key, *counts, tuple(_notes(made, contents, arranged)))


def _layout(recipe: Recipe, first: Opened, parts: int, out: Path) -> str:
    """The layout of the result of so many parts, if the name given is one for it."""
    answer = first.answer
    assert isinstance(answer, Match)
    layout = recipe.layout or answer.arrangement.name
    if recipe.layout is not None and layout not in LAYOUTS:
        raise BadInput(f"layout {layout!r} is not known{nearest(layout, LAYOUTS)}")
    if recipe.layout is None and (layout not in LAYOUTS or (layout.startswith("bare") and parts > 1)):
        layout = "single"  # other arrangements are read, and never written; a bare one holds a single network
    if layout == "diffusers" and out.suffix == SUFFIX:
        raise BadInput(
            f"{str(out)!r} names a file, and the result is a diffusers folder; or give layout='single'"
        )
    if layout not in DIFFUSERS and out.suffix != SUFFIX:
        raise BadInput(f"{str(out)!r} does not end in {SUFFIX}; or give layout='diffusers' for a folder")
    return layout


def _order(arranged: Arranged) -> list[str]:
    """The names as they are written: each part's file of a folder by itself."""
    prefixes = [
        prefix for _, prefix in arranged.arrangement.parts if arranged.arrangement.name == "diffusers"
    ]

    def part(name: str) -> int:
        return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), 0)

    return sorted(in_order(arranged.tensors), key=part)


def _weight(made: Plan, arranged: Arranged, name: str) -> int:
    """Memory for a tensor of the layout: that of the native ones that it is made of."""
    return sum(made.weights[native] for native in arranged.origin.get(name, ()))


def _notes(made: Plan, contents: Contents, arranged: Arranged) -> list[str]:
    """What is worth knowing of the result."""
    notes = list(made.notes)
    if arranged.ignored:
        notes.append(
            f"{arranged.arrangement.title} leaves away {len(arranged.ignored)}: {some(arranged.ignored)}"
        )
    if beyond := sorted(made.told.beyond):
        notes.append(f"{len(beyond)} tensors hold numbers that are none, as a model's do: {some(beyond)}")
    for remark, count in Counter(made.told.remarks).items():
        which = {"linear": "are nearly parallel in both models and were merged linearly"}[remark]
        notes.append(f"{count} of {len(made.mixed)} merged tensors {which}")
    if "prediction" in contents.guessed and contents.facts is not None:
        notes.append(
            f"the first model does not say what it predicts, nor does the result: {contents.facts.prediction}?"
        )
    licences = {each.source.path.name: told.value for each in made.inputs if (told := each.licence()).sure}
    if len(set(licences.values())) > 1:
        shown = ", ".join(f"{name}: {text}" for name, text in licences.items())
        notes.append(f"the models have different licences: {shown}")
    return notes
