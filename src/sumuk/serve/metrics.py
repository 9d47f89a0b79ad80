"""What a server counts, in the text form of Prometheus. Each server has its own registry; nothing is global."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sumuk.serve.order import ENDED
from sumuk.serve.wire import Vitals

MEDIA = "text/plain; version=0.0.4; charset=utf-8"
LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0)
SHORT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SHARES = tuple(tenths / 10 for tenths in range(1, 11))


class Metrics:
    """The counters; whoever knows a figure sets it."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.queue_jobs = Gauge("sumuk_queue_jobs", "Jobs that wait", registry=registry)
        self.queue_cost = Gauge("sumuk_queue_cost", "Pixels x steps x rows that wait", registry=registry)
        self.running_pictures = Gauge("sumuk_running_pictures", "Pictures at work", registry=registry)
        self.wait_seconds = Histogram(
            "sumuk_wait_seconds", "From admission to the first step", registry=registry, buckets=LONG
        )
        self.job_seconds = Histogram(
            "sumuk_job_seconds", "From admission to the end", ["state"], registry=registry, buckets=LONG
        )
        self.step_seconds = Histogram(
            "sumuk_step_seconds",
            "Mean of a round of the engine, taken once a second while it works",
            registry=registry,
            buckets=SHORT,
        )
        self.batch_fill = Histogram(
            "sumuk_batch_fill",
            "Rows that were computed over the room for them, taken once a second",
            registry=registry,
            buckets=SHARES,
        )
        self.pictures = Counter("sumuk_pictures", "Finished pictures", registry=registry)
        self.jobs = Counter("sumuk_jobs", "Ended jobs", ["state"], registry=registry)
        self._refused = Counter("sumuk_refused", "Calls that were refused", ["cause"], registry=registry)
        self.memory_bytes = Gauge("sumuk_memory_bytes", "Memory in use", ["of"], registry=registry)
        self._worker_deaths = Counter("sumuk_worker_deaths", "Lost workers", registry=registry)
        self._escalations = Counter(
            "sumuk_escalations", "Steps of the ladder against full memory", ["rung"], registry=registry
        )
        self.models_loaded = Gauge("sumuk_models_loaded", "Models in memory", registry=registry)
        self._climbed: dict[str, int] = {}
        for state in ENDED:  # so that a rate can be taken from the first one on
            self.jobs.labels(state)

    def refused(self, cause: str) -> None:
        """A call was refused; ``cause`` is the type of its trouble."""
        self._refused.labels(cause).inc()

    def worker_died(self) -> None:
        """The worker is gone; the next one counts from nothing."""
        self._worker_deaths.inc()
        self._climbed = {}

    def vitals(self, told: Vitals) -> None:
        """What the worker says of itself."""
        if told.rounds:
            self.step_seconds.observe(told.round_seconds / told.rounds)
        if told.row_room:
            self.batch_fill.observe(told.rows / told.row_room)
        self.memory_bytes.labels("worker").set(told.resident)
        self.memory_bytes.labels("device").set(told.device_memory)
        self.models_loaded.set(len(told.models))
        for rung, times in told.escalations.items():  # since its models were loaded
            self._escalations.labels(rung).inc(max(0, times - self._climbed.get(rung, 0)))
        self._climbed = told.escalations

    def text(self) -> bytes:
        """All of it, as :data:`MEDIA`."""
        self.memory_bytes.labels("front").set(resident())
        return generate_latest(self.registry)


def resident() -> int:
    """Bytes of this process in memory; where the system does not say, the most that they ever were."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
