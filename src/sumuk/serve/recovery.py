"""After a start: what the last server left. Finished pictures are kept, jobs wait again, and nothing is drawn twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from sqlite3 import Row
from typing import Any, NamedTuple

from sumuk.base.errors import SumukError
from sumuk.generate.request import open_image
from sumuk.serve.order import Job
from sumuk.serve.packing import job_from
from sumuk.serve.store import Store
from sumuk.serve.trouble import Trouble

log = logging.getLogger("sumuk.serve")

MOST_KILLS = 5
"""Servers that may be killed while they run a job; if one more is, the job is taken for the reason."""
LEFT = Trouble("cancelled", "its client went away when the server stopped")
FATAL = Trouble(
    "worker-lost",
    f"the server was killed more than {MOST_KILLS} times while it drew this; it is not tried again",
)


class Waiting(NamedTuple):
    """A job that is to be begun, and how many workers were lost over it."""

    job: Job
    deaths: int


async def recover(store: Store, now: float) -> list[Waiting]:
    """Put every job that is not over in order, and give back those that wait, the first first."""
    return await store.do(lambda: _recovered(store, now))


def _recovered(store: Store, now: float) -> list[Waiting]:
    asked = (
        "SELECT *, EXISTS (SELECT 1 FROM keys WHERE job = jobs.id) AS keyed FROM jobs"
        " WHERE state IN ('queued', 'running') ORDER BY number"
    )
    waiting = []
    for row in store.db.execute(asked).fetchall():
        _adopt(store, row)
        job = _one(store, row, now)
        if job is not None:
            waiting.append(Waiting(job, row["deaths"]))
    return waiting


def _one(store: Store, row: Row, now: float) -> Job | None:
    """The job of a row if it waits; otherwise it is ended."""
    id, running = row["id"], row["state"] == "running"
    results = store.db.execute("SELECT * FROM results WHERE job = ? ORDER BY image", (id,)).fetchall()
    if len(results) == row["count"]:
        store.ended(id, "done", now, None)
    elif row["attached"] and not row["keyed"]:
        store.ended(id, "cancelled", now, LEFT)
    elif running and row["kills"] >= MOST_KILLS:
        store.ended(id, "failed", now, FATAL)
        log.error("given up: %s", FATAL.detail, extra={"job": id})
    else:
        store.db.execute(
            "UPDATE jobs SET state = 'queued', began = NULL, kills = kills + ? WHERE id = ?", (running, id)
        )
        if running:
            log.info("was running when the server was killed; it waits again", extra={"job": id})
        row = store.db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        return job_from(row, results)
    return None


def _adopt(store: Store, row: Row) -> None:
    """Pictures that were finished when the server was killed, just before they were written down."""
    folder = store.results / row["id"]
    if not folder.is_dir():
        return
    for half in folder.glob(".*.partial"):
        half.unlink()
    have = {image for (image,) in store.db.execute("SELECT image FROM results WHERE job = ?", (row["id"],))}
    for image in range(row["count"]):
        path = store.path(row["id"], image)
        if image not in have and path.is_file():
            try:
                store.adopt(row["id"], image, path.read_bytes(), _receipt(path))
            except (SumukError, ValueError, KeyError, TypeError) as error:
                log.warning(
                    "%s is no finished picture (%s); it is drawn again", path, error, extra={"job": row["id"]}
                )


def _receipt(path: Path) -> dict[str, Any]:
    """What a PNG of ours says of itself, decoded whole to see that it is."""
    _, picture = open_image(path, ("PNG",))
    return json.loads(picture.info["sumuk"])
