"""A desk over the toy backend, for tests without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.serve.toy_backend import ToyBackend

from sumuk.serve.config import ServeConfig
from sumuk.serve.desk import Desk
from sumuk.serve.order import Caller, Job, Order

ME = Caller()
OTHER = Caller("other", "10.0.0.2")


def config_of(state: Path, **config: Any) -> ServeConfig:
    """A server's setup with its limits out of the way."""
    limits = {"per_key": "1000000/minute", "per_address": "1000000/minute", "drain": 5.0}
    return ServeConfig(**{"state": state, **limits, **config})


@asynccontextmanager
async def at_desk(
    state: Path, backend: ToyBackend | None = None, stages: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[Desk]:
    """A desk that is open until the block ends."""
    desk = Desk(config_of(state, **config), backend or ToyBackend(), **(stages or {}))
    await desk.start()
    try:
        yield desk
    finally:
        await desk.stop()


async def crash(desk: Desk) -> None:
    """Leave the desk as a kill of its process would: nothing more is written, and the folder is free."""
    for task in [*desk._chores, *desk._dispatch._tasks]:
        task.cancel()
    await desk.backend.stop()
    await desk._store.close()


async def put(desk: Desk, caller: Caller = ME, **values: Any) -> Job:
    """A new job."""
    return (await desk.submit(Order(values={"prompt": "a fox", **values}), caller))[0]


async def ended(desk: Desk, job: Job | str, caller: Caller = ME) -> Job:
    """A job, once it is over."""
    id = job if isinstance(job, str) else job.id
    async with asyncio.timeout(10):
        async for seen in desk.watch(id, caller):
            if isinstance(seen, Job) and seen.over:
                return seen
    raise AssertionError("the watching ended before the job")


async def until(holds: Callable[[], Any], seconds: float = 5.0) -> Any:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not (found := holds()):
            await asyncio.sleep(0.002)
    return found
