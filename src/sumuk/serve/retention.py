"""What is deleted, and when: ended jobs' pictures by age and by size, the oldest first; later the jobs themselves."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from typing import NamedTuple

from sumuk.serve.store import Store

log = logging.getLogger("sumuk.serve")

DAY = 86_400.0
BETWEEN = 60.0
"""Seconds between two sweeps."""
AT_ONCE = 50
"""Jobs in one transaction, so that what is to be written meanwhile does not wait long."""


class Swept(NamedTuple):
    """What one sweep deleted.

    Attributes:
        emptied: jobs whose pictures are gone.
        forgotten: jobs that are gone altogether.
        freed: bytes.
    """

    emptied: int
    forgotten: int
    freed: int


async def keep_sweeping(store: Store, keep_days: float, keep_bytes: int) -> None:
    """Once a minute, for ever."""
    while True:
        try:
            await sweep(store, time.time(), keep_days, keep_bytes)
        except Exception:
            log.exception("what is no longer kept cannot be deleted")
        await asyncio.sleep(BETWEEN)


async def sweep(store: Store, now: float, keep_days: float, keep_bytes: int) -> Swept:
    """Delete what need not be kept; jobs that are not over are never touched."""
    emptied = forgotten = freed = 0
    while True:
        some, bytes = await store.do(lambda: _empty(store, now - keep_days * DAY, keep_bytes))
        emptied, freed = emptied + some, freed + bytes
        if some < AT_ONCE:
            break
    while True:
        some = await store.do(lambda: _forget(store, now - 2 * keep_days * DAY))
        forgotten += some
        if some < AT_ONCE:
            break
    await store.vacuum()
    if emptied or forgotten:
        log.info(
            "deleted the pictures of %d jobs (%d bytes), and %d jobs that ended %g days ago",
            emptied,
            freed,
            forgotten,
            2 * keep_days,
        )
    return Swept(emptied, forgotten, freed)


def _empty(store: Store, before: float, keep_bytes: int) -> tuple[int, int]:
    """Delete files and inputs of some jobs: how many, and bytes."""
    db = store.db
    (kept,) = db.execute(
        "SELECT (SELECT coalesce(sum(size), 0) FROM results JOIN jobs ON id = job WHERE NOT gone)"
        " + (SELECT coalesce(sum(size), 0) FROM pictures)"
    ).fetchone()
    oldest = db.execute(
        "SELECT id, ended, (SELECT coalesce(sum(size), 0) FROM results WHERE job = id) AS size"
        " FROM jobs WHERE ended IS NOT NULL AND NOT gone ORDER BY ended LIMIT ?",
        (AT_ONCE,),
    ).fetchall()
    emptied = freed = 0
    for job in oldest:
        if job["ended"] >= before and kept - freed <= keep_bytes:
            break
        folder = store.results / job["id"]
        if folder.exists():
            shutil.rmtree(folder)  # files first: if the server is killed here, this job is the oldest again
        db.execute("UPDATE jobs SET gone = 1 WHERE id = ?", (job["id"],))
        freed += job["size"] + _forget_inputs(store, job["id"])
        emptied += 1
    return emptied, freed


def _forget_inputs(store: Store, job: str) -> int:
    """Delete the pictures that only this job was asked with: how many bytes."""
    used = store.db.execute("SELECT picture FROM uses WHERE job = ?", (job,)).fetchall()
    store.db.execute("DELETE FROM uses WHERE job = ?", (job,))
    freed = 0
    for (picture,) in used:
        gone = store.db.execute(
            "DELETE FROM pictures WHERE sha256 = ?1 AND NOT EXISTS (SELECT 1 FROM uses WHERE picture = ?1)"
            " RETURNING size",
            (picture,),
        ).fetchall()
        freed += sum(size for (size,) in gone)
    return freed


def _forget(store: Store, before: float) -> int:
    """Delete the rows of some jobs whose pictures are long gone: how many."""
    return store.db.execute(
        "DELETE FROM jobs WHERE number IN (SELECT number FROM jobs WHERE gone AND ended < ? LIMIT ?)",
        (before, AT_ONCE),
    ).rowcount
