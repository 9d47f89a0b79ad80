"""Workers with planted faults, as the processes that a :class:`sumuk.serve.local.LocalWorker` may be told to run."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from sumuk.nets.unet import UNet
from sumuk.serve import worker
from sumuk.serve.config import ServeConfig


def poisoned_once(config: ServeConfig, connection: Connection) -> None:
    """The device is lost at the fifth forward of the first such worker on this state folder."""
    mark = Path(config.state) / "poisoned"
    calls = 0
    forward = UNet.forward

    def broken(self: UNet, *args: object, **named: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5 and not mark.exists():
            mark.touch()
            raise RuntimeError("CUDA error: device-side assert triggered")
        return forward(self, *args, **named)

    UNet.forward = broken  # type: ignore[method-assign]
    worker.work(config, connection)


def full_sometimes(config: ServeConfig, connection: Connection) -> None:
    """Every third forward finds no memory, whatever is tried for it within that picture."""
    calls = 0
    forward = UNet.forward

    def broken(self: UNet, *args: object, **named: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args, **named)

    UNet.forward = broken  # type: ignore[method-assign]
    worker.work(config, connection)


def dying(config: ServeConfig, connection: Connection) -> None:
    """It never lives."""
    os._exit(3)
