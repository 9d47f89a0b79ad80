"""What a hostile file is: its number in the project's list, how to make it, and how it must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One way to attack, or to be broken.

    Attributes:
        number: in the list of 72; several variants share one.
        name: what it is, in words; unique.
        code: of the error that refuses it, or how that begins (``"ckpt.opcode"``).
        make: writes it into an empty folder and returns what to open.
        warns: None for a file that must be refused. Else it is legal, must be read, and this stands in its warnings.
    """

    number: int
    name: str
    code: str
    make: Callable[[Path], Path]
    warns: str | None = None
