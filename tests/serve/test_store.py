"""What outlasts the server: one server a folder, sound or refused, all of a thing or nothing of it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.serve.toy_backend import colour, png_of, receipt_of

from sumuk.base.errors import BadFile, BadInput
from sumuk.serve.order import Job, Order
from sumuk.serve.store import Store
from sumuk.serve.trouble import Refused, Trouble

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(tmp_path: Path):
    opened = Store(tmp_path)
    await opened.open()
    yield opened
    await opened.close()


def job(id: str = "a" * 32, owner: str = "local", attached: bool = False, **values: object) -> Job:
    order = Order(values={"prompt": "a fox", "seed": 7, **values}, attached=attached)
    return Job(id=id, owner=owner, state="queued", order=order, count=2, cost=10.0, created=100.0, steps=4)


async def test_a_job_comes_back_as_it_was_put_in(store: Store):
    asked = Order(
        values={"prompt": "여우 🦊", "seed": 2**64 - 1, "loras": [{"name": "ink", "weight": 0.5}]},
        model="toy",
        vae="v",
        refiner="r",
        controls={"edges": "canny"},
        deadline=3.5,
        attached=True,
    )
    put = replace(job(), order=asked)
    assert await store.add(put) == put
    assert store.job(put.id) == put


async def test_pictures_are_kept_once_and_put_back(store: Store):
    picture, hint = b"\x89PNG one", b"\x89PNG two"
    put = job(init=picture, mask=picture, steer=[{"control": "edges", "hint": hint}])
    light = (await store.add(put)).order.values
    assert light["init"] == light["mask"] == {"sha256": light["init"]["sha256"]}
    assert store.job(put.id).order.values == light
    assert await store.begin(put.id, 1.0) == put.order
    await store.add(job("b" * 32, init=picture))
    assert store.reader.execute("SELECT count(*) FROM pictures").fetchone()[0] == 2


async def test_the_states_of_a_job(store: Store):
    id = (await store.add(job())).id
    await store.begin(id, 101.0)
    begun = store.job(id)
    assert (begun.state, begun.began, begun.attempt) == ("running", 101.0, 1)
    await store.requeue(id)
    assert (store.job(id).state, store.job(id).began, store.job(id).attempt) == ("queued", None, 1)
    trouble = Trouble("deadline", "late", 3.0, {"position": 1})
    await store.end(id, "failed", 102.0, trouble)
    ended = store.job(id)
    assert (ended.state, ended.ended, ended.trouble) == ("failed", 102.0, trouble)
    await store.requeue(id)
    assert store.job(id).state == "failed", "what is over stays over"


async def test_a_finished_picture(store: Store):
    put = await store.add(job())
    png, receipt = png_of(put.order, 1), receipt_of(put.order, 1)
    result = await store.keep(put.id, 1, png, receipt)
    assert (result.seed, result.width, result.height, result.receipt) == (8, 64, 64, receipt)
    assert store.path(put.id, 1).read_bytes() == png
    assert result.file == str(store.path(put.id, 1).relative_to(store.results))
    assert store.job(put.id).results == (result,)


async def test_seeds_of_64_bits_are_kept(store: Store):
    put = await store.add(job(seed=2**64 - 2))
    result = await store.keep(put.id, 1, png_of(put.order, 1), receipt_of(put.order, 1))
    assert store.job(put.id).results[0].seed == result.seed == 2**64 - 1


async def test_what_cannot_be_written_leaves_nothing(store: Store):
    put = await store.add(job())
    (store.results / put.id).write_text("a file in the way")
    with pytest.raises(BadFile, match="cannot write"):
        await store.keep(put.id, 0, png_of(put.order, 0), receipt_of(put.order, 0))
    assert store.job(put.id).results == ()
    (store.results / put.id).unlink()
    await store.keep(put.id, 0, png_of(put.order, 0), receipt_of(put.order, 0))


async def test_a_disk_that_fails_is_told_as_unready(store: Store):
    store.db.execute("PRAGMA query_only = ON")
    with pytest.raises(Refused, match="cannot be written") as caught:
        await store.add(job())
    assert caught.value.trouble.status == 503
    store.db.execute("PRAGMA query_only = OFF")
    await store.add(job())


async def test_a_full_database_is_told_as_unready_and_loses_nothing(store: Store):
    first = await store.add(job())
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(Refused, match="full"):
        await store.add(job("b" * 32, init=bytes(10**6)))
    assert store.job("b" * 32) is None and store.job(first.id) == first


async def test_what_is_asked_at_once_is_committed_together_and_fails_alone(store: Store):
    said: list[str] = []
    store.db.set_trace_callback(said.append)
    jobs = [job(f"{number:032x}") for number in (*range(20), 7, *range(20, 40))]
    told = await asyncio.gather(*map(store.add, jobs), return_exceptions=True)
    assert [type(each) for each in told] == [Job] * 20 + [Refused] + [Job] * 20
    assert len(store.jobs("local", 100)) == 40
    said.clear()
    await asyncio.gather(*(store.end(each.id, "done", 1.0, None) for each in jobs))
    assert 1 <= said.count("COMMIT") <= 5
    assert len(store.jobs("local", 100, states=("done",))) == 40


async def test_who_goes_away_leaves_the_others_writing(store: Store):
    writing = [asyncio.ensure_future(store.add(job(f"{number:032x}"))) for number in range(10)]
    await asyncio.sleep(0)
    writing[3].cancel()
    told = await asyncio.gather(*writing, return_exceptions=True)
    assert sum(isinstance(each, Job) for each in told) == 9


async def test_idempotency_keys(store: Store):
    assert store.known("local", "k") is None
    await store.add(job(), "k", "digest")
    assert store.known("local", "k") == ("digest", "a" * 32)
    assert store.known("other", "k") is None
    await store.add(job("b" * 32), "k", "digest")
    assert store.known("local", "k").job == "b" * 32


async def test_jobs_of_an_owner_newest_first(store: Store):
    for number in range(5):
        await store.add(job(f"{number:032x}"))
    await store.add(job("f" * 32, "other"))
    await store.end(f"{1:032x}", "done", 1.0, None)
    numbers = [int(each.id, 16) for each in store.jobs("local", 10)]
    assert numbers == [4, 3, 2, 1, 0]
    assert [int(each.id, 16) for each in store.jobs("local", 2, f"{3:032x}")] == [2, 1]
    assert [int(each.id, 16) for each in store.jobs("local", 10, states=("done",))] == [1]
    assert store.jobs("local", 10, states=()) == []


async def test_settings(store: Store):
    assert store.settings("local") == "{}"
    await store.keep_settings("local", '{"steps": 3}')
    await store.keep_settings("local", '{"steps": 4}')
    assert store.settings("local") == '{"steps": 4}' and store.settings("other") == "{}"


async def test_a_second_server_is_told_who_has_the_folder(store: Store):
    with pytest.raises(
        BadInput, match=rf"{store.folder} is in use by another server \(process {os.getpid()}\)"
    ):
        await Store(store.folder).open()


async def test_a_killed_server_leaves_the_folder_free(tmp_path: Path):
    code = (
        "import asyncio, os, sys; from pathlib import Path; from sumuk.serve.store import Store\n"
        "asyncio.run(Store(Path(sys.argv[1])).open()); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    store = Store(tmp_path)
    await store.open()
    await store.close()


async def test_after_closing_it_says_so(tmp_path: Path):
    store = Store(tmp_path)
    await store.open()
    await store.close()
    for use in (lambda: store.job("a" * 32), lambda: asyncio.run(store.add(job()))):
        with pytest.raises(Refused, match="not running"):
            await asyncio.to_thread(use)


# A database that is not as it was left.


async def made(folder: Path) -> Path:
    """A folder with two jobs in its database; the database's path."""
    store = Store(folder)
    await store.open()
    put = await store.add(job())
    await store.keep(put.id, 0, png_of(put.order, 0), receipt_of(put.order, 0))
    rows = [(str(number), "x") for number in range(500)]
    await store.do(lambda: store.db.executemany("INSERT INTO settings VALUES (?, ?)", rows))
    await store.close()
    return folder / "jobs.sqlite"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 + 8)
        file.write(os.urandom(3 * 4096))


def hollow(path: Path) -> None:
    """A job without an owner, which the tables do not allow."""
    for change in (
        "replace(sql, 'owner TEXT NOT NULL', 'owner TEXT')",
        "replace(sql, 'owner TEXT', 'owner TEXT NOT NULL')",
    ):
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA writable_schema = ON")
            db.execute(f"UPDATE sqlite_master SET sql = {change} WHERE name = 'jobs'")
        with sqlite3.connect(path) as db:
            db.execute("UPDATE OR IGNORE jobs SET owner = NULL")
        db.close()


def later(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE jobs (id)")


@pytest.mark.parametrize(
    ("harm", "code", "why"),
    [
        (lambda path: path.write_bytes(b""), "state.damaged", "it is empty"),
        (lambda path: path.write_bytes(b"no database" * 1000), "state.damaged", "not a database"),
        (cut, "state.damaged", "malformed|database disk image"),
        (overwritten, "state.damaged", "malformed|Tree|page"),
        (hollow, "state.damaged", r"table jobs: NULL value in jobs\.owner"),
        (Path.unlink, "state.damaged", "it is missing, though there are results"),
        (foreign, "state.damaged", "no database of a Sumuk server"),
        (later, "state.version", "of version 99, written by a later Sumuk"),
    ],
    ids=["empty", "text", "cut", "overwritten", "hollow", "missing", "foreign", "later"],
)
async def test_a_database_that_is_damaged_is_told_and_never_replaced(
    tmp_path: Path, harm, code: str, why: str
):
    path = await made(tmp_path)
    harm(path)
    before = path.read_bytes() if path.exists() else None
    for _ in range(2):
        with pytest.raises(BadFile, match=why) as caught:
            await Store(tmp_path).open()
        assert caught.value.code == code and str(path) in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == before
    if code == "state.damaged":
        assert ".recover" in str(caught.value) and f"move {tmp_path} away" in str(caught.value)


async def test_a_server_killed_while_it_made_its_database_makes_it_again(tmp_path: Path):
    tmp_path.joinpath("results").mkdir()
    tmp_path.joinpath(".jobs.sqlite.new").write_bytes(b"half")
    store = Store(tmp_path)
    await store.open()
    await store.add(job())
    await store.close()


async def test_the_folder_is_nobody_elses_to_read(tmp_path: Path):
    store = Store(tmp_path / "deep" / "state")
    await store.open()
    await store.close()
    assert (tmp_path / "deep" / "state").stat().st_mode & 0o077 == 0


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match=r"cannot be used.*--state"):
        await Store(tmp_path / "file" / "state").open()


def test_pictures_differ(tmp_path: Path):
    """The toy's pictures can tell jobs apart, or the tests above would show little."""
    order = job().order
    assert colour(order, 0).tobytes() != colour(order, 1).tobytes()
