"""Full memory costs the pictures for which there is no way left, and no other one a bit."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.generate.conftest import Forwards, gap, lively, one, refusal, run
from tests.generate.pressed import Faults
from tests.memory.elsewhere import Elsewhere
from tests.weights.tiny import tiny
from torch import nn

from sumuk.base.errors import OutOfMemory
from sumuk.families.family import FAMILIES
from sumuk.generate.draw import draw
from sumuk.generate.engine import Engine, Event, Failed, Finished, Preview, Progress
from sumuk.generate.request import make_request
from sumuk.generate.settings import resolve
from sumuk.nets.adapters import T2IAdapter, T2IShape
from sumuk.weights.model import Control, Model

ROOT = Path(__file__).parents[2]
FAST_TOLERANCE = 2
"""Of 255: see test_engine."""


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    return Elsewhere(monkeypatch)


def ends(engine: Engine) -> dict[tuple[int, int], Event]:
    """The last that is told of each picture."""
    return {(event.job, event.image): event for event in engine.events()}


def drawn(engine: Engine, **request: Any) -> Finished:
    engine.submit(make_request(**({"steps": 2, "seed": 1} | request)))
    (last,) = ends(engine).values()
    assert isinstance(last, Finished), last
    return last


def climbed(engine: Engine) -> dict[str, int]:
    return {rung: times for rung, times in engine.escalations.items() if times}


# A hundred times


def process(module: str, *words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rounds", "raised"), [(46, 100), pytest.param(460, 1012, marks=pytest.mark.slow)], ids=["100", "1000"]
)
def test_after_each_of_many_full_memories_the_next_picture_is_a_fresh_processs(rounds: int, raised: int):
    """In text tower, denoiser and autoencoder; once, twice, until nothing is left to try; and no memory is lost."""
    both = [process("tests.generate.pressed", str(each)) for each in (0, rounds)]
    fresh, pressed = (json.loads(each.communicate(timeout=1200)[0]) for each in both)
    assert pressed["raised"] == raised and len(set(fresh["plain"])) == 3
    for which, digest in pressed["after"]:
        assert digest == fresh["plain"][which]
    for which, digest, hopeless in pressed["during"]:
        assert digest == ("OutOfMemory" if hopeless else fresh["plain"][which])
    lost = sum(hopeless for *_, hopeless in pressed["during"])
    rungs = pressed["climbed"]
    assert (rungs["failed"], rungs["split"], rungs["tile"]) == (lost, 0, 0)
    # Every error led up a rung or ended a picture.
    assert rungs["free"] + rungs["offload"] + lost == raised
    assert pressed["resident"] < 1.01 * pressed["before"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="by a limit of addresses")
def test_memory_that_is_really_full():
    """Four pictures at once in 256, 128, ... 16 MiB: split, in tiles, or refused; then as before, bit for bit."""
    told = json.loads(process("tests.generate.squeezed").communicate(timeout=1200)[0])
    for each in told["told"]:
        ended = each["ended"]
        assert sum(ended.values()) == 4 and ended.keys() <= {"whole", "tiled", "OutOfMemory"}
        assert ended.get("OutOfMemory", 0) == each["climbed"]["failed"]
    assert sum(each["climbed"]["free"] for each in told["told"])
    # Where it was oneDNN that had no memory, the process would be replaced.
    assert told["same"] or told["poisoned"]


# Rung by rung


def test_a_batch_is_halved_and_not_taken_apart(model: Model, faults: Faults, forwards: Forwards):
    """Eight rows where three fit: free, retry, 4 + 4, free, retry, 2 + 2."""
    wanted = {"solver": "euler", "steps": 1, "guidance": 2.0, "count": 4, "seed": 1}
    (alone,) = run(model, wanted, mode="fast")
    before = len(forwards)
    engine = Engine(model, mode="fast")
    faults.planned = lambda call, rows: rows > 3
    with faults.inside(model.denoiser.middle_block):
        engine.submit(make_request(**wanted))
        last = ends(engine)
    assert forwards.rows[before:] == [2, 2, 2, 2] and faults.raised == 6
    assert climbed(engine) == {"free": 3, "split": 3}
    assert (engine.forwards, engine.rows_answered, engine.row_room) == (4, 8, 64)
    assert all(gap(last[0, n].picture, each.picture) <= FAST_TOLERANCE for n, each in enumerate(alone))


def test_an_odd_batch_loses_no_row(model: Model, faults: Faults, forwards: Forwards):
    wanted = {"solver": "euler", "steps": 1, "guidance": 1.0, "count": 5, "seed": 1}
    engine = Engine(model, mode="fast")
    faults.planned = lambda call, rows: rows > 2
    with faults.inside(model.denoiser.middle_block):
        engine.submit(make_request(**wanted))
        assert all(isinstance(each, Finished) for each in ends(engine).values())
    assert forwards.rows == [2, 1, 2]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_row_for_which_there_is_never_room_costs_its_own_picture_alone(
    model: Model, mode: str, monkeypatch: pytest.MonkeyPatch
):
    engine, marks, forward = Engine(model, mode=mode), [], model.denoiser.forward
    expected = [one(model, seed=seed, steps=3, guidance=1.0) for seed in (1, 2, 3)]

    def heavy(x: torch.Tensor, *rest: Any, **inputs: Any) -> torch.Tensor:
        if any(float(row.flatten()[0]) == mark for row in x for mark in marks):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *rest, **inputs)

    jobs = [engine.submit(make_request(seed=seed, steps=3, guidance=1.0)) for seed in (1, 2, 3)]
    together = engine._forward

    def mark(rows: list[Any]) -> list[Any]:
        marks.extend([] if marks else [float(rows[1].x.flatten()[0])])
        return together(rows)

    monkeypatch.setattr(engine, "_forward", mark)
    monkeypatch.setattr(model.denoiser, "forward", heavy)
    last = ends(engine)
    lost = last[jobs[1], 0]
    assert isinstance(lost, Failed) and isinstance(lost.error, OutOfMemory)
    assert (
        "not enough memory on cpu" in str(lost.error)
        and lost.error.__cause__ is lost.error.__context__ is None
    )
    assert engine.escalations["failed"] == engine.escalations["offload"] == 1
    for job in (0, 2):
        event = last[jobs[job], 0]
        assert isinstance(event, Finished)
        assert gap(event.picture, expected[job]) <= (0 if mode == "exact" else FAST_TOLERANCE)


def test_a_lost_picture_is_counted_once_however_many_rows_it_asked(model: Model, faults: Faults):
    engine = Engine(model)
    with faults.at(1, 100).inside(model.denoiser.middle_block):
        engine.submit(make_request(steps=2, guidance=3.0))
        ends(engine)
    assert climbed(engine) == {"free": 2, "offload": 2, "failed": 1}


@pytest.mark.parametrize("times", [2, 3])
def test_tiles_are_told_in_the_receipt_and_forgotten(model: Model, faults: Faults, times: int):
    """A latent of 24 cells a side, a tile of 17. After three faults all but the autoencoder go, and it fits whole."""
    wanted = {"width": 96, "height": 96}
    engine = Engine(model)
    plain = drawn(engine, **wanted)
    with faults.at(1, times).inside(model.vae.decoder.mid):
        pressed = drawn(engine, **wanted)
    again = drawn(engine, **wanted)
    if times == 2:
        assert climbed(engine) == {"free": 1, "tile": 1}
        assert pressed.receipt["machine"].pop("tiled") is True
        assert gap(plain.picture, pressed.picture) > 0
    else:
        assert climbed(engine) == {"free": 1, "tile": 1, "offload": 1}
        assert gap(plain.picture, pressed.picture) == 0
        assert pressed.receipt == plain.receipt
    assert gap(plain.picture, again.picture) == 0 and again.receipt == plain.receipt


def test_a_start_picture_is_encoded_in_tiles_too(model: Model, faults: Faults, photo: Image.Image):
    wanted = {"init": photo.resize((96, 96)), "strength": 0.5, "steps": 4}
    engine = Engine(model)
    with faults.at(1, 2).inside(model.vae.encoder.mid):
        pressed = drawn(engine, **wanted)
    assert climbed(engine) == {"free": 1, "tile": 1} and pressed.receipt["machine"]["tiled"] is True
    assert gap(pressed.picture, drawn(engine, **wanted).picture) > 0


def test_the_quick_decoder_knows_the_ladder(model: Model, faults: Faults):
    from sumuk.nets.tiny import TinyDecoder, TinyShape

    quick = TinyDecoder(TinyShape(width=8)).requires_grad_(False)
    latent = replace(model.latent, stride=8)
    engine = Engine(replace(model, networks=model.networks | {"tiny_decoder": quick}, latent=latent))
    wanted = {"quick": True, "width": 192, "height": 192, "steps": 1}
    with faults.at(1, 2).inside(quick[0]):
        pressed = drawn(engine, **wanted)
    assert climbed(engine) == {"free": 1, "tile": 1}
    assert gap(pressed.picture, drawn(engine, **wanted).picture) < 100


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_text_tower_finds_room_or_fails_its_own_picture(model: Model, faults: Faults, times: int):
    engine, expected = Engine(model), one(model, prompt="a fox", seed=5)
    with faults.at(1, times).inside(model.text):
        pressed = engine.submit(make_request(prompt="a fox", steps=4, seed=5))
        other = engine.submit(make_request(prompt="a fox", steps=4, seed=5))
        last = ends(engine)
    assert isinstance(last[other, 0], Finished) and gap(last[other, 0].picture, expected) == 0
    if times == 3:
        assert isinstance(last[pressed, 0].error, OutOfMemory)
    else:
        assert gap(last[pressed, 0].picture, expected) == 0
    assert list(climbed(engine)) == ["free", "offload", "failed"][:times]


def test_text_of_which_more_is_read_between_two_steps_knows_the_ladder(model: Model, faults: Faults):
    """A prompt that gets longer midway makes the other side longer, by a text that was not read before."""
    wanted = {"prompt": "[:" + "a fox and a fish in the snow, " * 6 + ":2] fox", "steps": 4}
    engine = Engine(model)
    calls = len(reads(model, engine, wanted))
    with faults.at(calls).inside(model.text):
        pressed = drawn(engine, **wanted)
    assert climbed(engine) == {"free": 1}
    assert gap(pressed.picture, one(model, **wanted)) == 0


def reads(model: Model, engine: Engine, wanted: dict[str, Any]) -> list[int]:
    told: list[int] = []
    hook = model.text.register_forward_hook(lambda *_: told.append(1))
    drawn(engine, **wanted)
    hook.remove()
    return told


def test_a_preview_for_which_there_is_no_memory_is_left_out(model: Model, faults: Faults):
    engine, expected = Engine(model), one(model, steps=4)
    with faults.at(1, 2).inside(model.vae.decoder.mid):
        engine.submit(make_request(steps=4, seed=1, preview=1))
        events = list(engine.events())
    assert [event.step for event in events if isinstance(event, Preview)] == [2, 3]
    assert len([event for event in events if isinstance(event, Progress)]) == 4
    assert gap(events[-1].picture, expected) == 0 and "tiled" not in events[-1].receipt["machine"]


def test_full_memory_where_there_is_no_other_way_fails_that_picture(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> dict[str, Any]:
        raise MemoryError

    engine = Engine(model)
    with monkeypatch.context() as patch:
        patch.setattr("sumuk.generate.engine.make_receipt", full)
        engine.submit(make_request(steps=1))
        (last,) = ends(engine).values()
    assert isinstance(last, Failed) and isinstance(last.error, OutOfMemory)
    assert climbed(engine) == {"failed": 1} and gap(drawn(engine, steps=4).picture, one(model)) == 0


def test_nothing_of_a_forward_that_failed_is_held_when_it_is_tried_again(model: Model):
    """Neither by frames nor by the error: its tensors would take the room that the next try needs."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def inside(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        alive.append(any(each() is not None for each in held))
        held.clear()
        own = torch.zeros(3)
        held.extend(
            map(weakref.ref, (own, inputs[0]))
        )  # what a frame here holds, and what the frames above do
        if len(alive) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.denoiser.middle_block.register_forward_pre_hook(inside)
    drawn(Engine(model), steps=1, guidance=1.0)
    hook.remove()
    assert alive == [False] * 3


# Off the device


@pytest.fixture
def guided(model: Model) -> Iterator[Model]:
    """With a second network and a guest that nobody needs."""
    guest = Control(
        kind=FAMILIES["t2i-adapter"], network=T2IAdapter(T2IShape(widths=(32, 64), factor=4)).eval()
    )
    yield replace(model, controls={"sketch": guest})


def test_a_row_runs_alone_on_the_device(guided: Model, faults: Faults, elsewhere: Elsewhere):
    """What is away is made unusable here, so that equal bits say that nothing needed it."""
    expected = one(guided, seed=1, steps=2)
    idle = [guided.text, guided.vae, guided.controls["sketch"].network]
    seen: list[list[bool]] = []
    hook = guided.denoiser.register_forward_hook(
        lambda *_: seen.append([elsewhere.gone(each) for each in (guided.denoiser, *idle)])
    )
    engine = Engine(guided)
    with faults.at(2, 2).inside(guided.denoiser.middle_block):
        pressed = drawn(engine)
    hook.remove()
    assert seen[0] == [False] * 4 and seen[1] == [False, True, True, True] and seen[2] == [False] * 4
    assert gap(pressed.picture, expected) == 0 and climbed(engine) == {"free": 1, "offload": 1}


def test_a_guest_at_work_stays(guided: Model, faults: Faults, elsewhere: Elsewhere, photo: Image.Image):
    steer = {"steer": [{"control": "sketch", "hint": photo}], "steps": 1}
    expected = one(guided, **steer)
    network = guided.controls["sketch"].network
    seen: list[bool] = []
    hook = guided.denoiser.register_forward_hook(lambda *_: seen.append(elsewhere.gone(network)))
    with faults.at(1, 2).inside(guided.denoiser.middle_block):
        pressed = drawn(Engine(guided), **steer)
    hook.remove()
    assert not any(seen) and elsewhere.most_gone and gap(pressed.picture, expected) == 0


@pytest.mark.parametrize("part", ["text", "vae"])
def test_text_and_pixels_have_the_device_without_the_denoiser(
    model: Model, faults: Faults, elsewhere: Elsewhere, part: str
):
    expected = one(model, seed=1, steps=2)
    network = model.networks[part]
    layer = network if part == "text" else network.decoder.mid
    away: list[bool] = []
    hook = layer.register_forward_hook(lambda *_: away.append(elsewhere.gone(model.denoiser)))
    with faults.at(1, 2).inside(layer):
        pressed = drawn(Engine(model))
    hook.remove()
    assert away[0] is True and not any(away[2:]) and not elsewhere.gone(model.denoiser)
    assert gap(pressed.picture, expected) == 0


# What is worse


POISON = RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("place", ["denoiser", "vae", "text", "preview"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_lost_device_is_no_affair_of_one_picture(model: Model, place: str, mode: str):
    def poison(*_: Any) -> None:
        hook.remove()  # said once; what seems to work after it is not to be believed
        raise POISON

    layers = {"denoiser": model.denoiser.middle_block, "text": model.text}
    layer = layers.get(place, model.vae.decoder.mid)
    engine = Engine(model, mode=mode)
    engine.submit(make_request(steps=2, count=2, preview=int(place == "preview")))
    hook = layer.register_forward_pre_hook(poison)
    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        list(engine.events())
    assert caught.value is POISON and climbed(engine) == {}


def test_after_full_memory_a_lost_device_is_still_told(model: Model, monkeypatch: pytest.MonkeyPatch):
    """Freeing caches is where a poisoned device is often met first."""

    def poisoned(device: torch.device) -> None:
        raise POISON

    monkeypatch.setattr("sumuk.generate.ladder.free_caches", poisoned)
    engine = Engine(model)
    engine.submit(make_request(steps=2))
    with Faults().at(1).inside(model.denoiser.middle_block), pytest.raises(RuntimeError, match="device-side"):
        list(engine.events())


# What the server asks of an engine


def test_only_some_pictures_of_a_request(model: Model):
    (every,) = run(model, {"count": 4, "steps": 2})
    engine = Engine(model)
    job = engine.submit(make_request(count=4, steps=2, seed=1), only={3, 1})
    last = ends(engine)
    assert sorted(last) == [(job, 1), (job, 3)]
    assert all(gap(last[job, n].picture, every[n].picture) == 0 for n in (1, 3))
    assert last[job, 3].receipt == every[3].receipt
    told = refusal(lambda: engine.submit(make_request(count=4), only=[0, 4]))
    assert "a request for 4 pictures (from 0) has no picture 4" in told and engine.idle


def test_batch_fill(model: Model):
    engine = Engine(model, mode="fast", most_rows=4)
    engine.submit(make_request(count=3, steps=1, solver="euler", guidance=2.0))
    list(engine.events())
    assert (engine.forwards, engine.rows_answered, engine.row_room) == (2, 6, 8)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_model_may_be_replaced_while_pictures_are_drawn(model: Model, mode: str, photo: Image.Image):
    """Each keeps the one that it was begun with: networks, and guests of the same name."""
    first, second = (
        replace(model, controls={"sketch": Control(kind=FAMILIES["t2i-adapter"], network=adapter(seed))})
        for seed in (1, 2)
    )
    other = lively(tiny(seed=1))
    torch.manual_seed(7)
    for parameter in other.denoiser.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    steer = {"steer": [{"control": "sketch", "hint": photo}], "steps": 3, "seed": 1}
    plain = {"steps": 3, "seed": 1}
    wanted = [(first, steer), (second, steer), (model, plain), (other, plain)]
    expected = [one(each, **request) for each, request in wanted]
    assert min(itertools.starmap(gap, itertools.pairwise(expected))) > 5, "or there is nothing to mix up"
    engine, events = Engine(first, mode=mode), []
    for each, request in wanted:
        engine.model = each
        engine.submit(make_request(**request))
        events += engine.round()
    engine.model = replace(model, controls={})
    events += engine.events()
    for job, picture in enumerate(expected):
        event = [each for each in events if each.job == job][-1]
        assert isinstance(event, Finished), event
        assert gap(event.picture, picture) <= (0 if mode == "exact" else FAST_TOLERANCE)


def test_a_forward_is_where_its_own_network_is_and_in_its_type(model: Model):
    """As a refiner may be of another type than the base, and stays on the device when that leaves."""
    other = replace(model, networks={"denoiser": copy.deepcopy(model.denoiser).bfloat16()})
    both = replace(model, refiner=other)
    with torch.inference_mode():
        rows = next(draw(model, resolve(make_request(steps=1, seed=1), model), 0))
        assert isinstance(rows, list)
        asked = [
            replace(row, condition=replace(row.condition, model=both, network="refiner")) for row in rows
        ]
        engine = Engine(model, mode="fast")
        for ours, theirs in zip(engine._forward(rows), engine._forward(asked), strict=True):
            assert isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
            assert torch.equal(theirs, theirs.bfloat16().float()) and not torch.equal(ours, theirs)


def adapter(seed: int) -> nn.Module:
    network = T2IAdapter(T2IShape(widths=(32, 64), factor=4)).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return network
