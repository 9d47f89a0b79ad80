"""Errors that people can act on: each names the offending value and the remedy, in one line.

Everything that a caller can cause derives from :class:`SumukError`; the command line prints it as one line
and exits with code 2, the server answers 4xx. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SumukError(Exception):
    """Base of every error that the caller can mend."""


class BadInput(SumukError, ValueError):
    """A value is outside what is allowed. The message names the value and says what would be accepted."""


class BadFile(SumukError, ValueError):
    """A file is damaged, hostile or not what it claims to be.

    Args:
        message: what is wrong, naming the file and the offending value.
        code: short stable identifier of the case, for tests and logs (``"safetensors.overlap"``).
    """

    def __init__(self, message: str, code: str = "file") -> None:
        super().__init__(message)
        self.code = code


class MissingFile(SumukError, FileNotFoundError):
    """A file that was named does not exist. The message says where it was looked for."""

    def __str__(self) -> str:  # OSError would print only errno when given two arguments
        return str(self.args[0]) if self.args else ""


class MissingExtra(SumukError, ImportError):
    """A feature needs packages that are not installed; the message holds the install command."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra that is not installed; run: pip install 'sumuk[{extra}]'")


class OutOfMemory(SumukError):
    """There is not enough memory for a picture or a model, whatever was tried; another time there may be."""


class Cancelled(SumukError):
    """The work was stopped on request; what had been written is complete or absent, never half."""


LONGEST = 300
"""Characters of a list of names in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'euler'?`` for a misspelt name, else the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names)
    if len(shown) > LONGEST:
        cut = shown[:LONGEST].rpartition(", ")[0]
        shown = f"{cut} and {len(names) - cut.count(', ') - 1} more"
    return f"; known: {shown}"
