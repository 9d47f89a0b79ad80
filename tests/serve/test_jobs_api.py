"""Our own API over real sockets: submit, list, watch, stop, fetch; and how it says no."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image
from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_running import Toy, toy_running

from sumuk.serve.trouble import MEDIA

TOKENS = {"ann": "a" * 16, "ben": "b" * 16}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[Toy]:
    with toy_running(tmp_path_factory.mktemp("toy") / "state", ToyBackend(preview=2)) as made:
        yield made


def png(colour: str = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def submit(toy: Toy, more: dict | None = None, headers: dict | None = None, **request) -> httpx.Response:
    return toy.client.post("/api/jobs", json={"request": request, **(more or {})}, headers=headers)


def done(toy: Toy, **request) -> dict:
    job = submit(toy, **request).json()["id"]
    toy.until(lambda: toy.state(job) in ("done", "failed", "cancelled"))
    return toy.client.get(f"/api/jobs/{job}").json()


def events(response: httpx.Response) -> Iterator[tuple[str, dict]]:
    """Server-sent events, heartbeats left out."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def test_a_job_from_submission_to_picture(toy):
    made = submit(toy, prompt="a fox", seed=5, count=2)
    assert made.status_code == 202
    document = made.json()
    assert made.headers["location"] == document["url"] == f"/api/jobs/{document['id']}"
    assert document["request"]["prompt"] == "a fox" and document["count"] == 2
    toy.until(lambda: toy.state(document["id"]) == "done")
    ended = toy.client.get(document["url"]).json()
    assert [each["index"] for each in ended["pictures"]] == [0, 1]
    assert [each["seed"] for each in ended["pictures"]] == [5, 6]
    for each in ended["pictures"]:
        got = toy.client.get(each["url"])
        assert got.status_code == 200 and got.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(got.content)) as image:
            assert image.size == (each["width"], each["height"]) == (64, 64)
        assert toy.client.get(each["receipt"]).json()["settings"]["seed"] == each["seed"]


def test_a_seed_is_filled_in(toy):
    ended = done(toy, prompt="x")
    assert ended["request"]["seed"] == ended["pictures"][0]["seed"]


def test_pictures_are_taken_and_told_by_their_digest(toy):
    made = submit(toy, prompt="x", init=b64(png()), mask="data:image/png;base64," + b64(png("white")))
    assert made.status_code == 202
    request = made.json()["request"]
    assert len(request["init"]["sha256"]) == len(request["mask"]["sha256"]) == 64
    again = toy.client.get(made.json()["url"]).json()["request"]
    assert again["init"] == request["init"]


def test_what_steers_is_a_picture_too(toy):
    steer = [{"control": "edges", "hint": b64(png()), "weight": 0.5}]
    made = submit(toy, prompt="x", steer=steer, more={"controls": {"edges": "canny"}})
    assert made.status_code == 202, made.text
    (told,) = made.json()["request"]["steer"]
    assert told["weight"] == 0.5 and len(told["hint"]["sha256"]) == 64
    assert made.json()["controls"] == {"edges": "canny"}


@pytest.mark.parametrize(("kind", "format"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_pictures_in_other_formats(toy, kind, format):
    url = done(toy, prompt="x")["pictures"][0]["url"]
    got = toy.client.get(url, params={"format": kind})
    assert got.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(got.content)).format == format


def test_quality(toy):
    url = done(toy, prompt="x", width=256, height=256)["pictures"][0]["url"]
    refused = toy.client.get(url, params={"quality": 50})
    assert refused.status_code == 400 and "does nothing for png" in refused.json()["detail"]
    assert toy.client.get(url, params={"format": "jpeg", "quality": 50}).status_code == 200
    assert toy.client.get(url, params={"format": "jpeg", "quality": 0}).status_code == 400


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({}, "request"),
        ({"request": {}, "wibble": 1}, "wibble"),
        ({"request": {"wibble": 1}}, "wibble"),
        ({"request": {"width": "512"}}, "width"),
        ({"request": {"width": True}}, "width"),
        ({"request": {"width": 7}}, "width"),
        ({"request": {"width": 2**31}}, "width"),
        ({"request": {"width": 1e308}}, "width"),
        ({"request": {"steps": True}}, "steps"),
        ({"request": {"steps": 0}}, "steps"),
        ({"request": {"count": 10**6}}, "count"),
        ({"request": {"seed": -1}}, "seed"),
        ({"request": {"seed": 2**64}}, "seed"),
        ({"request": {"prompt": 5}}, "prompt"),
        ({"request": {"init": "http://127.0.0.1/x.png"}}, "nothing is fetched"),
        ({"request": {"init": "file:///etc/passwd"}}, "nothing is fetched"),
        ({"request": {"init": "!!"}}, "base64"),
        ({"request": {"init": {"sha256": "0" * 64}}}, "init"),
        ({"request": {"init": "aGVsbG8="}}, "init"),
        ({"request": {"steer": [{"control": "x", "hint": "!!"}]}}, "steer.0.hint"),
        ({"request": {"strength": 0.5}}, "strength"),
        ({"request": {"variation_seed": 5}}, "variation"),
        ({"request": {}, "model": "../../x"}, "../../x"),
        ({"request": {}, "deadline": 0}, "deadline"),
        ({"request": {}, "controls": {"a": 5}}, "controls"),
        ([], ""),
    ],
)
def test_a_bad_submission_is_refused_by_name(toy, body, names):
    refused = toy.client.post("/api/jobs", json=body)
    assert 400 <= refused.status_code < 500 and refused.headers["content-type"] == MEDIA
    document = refused.json()
    assert document["status"] == refused.status_code and names in document["detail"]


def test_an_idempotency_key_gives_the_same_job(toy):
    key = {"Idempotency-Key": "one"}
    first = submit(toy, prompt="x", headers=key)
    again = submit(toy, prompt="x", headers=key)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"] and again.headers["location"] == first.headers["location"]
    other = submit(toy, prompt="y", headers=key)
    assert other.status_code == 422 and other.json()["type"] == "urn:sumuk:other-body"
    assert submit(toy, prompt="x", headers={"Idempotency-Key": "k" * 256}).status_code == 400


def test_watching_from_the_first_event_to_the_last(toy):
    toy.do(toy.backend.hold)
    job = submit(toy, prompt="x", steps=4).json()["id"]
    with toy.client.stream("GET", f"/api/jobs/{job}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        news = events(response)
        kind, first = next(news)
        assert kind == "job" and first["id"] == job
        toy.do(toy.backend.release)
        seen = list(news)
    kinds = [kind for kind, _ in seen]
    assert kinds[-1] == "end" and seen[-1][1]["state"] == "done"
    steps = [told for kind, told in seen if kind == "step"]
    assert steps[-1] == {"image": 0, "step": 4, "steps": 4}
    preview = next(told for kind, told in seen if kind == "preview")
    assert Image.open(io.BytesIO(base64.b64decode(preview["jpeg"]))).format == "JPEG"
    picture = next(told for kind, told in seen if kind == "picture")
    assert toy.client.get(picture["url"]).status_code == 200
    assert kinds.index("picture") < kinds.index("end")


def test_watching_what_is_over(toy):
    job = done(toy, prompt="x")["id"]
    with toy.client.stream("GET", f"/api/jobs/{job}/events") as response:
        seen = list(events(response))
    assert [kind for kind, _ in seen] == ["end"]


def test_a_watcher_who_goes_away_stops_nothing(toy):
    toy.do(toy.backend.hold)
    job = submit(toy, prompt="x").json()["id"]
    with toy.client.stream("GET", f"/api/jobs/{job}/events") as response:
        next(events(response))
    with httpx.Client(base_url=toy.url) as other:
        assert other.get(f"/api/jobs/{job}").json()["state"] in ("queued", "running")
    toy.do(toy.backend.release)
    toy.until(lambda: toy.state(job) == "done")
    assert job not in toy.backend.stopped


@pytest.mark.parametrize(("method", "end"), [("POST", "/cancel"), ("DELETE", "")])
def test_stopping(toy, method, end):
    toy.do(toy.backend.hold)
    try:
        job = submit(toy, prompt="x").json()["id"]
        toy.until(lambda: toy.state(job) == "running")
        assert toy.client.request(method, f"/api/jobs/{job}{end}").status_code == 200
        toy.until(lambda: toy.state(job) == "cancelled")
    finally:
        toy.do(toy.backend.release)
    document = toy.client.get(f"/api/jobs/{job}").json()
    assert document["trouble"]["type"] == "urn:sumuk:cancelled"


def test_a_failure_is_told(toy):
    toy.do(toy.backend.hold)
    job = submit(toy, prompt="x").json()["id"]
    toy.until(lambda: toy.state(job) == "running")
    with toy.client.stream("GET", f"/api/jobs/{job}/events") as response:
        news = events(response)
        next(news)
        toy.do(toy.backend.lose, job)
        toy.do(toy.backend.release)
        seen = dict(news)
    assert seen["lost"]["trouble"]["type"] == "urn:sumuk:out-of-memory"
    assert seen["end"]["state"] == "failed" and seen["end"]["trouble"]["status"] == 503


def test_listing_by_pages_and_states(tmp_path):
    with toy_running(tmp_path / "state") as toy:
        ids = [done(toy, prompt=str(number))["id"] for number in range(5)]
        first = toy.client.get("/api/jobs", params={"limit": 2}).json()
        assert [each["id"] for each in first["jobs"]] == ids[:2:-1] and first["next"] == ids[3]
        second = toy.client.get("/api/jobs", params={"limit": 2, "before": first["next"]}).json()
        assert [each["id"] for each in second["jobs"]] == [ids[2], ids[1]]
        last = toy.client.get("/api/jobs", params={"limit": 2, "before": second["next"]}).json()
        assert [each["id"] for each in last["jobs"]] == [ids[0]] and last["next"] is None
        toy.do(toy.backend.hold)
        running = submit(toy, prompt="x").json()["id"]
        found = toy.client.get("/api/jobs", params={"state": ["queued", "running"]}).json()["jobs"]
        assert [each["id"] for each in found] == [running]
        assert len(toy.client.get("/api/jobs", params={"state": "done"}).json()["jobs"]) == 5
        assert toy.client.get("/api/jobs", params={"state": "wibble"}).status_code == 400
        assert toy.client.get("/api/jobs", params={"limit": 0}).status_code == 400


def test_jobs_are_their_owners_alone(tmp_path):
    with toy_running(tmp_path / "state", tokens=TOKENS) as toy:
        ann, ben = ({"Authorization": f"Bearer {token}"} for token in TOKENS.values())
        made = toy.client.post("/api/jobs", json={"request": {"prompt": "x"}}, headers=ann).json()
        url = made["url"]
        toy.until(lambda: toy.client.get(url, headers=ann).json()["state"] == "done")
        for path in ("", "/events", "/images/0", "/images/0/receipt"):
            assert toy.client.get(url + path, headers=ann).status_code == 200
            assert toy.client.get(url + path, headers=ben).status_code == 404
            assert toy.client.get(url + path).status_code == 401
        assert toy.client.delete(url, headers=ben).status_code == 404
        assert toy.client.get("/api/jobs", headers=ben).json()["jobs"] == []


@pytest.mark.parametrize(
    "path",
    [
        "/api/jobs/nothing",
        "/api/jobs/nothing/events",
        "/api/jobs/nothing/images/0",
        "/api/jobs/nothing/images/0/receipt",
        "/api/jobs/%2e%2e%2f%2e%2e/images/0",
        "/api/jobs/" + "0" * 300,
        "/api/models/nothing",
        "/api/models/..%2f..%2fetc%2fpasswd",
        "/api/wibble",
    ],
)
def test_what_is_not_there(toy, path):
    refused = toy.client.get(path)
    assert refused.status_code == 404 and refused.headers["content-type"] == MEDIA


@pytest.mark.parametrize("image", ["1", "-1", "9" * 30, "x", "0.5"])
def test_a_picture_that_is_not_there(toy, image):
    job = done(toy, prompt="x")["id"]
    refused = toy.client.get(f"/api/jobs/{job}/images/{image}")
    assert refused.status_code in (400, 404) and refused.headers["content-type"] == MEDIA


def test_what_is_offered(toy):
    entries = toy.client.get("/api/models").json()["models"]
    assert [each["name"] for each in entries] == ["toy", "second", "ink"]
    assert [
        each["name"] for each in toy.client.get("/api/models", params={"sort": "lora"}).json()["models"]
    ] == ["ink"]
    assert toy.client.get("/api/models", params={"sort": "wibble"}).status_code == 400
    assert toy.client.get("/api/models/second").json()["title"] == "Second toy"
    assert toy.client.post("/api/models/second/load").json() == {"name": "second"}
    assert toy.client.post("/api/models/nothing/load").status_code == 404
    assert set(toy.client.get("/api/choices").json()) == {"solvers", "grids"}


def test_a_receipt_is_read_back_and_submitted_again(server):
    """The real miniature writes it; the same request makes the same picture."""
    ended = server.draw(prompt="a red circle", seed=11, width=64, height=64)
    assert ended["state"] == "done", ended
    url = ended["pictures"][0]["url"]
    file = server.client.get(url).content
    found = server.client.post("/api/receipts", json={"picture": b64(file)}).json()
    assert found["source"] == "sumuk" and found["left_out"] == {}
    again = server.draw(**found["request"])
    assert again["state"] == "done", again
    assert (
        server.client.get(again["pictures"][0]["url"] + "/receipt").json()["picture"]
        == (server.client.get(url + "/receipt").json()["picture"])
    )
    solvers = [each["name"] for each in server.client.get("/api/choices").json()["solvers"]]
    assert found["request"]["solver"] in solvers


def test_a_picture_without_a_receipt(toy):
    refused = toy.client.post("/api/receipts", json={"picture": b64(png())})
    assert refused.status_code == 400 and refused.json()["type"] == "urn:sumuk:bad-picture"
    assert toy.client.post("/api/receipts", json={"picture": "!!"}).status_code == 400
