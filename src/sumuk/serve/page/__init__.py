"""The web page: Gradio on the same application, in English at ``/en/`` and in Korean at ``/ko/``.

Its handlers speak to the desk directly, as the APIs do. It holds no state of its own but pictures that were given to it
and grids that were begun; what a reader has set lies in the reader's browser.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sumuk.base.errors import MissingExtra

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sumuk.serve.desk import Desk

FOLDER = "page"
"""Within the state folder."""


def mount(app: FastAPI, desk: Desk) -> FastAPI:
    """Put the page behind everything that the application answers already.

    Args:
        app: the application; the page's handlers run on its event loop.
        desk: which takes orders.

    Raises:
        MissingExtra: Gradio is not installed.
    """
    folder = desk.config.state / FOLDER
    # Before the framework is imported: nothing is sent anywhere, and what it writes lies here.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "gradio")}
    try:
        import gradio as gr
    except ImportError:
        raise MissingExtra("the web page", "ui") from None
    from sumuk.serve.page import look
    from sumuk.serve.page.bench import Bench
    from sumuk.serve.page.context import Page
    from sumuk.serve.page.grids import Grids
    from sumuk.serve.page.kept import Kept
    from sumuk.serve.page.layout import laid_out
    from sumuk.serve.page.routes import make_router
    from sumuk.serve.page.surface import Surface
    from sumuk.serve.page.words import LANGUAGES, Words

    kept, grids = Kept(folder / "pictures", desk.config.picture_pixels), Grids()
    bench = None if desk.config.shelf is None else Bench(desk.config.shelf)
    app.include_router(make_router(kept, grids))
    for language in LANGUAGES:
        app = gr.mount_gradio_app(
            app,
            laid_out(Page(desk, Words(language), kept, grids, bench)),
            f"/{language}",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            show_error=False,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=look.theme(),
        )
    app.add_middleware(Surface, heads={language: look.head(language) for language in LANGUAGES})
    return app
