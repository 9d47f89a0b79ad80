"""Every row of the table on every process: target, clean and output agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumuk.base.errors import BadInput
from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.diffusion.schedule import (
    ContinuousVP,
    Flow,
    Level,
    VarianceExploding,
    cosine,
    scaled_linear,
    zero_terminal_snr,
)

SD = scaled_linear()
SCHEDULES = {
    "sd": SD,
    "cosine": cosine(),
    "ztsnr": zero_terminal_snr(SD),
    "vp": ContinuousVP(),
    "ve": VarianceExploding(),
    "flow": Flow(),
}
TORCH = torch.Generator().manual_seed(0)
CLEAN, NOISE = (torch.randn(1, 3, 4, 4, generator=TORCH, dtype=torch.float64) for _ in range(2))

levels = st.builds(
    lambda name, share: SCHEDULES[name].level(
        SCHEDULES[name].first + share * (SCHEDULES[name].last - SCHEDULES[name].first)
    ),
    st.sampled_from(list(SCHEDULES)),
    st.floats(0.001, 1.0),
)


@settings(deadline=None)
@given(name=st.sampled_from(list(PREDICTIONS)), at=levels)
def test_the_training_target_leads_back_to_the_picture(name: str, at: Level):
    row = PREDICTIONS[name]
    x = at.alpha * CLEAN + at.sigma * NOISE
    target = row.target(CLEAN, NOISE, at)
    if name == "eps" and at.is_pure_noise:
        with pytest.raises(BadInput, match="eps cannot start from pure noise"):
            row.clean(x, target, at)
        return
    # eps divides by alpha, which magnifies rounding by sigma / alpha
    slack = 1e-13 * max(at.ratio, 1.0) if name == "eps" else 1e-12
    assert torch.allclose(row.clean(x, target, at), CLEAN, rtol=0, atol=max(slack, 1e-12) * 10)


@settings(deadline=None)
@given(name=st.sampled_from(list(PREDICTIONS)), at=levels)
def test_output_inverts_clean(name: str, at: Level):
    row = PREDICTIONS[name]
    x = at.alpha * CLEAN + at.sigma * NOISE
    said = row.output(x, CLEAN, at)
    assert torch.allclose(said, row.target(CLEAN, NOISE, at), rtol=1e-9, atol=1e-11 / at.sigma)
    if not (name == "eps" and at.is_pure_noise):
        back = row.clean(x, said, at)
        assert torch.allclose(back, CLEAN, rtol=0, atol=1e-11 * max(at.ratio, 1.0 / at.sigma, 1.0))


def test_v_is_salimans_and_ho_and_diffusers():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
    )
    scheduler.alphas_cumprod = torch.tensor(SD.alphas_cumprod, dtype=torch.float64)
    for time in (0, 400, 999):
        theirs = scheduler.get_velocity(CLEAN, NOISE, torch.tensor([time]))
        assert torch.allclose(PREDICTIONS["v"].target(CLEAN, NOISE, SD.level(time)), theirs, atol=1e-12)


def test_at_pure_noise_all_but_eps_are_finite():
    at = zero_terminal_snr(SD).noisiest
    assert torch.equal(PREDICTIONS["v"].clean(NOISE, -CLEAN, at), CLEAN)
    assert torch.allclose(PREDICTIONS["flow"].clean(NOISE, NOISE - CLEAN, at), CLEAN, atol=1e-14)
    with pytest.raises(BadInput, match=r"alpha = 0\); use a v model"):
        PREDICTIONS["eps"].clean(NOISE, NOISE, at)


def test_names_as_other_programs_spell_them():
    aliases = {"epsilon": "eps", "v_prediction": "v", "sample": "clean", "flow_prediction": "flow"}
    for theirs, ours in aliases.items():
        assert PREDICTIONS[theirs] is PREDICTIONS[ours]
    with pytest.raises(BadInput, match="unknown prediction 'epsilom'"):
        PREDICTIONS["epsilom"]
