"""HTTP by hand: exactly these bytes to a socket, and what comes back, with its time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Said:
    """An answer.

    Attributes:
        status: 0: the connection was closed without one.
        seconds: from the last byte sent to the last one received.
    """

    status: int = 0
    heads: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """The short name of the problem; empty if it is none."""
        if self.heads.get("content-type") != "application/problem+json":
            return ""
        return self.json["type"].removeprefix("urn:sumuk:")


def call(
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Iterable[tuple[str, str]] = (),
    *,
    host: str = "127.0.0.1",
    kind: str | None = "application/json",
) -> bytes:
    """A request's bytes. Nothing is checked or escaped; a Content-Length is added where there is a body."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    if body is not None:
        lines += [f"Content-Type: {kind}"] if kind else []
        if not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in headers):
            lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def exchange(
    url: str, sent: bytes, *, then: Iterable[bytes] = (), patience: float = 20.0, finish: bool = False
) -> Said:
    """Send bytes on a connection of their own and read one answer.

    Args:
        url: of the server.
        then: more of them, one after another.
        patience: seconds to wait for each part of the answer.
        finish: close our side after the last byte.
    """
    name, _, port = url.removeprefix("http://").rpartition(":")
    said = Said()
    with socket.create_connection((name, int(port)), timeout=patience) as line:
        with suppress(OSError):  # it would not hear more; perhaps it says why
            line.sendall(sent)
            for part in then:
                line.sendall(part)
            if finish:
                line.shutdown(socket.SHUT_WR)
        began = time.perf_counter()
        with suppress(OSError):
            _read(line, said)
        said.seconds = time.perf_counter() - began
    return said


def _read(line: socket.socket, said: Said) -> None:
    got = b""
    while b"\r\n\r\n" not in got:
        part = line.recv(65536)
        if not part:
            return
        got += part
    head, _, said.body = got.partition(b"\r\n\r\n")
    first, *said.lines = head.decode("latin-1").split("\r\n")
    said.status = int(first.split()[1])
    for each in said.lines:
        name, _, value = each.partition(":")
        said.heads[name.lower()] = value.strip()
    left = 0 if said.status == 204 else int(said.heads.get("content-length", -1))
    while len(said.body) < left or left < 0:
        part = line.recv(65536)
        if not part:
            return
        said.body += part
