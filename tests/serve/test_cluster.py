"""Drawing on a Ray cluster: first what needs none, then (slow) a real one on this machine, whose painters are killed.

``SUMUK_CHAOS_SECONDS=120`` kills for two minutes instead of half a one.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.serve.conftest import running
from tests.serve.toy_running import Toy, toy_running

from sumuk.base.errors import BadInput
from sumuk.generate.api import MINIATURE
from sumuk.serve import crew
from sumuk.serve.cluster import TRIES, Cluster, mark
from sumuk.serve.config import ServeConfig
from sumuk.serve.crew import Crew, Roll, fitting
from sumuk.serve.order import Order
from sumuk.serve.trouble import Refused, Trouble
from sumuk.serve.wire import Drawn, Lost, Stepped, Told, Vitals

CHAOS = float(os.environ.get("SUMUK_CHAOS_SECONDS", "30"))
BETWEEN_KILLS = 5.0
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
ORDER = Order(values={"prompt": "a fox", "steps": 3, "seed": 7})


def test_the_front_imports_neither_torch_nor_ray():
    told = "import sys, sumuk.serve.cluster; print({'torch', 'ray'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("cores", "count", "threads"),
    [([8, 8], 2, 8), ([8, 8], 4, 4), ([16, 4], 2, 8), ([2], 2, 1), ([2], 5, 1), ([], 1, 1), ([7, 3], 3, 3)],
)
def test_painters_share_the_cores(cores: list[int], count: int, threads: int):
    assert fitting(cores, count) == threads


def test_orders_that_need_the_same_in_memory_have_the_same_mark(tmp_path: Path):
    config = ServeConfig(state=tmp_path)
    assert mark(ORDER, config) == mark(Order(values={}, model="miniature"), config) == ""
    marks = [
        mark(Order(values={}, **names), config)
        for names in ({"model": "b"}, {"vae": "b"}, {"refiner": "b"}, {"model": "b", "vae": "c"})
    ]
    assert len({*marks}) == 4 and all(marks)
    assert mark(Order(values={}, model="b"), ServeConfig(state=tmp_path, model=Path("b.safetensors"))) == ""


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BadInput, match="0 replicas"):
        Cluster(ServeConfig(state=tmp_path), 0)
    with pytest.raises(BadInput, match="'cuda:1'"):
        Cluster(ServeConfig(state=tmp_path, device="cuda:1"))
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(Refused, match="RAY_ADDRESS=auto"):
        crew.join(ServeConfig(state=tmp_path))


def test_which_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert crew._address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")
    assert crew._address() == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert crew._address() == "10.0.0.2:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert crew._address() is None


def test_no_token_stays_in_the_memory_of_the_cluster(tmp_path: Path):
    config = ServeConfig(state=tmp_path, host="0.0.0.0", tokens={"me": "0123456789abcdef"})
    assert "0123456789abcdef" not in crew._without_secrets(config).model_dump_json()


# -- a handle that does what it is told, in place of Ray's ---------------------------------------------------------


class Hand:
    """Calls of ``draw`` play these scenes, one each: what is told, and then an error, an end, or waiting for ever."""

    def __init__(self, *scenes: Any) -> None:
        self.scenes, self.stopped, self.marks = [*scenes], 0, []
        self.draw = self

    def options(self, *, stream: bool, multiplexed_model_id: str) -> Hand:
        assert stream
        self.marks.append(multiplexed_model_id)
        return self

    def remote(self, name: str, order: Order, done: tuple[int, ...]) -> Any:
        scene, hand = self.scenes.pop(0), self

        class Response:
            async def __aiter__(self) -> AsyncIterator[Any]:
                for each in scene:
                    if isinstance(each, Exception):
                        raise each
                    if each is None:
                        await asyncio.sleep(1000)
                    yield "one", [each if isinstance(each, Vitals) else each(name)]

            def cancel(self) -> None:
                hand.stopped += 1

        return Response()


def the_ray() -> Any:
    """Ray, which looks at its environment when it is imported."""
    os.environ.update(crew.ALWAYS | crew.ALONE)
    return pytest.importorskip("ray")


def stepped(step: int) -> Callable[[str], Told]:
    return lambda name: Stepped(name, 0, step, 3)


def drawn(name: str) -> Told:
    return Drawn(name, 0, b"png", {})


def played(
    folder: Path, hand: Hand, act: Callable[[Cluster], None] = lambda cluster: None, order: Order = ORDER
) -> list[Told]:
    """What a cluster tells whose painters are this hand."""
    told: list[Told] = []

    async def scene() -> None:
        cluster = Cluster(ServeConfig(state=folder), crew=Crew("a", "a", 2))
        cluster._tell, cluster._painter, cluster._roll = told.append, hand, Roll(2, True)
        cluster.draw("job", order)
        await asyncio.sleep(0.01)
        act(cluster)
        async with asyncio.timeout(5):
            while cluster._pictures:
                await asyncio.sleep(0.001)

    asyncio.run(scene())
    return told


def lost_painter() -> Exception:
    return the_ray().exceptions.ActorDiedError()


def test_a_picture_whose_painter_is_lost_is_drawn_again(tmp_path: Path):
    hand = Hand([stepped(1), stepped(2), lost_painter()], [lost_painter()], [stepped(1), drawn])
    told = played(tmp_path, hand)
    assert [each.step for each in told if isinstance(each, Stepped)] == [1, 2, 1]
    assert told[-1] == Drawn("job", 0, b"png", {}) and len(told) == 4


def test_a_picture_over_which_painters_are_lost_is_given_up(tmp_path: Path):
    hand = Hand(*[[stepped(1), lost_painter()] for _ in range(TRIES)], [drawn])
    *_, last = told = played(tmp_path, hand)
    assert isinstance(last, Lost) and last.trouble.type == "worker-lost" and last.trouble.status == 503
    assert last.trouble.retry_after and len(told) == TRIES + 1


def test_a_painter_that_says_why_is_believed(tmp_path: Path):
    trouble = Trouble("bad-value", "no")
    assert played(tmp_path, Hand([lambda name: Lost(name, 0, trouble)])) == [Lost("job", 0, trouble)]


def test_an_error_of_ours_is_told_without_its_insides(tmp_path: Path):
    (told,) = played(tmp_path, Hand([KeyError("secret")]))
    assert isinstance(told, Lost) and told.trouble.type == "internal" and "secret" not in told.trouble.detail


def test_who_is_cancelled_is_told_once_and_the_call_with_it(tmp_path: Path):
    hand = Hand([stepped(1), None], [None], [drawn])
    order = Order(values={"count": 3, "seed": 1})
    told = played(tmp_path, hand, lambda cluster: cluster.cancel("job"), order)
    assert hand.stopped == 2
    assert {each.image for each in told if isinstance(each, Lost)} == {0, 1}
    assert sum(isinstance(each, Drawn) for each in told) == 1


def test_how_painters_do_is_told_of_all_together(tmp_path: Path):
    async def scene() -> None:
        cluster = Cluster(ServeConfig(state=tmp_path), crew=Crew("a", "a", 3))
        cluster._roll = Roll(2, True)
        one = Vitals(rounds=3, resident=10, models=("a",), escalations={"free": 1})
        two = Vitals(rounds=5, resident=20, models=("a", "b"), escalations={"free": 2, "split": 1})
        cluster._together("one", one)
        both = cluster._together("two", two)
        assert both.rounds == 5 and both.resident == 30 and both.models == ("a", "b")
        assert both.escalations == {"free": 3, "split": 1}
        assert cluster._together("three", one).resident == 30  # "one" has left: there are two
        assert [*cluster.replicas] == ["two", "three"]

    asyncio.run(scene())


# -- a real cluster on this machine ---------------------------------------------------------------------------------


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


def painters(state: Path) -> list[int]:
    """The processes of a server's painters."""
    name = crew.names(ServeConfig(state=state))[0]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"ray::ServeReplica:{name}:Painter" in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def below(pid: int) -> set[int]:
    """All processes that a process has started, and those have."""
    found = {
        int(each)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for each in task.read_text().split()
    }
    return found.union(*map(below, found))


def listening(pids: set[int]) -> dict[int, str]:
    """Ports at which processes listen, and the address, as Linux writes it."""
    sockets = set()
    for pid in pids:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(str(each.readlink()).removeprefix("socket:[").rstrip("]"))
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in map(str.split, Path(table).read_text().splitlines()):
            if row[3] == "0A" and row[9] in sockets:
                address, _, port = row[1].partition(":")
                found[int(port, 16)] = address
    return found


def without_token(port: int) -> str:
    """What a painter's own port of Serve says to a stranger."""
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    stub = serve_pb2_grpc.ASGIServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
    with pytest.raises(grpc.RpcError) as refused:
        stub.HandleRequest(serve_pb2.ASGIRequest(), timeout=10)
    return refused.value.code().name


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_model_that_is_not_there_is_told_of(ray_here: str, tmp_path: Path):
    nowhere = tmp_path / "none.safetensors"
    with toy_running(
        tmp_path / "state", Cluster(ServeConfig(state=tmp_path / "state", model=nowhere), 1)
    ) as app:  # type: ignore[arg-type]
        told = app.until(lambda: "broken" in (said := app.client.get("/readyz").text) and said, 180)
        assert "no model at" in told and "none.safetensors" in told
        assert app.client.post("/api/jobs", json={"request": {"prompt": "a fox"}}).status_code == 503


@pytest.mark.slow
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


@pytest.mark.slow
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
