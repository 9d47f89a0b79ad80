"""A client that goes away, from a real server whose steps come faster than anybody looks."""

from __future__ import annotations

import time

import httpx
import pytest


@pytest.mark.parametrize(
    ("path", "order"),
    [
        ("/v1/images/generations", {"prompt": "a fox", "sumuk": {"steps": 900, "solver": "euler"}}),
        ("/sdapi/v1/txt2img", {"prompt": "a fox", "steps": 900, "sampler_name": "Euler"}),
    ],
)
def test_its_job_stops_within_two_seconds(server, path: str, order: dict[str, object]):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{path}", json=order, timeout=httpx.Timeout(30, read=0.6))
    gone = time.monotonic()
    newest = server.client.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]
    while (told := server.client.get(f"/api/jobs/{newest['id']}").json())["state"] != "cancelled":
        assert time.monotonic() - gone < 2, told
        time.sleep(0.02)
    assert "client" in told["trouble"]["detail"]
