"""Embeddings that A1111 hides in pictures, so that they can be passed on where only pictures can.

Either as a text of the PNG, ``sd-ti-embedding``: base64 of JSON in which a tensor is ``{"TORCHTENSOR": nested lists}``.
Or in the pixels: the picture stands between two blocks of noise, set off by a black column each. The left block holds
the low halves of the bytes, the right one the high halves, in the low four bits of red, green and blue, row by row,
each xored with the low four bits of::

    s_0 = 0,   s_n = (1664525 s_{n-1} + 1013904223) mod 2^32,   mask_n = (s_n mod 255) mod 256

Together they are a zlib stream of the same JSON; what follows its end is of no meaning.

Source: AUTOMATIC1111 stable-diffusion-webui 1.10, textual inversion. Everything here comes from strangers, so pixels,
bytes and numbers are bounded before they are unpacked.
"""

from __future__ import annotations

import base64
import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sumuk.base.errors import BadFile

CHUNK = "sd-ti-embedding"
FORMATS = ("PNG", "WEBP")
PICTURES = (".png", ".webp")
MOST_BYTES = 32 * 2**20
"""Of the file."""
MOST_PIXELS = 2_500_000
"""A picture of 1024 a side has 1.6 million with its blocks."""
MOST_TEXT = 2_500_000
"""Of the JSON; 75 vectors of 1024 numbers take 1.7 million characters."""
MOST_BRACKETS = 1000
"""In the JSON, of each kind; an empty list takes thirty times the memory of its two characters."""
BLOCK = 2**16
"""Masks that are worked out at once."""


def read_picture(path: Path) -> dict[str, Any]:
    """What a picture hides: the table that A1111's ``.pt`` files hold, with tensors for nested lists.

    Raises:
        BadFile: no picture, too large, or nothing is hidden in it; code ``embedding.picture``.
    """
    if path.stat().st_size > MOST_BYTES:
        raise _bad(path, f"has {path.stat().st_size:,} bytes, above {MOST_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is lower
            image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise _bad(path, f"has {image.width} x {image.height} pixels, above {MOST_PIXELS:,}")
        said = image.info.get(CHUNK)
        pixels = None if said is not None else np.asarray(image.convert("RGB"))
    except BadFile:
        raise
    except Exception as error:  # decoders of damaged files raise anything; the remedy is the same
        raise _bad(path, f"cannot be decoded: {error}") from None
    document = _from_text(path, said) if pixels is None else _from_pixels(path, pixels)
    brackets = max(document.count(b"{"), document.count(b"["))
    if brackets > MOST_BRACKETS:
        raise _bad(path, f"hides {brackets:,} lists or tables, above {MOST_BRACKETS:,}")
    try:
        table = json.loads(document, object_hook=_tensor)
    except (ValueError, RecursionError, TypeError, RuntimeError) as error:
        raise _bad(path, f"hides something that is no embedding: {error!s:.100}") from None
    if not isinstance(table, dict):
        raise _bad(path, f"hides a {type(table).__name__}, not the table of an embedding")
    return table


def _bad(path: Path, what: str) -> BadFile:
    return BadFile(f"{path}: {what}", "embedding.picture")


def _tensor(table: dict[str, Any]) -> Any:
    """Nested lists as a tensor; torch refuses ragged ones and what are no numbers."""
    return torch.tensor(table["TORCHTENSOR"], dtype=torch.float64) if "TORCHTENSOR" in table else table


def _from_text(path: Path, said: object) -> bytes:
    if not isinstance(said, str | bytes) or len(said) > MOST_TEXT * 4 // 3:
        raise _bad(path, f"has a text {CHUNK} of more than {MOST_TEXT * 4 // 3:,} characters, or none")
    try:
        return base64.b64decode(said)
    except ValueError as error:
        raise _bad(path, f"has a text {CHUNK} that is no base64: {error}") from None


def _from_pixels(path: Path, pixels: np.ndarray[Any, Any]) -> bytes:
    """The JSON between the black columns; pixels are [H, W, 3] bytes."""
    lit: np.ndarray[Any, Any] = np.all(pixels > 0, axis=2)
    rows, columns = np.flatnonzero(np.any(lit, axis=1)), np.flatnonzero(np.any(lit, axis=0))
    if not len(rows):
        raise _bad(path, "is black, and hides no embedding")
    low_bits = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    black = np.flatnonzero(low_bits.sum(axis=(0, 2), dtype=np.int64) == 0)
    if len(black) < 2:
        raise _bad(path, f"hides no embedding, neither as a text {CHUNK} nor in its pixels")
    low, high = low_bits[:, : black[0]], low_bits[:, black[-1] + 1 :]
    if low.shape != high.shape or not low.size:
        raise _bad(path, "has two black columns, but no block of noise of one size on either side of them")
    mask = noise(low.size).reshape(low.shape)
    packed = ((high ^ mask) << 4) | (low ^ mask)
    stream = zlib.decompressobj()
    try:
        document = stream.decompress(packed.tobytes(), MOST_TEXT)
    except zlib.error as error:
        raise _bad(path, f"hides no embedding in its pixels, or was saved with loss: {error}") from None
    if not stream.eof:
        raise _bad(path, f"hides more than {MOST_TEXT:,} characters in its pixels, or not all of them")
    return document


def noise(count: int) -> np.ndarray[Any, Any]:
    """The first ``count`` masks, 0..15; s_{n+k} is a linear function of s_n, so k of them are made at once."""
    factor, offset = 1664525, 1013904223
    states = np.array([offset], np.uint32)  # which wraps at 2^32 by itself
    while len(states) < min(count, BLOCK):
        states = np.concatenate([states, states * np.uint32(factor) + np.uint32(offset)])
        factor, offset = factor * factor % 2**32, (factor * offset + offset) % 2**32
    masks = np.empty(count, np.uint8)
    for start in range(0, count, len(states)):
        here = masks[start : start + len(states)]
        here[:] = (states % 255)[: len(here)] & 15
        states = states * np.uint32(factor) + np.uint32(offset)
    return masks


def tensors_in(table: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a table and of those in it, named as in ``.pt`` files: ``string_to_param.*``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            {f"{key}.{inner}": each for inner, each in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return {key: each for key, each in flat.items() if isinstance(each, Tensor)}
