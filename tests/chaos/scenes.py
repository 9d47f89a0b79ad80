"""What a server is put through: kills, overload, leaving clients, signals under load, very many jobs.

Each scene starts real servers (``sumuk serve`` with the miniature), harms them, and returns what it counted.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from tests.serve.conftest import Running, running

PROMPTS = ("a fox, 3d style", "여우, 플랫", "a red heart, flat style", "고양이, 3d")
OVER = ("done", "failed", "cancelled")


def body(chance: random.Random, steps: int | None = None, count: int = 1) -> dict[str, Any]:
    """A small order."""
    return {
        "request": {
            "prompt": chance.choice(PROMPTS),
            "steps": steps or chance.randint(1, 8),
            "count": count,
            "solver": chance.choice(("euler", "dpmpp-2m", "euler-ancestral")),
        }
    }


def percentile(values: list[float], share: float) -> float:
    """The value below which that share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def memory(pid: int) -> int:
    """Bytes of a process that are in memory and its own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(each.split()[1]) * 1024 for each in lines if each.startswith(("Private_", "Pss_Anon")))


def worker_of(server: Running) -> int:
    """The process that draws: the largest that the server started."""
    return max(server.children, key=memory)


# -- kills -------------------------------------------------------------------------------------------------------------


def kills(folder: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """``kill -9`` at random moments, of the server or of what draws, under load, always on the same state.

    Returns:
        kills, jobs acknowledged, lost (no trace, or ended otherwise than done), duplicates (an idempotency key with two
        jobs, or a finished picture that was written again), and pictures.
    """
    chance = random.Random(seed)
    acknowledged: dict[str, tuple[str, int]] = {}
    seen: dict[Path, tuple[int, int]] = {}
    duplicates = changed = 0
    for _ in range(times):
        with running(folder / "state") as server:
            stop = threading.Event()

            def submit(server: Running = server, stop: threading.Event = stop) -> None:
                nonlocal duplicates
                with httpx.Client(base_url=server.url, timeout=10) as client, suppress(httpx.TransportError):
                    while not stop.is_set():
                        key, count = f"{chance.random()}", chance.choice((1, 1, 2))
                        order = body(chance, count=count)
                        for _ in range(chance.choice((1, 2))):  # some clients ask again, to be sure
                            answer = client.post("/api/jobs", json=order, headers={"Idempotency-Key": key})
                            if answer.status_code in (200, 202):
                                job = answer.json()["id"]
                                duplicates += key in acknowledged and acknowledged[key][0] != job
                                acknowledged[key] = (job, count)
                        stop.wait(chance.expovariate(6))

            thread = threading.Thread(target=submit)
            thread.start()
            time.sleep(chance.uniform(0.05, 2.5))
            changed += _look(folder / "state", acknowledged, seen)
            if chance.random() < 0.3:
                with suppress(ProcessLookupError, ValueError):
                    os.kill(worker_of(server), signal.SIGKILL)
                time.sleep(chance.uniform(0.0, 1.0))
            server.process.kill()
            stop.set()
            thread.join()
    lost, pictures = [], 0
    with running(folder / "state") as server:
        for job, count in acknowledged.values():
            told = server.ended(job)
            good = told["state"] == "done" and len(told["pictures"]) == count
            pictures += len(told["pictures"])
            if not good:
                lost.append((job, told["state"], told.get("trouble")))
        changed += _look(folder / "state", acknowledged, seen)
    return {
        "kills": times,
        "jobs": len(acknowledged),
        "lost": lost,
        "duplicates": duplicates + changed,
        "pictures": pictures,
    }


def _look(state: Path, acknowledged: dict[str, tuple[str, int]], seen: dict[Path, tuple[int, int]]) -> int:
    """Look at the finished pictures; how many were written again, for the bytes would be the same."""
    changed = 0
    for job, _ in [*acknowledged.values()]:  # clients go on meanwhile
        for file in (state / "results" / job).glob("*.png"):
            now = file.stat()
            changed += seen.setdefault(file, (now.st_ino, now.st_mtime_ns)) != (now.st_ino, now.st_mtime_ns)
    return changed


# -- overload ----------------------------------------------------------------------------------------------------------


def overload(folder: Path, seconds: float = 15.0) -> dict[str, Any]:
    """Ten times the orders that it can draw: what is refused, how quickly, and what becomes of the rest."""
    chance = random.Random(1)
    with running(folder / "state", "--queue", "16", "--mode", "fast") as server:
        began = time.perf_counter()
        for _ in range(12):
            server.draw(steps=6)
        capacity = 12 / (time.perf_counter() - began)
        before = memory(server.process.pid)
        refused: list[float] = []
        live: list[float] = []
        admitted: list[str] = []
        untold = 0
        until = time.monotonic() + seconds

        def flood() -> None:
            nonlocal untold
            with httpx.Client(base_url=server.url, timeout=30) as client:
                while time.monotonic() < until:
                    start = time.perf_counter()
                    answer = client.post("/api/jobs", json=body(chance, steps=6))
                    if answer.status_code == 202:
                        admitted.append(answer.json()["id"])
                    elif answer.status_code == 429:
                        refused.append(time.perf_counter() - start)
                        untold += "retry-after" not in answer.headers or "position" not in answer.json()
                    else:
                        raise AssertionError(answer.text)
                    time.sleep(max(0.0, 4 / (10 * capacity) - (time.perf_counter() - start)))

        def watch() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                while time.monotonic() < until:
                    start = time.perf_counter()
                    assert client.get("/livez").status_code == 200
                    live.append(time.perf_counter() - start)
                    time.sleep(0.02)

        with ThreadPoolExecutor(5) as pool:
            for each in [*(pool.submit(flood) for _ in range(4)), pool.submit(watch)]:
                each.result()
        states = [server.ended(job)["state"] for job in admitted]
        return {
            "capacity": capacity,
            "offered": (len(admitted) + len(refused)) / seconds,
            "admitted": len(admitted),
            "finished": states.count("done"),
            "refused": len(refused),
            "without Retry-After or position": untold,
            "refusal p99 ms": 1000 * percentile(refused, 0.99),
            "live p99 ms": 1000 * percentile(live, 0.99),
            "front grew MB": (memory(server.process.pid) - before) / 1e6,
        }


# -- leaving clients, signals, many jobs -------------------------------------------------------------------------------


def leavers(folder: Path, times: int) -> dict[str, Any]:
    """Clients that close their connection while their picture is drawn: how soon it stops."""
    with running(folder / "state") as server:
        stopped: list[float] = []
        for number in range(times):
            path, order = (
                ("/v1/images/generations", {"prompt": "a fox", "sumuk": {"steps": 900}}),
                ("/sdapi/v1/txt2img", {"prompt": "a fox", "steps": 900}),
            )[number % 2]
            with suppress(httpx.ReadTimeout), httpx.Client(base_url=server.url) as client:
                client.post(path, json=order, timeout=httpx.Timeout(30, read=0.3))
            start = time.perf_counter()
            while time.perf_counter() - start < 30:
                states = {each["state"] for each in server.client.get("/api/jobs").json()["jobs"]}
                if not states & {"queued", "running"}:
                    break
                time.sleep(0.02)
            stopped.append(time.perf_counter() - start)
        return {"clients": times, "worst s": max(stopped), "median s": statistics.median(stopped)}


def drains(folder: Path, times: int) -> dict[str, Any]:
    """SIGTERM under load, again and again on the same state: codes, how soon unready, what is lost."""
    chance = random.Random(2)
    jobs: list[str] = []
    codes, unready = [], []
    for _ in range(times):
        with running(folder / "state", "--drain", "1") as server:
            for _ in range(6):
                answer = server.client.post("/api/jobs", json=body(chance, steps=chance.choice((4, 60))))
                jobs.append(answer.json()["id"])
            time.sleep(chance.uniform(0, 0.5))
            server.process.send_signal(signal.SIGTERM)
            start = time.perf_counter()
            with suppress(httpx.TransportError):
                while server.client.get("/readyz").status_code == 200:
                    time.sleep(0.01)
            unready.append(time.perf_counter() - start)
            codes.append(server.process.wait(60))
    with running(folder / "state") as server:
        states = [server.ended(job)["state"] for job in jobs]
    return {
        "times": times,
        "codes": sorted({*codes}),
        "unready worst s": max(unready),
        "jobs": len(jobs),
        "lost": len(jobs) - states.count("done"),
    }


def many(folder: Path, jobs: int) -> dict[str, Any]:
    """Very many tiny jobs: how much memory grows after the first quarter."""
    with running(folder / "state", "--mode", "fast", "--queue", "64") as server:
        marks: list[tuple[int, int]] = []

        def some(count: int) -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                for _ in range(count):
                    order = {"prompt": "a fox", "sumuk": {"steps": 1}}
                    answer = client.post("/v1/images/generations", json=order)
                    assert answer.status_code == 200, answer.text

        for _ in range(4):
            with ThreadPoolExecutor(8) as pool:
                for each in [pool.submit(some, jobs // 32) for _ in range(8)]:
                    each.result()
            time.sleep(1.0)
            marks.append((memory(server.process.pid), memory(worker_of(server))))
        (front, worker), (front_end, worker_end) = marks[0], marks[-1]
        return {
            "jobs": 4 * 8 * (jobs // 32),
            "front MB": front_end / 1e6,
            "worker MB": worker_end / 1e6,
            "front grew MB": (front_end - front) / 1e6,
            "worker grew MB": (worker_end - worker) / 1e6,
        }
