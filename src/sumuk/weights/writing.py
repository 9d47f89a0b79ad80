"""Writing a model or a checkpoint: the rules of a layout read backward, one tensor at a time, complete or not at all.

What is no tensor goes where the layout has a place for it: into the header's metadata (modelspec names, and
``sumuk.*`` for what those lack), or into the JSON files of a diffusers folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sumuk.base.errors import BadInput, nearest
from sumuk.families.family import Arrangement, Family, Kind
from sumuk.files.atomic import creating, replacing
from sumuk.files.metered import Meter
from sumuk.files.shards import write_shards
from sumuk.files.tensors import Tensors, lazy
from sumuk.files.tensors import size as bytes_of
from sumuk.weights import vocabulary
from sumuk.weights.contents import DIGEST, Contents, of_model, texts
from sumuk.weights.encoding import Encoding, read_dtype
from sumuk.weights.model import Model

SUFFIX = ".safetensors"
ORIGINAL, DIFFUSERS = ("single", "bare"), ("diffusers", "bare-diffusers")
LAYOUTS = (*ORIGINAL, *DIFFUSERS)
"""``single``: the original publication's names in one file. ``diffusers``: a folder of that library. Of one network
also ``bare``, the original names without prefix, and ``bare-diffusers``, that library's in a file or a folder."""


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """Contents in a layout, ready to be written.

    Attributes:
        contents: what it is.
        arrangement: how the file or folder puts its parts together.
        tensors: by their names there.
        ignored: native names that the layout leaves away by design.
        origin: name there -> the native names that it came from; markers have none.
    """

    contents: Contents
    arrangement: Arrangement
    tensors: Tensors
    ignored: tuple[str, ...]
    origin: Mapping[str, list[str]]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return bytes_of(self.tensors)


def save(
    model: Model,
    path: str | os.PathLike[str],
    layout: str = "single",
    dtype: str | torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Save a model.

    Args:
        model: what to save; a trained one is ``dataclasses.replace(model, networks=...)`` or a new ``Model``.
        path: a ``.safetensors`` file, replaced when the new one is complete; for ``diffusers`` a new folder.
        layout: ``single`` (the original publication's) or ``diffusers``.
        dtype: floating-point type to store; as the networks are by default.
        metadata: further texts for the header, over those that the model had.

    Returns:
        Names of tensors that the layout leaves away by design, usually none: diffusers folders of Stable Diffusion 2
        end its text tower where it is read.

    Raises:
        BadInput: a layout that the family does not have, a dtype that is none, a folder that is not empty,
            metadata that contradict the model.
        BadFile: writing failed, or a number is too large for the dtype; what was there before is as it was.
    """
    arranged = arrange(of_model(model), layout, Encoding(dtype=read_dtype(dtype)))
    store(arranged, path, metadata=metadata)
    return arranged.ignored


def arrange(contents: Contents, layout: str, encoding: Encoding) -> Arranged:
    """The tensors as a layout names and cuts them, in the types in which they are to be written.

    Raises:
        BadInput: the layout has no place for some part, or none of that name is there.
        BadFile: tensors that belong together do not fit.
    """
    kind = contents.kind
    chosen = choose(kind, layout, contents.present)
    moved = chosen.layout(contents.tensors, backward=True).backward(contents.tensors)
    moved.refuse_leftovers(f"{kind.title} as {layout}")
    if encoding.quantise is not None and chosen.dialect != "original":
        raise BadInput(f"quantise {encoding.quantise!r} is for layouts of original names: 'single' or 'bare'")
    encoded = encoding.encode(moved.tensors, lambda name: moved.origin[name][0])
    return Arranged(
        contents=contents,
        arrangement=chosen,
        tensors=encoded | _markers(contents, chosen),
        ignored=tuple(moved.ignored),
        origin=moved.origin,
    )


def choose(kind: Kind, layout: str, present: tuple[str, ...]) -> Arrangement:
    """The arrangement that a layout's name stands for.

    Args:
        kind: what is to be written.
        layout: one of :data:`LAYOUTS`.
        present: its parts that are there.

    Raises:
        BadInput: the kind has none of that name, or it has no place for a part.
    """
    named = _named(kind, layout)
    if not named:
        known = dict.fromkeys(each.name for each in kind.arrangements if each.name in LAYOUTS)
        raise BadInput(f"{kind.title} cannot be saved in the layout {layout!r}{nearest(layout, known)}")
    fits = [each for each in named if {part.name for part, _ in each.parts} >= set(present)]
    if not fits:
        places = {part.name for part, _ in named[0].parts}
        raise BadInput(
            f"{named[0].title} has no place for the {', '.join(sorted(set(present) - places))} of {kind.title}; "
            "save them as a single file, or leave them out of the model's networks"
        )
    # Where one arrangement has just these parts, it is how they are published alone.
    chosen = min(fits, key=lambda each: len(each.parts))
    alone = layout.startswith("bare") and isinstance(kind, Family)
    if alone and len(present) > 1:
        raise BadInput(
            f"{layout!r} holds one network, and there are {', '.join(present)}; use 'single' or 'diffusers'"
        )
    if alone or (not isinstance(kind, Family) and chosen.name == "diffusers"):
        parts = tuple((part, "") for part, _ in chosen.parts if part.name in present)
        return replace(chosen, parts=parts, name="bare-diffusers" if layout in DIFFUSERS else layout)
    return chosen


def _named(kind: Kind, layout: str) -> list[Arrangement]:
    """The arrangements that a layout's name may stand for, the likeliest first."""
    if isinstance(kind, Family):
        return [each for each in kind.arrangements if each.name == layout and layout in LAYOUTS]
    if (
        layout in DIFFUSERS
    ):  # of one network its own names, or those in a pipeline's folder, which are the same
        there = [each for each in kind.arrangements if each.name in DIFFUSERS]
        return sorted(there, key=lambda each: each.name != "bare-diffusers")
    names = {"single": ORIGINAL, "bare": ("bare",)}.get(layout, ())
    return [each for each in kind.arrangements if each.name in names and each.dialect == "original"]


def _markers(contents: Contents, arrangement: Arrangement) -> Tensors:
    """Empty tensors that say how a model is to be used, where a single file of its family may hold them."""
    facts = contents.facts
    if facts is None or arrangement.dialect != "original":
        return {}
    wanted = {
        "v_pred": facts.prediction == "v" and "prediction" not in contents.guessed,
        "ztsnr": facts.zero_snr,
    }
    known = [pattern for rule in arrangement.ignored for pattern in rule.foreign]
    return {
        name: lazy(torch.empty(0))
        for name, there in wanted.items()
        if there and any(pattern.read(name) is not None for pattern in known)
    }


def store(
    arranged: Arranged,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    digest: bool = False,
    settle: Callable[[], Mapping[str, str]] | None = None,
    meter: Meter | None = None,
) -> tuple[Path, ...]:
    """Write what was arranged.

    Args:
        arranged: what to write.
        path: a file, or a new folder.
        metadata: further texts for the header.
        shard_bytes: the most bytes of one file, see :func:`~sumuk.files.shards.write_shards`.
        digest: whether a single file's metadata shall hold the digest of its tensors.
        settle: texts of a single file that are known only at the end, see :func:`~sumuk.files.tensors.write`.
        meter: told of the bytes written.

    Returns:
        The weight files.

    Raises:
        BadInput: metadata that contradict the model; a folder that is not empty.
        BadFile: writing failed; what was there before is as it was.
    """
    contents, path = arranged.contents, Path(path)
    said = texts(contents, metadata or {})
    if arranged.arrangement.name in DIFFUSERS and (
        (isinstance(contents.kind, Family) and arranged.arrangement.name == "diffusers")
        or path.suffix != SUFFIX
    ):
        return _folder(arranged, path, said, shard_bytes, meter)
    for part, tokens in contents.words.items():
        if part not in contents.usual:
            said[vocabulary.meta(part)] = tokens.to_json()
    return write_shards(
        path,
        arranged.tensors,
        said,
        shard_bytes,
        digest=DIGEST if digest else None,
        settle=settle,
        meter=meter,
    )


def _folder(
    arranged: Arranged, path: Path, said: dict[str, str], shard_bytes: int | None, meter: Meter | None
) -> tuple[Path, ...]:
    contents, arrangement = arranged.contents, arranged.arrangement
    files: list[Path] = []
    with creating(path) as folder:
        for name, table in _configs(contents, arrangement).items():
            (folder / name).parent.mkdir(exist_ok=True)
            _json(folder / name, table)
        for file, own, texts in _weight_files(arranged, said):
            made = write_shards(folder / file, own, texts, shard_bytes, meter=meter)
            files += [path / each.relative_to(folder) for each in made]
        if arrangement.name == "diffusers":
            for part, tokens in contents.words.items():
                vocabulary.write_folder(tokens, folder / vocabulary.folder(part))
    return tuple(files)


def _weight_files(arranged: Arranged, said: dict[str, str]) -> list[tuple[str, Tensors, dict[str, str]]]:
    """Each weight file of a folder: its place, its tensors, its texts."""
    parts = [
        (part, prefix)
        for part, prefix in arranged.arrangement.parts
        if part.name in arranged.contents.present
    ]
    if arranged.arrangement.name != "diffusers":  # one file for all, whatever stands before their names
        return [(parts[0][0].file, arranged.tensors, said)]
    files = []
    for part, prefix in parts:
        own = {name[len(prefix) :]: one for name, one in arranged.tensors.items() if name.startswith(prefix)}
        files.append((prefix + part.file, own, said if part is parts[0][0] else {"format": "pt"}))
    return files


def _configs(contents: Contents, arrangement: Arrangement) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder."""
    kind, configs = contents.kind, {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in contents.present}
    for name, one in contents.tensors.items():
        of, _, own = name.partition(".")
        shapes[of][own] = one.shape
    here = [(part, prefix) for part, prefix in arrangement.parts if part.name in shapes]
    if not isinstance(kind, Family) or contents.facts is None:
        for part, _ in here:
            configs["config.json"] = part.config(shapes[part.name]) | dict(contents.config)
        return configs
    said = kind.folder(contents.facts)
    if arrangement.name != "diffusers":
        (part, _), places = (
            here[0],
            next(each for each in kind.arrangements if each.name == "diffusers").parts,
        )
        usual = next(
            (said.get(f"{prefix}config.json", {}) for each, prefix in places if each.name == part.name), {}
        )
        return {"config.json": part.config(shapes[part.name]) | usual}
    index = said.get("model_index.json", {})
    for part, prefix in arrangement.parts:
        if part.name in shapes:
            own = f"{prefix}config.json"
            said[own] = part.config(shapes[part.name]) | said.get(own, {})
        else:
            said.pop(f"{prefix}config.json", None)
            if prefix.strip("/") in index:
                index[prefix.strip("/")] = [None, None]
    for reading in kind.readings:
        if reading.part not in shapes:
            inside = next(prefix for part, prefix in arrangement.parts if part.name == reading.part)
            index |= {inside.strip("/"): [None, None], vocabulary.folder(reading.part): [None, None]}
    return said


def _json(path: Path, table: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(table, indent=2, sort_keys=True) + "\n").encode())
