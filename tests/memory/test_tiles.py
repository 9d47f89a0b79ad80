"""Tiles: seams, shares, and memory that follows the tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sumuk.base.errors import BadInput
from sumuk.memory.tiles import SMALLEST, decode_tiled, encode_tiled, sides
from sumuk.nets.vae import Vae, VaeShape

PIXELS = 4
"""A side of a cell."""


def grow(latent: Tensor) -> Tensor:
    return F.interpolate(latent, scale_factor=PIXELS)


def shrink(pixels: Tensor) -> Tensor:
    return F.avg_pool2d(pixels, PIXELS)


@pytest.fixture(scope="module")
def vae() -> Vae:
    """Random weights are the worst case, as every norm depends on all that it sees."""
    torch.manual_seed(0)
    return Vae(VaeShape(width=32, multiples=(1, 2, 2), blocks=1)).eval().requires_grad_(False)


@pytest.mark.parametrize(("tile", "overlap"), [(17, 5), (8, 0), (20, 19), (50, 3)])
def test_where_a_position_sees_only_itself_seams_are_rounding_alone(tile: int, overlap: int):
    """A position of tile 20, overlap 19 is the float32 sum of 400 terms, hence 2e-5."""
    latent = torch.randn(2, 4, 51, 40)
    decoded = decode_tiled(grow, latent, tile, overlap, PIXELS)
    torch.testing.assert_close(decoded, grow(latent), rtol=2e-5, atol=2e-5)
    encoded = encode_tiled(shrink, grow(latent), tile, overlap, PIXELS)
    torch.testing.assert_close(encoded, latent, rtol=2e-5, atol=2e-5)


def test_one_tile_is_the_whole_to_the_bit(vae: Vae):
    latent, pixels = torch.randn(1, 4, 12, 16), torch.rand(1, 3, 48, 64) * 2 - 1
    assert torch.equal(decode_tiled(vae.decode, latent, 16, 4, PIXELS), vae.decode(latent))

    def encode(some: Tensor) -> Tensor:
        return vae.encode(some).mean

    assert torch.equal(encode_tiled(encode, pixels, 16, 4, PIXELS), encode(pixels))


def test_seams_are_small_and_shrink_with_overlap(vae: Vae):
    """Root mean square over the picture's own deviation. Never 0: norms and attention see a tile for the picture."""
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    whole = vae.decode(latent)

    def error(tile: int, overlap: int) -> float:
        tiled = decode_tiled(vae.decode, latent, tile, overlap, PIXELS)
        return float((tiled - whole).square().mean().sqrt() / whole.std())

    errors = [error(24, 12), error(16, 8), error(16, 2)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.5, errors


def test_from_one_tile_to_the_next_there_is_no_jump():
    """Where every tile is of a colour of its own, the way from one to the next takes about as long as they overlap."""
    colours = iter(range(100))

    def paint(latent: Tensor) -> Tensor:
        return torch.full_like(grow(latent), next(colours))

    (row,) = decode_tiled(paint, torch.zeros(1, 1, 8, 60), 16, 6, PIXELS)[0, 0, :1]
    assert row[0] == 0 and row[-1] == next(colours) - 1
    assert row.diff().min() >= 0 and row.diff().max() < 2.5 / (6 * PIXELS)


def test_no_tile_is_larger_than_was_asked():
    seen: list[tuple[int, ...]] = []

    def watched(work: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (seen.append(tuple(x.shape[2:])), work(x))[1]

    decode_tiled(watched(grow), torch.zeros(1, 4, 40, 30), 16, 4, PIXELS)
    assert set(seen) == {(16, 16)} and len(seen) == 3 * 3
    seen.clear()
    encode_tiled(watched(shrink), torch.zeros(1, 3, 160, 40), 16, 4, PIXELS)
    assert set(seen) == {(64, 40)}


def test_the_answer_has_the_type_of_the_work():
    latent = torch.randn(1, 4, 20, 20).bfloat16()
    assert decode_tiled(grow, latent, 16, 4, PIXELS).dtype == torch.bfloat16
    assert decode_tiled(lambda z: grow(z.float()), latent, 16, 4, PIXELS).dtype == torch.float32


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_a_tile_that_is_none_is_refused(tile: int, overlap: int):
    with pytest.raises(BadInput, match=f"tile {tile} with overlap {overlap}: needs"):
        decode_tiled(grow, torch.zeros(1, 4, 20, 20), tile, overlap, PIXELS)


def test_each_side_that_is_worth_trying_has_half_the_area_of_the_one_before():
    assert sides(64, 64) == [45, 32, 23, 16] and sides(30, 32) == [23, 16]
    assert sides(SMALLEST, SMALLEST) == sides(8, 3) == []
