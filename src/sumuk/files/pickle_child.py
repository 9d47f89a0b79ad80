"""The process that a pickle is read in: ``python -I -S pickle_child.py KIND OFFSET LENGTH < file``, JSON to its output.

It gives away what it could do harm with before it looks at the first byte: memory beyond its need, files that are
written or opened, other processes, time. The answer is ``{"refused": [code, sentence]}`` or that of
:mod:`~sumuk.files.pickle_answer`.
"""

from __future__ import annotations

import json
import mmap
import sys
from contextlib import suppress

if (
    __name__ == "__main__"
):  # a bare interpreter knows no packages; last, so that none hides the standard library's
    sys.path.append(__file__.replace("\\", "/").rsplit("/", 3)[0])

from sumuk.files.pickle_answer import answer, legacy_answer
from sumuk.files.pickle_nodes import Refused

ROOM = 64 * 2**20
"""Memory beyond what the interpreter takes and the pickle needs."""
GROWTH = 8
"""Bytes of nodes for a byte of pickle, a little more than checkpoints take."""
SECONDS = 20


def limit(length: int) -> None:
    """Give up memory, files, processes and time; where the system has no such limits, the budgets remain."""
    try:
        import resource
    except ImportError:  # Windows
        return
    taken = 128 * 2**20
    # pathlib would double the time that the process takes to start
    with suppress(OSError, ValueError), open("/proc/self/statm") as file:  # noqa: PTH123
        taken = int(file.read().split()[0]) * mmap.PAGESIZE
    wanted = {
        "RLIMIT_AS": taken + ROOM + GROWTH * length,
        "RLIMIT_CPU": SECONDS,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 0,
    }
    for name, most in wanted.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, (most, most))


def main(kind: str, offset: int, length: int) -> None:
    """Read one pickle from the standard input, which is the file, and print what it holds."""
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    data = mmap.mmap(0, offset - start + length, offset=start, access=mmap.ACCESS_READ)
    limit(length)
    try:
        read = legacy_answer if kind == "legacy" else answer
        found = json.dumps(read(data, offset - start, len(data)), separators=(",", ":"))
    except Refused as refused:
        found = json.dumps({"refused": [refused.code, refused.what]})
    except MemoryError:
        found = json.dumps({"refused": ["limits", "needs more memory to read than its size explains"]})
    sys.stdout.write(found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
