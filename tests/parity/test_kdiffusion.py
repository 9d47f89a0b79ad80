"""Our solvers give k-diffusion's numbers: same exact denoiser, same levels, same noise, float64.

Each case runs on the original's own process (alpha = 1) and, since the formulas must not care how x is
scaled, on a variance-preserving one. Three methods also on a rectified flow, where ComfyUI runs the same code
with sigma = t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from tests.diffusion.toy import Listed, Mixture, difference, run, start
from tests.parity import kdiffusion
from torch import Tensor

from sumuk.diffusion.ancestral import Ancestral, Churn, DPMppSDE
from sumuk.diffusion.multistep import LMS, DPMppM
from sumuk.diffusion.schedule import Flow, Level, Schedule, VarianceExploding, scaled_linear
from sumuk.diffusion.solver import DPM2, DPMpp2S, Euler, Heun, Solver

LIMIT = 1e-9
MIXTURE = Mixture()


@dataclass(frozen=True)
class Case:
    """A solver of ours, and the original's function with its arguments."""

    solver: Solver
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    one_step: bool = True
    """Whether the original survives a run of one step."""


CASES = {
    "euler": Case(Euler(), "sample_euler"),
    "euler-churn": Case(Churn(Euler(), 3.0, 0.1, 9.0, 1.01), "sample_euler"),
    "heun": Case(Heun(), "sample_heun"),
    "heun-churn": Case(Churn(Heun(), 3.0, 0.1, 9.0, 1.01), "sample_heun"),
    "dpm2": Case(DPM2(), "sample_dpm_2"),
    "dpm2-churn": Case(Churn(DPM2(), 3.0, 0.1, 9.0, 1.01), "sample_dpm_2"),
    "euler-ancestral": Case(Ancestral(Euler()), "sample_euler_ancestral"),
    "euler-ancestral-half": Case(
        Ancestral(Euler(), 0.5, 0.9), "sample_euler_ancestral", {"eta": 0.5, "s_noise": 0.9}
    ),
    "dpm2-ancestral": Case(Ancestral(DPM2()), "sample_dpm_2_ancestral"),
    "dpmpp-2s": Case(DPMpp2S(), "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp-2s-ancestral": Case(Ancestral(DPMpp2S()), "sample_dpmpp_2s_ancestral"),
    "dpmpp-sde": Case(DPMppSDE(), "sample_dpmpp_sde"),
    "dpmpp-sde-third": Case(
        DPMppSDE(0.7, 1.1, 0.3), "sample_dpmpp_sde", {"eta": 0.7, "s_noise": 1.1, "r": 0.3}
    ),
    "lms": Case(LMS(), "sample_lms"),
    "lms-3": Case(LMS(points=3), "sample_lms", {"order": 3}),
    "dpmpp-2m": Case(DPMppM(), "sample_dpmpp_2m"),
    "dpmpp-2m-sde": Case(DPMppM(eta=1.0), "sample_dpmpp_2m_sde", one_step=False),
    "dpmpp-2m-sde-ode": Case(DPMppM(), "sample_dpmpp_2m_sde", {"eta": 0.0}, one_step=False),
    "dpmpp-2m-sde-heun": Case(
        DPMppM(eta=1.0, kind="heun"), "sample_dpmpp_2m_sde", {"solver_type": "heun"}, one_step=False
    ),
    "dpmpp-3m-sde": Case(DPMppM(points=3, eta=1.0, kind="heun"), "sample_dpmpp_3m_sde", one_step=False),
    "dpmpp-3m-sde-half": Case(
        DPMppM(points=3, eta=0.5, s_noise=0.8, kind="heun"),
        "sample_dpmpp_3m_sde",
        {"eta": 0.5, "s_noise": 0.8},
        one_step=False,
    ),
}
TAKE_NOISE = ("ancestral", "sde")


def ratios(spacing: str, steps: int) -> list[float]:
    """Noise-to-picture ratios from 14.6 to 0.03, then 0."""
    if spacing == "karras":
        low, high = 0.03 ** (1 / 7), 14.6 ** (1 / 7)
        return [(high + i / max(steps - 1, 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    schedule = scaled_linear()
    return [schedule.level(999.0 * (1 - i / steps)).ratio for i in range(steps)] + [0.0]


def theirs(
    function: Callable[..., Tensor], x: Tensor, taus: Sequence[float], denoise: Any, arguments: dict[str, Any]
) -> Tensor:
    return function(
        lambda z, tau, **_: denoise(z, float(tau[0])),
        x,
        torch.tensor(taus, dtype=torch.float64),
        disable=True,
        **arguments,
    )


def measure(name: str, spacing: str, steps: int, schedule: Schedule) -> float:
    """The relative difference from k-diffusion at the end of a run."""
    case, values = CASES[name], ratios(spacing, steps)
    oracle, unit = kdiffusion.sampling(), VarianceExploding()
    grid = [schedule.at_ratio(ratio) for ratio in values]
    z, arguments, patched = start(unit.at_ratio(values[0])), dict(case.arguments), Listed()
    noise = Listed()
    if any(word in case.function for word in TAKE_NOISE):
        arguments["noise_sampler"] = patched
    if isinstance(case.solver, Churn):
        churn = case.solver
        window = {"s_tmin": churn.above, "s_tmax": churn.below}
        arguments |= {"s_churn": churn.churn, "s_noise": churn.s_noise, **window}
        # The original draws in every step, also where it then adds none; the list must stay in step.
        kept = [patched() for _ in range(steps)]
        used = [z for z, ratio in zip(kept, values, strict=False) if churn.above <= ratio <= churn.below]
        original, oracle.torch.randn_like = torch.randn_like, lambda _: kept.pop(0)
        noise = lambda *_: used.pop(0)  # noqa: E731
    try:
        expected = theirs(
            getattr(oracle, case.function), z, values, lambda z, r: MIXTURE(z, Level(1.0, r, unit)), arguments
        )
    finally:
        if isinstance(case.solver, Churn):
            oracle.torch.randn_like = original
    return difference(run(case.solver, z * grid[0].alpha, grid, MIXTURE, noise), expected)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("spacing", ["karras", "uniform"])
@pytest.mark.parametrize("name", CASES)
def test_equal(name: str, spacing: str, steps: int) -> None:
    if steps == 1 and not CASES[name].one_step:
        with pytest.raises(UnboundLocalError):
            measure(name, spacing, steps, VarianceExploding())
        return
    assert measure(name, spacing, steps, VarianceExploding()) < LIMIT
    assert measure(name, spacing, steps, scaled_linear()) < LIMIT


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "lms"])
def test_equal_on_flow(name: str) -> None:
    flow = Flow()
    times = [1.0 - i / 8 for i in range(8)] + [0.0]
    grid = [flow.level(1000 * t) for t in times]
    x = start(grid[0])
    function = getattr(kdiffusion.sampling(), CASES[name].function)
    expected = theirs(function, x, times, lambda z, t: MIXTURE(z, flow.level(1000 * t)), {})
    assert difference(run(CASES[name].solver, x, grid, MIXTURE), expected) < LIMIT


def worst(name: str) -> float:
    """The largest difference over all runs, for the table in the documentation."""
    runs = [
        partial(measure, name, spacing, steps, schedule)
        for spacing in ("karras", "uniform")
        for steps in ((1,) if CASES[name].one_step else ()) + (2, 5, 20)
        for schedule in (VarianceExploding(), scaled_linear())
    ]
    return max(one() for one in runs)
