"""Every bad call that the reliability notes list, to a real server: a problem of 4xx, soon, never 5xx, and all is well.

The table is in ``tests/serve/hostile_http.py``. Throughout, fifty connections are open that never finish their headers.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.serve.conftest import running
from tests.serve.hostile_http import SOON, Case, Place, blow, cases

TOKENS = {"ann": "a-token-for-ann-0123456789", "bo": "a-token-for-bo-9876543210"}
DAWDLERS = 50
TRIES = 5
"""How often a call may be slow before it is called slow: other work of the machine is not the server's fault."""


class Trap:
    """A listener on this machine that no call may lead the server to."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.caught = 0
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while True:
            try:
                self.socket.accept()[0].close()
            except OSError:
                return
            self.caught += 1


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    made = Trap()
    yield made
    made.socket.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, trap: Trap) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hostile")
    shelf = folder / "shelf"
    shelf.mkdir()
    outside = folder / "outside.safetensors"
    outside.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for name in ("linked", "linked.safetensors"):
        (shelf / name).symlink_to(outside)
    tokens = [word for name, token in TOKENS.items() for word in ("--token", f"{name}={token}")]
    with running(folder / "state", "--shelf", str(shelf), *tokens) as server:
        headers = {"Authorization": f"Bearer {TOKENS['bo']}"}
        made = server.client.post("/api/jobs", json={"request": {"steps": 1}}, headers=headers)
        assert made.status_code == 202, made.text
        host = server.url.removeprefix("http://")
        name, port = host.split(":")
        dawdlers = [socket.create_connection((name, int(port))) for _ in range(DAWDLERS)]
        for each in dawdlers:
            each.sendall(f"POST /api/jobs HTTP/1.1\r\nHost: {host}\r\nX-Slow: ".encode())
        yield Place(server.url, TOKENS["ann"], made.json()["id"], trap.port)
        for each in dawdlers:
            each.close()


def test_every_bad_call(place: Place, trap: Trap, capsys: pytest.CaptureFixture[str]):
    wrong, times = [], []
    for case in cases(place):
        said, why = blow(place, case)
        if why:
            wrong.append(f"{case}: {why}")
        if said.status < 400:
            continue
        soon, tries = SOON * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 1
        while said.seconds > soon and tries < TRIES:
            said.seconds, tries = min(said.seconds, blow(place, case)[0].seconds), tries + 1
        times.append((said.seconds, str(case)))
        if said.seconds > soon:
            wrong.append(f"{case}: it took {said.seconds:.2f} s")
    times.sort(reverse=True)
    worst = "\n".join(f"{1e3 * seconds:6.0f} ms  {case}" for seconds, case in times[:8])
    with capsys.disabled():
        if os.environ.get("SUMUK_FIGURES"):
            print(f"\n{len(times)} refusals; the slowest:\n{worst}")
    assert not wrong, f"{len(wrong)} of {len(cases(place))}:\n" + "\n".join(wrong)
    assert len(times) > 500, "the table is not where it was looked for"
    assert not trap.caught, "the server fetched an address that it was given"


def test_the_server_is_well_afterwards(place: Place):
    with httpx.Client(base_url=place.url, timeout=60) as client:
        assert client.get("/livez").text == "ok"
        assert client.get("/readyz").text == "ok"
        headers = {"Authorization": f"Bearer {place.token}"}
        ask = {"prompt": "a fox", "sumuk": {"steps": 2, "seed": 7}}
        drawn = client.post("/v1/images/generations", json=ask, headers=headers)
        assert drawn.status_code == 200 and drawn.json()["data"][0]["b64_json"]


def test_the_table_can_fail(place: Place):
    """What is right is not taken for wrong, and what is wrong not for right."""
    good = Case("x", "good", lambda: place.call("GET", "/api/jobs"))
    assert blow(place, good)[1].startswith("status 200")
    assert blow(place, Case("x", "odd", good.make, odd=True))[1] == ""
    assert blow(place, Case("x", "cut", lambda: b"GET", finish=True))[1] == "no answer"


def test_whoever_dawdles_does_not_take_the_place_of_others(place: Place):
    """Their connections are there still, and cost nothing but themselves."""
    assert Path("/proc/self/fd").exists()
    for _ in range(20):
        assert httpx.get(f"{place.url}/livez", timeout=5).text == "ok"
