"""Merging two full-size SDXL files: how much memory it takes, and how fast it is beside a plain copy.

    python benchmarks/merge.py --folder /tmp/merge            # 6.9 GB a file, three at a time; removed at the end
    python benchmarks/merge.py --folder /tmp/merge --method slerp --release sd1.5

Files of random float16 numbers are written in the layout of the published one. Then by turns, in a process of its own
each, with the files dropped from the page cache as far as the system does so: a copy through the page cache as ``cp``
makes it, a copy past it as files are written here, both with fsync, and the merge. What counts is the median, against
the faster kind of copy. Memory is the largest resident set that the kernel saw. The merge hashes its parents, which the
result's recipe needs, while it works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

BLOCK = 1 << 24


def make(path: Path, release: str, seed: int) -> int:
    """A file as published, of random numbers; returns its bytes."""
    import torch

    from sumuk.families.published import RELEASES
    from sumuk.files.safetensors import BITS

    header = RELEASES[release].header()
    table: dict[str, object] = {"__metadata__": {"modelspec.prediction_type": "epsilon"}}
    at = 0
    for name in sorted(header, key=lambda name: (-BITS[header[name][0]], name)):
        dtype, shape = header[name]
        end = at + torch.Size(shape).numel() * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    dice = torch.Generator().manual_seed(seed)
    noise = (torch.randn(BLOCK // 2 + 77, generator=dice) * 0.05).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = at
        while left:
            left -= file.write(noise[: min(left, len(noise))])
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + at


def forget(*paths: Path) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, out: Path) -> None:
    """A copy through the page cache; through memory, as a merge cannot leave it to the file system."""
    from sumuk.files.atomic import replacing

    with source.open("rb") as file, replacing(out) as target:
        while piece := file.read(BLOCK):
            target.write(piece)


def direct_copy(source: Path, out: Path) -> None:
    """A copy past the page cache, reading in one thread and writing in another."""
    from concurrent.futures import ThreadPoolExecutor

    from sumuk.files.atomic import replacing
    from sumuk.files.direct import Sink, Source

    file, size = Source(source), source.stat().st_size
    with replacing(out) as target, ThreadPoolExecutor(2) as pool:
        sink, at = Sink(target), 0
        ahead = [
            pool.submit(file.read, begin, min(begin + BLOCK, size)) for begin in (0, BLOCK) if begin < size
        ]
        while ahead:
            sink.write(ahead.pop(0).result())
            at += BLOCK
            if at + BLOCK < size:
                ahead.append(pool.submit(file.read, at + BLOCK, min(at + 2 * BLOCK, size)))
        sink.end()


COPIES = {"copy": copy, "copy past the cache": direct_copy}


def work(task: str, inputs: list[Path], out: Path, method: str) -> None:
    """One measurement, in a process of its own; prints what it took."""
    began = time.perf_counter()
    if task in COPIES:
        COPIES[task](inputs[0], out)
    else:
        from sumuk.weights.merge import merge

        merge(inputs, out, method=method, alpha=0.3)
    took = time.perf_counter() - began
    # Of this process alone: what getrusage tells begins with the parent's.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"seconds": took, "peak": peak, "cpu": time.process_time()}))


def measure(task: str, inputs: list[Path], out: Path, method: str) -> dict[str, float]:
    forget(*inputs)
    command = [
        sys.executable,
        __file__,
        "--work",
        task,
        "--method",
        method,
        "--out",
        str(out),
        *map(str, inputs),
    ]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    made: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("inputs", nargs="*", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to write; three files at a time")
    parser.add_argument("--release", default="sdxl-base", help="which published model's shape")
    parser.add_argument("--times", type=int, default=3, help="how often each is measured")
    parser.add_argument("--method", default="weighted-sum", help="of two models")
    chosen = parser.parse_args()
    if chosen.work:
        return work(chosen.work, chosen.inputs, chosen.out, chosen.method)
    if chosen.folder is None:
        parser.error("give --folder")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    place = chosen.folder / f"merge-benchmark-{os.getpid()}"
    place.mkdir()
    try:
        inputs = [place / "a.safetensors", place / "b.safetensors"]
        size, _ = (make(path, chosen.release, seed) for seed, path in enumerate(inputs))
        print(f"two files of {size / 1e9:.2f} GB, {chosen.release}; {os.cpu_count()} processors\n")
        print(f"{'':24} {'seconds':>8} {'GB/s out':>9} {'peak MB':>8} {'CPU s':>6}  {'each time'}")
        out = place / "out.safetensors"
        found: dict[str, list[dict[str, float]]] = {task: [] for task in (*COPIES, "merge")}
        for _ in range(chosen.times):
            for task, rows in found.items():
                rows.append(measure(task, inputs if task == "merge" else inputs[:1], out, chosen.method))
                out.unlink()
        took = {}
        for task, rows in found.items():
            took[task] = median(row["seconds"] for row in rows)
            speed, peak = size / took[task] / 1e9, max(row["peak"] for row in rows) / 1e6
            each = " ".join(f"{row['seconds']:.1f}" for row in rows)
            cpu = median(row["cpu"] for row in rows)
            title = chosen.method if task == "merge" else task
            print(f"{title:24} {took[task]:8.1f} {speed:9.2f} {peak:8.0f} {cpu:6.1f}  {each}")
        ratio = min(took[task] for task in COPIES) / took["merge"]
        print(f"\nmerging, the hashes of both parents included, runs at {ratio:.2f} of the faster copy")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
