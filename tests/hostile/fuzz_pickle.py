"""Mutated PyTorch files without end: whatever is in them, only our own errors may come out.

Good pickles are kept as their opcodes and good archives as their entries, so that a mutation can put a wrong opcode,
number or field exactly somewhere and leave all else whole, with a right CRC; plain damage (bits, cuts, splices) goes on
top of some.
"""

from __future__ import annotations

import pickle as python_pickle
import pickletools
import random
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.hostile import pickle_files as make
from tests.hostile.pickle_files import End, Ops, Part, archive, call, name, storage, tensor, value

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.ckpt import read_with
from sumuk.files.ckpt_process import in_process

SECONDS = 2.0
SIZES = (0, 1, 2, 3, 4, 5, 16, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
NAMES = (
    ("os", "system"), ("builtins", "eval"), ("__builtin__", "getattr"), ("collections", "OrderedDict"),
    ("torch", "FloatStorage"), ("torch", "Tensor"), ("torch._utils", "_rebuild_tensor_v2"), ("torch", "Size"),
    ("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_sparse_tensor"), ("a.b", "State"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch", "float8_e4m3fn"), ("numpy", "dtype"), ("_codecs", "encode"),
    ("numpy.core.multiarray", "scalar"), ("torch._tensor", "_rebuild_from_type_v2"), ("builtins", "set"),
    ("torch.nn.modules.container", "ParameterDict"), ("", ""), ("x" * 500, "y"), ("\n", "é"),
)  # fmt: skip
LOOSE = [bytes([op]) for op in b"(.012NQR)]}tabesuo\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]


def _bodies() -> list[Any]:
    """What good files hold: all that the machine knows, once each."""
    half = storage("1", "HalfStorage", 8)
    v3 = call(
        "torch._utils", "_rebuild_tensor_v3", storage("2", "UntypedStorage", 6, module="torch.storage"), 0, (2, 3),
        (3, 1), False, {}, name("torch", "float8_e4m3fn"),
    )  # fmt: skip
    number = Ops(
        call("numpy", "dtype", "f8", False, True) + value((3, "<", None, None, None, -1, -1, 0)) + b"b"
    )
    state = Ops(call("trainer.callbacks", "State", 1) + value({"best": tensor(), "path": "x"}) + b"b")
    embedding = Ops(
        name("torch.nn.modules.container", "ParameterDict")
        + b")\x81"
        + value({"_parameters": {"*": tensor((2, 2), (2, 1))}})
        + b"b"
    )
    return [
        {"state_dict": {"a.weight": tensor(), "b": tensor((2, 4), (1, 2), 0, half)}, "epoch": 3, "lr": 1e-4},
        {"string_to_token": {"*": 265}, "string_to_param": embedding, "name": "x", "step": None},
        {
            320: ({"linear.0.weight": tensor((2, 2), (1, 2))}, {"linear.0.bias": tensor((0,), (1,))}),
            "sd": [True, "y"],
        },
        {
            "w": v3,
            "p": call("torch._utils", "_rebuild_parameter", tensor(), True, {}),
            "s": call("torch", "Size", [1]),
        },
        {
            "callbacks": {"x": state},
            "n": call("numpy.core.multiarray", "scalar", number, bytes(8)),
            "w": tensor(),
        },
        call(
            "collections", "OrderedDict", [["a", tensor(source=half, size=(8,))], ["b", (1, 2.5, -3, 2**70)]]
        ),
    ]


DATA = {"0": bytes(range(16)), "1": bytes(16), "2": bytes(6)}
COUNTS = {"0": (4, DATA["0"]), "1": (8, DATA["1"]), "2": (6, DATA["2"])}


@lru_cache(maxsize=1)
def _pickles() -> list[list[bytes]]:
    """Good pickles as their opcodes; some as Python itself writes dicts, with frames and a memo."""
    plain = [
        python_pickle.dumps({"a": [1, 2, {"b": (3.5, None, "x" * 40)}], 7: {True, b"z"}}, p)
        for p in (2, 3, 4)
    ]
    raws = [make.pickle(body) for body in _bodies()] + plain
    found = []
    for raw in raws:
        places = [at for _, _, at in pickletools.genops(raw) if at is not None] + [len(raw)]
        found.append([raw[a:b] for a, b in pairwise(places)])
    return found


def _opcode(rng: random.Random) -> bytes:
    """An opcode of its own, often with an argument at an edge."""
    kind = rng.randrange(7)
    if kind == 0:
        return name(*rng.choice(NAMES))
    if kind == 1:
        return b"\x8a\x09" + rng.choice(SIZES).to_bytes(9, "little")
    if kind == 2:
        return rng.choice((b"h", b"q")) + bytes([rng.randrange(256)])
    if kind == 3:
        return (
            rng.choice((b"j", b"r", b"X", b"B", b"\x95", b"\x8e"))
            + rng.choice(SIZES).to_bytes(9, "little")[:4]
        )
    if kind == 4:
        return value(
            rng.choice(("", "0", "a.b", "../x", "\0", "cpu", "수묵", "x" * 600, -1, 0.5, b"\xff", {}, []))
        )
    return rng.choice(LOOSE) if kind == 5 else bytes([rng.randrange(256)])


def _stream(rng: random.Random) -> bytes:
    """A pickle with none or some of its opcodes wrong."""
    found = list(rng.choice(_pickles()))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
        at = rng.randrange(1, len(found))
        action = rng.randrange(6)
        if action == 0:
            del found[at]
        elif action == 1:
            found.insert(at, _opcode(rng))
        elif action == 2:
            found[at] = _opcode(rng)
        elif action == 3:
            other = rng.choice(_pickles())
            begin = rng.randrange(len(other))
            found[at:at] = other[begin : begin + rng.randrange(12)]
        elif action == 4:
            begin = rng.randrange(1, len(found))
            found[at:at] = found[begin : begin + rng.randrange(30)] * rng.choice((1, 1, 2, 50))
        else:
            raw = bytearray(found[at])
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            found[at] = bytes(raw)
    return b"".join(found)


def _part(rng: random.Random, part: Part) -> Part:
    """An entry with one field wrong."""
    size = rng.choice(SIZES) & 0xFFFFFFFF
    names = (
        b"archive/data.pkl",
        b"x",
        b"",
        b"../x",
        b"archive/data/\xff",
        b"archive/data/" + b"9" * 400,
        b"a\\b",
    )
    fields: dict[str, Any] = rng.choice(
        (
            {"name": rng.choice(names)}, {"local": rng.choice(names)}, {"flags": 1 << rng.randrange(16)},
            {"method": rng.choice((8, 12, 99))}, {"crc": size}, {"size": size}, {"packed": size},
            {"size": size, "packed": size}, {"mode": rng.randrange(2**16)}, {"header": size},
            {"extra": rng.randbytes(rng.randrange(40))}, {"extra": b"\1\0\x18\0" + rng.randbytes(24)},
            {"descriptor": rng.randbytes(rng.choice((1, 12, 16, 24)))}, {"body": rng.randbytes(rng.randrange(40))},
        )
    )  # fmt: skip
    return Part(**{**{key: getattr(part, key) for key in part.__slots__}, **fields})


def _archive(rng: random.Random, stream: bytes) -> bytes:
    entries = make.parts(stream, DATA)
    action = rng.randrange(5)
    if action == 0:
        at = rng.randrange(len(entries))
        entries[at] = _part(rng, entries[at])
    elif action == 1:
        rng.shuffle(entries)
    elif action == 2:
        entries.insert(rng.randrange(len(entries)), rng.choice(entries))
    end = End()
    if rng.random() < 0.1:
        size = rng.choice(SIZES)
        small = size & 0xFFFFFFFF
        end = rng.choice((
            End(comment=b"x"), End(total=size), End(length=small), End(begin=small), End(between=b"PK"),
            End(behind=b"PK\5\6"), End(wide=(size, size, size)), End(wide=(len(entries), size, 0)),
        ))  # fmt: skip
    return archive(entries, end)


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """So many files; the same for the same seed."""
    rng = random.Random(seed)
    before = make.GOOD
    for _ in range(count):
        stream = _stream(rng)
        if rng.random() < 0.75:
            made = _archive(rng, stream)
        else:
            made = make.legacy(Ops(stream[2:-1]), COUNTS)
        damage = rng.randrange(10)
        if damage == 0:
            made = made[: rng.randrange(len(made))]
        elif damage == 1:
            raw = bytearray(made)
            for _ in range(rng.randint(1, 4)):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            made = bytes(raw)
        elif damage == 2:
            made = before[: rng.randrange(len(before) + 1)] + made[rng.randrange(len(made)) :]
        before = made
        yield made


def check(data: bytes, folder: Path) -> None:
    """Read a file, in this process, and all its tensors if it is read; anything but our own errors comes through."""
    path = folder / "mutated.ckpt"
    path.write_bytes(data)
    began = time.perf_counter()
    try:
        for one in read_with(path, in_process).tensors.values():
            assert tuple(one.load().shape) == one.shape
    except (BadFile, MissingFile) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert time.perf_counter() - began < SECONDS
