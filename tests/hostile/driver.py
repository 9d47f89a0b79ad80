"""Workers as whoever asks them sees them: started once, asked file by file, told of when they die."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.hostile import gguf_cases, pickle_files, safetensors_cases

ROOT = Path(__file__).parents[2]
SECONDS = 60
"""Wall clock for one file, on however busy a machine."""


class Died(Exception):
    """The worker is no more: a signal killed it, or it hung and was killed."""


def good_files(folder: Path) -> list[Path]:
    """One good file of each kind, which every reader must still open when it has met a hostile one."""
    made = {
        "good.safetensors": safetensors_cases.one(),
        "good.ckpt": pickle_files.GOOD,
        "good.gguf": gguf_cases.GOOD,
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in made]


class Worker:
    """One worker process, in an empty folder of its own.

    Args:
        kind: ``light``, without torch, or ``heavy``.
        good: files that it opens at first.
    """

    def __init__(self, kind: str, good: Sequence[Path]) -> None:
        self.kind, self.good = kind, good
        self.place = tempfile.TemporaryDirectory(prefix="hostile-worker-")
        self.process: subprocess.Popen[str] | None = None
        self.born: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.stop()
        self.place.cleanup()

    def start(self) -> None:
        """A fresh process, warm."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.worker", self.kind, *map(str, self.good)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.place.name,
            env=environment,
        )
        self.born = self._answer(120)

    def stop(self) -> None:
        """End it, if it lives."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, reader: str, path: str | os.PathLike[str] = "") -> Any:
        """Open a file.

        Raises:
            Died: it took the worker with it; the next one gets a fresh worker.
        """
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"reader": reader, "path": os.fspath(path)}) + "\n")
        self.process.stdin.flush()
        return self._answer(SECONDS)

    def _answer(self, seconds: float) -> Any:
        assert self.process is not None and self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        why = f"took more than {seconds:g} s"
        if ready:
            code = self.process.wait()
            why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        self.stop()
        raise Died(f"the {self.kind} worker {why}")

    def left(self) -> list[str]:
        """What files did in the folder that it works in."""
        return sorted(each.name for each in Path(self.place.name).iterdir())
