"""The names by which the field knows a file: SHA-256, AutoV2 and AutoV3, in one pass over the bytes.

AutoV2 is the first 10 hex digits of the whole file's SHA-256. AutoV3 is that of the tensor bytes alone (all
that follows a safetensors header), so it stays when only the metadata changes; 12 digits of it are shown.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from sumuk.files.safetensors import regular

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Hashes:
    """Hexadecimal digests; ``autov3`` is None for a file that is not safetensors."""

    sha256: str
    autov2: str
    autov3: str | None

    @property
    def line(self) -> str:
        """All of them, for people."""
        third = f", AutoV3 {self.autov3}" if self.autov3 else ""
        return f"AutoV2 {self.autov2}{third}, SHA-256 {self.sha256}"


def hashes(path: str | os.PathLike[str], progress: Progress | None = None) -> Hashes:
    """Hash a file, a megabyte at a time.

    Args:
        path: any file.
        progress: told after each piece; an exception that it raises stops the work.

    Raises:
        MissingFile: no such file.
    """
    path = regular(path)
    total = path.stat().st_size
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        while piece := file.read(_PIECE):
            whole.update(piece)
            if done + len(piece) > start:
                tensors.update(memoryview(piece)[max(0, start - done) :])
            done += len(piece)
            if progress:
                progress(done, total)
    digest = whole.hexdigest()
    return Hashes(digest, digest[:10], tensors.hexdigest()[:12] if 8 < start <= total else None)
