"""The server's log: lines for machines (JSON) or people, that tell of requests and jobs and betray no secret.

Each line of JSON has ``time`` (UTC), ``level``, ``logger``, ``message``, and what is known besides: ``request`` (its
id, which the answer carries as ``X-Request-Id``), ``job``, ``method``, ``path`` without its query, ``status``, ``ms``,
``caller`` (the name of a key). Tokens are struck out wherever they turn up; ``prompt`` is written at level DEBUG only.
Control characters and those that turn the direction of text are written as escapes, so that nobody who chooses a name
or a path writes lines of his own.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, TextIO

from sumuk.serve.config import ServeConfig

REQUEST: ContextVar[str] = ContextVar("sumuk_request", default="")
"""The id of the request that is being served."""
FIELDS = ("job", "method", "path", "status", "ms", "caller", "address")
"""What ``extra=`` may carry, in the order in which it is written."""
QUIET = ("uvicorn.access", "httpx", "httpcore", "asyncio", "multipart", "python_multipart", "gradio", "PIL")
"""Loggers that are heard from WARNING on."""
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")
_SHOWN_TOKEN = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{4,}")


def set_up(config: ServeConfig, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Make every log line of this process ours.

    Args:
        config: ``log`` says which form, ``tokens`` what is struck out.
        level: from which on lines are written.
        stream: where to; the standard error output by default.
    """
    to = stream or sys.stderr
    secrets = tuple(config.tokens.values())
    handler: logging.Handler
    if config.log == "text" and to.isatty():
        from rich.console import Console
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler

        handler = RichHandler(
            console=Console(file=to), show_path=False, highlighter=NullHighlighter(), markup=False
        )
        handler.setFormatter(_Text(secrets, stamp=False))
    else:
        handler = logging.StreamHandler(to)
        handler.setFormatter(_Json(secrets) if config.log == "json" else _Text(secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def safe(text: str) -> str:
    """Text with its control characters as escapes."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Ours(logging.Formatter):
    """What both forms share: which fields a line has, and that they are harmless.

    Args:
        secrets: texts that are never written.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self.secrets = tuple(secrets)

    def clean(self, text: str) -> str:
        """Text without secrets and control characters."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return safe(_SHOWN_TOKEN.sub(r"\1 ***", text))

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """What is known besides the message."""
        found: dict[str, Any] = {}
        if request := REQUEST.get():
            found["request"] = request
        names = (*FIELDS, "prompt") if record.levelno <= logging.DEBUG else FIELDS
        for name in names:
            value = getattr(record, name, None)
            if value not in (None, ""):
                found[name] = value if isinstance(value, (int, float)) else self.clean(str(value))
        return found

    def trace(self, record: logging.LogRecord) -> list[str]:
        """The lines of an exception's trace."""
        if not record.exc_info:
            return []
        return [self.clean(line) for line in self.formatException(record.exc_info).splitlines()]


class _Json(_Ours):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": self.clean(record.getMessage()),
            **self.fields(record),
        }
        if trace := self.trace(record):
            line["trace"] = trace
        return json.dumps(line, ensure_ascii=False)


class _Text(_Ours):
    """For people.

    Args:
        secrets: texts that are never written.
        stamp: time and level stand at the beginning; a terminal's handler writes them itself.
    """

    def __init__(self, secrets: Iterable[str], stamp: bool = True) -> None:
        super().__init__(secrets)
        self.stamp = stamp

    def format(self, record: logging.LogRecord) -> str:
        head = ""
        if self.stamp:
            head = (
                f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))} {record.levelname:7} "
            )
        said = {"method", "path", "status"}  # by the message already
        more = "".join(f" {name}={value}" for name, value in self.fields(record).items() if name not in said)
        line = f"{head}{self.clean(record.getMessage())}{more}"
        return "\n    ".join([line, *self.trace(record)])
