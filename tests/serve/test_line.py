"""Who is next: everybody once, first come first served within an owner, and fair by cost between owners."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumuk.serve.line import FIRST_PACE, Line, Pace
from sumuk.serve.trouble import Refused

OWNERS = ("a", "b", "c")
COSTS = st.integers(1, 100)
JOBS = st.lists(st.tuples(st.sampled_from(OWNERS), COSTS), max_size=40)


def line(jobs: int = 1000, cost: float = 1e9, job_cost: float = 1e6) -> Line:
    return Line(jobs, cost, job_cost)


def filled(jobs: list[tuple[str, int]], into: Line | None = None) -> Line:
    """Jobs named by owner and number, in the order of the list."""
    into = into or line()
    for number, (owner, cost) in enumerate(jobs):
        into.enter(f"{owner}{number}", owner, cost)
    return into


def served(from_line: Line, count: int = 10**6) -> list[str]:
    taken = []
    while len(taken) < count and (job := from_line.take()) is not None:
        taken.append(job)
    return taken


@given(JOBS)
def test_everybody_is_served_once_and_within_an_owner_in_order(jobs):
    order = served(filled(jobs))
    assert sorted(order) == sorted(f"{owner}{number}" for number, (owner, _) in enumerate(jobs))
    for owner in OWNERS:
        numbers = [int(job[1:]) for job in order if job[0] == owner]
        assert numbers == sorted(numbers)


@given(JOBS, st.integers(0, 40))
def test_positions_are_what_comes_true(jobs, before):
    waiting = filled(jobs)
    served(waiting, before)
    positions = waiting.positions()
    assert all(waiting.position(job) == position for job, position in positions.items())
    assert served(waiting) == sorted(positions, key=positions.__getitem__)
    assert waiting.position("a0") is None


@given(st.lists(COSTS, min_size=1, max_size=30), st.lists(COSTS, min_size=1, max_size=30))
def test_two_who_wait_all_the_time_get_the_same_but_for_one_job_each(first, second):
    """The bound of start-time fair queueing: at no moment more than the two dearest jobs apart."""
    costs = {f"a{n}": c for n, c in enumerate(first)} | {f"b{n}": c for n, c in enumerate(second)}
    waiting = line()
    for job, cost in costs.items():
        waiting.enter(job, job[0], cost)
    got: Counter[str] = Counter()
    while {job[0] for job in waiting.positions()} == {"a", "b"}:
        job = waiting.take()
        got[job[0]] += costs[job]
        assert abs(got["a"] - got["b"]) <= max(first) + max(second)


@given(st.integers(1, 50), COSTS, st.integers(0, 50))
def test_each_light_job_starts_within_one_round(flood, cost, head_start):
    """One flooder and nine others: wherever the flooder is, all nine are served before its second next job."""
    waiting = filled([("f", cost)] * (flood + head_start))
    served(waiting, head_start)
    for number in range(9):
        waiting.enter(f"light{number}", f"owner{number}", cost)
    first_ten = served(waiting, 10)
    assert {f"light{number}" for number in range(9)} <= set(first_ten)


def test_who_was_away_has_saved_nothing_up():
    waiting = filled([("a", 10)] * 20)
    served(waiting, 10)
    for number in range(10):
        waiting.enter(f"b{number}", "b", 10)
    order = [job[0] for job in served(waiting, 8)]
    assert order.count("b") in (4, 5) and "".join(order) in ("babababa", "abababab")


def test_small_jobs_go_more_often():
    waiting = line()
    for number in range(20):
        waiting.enter(f"big{number}", "big", 100)
        waiting.enter(f"small{number}", "small", 10)
    order = served(waiting, 13)
    assert order.count("big0") == 1 and sum(job.startswith("small") for job in order) >= 10


def test_bounds_are_small_whatever_happens():
    """A million jobs' cost does not add up to where a small one is lost in rounding."""
    waiting = line()
    for number in range(1000):
        waiting.enter(f"a{number}", "a", 4e11)
        waiting.enter(f"b{number}", "b", 4e11 + 1)
        served(waiting, 2)
    assert max(waiting._leads.values()) <= 4e11 + 1 and set(waiting._leads) <= {"a", "b"}


@given(JOBS, st.data())
def test_who_leaves_is_not_served_and_harms_nobody(jobs, data):
    waiting = filled(jobs)
    names = list(waiting.positions())
    gone = set(data.draw(st.lists(st.sampled_from(names), unique=True))) if names else set()
    assert all(waiting.leave(job) for job in gone)
    assert not any(waiting.leave(job) for job in gone)
    assert sorted(served(waiting)) == sorted(set(names) - gone)
    assert len(waiting) == 0 and waiting.waiting_cost == 0


def test_what_is_held_is_not_served_before_it_is_open():
    waiting = line()
    waiting.admit("a0", "a", 1)
    waiting.enter("a1", "a", 1)
    waiting.enter("b0", "b", 50)
    assert waiting.position("a0") == 0
    assert served(waiting) == ["b0"]
    waiting.open("a0")
    assert served(waiting) == ["a0", "a1"]


def test_who_was_served_before_goes_to_the_front_of_its_owner():
    waiting = filled([("a", 1), ("a", 1)])
    waiting.enter("again", "a", 1, front=True)
    assert served(waiting) == ["again", "a0", "a1"]


def test_a_full_line_refuses_with_a_time_and_a_position():
    waiting = line(jobs=2, cost=1e9)
    waiting.pace.measured(cost=10.0, seconds=2.0)
    waiting.admit("a0", "a", 50)
    waiting.admit("a1", "a", 50)
    with pytest.raises(Refused, match="2 jobs wait") as caught:
        waiting.admit("a2", "a", 50)
    trouble = caught.value.trouble
    assert (trouble.type, trouble.status) == ("too-many", 429)
    assert trouble.retry_after == pytest.approx(50 / 5)  # one job at the measured 5 a second
    assert trouble.as_problem()["position"] == 2
    assert len(waiting) == 2


def test_cost_is_bounded_too():
    waiting = line(cost=100)
    waiting.admit("a0", "a", 60)
    with pytest.raises(Refused, match="a cost of 60 wait, and this one is of 50") as caught:
        waiting.admit("a1", "a", 50)
    assert caught.value.trouble.retry_after == 1.0
    waiting.admit("a1", "a", 40)


def test_nobody_is_shut_out_by_who_fills_the_line():
    waiting = line(jobs=3, cost=100)
    for number in range(3):
        waiting.admit(f"a{number}", "a", 30)
    waiting.admit("b0", "b", 30)
    with pytest.raises(Refused):
        waiting.admit("b1", "b", 1)


def test_one_job_may_not_cost_more_than_is_allowed():
    with pytest.raises(Refused, match=r"costs 2e\+06 \(pixels x steps x rows") as caught:
        line(job_cost=1e6).admit("a0", "a", 2e6)
    assert caught.value.trouble.type == "bad-value"


def test_the_pace_is_stated_before_and_measured_after():
    pace = Pace()
    assert pace.rate == FIRST_PACE
    for _ in range(100):
        pace.measured(30.0, 3.0)
    assert pace.rate == pytest.approx(10.0)
    for _ in range(100):
        pace.measured(30.0, 1.0)
    assert pace.rate == pytest.approx(30.0, rel=0.02)
