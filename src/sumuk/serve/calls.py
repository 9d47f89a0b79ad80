"""What every handler does with a call: who calls, what was sent, how to wait, and how to say no."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import Response

from sumuk.serve.answers import problem_document
from sumuk.serve.desk import Desk
from sumuk.serve.order import Caller, Job, Order
from sumuk.serve.pictures import clean
from sumuk.serve.trouble import Trouble, refused
from sumuk.serve.wire import Told

BETWEEN_LOOKS = 0.2
"""Seconds between two looks whether the client is still there."""


def desk_of(request: Request) -> Desk:
    """The desk of this server."""
    return request.app.state.desk


def caller_of(request: Request) -> Caller:
    """Who calls; the guard has found it out (:mod:`~sumuk.serve.guard`)."""
    return request.scope["sumuk.caller"]


TheDesk = Annotated[Desk, Depends(desk_of)]
TheCaller = Annotated[Caller, Depends(caller_of)]


def problem(trouble: Trouble) -> Response:
    """The answer that tells a problem (RFC 9457)."""
    body, headers = problem_document(trouble)
    answer = Response(body, trouble.status)
    answer.raw_headers = headers
    return answer


async def submitted(request: Request, order: Order) -> tuple[Job, bool]:
    """Take an order in, under its ``Idempotency-Key`` if it has one; whether it is a new job."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= 255 and key.isprintable()):
        raise refused("bad-request", "an Idempotency-Key has 1 to 255 printable characters")
    digest = fingerprint(request.url.path, order) if key else ""
    return await desk_of(request).submit(order, caller_of(request), key, digest)


def fingerprint(path: str, order: Order) -> str:
    """What makes two calls the same: the address and the order, pictures by their bytes."""

    def plain(value: Any) -> Any:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)

    said = [
        path,
        dict(order.values),
        order.model,
        order.vae,
        order.refiner,
        dict(order.controls),
        order.deadline,
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=plain).encode()).hexdigest()


async def finished(request: Request, job: Job) -> Job:
    """Wait until a job is over; a client that goes away stops it, and with an idempotency key may begin it anew.

    Raises:
        Refused: it failed or was cancelled, and why.
    """
    async for _ in watched(request, job):
        pass
    ended = desk_of(request).job(job.id, caller_of(request))
    if ended.state != "done":
        raise refused_by(ended)
    return ended


def refused_by(job: Job) -> Exception:
    """The error that a job which did not end well is told as."""
    trouble = job.trouble or Trouble("cancelled", "the job was cancelled")
    return refused(trouble.type, trouble.detail, retry_after=trouble.retry_after, job=job.id, **trouble.more)


async def watched(request: Request, job: Job) -> AsyncIterator[Told]:
    """What happens to a job until it is over; it is cancelled when the client goes away."""
    desk, caller = desk_of(request), caller_of(request)
    events = desk.watch(job.id, caller).__aiter__()
    following: asyncio.Task[Told | Job] | None = None
    looked = time.monotonic()
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((following,), timeout=BETWEEN_LOOKS)
            if time.monotonic() - looked >= BETWEEN_LOOKS:  # also where steps come more often than that
                looked = time.monotonic()
                if await request.is_disconnected():
                    await desk.cancel(job.id, caller, "its client went away")
                    raise refused("cancelled", "the client went away", job=job.id)
            if not done:
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            following = None
            if not isinstance(event, Job):
                yield event
    except asyncio.CancelledError:  # the connection was closed in another way
        with suppress(Exception):
            await asyncio.shield(desk.cancel(job.id, caller, "its client went away"))
        raise
    finally:
        if following is not None:
            following.cancel()
            with suppress(BaseException):
                await following
        await events.aclose()  # type: ignore[attr-defined]  # an async generator has it


async def picture_of(request: Request, text: str, what: str) -> bytes:
    """A picture that stands in JSON as base64, perhaps as a ``data:`` URL, checked and made plain: a whole PNG.

    Raises:
        Refused: it is no base64, an address to fetch, or no picture that is taken.
    """
    return await clean(unpacked(text, what), what, desk_of(request).config.picture_pixels)


def unpacked(text: str, what: str) -> bytes:
    """The bytes of base64, perhaps as a ``data:`` URL.

    Raises:
        Refused: it is neither, or an address to fetch.
    """
    if not isinstance(text, str):  # scripts of the page send what they like
        raise refused("bad-picture", f"{what} is no base64")
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise refused("bad-picture", f"{what} is a data: URL of another kind than base64")
    elif text[:8].lower().startswith(("http:", "https:", "file:", "ftp:", "gopher:")):
        raise refused(
            "bad-picture", f"{what} is an address, and nothing is fetched; send the picture in base64"
        )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise refused("bad-picture", f"{what} is no base64") from None
