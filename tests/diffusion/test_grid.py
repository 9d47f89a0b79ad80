"""Step spacings against diffusers, k-diffusion and scipy, and what every spacing must keep."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity import kdiffusion

from sumuk.base.errors import BadInput
from sumuk.diffusion.grid import GRIDS, beta_quantile, from_sigmas, make_grid, part
from sumuk.diffusion.schedule import (
    ContinuousVP,
    Flow,
    Level,
    VarianceExploding,
    linear,
    resolution_shift,
    scaled_linear,
    zero_terminal_snr,
)

SD = scaled_linear()
ZERO = zero_terminal_snr(SD)
SCHEDULES = {
    "sd": SD,
    "ztsnr": ZERO,
    "vp": ContinuousVP(),
    "ve": VarianceExploding(),
    "flow": Flow(),
    "sd3": Flow(shift=3.0),
}
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def theirs(name: str, steps: int, **settings: object) -> tuple[list[float], list[float]]:
    """Times and sigmas (with the final 0) of a diffusers scheduler whose table is computed in float64."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(**{**SD_BETAS, **settings})
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.timesteps]
    return times, [float(s) for s in scheduler.sigmas] if hasattr(scheduler, "sigmas") else []


def times_of(grid: list[Level]) -> list[float]:
    return [level.time for level in grid[:-1]]


def ratios_of(grid: list[Level]) -> list[float]:
    return [level.ratio for level in grid]


# What every spacing keeps, on every process.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
def test_every_spacing_falls_strictly_or_refuses_with_an_alternative(name: str, schedule: str, steps: int):
    process = SCHEDULES[schedule]
    try:
        grid = make_grid(name, process, steps)
    except BadInput as refusal:
        assert (name, steps) in {("leading", 1), ("ldm-ddim", 1), ("turbo", 20), ("turbo", 50)} or (
            name == "uniform" and schedule in ("sd", "ztsnr")
        )
        assert "use " in str(refusal)
        return
    assert len(grid) == steps + 1 and grid[-1].is_clean
    assert all(now.half_log_snr < then.half_log_snr for now, then in pairwise(grid))
    assert all(level.schedule is process for level in grid)
    starts_low = {"leading", "ldm-ddim", "lcm"}
    if name not in starts_low and schedule != "ztsnr":
        assert grid[0].ratio == pytest.approx(process.noisiest.ratio, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(GRIDS)), schedule=st.sampled_from(list(SCHEDULES)), steps=st.integers(1, 1100)
)
def test_any_step_count_gives_a_falling_grid_or_bad_input(name: str, schedule: str, steps: int):
    try:
        grid = make_grid(name, SCHEDULES[schedule], steps)
    except BadInput:
        return
    assert len(grid) == steps + 1
    assert all(now.ratio > then.ratio for now, then in pairwise(grid))
    assert all(0 <= level.alpha <= 1 and level.sigma >= 0 for level in grid)


def test_spacings_by_time_begin_a_zero_terminal_snr_model_in_pure_noise_and_those_by_ratio_just_below():
    for name in ("trailing", "linspace", "normal", "sgm-uniform", "simple", "beta", "turbo"):
        assert make_grid(name, ZERO, 4)[0].is_pure_noise, name
    below = ZERO.level(998.0).ratio
    assert 2000 < below < 3000
    for name in ("karras", "exponential", "polyexponential", "beta-sigma"):
        assert make_grid(name, ZERO, 4)[0].ratio == pytest.approx(below, rel=1e-12), name
    assert all(
        make_grid(n, Flow(), 8)[0].is_pure_noise for n in ("karras", "exponential", "uniform", "normal")
    )


# diffusers, by time.


@pytest.mark.parametrize("steps", [2, 4, 7, 20, 30, 50, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_whole_times_equal_ddims(spacing: str, steps: int):
    times, _ = theirs("DDIMScheduler", steps, timestep_spacing=spacing, steps_offset=1)
    assert times_of(make_grid(spacing, SD, steps)) == times


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_whole_times_equal_dpm_solvers_with_one_level_dropped(spacing: str, steps: int):
    times, sigmas = theirs("DPMSolverMultistepScheduler", steps, timestep_spacing=spacing, steps_offset=1)
    grid = make_grid(spacing, SD, steps, **({} if spacing == "trailing" else {"dropped": 1}))
    assert times_of(grid) == times
    assert ratios_of(grid) == pytest.approx(sigmas, rel=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_turbo_equals_euler_trailing(steps: int):
    times, sigmas = theirs("EulerDiscreteScheduler", steps, timestep_spacing="trailing")
    grid = make_grid("turbo", SD, steps)
    assert times_of(grid) == times == times_of(make_grid("trailing", SD, steps))
    assert ratios_of(grid) == pytest.approx(sigmas, rel=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 50])
def test_lcm_equals_diffusers(steps: int):
    times, _ = theirs("LCMScheduler", steps)
    assert times_of(make_grid("lcm", SD, steps)) == times
    short, _ = theirs("LCMScheduler", min(steps, 20), original_inference_steps=20)
    assert times_of(make_grid("lcm", SD, min(steps, 20), original=20)) == short


@pytest.mark.parametrize("steps", [2, 10, 20, 25, 50, 100, 500])
def test_ldm_ddim_is_its_published_range(steps: int):
    assert times_of(make_grid("ldm-ddim", SD, steps)) == [k + 1 for k in range(0, 1000, 1000 // steps)][::-1]


def test_ldm_ddim_refuses_counts_that_its_range_does_not_hit():
    with pytest.raises(BadInput, match="exactly 30 steps; use 25 or 'leading'"):
        make_grid("ldm-ddim", SD, 30)


def test_sgm_uniform_and_simple_by_hand():
    assert times_of(make_grid("sgm-uniform", SD, 4)) == pytest.approx([999, 749.25, 499.5, 249.75], abs=1e-9)
    assert times_of(make_grid("simple", SD, 3)) == [999, 999 - 333, 999 - 666]
    assert times_of(make_grid("simple", SD, 4)) == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_beta_over_time_is_rounded_scipy_quantiles(steps: int):
    stats = pytest.importorskip("scipy.stats")
    places = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * 999)
    assert times_of(make_grid("beta", SD, steps)) == list(places)


# diffusers and k-diffusion, by amount of noise.


@pytest.mark.parametrize("steps", [2, 10, 25])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
        ("beta-sigma", "use_beta_sigmas"),
    ],
)
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_sigmas_equal_diffusers(scheduler: str, name: str, setting: str, steps: int):
    pytest.importorskip("scipy")
    _, sigmas = theirs(scheduler, steps, timestep_spacing="linspace", **{setting: True})
    assert ratios_of(make_grid(name, SD, steps)) == pytest.approx(sigmas, rel=1e-6)


def test_network_times_between_trained_ones_equal_eulers():
    times, _ = theirs("EulerDiscreteScheduler", 12, timestep_spacing="linspace", use_karras_sigmas=True)
    assert times_of(make_grid("karras", SD, 12)) == pytest.approx(times, rel=1e-6, abs=2e-4)


@pytest.mark.parametrize("steps", [2, 10, 33])
def test_sigmas_equal_k_diffusion(steps: int, float64: None):
    k = kdiffusion.sampling()
    low, high = SD.least.ratio, SD.noisiest.ratio
    for ours, reference in [
        (make_grid("karras", SD, steps), k.get_sigmas_karras(steps, low, high)),
        (
            make_grid("karras", SD, steps, rho=3.0, least=0.1, most=9.0),
            k.get_sigmas_karras(steps, 0.1, 9.0, 3.0),
        ),
        (make_grid("exponential", SD, steps), k.get_sigmas_exponential(steps, low, high)),
        (
            make_grid("polyexponential", SD, steps, rho=1.7),
            k.get_sigmas_polyexponential(steps, low, high, 1.7),
        ),
        (make_grid("uniform", ContinuousVP(), steps), k.get_sigmas_vp(steps, 19.9, 0.1, 1e-3)),
    ]:
        assert ratios_of(ours) == pytest.approx(reference.tolist(), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_normal_equals_k_diffusions_get_sigmas(steps: int, float64: None):
    table = torch.tensor([SD.level(float(t)).ratio for t in range(1000)])
    reference = kdiffusion.external().DiscreteSchedule(table, quantize=False).get_sigmas(steps)
    # it casts times to float32, worth 999 * 6e-8 of a step
    assert ratios_of(make_grid("normal", SD, steps)) == pytest.approx(reference.tolist(), rel=1e-6)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_uniform_on_ve_is_geometric():
    ratios = ratios_of(make_grid("uniform", VarianceExploding(0.01, 50.0), 9, until=0.0001))[:-1]
    falls = [math.log(a / b) for a, b in pairwise(ratios)]
    assert falls == pytest.approx([(1 - 1e-4) * math.log(5000) / 8] * 8, rel=1e-9)


# Flow.


def flow_match(**settings: object):
    return pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(**settings)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.6])
@pytest.mark.parametrize("steps", [2, 9, 28])
def test_normal_flow_equals_flow_match_euler_with_its_shift(shift: float, steps: int):
    scheduler = flow_match(shift=shift)
    scheduler.set_timesteps(steps)
    grid = make_grid("normal", Flow(shift=shift), steps)
    # their ends are kept in float32
    assert [level.sigma for level in grid] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    assert times_of(grid) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_uniform_flow_equals_flux_with_its_resolution_shift(tokens: int, steps: int):
    scheduler = flow_match(use_dynamic_shifting=True)
    mu = math.log(resolution_shift(tokens))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    grid = make_grid("uniform", Flow(shift=resolution_shift(tokens)), steps)
    assert [level.sigma for level in grid] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


def test_resolution_shift_is_fluxs_line():
    assert math.log(resolution_shift(256)) == pytest.approx(0.5, abs=1e-12)
    assert math.log(resolution_shift(4096)) == pytest.approx(1.15, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
        ("beta-sigma", "use_beta_sigmas"),
    ],
)
def test_flow_interpolates_t_as_diffusers_does(name: str, setting: str):
    pytest.importorskip("scipy")
    scheduler = flow_match(shift=3.0, **{setting: True})
    scheduler.set_timesteps(11)
    plain = flow_match(shift=3.0)
    plain.set_timesteps(11)
    grid = make_grid(name, Flow(shift=3.0), 11, least=float(plain.sigmas[-2]))
    assert [level.sigma for level in grid] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


# The rest.


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 2.0), (3.0, 0.4), (12.0, 7.0)])
def test_beta_quantile_equals_scipy(a: float, b: float):
    ppf = pytest.importorskip("scipy.stats").beta.ppf
    for share in [1e-9, 1e-4, *np.linspace(0.01, 0.99, 25), 1 - 1e-6]:
        assert beta_quantile(share, a, b) == pytest.approx(float(ppf(share, a, b)), rel=1e-9, abs=1e-12)
    assert beta_quantile(0.0, a, b) == 0.0 and beta_quantile(1.0, a, b) == 1.0


def test_final_level_may_be_the_least_trained():
    grid = make_grid("leading", SD, 20, final_clean=False)
    assert len(grid) == 21 and grid[-1] == SD.level(0.0) and grid[-2] == SD.level(1.0)
    with pytest.raises(BadInput, match="already ends at the least noise"):
        make_grid("karras", SD, 20, final_clean=False)


@pytest.mark.parametrize("count", [20, 50, 7])
def test_part_leaves_as_many_steps_as_diffusers_img2img(count: int):
    grid = make_grid("leading", SD, count)
    for strength in np.linspace(0.15, 1.0, 18):
        left = min(int(count * strength), count)
        tail = part(grid, float(strength))
        assert tail == grid[max(count - left, 0) :] and len(tail) == left + 1
    assert part(grid, 1.0) == grid
    with pytest.raises(BadInput, match=f"strength 0.01 of {count} steps leaves no step"):
        part(grid, 0.01)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_part_refuses_strengths_out_of_range(strength: float):
    with pytest.raises(BadInput, match=f"strength must be above 0 and at most 1, got {strength}"):
        part(make_grid("leading", SD, 5), strength)


def test_custom_sigmas():
    grid = from_sigmas(SD, [14.6, 6.0, 0.5])
    assert ratios_of(grid) == pytest.approx([14.6, 6.0, 0.5, 0.0])
    assert grid == from_sigmas(SD, [14.6, 6.0, 0.5, 0.0])
    assert len(from_sigmas(SD, [14.6, 0.5], final_clean=False)) == 2
    flow = from_sigmas(Flow(), [1.0, 0.75])
    assert [(level.alpha, level.sigma) for level in flow] == [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)]
    with pytest.raises(BadInput, match=r"at least two levels, got sigmas \[0\]"):
        from_sigmas(SD, [0])
    with pytest.raises(BadInput, match=r"must fall, got 2.0 followed by 2.0"):
        from_sigmas(SD, [3.0, 2.0, 2.0])
    with pytest.raises(BadInput, match=r"in \[0, 1\] for a flow, got 14.6"):
        from_sigmas(Flow(), [14.6, 1.0])
    for bad in (math.nan, -1.0, math.inf):
        with pytest.raises(BadInput, match=f"got {bad}"):
            from_sigmas(SD, [bad, 0.0])


@pytest.mark.parametrize("steps", [0, -3, 2.5, math.nan, True, "20"])
def test_bad_step_counts(steps: object):
    with pytest.raises(BadInput, match="whole number of at least 1"):
        make_grid("leading", SD, steps)


def test_bad_names_and_settings():
    with pytest.raises(BadInput, match="unknown step spacing 'karas'; did you mean 'karras'"):
        make_grid("karas", SD, 5)
    with pytest.raises(BadInput, match="'karras' has no setting 'rhoo'; did you mean 'rho'"):
        make_grid("karras", SD, 5, rhoo=7)
    with pytest.raises(BadInput, match="'trailing' has no setting 'rho'; it takes none"):
        make_grid("trailing", SD, 5, rho=7)
    for bad in ({"rho": 0.0}, {"rho": math.nan}, {"most": 0.001}, {"least": -1.0}):
        with pytest.raises(BadInput):
            make_grid("karras", SD, 5, **bad)
    for bad in ({"offset": 1.5}, {"dropped": -1}, {"offset": 999}):
        with pytest.raises(BadInput):
            make_grid("leading", SD, 5, **bad)
    with pytest.raises(BadInput, match="'beta' cannot place 900 different levels"):
        make_grid("beta", SD, 900)
    with pytest.raises(BadInput, match=r"1 to 50 steps .* got 51"):
        make_grid("lcm", SD, 51)
    with pytest.raises(BadInput, match="until of spacing 'uniform'"):
        make_grid("uniform", ContinuousVP(), 5, until=2.0)


def test_a_ladder_of_another_length():
    short = linear(100)
    assert times_of(make_grid("trailing", short, 4)) == [99, 74, 49, 24]
    assert times_of(make_grid("leading", short, 4)) == [76, 51, 26, 1]
