"""What the pickle machine makes instead of objects: inert descriptions, and the one error that it raises.

These modules (``pickle_*`` and ``pickles``) run in a bare interpreter of their own, so they import nothing but the
standard library and each other, and hold to plain classes with slots: a large file makes a million of them.
"""

from __future__ import annotations

from typing import Any, NoReturn


class Refused(Exception):
    """The pickle breaks a rule.

    Args:
        code: which one, short and stable.
        what: a sentence on the file, without its name.
    """

    def __init__(self, code: str, what: str) -> None:
        super().__init__(code, what)
        self.code = code
        self.what = what


def refuse(code: str, what: str) -> NoReturn:
    """Raise :class:`Refused`."""
    raise Refused(code, what)


def shown(value: object, most: int = 60) -> str:
    """A value from the file for a message: short, on one line, without what could steer a terminal."""
    if isinstance(value, int) and value.bit_length() > 512:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Name | Foreign):
        return shown(value.dotted if isinstance(value, Name) else value.name, most)
    plain = isinstance(value, str | bytes | int | float | bool | None)
    text = ascii(value) if plain else _WORDS.get(type(value), "a value")
    return text if len(text) <= most else text[: most - 3] + "..."


class Name:
    """A class or function that the pickle names; it is never imported.

    Attributes:
        dotted: module and name.
        known: it is one of those that the machine has a description for.
    """

    __slots__ = ("dotted", "known")

    def __init__(self, dotted: str, known: bool) -> None:
        self.dotted = dotted
        self.known = known


class Table:
    """A dict of any kind; ``flat`` is key, value, key, value, as keys need not be hashable here."""

    __slots__ = ("flat",)

    def __init__(self, flat: list[Any] | None = None) -> None:
        self.flat = [] if flat is None else flat

    def get(self, key: str) -> Any:
        """The value under a text key, else None."""
        for at in range(0, len(self.flat), 2):
            if self.flat[at] == key:
                return self.flat[at + 1]
        return None


class Storage:
    """A run of numbers somewhere in the file.

    Attributes:
        key: its name there.
        kind: element type as in safetensors files; ``""`` for bytes without a type.
        count: number of elements.
    """

    __slots__ = ("count", "key", "kind")

    def __init__(self, key: str, kind: str, count: int) -> None:
        self.key = key
        self.kind = kind
        self.count = count


class View:
    """A tensor: a storage looked at with sizes and strides, all counted in elements of ``kind``."""

    __slots__ = ("kind", "offset", "size", "storage", "stride")

    def __init__(
        self, storage: Storage, kind: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.storage = storage
        self.kind = kind
        self.offset = offset
        self.size = size
        self.stride = stride


class Foreign:
    """An object of a class that is not ours to build; its parts are looked at for names and tensors only."""

    __slots__ = ("name", "parts")

    def __init__(self, name: str, parts: list[Any]) -> None:
        self.name = name
        self.parts = parts


class NumberType:
    """A numpy number type; ``code`` as in ``"f8"``, ``order`` as in ``"<"``."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "<"


class Parameters:
    """A ``torch.nn.ParameterDict``, as early embeddings hold; its state brings the table of tensors."""

    __slots__ = ("table",)

    def __init__(self) -> None:
        self.table = Table()


_WORDS = {
    tuple: "a tuple", list: "a list", Table: "a dict", Storage: "a storage", View: "a tensor",
    NumberType: "a number type", Parameters: "a ParameterDict",
}  # fmt: skip
