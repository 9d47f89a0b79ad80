"""Bodies of calls: read within bounds, and JSON understood strictly, before any framework sees them.

JSON (RFC 8259) leaves open what most parsers then decide differently: a name twice, NaN, numbers of any length, halves
of characters. Here each of them is refused, so that what was checked is what is used. Depth and number of values are
counted over the bytes before anything is built, so that no body costs more than its size.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from sumuk.serve.trouble import Refused, refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

DEEPEST = 64
MOST_VALUES = 100_000
"""Values in one document, each an object of Python's that takes fifty times its text."""
LONGEST_INTEGER = 25
LONGEST_NUMBER = 64
AT_ONCE = 8
"""Bodies of the largest size that may be in memory together."""
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0}


class Gone(Exception):
    """The client went away while it was sending."""


class Bodies:
    """Reads bodies, and knows how much of them is in memory.

    Args:
        most: bytes of one body.
        seconds: within which all of it must be here.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds = most, seconds
        self.held = 0

    async def read(self, receive: Receive, length: int | None, most: int) -> bytes:
        """All of a body. Its size is held until :meth:`release`.

        Args:
            receive: ASGI's.
            length: what Content-Length says.
            most: bytes that are allowed here.

        Raises:
            Refused: ``too-large``, ``slow``, ``too-many``.
            Gone: nobody is there to be told.
        """
        if length is not None and length > most:
            raise too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise too_large(most)
                    if self.held + len(part) > AT_ONCE * self.most:
                        raise refused("too-many", "the server is reading too many bodies", retry_after=2)
                    self.held += len(part)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except BaseException as error:
            self.release(sum(map(len, parts)))
            if isinstance(error, TimeoutError):
                raise refused(
                    "slow", f"the body did not arrive within {self.seconds:g} seconds; {size:,} bytes came"
                ) from None
            raise

    def release(self, size: int) -> None:
        """A body of that size is not in memory any more."""
        self.held -= size


def too_large(most: int) -> Refused:
    """The refusal of a body above its bound."""
    return refused("too-large", f"the body has more than {most:,} bytes, the most that are taken here")


def check_json(data: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: ``bad-request``: it is no JSON object, or one that could be understood in two ways.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no(f"the body is no UTF-8 from byte {error.start} on") from None
    _measure(data)
    try:
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _no(f"the body is no JSON: {error.msg.lower()} ({place})") from None
    if not isinstance(found, dict):
        raise _no("the body is JSON, but no object; send {...}")
    if b"\\u" in data:  # the only way in which either can have come
        _check_strings(found)
    return found


def _measure(data: bytes) -> None:
    """Refuse what is too deep or too much, without building it."""
    opened = data.count(b"[") + data.count(b"{")
    if opened <= DEEPEST and opened + data.count(b",") <= MOST_VALUES:
        return
    structure = _STRINGS.sub(b"", data).translate(None, _NOT_STRUCTURE)
    if (
        len(structure) > 2 * MOST_VALUES
    ):  # each value has a comma or a bracket before it, and at most one behind
        raise _no(f"the body holds more than {MOST_VALUES:,} values")
    depth = 0
    for sign in structure:
        depth += _STEP[sign]
        if depth > DEEPEST:
            raise _no(f"the body is nested more than {DEEPEST} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _no(f"the name {twice[:60]!r} stands twice in one object of the body")
    return found


def _constant(name: str) -> NoReturn:
    raise _no(f"{name} in the body is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise _no(f"a whole number of {len(text):,} digits in the body; at most {LONGEST_INTEGER} are read")
    return int(text)


def _float(text: str) -> float:
    if len(text) > LONGEST_NUMBER:
        raise _no(f"a number of {len(text):,} characters in the body; at most {LONGEST_NUMBER} are read")
    if math.isinf(found := float(text)):
        raise _no(f"the number {text} in the body is too large")
    return found


def _check_strings(found: Any) -> None:
    """Refuse halves of characters and NUL, which files, databases and tokenizers take each in their way."""
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            if "\0" in value:
                raise _no("a text in the body holds the character NUL")
            try:
                value.isascii() or value.encode()
            except UnicodeEncodeError as error:
                raise _no(
                    f"a text in the body holds half a character (\\u{ord(value[error.start]):04x})"
                ) from None


def _no(why: str) -> Refused:
    return refused("bad-request", why)
