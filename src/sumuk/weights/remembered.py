"""What was found out about files and need not be found out again: what they are, and their hashes.

An index (SQLite, under the user's cache folder) keeps both together with the file's size, inode and times of change;
whatever differs from these is looked at anew. It is a convenience: if it is damaged or cannot be written, everything
works without it, only slower.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from contextlib import closing, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.safetensors import regular

VERSION = 2
"""Of the index: raised when recognition learns something new, so that files are looked at again."""
TABLE = """
CREATE TABLE IF NOT EXISTS files (path TEXT, kind TEXT, stamp TEXT, said TEXT, PRIMARY KEY (path, kind))
"""

State = list[int]


def state(path: Path) -> State:
    """What changes when a file does: device, inode, bytes, and both times of change in ns.

    The second cannot be set back by whoever writes a file and gives it its old date.
    """
    info = path.stat()
    return [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


class Index:
    """What is remembered of files, as long as they stay what they were; for use by several threads.

    Args:
        path: its file; made when there is something to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[State, object]] | None = None

    def told(self, path: Path, now: State) -> tuple[str, str] | None:
        """What a file is: kind and title."""
        match self._find("told", path, now):
            case [str(kind), str(title)]:
                return kind, title
        return None

    def tell(self, path: Path, now: State, kind: str, title: str) -> None:
        """Keep what a file is."""
        self._keep("told", path, now, [kind, title])

    def hashed(self, path: Path, now: State) -> Hashes | None:
        """A file's hashes, if they were ever read."""
        said = self._find("hashed", path.resolve(), now)
        with suppress(TypeError):
            return Hashes(**said) if isinstance(said, dict) else None
        return None

    def hashes(self, path: Path, progress: Progress | None = None) -> Hashes:
        """A file's hashes, read whole once.

        Raises:
            MissingFile: no such file.
        """
        path = regular(path).resolve()  # so that a link and its file are known as one
        before = state(path)
        known = self.hashed(path, before)
        if known is None:
            known = hashes(path, progress)
            if state(path) == before:
                self._keep("hashed", path, before, asdict(known))
        return known

    def _find(self, kind: str, path: Path, now: State) -> object:
        with self._lock:
            if self._known is None:
                self._known = self._read()
            then, said = self._known.get((str(path), kind), (None, None))
        return said if then == now else None

    def _keep(self, kind: str, path: Path, now: State, said: object) -> None:
        with self._lock:
            if self._known is not None:
                self._known[str(path), kind] = now, said
            with suppress(sqlite3.Error, OSError), closing(self._open()) as base, base:
                base.execute(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                    (str(path), kind, json.dumps(now), json.dumps(said)),
                )

    def _read(self) -> dict[tuple[str, str], tuple[State, object]]:
        if not self.path.is_file():
            return {}
        known: dict[tuple[str, str], tuple[State, object]] = {}
        try:
            with closing(self._open()) as base:
                for path, kind, then, said in base.execute("SELECT path, kind, stamp, said FROM files"):
                    with suppress(ValueError, TypeError):
                        known[path, kind] = json.loads(then), json.loads(said)
        except (sqlite3.Error, OSError):
            pass
        return known

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(self.path, timeout=5)
        try:
            base.execute(TABLE)
        except sqlite3.DatabaseError as error:
            base.close()
            if not isinstance(error, sqlite3.OperationalError):  # damaged, not only busy: begin a new one
                self.path.unlink(missing_ok=True)
            raise
        return base


_opened = cache(Index)


def usual_index() -> Index:
    """The user's own; of a user without a home, one that lasts as long as the process."""
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError:
        folder = os.devnull  # where nothing can be written
    return _opened(Path(folder) / "sumuk" / f"shelf-{VERSION}.sqlite3")
