"""The whole application over the toy backend, behind a real socket in a thread: milliseconds, and faults on demand."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from tests.serve.toy_backend import ToyBackend

from sumuk.serve.app import make_app
from sumuk.serve.config import ServeConfig


@dataclass
class Toy:
    """A running application.

    Attributes:
        backend: whose faults may be asked for; from a test by :meth:`do`.
        app: the application.
        loop: that it runs in.
    """

    url: str
    client: httpx.Client
    backend: ToyBackend
    app: FastAPI
    loop: asyncio.AbstractEventLoop

    def do(self, act: Callable[..., Any], *args: Any) -> Any:
        """Call something in the server's loop, a coroutine function too, and wait for it."""

        async def call() -> Any:
            made = act(*args)
            return await made if inspect.isawaitable(made) else made

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def until(self, holds: Callable[[], Any], seconds: float = 10.0) -> Any:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := holds():
                return found
            time.sleep(0.005)
        raise AssertionError(f"it was not so within {seconds} s")

    def state(self, job: str) -> str:
        return self.client.get(f"/api/jobs/{job}").json()["state"]


@contextmanager
def toy_running(state: Path, backend: ToyBackend | None = None, **config: Any) -> Iterator[Toy]:
    """The application until the block ends."""
    backend = backend or ToyBackend()
    limits = {"per_key": "1000000/minute", "per_address": "1000000/minute", "drain": 0.2}
    app = make_app(ServeConfig(**{"state": state, "page": False, "port": 0, **limits, **config}), backend)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the application did not start"
            time.sleep(0.01)
        url = "http://{}:{}".format(*server.servers[0].sockets[0].getsockname()[:2])
        loop = server.servers[0].get_loop()
        with httpx.Client(base_url=url, timeout=20) as client:
            yield Toy(url, client, backend, app, loop)
    finally:
        server.should_exit = True
        thread.join(20)
