"""The application: the desk, every API, the guard before them, the page behind them."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.util import find_spec

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from sumuk.base.errors import SumukError
from sumuk.serve import a1111_api, health, jobs_api, login, openai_api, pictures
from sumuk.serve.backend import Backend
from sumuk.serve.calls import problem
from sumuk.serve.config import ServeConfig
from sumuk.serve.desk import Desk
from sumuk.serve.guard import Guard
from sumuk.serve.local import LocalWorker
from sumuk.serve.safety import stages
from sumuk.serve.sign import sealer
from sumuk.serve.sites import Sites
from sumuk.serve.trouble import Trouble, trouble_of

log = logging.getLogger("sumuk.serve")

BY_STATUS = {404: "not-found", 405: "not-allowed", 413: "too-large", 415: "not-json"}
"""The framework's own refusals -> ours."""
NO_PAGE = """<!doctype html><meta charset="utf-8"><title>Sumuk</title>
<p>This server has no page: install it with <code>pip install 'sumuk[ui]'</code>, and leave --no-page out.</p>
<p>이 서버에는 웹 페이지가 없습니다. <code>pip install 'sumuk[ui]'</code> 로 설치하고 --no-page 를 빼 주세요.</p>
"""


def make_app(config: ServeConfig, backend: Backend | None = None) -> FastAPI:
    """The whole server as one ASGI application, which starts and stops what it needs with its lifespan.

    Args:
        config: how it is set up.
        backend: what draws; a worker process here by default.

    Raises:
        MissingExtra, BadInput, MissingFile: what it is told to use is not there.
    """
    Sites(config)  # refuses names and addresses that are none, before anything is begun
    checks = stages(config)
    desk = Desk(
        config,
        backend or LocalWorker(config),
        inspect_prompt=checks.inspect_prompt,
        inspect_image=checks.inspect_image,
        seal=None if config.sign is None else sealer(config.sign),
    )

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await desk.start()
        await pictures.warm()
        try:
            yield
        finally:
            await desk.stop()

    app = FastAPI(
        title="Sumuk",
        version=version("sumuk"),
        summary="One open image-diffusion system: jobs, OpenAI Images and A1111 APIs over the same queue.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.state.desk = desk
    for api in (health, login, jobs_api, openai_api, a1111_api):
        app.include_router(api.router)
    _tell_problems(app)
    if config.page and find_spec("gradio") is not None:
        from sumuk.serve import page

        app = page.mount(app, desk)
    else:
        if config.page:
            log.warning(
                "gradio is not installed, so there is no page; install it with: pip install 'sumuk[ui]'"
            )
        app.get("/", include_in_schema=False)(lambda: HTMLResponse(NO_PAGE))
    app.add_middleware(Guard, config=config, counted=desk.metrics.refused)
    return app


def _tell_problems(app: FastAPI) -> None:
    """Every error that a caller can mend as problem details, also the framework's; the guard tells of the others."""
    shapes: dict[str, Callable[[Trouble], Response]] = {
        "/v1/": openai_api.problem,
        "/sdapi/": a1111_api.problem,
    }

    def told(request: Request, trouble: Trouble) -> Response:
        desk: Desk = request.app.state.desk
        desk.metrics.refused(trouble.type)
        for prefix, shape in shapes.items():
            if request.url.path.startswith(prefix):
                return shape(trouble)
        return problem(trouble)

    @app.exception_handler(SumukError)
    async def ours(request: Request, error: SumukError) -> Response:
        return told(request, trouble_of(error))

    @app.exception_handler(RequestValidationError)
    async def values(request: Request, error: RequestValidationError) -> Response:
        return told(request, Trouble("bad-value", in_words(error)))

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        kind = BY_STATUS.get(error.status_code, "bad-request")
        detail = str(error.detail) if error.detail else ""
        return told(request, Trouble(kind, f"{request.method} {request.url.path[:200]}: {detail}"))


def in_words(error: RequestValidationError) -> str:
    """The first three of the framework's complaints, each with where, what and the value."""
    found = []
    for each in error.errors()[:3]:
        where = ".".join(str(part) for part in each["loc"] if part != "body") or "the body"
        said = each["msg"].removeprefix("Value error, ")
        # reprlib: the value may be megabytes of text
        found.append(f"{where[:80]}: {said[:1].lower()}{said[1:]} (got {reprlib.repr(each.get('input'))})")
    return "; ".join(found)
