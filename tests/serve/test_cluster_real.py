"""Drawing on a real Ray cluster on this machine, with two painters that are killed under load.

``SUMUK_CHAOS_SECONDS=120`` kills for two minutes instead of half a one.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.serve.conftest import running
from tests.serve.ray_of_tests import LOOPBACK, below, listening, painters, the_ray, without_token
from tests.serve.toy_running import Toy, toy_running

from sumuk.base.errors import BadInput
from sumuk.generate.api import MINIATURE
from sumuk.serve import crew
from sumuk.serve.cluster import Cluster
from sumuk.serve.config import ServeConfig

pytestmark = pytest.mark.slow
CHAOS = float(os.environ.get("SUMUK_CHAOS_SECONDS", "30"))
BETWEEN_KILLS = 5.0


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """A Ray cluster of two cores on the loopback, with Serve and its proxy; ``.url`` is where that listens."""
    ray = the_ray()
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"logging_level": 40, "log_to_driver": False, "include_dashboard": False}
    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, **quiet)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=crew.QUIET)
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()


@contextmanager
def served(state: Path, **config: Any) -> Iterator[tuple[Toy, Cluster]]:
    """The application over a cluster of at most two painters, once it is ready."""
    given = ServeConfig(state=state, threads=1, page=False, patience=900, **config)
    cluster = Cluster(given, most=2)
    with toy_running(state, cluster, threads=1, patience=900, drain=2, **config) as app:  # type: ignore[arg-type]
        app.until(lambda: app.client.get("/readyz").status_code == 200, 180)
        yield app, cluster


def submit(app: Toy, seed: int, **more: Any) -> str:
    """A job, tried again for as long as the answer says so."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        made = app.client.post("/api/jobs", json={"request": {"prompt": "a fox", "seed": seed, **more}})
        if made.status_code == 202:
            return made.json()["id"]
        assert made.status_code == 503 and float(made.headers["Retry-After"]) > 0, made.text
        time.sleep(0.5)
    raise AssertionError("the server was not ready for two minutes")


def ended(app: Toy, job: str) -> dict[str, Any]:
    return app.until(lambda: (told := app.client.get(f"/api/jobs/{job}").json())["ended"] and told, 300)


def pixels(app: Toy, job: str, image: int = 0) -> bytes:
    png = app.client.get(f"/api/jobs/{job}/images/{image}")
    assert png.status_code == 200
    return Image.open(io.BytesIO(png.content)).convert("RGB").tobytes()


def local(seed: int, **more: Any) -> bytes:
    """The same picture, drawn here."""
    import torch

    import sumuk

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sumuk.draw("a fox", seed=seed, **more).convert("RGB").tobytes()
    finally:
        torch.set_num_threads(threads)


def test_painters_are_killed_and_no_job_is_lost_or_drawn_twice(ray_here: str, tmp_path: Path, caplog: Any):
    """It grows to two painters under load; then one is killed every few seconds, while jobs keep coming."""
    state, jobs = tmp_path / "state", dict[str, int]()
    with served(state) as (app, cluster):

        def keep_busy() -> None:
            told = app.client.get("/api/jobs", params={"limit": 20}).json()["jobs"]  # the newest
            for _ in range(sum(not each["ended"] for each in told), 8):
                seed = len(jobs) % 4
                jobs[submit(app, seed, steps=12)] = seed
            time.sleep(0.1)

        assert len(painters(state)) == 1
        began = time.monotonic()
        while len(cluster.replicas) < 2:
            keep_busy()
            assert time.monotonic() < began + 180, "it did not grow"
        grown = time.monotonic() - began

        kills, until, due = 0, time.monotonic() + CHAOS, 0.0
        dice = random.Random(5)
        while time.monotonic() < until or len(jobs) < 40:
            if due < time.monotonic() < until and (some := painters(state)):
                os.kill(dice.choice(some), signal.SIGKILL)
                kills, due = kills + 1, time.monotonic() + BETWEEN_KILLS
            keep_busy()
        ends = {job: ended(app, job) for job in jobs}
        done = [job for job, each in ends.items() if each["state"] == "done"]
        lost = [each for each in ends.values() if each["state"] != "done"]
        struck = caplog.text.count("is lost")
        print(f"two painters after {grown:.0f} s; {len(jobs)} jobs, {kills} kills in {CHAOS:.0f} s: ", end="")
        print(f"{struck} pictures begun again, {len(done)} jobs done, {len(lost)} to be tried again")
        assert struck and kills >= CHAOS / BETWEEN_KILLS / 2
        assert all(each["trouble"]["status"] == 503 for each in lost), lost
        assert len(done) >= len(jobs) * 0.9
        right = {seed: local(seed, steps=12) for seed in range(4)}
        assert all(pixels(app, job) == right[jobs[job]] for job in done)
        assert f"sumuk_pictures_total {len(done)}.0" in app.client.get("/metrics").text


def test_orders_for_a_model_meet_where_it_is(ray_here: str, tmp_path: Path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.copy(MINIATURE, shelf / "second.safetensors")
    with served(tmp_path / "state", shelf=shelf) as (app, cluster):
        began = time.monotonic()
        busy = [submit(app, seed, steps=900) for seed in range(4)]
        app.until(lambda: len(cluster.replicas) == 2, 180)
        print(f"two painters after {time.monotonic() - began:.0f} s")
        for job in busy:
            app.client.delete(f"/api/jobs/{job}")
        for seed in range(8):
            made = app.client.post(
                "/api/jobs",
                json={"request": {"prompt": "a fox", "seed": seed, "steps": 2}, "model": "second"},
            )
            assert made.status_code == 202, made.text
            told = ended(app, made.json()["id"])
            assert told["state"] == "done" and pixels(app, told["id"]) == local(seed, steps=2)
        held = [each.models for each in cluster.replicas.values()]
        assert sorted(map(len, held)) == [1, 2] and all("miniature" in each for each in held)
        models = app.client.get("/api/models").json()["models"]
        assert {"second", "miniature"} == {each["name"] for each in models if each["loaded"]}, models


def test_a_picture_that_nobody_wants_stops_within_a_step(ray_here: str, tmp_path: Path):
    """One that is cancelled, and one whose client goes away; what is asked next need not wait for them."""
    with served(tmp_path / "state", together=1) as (app, _):
        long = submit(app, 1, steps=900)
        app.until(lambda: app.client.get(f"/api/jobs/{long}").json()["step"] > 2, 60)
        app.client.delete(f"/api/jobs/{long}")
        began = time.monotonic()
        assert ended(app, submit(app, 2, steps=2))["state"] == "done"
        assert time.monotonic() - began < 10
        with pytest.raises(httpx.ReadTimeout):
            app.client.post("/sdapi/v1/txt2img", json={"prompt": "a fox", "steps": 150}, timeout=1)
        newest = app.client.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]
        assert ended(app, newest["id"])["state"] == "cancelled"
        assert ended(app, submit(app, 3, steps=2))["state"] == "done"


def test_a_model_that_is_not_there_is_told_of(ray_here: str, tmp_path: Path):
    nowhere = tmp_path / "none.safetensors"
    with toy_running(
        tmp_path / "state", Cluster(ServeConfig(state=tmp_path / "state", model=nowhere), 1)
    ) as app:  # type: ignore[arg-type]
        told = app.until(lambda: "broken" in (said := app.client.get("/readyz").text) and said, 180)
        assert "no model at" in told and "none.safetensors" in told
        assert app.client.post("/api/jobs", json={"request": {"prompt": "a fox"}}).status_code == 503


def test_the_whole_server_behind_serve(ray_here: str, tmp_path: Path):
    """Its HTTP too: steps are told as they are made, and a client that goes away stops its job."""
    from ray import serve

    from sumuk.serve.ingress import deployment

    token = "0123456789abcdef"
    given = {"state": tmp_path / "state", "threads": 1, "page": False, "drain": 2}
    with pytest.raises(BadInput, match="token"):
        deployment(ServeConfig(**given))
    serve.run(deployment(ServeConfig(tokens={"me": token}, **given)), name="whole", route_prefix="/")
    client = httpx.Client(base_url=ray_here, timeout=60, headers={"Authorization": f"Bearer {token}"})
    until = time.monotonic() + 120
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.2)
    try:
        assert httpx.get(f"{ray_here}/api/jobs").status_code == 401
        assert client.get("/readyz", headers={"Host": "evil.example"}).status_code == 421
        made = client.post("/api/jobs", json={"request": {"prompt": "a fox", "seed": 3, "steps": 20}})
        when: list[float] = []
        with client.stream("GET", f"/api/jobs/{made.json()['id']}/events") as events:
            for line in events.iter_lines():
                when += [time.monotonic()] if line == "event: step" else []
        assert len(when) == 20 and when[-1] - when[0] > 0.1
        picture = client.get(f"/api/jobs/{made.json()['id']}/images/0")
        assert Image.open(io.BytesIO(picture.content)).convert("RGB").tobytes() == local(3, steps=20)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/sdapi/v1/txt2img", json={"prompt": "gone", "steps": 150}, timeout=1)
        until = time.monotonic() + 20
        while client.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]["state"] != "cancelled":
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        client.close()
        serve.delete("whole")


def test_the_command_starts_a_cluster_of_its_own_and_leaves_nothing(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    state = tmp_path / "state"
    with running(state, "--cluster", "--replicas", "1") as server:
        assert painters(state)
        assert server.draw(prompt="a fox", seed=5)["state"] == "done"
        ears = listening({server.process.pid, *below(server.process.pid)})
        assert len(ears) > 5
        for (
            port,
            address,
        ) in ears.items():  # Serve opens a port for each replica to everybody; it wants Ray's token
            assert address in LOOPBACK or without_token(port) == "UNAUTHENTICATED"
        assert server.stop() == 0
    until = time.monotonic() + 20
    while painters(state):
        assert time.monotonic() < until
        time.sleep(0.1)
