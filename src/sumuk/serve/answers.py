"""What every answer carries: headers that keep browsers from doing more with it than is meant.

Answers of the APIs are data and nothing else: no script, no frame, no cache, no other site. The page may run its own
scripts: those of this server, and those in its own text, which are named one by one by their digest (CSP 3), so that a
script that somebody smuggles into the page by a prompt or a file name does not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sumuk.serve.trouble import MEDIA, Trouble

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
PAGE_POLICY = (
    # Gradio runs the ``js=`` of its events by ``new Function``, and its parts style themselves
    "default-src 'none'; script-src 'self' 'unsafe-eval' {scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; manifest-src 'self'; "
    "form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
LONGEST_PAGE = 8 * 2**20
"""Bytes of HTML whose scripts are looked for."""
EXPOSED = "Location, Retry-After, X-Request-Id"
_SCRIPT = re.compile(rb"<script\b(?![^>]*\ssrc\s*=)[^>]*>(.*?)</script\s*>", re.DOTALL | re.IGNORECASE)


class Answer:
    """An answer on its way out.

    Args:
        send: ASGI's.
        request: the id of the request.
        page: HTML in it is the page's own, and not a file that somebody sent.
        origin: another site's whose page asks, if it may.

    Attributes:
        status: of HTTP; 0: none yet.
        over: whether all of it is out.
    """

    def __init__(self, send: Send, request: str, *, page: bool = False) -> None:
        self._send = send
        self.request, self.page = request, page
        self.origin: str | None = None
        self.status = 0
        self.over = False
        self._held: Message | None = None
        self._text = b""

    async def send(self, message: Message) -> None:
        """ASGI's send, with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = self._headers(message.get("headers", ()))
            message = {**message, "headers": headers}
            kind = _value(headers, b"content-type")
            if self.page and kind.startswith(b"text/html") and not _value(headers, b"content-encoding"):
                self._held = message  # until its scripts are known
                return
        elif message["type"] == "http.response.body":
            self.over = not message.get("more_body", False)
            if self._held is not None:
                self._text += message.get("body", b"")
                if not self.over and len(self._text) <= LONGEST_PAGE:
                    return
                start, self._held = self._held, None
                _replace(start["headers"], b"content-security-policy", policy(self._text).encode())
                await self._send(start)
                message = {**message, "body": self._text}
        await self._send(message)

    async def problem(
        self, trouble: Trouble, *, last: bool = True, close: bool = False, scripted: bool = False
    ) -> None:
        """Answer with a problem (RFC 9457).

        Args:
            trouble: the problem.
            last: nothing follows; otherwise an empty last part has to be sent.
            close: no other request is taken on this connection.
            scripted: a script in a browser asked, which is not to be answered by the browser's own question for a name.
        """
        body, headers = problem_document(trouble, basic=not scripted)
        if close:
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": trouble.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})

    async def bare(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer without a body."""
        self.status = status
        headers = self._headers(()) + headers
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})

    def _headers(self, given: Any) -> list[tuple[bytes, bytes]]:
        headers = [
            (name, value)
            for name, value in ((bytes(n).lower(), bytes(v)) for n, v in given)
            if not name.startswith(b"access-control-")  # who may ask from elsewhere is decided here
        ]
        html = _value(headers, b"content-type").startswith(b"text/html")
        usual = {
            b"x-content-type-options": b"nosniff",
            b"content-security-policy": DATA_POLICY.encode(),
            # A form sent under no-referrer says ``Origin: null`` even to its own site, and that is refused
            b"referrer-policy": b"same-origin" if html else b"no-referrer",
            b"cross-origin-resource-policy": b"same-origin",
            b"x-request-id": self.request.encode(),
        }
        if html or not self.page:
            usual[b"cache-control"] = b"no-store"
        if self.origin is not None:
            usual[b"access-control-allow-origin"] = self.origin.encode("latin-1")
            usual[b"access-control-expose-headers"] = EXPOSED.encode()
            usual[b"vary"] = b"Origin"
        here = {name for name, _ in headers}
        return headers + [(name, value) for name, value in usual.items() if name not in here]


def problem_document(trouble: Trouble, *, basic: bool = True) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A problem as a body and its headers."""
    body = json.dumps(trouble.as_problem(), ensure_ascii=False).encode(errors="backslashreplace")
    headers = [(b"content-type", MEDIA.encode()), (b"content-length", str(len(body)).encode())]
    if trouble.retry_after is not None:
        headers.append((b"retry-after", str(max(1, round(trouble.retry_after))).encode()))
    if trouble.type == "no-token":
        ways = b'Bearer realm="sumuk"' + b', Basic realm="sumuk"' * basic
        headers.append((b"www-authenticate", ways))
    return body, headers


def policy(html: bytes) -> str:
    """The Content-Security-Policy under which a page's own scripts run and no other."""
    digests = {
        base64.b64encode(hashlib.sha256(text.replace(b"\r\n", b"\n")).digest()).decode(): None
        for text in _SCRIPT.findall(html[:LONGEST_PAGE])
    }
    return PAGE_POLICY.format(scripts=" ".join(f"'sha256-{digest}'" for digest in digests))


def _value(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for each, value in headers if each == name), b"")


def _replace(headers: list[tuple[bytes, bytes]], name: bytes, value: bytes) -> None:
    headers[:] = [pair for pair in headers if pair[0] != name] + [(name, value)]
