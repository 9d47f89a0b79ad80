"""OpenAI's image calls: generations, edits, variations, models, as the package ``openai`` makes and reads them.

What is asked becomes an order like any other, and the call waits for it; when the client goes away, the job stops.
"""

from __future__ import annotations

import io
import logging
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageChops
from sse_starlette import EventSourceResponse

from sumuk.serve import calls
from sumuk.serve.a1111_names import usual_model
from sumuk.serve.calls import TheCaller, TheDesk, desk_of
from sumuk.serve.formats import Kind
from sumuk.serve.jobs_api import HEARTBEAT, PICTURE, picture_answer
from sumuk.serve.jobs_schema import PROBLEMS
from sumuk.serve.openai_answer import pictures, stream
from sumuk.serve.openai_form import body_of
from sumuk.serve.openai_schema import (
    Answer,
    Asked,
    Edit,
    Generation,
    Model,
    Models,
    ProblemWithFault,
    Variation,
    Wanted,
    inlined,
    wanted,
    with_fault,
)
from sumuk.serve.order import Order
from sumuk.serve.pictures import clean
from sumuk.serve.trouble import MEDIA, Trouble, refused
from sumuk.serve.wish import values_of

log = logging.getLogger("sumuk.serve")

_PROBLEMS = {
    status: told | {"content": {MEDIA: {"schema": inlined(ProblemWithFault)}}}
    for status, told in PROBLEMS.items()
}
router = APIRouter(prefix="/v1", tags=["openai"], responses=_PROBLEMS)

UNTOUCHED = 0.75
"""Strength of an edit without a mask: the whole picture is drawn over, and stays recognisable."""
MASKED = 1.0
"""Strength of an edit with a mask: what lies in it is drawn anew from the prompt."""
VARIED = 0.6
"""Strength of a variation, for models that cannot be shown a picture to imitate."""
IMITATING = ("sd2/unclip-l", "sd2/unclip-h", "cascade/stage-c")
"""Kinds of models that can."""


def problem(trouble: Trouble) -> Response:
    """A problem as OpenAI's clients read it."""
    return calls.problem(with_fault(trouble))


def _answers(body: type[Asked], *kinds: str) -> dict[str, Any]:
    """What the document says of a call: the bodies that it takes, which are read by hand, and its answers."""
    streams: dict[str, Any] = {} if body is Variation else {"text/event-stream": {}}
    return {
        "response_model": Answer,
        "response_model_exclude_none": True,
        "responses": {
            200: {"content": streams, "description": "The pictures; a stream where ``stream`` is true."}
        },
        "openapi_extra": {
            "requestBody": {"required": True, "content": {kind: {"schema": inlined(body)} for kind in kinds}}
        },
    }


@router.post("/images/generations", **_answers(Generation, "application/json"))
async def generations(request: Request, asked: Generation) -> Any:
    """Draw from a prompt."""
    return await _answer(request, asked, wanted(asked), {"prompt": asked.prompt})


@router.post("/images/edits", **_answers(Edit, "multipart/form-data", "application/json"))
async def edits(request: Request) -> Any:
    """Draw a picture over, or anew where a mask (or the picture itself) is transparent.

    With a mask the strength is 1, without one 0.75; ``sumuk[strength]`` says another.
    """
    asked = await body_of(request, Edit)
    how = wanted(asked)
    init = await _one_picture(request, asked.image)
    values: dict[str, Any] = {"prompt": asked.prompt, "init": init, "strength": UNTOUCHED}
    if asked.mask is not None:
        mask = await run_in_threadpool(_white_where_clear, await _picture(request, asked.mask, "mask"))
        if mask is None:
            raise refused("bad-picture", "mask: it has no transparent part, where the picture is drawn anew")
    else:
        mask = await run_in_threadpool(_white_where_clear, init)
    if mask is not None:
        values |= {"mask": mask, "strength": MASKED}
    return await _answer(request, asked, how, values)


@router.post("/images/variations", **_answers(Variation, "multipart/form-data", "application/json"))
async def variations(request: Request) -> Any:
    """Draw something like a picture, without a prompt.

    A model with an image tower (unCLIP, Stable Cascade) is shown it; any other draws it over with strength 0.6.
    """
    asked = await body_of(request, Variation)
    how = wanted(asked)
    shown = await _one_picture(request, asked.image)
    entries = await desk_of(request).catalogue()
    entry = next((each for each in entries if each.sort == "model" and each.name == asked.model), None)
    if asked.model is None:
        entry = usual_model(entries, desk_of(request).config)
    imitates = entry is not None and entry.kind in IMITATING
    values = {"like": shown} if imitates else {"init": shown, "strength": VARIED}
    return await _answer(request, asked, how, values)


@router.get("/models")
async def models(desk: TheDesk) -> Models:
    """Models that draw."""
    return Models(data=[Model(id=each.name) for each in await desk.catalogue() if each.sort == "model"])


@router.get("/models/{id:path}")
async def model(desk: TheDesk, id: str) -> Model:
    """One of them."""
    for each in await desk.catalogue():
        if each.sort == "model" and each.name == id:
            return Model(id=id)
    raise refused("not-found", f"model: there is no {id[:100]!r} here; GET /v1/models lists what there is")


@router.get("/images/files/{job}/{image}.{kind}", response_class=Response, responses=PICTURE)
async def file(
    desk: TheDesk, caller: TheCaller, job: str, image: int, kind: Kind, quality: int | None = None
) -> Response:
    """A picture that was answered as a URL. It needs the same token as any call."""
    return await picture_answer(desk, caller, job, image, kind, quality)


async def _picture(request: Request, sent: str | bytes, what: str) -> bytes:
    if isinstance(sent, str):
        return await calls.picture_of(request, sent, what)
    return await clean(sent, what, desk_of(request).config.picture_pixels)


async def _one_picture(request: Request, sent: str | bytes | list[str | bytes]) -> bytes:
    some = sent if isinstance(sent, list) else [sent]
    if len(some) != 1:
        raise refused("bad-value", f"image: there are {len(some)}; one picture is drawn over at a time")
    return await _picture(request, some[0], "image")


def _white_where_clear(png: bytes) -> bytes | None:
    """OpenAI's mask (transparent: drawn anew) as ours (white: drawn anew); None if nothing of it is transparent."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:  # a plain one: it has been through the child
        if image.mode != "RGBA":
            return None
        mask = ImageChops.invert(image.getchannel("A"))
    if mask.getextrema() == (0, 0):
        return None
    file = io.BytesIO()
    mask.save(file, "PNG")
    return file.getvalue()


async def _answer(request: Request, asked: Asked, how: Wanted, values: dict[str, Any]) -> Any:
    """Order what was asked, and answer with the pictures, or with a stream of events."""
    job, _ = await calls.submitted(request, await _order(request, asked, how, values))
    if how.label:
        log.info("job %s is for user %r", job.id, how.label, extra={"job": job.id})
    if how.events:
        return EventSourceResponse(stream(request, job, how), ping=HEARTBEAT)
    return await pictures(request, await calls.finished(request, job), how)


async def _order(request: Request, asked: Asked, how: Wanted, values: dict[str, Any]) -> Order:
    async def read(text: str, called: str) -> bytes:
        return await calls.picture_of(request, text, f"sumuk.{called}")

    own = await values_of(asked.sumuk, read)
    said = {name: own.pop(name, None) for name in ("vae", "refiner", "controls")}
    values = {**values, "count": asked.n or 1} | own
    if how.size != "auto":
        values["width"], values["height"] = map(int, how.size.split("x"))
    if how.partial:  # previews often enough, where it is known how many steps there are; else at each
        walked = values.get("steps", 0) * (values["strength"] if "init" in values else 1.0)
        values["preview"] = max(1, int(walked) // (how.partial + 1))
    return Order(
        values=values,
        model=asked.model,
        vae=said["vae"],
        refiner=said["refiner"],
        controls=said["controls"] or {},
        attached=True,
    )
