"""The tab where pictures are made: its fields, and where the picture comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from sumuk.serve.page import drawing
from sumuk.serve.page.context import Page, written
from sumuk.serve.page.form import BLANK
from sumuk.serve.page.words import Words

ACCEPT = "image/png,image/jpeg,image/webp"
PICTURE = "sumuk.picture(element, trigger, props, watch)  // tells 'picked'"


@dataclass(frozen=True)
class Studio:
    """The parts of Create that others fill or read.

    Attributes:
        form: the fields, by the names of :data:`~sumuk.serve.page.form.BLANK`.
        current: id of the job that was started last.
        memory: where the browser's text comes in at the start.
        stage: the picture.
        notice: what is to be said.
        draw, cancel, dice, reuse, swap, refresh: buttons.
        loras: adds one to the prompt.
        card: what ``inspect`` says of what was picked last.
        replay: takes a PNG whose settings are wanted.
        folds: the foldable parts, by name.
    """

    form: dict[str, Component]
    current: gr.Textbox
    memory: gr.Textbox
    stage: gr.HTML
    notice: gr.HTML
    draw: gr.Button
    cancel: gr.Button
    dice: gr.Button
    reuse: gr.Button
    swap: gr.Button
    refresh: gr.Button
    loras: gr.Dropdown
    card: gr.HTML
    replay: gr.HTML
    folds: dict[str, gr.Accordion]


def build(page: Page) -> Studio:
    """Lay out the tab."""
    words = page.words
    form: dict[str, Component] = {}
    parts: dict[str, Any] = {}
    with gr.Row(elem_id="studio"):
        with gr.Column(elem_id="words"):
            _words(words, form, parts)
        with gr.Column(elem_id="stage-column"):
            parts["stage"] = gr.HTML(
                drawing.blank(words), js_on_load=drawing.STAGE, apply_default_css=False, elem_id="stage"
            )
        with gr.Column(elem_id="settings"):
            _numbers(words, form, parts)
            folds = {
                "model": _model(page, form, parts),
                "start": _start(page, form),
                "control": _control(page, form),
                "hires": _hires(words, form),
                "further": _further(page, form, parts),
            }
    parts["current"] = gr.Textbox("", visible="hidden", elem_id="current")
    parts["memory"] = gr.Textbox(visible=False)
    return Studio(form={name: form[name] for name in BLANK}, folds=folds, **parts)


def picture(
    page: Page, label: str, *, paint: bool = False, accept: str = ACCEPT, drop: str = "picture-drop"
) -> gr.HTML:
    """A place for a picture; with ``paint``, a mask can be painted over it."""
    words, most = page.words, page.desk.config.body_bytes * 7 // 10  # base64 makes a third more of it
    texts = {
        "label": label,
        "drop": words(drop),
        "other": words("picture-other"),
        "remove": words("picture-remove"),
        "gone": words("picture-gone"),
        "heavy": words("too-heavy", most=most // 2**20),
        "hint": words("paint-hint"),
    }
    texts |= {
        each: words(f"paint-{each}")
        for each in ("brush", "eraser", "size", "undo", "clear", "invert", "canvas")
    }
    return gr.HTML(
        None,
        html_template='<div class="picture"></div>',
        js_on_load=PICTURE,
        apply_default_css=False,
        words=texts,
        paint=paint,
        accept=accept,
        most=most,
    )


def _words(words: Words, form: dict[str, Component], parts: dict[str, Any]) -> None:
    form["prompt"] = gr.Textbox(
        label=words("prompt"),
        placeholder=words("prompt-hint"),
        lines=3,
        max_lines=12,
        elem_id="prompt",
        autofocus=True,
    )
    form["negative"] = gr.Textbox(
        label=words("negative"), placeholder=words("negative-hint"), lines=1, max_lines=6, elem_id="negative"
    )
    with gr.Row():
        parts["draw"] = gr.Button(words("draw"), variant="primary", elem_id="draw", scale=3)
        parts["cancel"] = gr.Button(
            words("cancel"), variant="secondary", elem_id="cancel", visible=False, scale=1
        )
    gr.HTML(f'<p class="hint">{words("keys")}</p>', apply_default_css=False, elem_classes="keys")
    parts["notice"] = written(elem_id="notice")


def _number(words: Words, name: str, *, step: float = 1, usual: str = "usual") -> gr.Number:
    return gr.Number(None, label=words(name), placeholder=words(usual), step=step, elem_id=name)


def _numbers(words: Words, form: dict[str, Component], parts: dict[str, Any]) -> None:
    with gr.Row(elem_classes="trio"):
        form["steps"] = _number(words, "steps")
        form["guidance"] = _number(words, "guidance", step=0.5)
        form["count"] = gr.Number(1, label=words("count"), step=1, elem_id="count")
    with gr.Row(elem_classes="duo"):
        with gr.Row(elem_classes="with-tools"):
            form["width"] = _number(words, "width", step=8)
            parts["swap"] = gr.Button(words("swap"), elem_id="swap", elem_classes="tool")
        form["height"] = _number(words, "height", step=8)
    with gr.Row(elem_classes="with-tools"):
        form["seed"] = gr.Textbox(
            label=words("seed"), placeholder=words("random"), max_lines=1, elem_id="seed"
        )
        parts["dice"] = gr.Button(words("dice"), elem_id="dice", elem_classes="tool")
        parts["reuse"] = gr.Button(words("reuse"), elem_id="reuse", elem_classes="tool")
    with gr.Row(elem_classes="duo"):
        form["solver"] = _choice(words, "solver")
        form["grid"] = _choice(words, "grid")


def _choice(words: Words, name: str, usual: str = "usual") -> gr.Dropdown:
    """A choice among names; others may be typed (names of other programs are known too), and are checked when drawn."""
    return gr.Dropdown(
        [(words(usual), "")],
        value="",
        label=words(name),
        allow_custom_value=True,
        filterable=True,
        elem_id=name,
    )


def _model(page: Page, form: dict[str, Component], parts: dict[str, Any]) -> gr.Accordion:
    words = page.words
    with gr.Accordion(words("part:model"), open=False, elem_id="fold-model") as fold:
        with gr.Row(elem_classes="with-tools"):
            form["model"] = _choice(words, "model")
            parts["refresh"] = gr.Button(words("refresh"), elem_id="refresh", elem_classes="tool")
        form["vae"] = _choice(words, "vae", "own-vae")
        parts["loras"] = gr.Dropdown(
            [],
            value=None,
            allow_custom_value=True,
            label=words("loras"),
            info=words("loras-none"),
            elem_id="loras",
        )
        parts["card"] = written(elem_id="card")
    return fold


def _start(page: Page, form: dict[str, Component]) -> gr.Accordion:
    words = page.words
    with gr.Accordion(words("part:start"), open=False, elem_id="fold-start") as fold:
        form["start"] = picture(page, words("part:start"), paint=True)
        form["strength"] = gr.Slider(0, 1, 0.75, step=0.05, label=words("strength"), elem_id="strength")
        form["mask_blur"] = gr.Number(2, label=words("mask_blur"), step=1, elem_id="mask_blur")
    return fold


def _control(page: Page, form: dict[str, Component]) -> gr.Accordion:
    words = page.words
    with gr.Accordion(words("part:control"), open=False, elem_id="fold-control") as fold:
        form["hint"] = picture(page, words("part:control"))
        form["control"] = _choice(words, "control", "control-none")
        form["control_weight"] = gr.Slider(
            0.05, 2, 1, step=0.05, label=words("control_weight"), elem_id="control_weight"
        )
    return fold


def _hires(words: Words, form: dict[str, Component]) -> gr.Accordion:
    with gr.Accordion(words("part:hires"), open=False, elem_id="fold-hires") as fold:
        form["hires"] = gr.Checkbox(False, label=words("hires"), elem_id="hires")
        with gr.Row(elem_classes="trio"):
            form["hires_scale"] = gr.Number(2, label=words("hires_scale"), step=0.25, elem_id="hires_scale")
            form["hires_strength"] = gr.Number(
                0.5, label=words("hires_strength"), step=0.05, elem_id="hires_strength"
            )
            form["hires_steps"] = gr.Number(0, label=words("hires_steps"), step=1, elem_id="hires_steps")
    return fold


def _further(page: Page, form: dict[str, Component], parts: dict[str, Any]) -> gr.Accordion:
    words = page.words
    with gr.Accordion(words("part:replay"), open=False, elem_id="fold-replay"):
        parts["replay"] = picture(page, words("part:replay"), accept="image/png", drop="replay-drop")
    with gr.Accordion(words("part:further"), open=False, elem_id="fold-further") as fold:
        form["further"] = gr.Textbox(
            label=words("further"), placeholder=words("further-hint"), lines=2, elem_id="further"
        )
    return fold
