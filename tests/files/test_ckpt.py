"""PyTorch files are read bit for bit as they were saved: every kind of tensor, nesting and container of torch.save."""

from __future__ import annotations

import argparse
import collections
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.hostile import pickle_files as make
from torch import nn

from sumuk.base.errors import BadFile, MissingFile
from sumuk.files.ckpt import Pickled, read_ckpt, read_with
from sumuk.files.ckpt_process import in_process
from sumuk.files.tensors import dtype_name, write

WRITERS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "old": {"_use_new_zipfile_serialization": False},
    "old, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
KINDS = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def saved(of: Any, path: Path, **how: Any) -> Pickled:
    torch.save(of, path, **how)
    return read_with(path, in_process)


def flat(of: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Tensors by their paths, worked out another way."""
    if isinstance(of, torch.Tensor):
        return {path: of.detach()}
    pairs = of.items() if isinstance(of, dict) else enumerate(of) if isinstance(of, list | tuple) else ()
    return {n: t for key, one in pairs for n, t in flat(one, f"{path}.{key}".lstrip(".")).items()}


def assert_same(read: Pickled, of: Any) -> None:
    expected = flat(of)
    assert list(read.tensors) == list(expected)
    for name, tensor in expected.items():
        found = read.tensors[name]
        loaded = found.load()
        assert found.dtype == dtype_name(tensor.dtype) and found.shape == tuple(tensor.shape) == tuple(
            loaded.shape
        )
        assert loaded.dtype == tensor.dtype and loaded.is_contiguous() and found.source == str(read.path)
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (loaded, tensor) if t.numel()]
        assert not raw or torch.equal(*raw), name


def every_kind() -> dict[str, Any]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tied = torch.randn(3, 3)
    tensors: dict[str, Any] = {str(kind): (torch.rand(2, 3) * 3).to(kind) for kind in KINDS}
    tensors |= {
        "transposed": base.t(), "sliced": base[1:4, 2:5], "every second": base[::2, ::3], "row": base[3],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
        "expanded by one": torch.arange(7).expand(1, -1), "tied.a": tied, "tied.b": tied, "tied.c": tied.t(),
        "parameter": nn.Parameter(torch.randn(4)), "frozen": nn.Parameter(torch.randn(4), requires_grad=False),
        "within": torch.arange(10)[3:7].expand(1, 4), "NaN": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }  # fmt: skip
    return tensors


@pytest.mark.parametrize("how", WRITERS)
def test_every_kind_of_tensor(how: str, tmp_path: Path) -> None:
    of = every_kind()
    path = tmp_path / "수묵 x.pt"
    assert_same(saved(of, path, **WRITERS[how]), of)


def lightning() -> tuple[dict[str, Any], types.ModuleType]:
    """A training checkpoint as Lightning 1.4 wrote it: callbacks by class, optimizers, trainers' objects."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    for name, base in {"ModelCheckpoint": object, "AttributeDict": dict}.items():
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    state = {at: {"step": 2, "exp_avg": one.detach() * 0.1} for at, one in enumerate(network.parameters())}
    optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(state)}]}
    schedule = {"base_lrs": [1e-3], "last_epoch": 2, "lr_lambdas": [None]}
    monitor = module.ModelCheckpoint()  # type: ignore[attr-defined]
    monitor.best, monitor.config = torch.tensor(0.5), argparse.Namespace(rate=1, inner=[argparse.Namespace()])
    checkpoint = {
        "epoch": 3, "global_step": np.int64(875_000), "pytorch-lightning_version": "1.4.2", "loss": np.float64(0.25),
        "state_dict": {f"model.diffusion_model.{k}": v for k, v in network.state_dict().items()},
        "callbacks": {module.ModelCheckpoint: {"monitor": None, "best_score": torch.tensor(0.25), "it": monitor}},
        "optimizer_states": [optimizer], "lr_schedulers": [schedule],
        "hyper_parameters": module.AttributeDict(a=1), "seen": {1, 2}, "betas": (0.9, 0.999), "where": Path("x"),
        "counts": collections.Counter("aab"), "kinds": collections.defaultdict(list, {"x": [1]}),
        "dtype": torch.float16, "device": torch.device("cuda", 1), "size": torch.Size([2, 3]), "none": {},
        "huge": 2**70,
    }  # fmt: skip
    return checkpoint, module


@pytest.mark.parametrize("how", WRITERS)
def test_a_training_checkpoint(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, module = lightning()
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save(of, tmp_path / "last.ckpt", **WRITERS[how])
    read = read_ckpt(tmp_path / "last.ckpt")
    monitor = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    of["callbacks"] = {monitor: {"best_score": of["callbacks"][module.ModelCheckpoint]["best_score"]}}
    assert_same(read, of)
    assert f"callbacks.{monitor}.best_score" in read.tensors
    assert "optimizer_states.0.state.0.exp_avg" in read.tensors
    values = read.values
    assert values["epoch"] == 3 and values["global_step"] == 875_000 and values["loss"] == 0.25
    assert values["callbacks"] == {monitor: {"monitor": None}}
    group = values["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] == 1e-3 and group["betas"] == [0.9, 0.999] and group["params"] == [0, 1, 2, 3, 4, 5]
    assert sorted(values["seen"]) == [1, 2] and values["betas"] == [0.9, 0.999] and values["huge"] == 2**70
    assert values["counts"] == {"a": 2, "b": 1} and values["kinds"] == {"x": [1]} and values["none"] == {}
    assert (values["dtype"], values["device"], values["size"]) == ("torch.float16", "cuda:1", [2, 3])
    assert not {"state_dict", "hyper_parameters", "where"} & values.keys()
    told = {one.partition(" ")[0]: one for one in read.foreign}
    assert set(told) == {
        monitor, "pytorch_lightning.callbacks.model_checkpoint.AttributeDict", "argparse.Namespace",
        "pathlib.PosixPath", "torch.Tensor",
    }  # fmt: skip
    assert "2 times" in told["argparse.Namespace"] and "'where'" in told["pathlib.PosixPath"]
    assert "'callbacks" in told["torch.Tensor"]  # in the callback's object: left out, and said so


def test_an_embedding(tmp_path: Path) -> None:
    """As A1111 writes it, and as the first scripts did, with a ParameterDict."""
    vectors = torch.randn(2, 768)
    for number, table in enumerate(({"*": vectors}, nn.ParameterDict({"*": nn.Parameter(vectors)}))):
        read = saved(
            {
                "string_to_token": {"*": 265}, "string_to_param": table, "name": "수묵", "step": 3000,
                "sd_checkpoint": "7460a6fa", "sd_checkpoint_name": None,
            },
            tmp_path / f"{number}.pt",
        )  # fmt: skip
        assert torch.equal(read.tensors["string_to_param.*"].load(), vectors) and len(read.tensors) == 1
        assert read.values == {
            "string_to_token": {"*": 265}, "name": "수묵", "step": 3000, "sd_checkpoint": "7460a6fa",
            "sd_checkpoint_name": None,
        }  # fmt: skip
        assert not read.foreign
    read = saved({"<cat>": vectors[0]}, tmp_path / "learned_embeds.bin")
    assert torch.equal(read.tensors["<cat>"].load(), vectors[0])


def test_a_hypernetwork(tmp_path: Path) -> None:
    def one(width: int) -> dict[str, torch.Tensor]:
        return nn.Sequential(nn.Linear(width, width * 2), nn.Linear(width * 2, width)).state_dict()

    of: dict[Any, Any] = {width: (one(width), one(width)) for width in (8, 16)}
    of |= {
        "step": 10,
        "name": "h",
        "layer_structure": [1, 2, 1],
        "activation_func": None,
        "is_layer_norm": False,
    }
    read = saved(of, tmp_path / "h.pt")
    assert_same(read, of)
    assert "16.1.1.weight" in read.tensors
    assert read.values == {key: one for key, one in of.items() if isinstance(key, str)}


def test_a_network_pickled_whole_is_named(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2), "epoch": 1}, tmp_path / "a.pt")
    read = read_with(tmp_path / "a.pt", in_process)
    assert not read.tensors and read.values == {"epoch": 1}
    assert any(
        one.startswith("torch.nn.modules.linear.Linear (1 time, first at 'model')") for one in read.foreign
    )
    torch.save(nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(BadFile, match=r"Linear.*state_dict"):
        read_with(tmp_path / "b.pt", in_process)


def sparse(path: Path, inner: bytes, hole: int, last: bytes, crc: int = 0) -> None:
    """An archive with 64-bit fields whose storage "0" is a hole, told to have a CRC32, and "1" is not."""
    bodies = ((b"data.pkl", inner, len(inner)), (b"data/0", b"", hole), (b"data/1", last, len(last)))
    directory = b""
    with path.open("wb") as file:
        for name, body, size in bodies:
            at, full = file.tell(), b"archive/" + name
            fields = struct.pack("<4H3I", 0, 0, 0, 0, zlib.crc32(body) if body else crc, 2**32 - 1, 2**32 - 1)
            pad = -(at + 30 + len(full) + 24) % 64  # numbers on edges of 64 bytes, as torch.save puts them
            local = struct.pack("<2H2Q2H", 1, 16, size, size, 0x4246, pad) + bytes(pad)
            file.write(
                b"PK\3\4\0\0" + fields + struct.pack("<2H", len(full), len(local)) + full + local + body
            )
            file.seek(at + 30 + len(full) + len(local) + size)
            wide = struct.pack("<2H3Q", 1, 24, size, size, at)
            directory += b"PK\1\2\0\0\0\0" + fields
            directory += struct.pack("<5H2I", len(full), 28, 0, 0, 0, 0, 2**32 - 1) + full + wide
        begin = file.tell()
        end = begin + len(directory)
        file.write(directory)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, 3, 3, len(directory), begin))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(directory), 2**32 - 1, 0))


def two(count: int) -> bytes:
    """A pickle with so many numbers in storage "0" and four in "1"."""
    big = make.tensor((count,), source=make.storage("0", count=count))
    return make.pickle({"big": big, "w": make.tensor(source=make.storage("1"))})


def test_only_the_storage_that_is_asked_for_is_read(tmp_path: Path) -> None:
    """Five gigabytes, a hole but for sixteen bytes behind it: opened at once, in no memory."""
    path = tmp_path / "big.ckpt"
    sparse(path, two(5 * 2**28), 5 * 2**30, struct.pack("<4f", 1, 2, 3, 4))
    tracemalloc.start()
    began = time.process_time()
    read = read_ckpt(path)
    assert read.tensors["w"].load().tolist() == [1, 2, 3, 4] and read.tensors["big"].shape == (5 * 2**28,)
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 5 * 10**9 > 1000 * path.stat().st_blocks * 512
    assert seconds < 0.5 and peak < 2**22


def test_a_wrong_crc_is_found_at_the_first_load(tmp_path: Path) -> None:
    """Too large to be checked when it is opened; right ones are checked once."""
    path = tmp_path / "one.ckpt"
    sparse(path, two(2**24), 2**26, bytes(16), crc=7)
    read = read_ckpt(path)
    assert read.tensors["w"].load().tolist() == [0.0] * 4
    with pytest.raises(BadFile, match="'big'") as caught:
        read.tensors["big"].load()
    assert caught.value.code == "ckpt.crc"
    sparse(path, two(2**24), 2**26, bytes(16), crc=zlib.crc32(bytes(2**26)))
    big = read_ckpt(path).tensors["big"]
    assert not big.load().any()
    began = time.process_time()
    big.load()
    assert time.process_time() - began < 0.01


def test_a_file_that_is_replaced_before_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    path.write_bytes(make.GOOD)
    before = read_with(path, in_process).tensors["state_dict.w"]
    (tmp_path / "other").write_bytes(make.GOOD)
    (tmp_path / "other").replace(path)
    with pytest.raises(BadFile) as caught:
        before.load()
    assert caught.value.code == "file.changed"
    path.unlink()
    with pytest.raises(BadFile) as caught:
        before.load()
    assert caught.value.code == "ckpt.read"


@pytest.mark.parametrize("of", [make.GOOD, make.GOOD_LEGACY])
def test_the_file_is_never_written_to(of: bytes, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    path.write_bytes(of)
    (tensor,) = read_with(path, in_process).tensors.values()
    tensor.load().fill_(1.0)
    assert path.read_bytes() == of


def test_a_bool_is_0_or_1(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    source = make.storage(kind="BoolStorage", count=2)
    path.write_bytes(make.file({"w": make.tensor((2,), source=source)}, {"0": b"\1\7"}))
    with pytest.raises(BadFile) as caught:
        read_with(path, in_process).tensors["w"].load()
    assert caught.value.code == "ckpt.bool"


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        read_ckpt(tmp_path / "nothing.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    for place in (tmp_path, tmp_path / "pipe.ckpt"):
        with pytest.raises(BadFile) as caught:
            read_ckpt(place)
        assert caught.value.code == "file.kind"


def test_it_becomes_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    of = {name: one for name, one in every_kind().items() if "complex" not in name}
    write(tmp_path / "x.safetensors", saved(of, tmp_path / "x.pt").tensors)
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name].view(torch.uint8), one.detach().contiguous().view(torch.uint8))
               for name, one in of.items() if one.dim() and one.numel())  # fmt: skip
    assert set(back) == set(of)


def test_four_thousand_tensors(tmp_path: Path) -> None:
    """A third of a second of one core, 0.1 s of it here; twice the time of torch.load."""
    of = {"state_dict": {f"model.blocks.{at}.weight": torch.full((2, 2), float(at)) for at in range(4000)}}
    torch.save(of, tmp_path / "x.ckpt")
    began = time.process_time()
    read = read_ckpt(tmp_path / "x.ckpt")
    assert time.process_time() - began < 1.0
    assert_same(read, of)


def test_looking_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(make.GOOD)
    code = f"""
import sys
from sumuk.files.ckpt import read_ckpt
read = read_ckpt({str(tmp_path / "x.ckpt")!r})
assert read.tensors["state_dict.w"].shape == (4,) and "torch" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
