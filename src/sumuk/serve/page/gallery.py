"""The tab of finished pictures: a wall of them, and what made the one that was chosen."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sumuk.serve.order import Caller, Job, Result, State
from sumuk.serve.page import markup
from sumuk.serve.page.context import QUIET, Page, about, caller_of, written
from sumuk.serve.page.markup import element, text

JOBS = 24
"""On the wall at once."""
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
"""What failed or was cancelled may have some pictures."""
DETAIL = "gallery-detail"


def build(page: Page, tab: gr.Tab) -> gr.HTML:
    """Lay out the tab, and give it its events.

    Returns:
        The chosen picture, which can be sent.
    """
    with gr.Row(elem_id="gallery-halves"):
        wall = written(elem_id="gallery-wall")
        detail = written(element("p", text(page.words("gallery-pick")), class_="hint"), elem_id=DETAIL)

    async def show(request: gr.Request) -> str:
        return _shown(page, caller_of(request), None)

    async def act(request: gr.Request, event: gr.EventData) -> tuple[Any, Any]:
        told, caller = about(event), caller_of(request)
        try:
            if told.get("act") in ("older", "newest"):
                return _shown(page, caller, told.get("before")), gr.skip()
            return gr.skip(), _picked(page, caller, str(told.get("job")), int(told.get("image", 0)))
        except Exception as error:
            return gr.skip(), page.told(error)

    tab.select(show, None, wall, **QUIET)
    wall.act(act, None, [wall, detail], **QUIET)
    return detail


def _shown(page: Page, caller: Caller, before: str | None) -> str:
    words = page.words
    jobs = page.desk.jobs(caller, limit=JOBS + 1, before=before, states=ENDED)
    if not jobs and before is None:
        return element("p", text(words("gallery-empty")), class_="hint")
    pictures = "".join(_thumb(page, job, result) for job in jobs[:JOBS] for result in job.results)
    turns = "" if before is None else markup.act("newest", words("newest"))
    if len(jobs) > JOBS:
        turns += markup.act("older", words("older"), before=jobs[JOBS - 1].id)
    return element("div", pictures, class_="wall") + element("div", turns, class_="acts")


def _thumb(page: Page, job: Job, result: Result) -> str:
    return element(
        "button",
        markup.image(page.words, job, result),
        type="button",
        data_act="pick",
        data_job=job.id,
        data_image=result.image,
        data_shows=DETAIL,
    )


def _picked(page: Page, caller: Caller, id: str, image: int) -> str:
    words = page.words
    job = page.desk.job(id, caller)
    result = next(each for each in job.results if each.image == image)
    picture = element("a", markup.image(words, job, result), href=markup.source(job, result), target="_blank")
    lines = markup.table(markup.receipt_lines(words, job, result))
    folded = markup.as_json(words("receipt-json"), result.receipt)
    figure = element("div", element("figure", picture), class_="pictures one")
    return figure + markup.sends(words, job, result) + lines + folded
