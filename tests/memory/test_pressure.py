"""Full memory is told from worse, whoever says it, and what failed halfway is freed."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import traceback
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from sumuk.base.errors import BadInput, OutOfMemory
from sumuk.memory.pressure import Stranded, free_caches, is_full, is_poisoned, let_go

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
        ),
        torch.AcceleratorError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you"),
        RuntimeError("MPS backend out of memory (MPS allocated: 6.74 GB, other allocations: 400 KB, max"),
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=lambda error: str(error)[:40],
)
def test_full(error: Exception):
    assert is_full(error) and not is_poisoned(error)


@pytest.mark.parametrize(
    "ask", [lambda: torch.empty(10**15), lambda: np.empty(10**16)], ids=["torch", "numpy"]
)
def test_the_allocators_of_this_machine(ask):
    with pytest.raises(Exception) as caught:
        ask()
    assert is_full(caught.value) and not is_poisoned(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("HIP error: the operation cannot be performed in the present state"),
        RuntimeError("could not create a primitive"),
        Stranded("a network that left cuda:0 does not fit back onto it"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_poisoned(error: Exception):
    assert is_poisoned(error) and not is_full(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("CUDA out of memory"),  # an allocator raises none
        BadInput("the prompt says 'CUDA error'"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OutOfMemory("everything was tried already"),
        KeyError("x"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_anything_else_is_neither(error: Exception):
    assert not is_full(error) and not is_poisoned(error)


class Kept:
    """In the place of a tensor, whose end can be seen."""


def fail(seen: list[weakref.ref[Kept]]) -> None:
    held = Kept()
    seen.append(weakref.ref(held))
    raise MemoryError("inside")


def fail_again(seen: list[weakref.ref[Kept]]) -> None:
    kept = Kept()
    seen.append(weakref.ref(kept))
    try:
        fail(seen)
    except MemoryError:
        fail(seen)


def test_an_error_that_is_let_go_holds_nothing_and_can_still_be_printed():
    seen: list[weakref.ref[Kept]] = []
    gc.disable()
    try:
        with pytest.raises(MemoryError) as caught:
            fail_again(seen)
        assert [each() is not None for each in seen] == [True] * 3, "or there is nothing to see"
        let_go(caught.value)
        assert [each() for each in seen] == [None] * 3
    finally:
        gc.enable()
    printed = "".join(traceback.format_exception(caught.value))
    assert printed.count("in fail\n") == 2 and "in fail_again" in printed


def test_errors_that_name_each_other_end():
    one, other = MemoryError("one"), MemoryError("other")
    one.__context__, other.__context__ = other, one
    let_go(one)


def test_caches_are_freed_on_every_device_that_is_here():
    free_caches(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="heaps differ")
def test_freeing_gives_pages_back_to_the_machine():
    """Memory below the threshold of mmap stays with the heap; in a process of its own, as others use this one's."""
    code = """
import torch
from sumuk.memory.pressure import free_caches
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
some = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each
last = torch.ones(25_000)  # the heap cannot shrink below it
del some
before = resident()
free_caches(torch.device("cpu"))
print((before - resident()) // 2**20)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 80, "of 95 MiB"
