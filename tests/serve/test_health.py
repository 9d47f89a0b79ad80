"""Alive, ready, figures: over the whole application with a toy behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_running import Toy, toy_running

TOKEN = "a-token-of-16-or-more"


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    with toy_running(tmp_path / "state", tokens={"ann": TOKEN}) as made:
        yield made


def test_alive_and_ready_need_no_token_and_figures_do(toy: Toy):
    for path in ("/livez", "/readyz"):
        said = toy.client.get(path)
        assert (said.status_code, said.text) == (200, "ok")
        assert said.headers["content-type"].startswith("text/plain")
    assert toy.client.get("/metrics").status_code == 401
    figures = toy.client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert figures.headers["content-type"].startswith("text/plain; version=")
    assert "\nsumuk_queue_jobs 0.0\n" in figures.text


def test_alive_is_not_ready(toy: Toy):
    toy.backend.ready = False
    said = toy.client.get("/readyz")
    problem = said.json()
    assert said.headers["content-type"] == "application/problem+json"
    assert (said.status_code, problem["type"]) == (503, "urn:sumuk:unready")
    assert problem["detail"] and int(said.headers["retry-after"]) >= 1
    assert toy.client.get("/livez").status_code == 200
    toy.backend.ready = True
    assert toy.client.get("/readyz").status_code == 200


def test_alive_while_it_works(tmp_path: Path):
    with toy_running(tmp_path / "state", ToyBackend(turn=0.02)) as toy:
        job = toy.client.post("/api/jobs", json={"request": {"steps": 20}}).json()
        while toy.state(job["id"]) != "running":
            time.sleep(0.005)
        assert toy.client.get("/livez").text == toy.client.get("/readyz").text == "ok"
        toy.until(lambda: toy.state(job["id"]) == "done")
        assert "\nsumuk_pictures_total 1.0\n" in toy.client.get("/metrics").text
