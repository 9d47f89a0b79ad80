"""What is deleted, and when; and what never is."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

import pytest
from PIL import Image
from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_desk import ME, at_desk, ended, put, until

from sumuk.serve.desk import Desk
from sumuk.serve.order import Job
from sumuk.serve.retention import AT_ONCE, DAY, sweep
from sumuk.serve.store import Store
from sumuk.serve.trouble import Refused

pytestmark = pytest.mark.anyio

PLENTY = 10**12


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


PICTURE = picture()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def some(desk: Desk, count: int, **values: object) -> list[Job]:
    return [await ended(desk, await put(desk, **values)) for _ in range(count)]


def files(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.rglob("*.png")}


async def test_by_age_first_the_pictures_then_the_job(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        (job,) = await some(desk, 1)
        store = desk._store
        assert await sweep(store, job.ended + 29 * DAY, 30, PLENTY) == (0, 0, 0)
        size = desk.result_file(job.id, 0, ME).stat().st_size
        assert await sweep(store, job.ended + 31 * DAY, 30, PLENTY) == (1, 0, size)
        assert files(tmp_path) == set()
        assert desk.job(job.id, ME) == job, "the job and its receipts are known still"
        with pytest.raises(Refused, match=r"no longer kept \(results are for 30 days\)"):
            desk.result_file(job.id, 0, ME)
        assert await sweep(store, job.ended + 59 * DAY, 30, PLENTY) == (0, 0, 0)
        assert await sweep(store, job.ended + 61 * DAY, 30, PLENTY) == (0, 1, 0)
        with pytest.raises(Refused, match="there is no job"):
            desk.job(job.id, ME)
        left = store.reader.execute("SELECT (SELECT count(*) FROM results) + (SELECT count(*) FROM jobs)")
        assert left.fetchone()[0] == 0


async def test_by_size_the_oldest_first(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        jobs = await some(desk, 6)
        sizes = [desk.result_file(job.id, 0, ME).stat().st_size for job in jobs]
        now = time.time()
        assert await sweep(desk._store, now, 30, sum(sizes)) == (0, 0, 0)
        swept = await sweep(desk._store, now, 30, sum(sizes[4:]))
        assert swept == (4, 0, sum(sizes[:4]))
        assert files(tmp_path) == {job.id for job in jobs[4:]}
        await sweep(desk._store, now, 30, 0)
        assert files(tmp_path) == set() and len(desk.jobs(ME)) == 6


async def test_what_is_not_over_is_never_touched(tmp_path: Path):
    backend = ToyBackend()
    backend.hold()
    async with at_desk(tmp_path, backend) as desk:
        running, waiting = (
            await put(desk, count=2, init=PICTURE, strength=0.5),
            await put(desk, init=PICTURE, strength=0.5),
        )
        await until(lambda: backend.begun)
        for keep in (PLENTY, 0):
            assert await sweep(desk._store, time.time() + 1000 * DAY, 30, keep) == (0, 0, 0)
        backend.release()
        for job in (running, waiting):
            assert (await ended(desk, job)).state == "done"


async def test_pictures_that_were_sent_go_with_the_last_job_that_has_them(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        await some(desk, 2, init=PICTURE, strength=0.5)
        (other,) = await some(desk, 1, init=PICTURE + b"other", strength=0.5)

        def kept() -> int:
            return desk._store.reader.execute("SELECT count(*) FROM pictures").fetchone()[0]

        assert kept() == 2
        everything = (
            sum(path.stat().st_size for path in tmp_path.rglob("*.png")) + 2 * len(PICTURE) + len(b"other")
        )
        assert (await sweep(desk._store, time.time(), 30, everything)).emptied == 0
        assert (await sweep(desk._store, time.time(), 30, everything - 1)).emptied == 1
        assert kept() == 2
        total = desk.result_file(other.id, 0, ME).stat().st_size + len(PICTURE) + len(b"other")
        assert (await sweep(desk._store, time.time(), 30, total)).emptied == 1
        assert kept() == 1
        await sweep(desk._store, time.time(), 30, 0)
        assert kept() == 0


async def test_room_is_given_back_to_the_disk(tmp_path: Path):
    async with at_desk(tmp_path) as desk:
        await some(desk, 1, init=PICTURE + bytes(5_000_000), strength=0.5)
        await sweep(desk._store, time.time(), 30, 0)
    assert (tmp_path / "jobs.sqlite").stat().st_size < 500_000


async def test_many_are_deleted_in_parts(tmp_path: Path):
    store = Store(tmp_path)
    await store.open()
    await store.do(
        lambda: store.db.executemany(
            "INSERT INTO jobs (id, owner, state, asked, count, cost, steps, created, attached, ended)"
            " VALUES (?, 'local', 'done', '{}', 1, 1, 1, 1, 0, 1)",
            [(f"{number:032x}",) for number in range(2 * AT_ONCE + 7)],
        )
    )
    assert await sweep(store, 1e9, 30, PLENTY) == (2 * AT_ONCE + 7, 2 * AT_ONCE + 7, 0)
    await store.close()


async def test_it_happens_by_itself_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async with at_desk(tmp_path) as desk:
        jobs = await some(desk, 3)
    with caplog.at_level(logging.INFO, "sumuk.serve"):
        async with at_desk(tmp_path, keep_bytes=0) as desk:
            await until(lambda: not files(tmp_path))
            await until(lambda: "deleted the pictures of 3 jobs" in caplog.text)
            assert len(desk.jobs(ME)) == len(jobs)
