"""A finished job as OpenAI's clients read it: an answer with pictures, or a stream of events."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sse_starlette import JSONServerSentEvent

from sumuk.base.errors import SumukError
from sumuk.serve.calls import caller_of, desk_of, refused_by, watched
from sumuk.serve.formats import as_format
from sumuk.serve.openai_schema import About, Answer, Datum, Wanted, fault_of
from sumuk.serve.order import Job
from sumuk.serve.trouble import trouble_of
from sumuk.serve.wire import Drawn, Shown, Stepped


async def pictures(request: Request, job: Job, how: Wanted) -> Answer:
    """All pictures of a job that is done."""
    data = []
    results = sorted(job.results, key=lambda each: each.image)
    for result in results:
        if how.urls:
            query = "" if how.quality is None else f"?quality={how.quality}"
            url = f"{request.base_url}v1/images/files/{job.id}/{result.image}.{how.kind}{query}"
            data.append(Datum(url=url))
        else:
            data.append(Datum(b64_json=await _finished(request, job, result.image, how)))
    first = results[0]
    return Answer(
        created=int(job.ended or time.time()),
        data=data,
        output_format=how.kind,
        size=f"{first.width}x{first.height}",
        sumuk=About(job=job.id, seeds=[each.seed for each in results]),
    )


async def stream(request: Request, job: Job, how: Wanted) -> AsyncIterator[JSONServerSentEvent]:
    """Previews as they come, the finished pictures in their order, or what went wrong."""
    desk, caller = desk_of(request), caller_of(request)
    shown = sent = steps = 0
    drawn: set[int] = set()

    async def completed(image: int) -> JSONServerSentEvent:
        result = next(each for each in desk.job(job.id, caller).results if each.image == image)
        b64_json = await _finished(request, job, image, how)
        return _event(how, "completed", b64_json, f"{result.width}x{result.height}")

    try:
        async with aclosing(watched(request, job)) as news:  # type: ignore[type-var]  # a generator
            async for told in news:
                if isinstance(told, Stepped):
                    steps = told.steps
                elif isinstance(told, Shown) and shown < how.partial and _due(told.step, steps, shown, how):
                    b64_json = await run_in_threadpool(_b64, told.jpeg, how)
                    yield _event(how, "partial_image", b64_json, how.size, partial_image_index=shown)
                    shown += 1
                elif isinstance(told, Drawn):
                    drawn.add(told.image)
                    while sent in drawn:
                        yield await completed(sent)
                        sent += 1
        ended = desk.job(job.id, caller)
        if ended.state != "done":
            raise refused_by(ended)
        for image in range(sent, ended.count):  # of a job that an Idempotency-Key had already
            yield await completed(image)
    except SumukError as error:
        fault = fault_of(trouble_of(error)).model_dump()
        yield JSONServerSentEvent({"type": "error", "error": fault}, event="error")
    finally:
        if not desk.job(job.id, caller).over:  # the client went away between two events
            await asyncio.shield(desk.cancel(job.id, caller, "its client went away"))


def _due(step: int, steps: int, shown: int, how: Wanted) -> bool:
    """Whether the next preview is to be sent, so that they are spread evenly over the steps."""
    return steps > 0 and step * (how.partial + 1) >= steps * (shown + 1)


def _event(how: Wanted, name: str, b64_json: str, size: str, **more: Any) -> JSONServerSentEvent:
    kind = f"{how.events}.{name}"
    told = {
        "type": kind,
        "b64_json": b64_json,
        "created_at": int(time.time()),
        "size": size,
        "quality": "auto",
        "background": "opaque",
        "output_format": how.kind,
    }
    return JSONServerSentEvent(told | more, event=kind)


async def _finished(request: Request, job: Job, image: int, how: Wanted) -> str:
    path = desk_of(request).result_file(job.id, image, caller_of(request))
    return await run_in_threadpool(lambda: _b64(path.read_bytes(), how))


def _b64(picture: bytes, how: Wanted) -> str:
    return base64.b64encode(as_format(picture, how.kind, how.quality)).decode()
