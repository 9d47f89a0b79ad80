"""Guidance against its formulas: rows spent, algebra, interval, rescaling, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.grid import make_grid
from sumuk.diffusion.guidance import Cfg, Conditions, Guidance, Plain, Row, SkipLayers, guided
from sumuk.diffusion.noise import ImageNoise
from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.diffusion.sample import Moved, drive, sample
from sumuk.diffusion.schedule import scaled_linear
from sumuk.diffusion.solver import Ask, Euler, Heun

SD = scaled_linear()
SHAPE = (1, 4, 6, 6)
EPS = PREDICTIONS["eps"]
GRID = make_grid("linspace", SD, 5, dropped=1)


def outputs(*seeds: int) -> list[Tensor]:
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def mixed(guidance: Guidance, given: Conditions, answers: dict[Any, Tensor], progress: float = 0.0):
    """(conditions asked, combined output) of one ask."""
    mix = guidance.mix(given, progress)
    asked = next(mix)
    with pytest.raises(StopIteration) as stop:
        mix.send([answers[condition] for condition in asked])
    return asked, stop.value.value


def network(row: Row) -> Tensor:
    """A stand-in for an eps network: smooth, and different for each condition."""
    return torch.tanh(0.5 * row.x + float(row.condition)) * row.level.sigma


def run(guidance: Guidance, given: Conditions, solver=None, amend=None, answer=network):
    """(final x, rows asked at each ask, Moved events) of a whole walk."""
    noise = ImageNoise(1, SHAPE)
    coroutine = guided(
        sample(solver or Euler(), noise.initial() * GRID[0].sigma, GRID, noise),
        EPS,
        lambda step: given,
        guidance,
        steps=len(GRID) - 1,
        amend=amend,
    )
    asked: list[list[Row]] = []
    moves: list[Moved] = []
    reply = None
    while True:
        try:
            event = coroutine.send(reply)
        except StopIteration as stop:
            return stop.value, asked, moves
        if isinstance(event, Moved):
            moves.append(event)
            reply = None
        else:
            asked.append(event)
            reply = [answer(row) for row in event]


def test_cfg_is_the_papers_formula():
    negative, positive = outputs(1, 2)
    asked, out = mixed(Cfg(7.5), Conditions((("p", 1.0),), "n"), {"n": negative, "p": positive})
    assert asked == ["n", "p"]
    # Ho & Salimans eq. 6: (1 + w) conditional - w unconditional, scale = 1 + w
    assert torch.allclose(out, 7.5 * positive - 6.5 * negative, atol=1e-5)


@pytest.mark.parametrize("phi", [0.2, 0.7, 1.0])
def test_rescale_equals_diffusers(phi: float):
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    negative, positive = outputs(3, 4)
    _, out = mixed(Cfg(9.0, rescale=phi), Conditions((("p", 1.0),), "n"), {"n": negative, "p": positive})
    plain = negative + 9.0 * (positive - negative)
    assert torch.allclose(out, pipeline.rescale_noise_cfg(plain, positive, phi), atol=1e-6)
    if phi == 1.0:
        assert float(out.std()) == pytest.approx(float(positive.std()), rel=1e-6)


def test_rescaling_leaves_a_flat_output():
    flat = torch.zeros(SHAPE)
    _, out = mixed(Cfg(3.0, rescale=0.7), Conditions((("p", 1.0),), "n"), {"n": flat, "p": flat + 2})
    assert torch.equal(out, flat + 6)


def test_guidance_on_the_first_channels_only():
    """DiT: the others are what the network says of the prompt (Peebles & Xie 2023, their sampler)."""
    negative, positive = outputs(1, 2)
    answers = {"n": negative, "p": positive}
    _, out = mixed(Cfg(4.0, channels=3), Conditions((("p", 1.0),), "n"), answers)
    assert torch.allclose(out[:, :3], (negative + 4.0 * (positive - negative))[:, :3])
    assert torch.allclose(out[:, 3:], positive[:, 3:])
    _, all_ = mixed(Cfg(4.0, channels=4), Conditions((("p", 1.0),), "n"), answers)
    assert torch.equal(all_, mixed(Cfg(4.0), Conditions((("p", 1.0),), "n"), answers)[1])


@pytest.mark.parametrize("guidance", [Cfg(5.0), Plain()])
def test_layers_are_skipped_in_their_window_only(guidance: Cfg | Plain):
    negative, positive, weak = outputs(1, 2, 3)
    answers = {"n": negative, "p": positive, "w": weak}
    given = Conditions((("p", 1.0),), "n", "w")
    usual_asked, usual = mixed(guidance, given, answers)
    skipping = SkipLayers(guidance, scale=2.5, start=0.01, end=0.2)
    for progress in (0.0, 0.01, 0.2, 0.5):
        asked, out = mixed(skipping, given, answers, progress)
        assert asked == usual_asked and torch.equal(out, usual)
    asked, out = mixed(skipping, given, answers, 0.1)
    assert asked == [*usual_asked, "w"] and torch.allclose(out, usual + 2.5 * (positive - weak))
    plain = Conditions((("p", 1.0),), "n")
    assert torch.equal(mixed(skipping, plain, answers, 0.1)[1], usual)


def test_composition_is_weighted_differences_from_the_negative():
    n, a, b = outputs(1, 2, 3)
    given = Conditions((("a", 1.2), ("b", -0.4)), "n")
    asked, out = mixed(Cfg(5.0), given, {"n": n, "a": a, "b": b})
    assert asked == ["n", "a", "b"]
    assert torch.allclose(out, n + 5.0 * (1.2 * (a - n) - 0.4 * (b - n)), atol=1e-5)
    # the same thing twice at half weight is the thing itself
    _, halves = mixed(Cfg(5.0), Conditions((("a", 0.5), ("a", 0.5)), "n"), {"n": n, "a": a})
    _, whole = mixed(Cfg(5.0), Conditions((("a", 1.0),), "n"), {"n": n, "a": a})
    assert torch.allclose(halves, whole, atol=1e-5)


def test_composition_is_rescaled_to_its_own_output_at_scale_one():
    n, a, b = outputs(1, 2, 3)
    given = Conditions((("a", 0.7), ("b", 0.6)), "n")
    _, out = mixed(Cfg(6.0, rescale=1.0), given, {"n": n, "a": a, "b": b})
    assert float(out.std()) == pytest.approx(float((n + 0.7 * (a - n) + 0.6 * (b - n)).std()), rel=1e-5)


@pytest.mark.parametrize("guidance", [Plain(), Cfg(1.0), Cfg(1.0, rescale=0.7), Cfg(8.0, start=0.5, end=0.5)])
def test_without_guidance_one_row_is_asked_and_its_answer_kept(guidance: Guidance):
    (positive,) = outputs(2)
    asked, out = mixed(guidance, Conditions((("p", 1.0),), "n"), {"p": positive})
    assert asked == ["p"] and torch.equal(out, positive)
    _, rows, _ = run(guidance, Conditions(((0.3, 1.0),), -0.2))
    assert [len(each) for each in rows] == [1] * 5


def test_where_the_negative_cancels_it_is_not_asked():
    a, b = outputs(1, 2)
    given = Conditions((("a", 0.1), ("b", 0.2)), "n")
    asked, out = mixed(Cfg(1 / 0.3), given, {"a": a, "b": b})
    assert asked == ["a", "b"] and torch.allclose(out, (a + 2 * b) / 3, atol=1e-6)
    n = torch.ones(SHAPE)
    asked, out = mixed(Cfg(1.0), given, {"n": n, "a": a, "b": b})
    assert asked == ["n", "a", "b"] and torch.allclose(out, 0.7 * n + 0.1 * a + 0.2 * b, atol=1e-6)


def test_a_cancelled_negative_is_still_asked_where_rescaling_needs_it():
    n, a = outputs(1, 2)
    asked, out = mixed(Cfg(2.0, rescale=1.0), Conditions((("a", 0.5),), "n"), {"n": n, "a": a})
    half = n + 0.5 * (a - n)
    assert asked == ["n", "a"] and torch.allclose(out, a * half.std() / a.std(), atol=1e-5)


def test_plain_averages_several_by_weight():
    a, b = outputs(1, 2)
    asked, out = mixed(Plain(), Conditions((("a", 1.0), ("b", 3.0)), "n"), {"a": a, "b": b})
    assert asked == ["a", "b"] and torch.allclose(out, 0.25 * a + 0.75 * b, atol=1e-6)
    with pytest.raises(BadInput, match="add up to 0"):
        mixed(Plain(), Conditions((("a", 1.0), ("b", -1.0))), {})


@pytest.mark.parametrize(
    ("start", "end", "rows"),
    [(0.0, 1.0, [2] * 5), (0.2, 0.6, [1, 2, 2, 1, 1]), (0.0, 0.5, [2, 2, 2, 1, 1]), (0.9, 1.0, [1] * 5)],
)
def test_interval_counts_steps(start: float, end: float, rows: list[int]):
    _, asked, _ = run(Cfg(4.0, start=start, end=end), Conditions(((0.3, 1.0),), -0.2))
    assert [len(each) for each in asked] == rows


def test_both_asks_of_a_second_order_step_share_its_guidance():
    _, asked, moves = run(Cfg(4.0, end=0.4), Conditions(((0.3, 1.0),), -0.2), solver=Heun())
    assert len(moves) == 5
    per_step = [len(each) for each in asked]
    assert per_step == [2, 2, 2, 2] + [1] * (len(asked) - 4) and len(asked) > 5


def test_a_walk_equals_the_same_solver_driven_by_a_guided_denoiser():
    final, asked, moves = run(Cfg(3.0), Conditions(((0.3, 1.0),), -0.2))

    def denoise(ask: Ask) -> Tensor:
        negative, positive = (network(Row(ask.x, ask.level, c)) for c in (-0.2, 0.3))
        eps = negative + 3.0 * (positive - negative)
        return (ask.x - ask.level.sigma * eps) / ask.level.alpha

    noise = ImageNoise(1, SHAPE)
    expected = drive(sample(Euler(), noise.initial() * GRID[0].sigma, GRID, noise), denoise)
    assert torch.allclose(final, expected, atol=1e-6)
    assert [move.step for move in moves] == [1, 2, 3, 4, 5]
    assert all(row.level == level for rows, level in zip(asked, GRID, strict=False) for row in rows)


def test_conditions_change_from_step_to_step():
    noise = ImageNoise(1, SHAPE)
    coroutine = guided(
        sample(Euler(), noise.initial(), GRID, noise),
        EPS,
        lambda step: Conditions(((float(step), 1.0),)),
        Plain(),
        steps=5,
    )
    seen, reply = [], None
    with pytest.raises(StopIteration):
        while True:
            event = coroutine.send(reply)
            reply = None
            if not isinstance(event, Moved):
                seen.append(event[0].condition)
                reply = [network(row) for row in event]
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_amend_replaces_the_clean_estimate_and_a_moved_answer_replaces_x():
    known, mask = torch.full(SHAPE, 0.25), torch.zeros(SHAPE)
    mask[..., :3] = 1.0
    final, _, _ = run(
        Plain(), Conditions(((0.3, 1.0),)), amend=lambda clean, ask: mask * clean + (1 - mask) * known
    )
    assert torch.allclose(final[..., 3:], known[..., 3:], atol=1e-6)
    assert not torch.allclose(final[..., :3], known[..., :3], atol=1e-2)

    noise = ImageNoise(1, SHAPE)
    coroutine = guided(
        sample(Euler(), noise.initial(), GRID[-2:], noise),
        EPS,
        lambda step: Conditions(((0.3, 1.0),)),
        Plain(),
        steps=1,
    )
    moved = coroutine.send([network(row) for row in next(coroutine)])
    assert isinstance(moved, Moved)
    with pytest.raises(StopIteration) as stop:
        coroutine.send(known)
    assert torch.equal(stop.value.value, known)


def test_half_precision_outputs_are_combined_in_the_dtype_of_x():
    final, _, _ = run(Cfg(7.0), Conditions(((0.3, 1.0),), -0.2), answer=lambda row: network(row).half())
    exact, _, _ = run(
        Cfg(7.0), Conditions(((0.3, 1.0),), -0.2), answer=lambda row: network(row).half().float()
    )
    assert final.dtype == torch.float32 and torch.equal(final, exact)


def test_cancelling_closes_the_sampler():
    closed = []

    def asks():
        try:
            yield Ask(torch.zeros(SHAPE), GRID[0])
        finally:
            closed.append(True)

    walk = asks()  # held here, so that no garbage collection closes it
    coroutine = guided(walk, EPS, lambda step: Conditions(((0.0, 1.0),)), Plain(), steps=1)
    next(coroutine)
    coroutine.close()
    assert closed == [True]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_bad_scales(scale: float):
    with pytest.raises(BadInput, match=f"guidance scale must be a finite number, got {scale}"):
        Cfg(scale)


@pytest.mark.parametrize("rescale", [-0.1, 1.5, math.nan])
def test_bad_rescales(rescale: float):
    with pytest.raises(BadInput, match=f"rescale must lie between 0 and 1, got {rescale}"):
        Cfg(7.0, rescale=rescale)


@pytest.mark.parametrize(
    ("start", "end"), [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.4), (math.nan, 1.0), (0.0, math.nan)]
)
def test_bad_intervals(start: float, end: float):
    with pytest.raises(BadInput, match=f"got {start} to {end}"):
        Cfg(7.0, start=start, end=end)


def test_bad_conditions():
    with pytest.raises(BadInput, match="at least one positive condition"):
        Conditions(())
    with pytest.raises(BadInput, match="weight of a condition must be finite, got nan"):
        Conditions((("a", math.nan),))
    with pytest.raises(BadInput, match=r"scale 7 with weights 1 needs a negative condition"):
        run(Cfg(7.0), Conditions(((0.3, 1.0),)))
    with pytest.raises(BadInput, match="steps must be at least 1, got 0"):
        next(guided(iter(()), EPS, lambda step: Conditions((("a", 1.0),)), Plain(), steps=0))
    with pytest.raises(ValueError, match="2 rows were asked, 1 outputs"):
        noise = ImageNoise(1, SHAPE)
        walk = sample(Euler(), noise.initial(), GRID, noise)
        coroutine = guided(walk, EPS, lambda step: Conditions(((0.3, 1.0),), 0.0), Cfg(2.0), steps=5)
        coroutine.send([network(next(coroutine)[0])])
