"""A real server for tests: the process that ``sumuk serve`` is, on a free port, with the miniature."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

FEW = ("--threads", "1", "--per-key", "1000000/minute", "--per-address", "1000000/minute")
"""One thread, so that bits do not depend on the machine's other work; limits out of the way."""
PATIENCE = 60.0


@dataclass
class Running:
    """A server process.

    Attributes:
        url: where it listens.
        client: speaks to it.
        state: its folder.
    """

    process: subprocess.Popen[str]
    url: str
    state: Path
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    @property
    def children(self) -> list[int]:
        """Processes that it started (the worker is the longest-lived)."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(each) for task in tasks for each in task.read_text().split()]

    def draw(self, **values: Any) -> dict[str, Any]:
        """A job, from submission to its end."""
        made = self.client.post("/api/jobs", json={"request": {"steps": 2, **values}})
        assert made.status_code == 202, made.text
        return self.ended(made.json()["id"])

    def ended(self, job: str) -> dict[str, Any]:
        """A job, once it is over."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            told = self.client.get(f"/api/jobs/{job}").json()
            if told["state"] in ("done", "failed", "cancelled"):
                return told
            time.sleep(0.02)
        raise AssertionError(f"job {job} did not end: {told}")

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(sig)
        code = self.process.wait(PATIENCE)
        self.client.close()
        return code


@contextmanager
def running(state: Path, *arguments: str, page: bool = False, ready: bool = True) -> Iterator[Running]:
    """``sumuk serve`` with these arguments, until the block ends.

    Args:
        state: its folder for jobs and results.
        arguments: further ones.
        page: with the web page, whose packages take seconds to import.
        ready: wait until it takes orders.
    """
    command = [sys.executable, "-m", "sumuk", "serve", "--port", "0", "--state", str(state), *FEW, *arguments]
    log = (state.parent / f"{state.name}.log").open("w+")
    process = subprocess.Popen(
        [*command, *(() if page else ("--no-page",))],
        stderr=log,
        stdout=log,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield _answering(process, state, Path(log.name), ready)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()


def _answering(process: subprocess.Popen[str], state: Path, log: Path, ready: bool) -> Running:
    until = time.monotonic() + PATIENCE
    found: Running | None = None
    while time.monotonic() < until:
        assert process.poll() is None, f"the server ended with {process.poll()}: {log.read_text()[-2000:]}"
        said = re.findall(r"sumuk serves at (\S+)", log.read_text())
        if said and found is None:
            found = Running(process, said[-1], state)
        if found is not None:
            try:
                if found.client.get("/readyz" if ready else "/livez").status_code == 200:
                    return found
            except httpx.TransportError:
                pass
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready in {PATIENCE} s: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that leave it as it is."""
    with running(tmp_path_factory.mktemp("server") / "state") as made:
        yield made
