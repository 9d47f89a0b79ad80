"""Mutated safetensors files without end: whatever is in them, only our own errors may come out.

A good header is kept as its entries, fields and numbers, and its JSON is written here, so that a mutation can put a
wrong value exactly somewhere, or a name twice, and leave all else whole; plain damage (bits, cuts, splices) goes on top
of some. Names are such that scales, codes and markers of quantised files are met as well.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.safetensors import BITS
from sumuk.weights.source import read

SECONDS = 2.0
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 9, 16, 63, 64, 65, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**61,
    2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1, 2**64, -1, -8, -(2**63), 10**30, 10**400,
)  # fmt: skip
ODD = (
    None, True, False, 0.5, 1e300, float("nan"), float("inf"), "", "8", "w", [], {}, [[]], [8], {"a": 1}, "\ud800",
    "\0", "수묵", "\U0001f600",
)  # fmt: skip
NAMES = (
    "w", "", "..", "../x", "/x", "a\\b", "a/../b", "\x00", "\n", "\x7f", "\ud800", "수묵", "x" * 501, "__metadata__",
    "__proto__", "a.weight", "a.scale_weight", "a.scale_input", "a.comfy_quant", "scaled_fp8", "b.weight.absmax",
    "b.weight.quant_map", "b.weight.quant_state.bitsandbytes__nf4", "b.weight", "a.weight_scale_2", "b.weight.SCB",
)  # fmt: skip
TEXTS = (
    "", "pt", "수묵", "\ud800", "x" * 3000, "{", "[]", '{"layers":{}}', '{"layers":{"a":{"format":"float8_e4m3fn"}}}',
    '{"layers":' + "[" * 3000, "1e999", "\x1b[2J", "NaN",
)  # fmt: skip
KEYS = ("format", "modelspec.architecture", "_quantization_metadata", "sumuk.schedule", "", "\0", "k" * 600)
TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud83d", b"null", b"NaN", b"-Infinity", b"1e9",
    b"0.1", b"-0", b"007", b" ", b"\n", b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf", b"/**/", b'"__metadata__":{},',
    b'"w":', b"[" * 2000, b"9" * 5000, "묵".encode(),
)  # fmt: skip
STATE = json.dumps(
    {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [16, 8], "nested_blocksize": 256}
).encode()
Fields = list[tuple[str, Any]]
"""Pairs in the order in which they are written; keys may stand there twice."""


def _text(value: Any) -> str:
    """JSON of pairs, lists, texts and numbers; NaN and half letters as they are."""
    if isinstance(value, tuple):  # pairs, told apart from a list of values
        return "{" + ",".join(f"{json.dumps(key)}:{_text(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


def _quantised(rng: random.Random) -> list[tuple[str, str, list[int], bytes]]:
    """Weights with what belongs to them, 8-bit and 4-bit."""
    scaled = [
        ("a.weight", "F8_E4M3", [4, 8], rng.randbytes(32)),
        ("a.scale_weight", "F32", rng.choice(([], [1], [4, 1])), b""),
        ("a.comfy_quant", "U8", [27], b'{"format": "float8_e4m3fn"}'),
        ("scaled_fp8", "F8_E4M3", [0], b""),
    ]
    codes = [
        ("b.weight", "U8", [64, 1], rng.randbytes(64)),
        ("b.weight.absmax", "F32", [2], bytes(8)),
        ("b.weight.quant_map", "F32", [16], bytes(64)),
        ("b.weight.quant_state.bitsandbytes__nf4", "U8", [len(STATE)], STATE),
    ]
    return rng.choice((scaled, codes, scaled + codes))


def described(dtype: str, shape: list[int], begin: int, size: int) -> tuple[tuple[str, Any], ...]:
    """The fields of a tensor."""
    return ("dtype", dtype), ("shape", shape), ("data_offsets", [begin, begin + size])


def _good(rng: random.Random) -> tuple[Fields, bytes]:
    """A good file: its entries and its data."""
    kinds = [dtype for dtype in BITS if BITS[dtype] >= 8]
    made: list[tuple[str, str, list[int], bytes]] = []
    for place in range(rng.randint(0, 6)):
        shape = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.randint(0, 4))]
        made.append((f"t{place}", rng.choice(kinds), shape, b""))
    if rng.random() < 0.3:
        made += _quantised(rng)
    entries: Fields = []
    data = b""
    for name, dtype, shape, own in made:
        count = prod(shape) * BITS[dtype] // 8
        own = own if len(own) == count else bytes(count) if dtype == "BOOL" else rng.randbytes(count)
        entries.append((name, described(dtype, shape, len(data), count)))
        data += own
    if rng.random() < 0.5:
        entries.insert(0, ("__metadata__", tuple((key, "x") for key in rng.sample(KEYS[:2], 2))))
    return entries, data


def _value(rng: random.Random, value: Any) -> Any:
    """Another value in the place of one."""
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], _value(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, list) and len(value) < 200 and rng.random() < 0.7:
        return rng.choice((value[:-1], [*value, rng.choice(NUMBERS)], value * 2, value * 40, value[::-1]))
    if isinstance(value, str) and len(value) < 200 and rng.random() < 0.7:
        return rng.choice((*BITS, value.lower(), value * 300, "F33"))
    if type(value) is int and rng.random() < 0.8:
        return rng.choice((*NUMBERS, *(value + step for step in (-8, -1, 1, 8)), value * 2, value // 2))
    return rng.choice((*ODD, rng.choice(NUMBERS)))


def _fields(rng: random.Random, fields: Any) -> Any:
    """A tensor's fields, one of them wrong, away, twice or new."""
    if not isinstance(fields, tuple) or not fields:
        return rng.choice(ODD)
    found, at = list(fields), rng.randrange(len(fields))
    key, value = found[at]
    action = rng.randrange(8)
    if action < 5:
        found[at] = (key, _value(rng, value))
    elif action == 5:
        del found[at]
    elif action == 6:
        found.insert(at, (key, _value(rng, value) if rng.random() < 0.5 else value))
    else:
        found.insert(at, (rng.choice(("note", "Dtype", "", "\0")), rng.choice(ODD)))
    return tuple(found)


def _wrong(rng: random.Random, entries: Fields) -> None:
    """One entry wrong, away, twice, renamed or new."""
    if not entries or rng.random() < 0.1:
        texts = tuple((rng.choice(KEYS), rng.choice((*TEXTS, *ODD))) for _ in range(rng.randint(0, 3)))
        entries.insert(rng.randrange(len(entries) + 1), ("__metadata__", texts))
        return
    at = rng.randrange(len(entries))
    name, fields = entries[at]
    action = rng.randrange(10)
    if action < 5:
        entries[at] = (name, _fields(rng, fields))
    elif action == 5:
        del entries[at]
    elif action == 6:
        entries.insert(rng.randrange(len(entries) + 1), (name, fields))
    elif action == 7:
        entries[at] = (rng.choice(NAMES), fields)
    elif action == 8:
        other = rng.randrange(len(entries))
        entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], fields)
    else:
        entries[at] = (name, rng.choice(ODD))


def _header(rng: random.Random, raw: bytes) -> bytes:
    """Damage to the text of a header."""
    at = rng.randrange(len(raw) + 1)
    action = rng.randrange(5)
    if action == 0:
        return raw[:at] + rng.choice(TOKENS) + raw[at:]
    if action == 1:
        return raw[:at] + rng.choice(TOKENS) + raw[at + rng.randrange(9) :]
    if action == 2:
        return raw[:at]
    if action == 3:
        return rng.choice(TOKENS) + raw + rng.choice((b"", *TOKENS))
    changed = bytearray(raw)
    changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _damaged(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Bits, cuts, additions and splices that know nothing of the format."""
    action = rng.randrange(5)
    if action == 0:
        return raw[: rng.randrange(len(raw) + 1)]
    if action == 1:
        return raw[: rng.randrange(len(raw) + 1)] + other[rng.randrange(len(other) + 1) :]
    if action == 2:
        return raw + rng.randbytes(rng.randrange(1, 70))
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 9)):
        changed[rng.randrange(len(changed) if action == 3 else min(len(changed), 200))] ^= 1 << rng.randrange(
            8
        )
    return bytes(changed)


def mutations(
    seed: int, count: int, make: Callable[[random.Random], tuple[Fields, bytes]] = _good
) -> Iterator[bytes]:
    """So many files, the same for a seed; some of them are still good.

    Args:
        seed: of everything.
        count: of files.
        make: a good file's entries and data.
    """
    rng = random.Random(seed)
    good = [make(rng) for _ in range(60)]
    before = b"\x02" + bytes(7) + b"{}"
    for _ in range(count):
        found, data = rng.choice(good)
        entries = list(found)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
            _wrong(rng, entries)
        header = _text(tuple(entries)).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            header = _header(rng, header)
        if rng.random() < 0.3:
            header += b" " * (-len(header) % 8)
        length = len(header)
        if rng.random() < 0.03:
            length = abs(rng.choice((*NUMBERS[:-2], length - 1, length + 1, length + len(data))))
        raw = (length % 2**64).to_bytes(8, "little") + header + data
        made = _damaged(rng, raw, before) if rng.random() < 0.2 else raw
        before = made or before
        yield made


def check(data: bytes, folder: Path) -> None:
    """One file: read and every tensor loaded, or refused by one of our errors; in time."""
    path = folder / "fuzz.safetensors"
    path.unlink(missing_ok=True)  # not shortened: it may be mapped still
    path.write_bytes(data)
    began = time.perf_counter()
    try:
        for one in read(path).tensors.values():
            tensor = one.load()
            assert tuple(tensor.shape) == one.shape
            assert tensor.numel() * tensor.element_size() <= 16 * len(data), "more than the file can hold"
    except (BadFile, MissingFile) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert time.perf_counter() - began < SECONDS
