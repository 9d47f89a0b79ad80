"""Named things that can be looked up, with a hint when the name is misspelt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from sumuk.base.errors import BadInput, nearest

T = TypeVar("T")


def plain(name: str) -> str:
    """A name as people type it, reduced to what distinguishes it: ``"DPM++ 2M"`` -> ``"dpmpp-2m"``."""
    return "-".join(name.lower().replace("++", "pp").replace("_", " ").replace("-", " ").split())


class Registry(Generic[T]):
    """A table of names with aliases.

    Args:
        kind: what the entries are, for the error message (``"solver"``).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def add(self, name: str, value: T, *aliases: str) -> T:
        """Register ``value``; a name taken already is a programming error, and nothing is registered."""
        keys = {plain(each): each for each in (name, *aliases)}
        for key, each in keys.items():
            if key in self._aliases:
                raise KeyError(f"{self.kind} {each!r} is registered twice")
        self._aliases.update(dict.fromkeys(keys, name))
        self._entries[name] = value
        return value

    def canonical(self, name: str) -> str:
        """The registered name behind ``name`` or an alias of it.

        Raises:
            BadInput: no such entry; the message holds the nearest name.
        """
        try:
            return self._aliases[plain(name)]
        except KeyError:
            raise BadInput(f"unknown {self.kind} {name!r}{nearest(name, self._entries)}") from None

    def __getitem__(self, name: str) -> T:
        return self._entries[self.canonical(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and plain(name) in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def aliases(self, name: str) -> list[str]:
        """Every other spelling under which ``name`` is found."""
        return [alias for alias, target in self._aliases.items() if target == name and alias != plain(name)]
