"""Where weights lie: one file, a set of shards, or a folder with one network in each subfolder.

All become one table of lazy tensors, whether safetensors, GGUF or pickles (``.ckpt``, ``.pt``, ``.bin``). In a
diffusers folder names carry their subfolder (``unet/conv_in.weight``), so that layouts tell the networks apart. Where
numbers are quantised, their scales are folded into them (:mod:`~sumuk.files.quantised`). What a file holds beside its
weights (an optimizer's memory, a trainer's notes) is kept apart and counted.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.ckpt import read_ckpt
from sumuk.files.gguf import read_gguf
from sumuk.files.layout import some
from sumuk.files.quantised import fold
from sumuk.files.safetensors import Header, read_header
from sumuk.files.shards import read_json, read_shards
from sumuk.files.tensors import Tensors, from_header

_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model|pytorch_model)(?:\.(?P<variant>[A-Za-z0-9_]+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<late>[A-Za-z0-9_]+))?\.json)?"
)
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
WRAPPED = "state_dict."
"""Below this name a training checkpoint keeps its weights; what else it holds lies beside it."""


@dataclass(frozen=True)
class Source:
    """Weights on disk, headers read and checked, nothing loaded.

    Attributes:
        path: the file or folder that was named.
        tensors: by name; in a folder below ``subfolder/``.
        metadata: texts of the headers; in a folder those of the first file that has each.
        files: the weight files, in a stable order.
        notes: choices made among several files, for the user.
        beside: tensors of a training checkpoint that are no weights (``optimizer_states...``).
        values: what a pickle or a GGUF file says beside its tensors (``epoch``, an embedding's ``name``).
    """

    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    beside: Tensors = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def config(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder (``vae/config.json``); empty if there is none."""
        path = self.path / name
        return read_json(path) if self.path.is_dir() and path.exists() else {}


def read(path: str | os.PathLike[str], variant: str | None = None) -> Source:
    """Read the headers of a weight file of any format, an ``.index.json``, or a folder.

    Args:
        path: where the weights are.
        variant: which files of a diffusers folder to take, ``fp16`` for ``model.fp16.safetensors``; by
            default those without a variant, and where there are none, ``fp16`` or whichever there is.

    Raises:
        MissingFile: nothing there, or no weights in the folder.
        BadFile: a file that breaks the rules of its format, or is hostile.
    """
    with _uncollected():
        return _read(Path(path), variant)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage while a large table grows, all of which is kept: it would take half of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _read(path: Path, variant: str | None) -> Source:
    if not _is_folder(path):
        index = path.name.endswith(".json")
        piece = _safetensors(read_shards(path)) if index else _piece(path)
        return _source(path, [("", piece)], ())
    notes: list[str] = []
    if pieces := _folder_weights(path, variant, notes):
        return _source(path, [("", piece) for piece in pieces], tuple(notes))
    below = []
    for folder in sorted(place for place in path.iterdir() if place.is_dir()):
        below += [(f"{folder.name}/", piece) for piece in _folder_weights(folder, variant, notes)]
    if not below:
        raise MissingFile(f"no weights in the folder {str(path)!r} or its subfolders")
    return _source(path, below, tuple(notes))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long for the file system, which the readers tell of
        return False


@dataclass(frozen=True)
class _Piece:
    """One weight file, or the shards of one."""

    files: tuple[Path, ...]
    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Tensors = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _piece(path: Path) -> _Piece:
    """A file, read as what its name says; each reader refuses what is something else."""
    ending = path.suffix.lower()
    if ending == ".gguf":
        known = read_gguf(path)
        return _Piece((path,), known.tensors, known.metadata, values=known.values)
    return _pickle(path) if ending in PICKLES else _safetensors([read_header(path)])


def _safetensors(headers: Sequence[Header]) -> _Piece:
    """A file, or shards as one: a weight's scale may lie in another shard than the weight."""
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for header in headers:
        tensors |= from_header(header)  # no name is in two shards, see read_shards
        metadata = {**header.metadata, **metadata}
    tensors, notes = fold(tensors, metadata)
    return _Piece(tuple(header.path for header in headers), tensors, metadata, notes=notes)


def _pickle(path: Path) -> _Piece:
    pickled = read_ckpt(path)
    wrapped = any(name.startswith(WRAPPED) for name in pickled.tensors)
    weights: Tensors = {}
    beside: Tensors = {}
    for name, tensor in pickled.tensors.items():
        if name.startswith(WRAPPED) or not wrapped:
            weights[name.removeprefix(WRAPPED)] = tensor
        else:
            beside[name] = tensor
    notes = []
    if beside:
        notes.append(
            f"{path.name}: {len(beside)} tensors of its training lie beside the weights ({some(list(beside))})"
        )
    if pickled.foreign:
        notes.append(
            f"{path.name}: objects of {len(pickled.foreign)} foreign classes were not read: {some(pickled.foreign)}"
        )
    tensors, more = fold(weights, {})
    return _Piece((path,), tensors, beside=beside, values=pickled.values, notes=(*notes, *more))


def _source(path: Path, pieces: list[tuple[str, _Piece]], notes: tuple[str, ...]) -> Source:
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    beside: Tensors = {}
    values: dict[str, Any] = {}
    for prefix, piece in pieces:
        for name, tensor in piece.tensors.items():
            if prefix + name in tensors:
                raise BadFile(f"{path}: tensor {prefix + name!r} is in two files", "shards.twice")
            tensors[prefix + name] = tensor
        metadata = {**piece.metadata, **metadata}
        beside |= {prefix + name: tensor for name, tensor in piece.beside.items()}
        values = {**piece.values, **values}
    told = tuple(note for _, piece in pieces for note in piece.notes)
    return Source(
        path,
        tensors,
        metadata,
        tuple(file for _, piece in pieces for file in piece.files),
        (*notes, *told),
        beside,
        values,
    )


def _folder_weights(folder: Path, variant: str | None, notes: list[str]) -> list[_Piece]:
    """The one set of weights to take from a folder; none if it has no weights at its top."""
    found: dict[str, list[Path]] = {}
    for kind in ("safetensors", "bin"):  # pickles only where there is nothing better
        for place in sorted(folder.iterdir()):
            match = _WEIGHTS.fullmatch(place.name)
            if match and match["kind"] == kind:
                found.setdefault(match["variant"] or match["late"] or "", []).append(place)
        if found:
            break
    if not found:
        return _loose(folder)
    order = [variant] if variant else ["", "fp16", "bf16", *sorted(found)]
    chosen = next((name for name in order if name in found), None)
    if chosen is None:
        raise MissingFile(f"no weights of variant {variant!r} in {str(folder)!r}; there are {sorted(found)}")
    others = sorted(set(found) - {chosen})
    if others:
        left = ", ".join(name or "without variant" for name in others)
        notes.append(f"{folder.name}: took {found[chosen][0].name}, left the weights {left}")
    whole = [place for place in found[chosen] if place.suffix != ".json"]
    if whole:
        return [_piece(whole[0])]
    if ".bin." in found[chosen][0].name:
        raise BadFile(
            f"{found[chosen][0]}: shards of pickles are not read; fetch the safetensors", "shards.pickles"
        )
    return [_safetensors(read_shards(found[chosen][0]))]


def _loose(folder: Path) -> list[_Piece]:
    """A folder that holds just one weight file under a name of its own."""
    files = sorted(folder.glob("*.safetensors"))
    files = files or sorted(
        place for place in folder.iterdir() if place.suffix.lower() in (*PICKLES, ".gguf")
    )
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise BadFile(
            f"{folder}: holds {len(files)} weight files ({names}), no index; name one", "folder.many"
        )
    return [_piece(files[0])] if files else []
