"""The page as a whole: its head, its tabs, and what goes from one to the other."""

from __future__ import annotations

import gradio as gr

from sumuk.serve.page import acting, compare, create, gallery, look, queue, workshop
from sumuk.serve.page.context import Page

SESSIONS = 100
"""Open pages whose fields the framework remembers; it holds about 0.2 MiB of each."""


def laid_out(page: Page) -> gr.Blocks:
    """The page in one language."""
    words = page.words
    with gr.Blocks(title="수묵 Sumuk", analytics_enabled=False) as blocks:
        look.heading(words)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(words("tab:create"), id="create"):
                studio = create.build(page)
            with gr.Tab(words("tab:gallery"), id="gallery") as hanging:
                hung = gallery.build(page, hanging)
            with gr.Tab(words("tab:compare"), id="compare"):
                grid, shown = compare.build(page, studio)
            with gr.Tab(words("tab:queue"), id="queue") as waiting:
                queue.build(page, waiting)
            with gr.Tab(words("tab:workshop"), id="workshop") as working:
                workshop.build(page, working)
        acting.wire(page, studio, tabs, blocks, (studio.stage, hung, grid), shown)
    blocks.state_session_capacity = SESSIONS
    return blocks
