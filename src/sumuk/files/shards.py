"""Weights spread over several safetensors files, with an index that says which tensor lies where.

``model.safetensors.index.json`` holds ``{"weight_map": {tensor name: file name}}``; the files lie beside it. Whether
read or written, a set is whole: the index is what names it, so it is written when all that it names is there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.files.atomic import replacing
from sumuk.files.metered import Meter
from sumuk.files.safetensors import MAX_HEADER, Header, read_header, regular, shown, swells
from sumuk.files.tensors import Lazy, length, write

MAX_INDEX = MAX_HEADER
MAX_FILE_NAME = 255
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]*\.safetensors")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file that holds one table (an index, a configuration).

    Raises:
        MissingFile: no such file.
        BadFile: too large, not UTF-8, not JSON, or no table.
    """
    path = regular(path)
    if path.stat().st_size > MAX_INDEX:
        raise BadFile(f"{path}: {path.stat().st_size} bytes are too many for a JSON file", "json.size")
    raw = path.read_bytes()
    if too_much := swells(raw):
        raise BadFile(f"{path}: {too_much}", "json.size")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: is not JSON: {error}", "json.parse") from None
    if not isinstance(table, dict):
        raise BadFile(f"{path}: holds {type(table).__name__}, not a table", "json.kind")
    return table


def read_shards(index: str | os.PathLike[str]) -> list[Header]:
    """The headers of all shards that an index names, checked against it: each tensor lies in exactly one.

    Raises:
        MissingFile: a shard is not there.
        BadFile: the index names files outside its folder, or disagrees with its shards; code ``shards.*``.
    """
    index = Path(index)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise BadFile(f"{index}: has no weight_map that says where tensors lie", "shards.map")
    for name, shard in where.items():
        if not isinstance(shard, str) or len(shard) > MAX_FILE_NAME or not _PLAIN.fullmatch(shard):
            raise BadFile(
                f"{index}: {shard!r:.80}, for tensor {shown(name)}, is no plain file name", "shards.name"
            )
    headers: list[Header] = []
    found: dict[str, str] = {}
    for shard in sorted(set(where.values())):
        if not (index.parent / shard).exists():
            raise MissingFile(
                f"{index}: shard {shown(shard)} is missing; fetch it into {str(index.parent)!r}"
            )
        header = read_header(index.parent / shard)
        headers.append(header)
        for name in header.tensors:
            if name in found:
                both = f"{shown(found[name])} and in {shown(shard)}"
                raise BadFile(f"{index}: tensor {shown(name)} lies in {both}", "shards.twice")
            if where.get(name) != shard:
                said = f"says {shown(where[name])}" if name in where else "does not list it"
                where_found = f"tensor {shown(name)} lies in {shown(shard)}"
                raise BadFile(f"{index}: {where_found}, but the index {said}", "shards.disagree")
            found[name] = shard
    if lost := sorted(set(where) - set(found)):
        raise BadFile(f"{index}: tensor {shown(lost[0])} is not in {shown(where[lost[0]])}", "shards.lost")
    return headers


def write_shards(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    *,
    digest: str | None = None,
    settle: Callable[[], Mapping[str, str]] | None = None,
    meter: Meter | None = None,
) -> tuple[Path, ...]:
    """Write one file, or, where the tensors take more than ``shard_bytes``, several and an index beside them.

    ``model.safetensors`` becomes ``model-00001-of-00003.safetensors`` and so on, with
    ``model.safetensors.index.json``. The index is written last, and no shard takes the place of one that an older
    index names: whoever reads sees the old set or the new one. What only the old one had is removed at the end.

    Args:
        path: the name of a single file.
        tensors: name -> tensor.
        metadata: free texts; of several files the first holds them.
        shard_bytes: the most tensor bytes of a file; a larger tensor has one for itself. None: a single file.
        digest, settle: see :func:`~sumuk.files.tensors.write`; not for sets, as a digest would be of one shard alone.
        meter: told of the bytes written.

    Returns:
        The weight files, without the index.

    Raises:
        BadInput: a set of the same names is there, or a single file that would be read in its place.
        BadFile: writing failed; what was there before is as it was.
    """
    path = Path(path)
    groups = [sorted(tensors)] if shard_bytes is None else _groups(tensors, shard_bytes)
    if len(groups) == 1:
        write(path, tensors, metadata, digest=digest, settle=settle, meter=meter)
        return (path,)
    stem, index = path.name.removesuffix(".safetensors"), index_of(path)
    names = [f"{stem}-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    if not _PLAIN.fullmatch(names[0]):
        raise BadInput(
            f"shards cannot be named {names[0]!r}: only letters, digits, '_', '-', '.' and blanks are read"
        )
    if path.exists():
        raise BadInput(
            f"{str(path)!r} is there and would be read instead of the shards; move it or give another name"
        )
    old = set(_named(index)) if index.exists() else set()
    if old & set(names):
        raise BadInput(
            f"{str(index)!r} names shards that would have the same names; give another name or remove that set"
        )
    made = [path.with_name(name) for name in names]
    try:
        for shard, own in zip(made, groups, strict=True):
            texts = metadata if shard is made[0] else {"format": "pt"}
            write(shard, {name: tensors[name] for name in own}, texts, meter=meter)
        where = {name: shard for shard, own in zip(names, groups, strict=True) for name in own}
        total = sum(length(one) for one in tensors.values())
        table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        with replacing(index) as file:
            file.write((json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())
    except BaseException:
        if not (index.exists() and names[0] in _named(index)):  # else it is too late: the set is there
            for shard in made:
                shard.unlink(missing_ok=True)
        raise
    for name in old:
        (path.parent / name).unlink(missing_ok=True)
    return tuple(made)


def index_of(path: Path) -> Path:
    """Where the index of a sharded ``model.safetensors`` lies."""
    return path.with_name(path.name + ".index.json")


def _named(index: Path) -> list[str]:
    """The shards that an index names, those that lie beside it."""
    where = read_json(index).get("weight_map")
    shards = where.values() if isinstance(where, dict) else ()
    return [name for name in shards if isinstance(name, str) and _PLAIN.fullmatch(name)]


def _groups(tensors: Mapping[str, Lazy], most: int) -> list[list[str]]:
    """Names in order, as many to a group as fit."""
    groups: list[list[str]] = [[]]
    room = most
    for name in sorted(tensors):
        if length(tensors[name]) > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= length(tensors[name])
    return groups
