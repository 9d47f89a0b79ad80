"""A program: ``python -m tests.serve.long_life FOLDER JOBS LEAK`` prints by how many bytes a desk grows over its jobs.

``LEAK`` is how many bytes a job are kept on purpose, to see that it would be noticed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path

from tests.serve.toy_backend import ToyBackend, png_of
from tests.serve.toy_desk import ME, at_desk

from sumuk.serve.desk import Desk
from sumuk.serve.metrics import resident
from sumuk.serve.order import Job, Order

WARM = 304
"""Jobs before the first look, so that caches and pools are filled."""
AT_ONCE = 8


async def one(desk: Desk, number: int, picture: bytes) -> bool:
    """A job as a client has it: with a picture, a key, and somebody who watches."""
    values = {
        "prompt": f"fox {number}",
        "seed": number,
        "init": picture,
        "strength": 0.5,
        "count": 1 + number % 2,
    }
    job, _ = await desk.submit(Order(values=values), ME, f"key {number}", "d")
    seen = [each async for each in desk.watch(job.id, ME)]
    assert desk.result_file(job.id, 0, ME).read_bytes()
    return isinstance(seen[-1], Job) and seen[-1].state == "done"


async def main(folder: Path, jobs: int, leak: int) -> dict[str, int]:
    kept = []
    async with at_desk(folder, ToyBackend(slots=4)) as desk:
        done, before = 0, 0
        for number in range(0, WARM + jobs, AT_ONCE):
            if number >= WARM and not before:
                gc.collect()
                done, before = 0, resident()
            batch = range(number, min(number + AT_ONCE, WARM + jobs))
            pictures = [
                png_of(Order(values={"seed": each, "width": 256, "height": 256}), 0) for each in batch
            ]
            done += sum(await asyncio.gather(*map(one, [desk] * len(batch), batch, pictures)))
            kept.append(bytearray(b"x" * leak * len(batch)))
        gc.collect()
        return {
            "done": done,
            "before": before,
            "growth": resident() - before,
            "live": len(desk._dispatch.live),
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))))
