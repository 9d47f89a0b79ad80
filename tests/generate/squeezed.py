"""A process that draws with the miniature in ever less memory, by its own limit of addresses; prints what came of it.

    python -m tests.generate.squeezed

Here nothing is injected: torch's allocator for the CPU finds the memory full. Linux only.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sumuk.generate.api import miniature
from sumuk.generate.engine import Engine, Failed, Finished
from sumuk.generate.request import make_request
from sumuk.memory.pressure import free_caches, is_poisoned
from sumuk.memory.tiles import sides

WANTED = {"prompt": "a fox", "width": 192, "height": 192, "steps": 1, "guidance": 2.0, "seed": 1}
TILE = 8 * sides(24, 24)[0]
ROOM = (256, 128, 96, 64, 48, 32, 24, 16)
"""MiB above what the process has."""


def drawn(engine: Engine, **more: Any) -> tuple[list[Image.Image], Counter[str]]:
    """The pictures that came, and how each ended."""
    engine.submit(make_request(**WANTED | more))
    pictures, ended = [], Counter[str]()
    for event in engine.events():
        if isinstance(event, Finished):
            pictures.append(event.picture)
            ended["tiled" if "tiled" in event.receipt["machine"] else "whole"] += 1
        elif isinstance(event, Failed):
            ended[type(event.error).__name__] += 1
    return pictures, ended


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = Engine(miniature(), mode="fast")
    # oneDNN compiles its kernels for every size of a batch and of a picture, and must have memory for that.
    for size in (
        {"count": 4},
        {"guidance": 1.0},
        {"width": TILE, "height": TILE},
        {"count": 2},
        {"count": 1},
    ):
        (first, *_), _ = drawn(engine, **size)
    told, poisoned = [], False
    for room in ROOM:
        free_caches(torch.device("cpu"))
        now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        before = dict(engine.escalations)
        resource.setrlimit(resource.RLIMIT_AS, (now + room * 2**20, resource.RLIM_INFINITY))
        try:
            _, ended = drawn(engine, count=4)
        except RuntimeError as error:
            if not is_poisoned(error):
                raise
            poisoned = True
            break
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        climbed = {rung: times - before[rung] for rung, times in engine.escalations.items()}
        told.append({"room": room, "ended": ended, "climbed": climbed})
    same = None if poisoned else drawn(engine)[0][0].tobytes() == first.tobytes()
    return {"told": told, "poisoned": poisoned, "same": same}


if __name__ == "__main__":
    print(json.dumps(main()))
