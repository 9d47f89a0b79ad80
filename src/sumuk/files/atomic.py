"""Writing that is complete or absent: the new file lies beside the old one until it is whole and on the disk.

Temporary file in the same folder, fsync, rename, fsync of the folder. A process killed at any point leaves
the old file or the new one; a write that fails (full disk, error in the data) takes its temporary file with
it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sumuk.base.errors import BadFile, BadInput


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block ends without an error.

    Raises:
        BadFile: the folder is missing or read-only, the disk is full; the old file is as it was.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        # os.open, as a tempfile would ignore the umask and leave a model that nobody else may read.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync(path.parent)
    except OSError as error:
        raise BadFile(f"cannot write {path}: {error.strerror or error}", "file.write") from error


@contextmanager
def creating(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to fill, which gets its name when the block ends without an error.

    Raises:
        BadInput: the name is taken by something that is not an empty folder.
        BadFile: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{str(folder)!r} exists and is not an empty folder; give another name or remove it")
    temporary = _beside(folder)
    try:
        temporary.mkdir()
        try:
            yield temporary
            for place in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
                _sync(place)
            temporary.replace(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(folder.parent)
    except OSError as error:
        raise BadFile(f"cannot write {folder}: {error.strerror or error}", "file.write") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")


def _sync(folder: Path) -> None:
    """Make a rename outlast a power cut, where the system lets folders be opened (not on Windows)."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
