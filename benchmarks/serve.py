"""What a server gives: pictures a second and latencies at 1, 4 and 16 clients, in one run.

Each client sends one request after the other over HTTP (``/v1/images/generations``) to a real ``sumuk serve`` process.

======================  ============================================================================================
one at a time           ``--together 1``: requests wait for each other, as in a queue without batching
batch of equals         continuous batching, and all requests have the same solver and number of steps
mixed                   continuous batching, and solvers and numbers of steps differ from request to request
======================  ============================================================================================

The mix has as many steps on average as the equal requests. Usage: ``python -m benchmarks.serve [--model FILE]``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

EQUAL = ({"solver": "dpmpp-2m", "steps": 20},)
MIX = (
    {"solver": "dpmpp-2m", "steps": 20},
    {"solver": "euler", "steps": 28},
    {"solver": "euler-ancestral", "steps": 12},
    {"solver": "unipc", "steps": 10},
    {"solver": "ddim", "steps": 30},
    {"solver": "dpmpp-2m-sde", "steps": 20},
)
PROMPTS = ("a fox, 3d style", "여우, 플랫", "a red heart, flat style", "고양이, 3d", "pizza, 3d")
assert statistics.mean(each["steps"] for each in MIX) == EQUAL[0]["steps"]


@dataclass(frozen=True)
class Cell:
    """One measurement: pictures a second, seconds from request to picture."""

    rate: float
    p50: float
    p95: float


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A server, its address, until the block ends."""
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        limits = ("--per-key", "1000000/minute", "--per-address", "1000000/minute", "--no-page")
        command = [sys.executable, "-m", "sumuk", "serve", "--port", "0", "--state", f"{folder}/state"]
        process = subprocess.Popen([*command, *limits, *arguments], stderr=log, stdout=log)
        try:
            yield _ready(process, Path(log.name))
        finally:
            process.terminate()
            process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        said = re.search(r"sumuk serves at (\S+)", log.read_text())
        if said:
            try:
                if httpx.get(f"{said[1]}/readyz", timeout=600).status_code == 200:
                    return said[1]
            except httpx.TransportError:
                pass
        time.sleep(0.1)
    raise SystemExit(f"the server ended with {process.returncode}: {log.read_text()[-1000:]}")


async def load(url: str, clients: int, pictures: int, kinds: tuple[dict[str, object], ...]) -> Cell:
    """So many pictures, asked for by so many clients at once."""
    numbers = itertools.count()
    seconds: list[float] = []

    async def client(http: httpx.AsyncClient) -> None:
        while (number := next(numbers)) < pictures:
            body = {
                "prompt": PROMPTS[number % len(PROMPTS)],
                "sumuk": {**kinds[number % len(kinds)], "seed": number},
            }
            began = time.perf_counter()
            answer = await http.post(f"{url}/v1/images/generations", json=body)
            answer.raise_for_status()
            seconds.append(time.perf_counter() - began)

    async with httpx.AsyncClient(timeout=600) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        whole = time.perf_counter() - began
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return Cell(pictures / whole, statistics.median(seconds), cuts[18])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--pictures", type=int, default=48, help="of each measurement")
    said = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(
        f"{said.pictures} pictures a measurement, {EQUAL[0]['steps']} steps on average, device {said.device}\n"
    )
    print("| mode | how | clients | pictures/s | p50 s | p95 s |\n|---|---|--:|--:|--:|--:|")
    ours = [*(("--model", str(said.model)) if said.model else ()), "--device", said.device]
    for mode in said.modes:
        for title, arguments, kinds in (
            ("one at a time, mixed", ("--together", "1"), MIX),
            ("batch of equals", (), EQUAL),
            ("mixed", (), MIX),
        ):
            with serving(*ours, "--mode", mode, *arguments) as url:
                asyncio.run(load(url, 2, 4, kinds))  # warm
                for clients in said.clients:
                    cell = asyncio.run(load(url, clients, said.pictures, kinds))
                    print(
                        f"| {mode} | {title} | {clients} | {cell.rate:.2f} | {cell.p50:.2f} | {cell.p95:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
