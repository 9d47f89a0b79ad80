"""Waiting for a server that is getting ready."""

from __future__ import annotations

import asyncio
import time

from sumuk.serve.desk import Desk

WAKING = 180.0
"""Seconds, at most."""


async def woken(desk: Desk) -> None:
    """Return when the server takes orders, or when it is of no use to wait longer."""
    until = time.monotonic() + WAKING
    while not desk.ready and not desk.draining and time.monotonic() < until:
        await asyncio.sleep(0.2)
