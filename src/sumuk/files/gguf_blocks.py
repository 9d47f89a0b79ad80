"""Numbers out of GGUF's quantised blocks, in float32 and with whole-tensor operations on any device.

A block is a fixed run of bytes that stands for 32 or, in the K types, 256 numbers of one row:

    Q4_0, Q5_0, Q8_0, IQ4_NL    x = d q               one scale d for 32
    Q4_1, Q5_1                  x = d q + m           and one least value
    Q3_K, Q6_K, IQ4_XS          x = (d s) q           a whole number s for each 16 or 32 of 256
    Q2_K, Q4_K, Q5_K            x = (d s) q - (e t)   and a second pair for the least value
    Q8_K                        x = d q               256, with d in float32

q has 2 to 8 bits, cut into planes: one byte holds the low bits of two or four numbers that lie 16, 32 or 64 apart,
and further bytes hold the high bits. The layouts are those of ``ggml-common.h`` in https://github.com/ggml-org/ggml.
Products and sums are taken in the same order as there, so that the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from sumuk.files.gguf import BLOCKS

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the four bits of the IQ4 types stand for: steps that are narrow around zero."""

AT_ONCE = 1 << 20
"""Numbers of a chunk on the CPU, so that what lies between two operations stays in its cache."""


def expand(scheme: str, blocks: Tensor) -> Tensor:
    """The numbers of blocks.

    Args:
        scheme: a name in :data:`~sumuk.files.gguf.BLOCKS`.
        blocks: uint8 [..., bytes], whole blocks only.

    Returns:
        float32 [n, 32] or [n, 256], a row for each block in order.
    """
    width, size = SIZES[scheme]
    decode = DECODE[scheme]
    rows = blocks.reshape(blocks.numel() // size, size)
    step = AT_ONCE // width
    if rows.device.type != "cpu" or len(rows) <= step:
        return decode(rows)
    whole = torch.empty(len(rows), width)
    for begin in range(0, len(rows), step):
        whole[begin : begin + step] = decode(rows[begin : begin + step])
    return whole


def _scale(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block: [n, 1]."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _planes(packed: Tensor, run: int, bits: int) -> Tensor:
    """Numbers of a few bits out of [n, bytes]: each run of bytes holds 8 / bits runs of numbers, low bits first.

    Returns [n, runs, 8 / bits, run].
    """
    runs = packed.unflatten(1, (-1, run))
    last = 8 - bits
    mask = (1 << bits) - 1
    middle = [(runs >> shift) & mask for shift in range(bits, last, bits)]
    return torch.stack([runs & mask, *middle, runs >> last], 2)


def _bits(packed: Tensor) -> Tensor:
    """The bits of [n, bytes], low ones of each byte first: [n, 8 bytes]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & 1).flatten(1)


def _nibbles(packed: Tensor) -> Tensor:
    return _planes(packed, 16, 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_scale(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_scale(blocks, 0)).add_(_scale(blocks, 2))


def _five(blocks: Tensor, at: int) -> Tensor:
    """Five bits: the fifth ones stand first, in four bytes."""
    return _bits(blocks[:, at : at + 4]).mul_(16).add_(_nibbles(blocks[:, at + 4 :])).float()


def _q5_0(blocks: Tensor) -> Tensor:
    return _five(blocks, 2).sub_(16).mul_(_scale(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    return _five(blocks, 4).mul_(_scale(blocks, 0)).add_(_scale(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_scale(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    q = _planes(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16).float()
    step = _scale(blocks, 80) * (scales & 15)
    least = _scale(blocks, 82) * (scales >> 4)
    return q.mul_(step.unsqueeze(2)).sub_(least.unsqueeze(2)).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _planes(blocks[:, 32:96], 32, 2).flatten(1)
    high = _planes(blocks[:, :32], 32, 1).flatten(1)
    q = high.mul_(4).add_(low).float().sub_(4).unflatten(1, (16, 16))  # a high bit of 0 takes 4 away
    fours = _planes(blocks[:, 96:104], 8, 4).flatten(1)
    twos = _planes(blocks[:, 104:108], 4, 2).flatten(1)
    step = _scale(blocks, 108) * twos.mul_(16).add_(fours).float().sub_(32)
    return q.mul_(step.unsqueeze(2)).flatten(1)


def _steps(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least value of eight runs of 32: six bits each, the upper two of the later four kept elsewhere."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (rest & 15) + ((first >> 6) << 4)), 1)
    mins = torch.cat((second & 63, (rest >> 4) + ((second >> 6) << 4)), 1)
    return (_scale(blocks, 0) * scales).unsqueeze(2), (_scale(blocks, 2) * mins).unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    step, least = _steps(blocks)
    return _planes(blocks[:, 16:], 32, 4).flatten(1, 2).float().mul_(step).sub_(least).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    step, least = _steps(blocks)
    high = _planes(blocks[:, 16:48], 32, 1).flatten(1, 2)
    low = _planes(blocks[:, 48:], 32, 4).flatten(1, 2)
    return high.mul_(16).add_(low).float().mul_(step).sub_(least).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _planes(blocks[:, :128], 64, 4).flatten(1)
    high = _planes(blocks[:, 128:192], 32, 2).flatten(1)
    step = _scale(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    q = high.mul_(16).add_(low).float().sub_(32).unflatten(1, (16, 16))
    return q.mul_(step.unsqueeze(2)).flatten(1)


def _q8_k(blocks: Tensor) -> Tensor:
    """The sums behind the numbers serve products of two such blocks; they follow from the numbers."""
    return blocks[:, 4:260].view(torch.int8).float().mul_(blocks[:, :4].view(torch.float32))


@lru_cache(maxsize=8)
def _levels(device: torch.device) -> Tensor:
    """The steps, once on each device: a copy in every forward would wait for it."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def _stepped(packed: Tensor) -> Tensor:
    q = _planes(packed, 16, 4)
    return _levels(packed.device).index_select(0, q.flatten().int()).view(q.shape)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _stepped(blocks[:, 2:]).flatten(1).mul_(_scale(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = _planes(blocks[:, 4:8].reshape(-1, 4), 1, 4).flatten(1)
    high = _planes(blocks[:, 2:4].reshape(-1, 2), 1, 2).flatten(1)
    step = _scale(blocks, 0) * high.mul_(16).add_(low).float().sub_(32)
    return _stepped(blocks[:, 8:]).flatten(2).mul_(step.unsqueeze(2)).flatten(1)


SIZES = {name: (width, size) for name, width, size in BLOCKS.values()}
DECODE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "Q8_K": _q8_k, "IQ4_XS": _iq4_xs,
}  # fmt: skip
"""How to have the numbers of blocks: uint8 [n, bytes] -> float32 [n, 32 or 256]."""
