"""The tab of the compare grid: two axes over what stands in Create, filled in as the pictures come."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from sumuk.serve.order import Job
from sumuk.serve.page import markup
from sumuk.serve.page.axes import AXES, planned
from sumuk.serve.page.context import QUIET, Page, caller_of, written
from sumuk.serve.page.create import Studio
from sumuk.serve.page.form import formed
from sumuk.serve.page.grids import Grid
from sumuk.serve.page.markup import element, text
from sumuk.serve.page.sheet import Sheet
from sumuk.serve.page.words import Words
from sumuk.serve.trouble import Refused

AGAIN = 600
"""Milliseconds between two looks at a grid that is being drawn."""
Updates = dict[Any, Any]


def build(page: Page, studio: Studio) -> tuple[gr.HTML, gr.Textbox]:
    """Lay out the tab, and give it its events.

    Returns:
        The grid, whose pictures can be sent; the name of the one that is shown.
    """
    words = page.words
    choices = [(words("axis:none"), "none"), *((words(axis.word), name) for name, axis in AXES.items())]
    sides: list[Any] = []
    gr.HTML(f'<p class="hint">{text(words("compare-hint"))}</p>', apply_default_css=False)
    with gr.Row(elem_classes="duo loose"):
        for side, usual in (("across", "steps"), ("down", "seed")):
            with gr.Column():
                axis = gr.Dropdown(choices, value=usual, label=words(side), filterable=False, elem_id=side)
                values = AXES[usual].usual
                sides += [axis, gr.Textbox(values, label=words("values"), lines=3, elem_id=f"{side}-values")]
    with gr.Row(elem_classes="narrow"):
        start = gr.Button(words("compare"), variant="primary", elem_id="compare-draw", scale=3)
        stop = gr.Button(words("cancel"), elem_id="compare-cancel", visible=False, scale=1)
    notice = written(elem_id="compare-notice")
    hint = element("p", text(words("compare-empty")), class_="hint")
    grid = written(hint, elem_id="compare-grid")
    shown = gr.Textbox("", visible="hidden", elem_id="compare-shown")
    act = _Acts(page, studio, {"start": start, "stop": stop, "notice": notice, "grid": grid, "shown": shown})
    for place in (0, 2):
        sides[place].input(act.propose, sides[place], sides[place + 1], **QUIET)
    changed = [start, stop, notice, grid, shown]
    start.click(act.draw, [*sides, *studio.form.values()], changed, **QUIET)
    grid.again(act.look, shown, changed, **QUIET)
    shown.change(act.look, shown, changed, **QUIET)
    stop.click(act.cancel, shown, changed, **QUIET)
    return grid, shown


class _Acts:
    """The handlers."""

    def __init__(self, page: Page, studio: Studio, parts: dict[str, Any]) -> None:
        self.page, self.studio, self.parts = page, studio, parts

    async def propose(self, name: str) -> str:
        """Values of an axis that make sense at first."""
        if name in ("none", "prompt") or AXES[name].usual:
            return AXES[name].usual if name in AXES else ""
        try:
            if name == "solver":
                return "\n".join(each["name"] for each in (await self.page.desk.choices())["solvers"][:4])
            return "\n".join(each.name for each in await self.page.desk.catalogue() if each.sort == "model")
        except Refused:  # not ready yet; one can write
            return ""

    async def draw(
        self, request: gr.Request, across: str, columns: str, down: str, rows: str, *values: Any
    ) -> Updates:
        page, caller = self.page, caller_of(request)
        form = formed(self.studio.form, values)
        try:
            plan = planned(form, (across, columns), (down, rows), page.words)
            title = "" if "prompt" in (across, down) else form["prompt"] or page.words("no-prompt")
            sheet = Sheet(title, _labels(page.words, *plan.across), _labels(page.words, *plan.down))
            grid = Grid(page.desk, page.kept, caller, plan, sheet)
        except Exception as error:
            return {self.parts["notice"]: page.told(error)}
        page.grids.add(grid)
        return {self.parts["shown"]: grid.name, **self._shown(grid)}

    async def look(self, request: gr.Request, name: str) -> Updates:
        if not name:
            return {self.parts["notice"]: gr.skip()}
        try:
            return self._shown(self.page.grids.find(name, caller_of(request)))
        except Refused:  # the server has started anew: its pictures are in the gallery
            hint = element("p", text(self.page.words("compare-empty")), class_="hint")
            return {self.parts["grid"]: hint, self.parts["shown"]: "", **self._busy(False)}

    async def cancel(self, request: gr.Request, name: str) -> Updates:
        try:
            grid = self.page.grids.find(name, caller_of(request))
            await grid.cancel()
        except Exception as error:
            return {self.parts["notice"]: self.page.told(error)}
        return self._shown(grid)

    def _busy(self, busy: bool) -> Updates:
        return {self.parts["start"]: gr.update(visible=not busy), self.parts["stop"]: gr.update(visible=busy)}

    def _shown(self, grid: Grid) -> Updates:
        grid.look()
        told = "" if grid.trouble is None else markup.notice(self.page.words, grid.trouble)
        shown = {self.parts["grid"]: _table(self.page.words, grid), self.parts["notice"]: told}
        return shown | self._busy(not grid.over)


def _labels(words: Words, name: str, values: list[Any]) -> tuple[str, list[str]]:
    """What an axis is called, and its values as they are shown."""
    if name == "none":
        return "", [""]
    called = words(AXES[name].word)
    lead = "" if AXES[name].read is None else f"{called} "
    return called, [f"{lead}{value}" for value in values]


def _table(words: Words, grid: Grid) -> str:
    sheet = grid.sheet
    jobs = [job for line in sheet.jobs for job in line]
    done = sum(job is not None and bool(job.results) for job in jobs)
    told = element("p", text(words("progress-grid", done=done, all=len(jobs))), class_="hint", role="status")
    head = "".join(element("th", text(each), scope="col") for each in ["", *sheet.across[1]])
    corner = " / ".join(each for each in (sheet.down[0], sheet.across[0]) if each)
    body = "".join(
        element("tr", element("th", text(label), scope="row") + "".join(_cell(words, job) for job in line))
        for label, line in zip(sheet.down[1], sheet.jobs, strict=True)
    )
    caption = element("caption", text(corner), class_="unseen")
    table = element(
        "table", f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", class_="compare"
    )
    shown = (
        told + element("div", table, class_="scroll", tabindex=0) + (_exports(words, grid) if done else "")
    )
    again = {} if grid.over else {"data_again": AGAIN, "data_turn": time.monotonic_ns()}
    return element("div", shown, **again)


def _cell(words: Words, job: Job | None) -> str:
    if job is not None and job.results:
        (result, *_) = job.results
        about = {"data_act": "send-all", "data_job": job.id, "data_image": result.image}
        picture = markup.image(words, job, result)
        return element("td", element("button", picture, type="button", title=words("send-all"), **about))
    if job is None:
        inside = ""
    elif job.state == "running" and job.steps:
        inside = f"{job.step} / {job.steps}"
    else:
        inside = words(f"state:{job.state}")
    return element("td", element("div", text(inside), class_="dry"))


def _exports(words: Words, grid: Grid) -> str:
    links = [("png", words("sheet")), ("csv", "CSV"), ("json", "JSON")]
    inside = element("span", text(words("export")))
    for kind, label in links:
        address, name = f"../page/sheets/{grid.name}.{kind}", f"sumuk-compare.{kind}"
        inside += element("a", text(label), href=address, download=name, class_="act")
    return element("div", inside, class_="acts")
