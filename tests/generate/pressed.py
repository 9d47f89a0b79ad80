"""A process that draws with the miniature while memory is said to be full, again and again.

    python -m tests.generate.pressed ROUNDS

prints as JSON what came of it. A round draws one picture under a fault and one without; 0 rounds draw each request once
and are what a fresh process makes.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sumuk.generate.api import miniature
from sumuk.generate.engine import Engine, Failed, Finished
from sumuk.generate.request import make_request
from sumuk.memory.pressure import free_caches

REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "a fox in the snow", "steps": 1, "guidance": 2.0, "seed": 1},
    {"prompt": "여우, 3d", "steps": 2, "guidance": 1.0, "seed": 2, "solver": "euler-a"},
    {"prompt": "the sea", "steps": 1, "guidance": 1.0, "seed": 3, "hires": {"scale": 1.5, "steps": 2}},
)
SIZE = {"width": 32, "height": 32}
KINDS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    lambda: MemoryError(),
)
HELD = 2_000_000
"""Numbers that a forward holds when it fails: 8 MB, which would add up."""


class Faults:
    """Makes a layer fail with a full memory.

    Attributes:
        calls: of the layer so far.
        raised: errors so far.
        planned: told the number of the call (from 1) and the rows in it, whether this one fails.
    """

    def __init__(self) -> None:
        self.calls = self.raised = 0
        self.planned: Callable[[int, int], bool] = lambda call, rows: False
        self.kinds = itertools.cycle(KINDS)

    @contextmanager
    def inside(self, layer: nn.Module) -> Iterator[Faults]:
        hook = layer.register_forward_pre_hook(self._hook)
        try:
            yield self
        finally:
            hook.remove()

    def _hook(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.calls += 1
        if self.planned(self.calls, len(inputs[0])):
            held = torch.ones(HELD)
            self.raised += 1
            raise next(self.kinds)() if held.numel() else AssertionError

    def at(self, first: int, times: int = 1) -> Faults:
        """Fail from call ``first`` on, ``times`` times in a row."""
        self.planned = lambda call, rows: first <= call < first + times
        return self


def draw(engine: Engine, request: dict[str, Any]) -> str:
    """The digest of a picture; the name of the error if none comes."""
    engine.submit(make_request(**SIZE, **request))
    last = list(engine.events())[-1]
    if isinstance(last, Failed):
        return type(last.error).__name__
    assert isinstance(last, Finished) and "tiled" not in last.receipt["machine"]
    return hashlib.sha256(last.picture.tobytes()).hexdigest()


def resident() -> int:
    """Bytes of this process in memory, when what can be freed is freed."""
    free_caches(torch.device("cpu"))
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * 4096


def main(rounds: int) -> dict[str, Any]:
    """What the pictures are, what the engine counted, and the process's memory before and after."""
    torch.set_num_threads(1)
    model = miniature()
    engine, faults = Engine(model), Faults()
    plain = [draw(engine, request) for request in REQUESTS]
    gc.freeze()  # what is there by now stays, and need not be looked through at each fault
    before = resident()
    places = [(model.denoiser.middle_block, 3), (model.text, 3), (model.vae.decoder.mid, 4)]
    plans = [(layer, times, most) for layer, most in places for times in range(1, most + 1)]
    during, after = [], []
    for number in range(rounds):
        layer, times, most = plans[number % len(plans)]
        which = number // len(plans) % len(REQUESTS)
        first = faults.calls + 1 + (number % 2 if layer is model.denoiser.middle_block else 0)
        with faults.at(first, times).inside(layer):
            during.append([which, draw(engine, REQUESTS[which]), times == most])
        then = (number + 1) % len(REQUESTS)
        after.append([then, draw(engine, REQUESTS[then])])
    return {
        "plain": plain,
        "during": during,
        "after": after,
        "raised": faults.raised,
        "climbed": engine.escalations,
        "before": before,
        "resident": resident(),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
