"""What every solver must obey, whatever its formula. A solver in the list is tested here without being named.

Order: the error against the exact solution falls as the declared power of the step. Ends: any number of steps
from pure noise to the clean picture is finite, and no network is asked at the clean end. Batch: two images
together are the two apart. Variance: a stochastic solver leaves Gaussian data Gaussian, with the data's own
variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.diffusion.toy import Gaussian, Listed, Mixture, run, silent, start
from torch import Tensor

from sumuk.diffusion.ancestral import DDPM, LCM
from sumuk.diffusion.multistep import DEIS, LMS, DPMppM, UniPC
from sumuk.diffusion.sample import sample
from sumuk.diffusion.schedule import (
    ContinuousVP,
    Flow,
    Level,
    Schedule,
    VarianceExploding,
    scaled_linear,
    zero_terminal_snr,
)
from sumuk.diffusion.score import RK45, PredictorCorrector, ReverseDiffusion
from sumuk.diffusion.solver import Ask, Heun, Solver
from sumuk.diffusion.solvers import SOLVERS

DATA = Gaussian()
SCHEDULES: dict[str, Schedule] = {
    "scaled-linear": scaled_linear(),
    "zero-terminal-snr": zero_terminal_snr(scaled_linear()),
    "continuous-vp": ContinuousVP(),
    "variance-exploding": VarianceExploding(),
    "flow": Flow(),
}
RANGES: dict[str, tuple[float, float]] = {  # network times, most noise first
    "continuous-vp": (700.0, 150.0),
    "variance-exploding": (8.0, 0.2),
    "flow": (900.0, 150.0),
}


LOOSE = RK45(rtol=1e9, atol=1e9)
"""Each interval is one step: then the pair's fifth order shows, and images do not share a choice of steps."""


def quiet() -> dict[str, Solver]:
    """Every solver that can run without noise, and other orders of the adjustable ones."""
    found: dict[str, Solver] = {}
    for name in SOLVERS:
        listing = SOLVERS[name]
        solver = listing(eta=0.0) if "eta" in listing.settings else listing()
        if not solver.stochastic:
            found[name] = solver
    found |= {f"lms-{points}": LMS(points=points) for points in (1, 2, 3)}
    found |= {f"deis-{points}": DEIS(points=points) for points in (2, 4)}
    found |= {f"unipc-{kind}-{n}": UniPC(points=n, kind=kind) for kind in ("bh1", "bh2") for n in (1, 2, 3)}
    return found | {"dpmpp-3m-midpoint": DPMppM(points=3), "rk45": LOOSE}


def noisy() -> dict[str, Solver]:
    """Every solver that samples the SDE, at full strength."""
    found: dict[str, Solver] = {"ddpm-large": DDPM("large"), "reverse-diffusion": ReverseDiffusion()}
    for name in SOLVERS:
        listing = SOLVERS[name]
        strength = {"eta": 1.0, "churn": 20.0}
        solver = listing(**{key: value for key, value in strength.items() if key in listing.settings})
        if solver.stochastic and not isinstance(solver, LCM | PredictorCorrector):
            found[name] = solver
    return found


QUIET, NOISY = quiet(), noisy()
EVERY = {name: SOLVERS[name]() for name in SOLVERS} | NOISY


def between(schedule: Schedule, ends: tuple[float, float], steps: int, power: float = 1.0) -> list[Level]:
    """A grid equal in half-log-SNR, or with a smooth slow start for a power above 1."""
    high, low = (schedule.level(time).half_log_snr for time in ends)
    return [
        schedule.at_ratio(math.exp(-(high + (i / steps) ** power * (low - high)))) for i in range(steps + 1)
    ]


def whole(schedule: Schedule, steps: int) -> list[Level]:
    """From the noisiest level to the clean picture."""
    times = [schedule.last + i / steps * (schedule.first - schedule.last) for i in range(steps)]
    return [*(schedule.level(time) for time in times), schedule.clean]


def worst_error(solver: Solver, grid: Sequence[Level]) -> float:
    """The largest error against the exact path on the whole way: at its end alone it may cross zero."""
    first = start(grid[0], (5,))
    walk, errors, answer = sample(solver, first, grid, silent), [0.0], None
    try:
        while True:
            said = walk.send(answer)
            if isinstance(said, Ask):
                answer = DATA(said.x, said.level)
            else:
                away = said.x - DATA.exact(first, grid[0], said.then)
                errors.append(float(away.abs().max()) / DATA.deviation(said.then))
                answer = None
    except StopIteration:
        return max(errors)


def measured_order(solver: Solver, schedule: Schedule, ends: tuple[float, float]) -> float:
    """The power by which the error falls when the steps are halved.

    The grid starts with small steps, lest the low-order start of a multistep method hide its order.
    """
    if isinstance(solver, UniPC):
        solver = replace(solver, lower_order_final=False)
    steps = 64 if isinstance(solver, RK45) else 96
    coarse, fine = (worst_error(solver, between(schedule, ends, n, power=2.0)) for n in (steps, 2 * steps))
    return math.log2(coarse / fine)


@pytest.mark.parametrize("process", RANGES)
@pytest.mark.parametrize("name", QUIET)
def test_order(name: str, process: str) -> None:
    solver = QUIET[name]
    assert measured_order(solver, SCHEDULES[process], RANGES[process]) == pytest.approx(solver.order, abs=0.3)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name", EVERY)
def test_finite_at_both_ends(name: str, process: str, steps: int) -> None:
    schedule = SCHEDULES[process]
    mixture = Mixture()

    def denoise(x: Tensor, at: Level) -> Tensor:
        assert torch.isfinite(x).all()
        assert not at.is_clean, "a network was asked about a clean picture"
        # Off the schedule, the network's time would not say what noise there is in x.
        assert at.alpha == pytest.approx(schedule.at_ratio(at.ratio).alpha, abs=1e-9)
        return mixture(x, at)

    grid = whole(schedule, steps)
    end = run(EVERY[name], start(grid[0]), grid, denoise, Listed())
    assert torch.isfinite(end).all()


SINGLE_LOOK = [
    name for name in EVERY if name not in ("rk45", "predictor-corrector", "reverse-diffusion", "lcm")
]
"""Not those that ask more often in one step to the clean picture, or keep a part of x by their definition."""


@pytest.mark.parametrize("name", SINGLE_LOOK)
def test_one_step_from_pure_noise_is_the_mean(name: str) -> None:
    """All that one step to the clean picture can know from noise alone is the data's mean."""
    flow = SCHEDULES["flow"]
    end = run(EVERY[name], start(flow.noisiest, (5,)), [flow.noisiest, flow.clean], DATA, Listed((5,)))
    assert end.tolist() == pytest.approx([DATA.mean] * 5, abs=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_batch_is_its_members(name: str) -> None:
    solver = LOOSE if isinstance(EVERY[name], RK45) else EVERY[name]
    mixture, schedule = Mixture(), SCHEDULES["scaled-linear"]
    grid = whole(schedule, 6)
    x = start(grid[0])
    together = run(solver, x, grid, mixture, Listed())
    for one in range(len(x)):
        noise = Listed()
        apart = run(solver, x[one : one + 1], grid, mixture, lambda *_, n=noise, i=one: n()[i : i + 1])
        assert torch.allclose(together[one : one + 1], apart, rtol=1e-10, atol=1e-12)


def excess_variance(solver: Solver, schedule: Schedule, ends: tuple[float, float], steps: int) -> float:
    """The variance at the end over the true one, less 1, for Gaussian data: exact, with nothing drawn.

    The denoiser is linear then, so x may be carried as its coefficients on independent unit noises: the
    start's and those drawn on the way. The variance is their sum of squares.
    """
    grid, data = between(schedule, ends, steps), Gaussian(mean=0.0)
    x = torch.zeros(2 * steps + 1, dtype=torch.float64)
    x[0] = data.deviation(grid[0])
    drawn = iter(torch.eye(2 * steps + 1, dtype=torch.float64)[1:])
    end = run(solver, x, grid, data, lambda now, then: next(drawn))
    return float(end.square().sum()) / data.deviation(grid[-1]) ** 2 - 1


@pytest.mark.parametrize("process", RANGES)
@pytest.mark.parametrize("name", NOISY)
def test_variance_is_the_datas(name: str, process: str) -> None:
    coarse, fine = (
        excess_variance(NOISY[name], SCHEDULES[process], RANGES[process], steps) for steps in (100, 200)
    )
    assert abs(fine) < 0.05
    # What is left must vanish with the step, at first order or better: so does its extrapolation.
    assert 2 * fine - coarse == pytest.approx(0, abs=0.007)


class Halved:
    """A Brownian path in units of independent noises: two to a step, before and after the second look."""

    def __init__(self, grid: Sequence[Level]) -> None:
        self.number = {level.ratio: step for step, level in enumerate(grid)}
        self.units = torch.eye(2 * len(grid) - 1, dtype=torch.float64)
        self.middle = math.nan

    def __call__(self, now: Level, then: Level) -> Tensor:
        step = self.number[now.ratio]
        before, after = self.units[2 * step + 1], self.units[2 * step + 2]
        if then.ratio not in self.number:
            self.middle = then.ratio
            return before
        share = (now.ratio - self.middle) / (now.ratio - then.ratio)
        return math.sqrt(share) * before + math.sqrt(1 - share) * after


@pytest.mark.parametrize("process", RANGES)
def test_a_second_look_wants_brownian_noise(process: str) -> None:
    """DPM++ SDE draws twice in a step: from one path its variance is of second order, else only of first."""
    data, excess = Gaussian(mean=0.0), []
    for steps in (50, 100):
        grid = between(SCHEDULES[process], RANGES[process], steps)
        path = Halved(grid)
        end = run(SOLVERS["dpmpp-sde"](), data.deviation(grid[0]) * path.units[0], grid, data, path)
        excess.append(float(end.square().sum()) / data.deviation(grid[-1]) ** 2 - 1)
    assert math.log2(excess[0] / excess[1]) == pytest.approx(2, abs=0.25)
    fresh = excess_variance(NOISY["dpmpp-sde"], SCHEDULES[process], RANGES[process], 100)
    assert abs(excess[1]) < abs(fresh) / 50
    assert SOLVERS["dpmpp-sde"].noise == "brownian"


def test_langevin_corrector_mends_the_variance() -> None:
    """Started at twice the variance v, it arrives at its own fixed point: v (1 + snr^2), in many dimensions.

    x' = (1 - e / v) x + sqrt(2 e) z is stationary at s = v / (1 - e / 2 v), and there e / v = 2 snr^2 v / s.
    The step depends on norms, so this one is drawn: 256 images of 1,024 values.
    """
    data, draw = Gaussian(mean=0.0), torch.Generator().manual_seed(5)
    grid = between(SCHEDULES["variance-exploding"], (1.0, 0.5), 60)

    def noise(now: Level, then: Level) -> Tensor:
        return torch.randn(256, 1024, generator=draw)

    x = math.sqrt(2) * data.deviation(grid[0]) * noise(grid[0], grid[1])
    end = run(PredictorCorrector(Heun(), snr=0.25), x, grid, data, noise)
    expected = data.deviation(grid[-1]) ** 2 * (1 + 0.25**2)
    assert float(end.var()) / expected == pytest.approx(1, abs=0.015)


def test_consistency_keeps_the_variance() -> None:
    """LCM expects the end of the ODE's path, not the mean; so answered, its variance is the data's."""
    data, grid = Gaussian(mean=0.0), whole(SCHEDULES["scaled-linear"], 4)
    x = torch.zeros(9, dtype=torch.float64)
    x[0] = data.deviation(grid[0])
    drawn = iter(torch.eye(9, dtype=torch.float64)[1:])
    end = run(LCM(), x, grid, lambda x, at: data.exact(x, at, at.schedule.clean), lambda *_: next(drawn))
    assert float(end.square().sum()) == pytest.approx(data.spread**2, rel=1e-4)
