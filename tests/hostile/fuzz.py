"""Runs mutated files through a reader, part by part, each part in a process of its own with bounded memory.

    python -m tests.hostile.fuzz safetensors --count 100000            # or gguf, pickle, adapters
    python -m tests.hostile.fuzz pickle --count 100000 --begin 40000   # goes on at the fifth part

A part is a seed, so that what was found can be found again. A part that fails, or whose process dies, leaves the file
that did it and is told with its seed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = ("safetensors", "gguf", "pickle", "adapters")
PART = 10_000
"""Files of a seed."""
ROOM = 2 * 2**30
"""Bytes of addresses that a part may take beyond those at its start."""
ROOT = Path(__file__).parents[2]


@dataclass
class Figures:
    """What came of a run.

    Attributes:
        files: how many were tried.
        read: how many of them were read whole.
        codes: of the errors that refused the others, each with how often.
        worst: seconds that the slowest took.
        kib: memory that the run took beyond its start.
        seconds: of the whole run.
    """

    files: int = 0
    read: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    kib: int = 0
    seconds: float = 0.0

    def add(self, other: Figures) -> None:
        """Those of one more part."""
        self.files += other.files
        self.read += other.read
        self.codes += other.codes
        self.worst = max(self.worst, other.worst)
        self.kib = max(self.kib, other.kib)
        self.seconds += other.seconds

    def __str__(self) -> str:
        kinds = len(self.codes)
        return (
            f"{self.files:,} files in {self.seconds:.0f} s: {self.read:,} read, {self.codes.total():,} refused with "
            f"{kinds} codes, the slowest took {self.worst * 1000:.0f} ms, memory grew by {self.kib / 1024:.0f} MiB"
        )


class Failed(Exception):
    """A file that something else came of than being read or refused."""


def run_part(kind: str, seed: int, count: int, folder: Path) -> Figures:
    """One part, in a process of its own.

    Raises:
        Failed: names seed and file.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    program = [sys.executable, "-m", "tests.hostile.fuzz", kind, "--seed", str(seed), "--count", str(count)]
    done = subprocess.run(
        [*program, "--in", str(folder)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if done.returncode == 0:
        said = json.loads(done.stdout.splitlines()[-1])
        return Figures(**{**said, "codes": Counter(said["codes"])})
    kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-{seed}-"))
    for path in folder.iterdir():
        shutil.copy(path, kept)
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
    raise Failed(f"{kind}, seed {seed}: ended with {done.returncode}; the file is in {kept}\n{tail}")


def run(kind: str, count: int, begin: int = 0, part: int = PART, tell: bool = False) -> Figures:
    """Parts one after the other; their seeds are their numbers.

    Raises:
        Failed: the first part that fails.
    """
    whole = Figures()
    for at in range(begin, count, part):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            found = run_part(kind, at // part, min(part, count - at), Path(folder))
        whole.add(found)
        if tell:
            print(f"seed {at // part}: {found}", flush=True)
    return whole


def _inside(kind: str, seed: int, count: int, folder: Path) -> Figures:
    """The files of a seed, in this process."""
    import torch

    from sumuk.base.errors import BadFile

    torch.set_num_threads(1)
    fuzzed: Any = importlib.import_module(f"tests.hostile.fuzz_{kind}")
    codes: list[str] = []
    really = BadFile.__init__

    def noted(self: BadFile, message: str, code: str = "file") -> None:
        codes.append(code)
        really(self, message, code)

    BadFile.__init__ = noted  # type: ignore[method-assign]  # the only way to hear of it past a check that is content
    for content in fuzzed.mutations(seed, 20):  # imports and caches
        fuzzed.check(content, folder)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures, began = Figures(), time.perf_counter()
    for content in fuzzed.mutations(seed, count):
        codes.clear()
        start = time.perf_counter()
        fuzzed.check(content, folder)
        figures.worst = max(figures.worst, time.perf_counter() - start)
        figures.files += 1
        if codes:
            figures.codes[codes[0]] += 1
        else:
            figures.read += 1
    figures.seconds = time.perf_counter() - began
    figures.kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--count", type=int, default=100_000, help="files in all")
    parser.add_argument("--begin", type=int, default=0, help="file to go on at, a multiple of the part")
    parser.add_argument("--part", type=int, default=PART, help="files of a process and a seed")
    parser.add_argument("--seed", type=int, help="one part in this process")
    parser.add_argument("--in", type=Path, dest="folder", help="folder for the file that is tried")
    given = parser.parse_args()
    if given.seed is None:
        print(run(given.format, given.count, given.begin, given.part, tell=True))
        return
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        figures = _inside(given.format, given.seed, given.count, folder)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    print(json.dumps(vars(figures)))


if __name__ == "__main__":
    main()
