"""Settings that survive a reload: the browser keeps them, Python checks what comes back.

Whatever changes is written to the browser's storage by a script, without a call to the server; at the start the text
that lies there comes to Python (:func:`~sumuk.serve.page.form.remembered`). Each browser has its own; a picture stands
in it by the name under which the server keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import gradio as gr
from gradio.components import Component

from sumuk.serve.page.context import QUIET

READ = "() => [localStorage.getItem('sumuk.form') || '']"
"""A script whose answer is the input of the handler that restores."""


def keep(fields: Mapping[str, Component]) -> None:
    """Keep these fields in the browser, under their names, whenever one changes."""
    names = json.dumps(list(fields))
    gr.on(
        [field.change for field in fields.values()],  # type: ignore[attr-defined]  # events are made at run time
        None,
        list(fields.values()),
        None,
        js=f"(...values) => {{ sumuk.keep({names}, values); return []; }}",
        **QUIET,
    )
