"""Many gigabytes in the memory of a few tensors: reading without mapping, and working ahead of the writer.

The pages of a mapped file count as memory of the process until the system wants them back, so that whoever reads two
checkpoints through a map seems to hold both. Here each tensor is read into memory of its own
(:mod:`~sumuk.files.direct`), which is used again when it is gone. What comes next is worked out in a few threads while
a tensor is written, as far ahead as a budget of bytes allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sumuk.base.errors import BadFile
from sumuk.files.direct import Memory, Source, Sum
from sumuk.files.safetensors import BITS, Header
from sumuk.files.tensors import Lazy, Reader, Tensors, dtypes

if TYPE_CHECKING:
    from torch import Tensor

THREADS = 8
"""Most of them wait for the disk, which is at its best when asked for many things at once."""
BUDGET = 600 << 20
"""Bytes that may be under work at once, unless a single tensor needs more."""


def unmapped(tensors: Mapping[str, Lazy], sums: Mapping[Path, Sum] | None = None) -> Tensors:
    """The same tensors, those that lie in safetensors files read into memory of their own at each load.

    Tensors that are made from others, or come from other kinds of file, are as they were. Systems without ``preadv``
    (Windows) go on mapping. What is read of a file that is to be hashed is given to its sum.
    """
    memory = Memory()
    files: dict[int, _Bounded] = {}
    made: Tensors = {}
    for name, one in tensors.items():
        reader = getattr(one.load.func, "__self__", None) if isinstance(one.load, partial) else None
        if isinstance(reader, Reader) and hasattr(os, "preadv") and one.dtype in dtypes():
            assert isinstance(one.load, partial)
            file = files.setdefault(id(reader), _Bounded(reader.header, memory, {} if sums is None else sums))
            one = replace(one, load=partial(file.get, *one.load.args))
        made[name] = one
    return made


class _Bounded:
    """One file."""

    def __init__(self, header: Header, memory: Memory, sums: Mapping[Path, Sum]) -> None:
        self.header = header
        self.source = Source(header.path, header.stamp, memory)
        self.sums = sums

    def get(self, name: str) -> Tensor:
        import torch

        info, path = self.header.tensors[name], self.header.path
        dtype = dtypes()[info.dtype]
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        begin = self.header.start + info.begin
        try:
            data = self.source.read(begin, self.header.start + info.end)
            if path in self.sums:
                self.sums[path].add(begin, data)
        except OSError as error:
            raise BadFile(f"{path}: tensor {name!r} cannot be read: {error}", "safetensors.read") from error
        if dtype == torch.bool and bool((data > 1).any()):
            raise BadFile(f"{path}: BOOL tensor {name!r} holds other bytes than 0 and 1", "safetensors.bool")
        if begin % dtype.itemsize:  # a header of odd length, which other programs write
            data = data.copy()
        return torch.from_numpy(data).view(dtype).reshape(info.shape)


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
    import torch

    threads = torch.get_num_threads()
    # Each works by itself: torch would share a large sum among threads, all of which are busy with sums of their own.
    with ThreadPoolExecutor(THREADS, "ahead", torch.set_num_threads, (1,)) as pool:
        line = _Line(tensors, order, weigh, budget, pool)
        try:
            yield {name: replace(one, load=partial(line.get, name)) for name, one in tensors.items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # what threads begin with from now on


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
