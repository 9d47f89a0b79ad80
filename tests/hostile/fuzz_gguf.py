"""Mutated GGUF files without end: whatever is in them, only our own errors may come out.

A good file is kept as its fields, so that a mutation can put a wrong number exactly where a length, a type or an
offset stands and leave all else whole; plain damage (bits, cuts, splices) goes on top of some.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tests.hostile import gguf_cases as make

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.gguf import BLOCKS, PLAIN, read_gguf

SECONDS = 2.0
NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 31, 32, 33, 64, 127, 128, 255, 256, 1000, 1001, 2**15, 2**16, 2**24,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip
TEXTS = (
    b"", b"\0", b"w", b"..", b"../x", b"/", b"\\", b"\xff", b"\xed\xa0\x80", b"general.alignment", b"pos_embed",
    b"comfy.gguf.orig_shape.", b"comfy.gguf.orig_shape.t0", "수묵".encode(), b"x" * 501, b"x" * 1001,
)  # fmt: skip
Field = tuple[str, bytes]
"""What it is (``"I"``, ``"Q"`` for numbers, ``"s"`` for texts without their length, ``"x"``), and its bytes."""


def _number(letter: str, value: int) -> Field:
    return letter, struct.pack("<" + letter, value)


def _text(value: str) -> list[Field]:
    raw = value.encode()
    return [_number("Q", len(raw)), ("s", raw)]


def _array(name: str, kind: int, count: int, values: list[Field]) -> list[Field]:
    return [*_text(name), _number("I", make.ARRAY), _number("I", kind), _number("Q", count), *values]


def _file(rng: random.Random, kinds: list[int], version: int, alignment: int) -> list[list[Field]]:
    """Entries of a good file: the head, keys, tensors, padding and data."""
    keys: list[list[Field]] = [
        [*_text("general.architecture"), _number("I", make.TEXT), *_text("flux")],
        [*_text("general.alignment"), _number("I", make.U32), _number("I", alignment)],
        [*_text("flag"), _number("I", make.BOOL), ("x", b"\1")],
        [*_text("rate"), _number("I", make.F32), ("x", struct.pack("<f", 0.5))],
        _array("words", make.TEXT, 3, [*_text("a"), *_text("bc"), *_text("")]),
        _array("long", make.U8, 1200, [("x", bytes(1200))]),
    ]
    tensors: list[list[Field]] = []
    data = b""
    for place, kind in enumerate(kinds):
        block, size = BLOCKS[kind][1:] if kind in BLOCKS else (1, PLAIN[kind][1])
        sizes = [block * rng.randint(1, 2), rng.randint(1, 3)] if rng.random() < 0.9 else [block]
        if rng.random() < 0.2:
            sizes = [0, *sizes[1:], 2]
        rows = sizes[1] * (sizes[2] if len(sizes) > 2 else 1) if len(sizes) > 1 else 1
        entry = [*_text(f"t{place}"), _number("I", len(sizes)), *(_number("Q", one) for one in sizes)]
        tensors.append([*entry, _number("I", kind), _number("Q", len(data))])
        if rng.random() < 0.5:
            whole = [_number("I", sizes[0] * rows // 2), _number("I", 2)] if sizes[0] * rows % 2 == 0 else []
            whole = whole or [_number("I", sizes[0] * rows)]
            keys.append(_array(f"comfy.gguf.orig_shape.t{place}", make.I32, len(whole), whole))
        data += rng.randbytes(sizes[0] // block * size * rows)
        data += bytes(-len(data) % alignment)
    head = [("x", b"GGUF"), _number("I", version), _number("Q", len(tensors)), _number("Q", len(keys))]
    front = sum(len(raw) for entry in (head, *keys, *tensors) for _, raw in entry)
    return [head, *keys, *tensors, [("x", bytes(-front % alignment)), ("x", data)]]


def _bytes(entries: list[list[Field]]) -> bytes:
    return b"".join(raw for entry in entries for _, raw in entry)


def _wrong(rng: random.Random, field: Field) -> Field:
    letter, raw = field
    if letter == "s":
        return letter, rng.choice(TEXTS)
    if letter == "x":
        return letter, bytes(byte ^ (1 << rng.randrange(8)) if rng.random() < 0.1 else byte for byte in raw)
    top = 8 * len(raw)
    value = int.from_bytes(raw, "little")
    near = (
        value + rng.choice((-32, -8, -1, 1, 8, 32)),
        value * 2,
        value // 2,
        value ^ (1 << rng.randrange(top)),
    )
    return letter, (rng.choice((*NUMBERS, *near * 3)) % 2**top).to_bytes(len(raw), "little")


def _rearranged(rng: random.Random, entries: list[list[Field]]) -> None:
    """An entry twice, away, or elsewhere; the counts of the head may follow."""
    place = rng.randrange(1, len(entries))
    entry = entries[place]
    what = rng.randrange(3)
    if what == 0:
        entries.insert(place, entry)
    elif what == 1:
        del entries[place]
    else:
        other = rng.randrange(1, len(entries))
        entries[place], entries[other] = entries[other], entry
    if what < 2 and rng.random() < 0.7:
        which = 2 if entry[-1][0] == "Q" else 3
        value = int.from_bytes(entries[0][which][1], "little") + (1 if what == 0 else -1)
        entries[0] = [*entries[0][:which], _number("Q", value % 2**64), *entries[0][which + 1 :]]


def _damaged(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Bits, cuts, additions and splices that know nothing of the format."""
    what = rng.randrange(5)
    if what == 0:
        return raw[: rng.randrange(len(raw) + 1)]
    if what == 1:
        return raw[: rng.randrange(len(raw) + 1)] + other[rng.randrange(len(other) + 1) :]
    if what == 2:
        return raw + rng.randbytes(rng.randrange(1, 70))
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 9)):
        at = rng.randrange(len(changed) if what == 3 else min(len(changed), 400))
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """So many files, the same for a seed; some of them are still good."""
    rng = random.Random(seed)
    kinds = [*BLOCKS, *PLAIN]
    good = [
        _file(rng, rng.choices(kinds, k=rng.randint(0, 5)), rng.choice((2, 3)), rng.choice((8, 32, 64)))
        for _ in range(60)
    ]
    raws = [_bytes(each) for each in good]
    for _ in range(count):
        entries = [list(entry) for entry in rng.choice(good)]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
            entry = rng.choice(entries)
            place = rng.randrange(len(entry))
            entry[place] = _wrong(rng, entry[place])
        if rng.random() < 0.2:
            _rearranged(rng, entries)
        raw = _bytes(entries)
        yield _damaged(rng, raw, rng.choice(raws)) if rng.random() < 0.3 and raw else raw


def check(data: bytes, folder: Path) -> None:
    """One file: read and every tensor loaded, or refused by one of our errors; in time."""
    path = folder / "fuzz.gguf"
    path.unlink(
        missing_ok=True
    )  # thirty times as quick as to shorten the last one, which may be mapped still
    path.write_bytes(data)
    began = time.perf_counter()
    try:
        for one in read_gguf(path).tensors.values():
            tensor = one.load()
            assert tuple(tensor.shape) == one.shape
            assert tensor.numel() * tensor.element_size() <= 32 * len(data), "more than the file can hold"
    except (BadFile, MissingFile) as error:
        assert "\n" not in str(error)
    assert time.perf_counter() - began < SECONDS
