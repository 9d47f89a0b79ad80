"""A job on the stage: waiting, drawing, done. A script puts steps and previews in as the job's own events tell them."""

from __future__ import annotations

import time

from sumuk.serve.order import Job
from sumuk.serve.page import markup
from sumuk.serve.page.context import Page
from sumuk.serve.page.markup import element, text
from sumuk.serve.page.words import Words

QUEUED, RUNNING = 1500, 15_000
"""Milliseconds until the stage is written anew: a waiting job's place changes, and lost events should not matter."""
STAGE = "sumuk.stage(element, trigger, watch)  // tells 'act' and 'again'"


def blank(words: Words) -> str:
    """The stage before anything was drawn."""
    inside = f"<b>{text(words('empty'))}</b>{text(words('empty-hint'))}"
    return element(
        "div", element("div", element("p", inside, class_="blank"), class_="paper"), class_="stage"
    )


def stage(words: Words, job: Job) -> str:
    """A job as it is: its pictures, finished or not, and how far it is."""
    finished = {each.image: each for each in job.results}
    figures = []
    for image in range(job.count):
        if result := finished.get(image):
            caption = f"{words('seed')} {result.seed} · {result.width} × {result.height}"
            shown = markup.image(words, job, result)
            inside = element("a", shown, href=markup.source(job, result), target="_blank")
            inside += element("figcaption", text(caption)) + markup.sends(words, job, result)
        elif job.over:
            continue
        else:
            inside = element("div", class_="dry", data_image=image)
        figures.append(element("figure", inside))
    if not figures:
        return blank(words)
    kind = "pictures one" if job.count == 1 else "pictures"
    paper = element("div", element("div", "".join(figures), class_=kind), class_="paper")
    following: dict[str, object] = {}
    if not job.over:
        again = QUEUED if job.state == "queued" else RUNNING
        following = {"data_job": job.id, "data_again": again, "data_turn": time.monotonic_ns()}
    return element("div", paper + _walk(words, job), class_="stage", **following)


def _walk(words: Words, job: Job) -> str:
    if job.over:
        taken = (job.ended or 0) - (job.began or job.created)
        done = words("drawn", count=words.count(len(job.results)), seconds=f"{taken:.1f}")
        return element("div", element("span", text(done), role="status"), class_="walk")
    if job.state == "queued":
        sentence = words("position", count=job.position) if job.position else words("starting")
        return element("div", element("span", text(sentence), role="status"), class_="walk")
    steps = job.steps or 1
    told = words("progress", step=job.step, steps=steps) if job.step else words("starting")
    bar = element("progress", value=job.step, max=steps, aria_label=words("state:running"))
    says = words("progress", step="{step}", steps="{steps}")
    return element("div", bar + element("span", text(told), data_says=says), class_="walk")


def outcome(page: Page, job: Job) -> str:
    """What is to be said of a job that is over; nothing if all went well."""
    if job.state == "failed" and job.trouble is not None:
        return markup.notice(page.words, job.trouble)
    return markup.said(page.words("was-cancelled")) if job.state == "cancelled" else ""
