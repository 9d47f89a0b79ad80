"""Tokens, and what stands for one in a browser: a session that is known by a random number.

Tokens and session numbers are compared by their digests in constant time, so that the time an answer takes tells
nothing about them. Who guesses is slowed down by address.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import math
import secrets
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from sumuk.serve.config import ServeConfig
from sumuk.serve.sites import Heads
from sumuk.serve.trouble import refused

WRONG = parse("10/minute")
"""Wrong tokens from one address; beyond it, none is looked at."""
MOST_SESSIONS = 1000
SESSION_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class _Session:
    owner: str
    until: float


class Keyring:
    """The keys of one server, and the sessions that were opened with them."""

    def __init__(self, config: ServeConfig) -> None:
        self.cookie = f"sumuk-{config.port}"  # cookies know no ports, and several servers may share a host
        self._tokens = {name: _digest(token.encode()) for name, token in config.tokens.items()}
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._wrong = MovingWindowRateLimiter(MemoryStorage())

    @property
    def needed(self) -> bool:
        """Whether anybody has to show a token at all."""
        return bool(self._tokens)

    def owner(self, heads: Heads, address: str) -> str:
        """Whose key a request shows. An ``Authorization`` header decides where there is one, else the cookie.

        Args:
            heads: its headers.
            address: where it comes from.

        Raises:
            Refused: ``no-token``; ``too-many`` wrong ones before.
        """
        said = heads.get("authorization", ())
        if said:
            return self.admit(_token(said[0]), address)
        owner = self._session_owner(heads)
        if owner is None:
            raise refused(
                "no-token", "this server wants a token: send 'Authorization: Bearer TOKEN', or open /login"
            )
        return owner

    def admit(self, token: bytes, address: str) -> str:
        """The name of the key that a token is.

        Raises:
            Refused: ``no-token``: it is none; ``too-many``: too many were none before.
        """
        where = _block(address)
        if not self._wrong.test(WRONG, where):
            left = self._wrong.get_window_stats(WRONG, where).reset_time - time.time()
            raise refused(
                "too-many",
                f"{WRONG.amount} wrong tokens came from this address within a minute; wait",
                retry_after=max(1, math.ceil(left)),
            )
        given, found = _digest(token), None
        for name, digest in self._tokens.items():  # all of them, whichever it is
            if hmac.compare_digest(given, digest):
                found = name
        if found is None:
            self._wrong.hit(WRONG, where)
            raise refused("no-token", "the token is not one of this server's")
        return found

    def open(self, owner: str) -> str:
        """A new session of a key's; the oldest ends if there are too many."""
        number = secrets.token_urlsafe(32)
        self._sessions[_digest(number.encode())] = _Session(owner, time.monotonic() + SESSION_SECONDS)
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return number

    def close(self, heads: Heads) -> None:
        """End the session that a request's cookie names, if it does."""
        for number in self._numbers(heads):
            self._sessions.pop(_digest(number.encode()), None)

    def _session_owner(self, heads: Heads) -> str | None:
        for number in self._numbers(heads):
            key = _digest(number.encode())
            session = self._sessions.get(key)
            if session is not None and session.until > time.monotonic():
                return session.owner
            self._sessions.pop(key, None)
        return None

    def _numbers(self, heads: Heads) -> list[str]:
        pairs = (pair.strip().partition("=") for line in heads.get("cookie", ()) for pair in line.split(";"))
        return [value for name, _, value in pairs if name == self.cookie]


def _token(said: str) -> bytes:
    """The token in an Authorization header; empty if there is none. The user name of Basic is not looked at."""
    kind, _, rest = said.partition(" ")
    if kind.lower() == "bearer":
        return rest.strip().encode("latin-1")
    if kind.lower() == "basic":
        with suppress(ValueError, binascii.Error):
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
    return b""


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _block(address: str) -> str:
    """What counts as one address: of IPv6 the 64 bits of one line, whose rest its holder may choose freely."""
    with suppress(ValueError):
        if ipaddress.ip_address(address).version == 6:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return address
