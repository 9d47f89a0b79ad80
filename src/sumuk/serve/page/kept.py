"""Pictures that were given to the page, kept for a while, so that settings survive a reload with their pictures.

Each is a plain PNG (:func:`sumuk.serve.pictures.clean`) in a folder of its owner's, named by its content: the same
picture lies there once, and the digests that stand in a job's order find it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from contextlib import suppress
from pathlib import Path

from sumuk.files.atomic import replacing
from sumuk.serve.calls import unpacked
from sumuk.serve.pictures import clean
from sumuk.serve.trouble import refused

MOST = 100
"""Pictures of one owner; the one that was used longest ago goes."""
DAYS = 7
"""After which one that was not used goes."""
_NAME = re.compile(r"[0-9a-f]{32}")


class Kept:
    """The folder.

    Args:
        folder: where; made when it is needed.
        most_pixels: of one picture.
    """

    def __init__(self, folder: Path, most_pixels: int) -> None:
        self._folder, self._most_pixels = folder, most_pixels

    async def take(self, owner: str, text: str, what: str) -> str:
        """Keep a picture that comes as a ``data:`` URL; the name under which it is kept.

        Raises:
            Refused: it is no picture that is taken.
        """
        return await self.put(owner, await clean(unpacked(text, what), what, self._most_pixels))

    async def put(self, owner: str, png: bytes) -> str:
        """Keep a picture that is plain already."""
        return await asyncio.to_thread(self._put, owner, png)

    def _put(self, owner: str, png: bytes) -> str:
        name = named(hashlib.sha256(png).hexdigest())
        folder = self._of(owner)
        folder.mkdir(0o700, parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        if path.exists():
            path.touch()
        else:
            with replacing(path) as file:
                file.write(png)
        self._tidy(folder)
        return name

    def path(self, owner: str, name: str) -> Path:
        """Where a kept picture lies.

        Raises:
            Refused: it is no longer kept.
        """
        path = self._of(owner) / f"{name}.png"
        if not _NAME.fullmatch(name) or not path.is_file():
            raise refused("gone", "the picture is no longer kept; choose it again")
        with suppress(OSError):
            path.touch()
        return path

    async def read(self, owner: str, name: str) -> bytes:
        """A kept picture's PNG.

        Raises:
            Refused: it is no longer kept.
        """
        return await asyncio.to_thread(self.path(owner, name).read_bytes)

    def _of(self, owner: str) -> Path:
        return self._folder / hashlib.sha256(owner.encode()).hexdigest()[:16]

    def _tidy(self, folder: Path) -> None:
        used: list[tuple[float, Path]] = []
        for path in folder.glob("*.png"):
            with suppress(FileNotFoundError):  # another call tidies at the same time
                used.append((path.stat().st_mtime, path))
        old = time.time() - DAYS * 86_400
        for place, (when, path) in enumerate(sorted(used, reverse=True)):
            if place >= MOST or when < old:
                path.unlink(missing_ok=True)


def named(sha256: str) -> str:
    """The name of the picture with this digest."""
    return sha256[:32]
