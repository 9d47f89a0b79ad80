"""The process that hostile files are opened in, one after the other; it tells what came of each and what it cost.

A line of JSON comes in for each file and one goes out. What Python does meanwhile that could do harm (another process,
a socket, a file that is written, made, moved or removed, a library that is loaded by name) is heard by an audit hook
and told; the one process that is allowed is our own reader of pickles. Memory is the highest resident size since the
file was begun, against that before; time is that of the processor, children included.
"""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

HARM = (
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn",
    "subprocess.Popen", "socket.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
    "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.kill", "shutil.", "tempfile.", "sqlite3.",
    "ctypes.dlopen", "ctypes.dlsym", "urllib.Request", "webbrowser.open", "ftplib.", "smtplib.", "pickle.find_class",
)  # fmt: skip
"""Events of the audit hook, or how they begin."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LIMIT = 3 * 2**30
"""Bytes of addresses beyond those at the start: a bomb that goes off shall not take the machine with it."""


class Ear:
    """Hears what Python does while it is armed."""

    def __init__(self) -> None:
        self.armed = False
        self.deeds: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        self.armed = False  # what is done to tell of it is not told
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & WRITING
            if writes and not isinstance(path, int) and path != os.devnull:
                self.deeds.append(f"open {path!r} {mode!r} {flags}")
        elif event.startswith(HARM) and not self._ours(event, arguments):
            self.deeds.append(f"{event} {arguments!r:.200}")
        self.armed = True

    @staticmethod
    def _ours(event: str, arguments: tuple[Any, ...]) -> bool:
        from sumuk.files import pickle_child

        if event == "os.kill":  # of a child that has answered
            return _parent(arguments[0]) == os.getpid()
        if event != "subprocess.Popen":
            return False
        program, words = arguments[0], arguments[1]
        own = [sys.executable, "-I", "-S", "-B", str(Path(pickle_child.__file__).resolve())]
        return program == sys.executable and list(words[:5]) == own

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.armed = True
        try:
            yield
        finally:
            self.armed = False

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """While the attacker acts."""
        before, self.armed = self.armed, False
        yield
        self.armed = before


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


EAR = Ear()


# -- readers: a path to what was said of it ----------------------------------------------------------------------------


def command(path: str, *more: str) -> tuple[int, str, str]:
    """``sumuk inspect`` as the shell calls it: exit code, output, errors."""
    from sumuk.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(["inspect", path, *more])
        except SystemExit as end:
            code = end.code or 0
    return int(code), out.getvalue(), err.getvalue()


SHELL: dict[str, Any] = {}
"""What the shell was told of the last file that was looked at."""


def look(path: str) -> list[str]:
    """``sumuk inspect`` and what the library said to it, which for pickles costs a process each time."""
    from sumuk.weights import inspect

    really, heard = inspect.open, []

    def listening(place: Any) -> Any:
        try:
            heard.append(really(place))
        except Exception as error:
            heard.append(error)
            raise
        return heard[0]

    inspect.open = listening  # type: ignore[assignment]
    try:
        SHELL.update(zip(("exit", "out", "err"), command(path), strict=True))
    finally:
        inspect.open = really
    if not heard:  # the command line's own parser refused the path
        return [str(really(path))]
    (found,) = heard
    if isinstance(found, Exception):
        raise found
    return [*found.warnings, *found.notes]


def glance(path: str) -> list[str]:
    """The library alone, without what the shell prints."""
    from sumuk.weights import inspect

    return list(inspect.open(path).warnings)


def check(path: str) -> list[str]:
    from sumuk.weights.checking import check as read_all

    return list(read_all(path).warnings)


def load(path: str) -> list[str]:
    from sumuk.weights.checkpoint import load as whole

    whole(path)
    return []


@cache
def model() -> Any:
    from examples import zoo

    return zoo.tiny("sd1/text-to-image")


def lora(path: str) -> list[str]:
    from sumuk.weights.live import wear

    wear(path, model())
    return []


def embedding(path: str) -> list[str]:
    from sumuk.weights.embedding import read_embedding

    read_embedding(path, model().family, {"text": 768})
    return []


def shelf(path: str) -> list[str]:
    from sumuk.weights.shelf import Shelf

    place = Shelf(Path(path).parent, Path(os.devnull))
    return [place.find(Path(path).stem).title]


def race(path: str, attack: str, when: str) -> list[str]:
    """Two tensors, and what somebody does to the file before the second is read."""
    from sumuk.weights.checking import check as read_all
    from sumuk.weights.source import read

    if when == "check":
        read_all(path, lambda done, _: done == 1 and attacked(path, attack))
        return []
    tensors = read(path).tensors
    if when == "late":
        tensors["a"].load().sum()
    attacked(path, attack)
    tensors["b"].load().sum()
    return []


def attacked(path: str, attack: str) -> None:
    with EAR.deaf():
        size = Path(path).stat().st_size
        if attack == "removed":
            Path(path).unlink()
        elif attack == "replaced":
            other = Path(path).with_name("other")
            other.write_bytes(bytes(size))
            other.replace(path)
        elif attack == "grown":
            with Path(path).open("ab") as file:
                file.write(b"x")
        elif attack == "rewritten":
            with Path(path).open("r+b") as file:
                file.seek(size - 8)
                file.write(b"x" * 8)
        else:
            os.truncate(path, 0 if attack == "emptied" else size // 3)


def harm(_: str, what: str) -> list[str]:
    """What no reader may do, to see that it is told."""
    if what == "process":
        subprocess.run([sys.executable, "-c", ""], check=True)
    elif what == "socket":
        socket.socket().close()
    elif what == "file":
        Path("planted").write_text("x")
        Path("planted").unlink()
    elif what == "memory":
        bytearray(100 * 2**20)
    elif what == "time":
        began = time.process_time()
        while time.process_time() < began + 1.1:
            pass
    else:
        os.kill(os.getpid(), signal.SIGBUS)
    return []


READERS: dict[str, Callable[..., Any]] = {
    "open": look,
    "glance": glance,
    "check": check,
    "load": load,
    "lora": lora,
    "embedding": embedding,
    "shelf": shelf,
    "race": race,
    "harm": harm,
}
LIGHT = ("open", "glance", "shelf", "harm")
"""Those that need no torch."""


# -- what it costs -----------------------------------------------------------------------------------------------------


def high_water(reset: bool = False) -> int:
    """The most KiB that this process has had in memory since it was last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        return 0


def children() -> tuple[float, int]:
    """Seconds of the processor that children took, and the most KiB that any of them had."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, used.ru_maxrss


def opened(reader: str, path: str) -> dict[str, Any]:
    """Open one file; what came of it."""
    from sumuk.base.errors import SumukError

    name, *more = reader.split()
    EAR.deeds.clear()
    SHELL.clear()
    gc.collect()
    before, (child_before, _) = high_water(reset=True), children()
    began, cpu = time.perf_counter(), time.process_time()
    said: dict[str, Any] = {"error": "", "code": "", "message": "", "said": []}
    with EAR.listening():
        try:
            said["said"] = READERS[name](path, *more)
        except SumukError as error:
            code = getattr(error, "code", "missing" if isinstance(error, FileNotFoundError) else "input")
            said |= {"error": type(error).__name__, "code": code, "message": str(error)}
        except Exception:
            said |= {"error": "crash", "message": traceback.format_exc()}
    seconds, child = children()
    return said | {
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - cpu + seconds - child_before,
        "kib": high_water() - before,
        "child_kib": child,
        "deeds": list(EAR.deeds),
        "torch": "torch" in sys.modules,
        "shell": dict(SHELL),
    }


def limit() -> None:
    """Bound the addresses that this process may take."""
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT, taken + LIMIT))


def warm(kind: str, good: list[str]) -> None:
    """Do once what only the first file pays for: imports, caches."""
    for path in good:
        look(path)
    import typer.main

    typer.main.get_command = cache(typer.main.get_command)  # made anew for each call otherwise, in 15 ms
    if kind == "heavy":
        import torch
        from tests.hostile.meaning_cases import model_folder

        torch.set_num_threads(1)
        model()
        for path in good:
            check(path)
        load(str(model_folder()))


def main(kind: str, good: list[str]) -> None:
    """Answer until there is nothing more to read.

    Args:
        kind: ``light`` or ``heavy``, which knows torch.
        good: files that it opens at first.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm(kind, good)
    gc.collect()
    gc.freeze()  # a hundred thousand objects that are here to stay
    limit()
    print(json.dumps({"pid": os.getpid(), "high": high_water()}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(opened(asked["reader"], asked["path"])), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
