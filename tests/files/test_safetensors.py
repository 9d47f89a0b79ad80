"""Headers: good ones are read as the library reads them, hostile ones are refused by name, fast, in little memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.safetensors import MAX_TENSORS, read_header
from sumuk.files.tensors import from_header


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(shape=(2,), begin=0, end=8, dtype="F32", **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def one(name="w", data=bytes(8), **kinds) -> bytes:
    return raw(json.dumps({name: entry(**kinds)}).encode(), data)


def two(first: dict, second: dict, data=bytes(16)) -> bytes:
    return raw(json.dumps({"a": first, "b": second}).encode(), data)


GOOD = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

HOSTILE = {  # name: (bytes, code)
    "empty": (b"", "short"),
    "seven bytes": (bytes(7), "short"),
    "header length 0": (bytes(8), "start"),
    "header length 2^63": ((2**63).to_bytes(8, "little") + bytes(64), "length"),
    "header length 2^64-1": ((2**64 - 1).to_bytes(8, "little") + bytes(64), "length"),
    "header longer than the file": ((len(GOOD) + 9).to_bytes(8, "little") + GOOD + bytes(8), "length"),
    "a ZIP pickle": (b"PK\x03\x04" + bytes(200), "length"),
    "a web page": (b"<!DOCTYPE html><html>" + b" " * 50, "length"),
    "not UTF-8": (raw(b'{"\xff\xfe":1}'), "utf8"),
    "byte order mark": (raw(b"\xef\xbb\xbf" + GOOD, bytes(8)), "start"),
    "a list": (raw(b"[]"), "start"),
    "leading space": (raw(b" " + GOOD, bytes(8)), "start"),
    "trailing NULs": (raw(GOOD + bytes(8), bytes(8)), "json"),
    "second JSON": (raw(GOOD + b"{}", bytes(8)), "json"),
    "cut JSON": (raw(GOOD[:-1], bytes(8)), "json"),
    "duplicate tensor": (raw(GOOD[:-1] + b"," + GOOD[1:], bytes(8)), "duplicate"),
    "duplicate field": (raw(GOOD.replace(b'"F32"', b'"F32","dtype":"F32"'), bytes(8)), "duplicate"),
    "duplicate metadata": (raw(b'{"__metadata__":{"a":"1","a":"2"}}'), "duplicate"),
    "two metadata": (raw(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate"),
    "metadata not texts": (raw(b'{"__metadata__":{"a":1}}'), "metadata"),
    "metadata a list": (raw(b'{"__metadata__":[]}'), "metadata"),
    "too much metadata": (raw(json.dumps({"__metadata__": {str(i): "" for i in range(10_001)}}).encode()), "metadata"),
    "unknown field": (one(note="x"), "fields"),
    "missing field": (raw(b'{"w":{"dtype":"F32","shape":[2]}}', bytes(8)), "fields"),
    "entry a list": (raw(b'{"w":[]}'), "fields"),
    "unknown dtype": (one(dtype="F33"), "dtype"),
    "dtype a number": (one(dtype=32), "dtype"),
    "odd number of 4-bit elements": (one(dtype="F4", shape=(3,), end=1, data=bytes(1)), "size"),
    "negative offset": (one(begin=-8, end=0, data=b""), "offsets"),
    "reversed offsets": (one(begin=8, end=0), "offsets"),
    "float offsets": (raw(GOOD.replace(b"[0,8]", b"[0.0,8.0]"), bytes(8)), "number"),
    "true as offset": (raw(GOOD.replace(b"[0,8]", b"[false,8]"), bytes(8)), "offsets"),
    "three offsets": (raw(GOOD.replace(b"[0,8]", b"[0,4,8]"), bytes(8)), "offsets"),
    "infinite offset": (raw(GOOD.replace(b"[0,8]", b"[0,Infinity]"), bytes(8)), "number"),
    "5,000-digit offset": (raw(GOOD.replace(b"[0,8]", b"[0," + b"8" * 5000 + b"]"), bytes(8)), "json"),
    "same bytes twice": (two(entry(), entry(), bytes(8)), "overlap"),
    "partial overlap": (two(entry(), entry(begin=4, end=12), bytes(12)), "overlap"),
    "hole before": (one(begin=8, end=16, data=bytes(16)), "hole"),
    "hole between": (two(entry(), entry(begin=12, end=20), bytes(20)), "hole"),
    "ZIP tail": (one(data=bytes(8) + b"PK\x05\x06" + bytes(18)), "tail"),
    "truncated": (one(data=bytes(7)), "truncated"),
    "shape and span disagree": (one(shape=(3,)), "size"),
    "shape overflow": (one(shape=(2**62, 2**62)), "size"),
    "dimension above 2^63": (one(shape=(2**64 - 1, 0), end=0, data=b""), "shape"),
    "negative dimension": (one(shape=(-2,)), "shape"),
    "empty tensor inside another": (two(entry(), entry(shape=(0,), begin=4, end=4), bytes(8)), "overlap"),
    "65 dimensions": (one(shape=(1,) * 65, end=4, data=bytes(4)), "shape"),
    "empty name": (one(name=""), "name"),
    "path as name": (one(name="../../etc/passwd"), "name"),
    "absolute path as name": (one(name="/etc/passwd"), "name"),
    "windows path as name": (one(name="..\\x"), "name"),
    "NUL in name": (one(name="a\0b"), "name"),
    "lone surrogate in name": (raw(GOOD.replace(b'"w"', b'"\\ud800"'), bytes(8)), "name"),
    "501 characters in name": (one(name="x" * 501), "name"),
    "100,000 deep": (raw(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "depth"),
    "many empty tensors": (
        raw(b"{%s}" % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(500_000))),
        "count",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, code = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(BadFile) as caught:
        read_header(path)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == f"safetensors.{code}"
    assert "hostile.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert seconds < 1.0
    assert peak < 64 * 2**20


def test_good_header_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt", "note": "여우"})
    header = read_header(tmp_path / "good.safetensors")
    assert header.metadata == {"format": "pt", "note": "여우"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    lazies = from_header(header)
    for name, value in tensors.items():
        assert torch.equal(lazies[name].load(), value), name


def test_a_bool_that_is_neither_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bool.safetensors"
    path.write_bytes(one(dtype="BOOL", shape=(2,), end=2, data=b"\x01\x07"))
    with pytest.raises(BadFile, match="BOOL"):
        from_header(read_header(path))["w"].load()


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="absent"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(BadFile, match="folder"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(BadFile, match="regular"):  # and does not wait for someone to write into it
        read_header(tmp_path / "pipe.safetensors")


def test_a_file_replaced_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    lazies = from_header(read_header(path))
    save_file({"w": torch.zeros(4), "x": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(BadFile, match="replaced") as caught:
        lazies["w"].load()
    assert caught.value.code == "file.changed"


def test_twenty_four_gigabytes_are_opened_at_once(tmp_path: Path) -> None:
    """Only the header is read: a sparse file of a large model's size opens in a fraction of a second."""
    count, size = 1000, 24_000_000
    table = {
        f"block.{i}.weight": entry(shape=(size // 2,), begin=i * size, end=(i + 1) * size, dtype="F16")
        for i in range(count)
    }
    path = tmp_path / "large.safetensors"
    header = json.dumps(table).encode()
    path.write_bytes(raw(header))
    os.truncate(path, 8 + len(header) + count * size)
    began = time.perf_counter()
    assert len(read_header(path).tensors) == count
    assert time.perf_counter() - began < 0.5


def test_the_limit_is_far_above_real_files() -> None:
    assert MAX_TENSORS >= 100_000
