"""A pickle machine that can do nothing but describe: opcodes and names from short lists, every size counted first.

A pickle is a program for a stack machine (https://docs.python.org/3/library/pickletools.html). Python's own machine
imports and calls what the program names. This one keeps the part that real checkpoints use, and where a name would be
called it builds a node of :mod:`~sumuk.files.pickle_nodes` instead. What it refuses, by opcode: text protocols, calls
by ``INST`` and ``OBJ``, extension codes, ``POP`` and ``DUP`` (which hide a call's result), byte arrays, buffers.

It runs in a process of its own, see :mod:`~sumuk.files.pickle_child`; its budgets hold without one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from sumuk.files import pickle_calls
from sumuk.files.pickle_names import judge
from sumuk.files.pickle_nodes import (
    Foreign,
    Name,
    NumberType,
    Parameters,
    Refused,
    Storage,
    Table,
    refuse,
    shown,
)

MAX_STEPS = 6_000_000
"""Opcodes; a tensor takes 25 of them, so this is above what the largest allowed number of tensors needs."""
MAX_CONTAINERS = 2_000_000
"""Lists, dicts and tuples that a pickle makes."""
MAX_STACK = 200_000
"""Values that wait on one level of the stack; torch.save writes dicts in runs of 1,000."""
MAX_MARKS = 1_000
"""Levels of the stack, at most two for each level of nesting."""
MAX_WORD = 400
"""Length of a module's or a class's name."""

_REFUSED = {
    "0": "POP", "1": "POP_MARK", "2": "DUP", "i": "INST", "o": "OBJ", "\x82": "EXT1", "\x83": "EXT2",
    "\x84": "EXT4", "P": "PERSID", "\x96": "BYTEARRAY8", "\x97": "NEXT_BUFFER", "\x98": "READONLY_BUFFER",
    "I": "INT", "L": "LONG", "\x8b": "LONG4", "F": "FLOAT", "S": "STRING", "V": "UNICODE", "g": "GET", "p": "PUT",
    "d": "DICT", "l": "LIST",
}  # fmt: skip
"""Opcodes that exist and are left out, for the message."""


class Machine:
    """Runs one pickle.

    Args:
        data: bytes that hold it.
        at: offset of its first opcode; after :meth:`run`, behind its last.
        end: where the bytes end that it may take.
    """

    def __init__(self, data: Any, at: int, end: int) -> None:
        self.data = data
        self.at = at
        self.end = end
        self.size = end - at
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Name] = {}
        self.storages: dict[str, Storage] = {}
        self.steps = 0
        self.containers = 0
        self.copied = 0

    def run(self) -> Any:
        """What the pickle describes.

        Raises:
            Refused: by rule or budget; code ``opcode``, ``name``, ``call``, ``build``, ``pickle``, ``cut``, ``budget``,
                ``storage`` or ``tensor``.
        """
        try:
            while True:
                at = self.at
                if at >= self.end:
                    refuse("cut", "its pickle breaks off before its end; the file is damaged or cut off")
                op = self.data[at]
                self.at = at + 1
                if op == 0x2E:  # STOP
                    break
                action = _ACTIONS[op]
                if action is None:
                    name = _REFUSED.get(chr(op), f"{op:#04x}")
                    refuse(
                        "opcode",
                        f"its pickle has the opcode {name} at byte {at}, which torch.save never writes",
                    )
                action(self)
                self.steps += 1
                if self.steps > MAX_STEPS or len(self.stack) > MAX_STACK or self.containers > MAX_CONTAINERS:
                    refuse("budget", f"its pickle is larger than any checkpoint's after {self.steps} opcodes")
            result = self.stack.pop()
            if self.stack or self.marks:
                refuse("pickle", "its pickle ends with more than one value on the stack")
        except IndexError:
            refuse("pickle", f"its pickle takes a value that is not there, at byte {self.at}")
        return result

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle, which must be there."""
        at = self.at
        if count > self.end - at:
            refuse("cut", f"its pickle asks for {count} bytes at byte {at}, where {self.end - at} are left")
        self.at = at + count
        piece: bytes = self.data[at : at + count]
        return piece

    def byte(self) -> int:
        at = self.at
        if at >= self.end:
            self.take(1)
        self.at = at + 1
        value: int = self.data[at]
        return value

    def number(self, size: int) -> int:
        if size == 1:
            return self.byte()
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, min(self.end, self.at + MAX_WORD))
        if end < 0:
            code = "cut" if self.end - self.at < MAX_WORD else "pickle"
            refuse(code, f"its pickle has a name without an end at byte {self.at}")
        raw = self.take(end - self.at)
        self.at += 1
        return _decode(raw)

    def items(self) -> list[Any]:
        """What was pushed since the last mark."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def made(self, container: Any) -> None:
        self.containers += 1
        self.stack.append(container)

    # One method an opcode from here on, in the order of the table below.

    def mark(self) -> None:
        if len(self.marks) >= MAX_MARKS:
            refuse("budget", f"its pickle nests deeper than {MAX_MARKS // 2} levels")
        self.marks.append(self.stack)
        self.stack = []

    def protocol(self) -> None:
        if (version := self.number(1)) not in (2, 3, 4, 5) or self.steps:
            refuse("pickle", f"its pickle says protocol {version} at byte {self.at - 2}")

    def frame(self) -> None:
        size = self.number(8)
        if size > self.end - self.at:
            refuse("cut", f"its pickle has a frame of {size} bytes, where {self.end - self.at} are left")

    def text(self, size: int) -> None:
        self.stack.append(_decode(self.take(self.number(size))))

    def old_text(self, size: int) -> None:
        raw = self.take(self.number(size))
        self.stack.append(_decode(raw) if raw.isascii() else raw)

    def put(self, index: int) -> None:
        if index > self.steps:
            refuse("budget", f"its pickle numbers a value {index} after {self.steps} opcodes")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            refuse("pickle", f"its pickle recalls value {index}, which it never kept")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        taken = tuple(self.stack[-count:])
        if len(taken) < count:
            raise IndexError
        del self.stack[-count:]
        self.made(taken)

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            refuse("name", f"names a class by {shown(module)} and {shown(name)}")
        known = self.names.get((module, name))
        if known is None:
            known = self.names[module, name] = judge(module, name)
        self.stack.append(known)

    def stack_name(self) -> None:
        name = self.stack.pop()
        self.name(self.stack.pop(), name)

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Name) or not isinstance(args, tuple):
            refuse("call", f"its pickle calls {shown(function)}, which is no class")
        # What a call describes may be a copy of an argument, and an argument may be recalled a million times.
        self.copied += sum(map(_length, args), len(args))
        if self.copied > 1_000_000 + 4 * self.size:
            refuse("budget", "its pickle copies the same values again and again")
        self.made(pickle_calls.call(function, args))

    def new_with_keywords(self) -> None:
        keywords = self.stack.pop()
        args = self.stack.pop()
        kind = self.stack.pop()
        if (
            not isinstance(kind, Name)
            or kind.known
            or not isinstance(args, tuple)
            or type(keywords) is not Table
        ):
            refuse("call", f"its pickle makes an object of {shown(kind)} with keywords")
        self.made(Foreign(kind.dotted, [*args, keywords]))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        keys = state.flat[::2] if type(state) is Table else []
        if "__class__" in keys:
            refuse("build", "its pickle sets the class of an object")
        if type(target) is Foreign:
            target.parts.append(state)
        elif type(target) is Parameters and type(state) is Table:
            table = state.get("_parameters")
            if type(table) is not Table:
                refuse("build", "its ParameterDict has no table of parameters")
            target.table = table
        elif type(target) is NumberType and isinstance(state, tuple) and len(state) > 1:
            target.order = (
                state[1] if state[1] in ("<", ">", "|", "=") else refuse("build", "sets a strange byte order")
            )
        elif type(target) is not Table or type(state) is not Table or keys != ["_metadata"]:
            refuse(
                "build",
                f"its pickle sets attributes of {shown(target)}; only classes of trainers may have some",
            )

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if len(pairs) % 2:
            refuse("pickle", "its pickle sets a key without a value")
        if type(target) is Table:
            target.flat += pairs
        elif type(target) is Foreign:
            target.parts += pairs
        else:
            refuse("build", f"its pickle sets a key of {shown(target)}, which is no dict")

    def persistent(self) -> None:
        found = pickle_calls.storage(self.stack.pop())
        if isinstance(found, Storage):
            known = self.storages.setdefault(found.key, found)
            if (known.kind, known.count) != (found.kind, found.count):
                refuse("storage", f"its pickle describes the storage {shown(found.key)} in two ways")
            found = known
        self.stack.append(found)

    def set_item(self) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target += items
        elif type(target) is Foreign:
            target.parts += items
        else:
            refuse("build", f"its pickle appends to {shown(target)}, which is no list")


def _length(value: object) -> int:
    if isinstance(value, Table):
        return len(value.flat)
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("pickle", f"its pickle has a text that is not UTF-8: {shown(raw, 30)}") from error


def _push(value: Any) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value)


def _actions() -> list[Callable[[Machine], None] | None]:
    def word(size: int) -> Callable[[Machine], None]:
        return lambda m: m.stack.append(m.number(size))

    def raw(size: int) -> Callable[[Machine], None]:
        return lambda m: m.stack.append(m.take(m.number(size)))

    table: dict[int, Callable[[Machine], None]] = {
        0x28: Machine.mark,
        0x80: Machine.protocol,
        0x95: Machine.frame,
        ord("N"): _push(None),
        0x88: _push(True),
        0x89: _push(False),
        ord("K"): lambda m: m.stack.append(m.byte()),
        ord("M"): word(2),
        ord("J"): lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True)),
        0x8A: lambda m: m.stack.append(int.from_bytes(m.take(m.number(1)), "little", signed=True)),  # LONG1
        ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
        ord("X"): lambda m: m.text(4),
        0x8C: lambda m: m.text(1),
        0x8D: lambda m: m.text(8),
        ord("U"): lambda m: m.old_text(1),
        ord("T"): lambda m: m.old_text(4),
        ord("C"): raw(1),
        ord("B"): raw(4),
        0x8E: raw(8),
        ord("q"): lambda m: m.put(m.byte()),
        ord("r"): lambda m: m.put(m.number(4)),
        0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
        ord("h"): lambda m: m.get(m.byte()),
        ord("j"): lambda m: m.get(m.number(4)),
        ord(")"): _push(()),
        ord("t"): lambda m: m.made(tuple(m.items())),
        0x85: lambda m: m.tuple_of(1),
        0x86: lambda m: m.tuple_of(2),
        0x87: lambda m: m.tuple_of(3),
        ord("]"): lambda m: m.made([]),
        0x8F: lambda m: m.made([]),  # EMPTY_SET
        ord("a"): lambda m: m.add([m.stack.pop()]),
        ord("e"): lambda m: m.add(m.items()),
        0x90: lambda m: m.add(m.items()),  # ADDITEMS
        0x91: lambda m: m.made(m.items()),  # FROZENSET
        ord("}"): lambda m: m.made(Table()),
        ord("s"): Machine.set_item,
        ord("u"): lambda m: m.set_items(m.items()),
        ord("c"): lambda m: m.name(m.line(), m.line()),
        0x93: Machine.stack_name,
        ord("R"): Machine.reduce,
        0x81: Machine.reduce,  # NEWOBJ: the same, for a class
        0x92: Machine.new_with_keywords,
        ord("b"): Machine.build,
        ord("Q"): Machine.persistent,
    }
    return [table.get(op) for op in range(256)]


_ACTIONS = _actions()
