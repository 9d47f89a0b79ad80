"""Reading and hashing files of many gigabytes past the system's cache, in memory that is used again.

What is read once has no place in the cache: to find pages for it, and on virtual machines to be given them at all, may
take longer than the disk does. So tensors are read by direct access into blocks that are lent and come back. A file
most of which is in the cache already is taken from there.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sumuk.base.errors import BadFile
from sumuk.files.safetensors import stamp

PAGE = mmap.PAGESIZE
IDLE = 128 << 20
"""Bytes of blocks that are kept for the next who asks."""
WASTE = 4
"""How much larger than what is asked for a block may be."""
PIECE = 8 << 20
"""Bytes that are read at once only to be hashed."""
HELD = 64 << 20
"""Bytes that wait to be hashed, as something before them has not been read yet; beyond it is read for that alone."""
PLACES = 16
"""Of a file that are looked at to know whether it is in the cache."""


class Memory:
    """Blocks of memory for arrays, which come back by themselves when nobody refers to those any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []

    def take(self, size: int) -> np.ndarray:
        """An array of bytes that begins at a page, with whatever is in it."""
        room = max(PAGE, -(-size // PAGE) * PAGE)
        with self._lock:
            while sum(map(len, self._idle)) > IDLE:
                del self._idle[0]  # the one that nobody has wanted for longest
            fit = [block for block in self._idle if room <= len(block) <= WASTE * room]
            block = min(fit, key=len, default=None)
            if block is not None:
                self._idle.remove(block)
        if block is None:
            block = _block(room)
        whole = np.frombuffer(block, np.uint8)
        # Without the lock: what is collected as garbage comes back in the middle of anything, also of the lines above.
        weakref.finalize(whole, self._idle.append, block).atexit = False
        return whole[:size]


def _block(room: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, room)
    return mmap.mmap(-1, room, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Source:
    """A file, opened when first needed; several threads may read from it at once.

    Args:
        path: the file.
        identity: its stamp when its header was read; None: as it is now.
        memory: where it is read into.
    """

    def __init__(
        self, path: Path, identity: tuple[int, int, int, int] | None = None, memory: Memory | None = None
    ) -> None:
        self.path, self.memory = path, memory or Memory()
        self._identity = identity
        self._lock = threading.Lock()
        self._opened: tuple[int, int] | None = None

    def read(self, begin: int, end: int) -> np.ndarray:
        """Bytes of the file.

        Raises:
            OSError: it cannot be read, or ends before.
            BadFile: it was replaced or changed since its header was read.
        """
        handle, step = self._open()
        try:
            return self._read(handle, begin, end, step)
        except OSError as error:
            if step == 1 or error.errno != errno.EINVAL:  # the file system wants other steps, or none of this
                raise
        return self._read(self._open(plainly=True)[0], begin, end, 1)

    def _read(self, handle: int, begin: int, end: int, step: int) -> np.ndarray:
        first, last = begin // step * step, -(-end // step) * step
        block = self.memory.take(last - first)
        at = first
        while at < end:
            count = self._fill(handle, block[at - first :].data, at)
            if not count or (step > 1 and count % step and at + count < end):
                raise OSError("the file ends before it")
            at += count
        return block[begin - first : end - first]

    def _fill(self, handle: int, target: memoryview, at: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(handle, [target], at)  # at most 2 GiB at a time
        with self._lock:  # Windows
            os.lseek(handle, at, os.SEEK_SET)
            data = os.read(handle, min(len(target), PIECE))
        target[: len(data)] = data
        return len(data)

    def _open(self, *, plainly: bool = False) -> tuple[int, int]:
        """The open file, and in what steps it can be read: pages where the access is direct."""
        with self._lock:
            if self._opened is None or (plainly and self._opened[1] > 1):
                handle, step = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), 1
                if not plainly and not _cached(handle) and (direct := _directly(self.path)) is not None:
                    os.close(handle)
                    handle, step = direct, PAGE
                weakref.finalize(self, os.close, handle)
                now = stamp(handle)
                if self._identity is not None and self._identity != now:
                    raise BadFile(
                        f"{self.path}: was replaced or changed since its header was read; try again",
                        "file.changed",
                    )
                self._identity, self._opened = now, (handle, step)
            return self._opened

    @property
    def size(self) -> int:
        """Bytes in all."""
        self._open()
        assert self._identity is not None
        return self._identity[2]


def _directly(path: Path) -> int | None:
    """The file opened for direct access, if the system has that."""
    with suppress(OSError, AttributeError):
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    return None


def _cached(handle: int) -> bool:
    """Whether most of a file is in the system's cache already."""
    size, found = os.fstat(handle).st_size, 0
    byte = bytearray(1)
    for place in range(PLACES):
        # An error: it would have to wait for the disk, or cannot be asked at all.
        with suppress(OSError, AttributeError):
            found += os.preadv(handle, [byte], size * place // PLACES, os.RWF_NOWAIT)
    return 2 * found > PLACES


class Sum:
    """The SHA-256 of a file, out of the pieces in which its tensors are read anyway; for several threads.

    Who brings the piece that comes next hashes it. What lies between, which nobody brings, is read for it.

    Args:
        source: the file.
        told: called with the bytes of each piece that was hashed; an exception that it raises stops the work.
    """

    def __init__(self, source: Source, told: Callable[[int], None]) -> None:
        self._source, self._told = source, told
        self._sums = hashlib.sha256()
        self._at = 0
        self._waiting: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._busy = threading.Lock()

    def add(self, begin: int, data: np.ndarray) -> None:
        """A piece of the file that was read."""
        with self._lock:
            if begin + len(data) <= self._at:
                return
            self._waiting[begin] = data
        while self._next(HELD) and self._busy.acquire(blocking=False):
            try:
                while (piece := self._next(HELD)) is not None:
                    self._hash(*piece)
            finally:
                self._busy.release()

    def hexdigest(self) -> str:
        """The sum of the whole file.

        Raises:
            BadFile: it cannot be read.
        """
        try:
            size = self._source.size
            with self._busy:
                while self._at < size:
                    self._hash(*(self._next(-1) or (self._at, min(self._at + PIECE, size))))
        except OSError as error:
            raise BadFile(f"{self._source.path}: cannot be read: {error}", "file.read") from error
        return self._sums.hexdigest()

    def _next(self, held: int) -> tuple[int, int] | None:
        """What can be hashed next, from where to where; a gap only if more than so many bytes wait behind it."""
        with self._lock:
            for begin in [begin for begin, data in self._waiting.items() if begin + len(data) <= self._at]:
                del self._waiting[begin]
            if not self._waiting:
                return None
            first = min(self._waiting)
            if first <= self._at:
                return self._at, first + len(self._waiting[first])
            if sum(map(len, self._waiting.values())) <= held:
                return None
            return self._at, min(first, self._at + PIECE)

    def _hash(self, begin: int, end: int) -> None:
        with self._lock:
            first = min(self._waiting, default=end)
            data = self._waiting.pop(first)[begin - first :] if first <= begin else None
        if data is None:
            data = self._source.read(begin, end)
        # By what there is: the piece that was to be read for this may have been brought meanwhile.
        self._sums.update(data.data)
        self._at = begin + len(data)
        self._told(len(data))


class Sink:
    """What is written to an open file, past the system's cache where the system has a way.

    A file that is larger than the memory which is free would wait for pages to be found for each of its bytes.

    Args:
        file: at its beginning; nobody else writes to it until this is over.
    """

    def __init__(self, file: BinaryIO) -> None:
        file.flush()
        self._handle = file.fileno()
        self._block = np.frombuffer(_block(PIECE), np.uint8)
        self._full = 0
        self._direct = False
        self._switch(on=True)

    def write(self, data: memoryview | bytes) -> None:
        """Write what comes next.

        Raises:
            OSError: it cannot be written.
        """
        left = np.frombuffer(data, np.uint8)
        while len(left):
            count = min(len(left), PIECE - self._full)
            self._block[self._full : self._full + count] = left[:count]
            self._full, left = self._full + count, left[count:]
            if self._full == PIECE:
                self._out()

    def end(self) -> None:
        """Write the rest, which fills no page; whoever opened the file has it again."""
        self._switch(on=False)
        self._out()

    def _out(self) -> None:
        left = self._block[: self._full].data
        while len(left):
            try:
                left = left[os.write(self._handle, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._switch(on=False)
        self._full = 0

    def _switch(self, *, on: bool) -> None:
        if not on and not self._direct:
            return
        self._direct = False
        with suppress(OSError, AttributeError, ImportError):
            import fcntl

            flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
            self._direct = on
