"""What a server counts."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from sumuk.serve.metrics import Metrics, resident
from sumuk.serve.wire import Vitals


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Name and label values -> value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_all_figures_are_there_from_the_start():
    names = {name for name, *_ in samples(Metrics())}
    assert {
        "sumuk_queue_jobs",
        "sumuk_queue_cost",
        "sumuk_running_pictures",
        "sumuk_wait_seconds_count",
        "sumuk_step_seconds_sum",
        "sumuk_batch_fill_sum",
        "sumuk_pictures_total",
        "sumuk_jobs_total",
        "sumuk_worker_deaths_total",
        "sumuk_models_loaded",
        "sumuk_memory_bytes",
    } <= names


def test_two_servers_in_one_process_count_by_themselves():
    one, other = Metrics(), Metrics()
    one.refused("too-many")
    assert samples(one)["sumuk_refused_total", "too-many"] == 1
    assert ("sumuk_refused_total", "too-many") not in samples(other)


def test_vitals():
    metrics = Metrics()
    metrics.vitals(
        Vitals(
            rounds=4,
            round_seconds=2.0,
            rows=6,
            row_room=8,
            resident=1000,
            device_memory=50,
            models=("a", "b"),
        )
    )
    metrics.vitals(Vitals(resident=900))
    found = samples(metrics)
    assert found["sumuk_step_seconds_sum",] == 0.5 and found["sumuk_step_seconds_count",] == 1
    assert found["sumuk_batch_fill_sum",] == 0.75
    assert found["sumuk_memory_bytes", "worker"] == 900
    assert found["sumuk_models_loaded",] == 0


def test_escalations_are_told_since_the_models_were_loaded():
    metrics = Metrics()
    for climbed in ({"split": 2}, {"split": 3, "tile": 1}, {"tile": 1}):  # the one that had split was let go
        metrics.vitals(Vitals(escalations=climbed))
    metrics.worker_died()
    metrics.vitals(Vitals(escalations={"tile": 2}))
    found = samples(metrics)
    assert found["sumuk_escalations_total", "split"] == 3
    assert found["sumuk_escalations_total", "tile"] == 3
    assert found["sumuk_worker_deaths_total",] == 1


def test_the_front_knows_its_own_memory():
    assert 10 * 2**20 < resident() < 2**36
    assert abs(samples(Metrics())["sumuk_memory_bytes", "front"] - resident()) < 64 * 2**20
