"""Noise sources: seeds as elsewhere, one Brownian path at every step count."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sumuk.base.errors import BadInput
from sumuk.diffusion.grid import make_grid
from sumuk.diffusion.noise import BrownianPath, ImageNoise, slerp
from sumuk.diffusion.schedule import Flow, scaled_linear, zero_terminal_snr

SD = scaled_linear()
SHAPE = (1, 4, 8, 8)
NOW, THEN = SD.level(700.0), SD.level(500.0)


def reference(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**63 + 11, 2**64 - 1])
def test_the_initial_noise_is_what_a_cpu_generator_draws_first(seed: int):
    noise = ImageNoise(seed, SHAPE)
    assert torch.equal(noise.initial(), torch.randn(SHAPE, generator=reference(seed)))
    noise(NOW, THEN)
    assert torch.equal(noise.initial(), torch.randn(SHAPE, generator=reference(seed)))


def test_steps_continue_the_generator_as_a_diffusers_pipeline_does():
    diffusers = pytest.importorskip("diffusers")
    generator = reference(5)
    x = torch.randn(SHAPE, generator=generator)
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(3)
    noise, seen = ImageNoise(5, SHAPE), []
    noise.initial()
    for i, time in enumerate(scheduler.timesteps):
        # a network that answers 0 leaves x, so what step adds to the deterministic part is sigma_up * noise
        scheduler.is_scale_input_called = True
        stepped = scheduler.step(torch.zeros(SHAPE), time, x, generator=generator).prev_sample
        here, there = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        up = (there**2 * (here**2 - there**2) / here**2).sqrt()
        seen.append((stepped - x, up * noise(NOW, THEN)))
        x = stepped
    for theirs, ours in seen:
        assert torch.allclose(theirs, ours, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch_or_on_global_draws():
    alone = [ImageNoise(9, SHAPE)(NOW, THEN)]
    first, second = ImageNoise(9, SHAPE), ImageNoise(10, SHAPE)
    torch.rand(5)
    second(NOW, THEN)
    assert torch.equal(first(NOW, THEN), alone[0])
    before = torch.random.get_rng_state()
    BrownianPath(9, SHAPE)(NOW, THEN)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_drawn_in_float32_whatever_is_handed_out():
    half = ImageNoise(3, SHAPE, torch.float16)
    assert torch.equal(half.initial(), ImageNoise(3, SHAPE).initial().half())
    assert torch.equal(half(NOW, THEN), ImageNoise(3, SHAPE)(NOW, THEN).half())
    path = BrownianPath(3, SHAPE, torch.bfloat16)(NOW, THEN)
    assert torch.equal(path, BrownianPath(3, SHAPE)(NOW, THEN).bfloat16())


def test_variation_seed_is_the_web_uis_slerp():
    one, other = (torch.randn(SHAPE, generator=reference(seed)) for seed in (1, 2))
    noise = ImageNoise(1, SHAPE, subseed=2, subseed_strength=0.3)
    # by hand for one column: the web UI takes a (C, h, w) noise and angles along its dimension 1
    low, high = one[0, 2, :, 5].double(), other[0, 2, :, 5].double()
    angle = math.acos(float(low @ high / (low.norm() * high.norm())))
    column = (math.sin(0.7 * angle) * low + math.sin(0.3 * angle) * high) / math.sin(angle)
    assert torch.allclose(noise.initial()[0, 2, :, 5].double(), column, atol=1e-5)
    assert torch.allclose(ImageNoise(1, SHAPE, subseed=2, subseed_strength=1.0).initial(), other, atol=1e-5)
    assert torch.equal(ImageNoise(1, SHAPE, subseed=2).initial(), one)
    assert torch.allclose(ImageNoise(1, SHAPE, subseed=1, subseed_strength=0.4).initial(), one, atol=1e-6)
    assert torch.equal(noise(NOW, THEN), ImageNoise(1, SHAPE)(NOW, THEN))


def test_slerp_of_one_row_columns_is_finite():
    low, high = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 0.5]])
    assert torch.allclose(slerp(low, high, 0.25), 0.75 * low + 0.25 * high, atol=1e-6)


# The Brownian path.


@pytest.mark.parametrize("schedule", [SD, zero_terminal_snr(SD), Flow()])
def test_increments_of_adjoining_steps_add_up(schedule):
    for name, steps in (("trailing", 12), ("karras", 9)):
        grid = make_grid(name, schedule, steps)
        path = BrownianPath(4, SHAPE)
        whole = BrownianPath(4, SHAPE).increment(grid[0], grid[-1])
        assert torch.allclose(sum(path.increment(*pair) for pair in pairwise(grid)), whole, atol=1e-9)
        a, b, c = grid[2], grid[5], grid[8]
        assert torch.allclose(path.increment(c, a), -path.increment(a, b) - path.increment(b, c), atol=1e-9)


def test_the_path_does_not_depend_on_the_order_or_number_of_questions():
    fine, coarse = make_grid("karras", SD, 40), make_grid("karras", SD, 8)
    walked, asked = BrownianPath(11, SHAPE), BrownianPath(11, SHAPE)
    for now, then in pairwise(fine):
        walked(now, then)
    assert torch.equal(walked(coarse[3], coarse[4]), asked(coarse[3], coarse[4]))
    assert not torch.equal(asked(coarse[3], coarse[4]), BrownianPath(12, SHAPE)(coarse[3], coarse[4]))
    # its seeds do not wrap at 32 bits
    wrapped = BrownianPath(11 + 2**32, SHAPE)(coarse[3], coarse[4])
    assert not torch.equal(asked(coarse[3], coarse[4]), wrapped)


def test_answers_are_unit_normal_and_independent_step_to_step_and_of_the_initial_noise():
    grid = make_grid("karras", SD, 10)
    shape = (1, 4, 64, 64)
    pool = 4 * 64 * 64
    path = BrownianPath(21, shape)
    answers = [ImageNoise(21, shape).initial()] + [path(*pair) for pair in pairwise(grid)]
    table = torch.stack([answer.flatten() for answer in answers]).double()
    covariance = table @ table.T / pool
    # products of independent unit normals average to 0 within 1 / sqrt(pool); five times that is allowed
    off = (covariance - torch.eye(len(answers), dtype=torch.float64)).abs()
    assert off.max() < 5 * math.sqrt(2 / pool)
    assert table.mean(1).abs().max() < 5 / math.sqrt(pool)
    assert ((table**4).mean(1) - 3).abs().max() < 5 * math.sqrt(96 / pool)


def test_variance_over_many_seeds_of_a_short_and_of_an_infinite_step():
    zero = Flow()
    short = (SD.at_ratio(0.0301), SD.at_ratio(0.03))
    endless = (zero.noisiest, zero.level(400.0))
    for pair in (short, endless, (zero.noisiest, zero.clean)):
        values = torch.stack([BrownianPath(seed, (1, 1))(*pair) for seed in range(400)])
        assert values.isfinite().all()
        assert float(values.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / 400))
        assert float(values.mean()) == pytest.approx(0.0, abs=5 / 20)


def test_nothing_but_the_last_value_is_kept():
    path = BrownianPath(2, SHAPE)
    for steps in (5, 30):
        grid = make_grid("karras", SD, steps)
        for pair in pairwise(grid):
            path(*pair)
    held = [value for value in vars(path).values() if isinstance(value, torch.Tensor)]
    assert held == [] and path._last is not None and path._last[1].shape == SHAPE


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, None])
def test_bad_seeds(seed: object):
    for source in (ImageNoise, BrownianPath):
        with pytest.raises(BadInput, match=r"seed must be a whole number from 0 to 2\^64 - 1"):
            source(seed, SHAPE)


def test_bad_settings():
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match=f"subseed_strength must lie between 0 and 1, got {strength}"):
            ImageNoise(1, SHAPE, subseed=2, subseed_strength=strength)
    with pytest.raises(BadInput, match=r"subseed_strength 0.5 needs a subseed"):
        ImageNoise(1, SHAPE, subseed_strength=0.5)
    with pytest.raises(BadInput, match="subseed must be a whole number"):
        ImageNoise(1, SHAPE, subseed=-2, subseed_strength=0.5)
    with pytest.raises(BadInput, match="positive sizes"):
        ImageNoise(1, (1, 0, 8))
    with pytest.raises(BadInput, match="height and width"):
        ImageNoise(1, (16,), subseed=2, subseed_strength=0.5)
    with pytest.raises(BadInput, match="no noise lies between"):
        BrownianPath(1, SHAPE)(NOW, NOW)
