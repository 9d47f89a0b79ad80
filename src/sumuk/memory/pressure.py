"""Full memory: which errors mean it, which mean worse, and what can be freed at once.

Allocators say it in many ways: errors of their own, MemoryError, sentences inside a RuntimeError. After an error of
another kind (an assertion or an illegal address on the device) nothing that the process does there works any more. It
is *poisoned*, and only a new process helps.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
import traceback

import torch

FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "CUDA out of memory",
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "MPS backend out of memory",
    "_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
    "ALLOCATION_FAILED",  # cuDNN 9
    # These two have no memory for their own state; where the device is poisoned instead, the next error says so.
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "Unable to find a valid cuDNN algorithm",  # every one of them needs more memory than there is
)
POISONED = (
    "CUDA error",
    "HIP error",
    "device-side assert",
    "illegal memory access",
    "uncorrectable ECC error",
    "unspecified launch failure",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_MAPPING_ERROR",
    # oneDNN compiles its kernels. Where it once had no memory for that, it refuses every new shape from then on,
    # however much is free again (seen with torch 2.13 on Linux).
    "could not create a primitive",
)


class Stranded(Exception):
    """Networks that were taken off their device do not fit back onto it: the process is poisoned."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or of the machine, is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def is_poisoned(error: BaseException) -> bool:
    """Whether an error says that this process can do nothing any more on its device."""
    if isinstance(error, Stranded):
        return True
    if not isinstance(error, RuntimeError) or is_full(error):
        return False
    return isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in POISONED)


def let_go(error: BaseException) -> None:
    """Free what the frames of an error's tracebacks hold: every tensor of a forward that failed halfway.

    The tracebacks can still be printed. Frames that are still running are left alone.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # None ends it


def free_caches(device: torch.device) -> None:
    """Give back what nobody uses: objects in cycles, blocks that torch's allocator keeps, free pages of the heap."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()
    elif device.type == "mps":
        torch.mps.empty_cache()
    if sys.platform == "linux":
        # A picture of 512 x 512 pixels by the miniature leaves 100 MiB of them in the process.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc has it
            libc.malloc_trim(0)
