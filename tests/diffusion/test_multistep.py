"""Multistep methods, piece by piece: moments, weights, memory, and that each is exact on its polynomials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.diffusion.toy import Listed, Mixture, difference, run, silent, start
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.multistep import (
    DEIS,
    LMS,
    PLMS,
    DPMppM,
    Memory,
    Multistep,
    Seen,
    UniPC,
    moments,
    weights,
)
from sumuk.diffusion.sample import Moved, sample
from sumuk.diffusion.schedule import Flow, Level, VarianceExploding, scaled_linear

SD, VE, FLOW = scaled_linear(), VarianceExploding(), Flow()
MIXTURE = Mixture()
POINTS, SHARES = np.polynomial.legendre.leggauss(60)


@pytest.mark.parametrize("bend", [-9.0, -1.0, -0.999, -0.01, 0.0, 1e-6, 0.3, 0.999, 1.0, 4.0, 30.0])
def test_moments_are_their_integrals(bend: float) -> None:
    theta = (POINTS + 1) / 2
    density = SHARES * np.exp(bend * (theta - 1))
    expected = [float((density * theta**k).sum() / density.sum()) for k in range(4)]
    assert moments(bend, 3) == pytest.approx(expected, rel=1e-10)


def test_weights_are_adams_bashforths() -> None:
    second, third, fourth = (weights([-1.0, -2.0, -3.0][:n], moments(0.0, n)) for n in (1, 2, 3))
    assert second == pytest.approx([-1 / 2])
    assert third == pytest.approx([-16 / 12, 5 / 12])
    assert fourth == pytest.approx([-59 / 24, 37 / 24, -9 / 24])


def test_weights_integrate_every_polynomial() -> None:
    nodes, means = [-0.7, -1.1, -2.6], moments(1.3, 3)
    for power, mean in enumerate(means[1:], start=1):
        found = sum(part * node**power for part, node in zip(weights(nodes, means), nodes, strict=True))
        assert found == pytest.approx(mean, rel=1e-12)


def one_step(
    solver: Multistep, grid: list[Level], value: object, clean: object, x: Tensor
) -> tuple[Tensor, Memory]:
    """The last step of ``grid``, the steps before it remembered exactly; value and clean are functions."""
    past = solver.start(grid)
    for level in grid[:-2]:
        past = solver.remember(past, level, torch.tensor([value(level)], dtype=torch.float64))
    step = solver.step(x, grid[-2], grid[-1], past, silent)
    ask = next(step)
    with pytest.raises(StopIteration) as stop:
        step.send(torch.tensor([clean(ask.level)], dtype=torch.float64))
    return stop.value.value


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", [SD, VE, FLOW])
def test_exact_on_their_polynomials(schedule: object, degree: int) -> None:
    """Against quadrature: DEIS and LMS where the slope is a polynomial, 2M where the picture is."""
    grid = [schedule.at_ratio(ratio) for ratio in (9.0, 5.0, 2.5, 1.7, 0.9)]
    now, then = grid[-2:]
    x = torch.tensor([0.4], dtype=torch.float64)

    def integral(function: object, low: float, high: float) -> float:
        middle, half = (high + low) / 2, (high - low) / 2
        return float(half * (SHARES * [function(middle + half * point) for point in POINTS]).sum())

    noise = lambda at: at.half_log_snr**degree  # noqa: E731
    end, _ = one_step(DEIS(points=4), grid, noise, lambda at: (float(x) - at.sigma * noise(at)) / at.alpha, x)
    area = integral(lambda ratio: (-math.log(ratio)) ** degree, now.ratio, then.ratio)
    assert float(end) == pytest.approx(then.alpha * (float(x) / now.alpha + area), rel=1e-11)

    lms = LMS(points=4)
    slope = lambda at: lms.tau(at) ** degree  # noqa: E731
    scale = [level.sigma / lms.tau(level) for level in (now, then)]
    end, _ = one_step(lms, grid, slope, lambda at: float(x) / scale[0] - lms.tau(at) * slope(at), x)
    area = integral(lambda tau: tau**degree, lms.tau(now), lms.tau(then))
    assert float(end) == pytest.approx(scale[1] * (float(x) / scale[0] + area), rel=1e-11)

    if degree < 2:
        picture = lambda at: at.half_log_snr**degree  # noqa: E731
        end, _ = one_step(DPMppM(kind="heun"), grid, picture, picture, x)
        area = integral(lambda snr: math.exp(snr) * snr**degree, now.half_log_snr, then.half_log_snr)
        assert float(end) == pytest.approx(then.sigma * (float(x) / now.sigma + area), rel=1e-11)


def test_memory_is_bounded_and_counts_down() -> None:
    solver = LMS(points=3)
    past = solver.start([SD.level(float(t)) for t in (9, 7, 5, 3, 1)])
    for left in (3, 2, 1):
        past = solver.remember(past, SD.level(8.0), torch.zeros(1))
        assert past.left == left
    past = solver.remember(past, SD.level(2.0), torch.ones(1))
    assert len(past.seen) == 3 and past.seen[0].level.time == 2.0


def test_answers_at_pure_noise_are_passed_over() -> None:
    seen = (Seen(FLOW.at_ratio(9.0), torch.zeros(1)), Seen(FLOW.noisiest, torch.ones(1)))
    now, then = FLOW.at_ratio(5.0), FLOW.at_ratio(2.0)
    assert len(DPMppM(points=3).recall(Memory(seen, 5), now, then)[1]) == 1
    assert len(LMS().recall(Memory(seen, 5), now, then)[1]) == 2, "t is finite where lambda is not"
    assert DPMppM().recall(Memory(seen, 5), now, FLOW.clean) == ([], [])


def test_lower_order_final() -> None:
    seen = tuple(Seen(SD.at_ratio(ratio), torch.zeros(1)) for ratio in (3.0, 4.0, 5.0))
    now, then = SD.at_ratio(2.0), SD.at_ratio(1.0)
    for left, used in ((9, 2), (3, 2), (2, 1), (1, 0)):
        assert len(UniPC(points=3).recall(Memory(seen, left), now, then)[1]) == used
    assert len(DEIS(points=3).recall(Memory(seen, 1), now, then)[1]) == 2


def test_plms_takes_steps_as_equal() -> None:
    seen = tuple(Seen(SD.at_ratio(ratio), torch.zeros(1)) for ratio in (3.0, 40.0))
    assert PLMS().recall(Memory(seen, 5), SD.at_ratio(2.0), SD.at_ratio(1.9))[1] == [-1.0, -2.0]


@pytest.mark.parametrize("solver", [UniPC(points=3), UniPC(points=2, kind="bh1"), DPMppM()])
def test_a_masked_x_stays_masked(solver: Multistep) -> None:
    """Whoever drives may replace x between steps; a corrector must not bring the old x back."""
    grid = [SD.level(t) for t in (900.0, 600.0, 300.0, 100.0)]
    walk, answer, ends = sample(solver, start(grid[0]), grid, silent), None, []
    with pytest.raises(StopIteration):
        while True:
            said = walk.send(answer)
            if isinstance(said, Moved):
                answer = torch.full_like(said.x, 50.0)
                ends.append(said.x)
            else:
                answer = torch.zeros_like(said.x)
    # With a black picture for every answer, each step only scales the noise that was put there.
    assert torch.allclose(ends[1], torch.full_like(ends[1], 50.0 * grid[2].sigma / grid[1].sigma))


def test_sde_of_strength_zero_is_the_ode() -> None:
    grid = [SD.level(t) for t in (900.0, 600.0, 300.0, 100.0)] + [SD.clean]
    x = start(grid[0])
    ode, sde = run(DPMppM(), x, grid, MIXTURE), run(DPMppM(eta=1.0), x, grid, MIXTURE, Listed())
    assert difference(sde, ode) > 0.01
    assert not DPMppM().stochastic and DPMppM(eta=0.1).stochastic


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LMS(points=5), "points must be 1 to 4, got 5"),
        (lambda: DPMppM(points=4), "1 to 3 points, got 4"),
        (lambda: UniPC(kind="bh3"), "'bh1' or 'bh2', got 'bh3'"),
        (lambda: DPMppM(kind="simpson"), "'midpoint' or 'heun', got 'simpson'"),
        (lambda: DPMppM(eta=-0.5), "eta must be 0 or more, got -0.5"),
    ],
)
def test_refuses(make: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()
