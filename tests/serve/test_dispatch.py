"""Jobs at work: slots, fair turns, stopping, lost pictures and lost workers, slow watchers, an orderly end."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest
from tests.serve.toy_backend import ToyBackend, png_of, receipt_of
from tests.serve.toy_desk import ME, at_desk, config_of, crash, ended, put, until

from sumuk.serve.desk import Desk
from sumuk.serve.order import Caller, Job, Order
from sumuk.serve.recovery import MOST_KILLS
from sumuk.serve.trouble import Refused, Trouble
from sumuk.serve.watching import MOST
from sumuk.serve.wire import Drawn, Lost, Shown, Stepped, Vitals

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def held() -> ToyBackend:
    """A backend that makes no step before it is released."""
    backend = ToyBackend()
    backend.hold()
    return backend


class Counting(ToyBackend):
    """Counts the pictures at work."""

    most = 0
    now = 0

    def draw(self, job, order, done=()):
        self.now += (order.values.get("count") or 1) - len(done)
        self.most = max(self.most, self.now)
        super().draw(job, order, done)

    async def start(self, tell):
        def counted(told):
            self.now -= isinstance(told, Drawn | Lost)
            tell(told)

        await super().start(counted)


# Room and turns.


@pytest.mark.parametrize("slots", [1, 3, 4])
async def test_no_more_pictures_at_once_than_there_are_slots(tmp_path: Path, slots: int):
    backend = Counting(slots)
    async with at_desk(tmp_path, backend) as desk:
        jobs = [await put(desk, count=1 + number % slots) for number in range(12)]
        assert {(await ended(desk, job)).state for job in jobs} == {"done"}
    assert backend.most == slots


async def test_a_job_larger_than_the_slots_has_them_alone(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        first, large, last = [await put(desk, count=count) for count in (1, 5, 1)]
        await until(lambda: held.begun)
        await asyncio.sleep(0.05)
        assert [job for job, _ in held.begun] == [first.id]
        assert desk.job(last.id, ME).position == 1, "nobody overtakes"
        held.release()
        for job in (first, large, last):
            assert (await ended(desk, job)).state == "done"
        assert [job for job, _ in held.begun] == [first.id, large.id, last.id]


async def test_one_who_floods_does_not_keep_others_waiting(tmp_path: Path):
    backend = ToyBackend(slots=1)
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        flood = [await put(desk, Caller("flood")) for _ in range(20)]
        await until(lambda: backend.begun)
        light = [(await put(desk, Caller(f"light{number}"))).id for number in range(9)]
        backend.release()
        for job in flood:
            await ended(desk, job, Caller("flood"))
        order = [job for job, _ in backend.begun]
        assert set(light) <= set(order[:11]), "within one round after the one that was running"


# Stopping.


async def test_a_waiting_job_is_cancelled_at_once(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        running = await put(desk, count=2)
        waiting = await put(desk)
        job = await desk.cancel(waiting.id, ME, "I changed my mind")
        assert (job.state, job.trouble.type, job.trouble.detail) == (
            "cancelled",
            "cancelled",
            "cancelled: I changed my mind",
        )
        assert desk.job(job.id, ME) == job == await desk.cancel(job.id, ME)
        held.release()
        await ended(desk, running)
        assert [job for job, _ in held.begun] == [running.id]


async def test_a_running_job_is_cancelled_and_its_slots_are_free_after(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        running, waiting = await put(desk, count=2), await put(desk, count=2)
        await until(lambda: held.begun)
        watching = asyncio.ensure_future(ended(desk, running))
        assert (await desk.cancel(running.id, ME)).state == "cancelled"
        assert (await watching).state == "cancelled" and held.stopped == [running.id]
        await until(lambda: len(held.begun) == 2)
        held.release()
        assert (await ended(desk, waiting)).state == "done"


async def test_a_job_that_is_cancelled_before_it_is_drawn_is_not_drawn(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        assert (await desk.cancel(job.id, ME)).state == "cancelled"
        held.release()
        assert (await ended(desk, await put(desk))).state == "done"
        assert len(held.begun) == 1 and not desk._dispatch.live


async def test_slots_are_taken_until_the_pictures_have_stopped(tmp_path: Path):
    class Slow(ToyBackend):
        def cancel(self, job):
            self.stopped.append(job)

    backend = Slow()
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        running, waiting = await put(desk, count=2), await put(desk, count=2)
        await until(lambda: backend.begun)
        await desk.cancel(running.id, ME)
        assert desk.job(running.id, ME).state == "cancelled"
        await asyncio.sleep(0.05)
        assert len(backend.begun) == 1
        backend.tell(Drawn(running.id, 0, png_of(running.order, 0), receipt_of(running.order, 0)))
        assert desk.job(running.id, ME).results == (), "what comes after the end is dropped"
        backend.lose(running.id)
        await until(lambda: len(backend.begun) == 2)
        backend.release()
        assert (await ended(desk, waiting)).state == "done"


async def test_cancelling_at_any_moment_ends_the_job_once(tmp_path: Path):
    backend = ToyBackend()
    async with at_desk(tmp_path, backend) as desk:
        for turns in range(25):
            job = await put(desk, count=2)
            for _ in range(turns):
                await asyncio.sleep(0)
            got = await asyncio.gather(*(desk.cancel(job.id, ME) for _ in range(3)))
            assert got[0] == got[1] == got[2] and got[0].state in ("cancelled", "done")
            assert desk.job(job.id, ME) == got[0] and (got[0].state == "done") == (len(got[0].results) == 2)
        await until(lambda: not desk._dispatch.live)
        assert (await ended(desk, await put(desk))).state == "done"


@pytest.mark.parametrize("running", [True, False])
async def test_past_its_deadline_a_job_fails(tmp_path: Path, held: ToyBackend, running: bool):
    async with at_desk(tmp_path, held) as desk:
        if not running:
            await put(desk, count=2)
        job, _ = await desk.submit(Order(values={}, deadline=0.2), ME)
        job = await ended(desk, job)
        assert (job.state, job.trouble.type, job.trouble.status) == ("failed", "deadline", 504)
        assert held.stopped == ([job.id] if running else [])
        held.release()


async def test_the_server_has_patience_for_so_long(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held, patience=0.2) as desk:
        jobs = [await put(desk), (await desk.submit(Order(values={}, deadline=1e6), ME))[0]]
        assert {(await ended(desk, job)).trouble.type for job in jobs} == {"deadline"}
        held.release()


# Lost pictures and lost workers.


async def test_a_lost_picture_fails_the_job_and_the_others_are_kept(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk, count=3)
        await until(lambda: held.begun)
        held.tell(Drawn(job.id, 1, png_of(job.order, 1), receipt_of(job.order, 1)))
        held.lose(job.id)
        job = await ended(desk, job)
        assert (job.state, job.trouble.type) == ("failed", "out-of-memory")
        assert [result.image for result in job.results] == [1]
        assert desk.result_file(job.id, 1, ME).read_bytes() == png_of(job.order, 1)
        held.release()


async def test_what_draws_may_cancel_too(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        await until(lambda: held.begun)
        held.lose(job.id, Trouble("cancelled", "stopped there"))
        assert (await ended(desk, job)).state == "cancelled"


async def test_news_of_nobody_are_passed_over(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        await until(lambda: held.begun)
        for told in (
            Stepped("f" * 32, 0, 1, 4),
            Lost(job.id, 7, Trouble("internal", "no")),
            Shown(job.id, -1, 1, b""),
        ):
            held.tell(told)
        held.tell(Vitals(resident=5))
        assert desk.vitals.resident == 5
        held.release()
        assert (await ended(desk, job)).state == "done"


async def test_after_a_lost_worker_a_job_is_begun_anew_with_what_it_has(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk, count=3)
        await until(lambda: held.begun)
        held.tell(Drawn(job.id, 1, png_of(job.order, 1), receipt_of(job.order, 1)))
        held.die()
        await until(lambda: len(held.begun) == 2)
        assert held.begun[1] == (job.id, (1,))
        for image, step in ((0, 3), (2, 2)):
            held.tell(Stepped(job.id, image, step, 4))
        assert desk.job(job.id, ME).step == 2
        held.release()
        job = await ended(desk, job)
        assert (job.state, job.attempt, len(job.results)) == ("done", 2, 3)
        for image in range(3):
            assert desk.result_file(job.id, image, ME).read_bytes() == png_of(job.order, image)
        assert not desk._dispatch.live
        assert "sumuk_worker_deaths_total 1.0" in desk.metrics.text().decode()


async def test_a_job_over_which_two_workers_are_lost_is_given_up_and_its_neighbours_are_not(tmp_path: Path):
    """The neighbour was there at the first death; the second time each is alone, so that it is clear who it is."""
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        poison, neighbour = await put(desk), await put(desk)
        await until(lambda: len(backend.begun) == 2)
        backend.die()
        await until(lambda: len(backend.begun) == 3)
        await asyncio.sleep(0.02)
        assert backend.begun[2][0] == poison.id and len(backend.begun) == 3
        backend.die()
        trouble = (await ended(desk, poison)).trouble
        assert trouble.type == "worker-lost" and "lost 2 times" in trouble.detail
        backend.release()
        assert (await ended(desk, neighbour)).state == "done"


async def test_workers_that_are_killed_from_outside_are_rarely_a_jobs_fault(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        for times in range(1, 5):
            await until(lambda times=times: len(held.begun) == times)
            held.die("the worker was killed", killed=True)
        await until(lambda: len(held.begun) == 5)
        held.die("the worker was killed", killed=True)
        assert "lost 5 times" in (await ended(desk, job)).trouble.detail, (
            "but that often, it is the job that is at fault"
        )


async def test_deaths_are_remembered_over_a_restart(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held, drain=0.0) as desk:
        job = await put(desk)
        await until(lambda: held.begun)
        held.die()
        await until(lambda: len(held.begun) == 2)
    again = ToyBackend()
    again.hold()
    async with at_desk(tmp_path, again) as desk:
        await until(lambda: again.begun)
        again.die()
        assert (await ended(desk, job)).trouble.type == "worker-lost"


async def test_a_worker_that_comes_up_slowly_gets_the_jobs_then(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        await until(lambda: held.begun)
        held.die()
        held.ready = False
        held.release()
        await until(lambda: desk.job(job.id, ME).state == "queued")
        held.ready = True
        assert (await ended(desk, job)).state == "done"


async def test_a_worker_that_is_lost_while_a_job_is_begun(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)  # its beginning is being written
        held.die()
        held.ready = False
        held.release()
        await until(lambda: desk.job(job.id, ME).attempt)
        await until(lambda: desk.job(job.id, ME).state == "queued")
        assert held.begun == []
        held.ready = True
        assert (await ended(desk, job)).state == "done"


async def test_a_worker_that_is_gone_for_good_makes_the_desk_unready(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        await until(lambda: held.begun)
        held.die("the device is broken", again=False)
        assert desk.why_unready == "what draws is broken: the device is broken"
        await until(lambda: desk.job(job.id, ME).state == "queued")
        with pytest.raises(Refused, match="the device is broken"):
            await put(desk)
    async with at_desk(tmp_path) as desk:
        assert (await ended(desk, job)).state == "done"


async def test_cancel_and_death_together(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        for turns in range(12):
            job = await put(desk)
            await until(lambda job=job: any(each == job.id for each, _ in held.begun))
            held.die()
            for _ in range(turns):
                await asyncio.sleep(0)
            assert (await desk.cancel(job.id, ME)).state == "cancelled"
        held.release()
        assert (await ended(desk, await put(desk))).state == "done"


async def test_who_cancels_while_a_job_is_put_back_need_not_wait_for_its_turn(
    tmp_path: Path, held: ToyBackend
):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        await until(lambda: held.begun)
        putting, requeue = asyncio.Event(), desk._store.requeue

        async def slowly(id: str, deaths: int) -> None:
            await putting.wait()
            await requeue(id, deaths)

        desk._store.requeue = slowly
        held.die()
        held.ready = False
        await asyncio.sleep(0.01)
        cancelling = asyncio.ensure_future(desk.cancel(job.id, ME))
        await asyncio.sleep(0)
        putting.set()
        async with asyncio.timeout(5):
            assert (await cancelling).state == "cancelled"
        assert not desk._dispatch.live
        held.release()


async def test_a_result_that_cannot_be_written_fails_its_job_only(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job, other = await put(desk), await put(desk)
        (tmp_path / "results" / job.id).write_text("a file in the way")
        held.release()
        job = await ended(desk, job)
        assert (job.state, job.trouble.type) == ("failed", "internal") and str(
            tmp_path
        ) not in job.trouble.detail
        assert (await ended(desk, other)).state == "done"
        (tmp_path / "results" / job.id).unlink()


async def test_a_disk_that_fails_is_no_end(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held, drain=0.2) as desk:
        job = await put(desk)
        await until(lambda: held.begun)
        desk._store.db.execute("PRAGMA query_only = ON")
        with pytest.raises(Refused, match="cannot be written"):
            await put(desk)
        assert (
            desk.job(job.id, ME).state == "running" and "sumuk_queue_jobs 0.0" in desk.metrics.text().decode()
        )
        held.release()
        assert (await ended(desk, job)).state == "failed"
        desk._store.db.execute("PRAGMA query_only = OFF")
        assert (await ended(desk, await put(desk))).state == "done"
    async with at_desk(tmp_path) as desk:
        assert (await ended(desk, job)).state == "done", "on the disk it was never over"


# Watching.


async def test_a_slow_watcher_misses_steps_and_previews_and_nothing_else(tmp_path: Path):
    backend = ToyBackend(steps=300, preview=3)
    async with at_desk(tmp_path, backend) as desk:
        job = await put(desk, count=2)
        watching = desk.watch(job.id, ME)
        await anext(watching)
        quick = [each async for each in desk.watch(job.id, ME)]
        watcher = next(iter(desk._dispatch.live.values()), None)
        assert watcher is None, "the job is over, and the slow watcher keeps nothing alive"
        slow = [each async for each in watching]
        assert sum(isinstance(each, Stepped) for each in slow) == MOST[Stepped]
        assert sum(isinstance(each, Shown) for each in slow) == MOST[Shown]
        assert [each.step for each in slow if isinstance(each, Stepped)][-1] == 300
        assert [each for each in slow if isinstance(each, Drawn | Job)] == [
            each for each in quick[1:] if isinstance(each, Drawn | Job)
        ]


async def test_who_goes_away_is_forgotten(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held) as desk:
        job = await put(desk)
        watching = desk.watch(job.id, ME)
        await anext(watching)
        assert len(desk._dispatch.live[job.id].watchers) == 1
        await watching.aclose()
        assert len(desk._dispatch.live[job.id].watchers) == 0
        held.release()


# The end, and the next start.


async def test_what_runs_is_finished_and_what_waits_is_kept(tmp_path: Path):
    backend = ToyBackend(turn=0.02)
    async with at_desk(tmp_path, backend) as desk:
        running, waiting = await put(desk, count=2), await put(desk)
        await until(lambda: backend.begun)
        told = asyncio.ensure_future(ended(desk, waiting))
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(desk.stop())
        await asyncio.sleep(0)
        assert desk.draining and not desk.ready
        with pytest.raises(Refused, match="stopping"):
            await put(desk)
        with pytest.raises(Refused, match="goes on when the server is back") as caught:
            await told
        assert caught.value.trouble.status == 503 and desk.job(running.id, ME).state == "running"
        assert (await ended(desk, running)).state == "done"
        await stopping
        assert len(backend.begun) == 1
    async with at_desk(tmp_path) as desk:
        assert (await ended(desk, waiting)).state == "done"
        assert desk.job(running.id, ME).state == "done" and desk.job(waiting.id, ME).attempt == 1


async def test_what_does_not_finish_in_time_goes_on_later_and_gives_the_same_pictures(
    tmp_path: Path, held: ToyBackend
):
    async with at_desk(tmp_path, held, drain=0.05) as desk:
        job = await put(desk, count=2)
        await until(lambda: held.begun)
        held.tell(Drawn(job.id, 0, png_of(job.order, 0), receipt_of(job.order, 0)))
        await until(lambda: desk.job(job.id, ME).results)
        with pytest.raises(Refused, match="the server stops"):
            await asyncio.gather(desk.stop(), ended(desk, job))
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        assert db.execute("SELECT state, kills FROM jobs").fetchall() == [("queued", 0)]
    backend = ToyBackend()
    async with at_desk(tmp_path, backend) as desk:
        job = await ended(desk, job)
        assert (job.state, job.attempt, backend.begun) == ("done", 2, [(job.id, (0,))])
        assert desk.result_file(job.id, 1, ME).read_bytes() == png_of(job.order, 1)


async def test_who_cancels_while_it_stops_is_not_kept_waiting(tmp_path: Path):
    """The job's own task is at something that takes long."""

    async def seal(data: bytes) -> bytes:
        await asyncio.sleep(60)
        return data

    backend = ToyBackend()
    async with at_desk(tmp_path, backend, {"seal": seal}, drain=0.05) as desk:
        job = await put(desk)
        await until(lambda: backend.begun and not backend._work)
        cancelling = asyncio.ensure_future(desk.cancel(job.id, ME))
        await desk.stop()
        with pytest.raises(Refused, match="the server stops"):
            async with asyncio.timeout(5):
                await cancelling


@pytest.mark.parametrize(("key", "state"), [(None, "cancelled"), ("k", "done")])
async def test_nobody_waits_for_attached_orders_after_a_restart_but_by_their_key(
    tmp_path: Path, held, key, state
):
    async with at_desk(tmp_path, held, drain=0.0) as desk:
        job, _ = await desk.submit(Order(values={}, attached=True), ME, key, "d")
    async with at_desk(tmp_path) as desk:
        job = await ended(desk, job)
        assert job.state == state
        if state == "cancelled":
            assert job.trouble.detail == "its client went away when the server stopped"


async def test_the_order_of_admission_outlasts_the_server(tmp_path: Path, held: ToyBackend):
    async with at_desk(tmp_path, held, drain=0.0) as desk:
        jobs = [await put(desk) for _ in range(10)]
    backend = ToyBackend(slots=1)
    async with at_desk(tmp_path, backend) as desk:
        await ended(desk, jobs[-1])
        assert [job for job, _ in backend.begun] == [job.id for job in jobs]


async def test_a_picture_that_was_finished_but_not_written_down_is_not_drawn_again(
    tmp_path: Path, held: ToyBackend
):
    desk = Desk(config_of(tmp_path), held)
    await desk.start()
    jobs = [await put(desk, count=2), await put(desk, count=2)]
    await until(lambda: held.begun)
    await crash(desk)
    for job, image, data in (
        (jobs[0], 1, png_of(jobs[0].order, 1)),
        (jobs[1], 0, png_of(jobs[1].order, 0)),
        (jobs[1], 1, png_of(jobs[1].order, 1)[:-30]),
    ):
        folder = tmp_path / "results" / job.id
        folder.mkdir(exist_ok=True)
        (folder / f"{image}.png").write_bytes(data)
        (folder / f".{image}.png.123.partial").write_bytes(b"half")
    backend = ToyBackend()
    async with at_desk(tmp_path, backend) as desk:
        for job in jobs:
            job = await ended(desk, job)
            assert (job.state, len(job.results)) == ("done", 2)
            for image in range(2):
                assert desk.result_file(job.id, image, ME).read_bytes() == png_of(job.order, image)
        assert backend.begun == [(jobs[0].id, (1,)), (jobs[1].id, (0,))]
        assert not list(tmp_path.rglob("*.partial"))


async def test_a_job_whose_pictures_are_all_there_is_done_at_once(tmp_path: Path, held: ToyBackend):
    desk = Desk(config_of(tmp_path), held)
    await desk.start()
    job = await put(desk)
    await until(lambda: held.begun)
    await crash(desk)
    (tmp_path / "results" / job.id).mkdir()
    (tmp_path / "results" / job.id / "0.png").write_bytes(png_of(job.order, 0))
    backend = ToyBackend()
    async with at_desk(tmp_path, backend) as desk:
        assert desk.job(job.id, ME).state == "done" and backend.begun == []


async def test_a_job_over_which_the_server_is_killed_too_often_is_given_up(tmp_path: Path):
    job = None
    for kills in range(MOST_KILLS + 1):
        backend = ToyBackend()
        backend.hold()
        desk = Desk(config_of(tmp_path), backend)
        await desk.start()
        job = job or await put(desk)
        await until(lambda backend=backend: backend.begun)
        assert desk.job(job.id, ME).attempt == kills + 1
        await crash(desk)
    async with at_desk(tmp_path) as desk:
        job = desk.job(job.id, ME)
        assert (job.state, job.trouble.type) == ("failed", "worker-lost")
        assert (await ended(desk, await put(desk))).state == "done"


async def test_a_desk_that_cannot_start_gives_the_folder_back(tmp_path: Path):
    class Broken(ToyBackend):
        async def start(self, tell):
            raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        await Desk(config_of(tmp_path), Broken()).start()
    async with at_desk(tmp_path) as desk:
        assert desk.ready


async def test_the_folder_of_results_may_be_emptied_by_hand(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        job = await ended(desk, await put(desk))
        shutil.rmtree(tmp_path / "results")
        (tmp_path / "results").mkdir()
        with pytest.raises(Refused, match="no longer kept"):
            desk.result_file(job.id, 0, ME)
        assert (await ended(desk, await put(desk))).state == "done"
