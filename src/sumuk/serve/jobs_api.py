"""Our own API: jobs are submitted, watched by server-sent events, stopped; pictures, receipts, and what is offered."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from sse_starlette import EventSourceResponse, JSONServerSentEvent

from sumuk.base.errors import SumukError
from sumuk.serve.calls import TheCaller, TheDesk, picture_of, submitted, unpacked
from sumuk.serve.desk import Desk
from sumuk.serve.dropped import dropped
from sumuk.serve.formats import MEDIA, Kind, as_format
from sumuk.serve.jobs_schema import (
    PROBLEMS,
    Choices,
    Dropped,
    Found,
    JobDocument,
    JobList,
    Loaded,
    Offer,
    Submission,
    problem_of,
)
from sumuk.serve.order import Caller, Job, Order, Result, State
from sumuk.serve.trouble import refused, trouble_of
from sumuk.serve.wire import Drawn, Lost, Shown, Stepped, Told
from sumuk.serve.wish import values_of

router = APIRouter(prefix="/api", responses=PROBLEMS)
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events until it is over.", "content": {"text/event-stream": {}}}
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The picture.", "content": {media: {} for media in MEDIA.values()}}
}
Sort = Literal["model", "lora", "hypernet", "embedding", "vae", "control", "other"]
HEARTBEAT = 10
"""Seconds between comments that keep an idle stream open."""


@router.post(
    "/jobs",
    tags=["jobs"],
    status_code=202,
    response_model=JobDocument,
    responses={200: {"model": JobDocument, "description": "The Idempotency-Key had this job already."}},
)
async def submit(request: Request, response: Response, body: Submission) -> Any:
    """Take in a job. It is kept on disk before the answer is sent.

    With an ``Idempotency-Key``, the same call again answers with the same job.
    """

    async def read(text: str, called: str) -> bytes:
        return await picture_of(request, text, f"request.{called}")

    order = Order(
        values=await values_of(body.request, read),
        model=body.model,
        vae=body.vae,
        refiner=body.refiner,
        controls=body.controls,
        deadline=body.deadline,
    )
    job, created = await submitted(request, order)
    document = JobDocument.of(job)
    response.headers["Location"] = document.url
    response.status_code = 202 if created else 200
    return document


@router.get("/jobs", tags=["jobs"])
async def jobs(
    desk: TheDesk,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[str | None, Query(max_length=64, description="Jobs older than this one.")] = None,
    state: Annotated[list[State] | None, Query(description="Only those; may be given several times.")] = None,
) -> JobList:
    """The caller's jobs, the newest first."""
    found = desk.jobs(caller, limit=limit + 1, before=before, states=state)
    shown = found[:limit]
    return JobList(
        jobs=[JobDocument.of(each) for each in shown],
        next=shown[-1].id if len(found) > limit else None,
    )


@router.get("/jobs/{id}", tags=["jobs"])
async def job(desk: TheDesk, caller: TheCaller, id: str) -> JobDocument:
    """A job as it is now."""
    return JobDocument.of(desk.job(id, caller))


@router.get("/jobs/{id}/events", tags=["jobs"], response_class=Response, responses=STREAM)
async def events(desk: TheDesk, caller: TheCaller, id: str) -> EventSourceResponse:
    """Watch a job: ``job``, then ``step``, ``preview`` (a JPEG in base64), ``picture``, ``lost``, and last ``end``.

    Whoever stops watching stops nothing else. Where the server stops first, the last event is ``problem``.
    """
    news = desk.watch(id, caller)
    first = await anext(news)  # refuses before an answer has begun
    return EventSourceResponse(_watched(news, first), ping=HEARTBEAT)


async def _watched(
    news: AsyncGenerator[Told | Job, None], first: Told | Job
) -> AsyncIterator[JSONServerSentEvent]:
    try:
        yield _event(first)
        async for told in news:
            yield _event(told)
    except SumukError as error:  # the server stops; the job goes on at its next start
        yield JSONServerSentEvent(trouble_of(error).as_problem(), event="problem")
    finally:
        await news.aclose()


def _event(told: Told | Job) -> JSONServerSentEvent:
    if isinstance(told, Job):
        document = JobDocument.of(told).model_dump(mode="json")
        return JSONServerSentEvent(document, event="end" if told.over else "job")
    if isinstance(told, Stepped):
        step = {"image": told.image, "step": told.step, "steps": told.steps}
        return JSONServerSentEvent(step, event="step")
    if isinstance(told, Shown):
        jpeg = base64.b64encode(told.jpeg).decode()
        return JSONServerSentEvent({"image": told.image, "step": told.step, "jpeg": jpeg}, event="preview")
    if isinstance(told, Drawn):
        url = f"/api/jobs/{told.job}/images/{told.image}"
        return JSONServerSentEvent({"image": told.image, "url": url}, event="picture")
    assert isinstance(told, Lost), "a job's watchers are told of its pictures"
    trouble = problem_of(told.trouble).model_dump(mode="json")
    return JSONServerSentEvent({"image": told.image, "trouble": trouble}, event="lost")


@router.post("/jobs/{id}/cancel", tags=["jobs"])
@router.delete("/jobs/{id}", tags=["jobs"])
async def cancel(desk: TheDesk, caller: TheCaller, id: str) -> JobDocument:
    """Stop a job within one step. What is finished of it stays."""
    return JobDocument.of(await desk.cancel(id, caller))


@router.get("/jobs/{id}/images/{image}", tags=["jobs"], response_class=Response, responses=PICTURE)
async def picture(
    desk: TheDesk,
    caller: TheCaller,
    id: str,
    image: int,
    format: Kind = "png",
    quality: Annotated[int | None, Query(ge=1, le=100, description="Of JPEG and WebP.")] = None,
) -> Response:
    """A finished picture, from 0; the PNG has the receipt inside."""
    return await picture_answer(desk, caller, id, image, format, quality)


async def picture_answer(
    desk: Desk, caller: Caller, job: str, image: int, kind: Kind, quality: int | None
) -> Response:
    """A finished picture as a file to send.

    Raises:
        Refused: no such picture, or it is no longer kept.
        BadInput: see :func:`~sumuk.serve.formats.as_format`.
    """
    _result(desk, caller, job, image)
    path = desk.result_file(job, image, caller)
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    if kind == "png" and quality is None:
        return FileResponse(path, media_type=MEDIA["png"], headers=headers)
    made = await run_in_threadpool(lambda: as_format(path.read_bytes(), kind, quality))
    return Response(made, media_type=MEDIA[kind], headers=headers)


@router.get("/jobs/{id}/images/{image}/receipt", tags=["jobs"])
async def receipt(desk: TheDesk, caller: TheCaller, id: str, image: int) -> dict[str, Any]:
    """What made a picture."""
    return _result(desk, caller, id, image).receipt


def _result(desk: Desk, caller: Caller, id: str, image: int) -> Result:
    job = desk.job(id, caller)
    for each in job.results:
        if each.image == image:
            return each
    more = f"it has {job.count}, counted from 0" if job.over else f"it is {job.state}; wait until it is done"
    raise refused("not-found", f"job {id} has no picture {image}; {more}")


@router.get("/models", tags=["models"])
async def offer(
    desk: TheDesk,
    sort: Annotated[Sort | None, Query(description="Only these.")] = None,
) -> Offer:
    """Everything that orders can name."""
    return Offer(models=[each for each in await desk.catalogue() if sort in (None, each.sort)])


@router.get("/choices", tags=["models"])
async def choices(desk: TheDesk) -> Choices:
    """Solvers and step spacings."""
    return Choices(**await desk.choices())


@router.get("/models/{name:path}", tags=["models"])
async def describe(desk: TheDesk, name: str) -> dict[str, Any]:
    """What ``sumuk inspect`` says of it."""
    return await desk.describe(name)


@router.post("/models/{name:path}/load", tags=["models"])
async def load(desk: TheDesk, name: str) -> Loaded:
    """Bring a model into memory now, so that the first order for it need not wait."""
    await desk.load(name)
    return Loaded(name=name)


@router.post("/receipts", tags=["jobs"], response_model=Found)
async def read_receipt(body: Dropped) -> Any:
    """What made a PNG, as a request to submit again: by its receipt, or by A1111's text."""
    return await run_in_threadpool(lambda: dropped(unpacked(body.picture, "picture")))
