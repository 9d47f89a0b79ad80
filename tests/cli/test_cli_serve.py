"""``sumuk serve``: what it refuses before it listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tests.cli.conftest import Call

from sumuk.cli import serve

SECRET = "a-secret-of-more-than-16"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "a token is needed"),
        (["--host", "studio.example"], "a token is needed"),
        (["--token", "short=abc"], "at least 16"),
        (["--token", SECRET], "NAME=SECRET"),
        (["--token", f"me={SECRET}", "--token", f"me={SECRET}"], "'me' is given twice"),
        (["--memory", "much"], "12GiB"),
        (["--keep-size", "12XB"], "800MiB"),
        (["--model", "/nowhere/none.safetensors"], "none.safetensors"),
        (["--shelf", "/nowhere"], "/nowhere"),
        (["--per-key", "often"], "often"),
        (["--check-prompts", "/nowhere/words.txt"], "words.txt"),
        (["--sign", "/nowhere"], "/nowhere"),
        (["--replicas", "2"], "--cluster"),
        (["--part", "vae"], "NAME=FILE"),
        (["--mode", "quick"], "mode"),
        (["--allow-origin", "not a site"], "not a site"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call: Call, tmp_path: Path, arguments: list[str], said: str):
    answer = call("serve", "--port", "0", "--no-page", "--state", str(tmp_path / "state"), *arguments)
    assert answer.code == 2, answer.err
    line = answer.err.strip().splitlines()[-1]
    assert line.startswith("sumuk: ") and said in line
    assert SECRET not in answer.err, "a secret is never repeated"


def test_a_port_that_is_taken(call: Call, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = call("serve", "--port", str(port), "--no-page", "--state", str(tmp_path))
    assert answer.code == 2 and f"port {port}" in answer.err and "--port" in answer.err


def test_a_missing_package_is_said_with_its_remedy(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "NEEDED", (*serve.NEEDED, "no_such_package"))
    answer = call("serve")
    assert answer.code == 2 and "pip install 'sumuk[serve]'" in answer.err


@pytest.mark.parametrize(
    ("said", "size"),
    [("12GiB", 12 * 2**30), ("800 MiB", 800 * 2**20), ("1.5GB", 15 * 10**8), ("4096", 4096), (None, None)],
)
def test_sizes(said: str | None, size: int | None):
    assert serve._size(said) == size
