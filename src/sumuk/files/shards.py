"""Weights spread over several safetensors files, with an index that says which tensor lies where.

``model.safetensors.index.json`` holds ``{"weight_map": {tensor name: file name}}``; the files lie beside it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.safetensors import Header, read_header, regular

MAX_INDEX = 100_000_000
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
    try:
        table = json.loads(path.read_bytes())
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
        if not isinstance(shard, str) or not _PLAIN.fullmatch(shard):
            raise BadFile(f"{index}: {shard!r}, for tensor {name!r}, is no plain file name", "shards.name")
    headers: list[Header] = []
    found: dict[str, str] = {}
    for shard in sorted(set(where.values())):
        if not (index.parent / shard).exists():
            raise MissingFile(f"{index}: shard {shard!r} is missing; fetch it into {str(index.parent)!r}")
        header = read_header(index.parent / shard)
        headers.append(header)
        for name in header.tensors:
            if name in found:
                both = f"{found[name]!r} and in {shard!r}"
                raise BadFile(f"{index}: tensor {name!r} lies in {both}", "shards.twice")
            if where.get(name) != shard:
                said = f"says {where[name]!r}" if name in where else "does not list it"
                where_found = f"tensor {name!r} lies in {shard!r}"
                raise BadFile(f"{index}: {where_found}, but the index {said}", "shards.disagree")
            found[name] = shard
    if lost := sorted(set(where) - set(found)):
        raise BadFile(f"{index}: tensor {lost[0]!r} is not in {where[lost[0]]!r}", "shards.lost")
    return headers
