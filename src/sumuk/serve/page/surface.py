"""What of the framework can be reached: its page, its files and its events, and nothing else.

Gradio brings many addresses with it (uploads, files by path, a proxy, fetching by URL, an API of its own). The page
uses none of them: its pictures come and go by ways of ours, so all of those are shut.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sumuk.serve.calls import problem
from sumuk.serve.page.words import LANGUAGES
from sumuk.serve.trouble import Trouble

log = logging.getLogger("sumuk.serve")

_OURS = re.compile(rf"/(?P<language>{'|'.join(LANGUAGES)})(?P<rest>/.*|)", re.DOTALL)
CALL = "/gradio_api/run/predict"
"""Where an event of the page comes in."""
_OPEN = re.compile(rf"/?|/config/?|/theme\.css|/(?:assets|static)/.*|{CALL}|/gradio_api/app_id/?")
_OWN = re.compile(rb'<meta\s[^>]*(?:og|twitter):[^>]*>|<link rel="manifest"[^>]*>')
"""What the framework's HTML says of itself to other sites."""


class Surface:
    """ASGI middleware before the framework's applications.

    Everything of theirs that the page does not use is answered with 404, and their HTML gets our head.

    Args:
        app: what is behind it.
        heads: what is to stand first in the HTML of each language.
    """

    def __init__(self, app: ASGIApp, heads: Mapping[str, str]) -> None:
        self.app, self.heads = app, heads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path, root = scope.get("path", ""), scope.get("root_path", "")
        found = _OURS.fullmatch(path.removeprefix(root))
        if found is None or scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket" or not _OPEN.fullmatch(found["rest"]):
            missing = Trouble("not-found", f"there is nothing at {path[:200]}")
            await problem(missing)(scope, receive, send)
        elif found["rest"] == CALL:
            await self._call(scope, receive, send)
        elif found["rest"] == "/" and scope["method"] == "GET":
            await self._page(found["language"], scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An event. Our handlers tell in their answers what goes wrong; what fails before is no call of the page."""
        wrong = problem(Trouble("bad-request", "this is no call that the page makes; load it anew"))
        status = 0

        async def checked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if status < 500:
                await send(message)

        try:
            await self.app(scope, receive, checked)
        except Exception as error:
            if 0 < status < 500:  # half of the answer is out
                raise
            log.warning("a call of the page failed: %r", error)
            status = 500
        if status >= 500:
            await wrong(scope, receive, send)

    async def _page(self, language: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The HTML, in its language and with our scripts before the framework's."""
        started: Message = {}
        body = bytearray()

        async def gather(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.update(message)
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    html = _OWN.sub(b"", bytes(body)).replace(b'lang="en"', f'lang="{language}"'.encode(), 1)
                    html = html.replace(b"<head>", b"<head>" + self.heads[language].encode(), 1)
                    MutableHeaders(scope=started)["Content-Length"] = str(len(html))
                    await send(started)
                    await send({"type": "http.response.body", "body": html})

        plain = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        await self.app({**scope, "headers": plain}, receive, gather)
