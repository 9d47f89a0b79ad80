"""The tab of what runs and waits: places in the line, how far each is, and a way to stop it."""

from __future__ import annotations

import time

import gradio as gr

from sumuk.serve.order import Caller, Job
from sumuk.serve.page import markup
from sumuk.serve.page.context import QUIET, Page, about, caller_of, written
from sumuk.serve.page.markup import element, text

AGAIN = 1000
"""Milliseconds between two looks, while the tab is shown."""
MOST = 100
ENDED = 8
"""Jobs that ended lately, below."""


def build(page: Page, tab: gr.Tab) -> None:
    """Lay out the tab, and give it its events."""
    place = written(elem_id="queue")

    async def show(request: gr.Request) -> str:
        try:
            return _shown(page, caller_of(request))
        except Exception as error:
            return page.told(error)

    async def act(request: gr.Request, event: gr.EventData) -> str:
        caller = caller_of(request)
        try:
            await page.desk.cancel(str(about(event).get("job")), caller)
            return _shown(page, caller)
        except Exception as error:
            return page.told(error)

    tab.select(show, None, place, **QUIET)
    place.again(show, None, place, **QUIET)
    place.act(act, None, place, **QUIET)


def _shown(page: Page, caller: Caller) -> str:
    words = page.words
    going = page.desk.jobs(caller, limit=MOST, states=("running", "queued"))
    going.sort(key=lambda job: (job.state != "running", job.position or 0, job.created))
    ended = page.desk.jobs(caller, limit=ENDED, states=("done", "failed", "cancelled"))
    lines = "".join(_line(page, job) for job in going)
    shown = (
        element("ul", lines, class_="jobs")
        if going
        else element("p", text(words("queue-empty")), class_="hint")
    )
    if ended:
        below = "".join(_line(page, job) for job in ended)
        shown += element("h3", text(words("ended")), class_="quiet") + element("ul", below, class_="jobs")
    return element("div", shown, data_again=AGAIN, data_turn=time.monotonic_ns())


def _line(page: Page, job: Job) -> str:
    words = page.words
    prompt = str(job.order.values.get("prompt", "")) or words("no-prompt")
    minutes = int((time.time() - job.created) // 60)
    about = [
        words(f"state:{job.state}"),
        words.count(job.count),
        words("ago", minutes=minutes) if minutes else words("now"),
    ]
    if job.state == "queued" and job.position:
        about.insert(1, words("position", count=job.position))
    if job.state == "running" and job.steps:
        about.insert(1, words("progress", step=job.step, steps=job.steps))
    if job.trouble is not None and job.state == "failed":
        about.append(f"{words(f'why:{job.trouble.type}')}: {job.trouble.detail}")
    what = element("p", text(prompt)) + element("small", text(" · ".join(about)))
    if job.state == "running":
        what += element("progress", value=job.step, max=job.steps or 1, aria_label=words("state:running"))
    stop = "" if job.over else markup.act("cancel", words("cancel"), job=job.id)
    return element("li", element("div", what, class_="what walk") + stop)
