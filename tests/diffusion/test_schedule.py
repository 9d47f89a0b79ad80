"""Schedules against diffusers, k-diffusion and their papers; level <-> time both ways."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity import kdiffusion

from sumuk.base.errors import BadInput
from sumuk.diffusion.schedule import (
    ContinuousVP,
    Discrete,
    Flow,
    Level,
    VarianceExploding,
    cosine,
    linear,
    resolution_shift,
    scaled_linear,
    zero_terminal_snr,
)

SD = scaled_linear()
DISCRETE = {
    "linear": (linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (SD, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "squaredcos_cap_v2": (cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}
SCHEDULES = {
    "linear": linear(),
    "sd": SD,
    "cosine": cosine(),
    "ztsnr": zero_terminal_snr(SD),
    "vp": ContinuousVP(),
    "ve": VarianceExploding(),
    "flow": Flow(),
    "sd3": Flow(shift=3.0),
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", DISCRETE)
def test_cumulative_alphas_equal_diffusers(name: str, zero: bool):
    diffusers = pytest.importorskip("diffusers")
    ours, settings = DISCRETE[name]
    if zero:
        ours = zero_terminal_snr(ours)
    theirs = diffusers.DDPMScheduler(**settings, rescale_betas_zero_snr=zero).alphas_cumprod
    difference = np.abs(np.array(ours.alphas_cumprod) - theirs.double().numpy())
    assert difference.max() < 1e-6  # theirs is a product of a thousand float32 numbers
    if zero:
        assert ours.alphas_cumprod[-1] == 0.0 and ours.noisiest.is_pure_noise


def test_cumulative_alphas_in_float64():
    for ours, betas in [
        (linear(), np.linspace(1e-4, 0.02, 1000)),
        (SD, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ]:
        assert np.allclose(ours.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12, atol=0)


@settings(deadline=None)
@given(t=st.floats(0, 999))
def test_time_to_sigma_equals_k_diffusion(t: float):
    table = torch.tensor([SD.level(float(k)).ratio for k in range(1000)], dtype=torch.float64)
    wrapper = kdiffusion.external().DiscreteSchedule(table, quantize=False)
    exact = torch.tensor(t, dtype=torch.float32)  # it casts times to float32
    ratio = SD.level(float(exact)).ratio
    assert ratio == pytest.approx(float(wrapper.t_to_sigma(exact)), rel=1e-6)
    back = float(wrapper.sigma_to_t(torch.tensor([ratio], dtype=torch.float64)))
    assert SD.at_ratio(ratio).time == pytest.approx(back, abs=1e-6)


@settings(deadline=None)
@given(name=st.sampled_from(list(SCHEDULES)), share=st.floats(0, 1))
def test_times_survive_the_way_to_a_level_and_back(name: str, share: float):
    schedule = SCHEDULES[name]
    time = min(schedule.first + share * (schedule.last - schedule.first), schedule.last)
    level = schedule.level(time)
    assert level.time == pytest.approx(time, rel=1e-9, abs=1e-6)
    assert 0 <= level.alpha <= 1 and level.sigma >= 0


@settings(deadline=None)
@given(name=st.sampled_from(list(SCHEDULES)), share=st.floats(0.001, 0.999))
def test_ratios_survive_the_way_to_a_level_and_back(name: str, share: float):
    schedule = SCHEDULES[name]
    level = schedule.level(schedule.first + share * (schedule.last - schedule.first))
    again = schedule.at_ratio(level.ratio)
    assert (again.alpha, again.sigma) == pytest.approx((level.alpha, level.sigma), rel=1e-9)
    assert math.exp(-2 * level.half_log_snr) == pytest.approx(level.ratio**2, rel=1e-9)
    assert level.with_ratio(level.ratio / 2).ratio == pytest.approx(level.ratio / 2, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_law_of_each_process_and_its_ends(name: str):
    schedule = SCHEDULES[name]
    for share in (0.0, 0.1, 0.5, 0.9, 0.9995, 1.0):
        level = schedule.level(schedule.first + share * (schedule.last - schedule.first))
        if name in ("flow", "sd3"):
            assert level.alpha + level.sigma == pytest.approx(1, abs=1e-12)
        elif name == "ve":
            assert level.alpha == 1
        else:
            assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12)
    assert schedule.clean.ratio == 0 and schedule.clean.half_log_snr == math.inf
    assert schedule.clean.time == schedule.first
    assert schedule.noisiest.time == schedule.last and schedule.noisiest.ratio > schedule.least.ratio
    endless = schedule.at_ratio(math.inf)
    assert endless.time == schedule.last and (name == "ve" or (endless.alpha, endless.sigma) == (0.0, 1.0))


def test_continuous_vp_is_equation_33():
    schedule = ContinuousVP(0.1, 20.0)
    for t in (1e-5, 0.01, 0.4, 1.0):
        integral = 0.1 * t + 0.5 * (20.0 - 0.1) * t * t
        level = schedule.level(999 * t)
        assert level.alpha == pytest.approx(math.exp(-0.5 * integral), rel=1e-12)
        assert level.sigma**2 == pytest.approx(-math.expm1(-integral), rel=1e-9)


@settings(deadline=None)
@given(share=st.floats(0, 1), name=st.sampled_from(list(SCHEDULES)), pick=st.floats(0.01, 0.9))
def test_between_lies_between(share: float, name: str, pick: float):
    schedule = SCHEDULES[name]
    middle = schedule.first + pick * (schedule.last - schedule.first)
    for now, then in ((schedule.noisiest, schedule.level(middle)), (schedule.level(middle), schedule.clean)):
        level = now.between(then, share)
        slack = 1e-9 * level.ratio if math.isfinite(level.ratio) else 0.0
        assert then.ratio - slack <= level.ratio <= now.ratio + slack


def test_between_is_the_middle_in_half_log_snr():
    now, then = SD.level(800.0), SD.level(300.0)
    assert now.between(then).ratio == pytest.approx(math.sqrt(now.ratio * then.ratio), rel=1e-12)


def test_flow_shift_is_sd3s_equation_23():
    for shift in (0.5, 1.0, 3.0, resolution_shift(1024)):
        for t in (0.0, 0.2, 0.9, 1.0):
            level = Flow(shift=shift).shifted(t)
            assert level.sigma == pytest.approx(shift * t / (1 + (shift - 1) * t), abs=1e-15)


def test_levels_are_values():
    assert Level(0.6, 0.8, SD) == Level(0.6, 0.8, Flow()) and hash(Level(0.6, 0.8, SD)) is not None
    assert SD.level(12) == SD.level(12.0)


@pytest.mark.parametrize("time", [-0.1, 999.5, math.nan, math.inf])
def test_times_outside_the_table_are_refused(time: float):
    with pytest.raises(BadInput, match="outside the trained range 0 to 999"):
        SD.level(time)


def test_bad_schedules():
    for values in ([], [0.5], [0.5, 0.5], [0.5, 0.6], [1.0, 0.5], [0.5, -0.1], [0.5, math.nan]):
        with pytest.raises(BadInput, match="cumulative alphas must fall"):
            Discrete(values)
    for shift in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match=f"flow shift must be above 0, got {shift}"):
            Flow(shift=shift)
