from __future__ import annotations

import math

import pytest
import torch

from sumuk.nets.layers import Downsample, ResBlock, Upsample, timestep_embedding


def test_time_embedding_follows_the_formula_digit_by_digit() -> None:
    got = timestep_embedding(torch.tensor([7.5]), 4)
    low = 7.5 * 10_000**-0.5
    want = [math.cos(7.5), math.cos(low), math.sin(7.5), math.sin(low)]
    assert got.tolist()[0] == pytest.approx(want, abs=1e-6)

    got = timestep_embedding(torch.tensor([7.5]), 4, ddpm=True)
    low = 7.5 * 10_000**-1.0
    want = [math.sin(7.5), math.sin(low), math.cos(7.5), math.cos(low)]
    assert got.tolist()[0] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("ddpm", [False, True])
def test_time_embedding_equals_diffusers(ddpm: bool) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 0.25, 1.0, 500.0, 998.7, 999.0])
    want = embeddings.get_timestep_embedding(
        t, 128, flip_sin_to_cos=not ddpm, downscale_freq_shift=float(ddpm)
    )
    torch.testing.assert_close(timestep_embedding(t, 128, ddpm=ddpm), want, atol=2e-4, rtol=0)
    exact = embeddings.get_timestep_embedding(
        t.double(), 128, flip_sin_to_cos=not ddpm, downscale_freq_shift=float(ddpm)
    )
    torch.testing.assert_close(
        timestep_embedding(t, 128, ddpm=ddpm).double(), exact.double(), atol=2e-4, rtol=0
    )


def test_time_embedding_tells_neighbouring_times_apart_in_low_precision() -> None:
    a, b = timestep_embedding(torch.tensor([998, 999]), 32)
    assert a.dtype == torch.float32
    assert (a - b).abs().max() > 0.5
    assert timestep_embedding(torch.tensor([3], device="meta"), 32).device.type == "meta"


@pytest.mark.parametrize(("width", "ddpm"), [(5, False), (0, False), (2, True)])
def test_time_embedding_refuses_unusable_widths(width: int, ddpm: bool) -> None:
    with pytest.raises(ValueError, match=str(width)):
        timestep_embedding(torch.zeros(1), width, ddpm=ddpm)


def test_resampling_rounds_up_and_reaches_the_size_asked_for() -> None:
    x = torch.randn(2, 8, 7, 5)
    small = Downsample(8)(x)
    assert small.shape == (2, 8, 4, 3)
    assert Upsample(8)(small).shape == (2, 8, 8, 6)
    assert Upsample(8)(small, (7, 5)).shape == (2, 8, 7, 5)


def test_upsampling_repeats_every_pixel() -> None:
    layer = Upsample(1)
    torch.nn.init.dirac_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    x = torch.randn(1, 1, 3, 2)
    torch.testing.assert_close(layer(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_untrained_residual_block_is_its_skip() -> None:
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    torch.testing.assert_close(ResBlock(32, 32, 16)(x, emb), x)
    wider = ResBlock(32, 64, 16)
    torch.testing.assert_close(wider(x, emb), wider.skip_connection(x))
