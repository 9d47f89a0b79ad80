"""Solvers without memory, piece by piece: the move, the splits, the asks, the refusals, the list."""

from __future__ import annotations

import math

import pytest
import torch
from tests.diffusion.toy import Gaussian, Listed, Mixture, count_asks, run, silent, start
from torch import Tensor

from sumuk.base.errors import BadInput, SumukError
from sumuk.diffusion.ancestral import (
    DDPM,
    LCM,
    Ancestral,
    Churn,
    DPMppSDE,
    ancestral_split,
    reverse_sde_split,
)
from sumuk.diffusion.grid import GRIDS, make_grid
from sumuk.diffusion.schedule import ContinuousVP, Flow, Level, Schedule, VarianceExploding, scaled_linear
from sumuk.diffusion.score import RK45, PredictorCorrector
from sumuk.diffusion.solver import DPM2, DPMpp2S, Euler, Heun, at_clock, clock, transit
from sumuk.diffusion.solvers import SOLVERS

SD, VE, FLOW = scaled_linear(), VarianceExploding(), Flow()
DATA, MIXTURE = Gaussian(), Mixture()


def test_transit_is_the_exact_path_to_a_frozen_picture() -> None:
    clean, eps = torch.tensor([0.3, -1.0]), torch.tensor([0.7, 0.2])
    now, then = SD.level(800.0), SD.level(300.0)
    moved = transit(now.alpha * clean + now.sigma * eps, clean, now, then)
    assert torch.allclose(moved, then.alpha * clean + then.sigma * eps, atol=1e-6)
    assert torch.equal(transit(eps, clean, FLOW.noisiest, FLOW.clean), clean)


def test_ancestral_split_is_ddims_and_ddpms() -> None:
    now, then = SD.level(700.0), SD.level(400.0)
    a, b = now.alpha**2, then.alpha**2
    posterior = (1 - b) / (1 - a) * (1 - a / b)
    down, up = ancestral_split(now, then, 1.0)
    assert up**2 == pytest.approx(posterior, rel=1e-12)
    assert down.sigma**2 + up**2 == pytest.approx(then.sigma**2, rel=1e-12)
    assert ancestral_split(now, then, 0.3)[1] == pytest.approx(0.3 * math.sqrt(posterior), rel=1e-12)
    exact, fresh = reverse_sde_split(now, then, 1.0)
    assert (exact.sigma, fresh) == pytest.approx((down.sigma, up), rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("schedule", [SD, VE, FLOW])
def test_splits_at_the_ends(schedule: Schedule, eta: float) -> None:
    middle = schedule.at_ratio(1.0)
    for split in (ancestral_split, reverse_sde_split):
        assert split(middle, schedule.clean, eta) == (schedule.clean, 0.0)
    down, up = ancestral_split(FLOW.noisiest, FLOW.at_ratio(1.0), eta)
    assert up == pytest.approx(min(eta, 1.0) * 0.5) and down.sigma**2 == pytest.approx(0.25 - up**2)


def test_clock_is_t_on_a_flow_and_the_ratio_elsewhere() -> None:
    assert clock(FLOW.level(250.0)) == 0.25 and clock(FLOW.noisiest) == 1.0
    assert clock(SD.level(500.0)) == SD.level(500.0).ratio
    for schedule in (SD, VE, FLOW):
        level = schedule.at_ratio(0.8)
        assert at_clock(level, clock(level)).alpha == pytest.approx(level.alpha, rel=1e-12)


def test_heun_by_hand() -> None:
    """On a flow: the mean of the velocities at both ends."""
    now, then = FLOW.level(600.0), FLOW.level(400.0)
    x = start(now)
    first = (x - MIXTURE(x, now)) / now.sigma
    landed = x + (then.sigma - now.sigma) * first
    second = (landed - MIXTURE(landed, then)) / then.sigma
    expected = x + (then.sigma - now.sigma) * (first + second) / 2
    assert torch.allclose(run(Heun(), x, [now, then], MIXTURE), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("euler", [1, 1, 1]),
        ("heun", [2, 2, 1]),
        ("dpm2", [2, 2, 1]),
        ("dpmpp-2s-ancestral", [2, 2, 1]),
        ("dpmpp-sde", [2, 2, 1]),
        ("plms", [2, 1, 1]),
        ("unipc", [1, 1, 1]),
        ("predictor-corrector", [2, 2, 2]),
    ],
)
def test_asks_per_step(name: str, asks: list[int]) -> None:
    grid = [SD.level(t) for t in (900.0, 500.0, 100.0)] + [SD.clean]
    assert count_asks(SOLVERS[name](), start(grid[0]), grid, MIXTURE, Listed())[1] == asks


@pytest.mark.parametrize("inner", [Euler(), Heun(), DPM2(), DPMpp2S()])
def test_no_eta_no_noise(inner: Euler) -> None:
    grid = make_grid("karras", SD, 6)
    x = start(grid[0])
    assert torch.equal(run(Ancestral(inner, eta=0.0), x, grid, MIXTURE, silent), run(inner, x, grid, MIXTURE))
    assert torch.equal(run(DPMppSDE(eta=0.0), x, grid, MIXTURE), run(DPMpp2S(), x, grid, MIXTURE))
    assert not Ancestral(inner, eta=0.0).stochastic and Ancestral(inner).stochastic


def test_churn_raises_the_level_within_its_window() -> None:
    grid = [VE.at_ratio(ratio) for ratio in (10.0, 5.0, 1.0)] + [VE.clean]
    asked: list[float] = []
    size: list[float] = []

    def denoise(x: Tensor, at: Level) -> Tensor:
        asked.append(at.ratio)
        size.append(float(x.max()))
        return torch.zeros_like(x)

    solver = Churn(Euler(), churn=0.3, above=2.0, below=7.0)
    run(solver, torch.zeros(1), grid, denoise, lambda now, then: torch.ones(1))
    assert asked == pytest.approx([10.0, 5.5, 1.0])
    assert size[1] == pytest.approx(math.sqrt(5.5**2 - 5.0**2))
    assert Churn(Euler(), churn=100.0).start(grid) == pytest.approx(math.sqrt(2) - 1)


def test_ddpm_large_is_the_forward_steps_beta() -> None:
    now, then = SD.level(700.0), SD.level(400.0)
    grid, x, noise = [now, then], torch.zeros(1), lambda *_: torch.ones(1)
    added = run(DDPM("large"), x, grid, lambda x, at: torch.zeros(1), noise)
    assert float(added) ** 2 == pytest.approx(1 - (now.alpha / then.alpha) ** 2, rel=1e-6)


def test_lcm_is_the_identity_at_time_zero_and_ends_without_noise() -> None:
    least = SD.level(0.0)
    x = start(least)
    assert torch.equal(run(LCM(), x, [least, SD.clean], MIXTURE, silent), x)
    grid = [SD.level(999.0), SD.level(499.0)]
    assert torch.allclose(
        run(LCM(), x, grid, lambda x, at: torch.ones_like(x), lambda *_: torch.ones_like(x)),
        torch.full_like(x, grid[1].alpha + grid[1].sigma),
        atol=1e-6,
    )


@pytest.mark.parametrize("schedule", [SD, ContinuousVP(), VE, FLOW])
def test_rk45_keeps_its_tolerance(schedule: Schedule) -> None:
    ends = [schedule.at_ratio(40.0), schedule.at_ratio(0.05)]
    x = start(ends[0], (7,))
    exact = DATA.exact(x, *ends)
    counts = []
    for tolerance in (1e-4, 1e-7):
        end, asks = count_asks(RK45(tolerance, tolerance), x, ends, DATA)
        counts.append(sum(asks))
        assert float((end - exact).abs().max()) < 20 * tolerance
    assert counts[0] < counts[1] < 100
    # Cut into intervals it still is the same ODE, and remembers its step.
    middle = schedule.at_ratio(1.0)
    end, asks = count_asks(RK45(1e-7, 1e-7), x, [ends[0], middle, ends[1]], DATA)
    assert float((end - exact).abs().max()) < 2e-6 and sum(asks) < 130


def test_rk45_needs_no_grid() -> None:
    """Two levels, pure noise and the picture; the last first-order step is too short to be seen."""
    grid = [FLOW.noisiest, FLOW.clean]
    x = start(grid[0], (7,))
    assert float((run(RK45(), x, grid, DATA) - DATA.exact(x, *grid)).abs().max()) < 5e-5


def test_langevin_corrector_by_hand() -> None:
    """On a variance-preserving process the step size carries alpha_i (Song et al. 2021, algorithm 5)."""
    now, then = SD.level(700.0), SD.level(650.0)
    x, z = start(now), Listed()()
    score = (now.alpha * MIXTURE(x, now) - x) / (1 - now.alpha**2)
    norms = [torch.stack([image.norm() for image in each]).view(-1, 1, 1, 1) for each in (z, score)]
    size = 2 * SD.alphas_cumprod[700] / SD.alphas_cumprod[650] * (0.16 * norms[0] / norms[1]) ** 2
    expected = run(Euler(), x + size * score + (2 * size).sqrt() * z, [now, then], MIXTURE)
    ours = run(PredictorCorrector(Euler()), x, [now, then], MIXTURE, lambda *_: z)
    assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_rk45_gives_up_aloud() -> None:
    grid = [FLOW.noisiest, FLOW.clean]
    with pytest.raises(SumukError, match="rtol 1e-05"):
        run(RK45(), start(grid[0]), grid, lambda x, at: x * math.nan)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ancestral(Euler(), eta=-1.0), "eta must be 0 or more, got -1"),
        (lambda: DPMppSDE(part=0.0), "part must be above 0"),
        (lambda: DDPM("tiny"), "'small' or 'large', got 'tiny'"),
        (lambda: Churn(Euler(), churn=math.nan), "churn must be 0 or more, got nan"),
        (lambda: PredictorCorrector(snr=-0.1), "snr must be 0 or more"),
        (lambda: RK45(rtol=0.0), "must be above 0"),
        (lambda: SOLVERS["dpmpp-3m"], "unknown solver 'dpmpp-3m'; did you mean 'dpmpp-"),
        (lambda: SOLVERS["Euler a"](etta=1.0), "no setting 'etta'; did you mean 'eta'"),
    ],
)
def test_refuses(make: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("Euler", "euler"),
        ("Euler a", "euler-ancestral"),
        ("euler_ancestral", "euler-ancestral"),
        ("DPM2 a", "dpm2-ancestral"),
        ("dpm_2", "dpm2"),
        ("DPM++ 2S a", "dpmpp-2s-ancestral"),
        ("DPM++ 2M", "dpmpp-2m"),
        ("dpmpp_2m", "dpmpp-2m"),
        ("DPM++ 2M SDE Heun", "dpmpp-2m-sde-heun"),
        ("DPM++ 3M SDE", "dpmpp-3m-sde"),
        ("dpmpp_sde_gpu", "dpmpp-sde"),
        ("UniPC", "unipc"),
        ("uni_pc_bh2", "unipc-bh2"),
        ("PNDMScheduler", "plms"),
        ("DPMSolverMultistepScheduler", "dpmpp-2m"),
        ("FlowMatchEulerDiscreteScheduler", "euler"),
        ("LCM", "lcm"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert SOLVERS.canonical(alias) == name


@pytest.mark.parametrize("name", SOLVERS)
def test_every_listing_runs_on_its_own_grid(name: str) -> None:
    listing = SOLVERS[name]
    assert listing.grid in GRIDS and listing.noise in ("steps", "brownian") and listing.reference
    grid = make_grid(listing.grid, SD, 8)
    end = run(listing(), start(grid[0]), grid, MIXTURE, Listed())
    assert torch.isfinite(end).all() and float(end.abs().max()) < 4
    assert hash(listing()) == hash(listing())
