"""HTTP/1.1 as uvicorn speaks it, made strict: whatever is no HTTP gets a problem, and whoever dawdles is let go.

Uvicorn itself answers malformed requests with plain text and waits for a request's headers without end.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from sumuk.serve.answers import DATA_POLICY, problem_document
from sumuk.serve.trouble import Trouble

HEADER_SECONDS = 10.0
"""Within which a request's headers must be here, from its first byte or the connection on."""


class Http11(H11Protocol):
    """One connection."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Asyncio's."""
        super().connection_made(transport)
        self._watch(True)

    def data_received(self, data: bytes) -> None:
        """Asyncio's."""
        super().data_received(data)
        self._watch(self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's."""
        self._watch(False)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._tell(
            Trouble(
                "bad-request",
                "this is no HTTP request that can be read: its first line, a header or a length is malformed, "
                "or its headers are too long",
            )
        )

    def _should_upgrade(self) -> bool:
        return False  # the guard refuses it

    def _watch(self, waiting: bool) -> None:
        """Begin or end the time in which headers must come; what has begun goes on."""
        if not waiting and self._late is not None:
            self._late.cancel()
            self._late = None
        elif waiting and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        self._tell(Trouble("slow", f"the request's headers did not arrive within {HEADER_SECONDS:g} seconds"))

    def _tell(self, trouble: Trouble) -> None:
        """Answer with a problem, unless an answer has begun, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body, headers = problem_document(trouble)
            headers += [
                (b"x-content-type-options", b"nosniff"),
                (b"content-security-policy", DATA_POLICY.encode()),
                (b"connection", b"close"),
            ]
            start = h11.Response(
                status_code=trouble.status, headers=headers, reason=STATUS_PHRASES[trouble.status]
            )
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self._write(event)
        self.transport.close()

    def _write(self, event: Any) -> None:
        self.transport.write(self.conn.send(event) or b"")
