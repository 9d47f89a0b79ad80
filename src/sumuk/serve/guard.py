"""The closed door: every request passes here before any framework sees it (pure ASGI).

In this order: is it for this server, does another site's page send it, who is it, is it something that is taken here,
is its body of a bounded size, here in time, and the JSON that it says it is. What does not pass is answered with a
problem (:mod:`~sumuk.serve.trouble`); what passes carries ``scope["sumuk.caller"]``, and every answer the headers of
:mod:`~sumuk.serve.answers`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sumuk.serve.answers import Answer, Send
from sumuk.serve.body import Bodies, Gone, Message, Receive, check_json
from sumuk.serve.config import ServeConfig
from sumuk.serve.keys import Keyring
from sumuk.serve.logs import REQUEST
from sumuk.serve.openai_schema import with_fault
from sumuk.serve.order import Caller
from sumuk.serve.sites import SAFE, Heads, Sites
from sumuk.serve.trouble import Refused, Trouble, refused, trouble_of

Scope = dict[str, Any]
App = Callable[[Any, Receive, Send], Awaitable[None]]

log = logging.getLogger("sumuk.serve")
access = logging.getLogger("sumuk.access")

OPEN = frozenset({"/livez", "/readyz", "/login"})
"""What needs no token."""
PROBES = frozenset({"/livez", "/readyz", "/metrics"})
DULL = re.compile(r"/(livez|readyz|metrics)|.*/(assets|static)/.*")
"""What is asked for every second, or by the hundred: its lines are written at DEBUG."""
API = ("/api/", "/v1/", "/sdapi/")
FORMS = frozenset({"/v1/images/edits", "/v1/images/variations"})
"""What takes ``multipart/form-data``."""
PAGE_API = "/gradio_api/"
"""Below it, what the page says to Gradio and hears of it, wherever the page is mounted."""
MOST_HEADERS, MOST_HEADER_BYTES = 100, 32 * 1024
LONGEST_PATH = 4096
LOGIN_BYTES = 8192
LARGE = 2**20
"""Bytes of JSON that are looked at beside the loop."""
PART = 2**20
"""Bytes of a body that are handed on at once; a form's reader takes twice as long over all of it."""
LINGER = 2.0
"""Seconds in which the rest of a refused body is read, so that the answer is not lost with the connection."""
ALLOWED_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE"
ALLOWED_HEADERS = b"authorization, content-type, idempotency-key"


class Guard:
    """The door before an application.

    Args:
        app: what is behind it.
        config: of the server.
        counted: called with the type of each refusal.

    Raises:
        BadInput: a host, origin or proxy of the configuration is none.
    """

    def __init__(
        self, app: App, config: ServeConfig, counted: Callable[[str], None] = lambda type: None
    ) -> None:
        self.app, self.counted = app, counted
        self.sites = Sites(config)
        self.keyring = Keyring(config)
        self.bodies = Bodies(config.body_bytes, config.body_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            await self._http(dict(scope), receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, request = time.perf_counter(), secrets.token_hex(8)
        remembered = REQUEST.set(request)
        path = _path(scope)
        page = not path.startswith(API) and PAGE_API not in path and path not in PROBES
        answer = Answer(send, request, page=page)
        passing = _Passing(self, scope, path, receive, answer)
        try:
            await passing.go()
        except Gone:
            answer.status = answer.status or 499
        except Exception as error:
            trouble = trouble_of(error)
            if trouble.status == 500:
                log.error("%s %s failed", scope["method"], path, exc_info=error)
            if answer.status:  # half of it is out: only an end without a last part tells that it is not whole
                raise
            self.counted(trouble.type)
            await passing.refuse(trouble)
        finally:
            self.bodies.release(passing.held)
            access.log(
                logging.DEBUG if answer.status < 400 and DULL.fullmatch(path) else logging.INFO,
                "%s %s %d",
                scope["method"],
                path,
                answer.status,
                extra={
                    "method": scope["method"],
                    "path": path,
                    "status": answer.status,
                    "ms": round(1e3 * (time.perf_counter() - began), 1),
                    "caller": passing.owner,
                    "address": passing.address,
                },
            )
            REQUEST.reset(remembered)


class _Passing:
    """One request on its way through the door."""

    def __init__(self, guard: Guard, scope: Scope, path: str, receive: Receive, answer: Answer) -> None:
        self.guard, self.scope, self.path = guard, scope, path
        self.receive, self.answer = receive, answer
        self.method: str = scope["method"]
        self.heads: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            self.heads.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        self.owner = self.address = ""
        self.held = 0
        self.read = False

    async def go(self) -> None:
        """Through all checks to the application.

        Raises:
            Refused: not through all of them.
            Gone: the client went away before.
        """
        guard = self.guard
        self._check_shape()
        guard.sites.check_host(self.heads, (self.scope.get("server") or (None,))[0])
        peer = self.scope.get("client") or (None,)
        self.address = guard.sites.address(peer[0], self.heads)
        scheme = self.scope.get("scheme", "http")
        self.answer.origin = guard.sites.check_origin(self.method, scheme, self.heads)
        if self.method == "OPTIONS" and "access-control-request-method" in self.heads:
            return await self._preflight()
        if not await self._known():
            return None
        body = await self._body()
        self.scope["sumuk.caller"] = Caller(self.owner, self.address)
        self.scope["sumuk.keyring"] = guard.keyring
        if "text/html" in _one(
            self.heads, "accept"
        ):  # what is compressed cannot be looked through for scripts
            self.scope["headers"] = [pair for pair in self.scope["headers"] if pair[0] != b"accept-encoding"]
        await guard.app(self.scope, _replaying(body, self.receive), self.answer.send)
        return None

    async def refuse(self, trouble: Trouble) -> None:
        """Answer with a problem, and read on for a moment if the client is still sending."""
        if self.path.startswith("/v1/"):
            trouble = with_fault(trouble)
        sending = not self.read and (
            "transfer-encoding" in self.heads or _one(self.heads, "content-length") > "0"
        )
        linger = sending and "expect" not in self.heads
        scripted = _one(self.heads, "sec-fetch-mode") not in ("", "navigate")
        await self.answer.problem(trouble, last=not linger, close=sending, scripted=scripted)
        if linger:
            await self._drain()
            await self.answer.send({"type": "http.response.body", "body": b""})

    async def _drain(self) -> None:
        left = self.guard.bodies.most
        try:
            async with asyncio.timeout(LINGER):
                while left > 0:
                    message = await self.receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _check_shape(self) -> None:
        """Refuse what no client of ours sends: too many headers, control characters, bodies where none belong."""
        count = sum(map(len, self.heads.values()))
        size = sum(len(name) + len(value) for name, value in self.scope["headers"])
        if count > MOST_HEADERS or size > MOST_HEADER_BYTES:
            raise refused(
                "bad-request",
                f"{count} headers of {size:,} bytes; at most {MOST_HEADERS} of {MOST_HEADER_BYTES:,} are read",
            )
        if not self.path.isprintable() or len(self.path) > LONGEST_PATH:
            raise refused(
                "bad-request",
                f"the address holds control characters or has more than {LONGEST_PATH:,} characters",
            )
        if _one(self.heads, "upgrade").lower() == "websocket":
            raise refused("bad-request", "there are no websockets here")
        for name in ("authorization", "content-type", "content-length", "content-encoding"):
            if len(self.heads.get(name, ())) > 1:
                raise refused("bad-request", f"the request has two headers {name}; send one")
        if "transfer-encoding" in self.heads and "content-length" in self.heads:
            raise refused("bad-request", "Content-Length and Transfer-Encoding disagree about the body's end")
        if self.method in ("GET", "HEAD", "OPTIONS", "TRACE") and (
            "transfer-encoding" in self.heads or _length(self.heads)
        ):
            raise refused("bad-request", f"{self.method} carries no body")

    async def _preflight(self) -> None:
        """Answer a browser that asks whether a page of another site may call (Fetch, CORS preflight)."""
        if self.answer.origin is None:
            raise refused(
                "foreign-origin", "pages of other sites may call only if they are among the origins"
            )
        await self.answer.bare(
            204,
            [
                (b"access-control-allow-methods", ALLOWED_METHODS),
                (b"access-control-allow-headers", ALLOWED_HEADERS),
                (b"access-control-max-age", b"600"),
            ],
        )

    async def _known(self) -> bool:
        """Find out whose request it is; a browser that shows no token is led to the login page instead."""
        keyring = self.guard.keyring
        if not keyring.needed:
            self.owner = "local"
        elif self.path in OPEN:
            self.owner = "nobody"
        else:
            asks_for_page = self.method in SAFE and "text/html" in _one(self.heads, "accept")
            if asks_for_page and self.answer.page and "authorization" not in self.heads:
                try:
                    self.owner = keyring.owner(self.heads, self.address)
                except Refused:
                    login = self.scope.get("root_path", "") + "/login"
                    await self.answer.bare(303, [(b"location", login.encode()), (b"content-length", b"0")])
                    return False
            else:
                self.owner = keyring.owner(self.heads, self.address)
        return True

    async def _body(self) -> bytes:
        """The body, whole and checked."""
        if self.method in SAFE:
            self.read = True
            return b""
        kind, _, rest = _one(self.heads, "content-type").partition(";")
        kind = kind.strip().lower()
        self._check_kind(kind, rest)
        most = LOGIN_BYTES if self.path in OPEN else self.guard.bodies.most
        if kind == "multipart/form-data":
            most = most * 3 // 4  # as much as JSON holds in base64
        body = await self.guard.bodies.read(self.receive, _length(self.heads), most)
        self.held, self.read = len(body), True
        if body and not kind:
            raise refused("not-json", "a body without a Content-Type; send application/json")
        if body and kind == "application/json":
            found = await asyncio.to_thread(check_json, body) if len(body) > LARGE else check_json(body)
            if PAGE_API in self.path:
                _check_addresses(found)
        return body

    def _check_kind(self, kind: str, rest: str) -> None:
        coding = _one(self.heads, "content-encoding").strip().lower()
        if coding not in ("", "identity"):
            raise refused("not-json", f"bodies are not unpacked here (Content-Encoding: {coding[:40]})")
        charset = re.search(r"charset\s*=\s*\"?([\w-]+)", rest, re.IGNORECASE)
        if charset and charset[1].lower() not in ("utf-8", "utf8"):
            raise refused("not-json", f"bodies are UTF-8 here, not {charset[1][:40]}")
        taken = {"", "application/json"}
        taken |= {"multipart/form-data"} if self.path in FORMS else set()
        taken |= {"application/x-www-form-urlencoded"} if self.path in ("/login", "/logout") else set()
        if kind not in taken:
            raise refused(
                "not-json",
                f"a body of the kind {kind[:60]!r}; {self.path[:100]} takes {' or '.join(sorted(taken - {''}))}",
            )


def _check_addresses(found: Any) -> None:
    """Refuse files of the page that are addresses: Gradio would fetch them."""
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            path = value.get("path")
            if isinstance(path, str) and "://" in re.sub(r"\s", "", path):
                raise refused(
                    "bad-value", f"{path[:100]!r} is an address, and nothing is fetched; send the file"
                )


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body that was read, then what comes later (the client's going away)."""
    waiting = [body[at : at + PART] for at in range(0, max(1, len(body)), PART)][::-1]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": bool(waiting)}
        return await receive()

    return replay


def _path(scope: Scope) -> str:
    """The address below the place where the application is mounted."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _one(heads: Heads, name: str) -> str:
    return ", ".join(heads.get(name, ()))


def _length(heads: Heads) -> int | None:
    said = _one(heads, "content-length")
    return int(said) if said.isdecimal() and len(said) < 20 else None
