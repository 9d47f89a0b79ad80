"""The tab for work on files of the shelf: inspect, merge, prune."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from sumuk.serve.page import markup
from sumuk.serve.page.bench import Bench, Work
from sumuk.serve.page.context import QUIET, Page, caller_of, written
from sumuk.serve.page.markup import element, text

METHODS = ("weighted-sum", "sigmoid", "inverse-sigmoid", "slerp", "cosine-a", "cosine-b")
"""Of merging two models by a rate; the command line knows others, of more models."""
WEIGHTS = ("auto", "plain", "ema")
DTYPES = ("float16", "bfloat16", "float32")
AGAIN = 500
"""Milliseconds between two looks at a command that runs."""
Updates = dict[Any, Any]


def build(page: Page, tab: gr.Tab) -> None:
    """Lay out the tab, and give it its events."""
    words = page.words
    if page.bench is None:
        gr.HTML(markup.said(words("shelf-none")), apply_default_css=False)
        return
    parts = _Parts(page)
    acts: list[tuple[gr.Button, Callable[..., Any], list[Any]]] = []
    with gr.Tabs(elem_classes="narrow"):
        with gr.Tab(words("work:inspect"), id="inspect"):
            inputs: list[Any] = [parts.file("file", "inspect-file")]
            inputs.append(gr.Checkbox(False, label=words("check"), elem_id="inspect-check"))
            acts.append((parts.button("inspect"), _inspect, inputs))
        with gr.Tab(words("work:merge"), id="merge"):
            with gr.Row(elem_classes="duo loose"):
                inputs = [parts.file("first", "merge-first"), parts.file("second", "merge-second")]
            with gr.Row(elem_classes="trio loose"):
                inputs.append(
                    gr.Dropdown(
                        list(METHODS), value=METHODS[0], label=words("method"), elem_id="merge-method"
                    )
                )
                inputs.append(gr.Slider(0, 1, 0.5, step=0.05, label=words("rate"), elem_id="merge-rate"))
                inputs.append(parts.dtype("merge-dtype"))
            inputs.append(parts.name("merge-name"))
            acts.append((parts.button("merge"), _merge, inputs))
        with gr.Tab(words("work:prune"), id="prune"):
            with gr.Row(elem_classes="trio loose"):
                inputs = [parts.file("file", "prune-file")]
                inputs.append(
                    gr.Dropdown(
                        list(WEIGHTS), value=WEIGHTS[0], label=words("weights"), elem_id="prune-weights"
                    )
                )
                inputs.append(parts.dtype("prune-dtype"))
            inputs.append(parts.name("prune-name"))
            acts.append((parts.button("prune"), _prune, inputs))
    stop = gr.Button(words("cancel"), visible=False, elem_id="work-cancel")
    notice = written(elem_id="work-notice")
    output = written(elem_id="work-output")
    work = _Work(page, page.bench, stop, notice, output)
    changed = [stop, notice, output]
    for button, asked, inputs in acts:
        button.click(work.of(asked), inputs, changed, **QUIET)
    stop.click(work.cancel, None, changed, **QUIET)
    output.again(work.look, None, changed, **QUIET)
    tab.select(work.look, None, changed, **QUIET).then(work.files, None, parts.files, **QUIET)


class _Parts:
    """Fields that all of them have."""

    def __init__(self, page: Page) -> None:
        self.words = page.words
        self.files: list[gr.Dropdown] = []

    def file(self, label: str, id: str) -> gr.Dropdown:
        made = gr.Dropdown([], value=None, label=self.words(label), allow_custom_value=True, elem_id=id)
        self.files.append(made)
        return made

    def dtype(self, id: str) -> gr.Dropdown:
        choices = [(self.words("as-it-is"), ""), *((each, each) for each in DTYPES)]
        return gr.Dropdown(choices, value="", label=self.words("dtype"), elem_id=id)

    def name(self, id: str) -> gr.Textbox:
        words = self.words
        return gr.Textbox(
            label=words("new-name"), placeholder=words("new-name-hint"), max_lines=1, elem_id=id
        )

    def button(self, verb: str) -> gr.Button:
        return gr.Button(self.words(f"work:{verb}"), variant="primary", elem_id=f"{verb}-run")


Asked = tuple[list[str | Path], str]
"""The arguments of a command, and the name of the file that it makes (empty: none)."""


def _inspect(page: Page, bench: Bench, file: str | None, check: bool) -> Asked:
    return ["inspect", bench.file(file, page.words), *(["--check"] if check else [])], ""


def _merge(
    page: Page,
    bench: Bench,
    first: str | None,
    second: str | None,
    method: str,
    rate: float,
    dtype: str,
    name: str,
) -> Asked:
    words = page.words
    pair, out = [bench.file(each, words) for each in (first, second)], bench.new(name, words)
    flags = ["--method", method, "--alpha", f"{rate:g}", *_dtype(dtype)]
    return ["merge", *pair, "--out", out, *flags], out.name


def _prune(page: Page, bench: Bench, file: str | None, weights: str, dtype: str, name: str) -> Asked:
    path, out = bench.file(file, page.words), bench.new(name, page.words)
    return ["prune", path, out, "--weights", weights, *_dtype(dtype)], out.name


def _dtype(dtype: str) -> list[str]:
    return ["--dtype", dtype] if dtype else []


class _Work:
    """The handlers."""

    def __init__(self, page: Page, bench: Bench, stop: gr.Button, notice: gr.HTML, output: gr.HTML) -> None:
        self.page, self.bench = page, bench
        self.stop, self.notice, self.output = stop, notice, output

    async def files(self) -> Any:
        """What lies on the shelf now."""
        try:
            offered = [each.file for each in await self.page.desk.catalogue()]
        except Exception as error:  # not ready: there is nothing to choose from yet
            self.page.told(error)
            offered = []
        names = [name for name in offered if (self.bench.shelf / name).exists()]
        return [gr.update(choices=names)] * 4

    def of(self, asked: Callable[..., Asked]) -> Callable[..., Awaitable[Updates]]:
        """The handler that begins a command."""

        async def run(request: gr.Request, *values: Any) -> Updates:
            try:
                arguments, makes = asked(self.page, self.bench, *values)
                work = self.bench.start(caller_of(request).owner, arguments, makes, self.page.words)
            except Exception as error:
                return {self.notice: self.page.told(error)}
            return self._shown(work)

        return run

    async def cancel(self, request: gr.Request) -> Updates:
        self.bench.cancel(caller_of(request).owner)
        return await self.look(request)

    async def look(self, request: gr.Request) -> Updates:
        """What runs or ran last, if it is this caller's."""
        work = self.bench.work
        if work is None or work.owner != caller_of(request).owner:
            return {self.notice: gr.skip()}
        return self._shown(work)

    def _shown(self, work: Work) -> Updates:
        words = self.page.words
        again = {} if work.over else {"data_again": AGAIN, "data_turn": time.monotonic_ns()}
        said = element("pre", text(work.said), tabindex=0) if work.said else ""
        if not work.over:
            told = words("work-runs")
        elif work.code is None:
            told = words("was-cancelled")
        elif work.code != 0:
            told = words("work-failed")
        else:
            told = words("work-made", name=work.makes) if work.makes else words("work-done")
        return {
            self.notice: markup.said(told, trouble=bool(work.code)),
            self.output: element("div", said, **again),
            self.stop: gr.update(visible=not work.over),
        }
