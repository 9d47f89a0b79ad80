"""The log: what a line says, and what none ever says."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from tests.serve.doorway import doorway
from tests.serve.wire_raw import call, exchange

from sumuk.serve.config import ServeConfig
from sumuk.serve.logs import REQUEST, safe, set_up

TOKEN = "a-token-of-16-or-more"
EVIL = "\x1b[2J\r\n2026 INFO all is well \u202e\u2028\x85\0"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The process's log is everybody's; leave it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(form: str, level: int = logging.INFO) -> io.StringIO:
    stream = io.StringIO()
    set_up(ServeConfig(log=form, tokens={"ann": TOKEN}), level, stream)
    return stream


def test_a_line_of_json_says_what_is_known():
    stream = lines("json")
    REQUEST.set("abc")
    try:
        logging.getLogger("sumuk.serve").warning("slow %s", "step", extra={"job": "j1", "ms": 12.5})
        logging.getLogger("sumuk.serve").info("free", extra={"job": None})
    finally:
        REQUEST.set("")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "WARNING",
        "logger": "sumuk.serve",
        "message": "slow step",
        "request": "abc",
        "job": "j1",
        "ms": 12.5,
    }
    assert "job" not in second


@pytest.mark.parametrize("form", ["json", "text"])
def test_nobody_writes_lines_of_his_own(form: str):
    stream = lines(form)
    logging.getLogger("x").info("name %s", EVIL, extra={"path": EVIL})
    written = stream.getvalue()
    assert written.count("\n") == 1 and written.endswith("\n")
    assert not set(written[:-1]) & set("\x1b\r\n\u202e\u2028\x85\0")
    assert "\\u001b[2J" in (json.loads(written)["message"] if form == "json" else written)


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_token_is_written_wherever_it_turns_up(form: str):
    stream = lines(form, logging.DEBUG)
    log = logging.getLogger("x")
    log.info("got %s", {"authorization": f"Bearer {TOKEN}"})
    log.info("got Basic YW5uOnNlY3JldA==", extra={"caller": TOKEN})
    try:
        raise ValueError(f"bad token {TOKEN}")
    except ValueError:
        log.exception("it failed")
    written = stream.getvalue()
    assert TOKEN not in written and "YW5u" not in written and written.count("***") >= 4
    assert "ValueError" in written


def test_prompts_are_written_at_debug_alone():
    stream = lines("json", logging.DEBUG)
    logging.getLogger("x").info("an order", extra={"prompt": "a fox"})
    logging.getLogger("x").debug("an order", extra={"prompt": "a fox"})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert "prompt" not in first and second["prompt"] == "a fox"


def test_each_request_has_one_line():
    stream = lines("json")
    with doorway(tokens={"ann": TOKEN}) as url:
        heads = [("Authorization", f"Bearer {TOKEN}")]
        said = exchange(url, call("GET", "/api/jobs?token=hidden&prompt=fox", None, heads))
        exchange(url, call("GET", "/api/a%0ab?x=1"))
        exchange(url, call("GET", "/livez"))
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    found = [line for line in found if line["logger"] == "sumuk.access"]
    assert len(found) == 2  # probes are not worth a line
    first, second = found
    assert first["request"] == said.heads["x-request-id"]
    assert (first["method"], first["path"], first["status"]) == ("GET", "/api/jobs", 200)
    assert (first["caller"], first["address"]) == ("ann", "127.0.0.1") and first["ms"] > 0
    assert (second["status"], second["path"]) == (400, "/api/a\\u000ab")
    assert "hidden" not in stream.getvalue() and "fox" not in stream.getvalue()


def test_a_terminal_gets_colours_and_no_markup():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    set_up(ServeConfig(), logging.INFO, stream)
    logging.getLogger("x").info("[bold]loud[/bold] %s", EVIL, extra={"job": "j1"})
    written = stream.getvalue()
    assert "[bold]loud[/bold]" in written and "\x1b[2J" not in written and "job=j1" in written


def test_other_peoples_chatter_is_not_heard():
    stream = lines("text")
    logging.getLogger("httpx").info("HTTP Request: GET http://x/?token=1")
    logging.getLogger("uvicorn.access").info("GET /?token=1")
    assert stream.getvalue() == ""


def test_korean_stays_korean():
    assert safe("수묵 그림 ✓") == "수묵 그림 ✓"
