"""Full memory on a real device: torch's allocator refuses, and pictures come all the same."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sumuk.base.errors import OutOfMemory
from sumuk.generate.api import MINIATURE
from sumuk.generate.engine import Engine, Event, Failed, Finished
from sumuk.generate.request import image_digest, make_request
from sumuk.memory.offload import away
from sumuk.memory.pressure import is_full, is_poisoned
from sumuk.weights.checkpoint import load
from sumuk.weights.model import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 2**20
ALONE = {"prompt": "a fox", "steps": 2, "seed": 7}
TOLERANCE = 2
"""Of 255, between batches of another size."""


@pytest.fixture(scope="module")
def model() -> Model:
    return load(MINIATURE, "cuda")


@pytest.fixture
def narrow() -> Iterator[Any]:
    """Limits what torch may take of the device to so many bytes."""

    def limit(size: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, size / torch.cuda.get_device_properties(0).total_memory)
        )

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def settled() -> int:
    """Bytes of tensors on the device."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def ends(engine: Engine, **request: Any) -> list[Event]:
    engine.submit(make_request(**request))
    last = {event.image: event for event in engine.events()}
    return [last[image] for image in sorted(last)]


def pictures(engine: Engine, **request: Any) -> list[Image.Image]:
    events = ends(engine, **request)
    assert all(isinstance(each, Finished) for each in events), events
    return [each.picture for each in events if isinstance(each, Finished)]


def peak(engine: Engine, **request: Any) -> int:
    """Bytes that are taken at most."""
    torch.cuda.reset_peak_memory_stats()
    pictures(engine, **request)
    return torch.cuda.max_memory_reserved()


def gap(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def fresh() -> str:
    """The digest of a picture of a process of its own."""
    code = f"""
from sumuk.generate.api import MINIATURE, generate
from sumuk.generate.request import image_digest, make_request
from sumuk.weights.checkpoint import load
print(image_digest([*generate(load(MINIATURE, "cuda"), make_request(**{ALONE!r}))][-1].picture))
"""
    path = str(Path(__file__).parents[2] / "src")
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


def test_an_allocation_that_is_too_large_is_full_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert is_full(caught.value) and not is_poisoned(caught.value)


def test_a_batch_that_does_not_fit_is_split_and_nothing_remains(model: Model, narrow: Any):
    wanted = {"prompt": "a fox", "steps": 2, "seed": 1, "count": 8, "width": 512, "height": 512}
    engine = Engine(model)
    expected, before = pictures(engine, **wanted), settled()
    most = peak(engine, **wanted)
    narrow(before + 0.5 * (most - before))
    pressed = pictures(engine, **wanted)
    assert engine.escalations["split"] > 0 and engine.escalations["failed"] == 0
    assert max(map(gap, pressed, expected)) <= TOLERANCE
    assert settled() <= 1.01 * before
    narrow(float("inf"))
    assert image_digest(pictures(engine, **ALONE)[0]) == fresh()


def test_a_picture_too_large_for_the_autoencoder_goes_through_it_in_tiles(model: Model, narrow: Any):
    """At strength 0 nothing but the autoencoder works."""
    wanted = {"init": Image.new("RGB", (1024, 1024), "teal"), "strength": 0.0, "seed": 1}
    engine = Engine(model)
    before = settled()
    latent = torch.randn(1, model.latent.channels, 128, 128, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model.decode_latent(latent)
    most = torch.cuda.max_memory_reserved()
    del latent
    narrow(before + 0.6 * (most - before))
    (event,) = ends(engine, **wanted)
    assert isinstance(event, Finished) and event.receipt["machine"]["tiled"] is True
    assert engine.escalations["tile"] > 0 and settled() <= 1.01 * before


def test_where_nothing_fits_the_picture_fails_and_the_next_one_comes(model: Model, narrow: Any):
    engine, before = Engine(model), settled()
    narrow(before + 4 * MIB)
    (event,) = ends(engine, prompt="a fox", steps=1, width=1024, height=1024)
    assert isinstance(event, Failed) and isinstance(event.error, OutOfMemory)
    assert "cuda" in str(event.error) and engine.escalations["failed"] == 1
    assert settled() <= 1.01 * before
    narrow(float("inf"))
    assert image_digest(pictures(engine, **ALONE)[0]) == fresh()


def test_what_is_away_leaves_its_room_and_comes_back_bit_for_bit(model: Model):
    before = settled()
    bits = {name: value.cpu() for name, value in model.vae.state_dict().items()}
    with torch.inference_mode(), away([model.vae, model.text], [model.denoiser]) as freed:
        assert freed > 10 * MIB and before - settled() >= freed
        assert {each.device.type for each in model.vae.parameters()} == {"cpu"}
    assert settled() == before and {each.device.type for each in model.vae.parameters()} == {"cuda"}
    assert all(torch.equal(value.cpu(), bits[name]) for name, value in model.vae.state_dict().items())
