"""Before an order comes to the line: how often its sender calls, and whether it is an order at all."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from dataclasses import replace

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from sumuk.base.errors import BadInput
from sumuk.generate.request import Request, places
from sumuk.serve.config import ServeConfig
from sumuk.serve.order import Caller, Order
from sumuk.serve.trouble import refused

DECODING = 2
"""Orders whose pictures are decoded at once; each may take a hundred megabytes meanwhile."""


class Door:
    """What every order has to pass.

    Args:
        config: of the server.

    Raises:
        BadInput: a limit is not in the notation of the package limits.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_key = _rate("per_key", config.per_key)
        self._per_address = _rate("per_address", config.per_address)
        self._decoding = asyncio.Semaphore(DECODING)

    def count(self, caller: Caller) -> None:
        """A call more of this caller.

        Raises:
            Refused: it is one too many.
        """
        for rate, what, who in (
            (self._per_address, "address", caller.address),
            (self._per_key, "key", caller.owner),
        ):
            if not self._limiter.hit(rate, what, who):
                free = self._limiter.get_window_stats(rate, what, who).reset_time - time.time()
                raise refused(
                    "too-many",
                    f"more than {rate.amount} orders in {rate.get_expiry()} s from this {what}; "
                    f"try again in {max(1, math.ceil(free))} s",
                    retry_after=max(1.0, free),
                )

    async def checked(self, order: Order) -> Order:
        """The order as it is kept: with a seed, so that it makes the same pictures if it is begun anew.

        Raises:
            Refused, BadInput, BadFile: it is none, and why.
        """
        self._bounded(order)
        values = dict(order.values)
        if any(places(values)):
            async with self._decoding:
                await asyncio.to_thread(Request, **values)
        else:
            Request(**values)
        if values.get("seed") is None:
            values["seed"] = secrets.randbelow(2**32)
        return replace(order, values=values)

    def _bounded(self, order: Order) -> None:
        """What a request does not say itself: lengths, times, and that nothing here is opened by its name."""
        most = self.config.prompt_characters
        for name in ("prompt", "negative"):
            text = order.values.get(name)
            if isinstance(text, str) and len(text) > most:
                raise refused("bad-value", f"{name} has {len(text):,} characters; at most {most:,} are read")
        if order.deadline is not None and not 0 < order.deadline < math.inf:
            raise refused("bad-value", f"deadline is a number of seconds above 0, not {order.deadline!r:.40}")
        for holder, key, name in places(order.values):
            if not isinstance(value := holder[key], bytes):  # a name would be opened on this machine
                raise refused(
                    "bad-picture", f"{name} is no picture that was sent, but a {type(value).__name__}"
                )


def _rate(name: str, text: str) -> RateLimitItem:
    try:
        return parse(text)
    except ValueError:
        raise BadInput(f"{name} {text!r} is no rate; write it as 120/minute or 10/second") from None
