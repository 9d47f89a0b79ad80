"""PyTorch's pickled files (``.ckpt .pt .pth .bin``), ZIP or older, read without torch's loader and without trust.

1. The container is read strictly (:mod:`~sumuk.files.ckpt_zip`): every byte accounted for, nothing compressed.
2. Its pickle is run by a machine that can only describe (:mod:`~sumuk.files.pickles`), in a process of its own that has
   given up memory, files and time (:mod:`~sumuk.files.pickle_child`).
3. What comes back is checked again here: each tensor must lie within a storage that is there.
4. Numbers are mapped when they are asked for (:mod:`~sumuk.files.ckpt_data`).

Nothing that a file names is imported or called. Objects of other programs' classes are left out and told by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from sumuk.base.errors import BadFile
from sumuk.files.ckpt_data import Look, Run, Storages, crc, wrong_crc
from sumuk.files.ckpt_kind import LOOK, kind_of
from sumuk.files.ckpt_process import in_child
from sumuk.files.ckpt_zip import Entry, read_entries
from sumuk.files.pickle_calls import MAX_DIMENSIONS
from sumuk.files.safetensors import BITS, regular, stamp
from sumuk.files.tensors import Lazy, Tensors

MAX_PICKLE = 32 * 2**20
"""Bytes; 130,000 tensors."""
CHECKED_AT_ONCE = 32 * 2**20
"""Files up to this size are checked against their CRC32 when they are opened, larger ones tensor by tensor."""

_NOTES = {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
_DATA = re.compile(r"data/([A-Za-z0-9_]{1,64})")

Interpret = Callable[[BinaryIO, str, int, int], dict[str, Any]]
"""File, kind (``"zip"``, ``"legacy"``), offset and length of the pickle to the machine's answer."""


@dataclass(frozen=True)
class Pickled:
    """What a pickled file holds.

    Attributes:
        path: the file.
        tensors: by their path through dicts and lists: ``state_dict.model.x``, ``768.0.linear.0.weight``.
        values: what is no tensor, nested as it was; keys are texts, tuples and sets are lists, and None stands in a
            list for what is left out.
        foreign: classes of objects that were left out, each with how often and where it was met first.
    """

    path: Path
    tensors: Tensors
    values: dict[str, Any]
    foreign: tuple[str, ...]


def read_ckpt(path: str | os.PathLike[str]) -> Pickled:
    """Read what a PyTorch file holds; numbers stay on disk, but files below 32 MiB are checked whole.

    Raises:
        MissingFile: no such file.
        BadFile: hostile, damaged, or not of torch.save; ``code`` begins with ``ckpt.``.
    """
    return read_with(path, in_child)


def read_with(path: str | os.PathLike[str], interpret: Interpret) -> Pickled:
    """:func:`read_ckpt` with another way to run the machine."""
    path = regular(path)
    before = stamp(path)
    refuse = partial(_refuse, path)
    with path.open("rb", buffering=0) as file:
        first = _read(file, 0, LOOK)
        if first[:4] == b"PK\x03\x04":
            found, runs, checked = _zip(file, path, before[2], interpret, refuse)
        elif first[:1] == b"\x80":
            found, runs = _legacy(file, before[2], interpret, refuse)
            checked = set()
        else:
            refuse("kind", f"is {kind_of(first, before[2])}")
    if stamp(path) != before:
        refuse("changed", "changed while it was read; wait until it is complete")
    storages = Storages(path, before, runs, checked)
    looks = _looks(found["tensors"], runs, found["storages"], refuse)
    tensors = {
        name: Lazy(look.size, look.kind, partial(storages.tensor, name, look), str(path))
        for name, look in looks.items()
    }
    foreign = tuple(
        f"{name} ({times} time{'s' * (times > 1)}, first at {where!r:.200})"
        for name, times, where in found["foreign"]
    )
    return Pickled(path, tensors, found["values"], foreign)


def _refuse(path: Path, code: str, what: str) -> NoReturn:
    raise BadFile(f"{path}: {what}", f"ckpt.{code}")


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _zip(
    file: BinaryIO, path: Path, size: int, interpret: Interpret, refuse: Callable[[str, str], NoReturn]
) -> tuple[dict[str, Any], dict[str, Run], set[str]]:
    entries = read_entries(partial(_read, file), size, refuse)
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) > 1:
        refuse("zip", f"its archive holds {len(roots)} pickles: {roots[0]!r:.80} and {roots[1]!r:.80}")
    if not roots or "/" in roots[0]:
        refuse("zip", "its archive has its pickle at a place where torch.save does not put it")
    runs = {}
    notes: dict[str, Entry] = {}
    for name, entry in entries.items():
        inner = name.removeprefix(roots[0] + "/")
        if match := _DATA.fullmatch(inner):
            runs[match[1]] = Run(entry.start, entry.size, entry.crc)
        elif inner == "data.pkl" or (inner in _NOTES and entry.size <= 100):
            notes[inner] = entry
        else:
            refuse("zip", f"its archive holds {name!r:.80}, which torch.save does not write")
    small = sum(entry.size for entry in entries.values()) <= CHECKED_AT_ONCE
    pickle = notes["data.pkl"]
    if not 0 < pickle.size <= MAX_PICKLE:
        refuse("budget", f"its pickle has {pickle.size} bytes; 1 to {MAX_PICKLE} are read")
    for name, entry in entries.items():
        if small or entry in notes.values():
            raw = _read(file, entry.start, entry.size)
            if len(raw) < entry.size or crc(memoryview(raw)) != entry.crc:
                wrong_crc(path, f"entry {name!r}")
    if "byteorder" in notes:
        order = _read(file, notes["byteorder"].start, notes["byteorder"].size)
        if order != b"little":
            refuse(
                "byteorder", f"has the byte order {order[:20]!r}; save it again on a little-endian machine"
            )
    found = interpret(file, "zip", pickle.start, pickle.size)
    _answered(found, refuse)
    for key, (kind, count) in found["storages"].items():
        if key not in runs:
            refuse("storage", f"its archive lacks 'data/{key}', which its pickle speaks of; fetch it again")
        need = count * BITS[kind or "U8"] // 8
        if runs[key].size != need:
            refuse("storage", f"its storage {key!r} has {runs[key].size} bytes, but its pickle says {need}")
    return found, runs, set(runs) if small else set()


def _legacy(
    file: BinaryIO, size: int, interpret: Interpret, refuse: Callable[[str, str], NoReturn]
) -> tuple[dict[str, Any], dict[str, Run]]:
    found = interpret(file, "legacy", 0, min(size, MAX_PICKLE))
    _answered(found, refuse)
    at, order, known = found.get("end"), found.get("order"), found["storages"]
    if not isinstance(at, int) or not isinstance(order, list) or sorted(order) != sorted(known):
        refuse("storage", "lists other storages than its pickle speaks of")
    runs = {}
    for key in order:
        kind, count = known[key]
        said = int.from_bytes(_read(file, at, 8), "little")
        need = count * BITS[kind or "U8"] // 8
        if at + 8 + need > size:
            refuse(
                "cut",
                f"is cut off: its storage {key!r} ends at byte {at + 8 + need} of {size}; fetch it again",
            )
        if said != count:
            refuse("storage", f"its storage {key!r} has {said} elements, but its pickle says {count}")
        runs[key] = Run(at + 8, need, None)
        at += 8 + need
    if at != size:
        refuse("tail", f"has {size - at} bytes behind its last storage")
    return found, runs


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _answered(found: Mapping[str, Any], refuse: Callable[[str, str], NoReturn]) -> None:
    """Hold the machine's answer to its form: it comes from the process that read what a stranger wrote."""
    if "refused" in found:
        refuse(*found["refused"])
    right = (
        isinstance(found.get("values"), dict)
        and isinstance(found.get("tensors"), list)
        and isinstance(found.get("storages"), dict)
        and all(
            isinstance(one, list) and len(one) == 2 and one[0] in ("", *BITS) and _is_size(one[1])
            for one in found["storages"].values()
        )
        and isinstance(found.get("foreign"), list)
        and all(
            isinstance(one, list) and [type(part) for part in one] == [str, int, str]
            for one in found["foreign"]
        )
    )
    if not right:
        refuse("limits", "its pickle was read to an answer that makes no sense; please report this file")


def _looks(
    tensors: list[Any],
    runs: Mapping[str, Run],
    storages: Mapping[str, Any],
    refuse: Callable[[str, str], NoReturn],
) -> dict[str, Look]:
    """Each tensor where it lies, checked against the bytes that are there."""
    looks: dict[str, Look] = {}
    for one in tensors:
        right = (
            isinstance(one, list)
            and len(one) == 6
            and all(isinstance(part, str) for part in one[:3])
            and one[1] in storages
            and one[2] in BITS
            and _is_size(one[3])
            and all(
                isinstance(part, list) and len(part) <= MAX_DIMENSIONS and all(map(_is_size, part))
                for part in one[4:]
            )
            and len(one[4]) == len(one[5])
        )
        if not right:
            refuse("limits", "its pickle was read to an answer that makes no sense; please report this file")
        name, key, kind, offset, size, stride = one
        if name in looks:
            refuse("key", f"has two tensors that are both called {name!r:.90} when paths are joined by dots")
        look = looks[name] = Look(key, kind, offset, tuple(size), tuple(stride))
        if fault := look.fault(runs[key].size):
            refuse("tensor", f"tensor {name!r:.90} {fault}")
    return looks
