"""Writing a safetensors file while somebody watches: bytes are counted, and the tensors' digest is put into the header.

The digest (SHA-256 of all that follows the header, which ``modelspec.hash_sha256`` holds and AutoV3 begins with) is
known only when the last tensor is written. Its place in the header is kept free with zeros of the same length, and
filled before the file gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sumuk.base.errors import BadInput
from sumuk.files.atomic import replacing
from sumuk.files.safetensors import BITS
from sumuk.files.tensors import Lazy, dtype_name

PIECE = 1 << 24
"""Bytes between two reports."""
EMPTY = "0x" + "0" * 64


class Meter:
    """Bytes done of several passes over several files, told as one sum.

    Args:
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.
        total: bytes in all.
    """

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0

    def add(self, count: int) -> None:
        """So many more are done; headers, which nobody foresaw, do not lead beyond the end."""
        self.done = min(self.done + count, self.total)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def reading(self) -> Callable[[int, int], None]:
        """A callback for one file, which is told its bytes from the first on."""
        before = 0

        def told(done: int, _: int) -> None:
            nonlocal before
            self.add(done - before)
            before = done

        return told


def size(tensors: Mapping[str, Lazy]) -> int:
    """Bytes that tensors take in a file."""
    return sum(length(one) for one in tensors.values())


def length(one: Lazy) -> int:
    """Bytes that a tensor takes in a file."""
    return one.parameters * BITS[one.dtype] // 8


def stream(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str] | None = None,
    *,
    digest: str | None = None,
    meter: Meter | None = None,
) -> None:
    """Write a file in the memory of its largest tensor; the same bytes as :func:`~sumuk.files.tensors.write`.

    Args:
        path: where to; an existing file is replaced when the new one is complete.
        tensors: name -> tensor, loaded one at a time.
        metadata: free texts.
        digest: the metadata that shall hold the tensors' digest, ``0x`` and 64 digits.
        meter: told of the bytes written.

    Raises:
        BadInput: a name, text or dtype that the format cannot hold.
        BadFile: writing failed; the old file is as it was.
    """
    texts = dict(metadata or {}) | ({digest: EMPTY} if digest else {})
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name].dtype], name))
    header = _header(tensors, order, texts)
    sums = hashlib.sha256()
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for piece in _pieces(name, tensors[name]):
                file.write(piece)
                if digest:
                    sums.update(piece)
                if meter is not None:
                    meter.add(len(piece))
        if digest:
            place = json.dumps({digest: EMPTY}, ensure_ascii=False, separators=(",", ":"))[1:-1].encode()
            file.seek(8 + header.index(place) + len(place) - 1 - 64)
            file.write(sums.hexdigest().encode())


def _header(tensors: Mapping[str, Lazy], order: list[str], texts: Mapping[str, str]) -> bytes:
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadInput(f"metadata {key!r} is {type(text).__name__}; safetensors files hold only texts")
    if "__metadata__" in tensors or "" in tensors:
        raise BadInput("a tensor cannot be named '' or '__metadata__' in a safetensors file")
    table: dict[str, Any] = {"__metadata__": dict(sorted(texts.items()))} if texts else {}
    at = 0
    for name in order:
        one = tensors[name]
        end = at + length(one)
        table[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _pieces(name: str, one: Lazy) -> Iterator[memoryview]:
    import torch

    tensor = one.load()
    if tuple(tensor.shape) != one.shape or dtype_name(tensor.dtype) != one.dtype:
        raise BadInput(
            f"tensor {name!r} was announced as {one.dtype} {list(one.shape)} but is "
            f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    for begin in range(0, len(data), PIECE):
        yield data[begin : begin + PIECE]
