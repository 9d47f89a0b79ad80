"""An autoencoder's work in square tiles that overlap: memory follows the tile and not the picture.

Where tiles overlap they are blended linearly. Several tiles differ from the whole, as norms over a picture's statistics
and attention over its positions then know one tile only; a larger tile differs less. So tiles are for where memory does
not suffice for the whole, and a picture that was made by them says so.

Shapes: B images, C channels of a latent, h and w its cells a side; H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, takewhile

import torch
from torch import Tensor

from sumuk.base.errors import BadInput

Work = Callable[[Tensor], Tensor]
SMALLEST = 16
"""Cells a side of the smallest tile worth trying: what a norm sees of a smaller one tells little of the picture."""


def sides(height: int, width: int) -> list[int]:
    """Tiles that are worth trying for a latent of that many cells, each of half the area of the one before.

    None for a latent that is too small.
    """
    longest = max(height, width)
    found = (round(longest * 0.5 ** (halvings / 2)) for halvings in count(1))
    return [*takewhile(lambda side: side >= SMALLEST, found)]


def decode_tiled(decode: Work, latent: Tensor, tile: int, overlap: int, stride: int) -> Tensor:
    """What ``decode`` makes of a latent, tile by tile; with a tile as large as the latent: to the bit.

    Args:
        decode: [B, C, h, w] to [B, any, h * stride, w * stride].
        latent: what is decoded.
        tile: side of a tile in cells.
        overlap: cells that neighbours share, 0 <= overlap < tile.
        stride: pixels a side that one cell stands for.

    Raises:
        BadInput: a tile or an overlap out of range.
    """
    return _tiled(decode, latent, (latent.shape[2], latent.shape[3]), (1, stride), tile, overlap)


def encode_tiled(encode: Work, pixels: Tensor, tile: int, overlap: int, stride: int) -> Tensor:
    """What ``encode`` makes of pixels [B, 3, H, W], likewise; ``tile`` and ``overlap`` count cells here too."""
    cells = (pixels.shape[2] // stride, pixels.shape[3] // stride)
    return _tiled(encode, pixels, cells, (stride, 1), tile, overlap)


def _tiled(
    work: Work, x: Tensor, cells: tuple[int, int], scales: tuple[int, int], tile: int, overlap: int
) -> Tensor:
    """Do the work on tiles of ``cells``; a cell is ``scales`` = (before, after) positions a side."""
    if tile < 1 or not 0 <= overlap < tile:
        raise BadInput(
            f"tile {tile} with overlap {overlap}: needs tile >= 1 and 0 <= overlap < tile (latent cells)"
        )
    before, after = scales
    rows, columns = (_starts(length, tile, overlap) for length in cells)
    if len(rows) == len(columns) == 1:
        return work(x)
    row_shares, column_shares = (
        _shares(starts, length * after, tile * after, overlap * after, after)
        for starts, length in zip((rows, columns), cells, strict=True)
    )
    out: Tensor | None = None
    for top, down in zip(rows, row_shares, strict=True):
        for left, across in zip(columns, column_shares, strict=True):
            y, x_ = top * before, left * before
            piece = work(x[:, :, y : y + tile * before, x_ : x_ + tile * before])
            if out is None:  # in float32: sums of many weighted terms in bfloat16 would show as bands
                size = (cells[0] * after, cells[1] * after)
                out = piece.new_zeros(*piece.shape[:2], *size, dtype=torch.float32)
            y, x_ = top * after, left * after
            place = out[:, :, y : y + piece.shape[2], x_ : x_ + piece.shape[3]]
            vertical = down[y : y + piece.shape[2], None].to(piece.device)
            place += piece * vertical * across[x_ : x_ + piece.shape[3]].to(piece.device)
            dtype = piece.dtype
    assert out is not None
    return out.to(dtype)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin; the last is moved back to end at the edge, so that all are of one size."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _shares(starts: list[int], length: int, tile: int, overlap: int, scale: int) -> Tensor:
    """[tiles, length]: each tile's share of every position, ramped over its overlaps; columns sum to 1."""
    shares = torch.zeros(len(starts), length)
    for index, start in enumerate(starts):
        begin, end = start * scale, min(start * scale + tile, length)
        place = torch.arange(begin, end) + 0.5
        share = torch.ones(end - begin)
        if index > 0 and overlap:
            share = torch.minimum(share, (place - begin) / overlap)
        if index < len(starts) - 1 and overlap:
            share = torch.minimum(share, (end - place) / overlap)
        shares[index, begin:end] = share
    return shares / shares.sum(dim=0)
