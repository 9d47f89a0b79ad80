"""A process that is killed while it writes, at each moment at which that could matter; and what files hold."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from sumuk.files.safetensors import read_header
from sumuk.files.shards import read_shards
from sumuk.files.tensors import from_header


def killed(work: Callable[[Callable[[int, int], None]], object], moment: int) -> bool:
    """Do the work in a process of its own and kill it at that moment; whether it was killed.

    Moments are counted over calls of ``os.fsync`` (a file or folder is about to be safe) and of progress.
    """

    def child() -> None:
        left = moment
        sync = os.fsync

        def tick() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(handle: int) -> None:
            tick()
            sync(handle)

        torch.set_num_threads(1)
        os.fsync = fsync
        work(lambda done, total: tick())
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def moments(work: Callable[[Callable[[int, int], None]], object]) -> int:
    """How many moments there are."""
    count = 0
    sync = os.fsync

    def tick(*_: object) -> None:
        nonlocal count
        count += 1

    def fsync(handle: int) -> None:
        tick()
        sync(handle)

    os.fsync = fsync
    try:
        work(tick)
    finally:
        os.fsync = sync
    return count


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, or of a set by its index."""
    headers = read_shards(path) if path.suffix == ".json" else [read_header(path)]
    return {name: one.load() for header in headers for name, one in from_header(header).items()}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """The same names, types and bits."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and _bits(value) == _bits(other[name]) for name, value in one.items()
    )


def _bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def body_digest(path: Path) -> str:
    """SHA-256 of what follows a file's header."""
    return hashlib.sha256(path.read_bytes()[read_header(path).start :]).hexdigest()
