"""Models in memory: brought in, swapped, let go, and read again where the disk was at fault."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sumuk.base.errors import BadFile, BadInput, MissingFile, OutOfMemory
from sumuk.generate.api import MINIATURE
from sumuk.generate.engine import Finished
from sumuk.generate.request import Request
from sumuk.serve import residents
from sumuk.serve.config import MIB, ServeConfig
from sumuk.serve.offered import Offered
from sumuk.serve.order import Order
from sumuk.serve.residents import Key, Resident, Residents


class Room:
    """Residents over a shelf, and what they told."""

    def __init__(self, **config: Any) -> None:
        made = ServeConfig(**config)
        self.told: list[tuple[str, str]] = []
        self.offered = Offered(made)
        self.residents = Residents(made, self.offered, lambda what, name, _: self.told.append((what, name)))

    def bring(self, name: str | None = None, **beside: str) -> Resident:
        """The model that an order for it gets."""
        key = self.residents.key(Order(values={}, model=name, **beside))
        came: list[Resident | Exception] = []
        there = threading.Event()
        self.residents.want(key, lambda found: (came.append(found), there.set()))  # type: ignore[func-returns-value]
        assert there.wait(60)
        if isinstance(came[0], Exception):
            raise came[0]
        return came[0]


def shelf(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(MINIATURE, folder / f"{name}.safetensors")
    return folder


def until(happens: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < ends
        time.sleep(0.01)


def here(room: Room) -> list[str]:
    return [key[0] for key in room.residents.here]


def drawn(resident: Resident, prompt: str = "a fox, 3d style") -> bytes:
    resident.engine.model = resident.model
    resident.engine.submit(Request(prompt=prompt, steps=2, seed=1))
    return next(e.picture.tobytes() for e in resident.engine.events() if isinstance(e, Finished))


def test_several_models_are_swapped_without_a_restart(tmp_path: Path):
    room = Room(shelf=shelf(tmp_path / "shelf", "one", "two"))
    first = drawn(room.bring("one"))
    assert drawn(room.bring("two")) == first == drawn(room.bring())
    assert here(room) == ["one", "two", "miniature"]
    assert room.bring("One").key[0] == "one", "letter case is forgiven"
    assert room.told.count(("loaded", "one")) == 1


def test_the_least_recently_used_goes_when_room_is_needed(tmp_path: Path):
    size = residents.needs(MINIATURE, ServeConfig())
    room = Room(shelf=shelf(tmp_path / "shelf", "one", "two"), memory=int(2.5 * size))
    kept, gone = room.bring("one"), room.bring("two")
    room.residents.get(kept.key)  # used again
    room.bring()
    assert here(room) == ["one", "miniature"] and gone.key not in room.residents.here
    assert room.residents.size() <= room.residents.budget
    assert drawn(gone) == drawn(kept), "who still holds it can finish"


def test_a_model_at_work_is_not_let_go(tmp_path: Path):
    size = residents.needs(MINIATURE, ServeConfig())
    room = Room(shelf=shelf(tmp_path / "shelf", "one"), memory=int(1.5 * size))
    busy = room.bring("one")
    busy.engine.submit(Request(prompt="a fox", steps=2))
    came = threading.Event()
    room.residents.want(("miniature", None, None), lambda found: came.set())
    assert not came.wait(0.3) and here(room) == ["one"]
    list(busy.engine.events())
    assert came.wait(60) and here(room) == ["miniature"]


def test_a_model_that_is_always_asked_for_makes_room_too(tmp_path: Path):
    """Else whoever waits for another model would wait for as long as one order follows the other."""
    size = residents.needs(MINIATURE, ServeConfig())
    room = Room(shelf=shelf(tmp_path / "shelf", "one"), memory=int(1.5 * size))
    busy = room.bring("one")
    busy.engine.submit(Request(prompt="a fox", steps=2))
    came, again = threading.Event(), threading.Event()
    room.residents.want(("miniature", None, None), lambda found: came.set())
    until(lambda: room.residents.get(busy.key) is None)  # no order is begun with it any more
    room.residents.want(busy.key, lambda found: again.set())
    list(busy.engine.events())
    assert came.wait(60) and again.wait(60), "the next takes its place in turn"
    assert here(room) == ["one"] and room.residents.get(busy.key) is not None


def test_parts_that_are_given_need_room_too(tmp_path: Path):
    config = ServeConfig()
    size, own = residents.needs(MINIATURE, config), residents.needs(MINIATURE, config, "vae")
    assert 0 < own < size / 2, "of a whole checkpoint only what is taken"
    with pytest.raises(OutOfMemory):
        Room(memory=size + own // 2, parts={"vae": MINIATURE}).bring()
    drawn(Room(memory=size + 2 * own, parts={"vae": MINIATURE}).bring())


def test_a_model_that_can_never_fit_is_told_at_once(tmp_path: Path):
    room = Room(memory=64 * MIB)
    with pytest.raises(OutOfMemory, match=r"miniature.*--memory"):
        room.bring()


@pytest.mark.parametrize("size", ["float32", None])
def test_what_a_model_needs_is_read_from_its_header(size: str | None):
    config = ServeConfig(dtype=size)
    loaded = Room(dtype=size).bring()
    assert loaded.size <= residents.needs(MINIATURE, config) <= 1.05 * loaded.size


def test_errors_of_the_disk_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failures = iter([OSError(5, "Input/output error"), OSError(116, "Stale file handle")])
    load = residents.load

    def flaky(*args: Any, **named: Any) -> Any:
        for error in failures:
            raise error
        return load(*args, **named)

    monkeypatch.setattr(residents, "load", flaky)
    monkeypatch.setattr(residents, "PAUSE", 0.01)
    room = Room()
    drawn(room.bring())
    assert next(failures, None) is None

    monkeypatch.setattr(
        residents, "load", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(BadFile, match="Input/output error"):
        Room().bring()


def test_a_damaged_file_is_read_and_told_once_until_it_is_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = shelf(tmp_path / "shelf", "bad")
    path = folder / "bad.safetensors"
    whole = load_file(path)
    save_file({n: t for n, t in whole.items() if "decoder.conv_out" not in n}, path)
    room = Room(shelf=folder)
    for _ in range(3):
        with pytest.raises((BadFile, MissingFile, BadInput)):
            room.bring("bad")
    assert room.told.count(("loading", "bad")) == 1
    assert sum("bad cannot be used" in each.getMessage() for each in caplog.records) == 1
    shutil.copy(MINIATURE, path)
    drawn(room.bring("bad"))


def test_adapters_come_and_go_and_share_the_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    room = Room()
    one = room.bring()
    networks = one.model.networks
    plain = drawn(one)
    asked = Request(prompt="a fox, 3d style <lora:porcelain:1>")
    one.dress(asked, room.offered)
    assert [*one.model.loras] == ["porcelain"] and one.model.networks is networks
    assert drawn(one, asked.prompt) != plain == drawn(one)
    live = one.model.loras["porcelain"]
    one.dress(asked, room.offered)
    assert one.model.loras["porcelain"] is live, "read once"
    monkeypatch.setattr(residents, "MOST_GUESTS", 0)
    one.dress(Request(prompt="a fox"), room.offered)
    assert not one.model.loras
    with pytest.raises(MissingFile, match="nobody"):
        one.dress(Request(prompt="a fox <lora:nobody:1>"), room.offered)


def test_a_changed_adapter_is_read_anew(tmp_path: Path):
    folder = shelf(tmp_path / "shelf")
    lora = MINIATURE.with_name("porcelain.safetensors")
    shutil.copy(lora, folder / "ink.safetensors")
    room = Room(shelf=folder)
    one = room.bring()
    asked = Request(prompt="a fox, 3d style <lora:ink:1>")
    one.dress(asked, room.offered)
    before = drawn(one, asked.prompt)
    save_file(
        {n: t * (2 if "up" in n else 1) for n, t in load_file(lora).items()}, folder / "ink.safetensors"
    )
    one.dress(asked, room.offered)
    assert drawn(one, asked.prompt) != before


@pytest.mark.parametrize(
    "key", [("nobody", None, None), ("miniature", "nobody", None), ("miniature", None, "nobody")]
)
def test_names_that_are_not_offered(key: Key):
    room = Room()
    with pytest.raises(MissingFile, match="nobody"):
        if key[0] == "nobody":
            room.residents.key(Order(values={}, model="nobody"))
        room.bring(vae=key[1], refiner=key[2])  # type: ignore[arg-type]
