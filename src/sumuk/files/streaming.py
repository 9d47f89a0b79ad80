"""Many gigabytes in the memory of a few tensors: reading without mapping, and working ahead of the writer.

The pages of a mapped file count as memory of the process until the system wants them back, so that whoever reads two
checkpoints through a map seems to hold both. Here each tensor is read into memory of its own, and gone with it. What
comes next is worked out in a few threads while a tensor is written, as far ahead as a budget of bytes allows.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sumuk.base.errors import BadFile
from sumuk.files.safetensors import BITS, Header
from sumuk.files.tensors import Lazy, Reader, Tensors, dtypes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

THREADS = 3
"""One more than keep two processors busy, as each waits for the disk now and then."""
BUDGET = 400 << 20
"""Bytes that may be under work at once, unless a single tensor needs more."""


class Front:
    """How far files have been read without a gap, by whoever reads their tensors in whatever order."""

    def __init__(self) -> None:
        self.ends: dict[Path, int] = {}
        self.beyond: dict[Path, dict[int, int]] = {}
        self.lock = threading.Lock()

    def add(self, header: Header, begin: int, end: int) -> None:
        """Bytes of a file have been read."""
        with self.lock:
            beyond = self.beyond.setdefault(header.path, {})
            beyond[begin] = max(end, beyond.get(begin, 0))
            at = self.ends.get(header.path, header.start)
            while at in beyond:
                at = beyond.pop(at)
            self.ends[header.path] = at

    def of(self, path: Path) -> int:
        """Where the first gap of a file begins."""
        return self.ends.get(path, 0)


def unmapped(tensors: Mapping[str, Lazy], front: Front | None = None) -> Tensors:
    """The same tensors, those that lie in safetensors files read into memory of their own at each load.

    Tensors that are made from others, or come from other kinds of file, are as they were. Systems without ``preadv``
    (Windows) go on mapping. What is read is told to ``front``.
    """
    files: dict[int, _Bounded] = {}
    made: Tensors = {}
    for name, one in tensors.items():
        reader = getattr(one.load.func, "__self__", None) if isinstance(one.load, partial) else None
        if isinstance(reader, Reader) and hasattr(os, "preadv") and one.dtype in dtypes():
            assert isinstance(one.load, partial)
            file = files.setdefault(id(reader), _Bounded(reader.header, front))
            one = replace(one, load=partial(file.get, *one.load.args))
        made[name] = one
    return made


class _Bounded:
    """One file, opened when first needed; several threads may read from it at once."""

    def __init__(self, header: Header, front: Front | None) -> None:
        self.header, self.front = header, front
        self.lock = threading.Lock()
        self.handle: int | None = None

    def get(self, name: str) -> Tensor:
        import torch

        info, path = self.header.tensors[name], self.header.path
        tensor = blank(info.shape, dtypes()[info.dtype])
        try:
            if tensor.numel():
                self._fill(tensor.reshape(-1).view(torch.uint8).numpy().data, self.header.start + info.begin)
        except OSError as error:
            raise BadFile(f"{path}: tensor {name!r} cannot be read: {error}", "safetensors.read") from error
        if self.front is not None and tensor.numel():
            self.front.add(self.header, self.header.start + info.begin, self.header.start + info.end)
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise BadFile(f"{path}: BOOL tensor {name!r} holds other bytes than 0 and 1", "safetensors.bool")
        return tensor

    def _fill(self, target: memoryview, at: int) -> None:
        handle = self._open()
        while len(target):
            count = os.preadv(handle, [target], at)  # at most 2 GiB at a time
            if not count:
                raise OSError("the file ends before it")
            target, at = target[count:], at + count

    def _open(self) -> int:
        with self.lock:
            if self.handle is None:
                handle = os.open(self.header.path, os.O_RDONLY)
                weakref.finalize(self, os.close, handle)
                info = os.fstat(handle)
                if (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) != self.header.stamp:
                    path = self.header.path
                    raise BadFile(
                        f"{path}: was replaced since its header was read; try again", "file.changed"
                    )
                self.handle = handle
            return self.handle


def blank(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled, in memory that numpy asks for: in large pages where the system has such.

    A fresh tensor of 40 MB has ten thousand small pages, and to be given them takes longer than to read it.
    """
    import numpy as np
    import torch

    if not (count := prod(shape)):
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype).reshape(tuple(shape))


@contextmanager
def ahead(
    tensors: Mapping[str, Lazy], order: Sequence[str], weigh: Callable[[str], int], budget: int = BUDGET
) -> Iterator[Tensors]:
    """Tensors that are loaded in a few threads shortly before they are asked for.

    Args:
        tensors: what will be written.
        order: the names in the order in which they will be asked for, once each, see :func:`written`; another order is
            as right, but slower.
        weigh: bytes of memory that loading one takes, roughly.
        budget: bytes that may be under work at once.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="ahead") as pool:
        line = _Line(tensors, order, weigh, budget, pool)
        try:
            yield {name: replace(one, load=partial(line.get, name)) for name, one in tensors.items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def written(tensors: Mapping[str, Lazy]) -> list[str]:
    """The names in the order in which a file holds the tensors."""
    return sorted(tensors, key=lambda name: (-BITS[tensors[name].dtype], name))


class _Line:
    """What is under work; asked by one thread."""

    def __init__(
        self,
        tensors: Mapping[str, Lazy],
        order: Sequence[str],
        weigh: Callable[[str], int],
        budget: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.tensors, self.weigh, self.budget, self.pool = tensors, weigh, budget, pool
        self.waiting = list(reversed(order))
        self.under: dict[str, tuple[Future[Tensor], int]] = {}

    def get(self, name: str) -> Tensor:
        self._begin()
        if name not in self.under:
            return self.tensors[name].load()
        tensor = self.under.pop(name)[0].result()
        self._begin()
        return tensor

    def _begin(self) -> None:
        while self.waiting and len(self.under) <= THREADS + 1:
            name = self.waiting[-1]
            weight = self.weigh(name)
            if self.under and weight + sum(held for _, held in self.under.values()) > self.budget:
                return
            self.under[self.waiting.pop()] = (self.pool.submit(self.tensors[name].load), weight)
