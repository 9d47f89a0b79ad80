"""What every part of the page is built with, and how its handlers know who calls and tell what went wrong."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sumuk.base.errors import SumukError
from sumuk.serve.desk import Desk
from sumuk.serve.order import Caller
from sumuk.serve.page import markup
from sumuk.serve.page.bench import Bench
from sumuk.serve.page.grids import Grids
from sumuk.serve.page.kept import Kept
from sumuk.serve.page.words import Words
from sumuk.serve.trouble import Trouble, trouble_of

log = logging.getLogger("sumuk.serve")

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
"""Of every event: the framework makes no API of it and draws nothing over it; we have our own of both. Nor does it go
through the framework's queue, whose stream of answers loses those of an event that begins just as another ends: an
event here is one request with one answer. What takes long is looked at again and again, and goes on unseen."""
ACTS = "sumuk.acts(element, trigger, watch)  // tells 'act' and 'again'"


@dataclass(frozen=True)
class Page:
    """The page in one language.

    Attributes:
        desk: which takes orders.
        words: what it says.
        kept: pictures that were given to it.
        grids: that were begun.
        bench: for work on the shelf; None: there is none.
    """

    desk: Desk
    words: Words
    kept: Kept
    grids: Grids
    bench: Bench | None

    def told(self, error: Exception) -> str:
        """An error, as a sentence in HTML; one that is a bug is logged, and its words stay in the log."""
        return markup.notice(self.words, self._trouble(error))

    def sentence(self, error: Exception) -> str:
        """The same as plain text."""
        trouble = self._trouble(error)
        return f"{self.words(f'why:{trouble.type}')}: {trouble.detail}"

    def _trouble(self, error: Exception) -> Trouble:
        if not isinstance(error, SumukError):
            log.error("the page failed", exc_info=error)
        return trouble_of(error)


def caller_of(request: gr.Request) -> Caller:
    """Who calls: the guard has found it out (:mod:`sumuk.serve.guard`); without one, who is here."""
    scope = {} if request.request is None else request.request.scope
    return scope.get("sumuk.caller", Caller())


def about(event: gr.EventData) -> dict[str, Any]:
    """What a script tells with an event; anything may stand in it."""
    return event._data if isinstance(event._data, dict) else {}


def written(value: str = "", **more: Any) -> gr.HTML:
    """A place for HTML that Python writes: its buttons tell ``act``, and what has ``data-again`` tells ``again``."""
    return gr.HTML(value, js_on_load=ACTS, apply_default_css=False, **more)
