"""Reading past the cache gives the same bytes, in memory that is nobody else's; and so does writing."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sumuk.base.errors import BadFile
from sumuk.files import direct
from sumuk.files.atomic import replacing
from sumuk.files.direct import PAGE, Memory, Sink, Source, Sum
from sumuk.files.safetensors import stamp

SIZE = 5 * PAGE + 123


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.bin"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["direct", "cached", "refused at the read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the system lets files be read."""
    monkeypatch.setattr(direct, "_cached", lambda handle: request.param == "cached")
    if request.param.startswith("refused"):
        fill = Source._fill

        def picky(source: Source, handle: int, target: memoryview, at: int) -> int:
            if source._opened is not None and source._opened[0] == handle and source._opened[1] > 1:
                raise OSError(errno.EINVAL, "Invalid argument")
            return fill(source, handle, target, at)

        monkeypatch.setattr(Source, "_fill", picky)
    return request.param


@pytest.mark.parametrize(
    "ends",
    [(0, SIZE), (0, 1), (SIZE - 1, SIZE), (PAGE, 2 * PAGE), (PAGE - 1, PAGE + 1), (7, 7), (4 * PAGE, SIZE)],
)
def test_any_piece_of_a_file(path: Path, ends: tuple[int, int], way: str) -> None:
    begin, end = ends
    source = Source(path)
    assert source.read(begin, end).tobytes() == path.read_bytes()[begin:end]
    assert source.size == SIZE
    if way == "refused at the read":
        assert source._opened is not None and source._opened[1] == 1


def test_beyond_its_end_there_is_nothing(path: Path, way: str) -> None:
    with pytest.raises(OSError, match="ends before"):
        Source(path).read(SIZE - 1, SIZE + 1)


def test_another_file_of_the_same_name_is_not_read(path: Path) -> None:
    source = Source(path, stamp(path))
    path.write_bytes(bytes(SIZE))
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadFile, match="replaced or changed"):
        source.read(0, 1)


def test_memory_comes_back_when_nobody_has_it_and_not_before() -> None:
    memory = Memory()
    one = memory.take(10 * PAGE)
    one[:] = 1
    part = one[5:].view(np.uint8)[2:]
    address = one.ctypes.data
    del one
    other = memory.take(10 * PAGE)
    assert other.ctypes.data != address
    other[:] = 2
    assert (part == 1).all()
    del part
    again = memory.take(9 * PAGE)
    assert again.ctypes.data == address and len(again) == 9 * PAGE
    small = memory.take(PAGE)
    del again
    assert memory.take(PAGE).ctypes.data != address, "a tenth of a block is no use for it"
    assert len(small) == PAGE


def test_idle_memory_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "IDLE", 8 * PAGE)
    memory = Memory()
    arrays = [memory.take(2 * PAGE) for _ in range(10)]
    arrays.clear()
    gc.collect()
    one = memory.take(PAGE)
    assert sum(map(len, memory._idle)) + len(one.base) == 8 * PAGE


def test_memory_comes_back_while_memory_is_asked_for() -> None:
    """Garbage is collected in the middle of anything; with a lock in its way it would wait for itself."""
    memory = Memory()
    one = memory.take(PAGE)
    done = threading.Event()

    def ask() -> None:
        nonlocal one
        with memory._lock:
            del one
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(10)
    assert len(memory._idle) == 1


# -- sums --------------------------------------------------------------------------------------------------------------


def pieces(seed: int) -> list[tuple[int, int]]:
    """A file cut anyhow."""
    cuts = sorted({0, SIZE, *random.Random(seed).sample(range(SIZE), 20)})
    return list(pairwise(cuts))


@pytest.mark.parametrize("seed", range(8))
def test_a_sum_out_of_pieces_in_any_order_some_twice_some_never(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "HELD", (0, PAGE, 100 * PAGE)[seed % 3])
    monkeypatch.setattr(direct, "PIECE", 700)
    told: list[int] = []
    source, dice = Source(path), random.Random(seed)
    one = Sum(source, told.append)
    cut = pieces(seed)
    brought = dice.sample(cut, len(cut) - seed) + cut[:3]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: one.add(each[0], source.read(*each)), brought))
    assert one.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest() == one.hexdigest()
    assert sum(told) == SIZE


def test_what_was_brought_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(path)
    one = Sum(source, lambda count: None)
    brought = [(begin, source.read(begin, end)) for begin, end in pieces(0)]
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("read again"))
    for each in reversed(brought):
        one.add(*each)
    assert one.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("length", [10, 700, 3000])
def test_a_missing_piece_that_comes_at_the_moment_when_it_is_to_be_read(
    path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "PIECE", 700)
    monkeypatch.setattr(direct, "HELD", 0)
    source = Source(path)
    one = Sum(source, lambda count: None)
    decide = Sum._next

    def late(self: Sum, held: int) -> tuple[int, int] | None:
        decided = decide(self, held)
        self._waiting.setdefault(self._at, source.read(self._at, min(self._at + length, SIZE)))
        return decided

    monkeypatch.setattr(Sum, "_next", late)
    one.add(3000, source.read(3000, 4000))
    assert one.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_brought_is_held_within_bounds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "HELD", PAGE)
    source = Source(path)
    one = Sum(source, lambda count: None)
    for begin, end in reversed(pieces(0)):
        one.add(begin, source.read(begin, end))
        assert sum(map(len, one._waiting.values())) <= PAGE


def test_who_listens_may_stop_it(path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sum(Source(path), stop).add(0, np.zeros(10, np.uint8))


def test_a_file_that_cannot_be_read_to_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Sum(Source(path), lambda count: None)

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Source, "_fill", failing)
    with pytest.raises(BadFile, match=r"x\.bin: cannot be read: .*Input/output error"):
        one.hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [(), (1,), (4 * PAGE,), (3, 4 * PAGE, 5), (PAGE, 9 * PAGE + 1, 0, 7 * PAGE)]
)
@pytest.mark.parametrize("refused", [False, True])
def test_what_is_written_lies_there(
    tmp_path: Path, sizes: tuple[int, ...], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "PIECE", 4 * PAGE)
    if refused:
        write = os.write

        def picky(handle: int, data: memoryview) -> int:
            import fcntl

            if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return write(handle, data)

        monkeypatch.setattr(os, "write", picky)
    dice = random.Random(2)
    data = [dice.randbytes(size) for size in sizes]
    with replacing(tmp_path / "out") as file:
        sink = Sink(file)
        for each in data:
            sink.write(each)
        sink.end()
        file.seek(0)
        file.write(b"!")
    whole = b"".join(data)
    assert (tmp_path / "out").read_bytes() == b"!" + whole[1:]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "PIECE", 4 * PAGE)
    (tmp_path / "out").write_text("old")

    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(BadFile, match="No space left"), replacing(tmp_path / "out") as file:
        Sink(file).write(bytes(5 * PAGE))
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "old"
