"""Where weights lie: one file, a set of shards, or a folder with one network in each subfolder.

All three become one table of lazy tensors. In a diffusers folder names carry their subfolder
(``unet/conv_in.weight``), so that layouts tell the networks apart.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.safetensors import Header, read_header
from sumuk.files.shards import read_json, read_shards
from sumuk.files.tensors import Tensors, from_header

_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model|pytorch_model)(?:\.(?P<variant>[A-Za-z0-9_]+))?\.safetensors"
    r"(?P<index>\.index(?:\.(?P<late>[A-Za-z0-9_]+))?\.json)?"
)
PICKLES = (".ckpt", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Source:
    """Weights on disk, headers read and checked, nothing loaded.

    Attributes:
        path: the file or folder that was named.
        tensors: by name; in a folder below ``subfolder/``.
        metadata: texts of the headers; in a folder those of the first file that has each.
        files: the weight files, in a stable order.
        notes: choices made among several files, for the user.
    """

    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def config(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder (``vae/config.json``); empty if there is none."""
        path = self.path / name
        return read_json(path) if self.path.is_dir() and path.exists() else {}


def read(path: str | os.PathLike[str], variant: str | None = None) -> Source:
    """Read the headers of a ``.safetensors`` file, an ``.index.json``, or a folder.

    Args:
        path: where the weights are.
        variant: which files of a diffusers folder to take, ``fp16`` for ``model.fp16.safetensors``; by
            default those without a variant, and where there are none, ``fp16`` or whichever there is.

    Raises:
        MissingFile: nothing there, or no weights in the folder.
        BadFile: a header that breaks the rules of its format.
    """
    path = Path(path)
    if not path.is_dir():
        headers = read_shards(path) if path.name.endswith(".json") else [read_header(path)]
        return _source(path, [("", header) for header in headers], ())
    notes: list[str] = []
    headers = _folder_weights(path, variant, notes)
    if headers:
        return _source(path, [("", header) for header in headers], tuple(notes))
    below = []
    for folder in sorted(place for place in path.iterdir() if place.is_dir()):
        below += [(f"{folder.name}/", header) for header in _folder_weights(folder, variant, notes)]
    if not below:
        pickles = sorted(p.name for p in path.rglob("*") if p.suffix in PICKLES)
        there = f"; it holds the pickle {pickles[0]!r}: convert it to safetensors" if pickles else ""
        raise MissingFile(f"no safetensors weights in the folder {str(path)!r} or its subfolders{there}")
    return _source(path, below, tuple(notes))


def _source(path: Path, headers: list[tuple[str, Header]], notes: tuple[str, ...]) -> Source:
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for prefix, header in headers:
        for name, tensor in from_header(header).items():
            if prefix + name in tensors:
                raise BadFile(f"{path}: tensor {prefix + name!r} is in two files", "shards.twice")
            tensors[prefix + name] = tensor
        metadata = {**header.metadata, **metadata}
    return Source(path, tensors, metadata, tuple(header.path for _, header in headers), notes)


def _folder_weights(folder: Path, variant: str | None, notes: list[str]) -> list[Header]:
    """The headers of the one set of weights to take from a folder; none if it has no weights at its top."""
    found: dict[str, list[Path]] = {}
    for place in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(place.name):
            found.setdefault(match["variant"] or match["late"] or "", []).append(place)
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
    whole = [place for place in found[chosen] if place.suffix == ".safetensors"]
    return [read_header(whole[0])] if whole else read_shards(found[chosen][0])


def _loose(folder: Path) -> list[Header]:
    """A folder that holds just one weight file under a name of its own."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise BadFile(
            f"{folder}: holds {len(files)} weight files ({names}), no index; name one", "folder.many"
        )
    return [read_header(files[0])] if files else []
