"""From the nodes of a pickle to plain JSON: each tensor by its path, values beside them, names of foreign classes.

Nodes are shared: a list of two references to a list of two references ... of 40 levels is a kilobyte in the file and
2^40 leaves as a tree. So the tree's size and depth are worked out before it is walked, each shared node once.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

from sumuk.files.pickle_names import DTYPES
from sumuk.files.pickle_nodes import (
    Foreign,
    Name,
    NumberType,
    Parameters,
    Storage,
    Table,
    View,
    refuse,
    shown,
)
from sumuk.files.pickles import Machine

MAX_TENSORS = 50_000
MAX_KEY = 500
MAX_DEPTH = 64
MAX_LEAVES = 2_000_000
"""Values of the tree; lists of a million numbers are the longest that real files hold."""
MAX_SHARED = 8
"""How often, on average, an element may be part of a tensor: shared weights and an average of them are two or three."""
MAX_TEXT = 32 * 2**20
"""Characters of names and texts together, as the tree repeats them."""

MAGIC = 0x1950A86A20F9469CFC6C
"""First value of a file from before torch.save wrote ZIP archives."""
PROTOCOL = 1001

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NOTHING = object()
"""In place of what is no plain value, so that a table made of tensors alone leaves no empty table behind."""


def answer(data: Any, at: int, end: int) -> dict[str, Any]:
    """What the one pickle of a ZIP archive holds.

    Returns:
        ``tensors``: ``[name, storage, type, offset, size, stride]`` each; ``storages``: key -> ``[type, elements]``;
        ``values``; ``foreign``: ``[name, times, where]`` each.

    Raises:
        Refused: see :meth:`~sumuk.files.pickles.Machine.run`; also code ``key``, ``object``.
    """
    machine = Machine(data, at, end)
    root = machine.run()
    if machine.at != end:
        refuse("pickle", f"its pickle has {end - machine.at} bytes behind its end")
    return _Tree(root, machine.storages).answer


def legacy_answer(data: Any, at: int, end: int) -> dict[str, Any]:
    """What a file from before ZIP archives holds: five pickles, then the storages.

    Returns:
        as :func:`answer`, and ``order``: the keys of the storages in the file; ``end``: where the pickles end.
    """
    parts = []
    storages: dict[str, Storage] = {}
    for index in range(5):
        machine = Machine(data, at, end)
        parts.append(machine.run())
        at = machine.at
        storages |= machine.storages
        if index == 0 and parts[0] != MAGIC:
            refuse("kind", "is a pickle, but not of torch.save: its first value is no magic number")
    system, root, order = parts[2:]
    if parts[1] != PROTOCOL or type(system) is not Table:
        refuse("kind", f"is a PyTorch file of the unknown version {shown(parts[1])}")
    if system.get("little_endian") is not True:
        refuse("byteorder", "was written by a machine with another byte order; save it again on a usual one")
    if type(order) is not list or not all(type(key) is str for key in order) or len(set(order)) < len(order):
        refuse("storage", "has no list of its storages")
    return {**_Tree(root, storages).answer, "order": order, "end": at}


class _Tree:
    """Walks the nodes once, with what they amount to known before."""

    def __init__(self, root: object, storages: dict[str, Storage]) -> None:
        self.amounts: dict[int, tuple[int, int, int, int, int]] = {}
        self.tensors: list[list[Any]] = []
        self.foreign: dict[str, list[Any]] = {}
        self.inside: set[int] = set()
        self.written = 0
        if not isinstance(root, Table | list | tuple | Parameters):
            remedy = (
                "save its state_dict()" if isinstance(root, Foreign) else "save a dict of tensors with names"
            )
            refuse("object", f"holds {shown(root, 100)}, no dict of tensors; {remedy}")
        elements, stored = self.amount(root, 0)[4], sum(one.count for one in storages.values())
        if elements > MAX_SHARED * stored + 2**20:
            refuse("budget", f"its tensors stand for {elements} elements, but only {stored} are stored")
        values = self.walk(root, "")
        if isinstance(values, list):
            values = {str(at): value for at, value in enumerate(values) if value is not None}
        self.answer: dict[str, Any] = {
            "tensors": self.tensors,
            "storages": {key: [one.kind, one.count] for key, one in storages.items()},
            "values": values if isinstance(values, dict) else {},
            "foreign": [[name, *rest] for name, rest in self.foreign.items()],
        }

    def amount(self, node: Any, depth: int) -> tuple[int, int, int, int, int]:
        """Levels, leaves, characters, tensors and their elements of the tree below a node."""
        if type(node) is Parameters:
            node = node.table
        if type(node) is View:
            return 0, 1, 0, 1, prod(node.size)
        if type(node) in (str, bytes):
            return 0, 1, len(node), 0, 0
        if type(node) is int:
            return 0, 1, node.bit_length() // 3, 0, 0
        if type(node) not in (Table, list, tuple):
            return 0, 1, 0, 0, 0
        known = self.amounts.get(id(node))
        if known is None:
            if depth > MAX_DEPTH:
                refuse("budget", f"nests deeper than {MAX_DEPTH} levels")
            self.amounts[id(node)] = (MAX_DEPTH + 1, 0, 0, 0, 0)  # met again below itself, it is too deep
            parts = node.flat if type(node) is Table else node
            levels, leaves, text, tensors, elements = 0, 1, 0, 0, 0
            for part in parts:
                some = self.amount(part, depth + 1)
                levels = max(levels, some[0])
                leaves, text, tensors, elements = (
                    leaves + some[1], text + some[2], tensors + some[3], elements + some[4]
                )  # fmt: skip
            known = self.amounts[id(node)] = (levels + 1, leaves, text, tensors, elements)
        if known[0] > MAX_DEPTH:
            refuse("budget", f"nests deeper than {MAX_DEPTH} levels, or a list holds itself")
        if known[1] > MAX_LEAVES or known[2] > MAX_TEXT or known[3] > MAX_TENSORS:
            refuse(
                "budget",
                f"unfolds to at least {known[1]} values, {known[3]} tensors and {known[2]} letters of text,"
                " more than any checkpoint",
            )
        return known

    def walk(self, node: Any, path: str) -> Any:
        if node is None or type(node) in (bool, int, float, str):
            return node
        if type(node) is View:
            return self.tensor(node, path)
        if type(node) is Parameters:
            node = node.table
        if type(node) is Table:
            return self.table(node, path)
        if type(node) in (list, tuple):
            found = [self.walk(part, f"{path}.{at}" if path else str(at)) for at, part in enumerate(node)]
            if found and all(one is _NOTHING for one in found):
                return _NOTHING
            return [None if one is _NOTHING else one for one in found]
        if type(node) is Name and node.dotted.removeprefix("torch.") in DTYPES:
            return node.dotted
        self.strange(node, path)
        return _NOTHING

    def table(self, table: Table, path: str) -> Any:
        values = {}
        keys = set()
        for at in range(0, len(table.flat), 2):
            key = self.key(table.flat[at], path)
            if key in keys:
                refuse("key", f"has the key {shown(key)} twice in {shown(path) if path else 'its dict'}")
            keys.add(key)
            value = self.walk(table.flat[at + 1], f"{path}.{key}" if path else key)
            if value is not _NOTHING:
                values[key] = value
        return values if values or not keys else _NOTHING

    def key(self, key: object, path: str) -> str:
        if type(key) is int and abs(key) < 2**63:
            return str(key)
        if type(key) is Name and not key.known:  # trainers of 2021 kept their callbacks' states by class
            self.strange(key, path)
            return key.dotted
        if type(key) is not str or not key or len(key) > MAX_KEY:
            what = "an empty key" if key == "" else f"the key {shown(key)}"
            refuse(
                "key", f"has {what} in {shown(path) if path else 'its dict'}; keys are texts or whole numbers"
            )
        self.written += len(key)
        return key

    def tensor(self, view: View, name: str) -> Any:
        if not name or len(name) > MAX_KEY or _CONTROL.search(name):
            refuse("key", f"tensor name {shown(name)} is above {MAX_KEY} characters or not printable")
        if name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
            refuse("key", f"tensor name {shown(name)} is a path out of its folder")
        self.written += len(name)
        if self.written > MAX_TEXT:
            refuse("budget", "has longer names of tensors than any checkpoint")
        self.tensors.append(
            [name, view.storage.key, view.kind, view.offset, list(view.size), list(view.stride)]
        )
        return _NOTHING

    def strange(self, node: Any, path: str) -> None:
        """Note the classes of an object that is left out, and of what it holds."""
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if id(one) in self.inside:
                continue
            self.inside.add(id(one))
            if type(one) in (Table, list, tuple):
                waiting += one.flat if type(one) is Table else one
                continue
            name = {Foreign: "name", Name: "dotted"}.get(type(one))
            kinds = {bytes: "bytes", Storage: "torch.Storage", NumberType: "numpy.dtype"}
            dotted = getattr(one, name) if name else kinds.get(type(one))
            if type(one) is View and one is not node:
                dotted = "torch.Tensor"
            if type(one) is Foreign:
                waiting += one.parts
            if dotted and not (type(one) is Name and one.known and one is not node):
                self.foreign.setdefault(dotted, [0, path])[0] += 1
