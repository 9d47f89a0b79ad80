"""No file does harm: each of the 72 kinds of hostile file, in all variants, is refused by name, fast, in little memory.

The files are opened one after the other in workers that tell of every process, socket and written file
(:mod:`tests.hostile.worker`), as ``sumuk inspect`` opens them; those of numbers 68 to 72 by the readers that they are
meant for. What opens is read whole as well, since some damage lies in the numbers alone.
"""

from __future__ import annotations

import random
import runpy
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.hostile.case import Case
from tests.hostile.corpus import CASES, reader_of
from tests.hostile.driver import Died, Worker, good_files
from tests.hostile.pickle_files import file, storage, tensor
from tests.hostile.safetensors_cases import one
from tests.hostile.worker import LIGHT

from sumuk.base.errors import BadFile
from sumuk.files.ckpt import read_with
from sumuk.files.ckpt_process import in_process
from sumuk.files.hashes import hashes

NUMBERS = range(1, 73)
SECONDS = 1.0
"""Of a processor, children included; the slowest takes 0.7."""
WAIT = 20.0
"""Wall clock, on however busy a machine."""
MEMORY = 64 * 2**10
"""KiB beyond what the process had; the most is 33,000."""
BARE = 11 * 2**10
"""KiB of an interpreter that does nothing."""
LETTERS = 400
FLIPS = 1000
TURNS = (0, 2, 0, 2, 0, 1)
"""Which of the good files is next; the second is a pickle, for which a process is started."""


class Workers:
    """Both workers, and good files that they must still open."""

    def __init__(self, folder: Path) -> None:
        self.good = good_files(folder)
        self.kinds = {kind: Worker(kind, self.good) for kind in ("light", "heavy")}
        self.turn = count()

    def ask(self, reader: str, path: Path) -> dict[str, Any]:
        return self.kinds["light" if reader.split()[0] in LIGHT else "heavy"].ask(reader, path)

    def still_well(self) -> None:
        """The next good file opens, of each kind in turn."""
        path = self.good[TURNS[next(self.turn) % len(TURNS)]]
        told = self.ask("glance", path)
        assert not told["error"], f"{path.name} after it: {told['message']}"

    def clean(self) -> None:
        """Nothing was left where they work."""
        for worker in self.kinds.values():
            assert worker.left() == []


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    made = Workers(tmp_path_factory.mktemp("good"))
    yield made
    for worker in made.kinds.values():
        worker.stop()
        worker.place.cleanup()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Removed at once: a gigabyte is written in all."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        yield Path(place)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    places = [folder, *sorted(folder.rglob("*"))]
    infos = [(str(place), place.lstat()) for place in places]
    return [(place, info.st_size, info.st_mtime_ns) for place, info in infos]


def refused(case: Case, told: dict[str, Any], path: Path, folder: Path) -> None:
    """By one of our errors, in one line that names the file."""
    assert told["error"] in ("BadFile", "MissingFile", "BadInput"), told["message"] or "was read"
    assert told["code"].startswith(case.code), f"{told['code']}: {told['message']}"
    message = told["message"]
    assert message.isprintable() and len(message) < LETTERS, f"{len(message)} letters: {message}"
    there = {each.name for each in folder.rglob("*")} | {repr(path.name)[1:60], path.stem}
    assert any(name in message for name in there), message


def harmless(told: dict[str, Any]) -> None:
    """Nothing was done, and it cost little."""
    assert told["deeds"] == []
    assert told["kib"] < MEMORY, f"{told['kib']} KiB"
    assert told["cpu"] < SECONDS and told["wall"] < WAIT, (told["cpu"], told["wall"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number} {case.name}")
def test_a_hostile_file_does_no_harm(case: Case, folder: Path, workers: Workers) -> None:
    reader, path = reader_of(case), case.make(folder)
    before = listing(folder)
    told = workers.ask(reader, path)
    harmless(told)
    if reader.split()[0] in LIGHT:
        assert not told["torch"], "looking at a file needs no torch"
        assert told["child_kib"] < BARE + MEMORY, f"a child took {told['child_kib']} KiB"
    if reader == "open":
        shell = told["shell"]
        if told["error"]:
            assert (shell["exit"], shell["out"], shell["err"].count("\n")) == (2, "", 1), shell
        else:
            assert (shell["exit"], shell["err"]) == (0, ""), shell
    said = told["said"]
    if reader == "open" and not told["error"]:
        told = workers.ask("check", path)
        said += told["said"]
        if case.warns is None:
            harmless(told)
    if case.warns is None:
        refused(case, told, path, folder)
    else:
        assert not told["error"], told["message"]
        assert case.warns == "" or any(case.warns in each for each in said), said
    if not reader.startswith("race"):  # there the attacker writes
        assert listing(folder) == before
    workers.clean()
    workers.still_well()


@pytest.mark.parametrize("what", ["process", "socket", "file", "memory", "time", "signal"])
def test_harm_would_be_told(what: str, workers: Workers, tmp_path: Path) -> None:
    if what == "signal":
        with pytest.raises(Died, match="SIGBUS"):
            workers.ask("harm signal", tmp_path)
        return
    told = workers.ask(f"harm {what}", tmp_path)
    assert not told["error"], told["message"]
    with pytest.raises(AssertionError):
        harmless(told)


def test_the_list_is_whole() -> None:
    counts = Counter(case.number for case in CASES)
    assert set(counts) == set(NUMBERS), sorted(set(NUMBERS) ^ set(counts))
    assert len(CASES) >= 200
    twice = [name for name, times in Counter(case.name for case in CASES).items() if times > 1]
    assert not twice, twice


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_each_flipped_bit_is_noticed_where_the_hash_is_known(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"one.{kind}"
    rng = random.Random(3)
    data = rng.randbytes(4000)
    source = storage(count=1000)
    made = {
        "safetensors": one(shape=(1000,), end=4000, data=data),
        "ckpt": file({"w": tensor((1000,), source=source)}, {"0": data}),
    }[kind]
    path.write_bytes(made)
    known, begin = hashes(path).sha256, made.index(data)
    for _ in range(FLIPS):
        at, inside = rng.randrange(len(made)), begin + rng.randrange(len(data))
        path.write_bytes(flipped(made, at, rng))
        assert hashes(path).sha256 != known
        if kind == "ckpt":  # whose archive knows a checksum of its own
            path.write_bytes(flipped(made, inside, rng))
            with pytest.raises(BadFile) as caught:
                read_with(path, in_process)
            assert caught.value.code == "ckpt.crc"


def flipped(raw: bytes, at: int, rng: random.Random) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]


def test_the_example_writes_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "examples" / "hostile.py"
    monkeypatch.setattr("sys.argv", [str(script), "--out", str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    assert len(list((tmp_path / "out").iterdir())) == len(CASES)
    assert capsys.readouterr().out.startswith(f"{len(CASES)} files in ")
