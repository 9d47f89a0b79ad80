"""Pictures that were sent become plain ones: decoded by a limited process, never by the server itself.

A decoder is a large program that reads what a stranger wrote. So the server looks at the header alone
(:mod:`~sumuk.serve.picture_header`), and the rest is done by a process that can open no file, has little memory and
little time, and lives for one picture (:mod:`~sumuk.serve.picture_child`). What comes back is a PNG without metadata.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

from sumuk.serve import picture_header
from sumuk.serve.trouble import refused

AT_ONCE = 2
"""Pictures that are decoded at the same time; the others wait."""
START_SECONDS = 30
SECONDS = 90
"""Until an answer is given up; the process has its own limits, and they are less."""
END = b"IEND\xaeB`\x82"
"""Of every whole PNG."""
DYING = 0.1
"""Seconds from the end of a process's connections to its own."""
CHILD = Path(__file__).with_name("picture_child.py")


async def clean(data: bytes, what: str, most_pixels: int) -> bytes:
    """A strange picture as a plain PNG: RGB, RGBA or L with 8 bits, upright, nothing beside the pixels.

    Args:
        data: a whole PNG, JPEG or WebP file.
        what: what to call it where it is refused, such as the name of its field.
        most_pixels: that it may have.

    Raises:
        Refused: ``bad-picture``, and why.
    """
    header = picture_header.read_header(data, what, most_pixels)
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_HANDS, _DARKROOM.develop, data, header.width * header.height)
    if found.startswith(b"+") and found.endswith(END):
        return found[1:]
    if not found.startswith(b"-"):
        raise refused("bad-picture", f"{what} took more time or memory to decode than is given")
    own_name = f"the picture of {len(data):,} bytes"  # as the request calls what has no name
    raise refused("bad-picture", what + found[1:].decode(errors="replace").removeprefix(own_name))


async def warm() -> None:
    """Start the process now, so that the first picture need not wait for it."""
    await asyncio.get_running_loop().run_in_executor(_HANDS, _DARKROOM.open)


class _Darkroom:
    """The process that waits for pictures, started when it is first needed, and again if it is gone."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None

    def open(self) -> socket.socket:
        """The way to the process.

        Raises:
            Refused: ``unready``: it cannot be started.
        """
        with self.lock:
            if self.control is not None and self._alive():
                return self.control
            self._close()
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    self.process = subprocess.Popen(
                        [sys.executable, "-I", "-B", str(CHILD)],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env=_environment(),
                        start_new_session=True,  # Ctrl-C is for the server, which closes the socket
                    )
                ours.settimeout(START_SECONDS)
                if ours.recv(1) != b".":
                    raise OSError("it ended at its start")
            except OSError as error:
                ours.close()
                raise refused(
                    "unready", f"no process can be started to decode pictures in: {error}", retry_after=5
                ) from None
            self.control = ours
            return ours

    def develop(self, data: bytes, pixels: int) -> bytes:
        """What the process answers to a file; empty if a limit stopped it."""
        for _ in range(2):
            answer = b""
            with suppress(OSError):  # it is gone, or its answer takes too long
                answer = self._ask(data, pixels)
            if answer or self._alive(DYING):
                return answer
        return b""

    def _ask(self, data: bytes, pixels: int) -> bytes:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self.open(), [b"."], [theirs.fileno()])
            ours.settimeout(SECONDS)
            answer = bytearray()
            with suppress(BrokenPipeError, ConnectionResetError):  # it was stopped
                ours.sendall(len(data).to_bytes(8) + pixels.to_bytes(8))
                ours.sendall(data)
                while piece := ours.recv(2**20):
                    answer += piece
            return bytes(answer)

    def _alive(self, patience: float = 0.0) -> bool:
        """Whether the process is there, and stays there for a moment."""
        process = self.process
        if process is None:
            return False
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            return True
        return False

    def close(self) -> None:
        """End the process."""
        with self.lock:
            self._close()

    def _close(self) -> None:
        if self.control is not None:
            self.control.close()
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.process.kill()
            self.process.wait()
        self.process = self.control = None


def _environment() -> dict[str, str]:
    """What the process may know of ours: where libraries are, and no secret."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "OPENBLAS_NUM_THREADS": "1"}


_DARKROOM = _Darkroom()
_HANDS = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="picture")
atexit.register(_DARKROOM.close)
