"""A real headless Chromium, and a reader with a window of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Reader:
    """A window on the page.

    Attributes:
        page: Playwright's.
        asked: the address of every request.
        complained: errors of the browser's console and of the page's scripts.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[str] = []
        self.complained: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complained.append(str(error)))
        page.on("console", lambda said: self.complained.append(said.text) if said.type == "error" else None)

    def open(self, path: str = "/") -> Any:
        """The page, when its fields are there and filled."""
        self.page.goto(self.url + path)
        self.page.wait_for_selector("#prompt textarea")
        self.page.wait_for_load_state("networkidle")
        return self.page

    def foreign(self) -> list[str]:
        """Requests that went elsewhere."""
        return [url for url in self.asked if not url.startswith((self.url, "data:", "blob:"))]

    def wide(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, until the block ends; the test is skipped where it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("gradio", reason="the page is not installed: pip install 'sumuk[ui]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as made:
        browser = made.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for a module: it may not outlast it, as it holds the thread's event loop."""
    with chromium() as made:
        yield made


@contextmanager
def reading(browser: Any, url: str, **window: Any) -> Iterator[Reader]:
    """A reader with an empty profile; what its browser says stands in the report if the test fails."""
    context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 900}, **window})
    context.set_default_timeout(20_000)
    reader = Reader(context.new_page(), url)
    try:
        yield reader
    finally:
        print("\n".join(reader.complained))
        context.close()
