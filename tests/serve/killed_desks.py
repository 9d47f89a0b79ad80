"""A program that kills desks: ``python -m tests.serve.killed_desks FOLDER KILLS SEED`` prints what became of the jobs.

Each desk is a process of its own on the same state folder. It takes in orders under idempotency keys, says which ones
it has acknowledged, cancels some, and is killed with SIGKILL at a random moment. The next one is asked anew for what
was not acknowledged, as a client would. The last one is left alone until every job is over.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import select
import signal
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path

from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_desk import ME, at_desk

from sumuk.serve import recovery
from sumuk.serve.order import Order

AT_ONCE = 6
"""Jobs that a desk has at a time."""
LONGEST = 0.25
"""Seconds that a desk lives at most, after it has started;"""
STILLBORN = 5
"""but one in so many is killed while it starts."""
CANCELLED = 7
"""One in so many jobs is cancelled."""


async def take_orders(folder: Path, number: int, pipe: int) -> None:
    """A desk that takes orders from ``number`` on until it is killed."""
    async with at_desk(folder, ToyBackend(slots=3, turn=0.001)) as desk:
        os.write(pipe, b"started - -\n")
        while True:
            if len(desk._dispatch.live) >= AT_ONCE:
                await asyncio.sleep(0.001)
                continue
            order = Order(values={"prompt": f"fox {number}", "count": 1 + number % 3, "steps": 3})
            job, _ = await desk.submit(order, ME, f"key {number}", str(number))
            os.write(pipe, f"taken {number} {job.id}\n".encode())
            if number % CANCELLED == 0:
                job = await desk.cancel(job.id, ME)
                os.write(pipe, f"{job.state} {number} {job.id}\n".encode())
            number += 1


async def finish(folder: Path) -> None:
    """A desk that is left alone until every job is over."""
    async with at_desk(folder, ToyBackend(slots=3)) as desk:
        async with asyncio.timeout(60):
            while desk._dispatch.live:
                await asyncio.sleep(0.01)


def killed(folder: Path, number: int, stillborn: bool, seconds: float) -> list[str]:
    """A desk in a process of its own, killed so many seconds after it started; what it said until then."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            asyncio.run(take_orders(folder, number, writer))
        finally:
            os._exit(1)
    os.close(writer)
    said = b"" if stillborn else os.read(reader, 65536)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            said += os.read(reader, 65536)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the desk ended by itself, with {status}"
    while more := os.read(reader, 65536):
        said += more
    os.close(reader)
    return said.decode().splitlines()


def pictures(folder: Path) -> dict[str, int]:
    """Finished pictures -> when each was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("results/*/[0-9]*.png")}


def main(folder: Path, kills: int, seed: int) -> dict[str, int]:
    recovery.MOST_KILLS = kills  # here kills are the machine's fault and never a job's
    chance = random.Random(seed)
    taken: dict[int, str] = {}
    said_of: dict[str, str] = {}
    finished: dict[str, int] = {}
    redrawn = 0
    for _ in range(kills):
        stillborn = chance.randrange(STILLBORN) == 0
        seconds = chance.uniform(0, LONGEST / 5 if stillborn else LONGEST)
        for line in killed(folder, max(taken, default=-1) + 1, stillborn, seconds):
            what, number, job = line.split()
            if what == "taken":
                taken[int(number)] = job
            elif what != "started":
                said_of[job] = what
        now = pictures(folder)
        redrawn += sum(now.get(path) != when for path, when in finished.items())
        finished = now
    asyncio.run(finish(folder))
    now = pictures(folder)
    redrawn += sum(now.get(path) != when for path, when in finished.items())
    return {"kills": kills, "redrawn": redrawn, **account(folder, taken, said_of)}


def account(folder: Path, taken: dict[int, str], said_of: dict[str, str]) -> dict[str, int]:
    """What the database and the files say of the jobs that were acknowledged."""
    db = sqlite3.connect(folder / "jobs.sqlite")
    states = dict(db.execute("SELECT id, state FROM jobs"))
    counts = dict(db.execute("SELECT id, count FROM jobs"))
    attempts = Counter(dict(db.execute("SELECT id, attempt FROM jobs")))
    keys = dict(db.execute("SELECT key, job FROM keys"))
    results = db.execute("SELECT job, image, file, sha256 FROM results").fetchall()
    whole = Counter(
        job
        for job, image, file, sha256 in results
        if hashlib.sha256((folder / "results" / file).read_bytes()).hexdigest() == sha256
    )
    # A job may be cancelled and its desk killed before it said so.
    expected = {job: said_of.get(job, "done") for job in taken.values()}
    unsaid = {job for number, job in taken.items() if number % CANCELLED == 0 and job not in said_of}
    return {
        "acknowledged": len(taken),
        "cancelled": sum(state == "cancelled" for state in said_of.values()),
        "interrupted": sum(attempt > 1 for attempt in attempts.values()),
        "lost": sum(states.get(job) != state for job, state in expected.items() if job not in unsaid)
        + sum(states.get(job) not in ("done", "cancelled") for job in unsaid)
        + sum(whole[job] != counts[job] for job, state in states.items() if state == "done"),
        "duplicates": len(states)
        - len(keys)
        + sum(keys[f"key {number}"] != job for number, job in taken.items()),
        "strays": len(list(folder.glob("results/*/.*.partial")))
        + len(pictures(folder).keys() - {str(folder / "results" / file) for _, _, file, _ in results}),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
