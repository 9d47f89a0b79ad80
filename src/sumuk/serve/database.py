"""The server's database file: its tables, whether it is sound, and that one server alone has it.

It holds jobs that were acknowledged. So it is made once, whole or not at all; and if it is damaged or gone, the
server says so and does not begin with an empty one in its place.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from sumuk.base.errors import BadFile, BadInput

VERSION = 1
"""Of the tables, as ``user_version``. Raised with what brings an older file up to it."""
APPLICATION = 0x53554D4B
"""``SUMK``: says that a file is ours."""

TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of admission
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    asked TEXT NOT NULL,                       -- the order as JSON, pictures as {"sha256": ...}
    count INTEGER NOT NULL,
    cost REAL NOT NULL,
    steps INTEGER NOT NULL,
    created REAL NOT NULL,
    began REAL,
    ended REAL,
    attempt INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,         -- of workers that were drawing it
    kills INTEGER NOT NULL DEFAULT 0,          -- of servers that were running it
    attached INTEGER NOT NULL,
    trouble TEXT,
    gone INTEGER NOT NULL DEFAULT 0            -- its files are deleted
);
CREATE INDEX jobs_of_owner ON jobs (owner, number);
CREATE INDEX jobs_open ON jobs (number) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_ended ON jobs (gone, ended) WHERE ended IS NOT NULL;
CREATE TABLE pictures (sha256 TEXT PRIMARY KEY, size INTEGER NOT NULL, png BLOB NOT NULL);
CREATE TABLE uses (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    picture TEXT NOT NULL REFERENCES pictures (sha256),
    PRIMARY KEY (job, picture)
) WITHOUT ROWID;
CREATE INDEX uses_of_picture ON uses (picture);
CREATE TABLE results (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    image INTEGER NOT NULL,
    file TEXT NOT NULL,
    seed TEXT NOT NULL,                        -- up to 2**64, which INTEGER does not hold
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL,
    receipt TEXT NOT NULL,
    PRIMARY KEY (job, image)
);
CREATE TABLE keys (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE INDEX keys_of_job ON keys (job);
CREATE TABLE settings (owner TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
"""
SMALL = ("jobs", "uses", "results", "keys", "settings")
"""Tables that are looked through at every start; ``pictures`` may be gigabytes."""


def take(folder: Path) -> int:
    """Take a state folder for this process, until the handle is closed or the process ends in whatever way.

    Raises:
        BadInput: another server has it.
        OSError: it cannot be written.
    """
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(handle, 20).decode("ascii", "replace").strip()
        os.close(handle)
        raise BadInput(
            f"the state folder {folder} is in use by another server (process {who or 'unknown'}); stop that one, "
            "or give this one another folder with --state"
        ) from None
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def ready(path: Path, results: Path) -> sqlite3.Connection:
    """A connection to the database at ``path``, made new if there never was one.

    Args:
        path: of the file.
        results: the folder of finished pictures; if there are some, there was a database.

    Raises:
        BadFile: it is damaged, gone, or of a later version.
    """
    try:
        if not path.exists():
            if any(results.iterdir()):
                raise _damaged(path, f"it is missing, though there are results in {results}")
            _made(path)
        elif path.stat().st_size == 0:
            raise _damaged(path, "it is empty")
        db = _opened(path)
        try:
            _check(db, path)  # before anything is set, which would write into a file that is not ours
        finally:
            db.close()
        return connected(path)
    except sqlite3.OperationalError as error:  # locked, read-only, full: not the file's fault
        raise BadFile(f"cannot use {path}: {error}", "state.unreadable") from None
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from None


def connected(path: Path) -> sqlite3.Connection:
    """One connection; transactions are begun and ended by hand."""
    db = _opened(path)
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        db.execute(f"PRAGMA {pragma}")
    return db


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    return db


def _made(path: Path) -> None:
    """A new database, which gets its name when it is whole."""
    young = path.with_name(f".{path.name}.new")
    young.unlink(missing_ok=True)
    db = sqlite3.connect(young, isolation_level=None)
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # deleted pictures give their room back
    db.executescript(
        f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; PRAGMA application_id = {APPLICATION}; COMMIT;"
    )
    db.close()
    young.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the name outlasts a power cut
    finally:
        os.close(folder)


def _check(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION:
        raise _damaged(path, "it is no database of a Sumuk server")
    if version > VERSION:
        raise BadFile(
            f"{path} is of version {version}, written by a later Sumuk; this one reads up to {VERSION}: "
            "update it, or give another folder with --state",
            "state.version",
        )
    for table in SMALL:
        (found,) = db.execute(f"PRAGMA quick_check({table})").fetchone()
        if found != "ok":
            raise _damaged(path, f"table {table}: {found}")


def _damaged(path: Path, why: str) -> BadFile:
    return BadFile(
        f"the server's database {path} is damaged: {why}. It holds jobs that were acknowledged, so it is not replaced: "
        f"put a backup there, repair it (sqlite3 {path.name} .recover), or move {path.parent} away to begin with none",
        "state.damaged",
    )
