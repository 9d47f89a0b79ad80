"""The desk: orders in, fairly drawn, kept, told, stopped; with everything that can go wrong on the way."""

from __future__ import annotations

import asyncio
import hashlib
import io
import sqlite3
from pathlib import Path

import pytest
from PIL import Image
from tests.serve.toy_backend import ToyBackend, colour, png_of
from tests.serve.toy_desk import ME, OTHER, at_desk, config_of, ended, put, until

from sumuk.base.errors import BadInput, SumukError
from sumuk.serve.desk import Desk
from sumuk.serve.order import Caller, Job, Order
from sumuk.serve.trouble import Refused, Trouble, refused
from sumuk.serve.wire import Drawn, Loaded, Lost, Shown, Stepped

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def png(side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "white").save(file, "PNG")
    return file.getvalue()


# The straight way.


async def test_an_order_becomes_pictures(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        job, created = await desk.submit(Order(values={"prompt": "a fox", "count": 3, "seed": 5}), ME)
        assert created and (job.state, job.count, job.steps) == ("queued", 3, 4)
        job = await ended(desk, job)
        assert (job.state, job.attempt, job.step, job.steps, job.trouble) == ("done", 1, 4, 4, None)
        assert job == desk.job(job.id, ME)
        assert [(result.image, result.seed) for result in job.results] == [(0, 5), (1, 6), (2, 7)]
        for result in job.results:
            data = desk.result_file(job.id, result.image, ME).read_bytes()
            assert data == png_of(job.order, result.image)
            assert hashlib.sha256(data).hexdigest() == result.sha256
        assert job.created <= job.began <= job.ended
        text = desk.metrics.text().decode()
        assert "sumuk_pictures_total 3.0" in text and 'sumuk_jobs_total{state="done"} 1.0' in text
        assert "sumuk_running_pictures 0.0" in text and "sumuk_wait_seconds_count 1.0" in text


async def test_a_job_is_on_the_disk_when_it_is_acknowledged(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend, drain=0.0) as desk:
        for number in range(5):
            job = await put(desk, seed=number)
            with sqlite3.connect(f"file:{tmp_path}/jobs.sqlite?mode=ro", uri=True) as db:
                assert db.execute("SELECT count(*) FROM jobs WHERE id = ?", (job.id,)).fetchone() == (1,)


async def test_a_seed_is_drawn_before_the_job_is_kept(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        jobs = [await put(desk) for _ in range(3)]
        seeds = {job.order.values["seed"] for job in jobs}
        assert len(seeds) == 3 and all(0 <= seed < 2**32 for seed in seeds)
        assert (await ended(desk, jobs[0])).results[0].seed == jobs[0].order.values["seed"]


async def test_what_is_watched(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        job = await put(desk, count=2)
        seen = [each async for each in desk.watch(job.id, ME)]
        assert isinstance(seen[0], Job) and seen[0].state == "queued"
        assert isinstance(seen[-1], Job) and seen[-1].state == "done"
        for image in (0, 1):
            told = [each for each in seen[1:-1] if each.image == image]
            assert [each.step for each in told if isinstance(each, Stepped)] == [1, 2, 3, 4]
            assert [type(each) for each in told][-1] is Drawn and told[-1].png == b""
            assert any(isinstance(each, Shown) and each.jpeg[:2] == b"\xff\xd8" for each in told)
        assert [type(each) async for each in desk.watch(job.id, ME)] == [Job]


async def test_how_far_the_slowest_picture_is(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        job = await put(desk, count=2)
        await until(lambda: backend.begun)
        for image, step in ((0, 1), (0, 2), (1, 1)):
            backend.tell(Stepped(job.id, image, step, 9))
        assert (desk.job(job.id, ME).step, desk.job(job.id, ME).steps) == (1, 9)
        assert desk.job(job.id, ME).position is None
        backend.release()


async def test_pictures_reach_what_draws_whole_and_are_told_by_digest(tmp_path: Path):
    class Seeing(ToyBackend):
        def draw(self, job, order, done=()):
            self.order = order
            super().draw(job, order, done)

    backend = Seeing()
    async with at_desk(tmp_path, backend) as desk:
        job = await put(desk, init=png(), strength=0.5)
        await ended(desk, job)
        assert backend.order.values["init"] == png()
        digest = {"sha256": hashlib.sha256(png()).hexdigest()}
        assert job.order.values["init"] == desk.job(job.id, ME).order.values["init"] == digest


# What is not taken.


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'"),
        ({"steps": 10**6}, "steps: input should be less than or equal to 1000"),
        ({"prompt": "x" * 201}, "prompt has 201 characters; at most 200"),
        ({"negative": "x" * 201}, "negative has 201 characters"),
        ({"init": "/etc/passwd"}, "init is no picture that was sent, but a str"),
        ({"steer": [{"control": "e", "hint": "/etc/passwd"}]}, r"steer\.0\.hint is no picture"),
        ({"init": b"no picture"}, "is no PNG, JPEG or WEBP picture"),
        ({"init": png(16), "mask": png(8)}, "the mask is 8 x 8 but the init image 16 x 16"),
        ({"width": 8192, "height": 8192, "steps": 1000, "count": 64}, "costs"),
    ],
)
async def test_an_order_that_is_none_is_refused_and_leaves_nothing(tmp_path: Path, values, why: str):
    async with at_desk(tmp_path, prompt_characters=200) as desk:
        with pytest.raises(SumukError, match=why):
            await put(desk, **values)
        assert desk.jobs(ME) == [] and "sumuk_queue_jobs 0.0" in desk.metrics.text().decode()


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_deadline_that_is_none(tmp_path: Path, deadline: float):
    async with at_desk(tmp_path) as desk:
        with pytest.raises(Refused, match="deadline is a number of seconds above 0"):
            await desk.submit(Order(values={}, deadline=deadline), ME)


async def test_the_line_is_bounded(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend, queue_jobs=3) as desk:
        for _ in range(2 + 3):  # two are drawn, three wait
            await put(desk)
        with pytest.raises(Refused, match="3 jobs wait") as caught:
            await put(desk)
        assert caught.value.trouble.status == 429 and caught.value.trouble.more == {"position": 3}
        assert (await put(desk, OTHER)).position is not None, "who has nothing in the line is let in"
        positions = [desk.job(job.id, ME).position for job in desk.jobs(ME)]
        assert [each.position for each in desk.jobs(ME)] == positions
        assert len(set(positions) - {None}) == 3
        backend.release()


async def test_ten_times_too_many_at_once(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend, queue_jobs=10) as desk:
        tries = await asyncio.gather(*(put(desk) for _ in range(100)), return_exceptions=True)
        jobs = [each for each in tries if isinstance(each, Job)]
        refusals = [each for each in tries if isinstance(each, Refused)]
        assert len(jobs) + len(refusals) == 100 and 10 <= len(jobs) <= 12
        assert all(each.trouble.type == "too-many" and each.trouble.retry_after >= 1 for each in refusals)
        backend.release()
        assert {(await ended(desk, job)).state for job in jobs} == {"done"}


async def test_rates_of_keys_and_addresses(tmp_path: Path):
    async with at_desk(tmp_path, per_key="3/minute", per_address="5/hour") as desk:
        for _ in range(3):
            await put(desk)
        with pytest.raises(Refused, match="more than 3 orders in 60 s from this key") as caught:
            await put(desk)
        assert caught.value.trouble.status == 429 and 55 < caught.value.trouble.retry_after <= 60
        await put(desk, Caller("other", ME.address))
        with pytest.raises(Refused, match="more than 5 orders in 3600 s from this address"):
            await put(desk, Caller("third", ME.address))
        await put(desk, Caller("third", "10.9.9.9"))


def test_a_rate_that_is_none(tmp_path: Path):
    with pytest.raises(BadInput, match="per_key 'often' is no rate"):
        Desk(config_of(tmp_path, per_key="often"), ToyBackend())


async def test_unready_before_and_after(tmp_path: Path):
    backend = ToyBackend()
    desk = Desk(config_of(tmp_path), backend)
    assert not desk.ready and desk.why_unready == "the server is starting"
    with pytest.raises(Refused, match="starting") as caught:
        await put(desk)
    assert caught.value.trouble.status == 503 and caught.value.trouble.retry_after
    await desk.start()
    assert desk.ready and desk.why_unready == ""
    backend.ready = False
    with pytest.raises(Refused, match="the model is being loaded"):
        await put(desk)
    await desk.stop()
    await desk.stop()
    assert desk.draining and not desk.ready
    with pytest.raises(Refused, match="not running"):
        desk.jobs(ME)


# Idempotency keys.


async def submit(desk: Desk, key: str, digest: str = "d", caller: Caller = ME, attached: bool = False):
    return await desk.submit(Order(values={"prompt": "a fox"}, attached=attached), caller, key, digest)


async def test_a_hundred_at_once_with_one_key_make_one_job(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        got = await asyncio.gather(*(submit(desk, "k") for _ in range(100)))
        assert len({job.id for job, _ in got}) == 1 and sum(created for _, created in got) == 1
        assert len(desk.jobs(ME)) == 1
        await ended(desk, got[0][0])
        again, created = await submit(desk, "k")
        assert not created and again.state == "done"


async def test_a_key_belongs_to_one_request_of_one_owner(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        job, _ = await submit(desk, "k")
        with pytest.raises(Refused, match="'k' was used for another request") as caught:
            await submit(desk, "k", "other")
        assert caught.value.trouble.status == 422
        other, created = await submit(desk, "k", "other", OTHER)
        assert created and other.id != job.id


async def test_who_waits_on_the_connection_is_told_that_it_is_at_work(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        job, _ = await submit(desk, "k", attached=True)
        with pytest.raises(Refused, match="still at work") as caught:
            await submit(desk, "k", attached=True)
        assert caught.value.trouble.status == 409 and caught.value.trouble.retry_after == 1
        backend.release()
        await ended(desk, job)
        assert (await submit(desk, "k", attached=True)) == (desk.job(job.id, ME), False)


async def test_a_retry_after_try_again_tries_again(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        first, _ = await submit(desk, "k", attached=True)
        await until(lambda: backend.begun)
        await desk.cancel(first.id, ME)
        second, created = await submit(desk, "k", attached=True)
        assert created and second.id != first.id
        await until(lambda: len(backend.begun) == 2)
        backend.lose(second.id)
        assert (await ended(desk, second)).trouble.status == 503
        assert (await submit(desk, "k"))[1] is False, "who asks for the job by its key gets that job"
        third, created = await submit(desk, "k", attached=True)
        assert created
        await until(lambda: len(backend.begun) == 3)
        backend.lose(third.id, Trouble("content-moderated", "no"))
        await ended(desk, third)
        assert (await submit(desk, "k", attached=True))[1] is False, "the answer would be the same"
        backend.release()


async def test_a_key_whose_order_was_refused_is_free(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        with pytest.raises(BadInput):
            await desk.submit(Order(values={"steps": 0}), ME, "k", "d")
        assert (await submit(desk, "k", "d2"))[1]


# Whose jobs they are.


async def test_jobs_are_seen_by_their_owner_alone(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        job = await ended(desk, await put(desk))

        async def watched():
            return [each async for each in desk.watch(job.id, OTHER)]

        for use in (
            lambda: desk.job(job.id, OTHER),
            lambda: desk.result_file(job.id, 0, OTHER),
            lambda: desk.jobs(OTHER, before=job.id),
        ):
            with pytest.raises(Refused, match="there is no job") as caught:
                use()
            assert caught.value.trouble.status == 404
        for use in (watched(), desk.cancel(job.id, OTHER)):
            with pytest.raises(Refused, match="there is no job"):
                await use
        assert desk.jobs(OTHER) == [] and len(desk.jobs(ME)) == 1


@pytest.mark.parametrize(
    "id",
    [
        "",
        "../x",
        "a" * 31,
        "A" * 32,
        "a" * 33,
        "a" * 32 + "\n",
        "\0" * 32,
        "../" * 10 + "aa",
        "%2e" * 10,
        "ａ" * 32,
    ],
)
async def test_ids_that_are_none(tmp_path: Path, id: str):
    async with at_desk(tmp_path) as desk:
        with pytest.raises(Refused, match="there is no job"):
            desk.result_file(id, 0, ME)


async def test_listing(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        jobs = [await ended(desk, await put(desk)) for _ in range(5)]
        assert desk.jobs(ME) == jobs[::-1]
        assert desk.jobs(ME, limit=2, before=jobs[3].id) == [jobs[2], jobs[1]]
        assert desk.jobs(ME, states=("failed", "queued")) == []
        for limit in (0, 10_000):
            with pytest.raises(Refused, match=f"not {limit}"):
                desk.jobs(ME, limit=limit)


async def test_pictures_that_are_not_there(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        job = await put(desk)
        for image in (0, 1, -1):
            with pytest.raises(Refused, match=f"no finished picture {image}"):
                desk.result_file(job.id, image, ME)
        backend.release()
        await ended(desk, job)
        desk.result_file(job.id, 0, ME).unlink()
        with pytest.raises(Refused, match="no longer kept") as caught:
            desk.result_file(job.id, 0, ME)
        assert caught.value.trouble.status == 410


async def test_settings(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        assert await desk.settings("local") == {}
        await desk.keep_settings("local", {"언어": "ko"})
        with pytest.raises(Refused, match="at most 65,536"):
            await desk.keep_settings("local", {"x": "y" * 70_000})
    async with at_desk(tmp_path) as desk:
        assert await desk.settings("local") == {"언어": "ko"} and await desk.settings("other") == {}


async def test_the_catalogue_is_not_asked_for_at_every_call(tmp_path: Path):
    class Counting(ToyBackend):
        asked = 0

        async def catalogue(self):
            self.asked += 1
            return await super().catalogue()

    backend = Counting()
    async with at_desk(tmp_path, backend) as desk:
        assert [entry.name for entry in await desk.catalogue()] == ["toy", "second", "ink"]
        await desk.catalogue()
        assert backend.asked == 1
        backend.tell(Loaded("second", 1.0, 5))
        await desk.catalogue()
        assert backend.asked == 2
        assert (await desk.describe("ink"))["kind"] == "lora/sd1" and "solvers" in await desk.choices()
        await desk.load("second")
        with pytest.raises(Refused, match="there is no 'x' here"):
            await desk.load("x")


# Checks and seals.


async def fails(about: object) -> None:
    raise RuntimeError("the checker is broken: secret")


async def test_prompts_are_looked_at_before_anything_is_kept(tmp_path: Path):
    async def inspect(order: Order) -> None:
        if "blood" in order.values["prompt"]:
            raise refused("prompt-moderated", "no blood here")

    async with at_desk(tmp_path, stages={"inspect_prompt": inspect}) as desk:
        with pytest.raises(Refused, match="no blood"):
            await put(desk, prompt="blood")
        assert desk.jobs(ME) == []
        assert (await ended(desk, await put(desk))).state == "done"
    async with at_desk(tmp_path, stages={"inspect_prompt": fails}) as desk:
        with pytest.raises(Refused, match="cannot be checked") as caught:
            await put(desk)
        assert caught.value.trouble.status == 500 and "secret" not in caught.value.trouble.detail


async def test_pictures_are_looked_at_before_they_are_kept(tmp_path: Path):
    withheld = colour(Order(values={"prompt": "a fox", "seed": 5}), 1).tobytes()

    async def inspect(data: bytes) -> None:
        if Image.open(io.BytesIO(data)).tobytes() == withheld:
            raise refused("content-moderated", "withheld")

    async with at_desk(tmp_path, stages={"inspect_image": inspect}) as desk:
        job = await put(desk, seed=5, count=3)
        seen = [each async for each in desk.watch(job.id, ME)]
        job = seen[-1]
        assert (job.state, job.trouble.type) == ("failed", "content-moderated")
        assert [result.image for result in job.results] == [0, 2]
        assert [each.image for each in seen if isinstance(each, Lost)] == [1]
        assert not desk.result_file(job.id, 0, ME).with_name("1.png").exists()


@pytest.mark.parametrize("stage", ["inspect_image", "seal"])
async def test_a_stage_that_is_broken_withholds(tmp_path: Path, stage: str):
    async with at_desk(tmp_path, stages={stage: fails}) as desk:
        job = await ended(desk, await put(desk))
        assert (job.state, job.trouble.type, job.results) == ("failed", "internal", ())
        assert "secret" not in job.trouble.detail
        assert list((tmp_path / "results").rglob("*.png")) == []


async def test_what_is_kept_is_sealed(tmp_path: Path):
    async def seal(data: bytes) -> bytes:
        return data + b"sealed"

    async with at_desk(tmp_path, stages={"seal": seal}) as desk:
        job = await ended(desk, await put(desk))
        data = desk.result_file(job.id, 0, ME).read_bytes()
        assert data.endswith(b"sealed") and hashlib.sha256(data).hexdigest() == job.results[0].sha256
