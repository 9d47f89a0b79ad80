"""The guard alone, before a small application that says what came through; on a real socket, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from sumuk.serve import login
from sumuk.serve.config import ServeConfig
from sumuk.serve.guard import Guard
from sumuk.serve.http11 import Http11
from sumuk.serve.trouble import refused

PAGE = "<!doctype html><script>window.one = 1</script><script src='/static/a.js'></script><p>Sumuk</p>"


def small_app() -> FastAPI:
    """What stands behind the door."""
    app = FastAPI(docs_url=None)

    async def echo(request: Request) -> dict[str, Any]:
        caller = request.scope["sumuk.caller"]
        body = await request.body()
        return {
            "owner": caller.owner,
            "address": caller.address,
            "path": request.url.path,
            "size": len(body),
            "body": body[:200].decode(errors="replace"),
        }

    @app.get("/livez")
    async def livez() -> str:
        return "ok"

    @app.get("/metrics")
    async def metrics() -> str:
        return "figures"

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers={"Access-Control-Allow-Origin": "*"})

    @app.get("/api/fault")
    async def fault() -> None:
        raise RuntimeError("secret insides")

    @app.get("/api/refused")
    async def no() -> None:
        raise refused("conflict", "a \u2028 line")

    @app.get("/gradio_api/file={path:path}", response_class=HTMLResponse)
    async def file(path: str) -> str:
        return PAGE

    app.include_router(login.router)
    app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"])(echo)
    return app


@contextmanager
def doorway(counted: Any = lambda type: None, **config: Any) -> Iterator[str]:
    """The address of a guarded server, until the block ends."""
    app = small_app()
    app.add_middleware(Guard, config=ServeConfig(**config), counted=counted)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            http=Http11,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.005)
    try:
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname()[:2])
    finally:
        server.should_exit = True
        thread.join(10)
