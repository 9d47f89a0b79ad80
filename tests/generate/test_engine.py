"""The engine's law: a picture does not know its company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.generate.conftest import Forwards, gap, one, pixels, refusal, run

from sumuk.base.errors import BadInput, Cancelled, SumukError
from sumuk.diffusion.solver import Ask, Euler
from sumuk.diffusion.solvers import SOLVERS, Listing
from sumuk.generate.engine import Engine, Event, Failed, Finished, Preview, Progress
from sumuk.generate.request import make_request
from sumuk.weights.model import Model

LONG = "a fox and a fish in the snow, " * 6
"""Three chunks of the tiny model's text tower and more."""
FAST_TOLERANCE = 2
"""Of 255, for a random network; kernels choose their blocking by the number of rows."""


@pytest.fixture(scope="module")
def eight(photo: Image.Image, hole: Image.Image) -> list[dict[str, Any]]:
    """Eight requests that have as little in common as possible."""
    return [
        {"prompt": "a fox", "solver": "euler", "steps": 4, "seed": 1},
        {"prompt": "the sea", "solver": "euler-a", "steps": 7, "seed": 2, "guidance": 3, "negative": "snow"},
        {"prompt": LONG, "solver": "dpmpp-2m-sde", "steps": 5, "seed": 3, "rescale": 0.5},
        {"prompt": "a fox", "solver": "heun", "steps": 3, "seed": 4, "guidance": 1.0},
        {"prompt": "a fox AND the sea :0.5", "solver": "unipc", "steps": 6, "seed": 5, "clip_skip": 2},
        {"prompt": "[a fox:a fish:0.5] in [the sea|snow]", "solver": "dpmpp-2m", "steps": 6, "seed": 6},
        {"prompt": "fish", "solver": "dpmpp-sde", "steps": 8, "seed": 7, "init": photo, "strength": 0.5},
        {"prompt": "fox", "solver": "lms", "steps": 5, "seed": 8, "init": photo, "mask": hole, "count": 2},
    ]


@pytest.fixture(scope="module")
def alone(model: Model, eight: list[dict[str, Any]]) -> list[list[Finished]]:
    torch.set_num_threads(1)
    return [run(model, request)[0] for request in eight]


def compare(one: list[list[Finished]], other: list[list[Finished]]) -> int:
    assert [len(each) for each in one] == [len(each) for each in other]
    return max(
        gap(a.picture, b.picture) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_eight_unlike_requests_together_give_the_bits_that_each_gives_alone(
    model: Model, eight: list[dict[str, Any]], alone: list[list[Finished]]
):
    together = run(model, *eight)
    assert compare(together, alone) == 0
    for ours, theirs in zip(together, alone, strict=True):
        assert [each.receipt for each in ours] == [each.receipt for each in theirs]
    first = [each[0].picture for each in alone]
    assert len({each.tobytes() for each in first}) == 8, "or equality says nothing"


def test_order_does_not_matter(model: Model, eight: list[dict[str, Any]], alone: list[list[Finished]]):
    assert compare(run(model, *reversed(eight)), alone[::-1]) == 0


def test_fast_mode_is_within_its_tolerance(
    model: Model, eight: list[dict[str, Any]], alone: list[list[Finished]], forwards: Forwards
):
    before = len(forwards)
    together = run(model, *eight, mode="fast")
    assert compare(together, alone) <= FAST_TOLERANCE
    assert max(forwards.rows[before:]) > 2, "unlike requests shared a forward"
    assert {each.receipt["machine"]["mode"] for job in together for each in job} == {"fast"}


def test_one_that_joins_late_changes_nothing(
    model: Model, eight: list[dict[str, Any]], alone: list[list[Finished]]
):
    engine = Engine(model)
    waiting = [make_request(**each) for each in eight]
    jobs, done = [engine.submit(waiting.pop(0))], {}
    while not engine.idle:
        for event in engine.round():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                done[event.job, event.image] = event
        if waiting:
            jobs.append(engine.submit(waiting.pop(0)))
    late = [
        [done[job, image] for image in range(len(theirs))] for job, theirs in zip(jobs, alone, strict=True)
    ]
    assert compare(late, alone) == 0


def test_cancelling_one_stops_it_within_a_step_and_changes_no_other(model: Model, forwards: Forwards):
    requests = [{"steps": 6, "seed": seed, "guidance": 1, "solver": "euler"} for seed in (1, 2, 3)]
    expected = [run(model, each)[0] for each in requests]
    before = len(forwards)
    engine = Engine(model)
    jobs = [engine.submit(make_request(**each)) for each in requests]
    done, failed = {}, []
    for event in engine.events():
        if isinstance(event, Progress) and event.job == jobs[1] and event.step == 2:
            engine.cancel(jobs[1])
        if isinstance(event, Failed):
            failed.append(event)
        if isinstance(event, Finished):
            done[event.job] = event
    assert [each.job for each in failed] == [jobs[1]] and isinstance(failed[0].error, Cancelled)
    assert len(forwards) - before <= 6 + 3 + 6, "at most the step that was under way"
    assert compare([[done[jobs[0]]], [done[jobs[2]]]], [expected[0], expected[2]]) == 0


def test_cancelling_takes_all_pictures_of_a_request(model: Model, forwards: Forwards):
    engine = Engine(model)
    job = engine.submit(make_request(count=3, steps=5))
    engine.cancel(job)
    events = list(engine.events())
    assert [type(each) for each in events] == [Failed] * 3
    assert [each.image for each in events] == [0, 1, 2] and not len(forwards) and engine.idle
    engine.cancel(job)  # too late is no error


def test_a_second_order_solver_is_cancelled_between_its_asks(model: Model, forwards: Forwards):
    engine = Engine(model)
    job = engine.submit(make_request(solver="heun", steps=5, guidance=1))
    engine.round()
    assert len(forwards) == 1
    engine.cancel(job)
    list(engine.events())
    assert len(forwards) == 1


@dataclass(frozen=True)
class Broken(Euler):
    """Fails at its third step."""

    kind: type[Exception] = RuntimeError

    def start(self, grid: Any) -> int:
        return 0

    def step(self, x: Any, now: Any, then: Any, past: int, noise: Any) -> Iterator[Ask]:
        x, _ = yield from super().step(x, now, then, None, noise)
        if past == 2:
            raise self.kind("the solver broke")
        return x, past + 1


@pytest.mark.parametrize("kind", [RuntimeError, ZeroDivisionError, KeyError, SumukError])
def test_a_solver_that_fails_fails_alone(
    model: Model, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    expected = one(model, seed=2)
    monkeypatch.setitem(SOLVERS._entries, "euler", Listing(build=lambda: Broken(kind), reference=""))
    engine = Engine(model)
    jobs = [
        engine.submit(make_request(seed=seed, steps=4, **more))
        for seed, more in ((1, {"solver": "euler"}), (2, {}))
    ]
    last: dict[int, Event] = {event.job: event for event in engine.events()}
    assert isinstance(last[jobs[0]], Failed) and isinstance(last[jobs[0]].error, kind)
    assert isinstance(last[jobs[1]], Finished) and gap(last[jobs[1]].picture, expected) == 0


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_network_that_refuses_one_row_fails_that_request_alone(
    model: Model, mode: str, monkeypatch: pytest.MonkeyPatch
):
    forward = model.denoiser.forward
    marks: list[float] = []

    def picky(x: torch.Tensor, *rest: Any, **inputs: Any) -> torch.Tensor:
        if any(float(row.flatten()[0]) == mark for row in x for mark in marks):
            raise RuntimeError("out of memory")
        return forward(x, *rest, **inputs)

    engine = Engine(model, mode=mode)
    jobs = [engine.submit(make_request(seed=seed, steps=3, guidance=1)) for seed in (1, 2, 3)]
    run_forward = engine._forward

    def mark(rows: list[Any]) -> list[Any]:
        if not marks:
            marks.append(float(rows[1].x.flatten()[0]))
        return run_forward(rows)

    monkeypatch.setattr(engine, "_forward", mark)
    monkeypatch.setattr(model.denoiser, "forward", picky)
    last = {event.job: event for event in engine.events()}
    assert [type(last[job]) for job in jobs] == [Finished, Failed, Finished]
    assert str(last[jobs[1]].error) == "out of memory"


def test_a_prompt_that_fails_midway_fails_alone(model: Model):
    engine = Engine(model)
    bad = engine.submit(make_request(prompt="(a fox:[1.1|2000])", steps=2))
    good = engine.submit(make_request(prompt="a fox", steps=2))
    last = {event.job: event for event in engine.events()}
    assert isinstance(last[bad], Failed) and isinstance(last[bad].error, BadInput)
    assert isinstance(last[good], Finished)


def test_what_cannot_be_drawn_is_refused_at_submit_and_nothing_is_taken_in(model: Model):
    engine = Engine(model)
    refusal(lambda: engine.submit(make_request(solver="eulr")))
    assert engine.idle and not list(engine.events())


def test_numbers_that_overflow_make_no_picture(model: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model.denoiser, "forward", lambda x, *_, **__: torch.full_like(x, float("nan")))
    engine = Engine(model)
    engine.submit(make_request(steps=2))
    (event,) = [each for each in engine.events() if not isinstance(each, Progress)]
    assert isinstance(event, Failed)
    assert "overflowed in float32" in str(event.error) and isinstance(event.error, SumukError)


def test_a_file_that_is_gone_when_it_is_hashed_fails_the_picture_not_the_engine(model: Model, tmp_path: Any):
    from sumuk.weights.model import WeightFile

    engine = Engine(replace(model, files=(WeightFile(tmp_path / "gone.safetensors"),)))
    engine.submit(make_request(steps=2))
    assert isinstance(list(engine.events())[-1], Failed) and engine.idle


# Economy


def test_guidance_1_asks_one_row_a_step(model: Model, forwards: Forwards):
    one(model, solver="euler", steps=5, guidance=1)
    assert forwards.rows == [1] * 5


def test_exact_guidance_asks_two_rows_one_by_one(model: Model, forwards: Forwards):
    one(model, solver="euler", steps=5, guidance=3)
    assert forwards.rows == [1] * 10


def test_outside_its_window_guidance_asks_one_row(model: Model, forwards: Forwards):
    one(model, solver="euler", steps=4, guidance=3, guidance_start=0.5)
    assert forwards.rows == [1, 1, 1, 1, 1, 1]


def test_fast_mode_runs_unlike_requests_in_one_forward(model: Model, forwards: Forwards):
    run(
        model,
        {"prompt": "a fox", "solver": "euler", "steps": 3, "guidance": 5},
        {"prompt": "the sea", "solver": "euler-a", "steps": 3, "seed": 5, "guidance": 1},
        {"prompt": "fish", "solver": "dpmpp-2m-sde", "steps": 2, "guidance": 2},
        mode="fast",
    )
    assert forwards.rows == [5, 5, 3]


def test_what_does_not_fit_together_runs_apart(model: Model, forwards: Forwards):
    run(
        model,
        {"prompt": "a fox", "solver": "euler", "steps": 1},
        {"prompt": LONG, "solver": "euler", "steps": 1},
        {"prompt": "a fox", "solver": "euler", "steps": 1, "width": 72},
        mode="fast",
    )
    assert forwards.rows == [2, 2, 2]


def test_no_forward_has_more_than_most_rows(model: Model, forwards: Forwards):
    engine = Engine(model, mode="fast", most_rows=3)
    engine.submit(make_request(count=4, steps=1, solver="euler", guidance=2))
    list(engine.events())
    assert forwards.rows == [3, 3, 2]


# What it tells


def test_progress_counts_every_step(model: Model):
    engine = Engine(model)
    engine.submit(make_request(steps=4, count=2, hires={"scale": 1.5, "steps": 4}))
    told = [(e.image, e.step, e.steps) for e in engine.events() if isinstance(e, Progress)]
    ways = [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)]
    for image in (0, 1):
        assert [each[1:] for each in told if each[0] == image] == ways


def test_previews_arrive_and_come_closer(model: Model):
    engine = Engine(model)
    engine.submit(make_request(prompt="a fox", steps=6, preview=2, seed=1, solver="euler"))
    events = list(engine.events())
    previews = [each for each in events if isinstance(each, Preview)]
    assert [each.step for each in previews] == [2, 4]
    final = events[-1].picture
    far = [np.abs(pixels(each.picture) - pixels(final)).mean() for each in previews]
    assert previews[0].picture.size == (64, 64) and 0 < far[1] < far[0]
    assert gap(final, one(model, prompt="a fox", steps=6, solver="euler")) == 0, "looking changes nothing"


def test_modes(model: Model):
    assert Engine(model).mode == "exact", "on a CPU"
    assert "unknown mode 'exat'; did you mean 'exact'?" in refusal(lambda: Engine(model, mode="exat"))
    assert "most_rows 0 is below 1" in refusal(lambda: Engine(model, most_rows=0))


def test_the_random_state_of_the_process_does_not_matter(model: Model):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = one(model, solver="dpmpp-2m-sde")
    assert torch.equal(torch.get_rng_state(), before), "and is left alone"
    torch.manual_seed(2)
    assert gap(one(model, solver="dpmpp-2m-sde"), first) == 0
