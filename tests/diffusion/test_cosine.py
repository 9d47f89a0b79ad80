"""The continuous cosine process against its published formulas and diffusers' scheduler."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.diffusion.toy import Listed, Mixture, difference, run, start

from sumuk.base.errors import BadInput
from sumuk.diffusion.ancestral import DDPM, ancestral_split
from sumuk.diffusion.cosine import ContinuousCosine
from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.diffusion.schedule import Level
from sumuk.diffusion.solver import transit

PLAIN = ContinuousCosine()
SHIFTED = ContinuousCosine(2.0)
START = math.cos(0.008 / 1.008 * math.pi / 2) ** 2


def published(t: np.ndarray, shift: float) -> np.ndarray:
    """Log signal-to-noise ratio of a walk, from the formulas."""
    kept = (np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / START).clip(1e-4, 0.9999)
    limits = [np.log(end / (1 - end)) for end in (1e-4, 0.9999)]
    return (np.log(kept / (1 - kept)) + 2 * np.log(1 / shift)).clip(*limits)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 4.0])
def test_a_walk_sees_the_published_levels(shift: float) -> None:
    t = np.linspace(1, 0, 401)
    schedule = ContinuousCosine(shift)
    ours = np.array([2 * schedule.shifted(one).half_log_snr for one in t])
    assert np.abs(ours - published(t, shift)).max() < 1e-9


def test_the_network_is_told_the_unshifted_inverse() -> None:
    for t in np.linspace(0.05, 0.95, 19):
        level = SHIFTED.shifted(t)
        told = math.acos(level.alpha * math.sqrt(START)) / (math.pi / 2) * 1.008 - 0.008
        assert level.time == pytest.approx(told, abs=1e-12) and level.time > t
        assert PLAIN.shifted(t).time == pytest.approx(t, abs=1e-12)
    assert SHIFTED.shifted(1.0).time == SHIFTED.last == pytest.approx(0.993584, abs=1e-6)
    assert (SHIFTED.first, SHIFTED.last) == (PLAIN.first, PLAIN.last)


@settings(deadline=None)
@given(share=st.floats(0, 1))
def test_times_survive_the_way_to_a_level_and_back(share: float) -> None:
    time = min(PLAIN.first + share * (PLAIN.last - PLAIN.first), PLAIN.last)
    level = PLAIN.level(time)
    assert level.time == pytest.approx(time, rel=1e-12, abs=1e-13)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-14)
    again = PLAIN.at_ratio(level.ratio)
    assert (again.alpha, again.sigma) == pytest.approx((level.alpha, level.sigma), rel=1e-12)


def test_ends() -> None:
    assert PLAIN.noisiest.alpha**2 == pytest.approx(1e-4) and PLAIN.noisiest.time == PLAIN.last
    assert PLAIN.least.sigma**2 == pytest.approx(1e-4) and PLAIN.least.time == PLAIN.first
    assert PLAIN.clean.time == PLAIN.first and PLAIN.at_ratio(math.inf).time == PLAIN.last
    falling = [PLAIN.level(PLAIN.first + (PLAIN.last - PLAIN.first) * i / 50).alpha for i in range(51)]
    assert all(now > then for now, then in pairwise(falling))


def test_what_lies_outside_is_refused() -> None:
    for time in (0.0, 0.999, math.nan):
        with pytest.raises(BadInput, match="outside the trained range"):
            PLAIN.level(time)
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match="between 0 and 1"):
            PLAIN.shifted(t)
    for shift in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match=f"cosine shift must be above 0, got {shift}"):
            ContinuousCosine(shift)


def reference() -> Any:
    """diffusers' scheduler, with its two constants in float64."""
    scheduler = pytest.importorskip("diffusers").DDPMWuerstchenScheduler()
    scheduler.s = torch.tensor([0.008], dtype=torch.float64)
    scheduler._init_alpha_cumprod = torch.tensor([START], dtype=torch.float64)
    return scheduler


def test_levels_equal_diffusers() -> None:
    scheduler = reference()
    t = torch.linspace(1, 0, 501, dtype=torch.float64)
    theirs = scheduler._alpha_cumprod(t, t.device).numpy()
    ours = np.array([PLAIN.shifted(float(one)).alpha ** 2 for one in t])
    assert np.abs(ours - theirs).max() < 1e-14


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_a_walk_equals_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps; the last one goes without noise to the quietest level instead of to the picture."""
    mixture = Mixture()
    scheduler = reference()
    scheduler.set_timesteps(timesteps=torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", Listed())
    levels: list[Level] = [PLAIN.shifted(float(t)) for t in scheduler.timesteps]
    theirs = first = start(levels[0])
    for t, at in zip(scheduler.timesteps[:-1], levels, strict=False):
        predicted = PREDICTIONS["eps"].output(theirs, mixture(theirs, at), at)
        theirs = scheduler.step(predicted, t[None].expand(2), theirs).prev_sample
    ours = run(DDPM(), first, levels[:-1], mixture, Listed()) if steps > 1 else first
    now, then = levels[-2:]
    ours = transit(ours, mixture(ours, now), now, ancestral_split(now, then, 1.0)[0])
    assert difference(ours, theirs) < 1e-12
