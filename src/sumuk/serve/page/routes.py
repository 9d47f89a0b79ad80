"""The page's own addresses: the language at the door, pictures that were given to it, grids as files, the seal."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from sumuk.serve.calls import TheCaller, TheDesk
from sumuk.serve.page import sheet as written
from sumuk.serve.page.grids import Grids
from sumuk.serve.page.kept import Kept
from sumuk.serve.page.look import asset, icon
from sumuk.serve.page.words import LANGUAGES, preferred
from sumuk.serve.trouble import Refused

COOKIE = "sumuk-language"


def make_router(kept: Kept, grids: Grids) -> APIRouter:
    """The addresses.

    Args:
        kept: pictures that were given to the page.
        grids: that were begun.
    """
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def door(request: Request) -> RedirectResponse:
        """To the page in the language that was chosen, else in one that the browser's reader reads."""
        chosen = request.cookies.get(COOKIE, "")
        language = chosen if chosen in LANGUAGES else preferred(request.headers.get("accept-language", ""))
        answer = RedirectResponse(f"{request.scope.get('root_path', '')}/{language}/", 307)
        answer.headers["Vary"] = "Accept-Language, Cookie"
        answer.headers["Cache-Control"] = "no-store"
        return answer

    @router.get("/page/icon.svg")
    @router.get("/favicon.ico")
    async def seal() -> Response:
        return Response(icon(), media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})

    @router.get("/page/{name}")
    async def file(name: Literal["page.js", "picture.js", "look.css"]) -> Response:
        kind = "text/css" if name.endswith("css") else "text/javascript"
        return Response(
            asset(name), media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"}
        )

    @router.get("/page/kept/{name}.png")
    async def picture(name: str, caller: TheCaller) -> FileResponse:
        headers = {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}
        return FileResponse(kept.path(caller.owner, name), media_type="image/png", headers=headers)

    @router.get("/page/sheets/{name}.{kind}")
    async def sheet(
        name: str, kind: Literal["png", "csv", "json"], caller: TheCaller, desk: TheDesk
    ) -> Response:
        found = grids.find(name, caller).sheet
        if kind == "csv":
            return Response(written.as_csv(found), media_type="text/csv; charset=utf-8")
        if kind == "json":
            return Response(written.as_json(found), media_type="application/json")
        files: list[list[Path | None]] = [[None] * len(line) for line in found.jobs]
        for row, line in enumerate(found.jobs):
            for column, job in enumerate(line):
                if job is not None and job.results:
                    with suppress(Refused):  # deleted meanwhile: its place stays blank
                        files[row][column] = desk.result_file(job.id, job.results[0].image, caller)
        return Response(await asyncio.to_thread(written.as_png, found, files), media_type="image/png")

    return router
