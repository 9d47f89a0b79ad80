"""The server's promises under harm. Longer runs: ``python -m tests.chaos``."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.chaos.scenes import drains, kills, leavers, many, overload

pytestmark = pytest.mark.slow


def test_no_kill_loses_or_repeats_an_acknowledged_job(tmp_path: Path):
    found = kills(tmp_path, 12)
    assert found["jobs"] > 12 and not found["lost"] and not found["duplicates"], found


def test_ten_times_the_load_is_refused_in_words_and_the_rest_is_drawn(tmp_path: Path):
    found = overload(tmp_path)
    assert found["offered"] > 5 * found["capacity"] and found["refused"], found
    assert found["finished"] == found["admitted"] and not found["without Retry-After or position"], found
    assert found["refusal p99 ms"] < 100 and found["live p99 ms"] < 50, found
    assert found["front grew MB"] < 20, found


def test_a_client_that_leaves_stops_its_job(tmp_path: Path):
    found = leavers(tmp_path, 20)
    assert found["worst s"] < 2, found


def test_a_signal_under_load_loses_nothing(tmp_path: Path):
    found = drains(tmp_path, 8)
    assert found["codes"] == [0] and not found["lost"] and found["unready worst s"] < 1, found


def test_two_thousand_jobs_leave_memory_as_it_was(tmp_path: Path):
    found = many(tmp_path, 2000)
    assert found["front grew MB"] < 20 and found["worker grew MB"] < 20, found
