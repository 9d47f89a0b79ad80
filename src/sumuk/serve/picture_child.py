"""The process that strange pictures are decoded in: ``python -I picture_child.py``, a socket as its input.

It starts once, loads what decoding needs, and then only waits. For each picture it is handed a connection and forks;
the fork gives away what it could do harm with before it reads a byte: memory beyond the picture's need, files, other
processes, time. It decodes one picture, answers, and is gone, so that nothing of one picture is left for the next, and
starting an interpreter and its packages (a third of a second) is paid once.

On a connection come ``!QQ`` (length, pixels) and the file. Back go ``+`` and a plain PNG, or ``-`` and a sentence, and
the end. The process ends when the server's end of its input is closed.
"""

from __future__ import annotations

import io
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":  # last, so that none hides the standard library's
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from PIL import Image, PngImagePlugin

from sumuk.base.errors import SumukError
from sumuk.generate.request import FORMATS, read_image

HEAD = struct.Struct("!QQ")
ROOM = 48 * 2**20
"""Bytes beyond what the process has already, what the file takes and what its pixels need."""
A_PIXEL = 32
"""Bytes for each pixel: 16-bit greys pass through four copies as whole numbers; others need 12 to 16."""
SECONDS, SECONDS_A_MEGAPIXEL = 3, 0.75
"""Of computing; an ordinary picture takes an eighth of a second for a million pixels."""
WALL = 4
"""Seconds by the clock for each of computing: the machine may be busy drawing."""
ORIENTATION = 0x0112
MOST_TEXT = 4 * 2**20
"""Bytes of a PNG's unpacked texts, which nobody will read."""


def plain(data: bytes) -> bytes:
    """The picture as a plain PNG: RGB, RGBA or L, 8 bits, upright, without anything beside the pixels.

    Raises:
        SumukError: it cannot be read.
    """
    picture, file = read_image(data), io.BytesIO()
    picture.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)  # quick; it is read once, here
    return file.getvalue()


def rehearse() -> None:
    """Load every module that decoding needs, as none can be opened later."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for format in FORMATS:
        for mode in ("RGB", "I;16") if format == "PNG" else ("RGB",):
            file = io.BytesIO()
            Image.new(mode, (2, 3)).save(file, format, exif=exif)
            plain(file.getvalue())


def patience(pixels: int) -> int:
    """Seconds of computing that a picture may take."""
    return SECONDS + round(SECONDS_A_MEGAPIXEL * pixels / 1e6)


def limit(length: int, pixels: int) -> None:
    """Give up memory, files, processes and time."""
    taken = 256 * 2**20
    with suppress(OSError, ValueError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    seconds = patience(pixels)
    wanted = {
        resource.RLIMIT_AS: taken + ROOM + 4 * length + A_PIXEL * pixels,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
    }
    for kind, most in wanted.items():
        with suppress(OSError, ValueError):  # macOS knows some of them by name only
            resource.setrlimit(kind, (most, most))
    signal.alarm(WALL * seconds)  # nobody catches it: the end


def answer(data: bytes) -> bytes:
    """What goes back for a file."""
    try:
        return b"+" + plain(data)
    except SumukError as error:
        starved = isinstance(error.__context__, MemoryError)
        told = "needs more memory to decode than its size explains" if starved else str(error)
    except MemoryError:
        told = "needs more memory to decode than its size explains"
    return b"-" + told.encode(errors="backslashreplace")


def serve_one(connection: socket.socket) -> None:
    """One picture, in a process that ends with it."""
    with connection, connection.makefile("rb") as come:
        length, pixels = HEAD.unpack(come.read(HEAD.size))
        limit(length, pixels)
        connection.sendall(answer(come.read(length)))


def main() -> None:
    """Wait for connections on the standard input until it ends."""
    PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT  # here, as it holds for the whole process
    rehearse()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is forgotten at once
    with socket.socket(fileno=0) as control:
        control.sendall(b".")
        while True:
            said, handed, _, _ = socket.recv_fds(control, 1, 1)
            if not said:
                return
            if os.fork():
                os.close(handed[0])
                continue
            try:
                control.close()
                serve_one(socket.socket(fileno=handed[0]))
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
