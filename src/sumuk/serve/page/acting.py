"""What Create does: draws, cancels, follows, fills its fields, and remembers them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import gradio as gr
from gradio.components import Component

from sumuk.serve.order import Job
from sumuk.serve.page import drawing, markup, remember
from sumuk.serve.page.context import QUIET, Page, about, caller_of
from sumuk.serve.page.create import Studio
from sumuk.serve.page.form import BLANK, Form, formed, order_of, remembered
from sumuk.serve.page.sending import SENDS, replayed, sent
from sumuk.serve.page.waking import woken
from sumuk.serve.trouble import Refused
from sumuk.serve.wire import Entry

Updates = dict[Any, Any]
"""What an event changes."""


def wire(
    page: Page, studio: Studio, tabs: gr.Tabs, blocks: gr.Blocks, sending: Iterable[gr.HTML], grid: gr.Textbox
) -> None:
    """Give Create its events.

    Args:
        page: with the desk.
        studio: the tab.
        tabs: of which it is one.
        blocks: the whole.
        sending: where there are pictures that can be sent here.
        grid: the name of the compare grid that is shown, which is remembered too.
    """
    fields = list(studio.form.values())
    drawn = [studio.stage, studio.notice, studio.draw, studio.cancel, studio.current]
    filled: list[Any] = [*fields, *studio.folds.values(), studio.notice, studio.replay, tabs]
    act = _Acts(page, studio, tabs, grid)
    studio.draw.click(act.draw, fields, drawn, **QUIET)
    studio.cancel.click(act.cancel, studio.current, drawn, **QUIET)
    restored = [*fields, *studio.folds.values(), studio.current, grid, studio.notice]
    blocks.load(act.restore, studio.memory, restored, js=remember.READ, **QUIET).then(
        act.look, studio.current, drawn, **QUIET
    ).then(act.choices, None, [*act.pickers, studio.card, studio.notice], **QUIET)
    studio.stage.again(act.look, studio.current, drawn, trigger_mode="always_last", **QUIET)
    remember.keep({**studio.form, "current": studio.current, "grid_shown": grid})
    studio.refresh.click(act.choices, None, [*act.pickers, studio.card, studio.notice], **QUIET)
    studio.dice.click(lambda: "", None, studio.form["seed"], **QUIET)
    studio.reuse.click(act.reuse, studio.current, studio.form["seed"], **QUIET)
    sides = [studio.form["width"], studio.form["height"]]
    studio.swap.click(None, sides, sides, js="(width, height) => [height, width]", **QUIET)
    for name in ("model", "vae", "control"):
        studio.form[name].input(act.describe, studio.form[name], studio.card, **QUIET)  # type: ignore[attr-defined]
    studio.loras.input(
        act.wear,
        [studio.form["prompt"], studio.loras],
        [studio.form["prompt"], studio.loras, studio.card],
        **QUIET,
    )
    for name in ("start", "hint"):
        studio.form[name].picked(act.picked, studio.form[name], studio.form[name], **QUIET)  # type: ignore[attr-defined]
    studio.replay.picked(act.replay, fields, filled, **QUIET)
    for place in sending:
        place.act(act.send, fields, filled, **QUIET)


class _Acts:
    """The handlers."""

    def __init__(self, page: Page, studio: Studio, tabs: gr.Tabs, grid: gr.Textbox) -> None:
        self.page, self.studio, self.tabs, self.grid = page, studio, tabs, grid
        self.pickers: list[Component] = [
            studio.form["model"],
            studio.form["vae"],
            studio.form["control"],
            studio.loras,
            studio.form["solver"],
            studio.form["grid"],
        ]

    # Drawing.

    def _busy(self, busy: bool) -> Updates:
        return {self.studio.draw: gr.update(visible=not busy), self.studio.cancel: gr.update(visible=busy)}

    def _shown(self, job: Job) -> Updates:
        """A job on the stage, and what is to be said of it."""
        page, studio = self.page, self.studio
        said = drawing.outcome(page, job) if job.over else ""
        return {studio.stage: drawing.stage(page.words, job), studio.notice: said, **self._busy(not job.over)}

    async def draw(self, request: gr.Request, *values: Any) -> Updates:
        page, studio, caller = self.page, self.studio, caller_of(request)
        try:
            await woken(page.desk)
            order = await order_of(formed(studio.form, values), page.kept, caller.owner)
            job, _ = await page.desk.submit(order, caller)
        except Exception as error:  # told as a sentence, and logged if it is a bug
            return {studio.notice: page.told(error)}
        return {studio.current: job.id, **self._shown(job)}

    async def look(self, request: gr.Request, current: str) -> Updates:
        """The job that was started last, as it is now."""
        if not current:
            return {self.studio.notice: gr.skip()}
        try:
            return self._shown(self.page.desk.job(current, caller_of(request)))
        except Refused:  # it is no longer kept
            blank = drawing.blank(self.page.words)
            return {self.studio.stage: blank, self.studio.current: "", **self._busy(False)}

    async def cancel(self, request: gr.Request, current: str) -> Updates:
        try:
            return self._shown(await self.page.desk.cancel(current, caller_of(request)))
        except Exception as error:
            return {self.studio.notice: self.page.told(error)}

    async def reuse(self, request: gr.Request, current: str) -> Any:
        try:
            results = self.page.desk.job(current, caller_of(request)).results
        except Refused:
            results = ()
        return str(results[0].seed) if results else gr.skip()

    # Fields.

    def _fill(self, form: Form) -> Updates:
        """Fields, with the parts unfolded in which something stands."""
        open_ = {
            "model": bool(form["model"] or form["vae"]),
            "start": bool(form["start"]),
            "control": bool(form["hint"]),
            "hires": form["hires"],
            "further": bool(form["further"]),
        }
        filled: Updates = {self.studio.form[name]: form[name] for name in BLANK}
        return filled | {fold: gr.update(open=open_[name]) for name, fold in self.studio.folds.items()}

    async def restore(self, text: str) -> Updates:
        """The fields as this browser kept them; where it kept nothing, what is being written stays."""
        waking = "" if self.page.desk.ready else markup.said(self.page.words("waking"))
        if not text:  # a number that nobody has set would be sent as 0
            numbers = {self.studio.form[name]: None for name, usual in BLANK.items() if usual is None}
            return numbers | {self.studio.notice: waking}
        form = remembered(text)
        rest = {
            self.studio.current: form["current"],
            self.grid: form["grid_shown"],
            self.studio.notice: waking,
        }
        return self._fill(form) | rest

    async def choices(self) -> Updates:
        """What can be picked; waits for a server that is getting ready."""
        page, studio, words = self.page, self.studio, self.page.words
        try:
            await woken(page.desk)
            offered, named = await page.desk.catalogue(), await page.desk.choices()
            usual = await page.desk.describe(page.desk.config.usual)
        except Exception as error:
            return {studio.notice: page.told(error)}
        loras = _of(offered, "lora")
        return {
            studio.form["model"]: gr.update(
                choices=[(f"{words('usual')}: {usual.get('name', '')}", ""), *_of(offered, "model")]
            ),
            studio.form["vae"]: gr.update(choices=[(words("own-vae"), ""), *_of(offered, "vae")]),
            studio.form["control"]: gr.update(
                choices=[(words("control-none"), ""), *_of(offered, "control")]
            ),
            studio.loras: gr.update(choices=loras, value=None, info="" if loras else words("loras-none")),
            studio.form["solver"]: gr.update(choices=[(words("usual"), ""), *_names(named["solvers"])]),
            studio.form["grid"]: gr.update(choices=[(words("usual"), ""), *_names(named["grids"])]),
            studio.card: markup.inspected(words, usual),
            studio.notice: "",
        }

    async def describe(self, name: str) -> str:
        desk = self.page.desk
        try:
            name = name or desk.config.usual
            return markup.inspected(self.page.words, await desk.describe(name))
        except Exception as error:
            return self.page.told(error)

    async def wear(self, prompt: str, name: str | None) -> tuple[Any, ...]:
        if not name:
            return gr.skip(), gr.skip(), gr.skip()
        tag = f"<lora:{name}:1>"
        prompt = prompt if f"<lora:{name}:" in prompt else f"{prompt.rstrip()} {tag}".lstrip()
        return prompt, None, await self.describe(name)

    async def picked(
        self, request: gr.Request, event: gr.EventData, value: dict[str, Any] | None
    ) -> dict[str, Any]:
        """A picture was chosen: it is checked and kept, or it is said why not beside it."""
        page = self.page
        try:
            name = await page.kept.take(caller_of(request).owner, about(event).get("data", ""), "the picture")
        except Exception as error:
            was = value if isinstance(value, dict) else {}
            said = {"error": page.sentence(error), "at": time.time()}  # the same one twice is news too
            return {"picture": was.get("picture"), "mask": was.get("mask"), **said}
        return {"picture": name, "mask": None}

    # From pictures.

    async def replay(self, request: gr.Request, event: gr.EventData, *values: Any) -> Updates:
        studio, form = self.studio, formed(self.studio.form, values)
        done = {studio.replay: {"picture": None, "at": time.time()}}  # so that its place is not busy any more
        try:
            form, said = await replayed(self.page, caller_of(request), about(event).get("data", ""), form)
        except Exception as error:
            return {studio.notice: self.page.told(error), **done}
        return self._fill(form) | {studio.notice: said, **done}

    async def send(self, request: gr.Request, event: gr.EventData, *values: Any) -> Updates:
        form, told = formed(self.studio.form, values), about(event)
        if told.get("act") not in SENDS:
            return {self.studio.notice: gr.skip()}
        try:
            job, image = str(told.get("job")), int(told.get("image", 0))
            form, said = await sent(self.page, caller_of(request), told["act"], job, image, form)
        except Exception as error:
            return {self.studio.notice: self.page.told(error), self.tabs: gr.update(selected="create")}
        return self._fill(form) | {self.studio.notice: said, self.tabs: gr.update(selected="create")}


def _of(offered: list[Entry], sort: str) -> list[tuple[str, str]]:
    return [(each.name, each.name) for each in offered if each.sort == sort]


def _names(named: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each.get("title") or each["name"], each["name"]) for each in named]
