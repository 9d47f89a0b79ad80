"""What outlasts the server: its jobs in SQLite, its pictures in files beside, for one server alone.

What a method wrote is on the disk when it returns (write-ahead log, ``synchronous=FULL``). All writing happens in one
thread of the store's own; reading goes over a second connection, which a write-ahead log never makes wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import sqlite3
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from PIL import Image

from sumuk.base.errors import BadFile
from sumuk.files.atomic import replacing
from sumuk.serve import database
from sumuk.serve.order import Job, Order, Result, State
from sumuk.serve.packing import job_from, order_from, order_text, pack, unpack
from sumuk.serve.trouble import Trouble, refused
from sumuk.serve.writing import Writer

P = ParamSpec("P")
T = TypeVar("T")


class Known(NamedTuple):
    """What an idempotency key stands for: the digest of what was sent with it, and the job that it made."""

    digest: str
    job: str


def written(method: Callable[Concatenate[Store, P], T]) -> Callable[Concatenate[Store, P], Awaitable[T]]:
    """A method that runs in the store's thread, as one transaction: all of it is kept, or nothing."""

    @wraps(method)
    def run(store: Store, /, *args: P.args, **named: P.kwargs) -> Awaitable[T]:
        return store.do(partial(method, store, *args, **named))

    return run


class Store:
    """The state folder of a server, which it has for itself between :meth:`open` and :meth:`close`.

    Args:
        folder: made if it is not there.

    Attributes:
        results: the folder of finished pictures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        self._writer = Writer()
        self._reader: sqlite3.Connection | None = None
        self._lock: int | None = None

    # Opening and closing.

    async def open(self) -> None:
        """Take the folder and make its database ready.

        Raises:
            BadInput: another server has it.
            BadFile: it cannot be written; its database is damaged, or of a later version.
        """
        try:
            await self._writer.call(self._open)
        except BaseException:
            await self.close()
            raise

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.results.mkdir(exist_ok=True)
            self._lock = database.take(self.folder)
            path = self.folder / "jobs.sqlite"
            self._writer.db = database.ready(path, self.results)
            self._reader = database.connected(path)
        except OSError as error:
            raise BadFile(
                f"the state folder {self.folder} cannot be used: {error.strerror or error}; "
                "give another one with --state",
                "state.folder",
            ) from None

    async def close(self) -> None:
        """Finish what is being written and give the folder back."""
        await self._writer.call(self._close)
        self._writer.end()

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
            self.db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_open(self) -> None:
        if self._reader is None:
            raise refused("unready", "the server is not running", retry_after=5)

    async def do(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the store's thread as one transaction; it may run twice (:meth:`Writer.do`).

        Raises:
            Refused: the store is not open; the disk is full or fails, and nothing of it was kept.
        """
        self._check_open()
        return await self._writer.do(work)

    @property
    def db(self) -> sqlite3.Connection:
        """The connection for writing, for what runs in the store's thread."""
        return self._writer.db

    # Writing.

    @written
    def add(self, job: Job, key: str | None = None, digest: str = "") -> Job:
        """Keep a new job; from now on it is the server's to bring to an end.

        Returns:
            It, with the pictures of its order replaced by their digests.
        """
        order, pictures = pack(job.order)
        self.db.execute(
            "INSERT INTO jobs (id, owner, state, asked, count, cost, steps, created, attached)"
            " VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
            (
                job.id,
                job.owner,
                order_text(order),
                job.count,
                job.cost,
                job.steps,
                job.created,
                order.attached,
            ),
        )
        for sha256, data in pictures.items():
            self.db.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?)", (sha256, len(data), data))
            self.db.execute("INSERT INTO uses VALUES (?, ?)", (job.id, sha256))
        if key is not None:  # a key whose job was given up comes to stand for the new one
            self.db.execute(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?)", (job.owner, key, digest, job.id)
            )
        return replace(job, order=order)

    @written
    def begin(self, job: str, now: float) -> Order:
        """A job is begun, once more.

        Returns:
            Its order, with the pictures in it.
        """
        self.db.execute(
            "UPDATE jobs SET state = 'running', began = ?, attempt = attempt + 1 WHERE id = ?", (now, job)
        )
        (asked,) = self.db.execute("SELECT asked FROM jobs WHERE id = ?", (job,)).fetchone()
        return unpack(order_from(asked), self._picture)

    def _picture(self, sha256: str) -> bytes:
        return self.db.execute("SELECT png FROM pictures WHERE sha256 = ?", (sha256,)).fetchone()[0]

    @written
    def requeue(self, job: str, deaths: int = 0) -> None:
        """A job waits again, after ``deaths`` more workers were lost over it."""
        self.db.execute(
            "UPDATE jobs SET state = 'queued', began = NULL, deaths = deaths + ? WHERE id = ? AND state = 'running'",
            (deaths, job),
        )

    @written
    def end(self, job: str, state: State, now: float, trouble: Trouble | None) -> None:
        """Nothing more happens to a job."""
        self.ended(job, state, now, trouble)

    def ended(self, job: str, state: State, now: float, trouble: Trouble | None) -> None:
        """The same within a transaction."""
        told = None if trouble is None else json.dumps(trouble.as_dict())
        self.db.execute(
            "UPDATE jobs SET state = ?, ended = ?, trouble = ? WHERE id = ?", (state, now, told, job)
        )

    async def keep(self, job: str, image: int, png: bytes, receipt: dict[str, Any]) -> Result:
        """A finished picture: its file, then its row.

        Raises:
            BadFile: it cannot be written.
        """
        await asyncio.to_thread(_write, self.path(job, image), png)
        return await self.do(lambda: self.adopt(job, image, png, receipt))

    def adopt(self, job: str, image: int, png: bytes, receipt: dict[str, Any]) -> Result:
        """The row of a picture whose file is there, within a transaction."""
        with Image.open(io.BytesIO(png), formats=("PNG",)) as opened:
            width, height = opened.size
        result = Result(
            image=image,
            file=f"{job}/{image}.png",
            seed=receipt["settings"]["seed"],
            width=width,
            height=height,
            sha256=hashlib.sha256(png).hexdigest(),
            receipt=receipt,
        )
        self.db.execute(
            "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                job,
                image,
                result.file,
                str(result.seed),
                width,
                height,
                result.sha256,
                len(png),
                json.dumps(receipt),
            ),
        )
        return result

    @written
    def keep_settings(self, owner: str, text: str) -> None:
        """What an owner wants to find again, in place of what was there."""
        self.db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (owner, text))

    async def vacuum(self) -> None:
        """Give room of what was deleted back to the disk, at most 100 MB of it at once."""
        self._check_open()
        # As a script, which is run to its end; execute() would stop after one page.
        await self._writer.call(lambda: self.db.executescript("PRAGMA incremental_vacuum(25000)"))

    # Reading.

    @property
    def reader(self) -> sqlite3.Connection:
        """The connection for reading, on the event loop.

        Raises:
            Refused: the store is not open.
        """
        self._check_open()
        assert self._reader is not None
        return self._reader

    def path(self, job: str, image: int) -> Path:
        """Where the PNG of a job of ours lies."""
        return self.results / job / f"{image}.png"

    def job(self, id: str) -> Job | None:
        """A job as it was written last."""
        row = self.reader.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        return None if row is None else self._job(row)

    def jobs(
        self, owner: str, limit: int, before: str | None = None, states: Collection[State] | None = None
    ) -> list[Job]:
        """An owner's jobs, the newest first, from the one before ``before``."""
        where, values = "owner = ?", [owner]
        if before is not None:
            where += " AND number < (SELECT number FROM jobs WHERE id = ?)"
            values.append(before)
        if states is not None:
            where += f" AND state IN ({', '.join('?' * len(states))})"
            values += states
        asked = f"SELECT * FROM jobs WHERE {where} ORDER BY number DESC LIMIT ?"
        return [self._job(row) for row in self.reader.execute(asked, (*values, limit)).fetchall()]

    def _job(self, row: sqlite3.Row) -> Job:
        asked = "SELECT * FROM results WHERE job = ? ORDER BY image"
        return job_from(row, self.reader.execute(asked, (row["id"],)))

    def known(self, owner: str, key: str) -> Known | None:
        """What an owner's idempotency key stands for."""
        row = self.reader.execute(
            "SELECT digest, job FROM keys WHERE owner = ? AND key = ?", (owner, key)
        ).fetchone()
        return None if row is None else Known(*row)

    def settings(self, owner: str) -> str:
        """What an owner kept, as JSON."""
        row = self.reader.execute("SELECT json FROM settings WHERE owner = ?", (owner,)).fetchone()
        return "{}" if row is None else row["json"]


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise BadFile(f"cannot write {path}: {error.strerror or error}", "file.write") from error
    with replacing(path) as file:
        file.write(data)
