"""A1111's drawing calls (``/sdapi/v1``), as its clients make them: txt2img, img2img, progress, interrupt, skip.

That program has one thing at work at a time and no notion of who asks; here "the current one" is the oldest call of the
caller's own that is at work through this API. A call that is interrupted answers with the pictures that are finished,
as there; with none, it is refused as cancelled.
"""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from sumuk.serve import a1111_extras, a1111_lists, calls
from sumuk.serve.a1111_names import label_of, scheduler_label
from sumuk.serve.a1111_order import Plan, keep_options, planned
from sumuk.serve.a1111_pictures import by_hand
from sumuk.serve.a1111_schema import Img2Img, ToImage, Txt2Img, body_of
from sumuk.serve.calls import TheCaller, TheDesk, caller_of, desk_of
from sumuk.serve.formats import Kind, as_format
from sumuk.serve.jobs_schema import PROBLEMS
from sumuk.serve.order import Caller, Job, Result
from sumuk.serve.trouble import TITLES, Trouble, refused
from sumuk.serve.wire import Shown

router = APIRouter(tags=["a1111"], responses=PROBLEMS)
router.include_router(a1111_lists.router)
router.include_router(a1111_extras.router)

KINDS: dict[str, Kind] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
BEGUN = 0.01
"""The progress of what has just begun, as there: 0 means that nothing is at work."""


@dataclass
class Call:
    """A drawing call that waits for its job.

    Attributes:
        job: its identifier.
        caller: whose it is.
        preview: the last one, a JPEG.
        interrupted: whether it was asked to end with what is finished.
    """

    job: str
    caller: Caller
    preview: bytes | None = None
    interrupted: bool = False


def underway(request: Request) -> list[Call]:
    """The calls that wait in this process, the oldest first."""
    state = request.app.state
    if not hasattr(state, "a1111"):
        state.a1111 = []
    return state.a1111


def current(request: Request) -> list[tuple[Call, Job]]:
    """The caller's own, with their jobs as they are now."""
    desk, caller = desk_of(request), caller_of(request)
    mine = [each for each in underway(request) if each.caller.owner == caller.owner]
    found = [(each, desk.job(each.job, caller)) for each in mine]
    return [each for each in found if not each[1].over]


def problem(trouble: Trouble) -> Response:
    """A problem with the members that A1111's clients look at."""
    title = TITLES[trouble.type][1]
    more = {"error": title, "errors": trouble.detail, "body": ""}
    return calls.problem(replace(trouble, more={**trouble.more, **more}))


@router.post("/sdapi/v1/txt2img", openapi_extra=body_of(Txt2Img))
async def txt2img(request: Request, body: dict[str, Any]) -> Response:
    """Draw from a prompt."""
    return await _drawn(request, Txt2Img.read(body))


@router.post("/sdapi/v1/img2img", openapi_extra=body_of(Img2Img))
async def img2img(request: Request, body: dict[str, Any]) -> Response:
    """Draw a picture over, or a masked part of it."""
    return await _drawn(request, Img2Img.read(body))


@router.get("/sdapi/v1/progress")
async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """How far the caller's current call is."""
    found = current(request)
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    if not found:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    call, job = found[0]
    done = len(job.results)
    share = (done + (job.count - done) * job.step / max(1, job.steps)) / job.count
    share = min(1.0, BEGUN + share) if job.state == "running" else 0.0
    state |= {
        "interrupted": call.interrupted,
        "job": job.id,
        "job_count": job.count,
        "job_timestamp": _stamp(job),
        "job_no": done,
        "sampling_step": job.step,
        "sampling_steps": job.steps,
    }
    told = None if job.position is None else f"{job.position} jobs are served before"
    spent = 0.0 if job.began is None else time.time() - job.began
    show = call.preview is not None and not skip_current_image
    return {
        "progress": share,
        "eta_relative": spent / share - spent if share else 0.0,
        "state": state,
        "current_image": base64.b64encode(call.preview or b"").decode() if show else None,
        "textinfo": told,
    }


@router.post("/sdapi/v1/interrupt")
async def interrupt(request: Request, desk: TheDesk, caller: TheCaller) -> dict[str, Any]:
    """End the caller's calls that are at work through this API; those that wait for their turn go on waiting."""
    for call, job in current(request):
        if job.state == "running":
            call.interrupted = True
            await desk.cancel(job.id, caller, "it was interrupted")
    return {}


@router.post("/sdapi/v1/skip")
async def skip(request: Request, desk: TheDesk, caller: TheCaller) -> dict[str, Any]:
    """End the caller's current call, if it draws one picture."""
    found = [each for each in current(request) if each[1].state == "running"]
    if not found:
        return {}
    call, job = found[0]
    if job.count > 1:
        raise refused(
            "conflict",
            f"the {job.count} pictures of a call are drawn together, so that none can be skipped; "
            "interrupt ends the call with those that are finished",
            job=job.id,
        )
    call.interrupted = True
    await desk.cancel(job.id, caller, "it was skipped")
    return {}


async def _drawn(request: Request, sent: Txt2Img | Img2Img) -> Response:
    """Order what was asked, wait, answer."""
    plan = await planned(request, sent)
    desk, caller = desk_of(request), caller_of(request)
    job, _ = await calls.submitted(request, plan.order)
    if not sent.override_settings_restore_afterwards:
        await keep_options(request, sent.override_settings)
    call = Call(job.id, caller)
    waiting = underway(request)
    waiting.append(call)
    try:
        async for event in calls.watched(request, job):
            if isinstance(event, Shown):
                call.preview = event.jpeg
    finally:
        waiting.remove(call)
    ended = desk.job(job.id, caller)
    if ended.state != "done" and not (call.interrupted and ended.results):
        raise calls.refused_by(ended)
    ended = replace(ended, results=tuple(sorted(ended.results, key=lambda each: each.image)))
    files = [desk.result_file(ended.id, each.image, caller) for each in ended.results]
    answer = await by_hand(lambda: _answer(sent, plan, ended, [each.read_bytes() for each in files]))
    return JSONResponse(answer)


def _answer(sent: ToImage, plan: Plan, job: Job, pictures: list[bytes]) -> dict[str, Any]:
    """Pictures in base64, what was asked, and what made them."""
    if plan.back is not None:
        pictures = [plan.back(each) for each in pictures]
    texts = [_infotext(each) for each in pictures]
    kind = KINDS[plan.options.samples_format]
    quality = None if kind == "png" else plan.options.jpeg_quality
    images = [base64.b64encode(as_format(each, kind, quality)).decode() for each in pictures]
    return {
        "images": images if sent.send_images else [],
        "parameters": _parameters(sent, job.results[0]),
        "info": json.dumps(_info(sent, job, texts), ensure_ascii=False),
    }


def _infotext(png: bytes) -> str:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return str(image.info.get("parameters", ""))


def _parameters(sent: ToImage, first: Result) -> dict[str, Any]:
    """What was sent, with everything that was left out; pictures only where they are asked for."""
    settings = first.receipt["settings"]
    values = sent.model_dump()
    if isinstance(sent, Img2Img) and not sent.include_init_images:
        values |= {"init_images": None, "mask": None}
    usual = {
        "width": settings["width"],
        "height": settings["height"],
        "steps": settings["steps"],
        "cfg_scale": settings["guidance"],
        "sampler_name": sent.sampler_index or label_of(settings["solver"]),
        "scheduler": scheduler_label(settings.get("grid")),
    }
    return values | {name: value for name, value in usual.items() if values[name] is None}


def _info(sent: ToImage, job: Job, texts: list[str]) -> dict[str, Any]:
    """What made the pictures, as A1111's ``Processed.js`` has it."""
    receipts = [each.receipt for each in job.results]
    settings = [each["settings"] for each in receipts]
    first, model = settings[0], receipts[0]["model"]
    subseeds = [each.get("variation_seed") for each in settings]
    files = model["files"]
    return {
        "prompt": first["prompt"],
        "all_prompts": [each["prompt"] for each in settings],
        "negative_prompt": first["negative"],
        "all_negative_prompts": [each["negative"] for each in settings],
        "seed": job.results[0].seed,
        "all_seeds": [each.seed for each in job.results],
        "subseed": -1 if subseeds[0] is None else subseeds[0],
        "all_subseeds": [-1 if each is None else each for each in subseeds],
        "subseed_strength": sent.subseed_strength,
        "width": first["width"],
        "height": first["height"],
        "sampler_name": label_of(first["solver"]),
        "cfg_scale": first["guidance"],
        "steps": first["steps"],
        "batch_size": sent.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model["title"],
        "sd_model_hash": files[0]["sha256"][:10] if files else None,
        "sd_vae_name": job.order.vae,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": sent.denoising_strength if _walks_again(sent) else None,
        "extra_generation_params": {"Schedule type": scheduler_label(first.get("grid"))},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": _stamp(job),
        "clip_skip": first.get("clip_skip", 1),
        "is_using_inpainting_conditioning": False,
        "version": f"sumuk {receipts[0]['sumuk']}",
        "licence": receipts[0].get("licence"),
        "job": job.id,
    }


def _walks_again(sent: ToImage) -> bool:
    return isinstance(sent, Img2Img) or (isinstance(sent, Txt2Img) and sent.enable_hr)


def _stamp(job: Job) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.began or job.created))
