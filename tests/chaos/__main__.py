"""``python -m tests.chaos [--kills 200] [--jobs 2000] ...``: every scene at length, and what it counted."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.chaos.scenes import drains, kills, leavers, many, overload

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--kills", type=int, default=200)
parser.add_argument("--seconds", type=float, default=30.0)
parser.add_argument("--clients", type=int, default=100)
parser.add_argument("--signals", type=int, default=50)
parser.add_argument("--jobs", type=int, default=2000)
parser.add_argument("--seed", type=int, default=0)
said = parser.parse_args()
for name, scene in {
    "kill -9": lambda folder: kills(folder, said.kills, said.seed),
    "ten times the load": lambda folder: overload(folder, said.seconds),
    "clients that leave": lambda folder: leavers(folder, said.clients),
    "SIGTERM under load": lambda folder: drains(folder, said.signals),
    "many jobs": lambda folder: many(folder, said.jobs),
}.items():
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        found = scene(Path(made))
    print(f"{name} ({time.monotonic() - began:.0f} s)")
    for key, value in found.items():
        print(f"    {key}: {value:.3g}" if isinstance(value, float) else f"    {key}: {value}", flush=True)
