"""PyTorch files whose pickle is hostile or broken, byte by byte: numbers 1 to 20, 31 and 34 of the list."""

from __future__ import annotations

import os
import pickle as python_pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile import zip_cases
from tests.hostile.case import Case
from tests.hostile.pickle_files import (
    GOOD,
    GOOD_LEGACY,
    Ops,
    call,
    file,
    legacy,
    name,
    pickle,
    storage,
    tensor,
    value,
)

SHELL = "touch hacked"


class Stream(bytes):
    """A whole pickle, to be put in an archive."""


def ops(*pieces: bytes) -> Stream:
    return Stream(b"\x80\x04" + b"".join(pieces) + b".")


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def rebuild(how: str, *args: Any) -> Ops:
    return call("torch._utils", f"_rebuild_{how}", *args)


def built(target: bytes, attribute: str) -> Ops:
    """BUILD with one attribute."""
    return Ops(target + value({attribute: 1}) + b"b")


def expanded(count: int, views: int = 1) -> dict[str, Ops]:
    return {f"w{at}": tensor((count,), (0,)) for at in range(views)}


def doubled(count: int) -> Ops:
    """Lists that each hold the one before twice; all lie in one tuple, as nothing may be dropped from the stack."""
    steps = (b"]q%c(h%ch%ce" % (at + 1, at, at) for at in range(count))
    return Ops(b"(]q\x00" + b"".join(steps) + b"t")


def deep(levels: int) -> Ops:
    return Ops(b"]" * levels + b"a" * (levels - 1))


def repeated() -> dict[str, Ops]:
    return {"x": Ops(b"(" + value("x" * 2**20) + b"q\x00" + b"h\x00" * 1000 + b"t")}


def copied() -> Stream:
    """A dict of 1,000 entries made into another 100,000 times."""
    entries = b"".join(b"K%cN" % (at % 256) for at in range(1000))
    whole = b"}(" + entries + b"uq\x00" + name("collections", "OrderedDict") + b"q\x01"
    return ops(b"](" + whole + b"h\x01h\x00\x85R" * 100_000 + b"e")


def reused(count: int, first: bytes | None = None) -> Stream:
    """One tensor under so many names and one more."""
    once = b"}(" + value("first") + (first or tensor((1,))) + b"q\x00"
    runs = (
        b"".join(b"X\x06\0\0\0%06dh\x00" % at for at in range(k, k + 1000)) for k in range(0, count, 1000)
    )
    return ops(once + b"u(".join([b"", *runs]) + b"u")


def views(count: int) -> Stream:
    """One storage of 1,000 numbers, looked at whole so many times."""
    return reused(count, tensor((1000,), source=storage(count=1000)))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (SHELL,)


LAYOUT = call("torch.serialization", "_get_layout", "torch.sparse_coo")
VIEW = storage("0", "FloatStorage", 4, ("1", 0, 2))
NETWORK = built(Ops(name("ldm.models.diffusion.ddpm", "LatentDiffusion") + b")\x81"), "state")

Made = bytes | dict[Any, Any]
BUILT: list[tuple[int, str, str, Made | Callable[[], Made]]] = [
    (1, "os.system", "name", call("os", "system", SHELL)),
    (1, "posix.system, as Python writes it", "name", Stream(python_pickle.dumps({"w": Evil()}, 2))),
    (1, "nt.system", "name", call("nt", "system", SHELL)),
    (1, "eval of protocol 2", "name", call("__builtin__", "eval", "1")),
    (1, "subprocess.Popen, a class", "name", call("subprocess", "Popen", SHELL)),
    (1, "a submodule of the standard library", "name", call("asyncio.unix_events", "_UnixSubprocessTransport", 1)),
    (1, "os.system beside good tensors", "name", {"a": tensor(), "w": call("os", "system", SHELL)}),
    (2, "os.system of protocol 4", "name", Stream(python_pickle.dumps({"w": Evil()}, 4))),
    (2, "STACK_GLOBAL out of the memo", "name", ops(short("os"), short("system"), b"\x94\x93", short(SHELL), b"\x85R")),
    (2, "STACK_GLOBAL of numbers", "name", ops(b"K\x01K\x02\x93")),
    (2, "a dotted name of an allowed module", "name", ops(short("collections") + short("abc.sys.modules") + b"\x93")),
    (3, "INST", "opcode", ops(b"(" + value(SHELL) + b"ios\nsystem\n")),
    (3, "OBJ", "name", ops(b"(" + name("os", "system") + value(SHELL) + b"o")),
    (3, "OBJ of a harmless class", "opcode", ops(b"(" + name("trainer", "State") + b"o")),
    (4, "EXT1", "opcode", ops(b"\x82\x01")),
    (4, "EXT2", "opcode", ops(b"\x83\x01\x00")),
    (4, "EXT4", "opcode", ops(b"\x84\x01\x00\x00\x00")),
    (5, "a call hidden by POP", "name", ops(call("os", "system", SHELL), b"0}")),
    (5, "a harmless value hidden by POP", "opcode", ops(b"K\x010}")),
    (5, "POP_MARK", "opcode", ops(b"(K\x011}")),
    (6, "pkgutil.resolve_name", "name", call("pkgutil", "resolve_name", "os:system")),
    (6, "functools.partial", "name", call("functools", "partial", name("builtins", "print"))),
    (6, "operator.attrgetter", "name", call("operator", "attrgetter", "system")),
    (6, "getattr", "name", call("builtins", "getattr", name("collections", "OrderedDict"), "x")),
    (6, "a pickle in a pickle", "name", call("pickle", "loads", python_pickle.dumps({}))),
    (6, "torch.load", "name", call("torch", "load", "other.pt")),
    (6, "torch.storage._load_from_bytes", "name", call("torch.storage", "_load_from_bytes", b"x")),
    (6, "torch.hub", "name", call("torch.hub", "load", "a/b", "c")),
    (6, "numpy's run of a text", "name", call("numpy.testing._private.utils", "runstring", "1", {})),
    (6, "a class of ctypes", "name", call("ctypes", "CDLL", "libc.so.6")),
    (6, "pip", "name", call("pip._internal", "Main", ["install", "x"])),
    (6, "a function of an unknown package", "name", call("evil", "run", SHELL)),
    (6, "a codec that decompresses", "call", call("_codecs", "encode", "x", "zlib")),
    (6, "a name that hides a line", "name", Ops(b"cos\rx\nsystem\n")),
    (7, "os.system, then a broken tail", "name", Stream(b"\x80\x02" + call("os", "system", SHELL) + b"\xff\xff")),
    (7, "no STOP", "cut", Stream(pickle({"w": tensor()})[:-1])),
    (7, "bytes behind STOP", "pickle", Stream(pickle({"w": tensor()}) + b"x")),
    (7, "nothing on the stack", "pickle", ops()),
    (7, "two values on the stack", "pickle", ops(b"}}")),
    (7, "an unknown opcode", "opcode", ops(b"\xff")),
    (7, "protocol 9", "pickle", Stream(b"\x80\x09}.")),
    (8, "bytearray(3e9)", "name", call("builtins", "bytearray", 3 * 10**9)),
    (8, "BYTEARRAY8", "opcode", ops(b"\x96" + struct.pack("<Q", 2**40))),
    (9, "torch.Tensor(30000, 20000)", "call", call("torch", "Tensor", 30000, 20000)),
    (9, "torch.FloatTensor", "name", call("torch", "FloatTensor", 30000, 20000)),
    (9, "a storage that is called", "call", call("torch", "FloatStorage", 2**40)),
    (10, "stride 0, 2^31 - 1 elements", "tensor", expanded(2**31 - 1)),
    (10, "stride 0, five elements of four", "tensor", expanded(5)),
    (10, "windows that overlap", "tensor", tensor((2, 2, 2), (1, 1, 1))),
    (11, "three views of 10^9 elements", "tensor", expanded(10**9, 3)),
    (11, "100,000 views of one storage", "budget", lambda: file(views(100_000), {"0": bytes(4000)})),
    (12, "a meta tensor", "name", rebuild("meta_tensor_no_storage", name("torch", "float32"), (2**40,), (1,), False)),
    (13, "a sparse tensor", "name", rebuild("sparse_tensor", LAYOUT, (tensor(), tensor(), (1,)))),
    (14, "a sparse tensor of 2^31 x 2^31", "name", rebuild("sparse_tensor", LAYOUT, (tensor(), (2**31, 2**31)))),
    (14, "a quantised tensor", "name", rebuild("qtensor", storage(), 0, (4,), (1,), (), False, {})),
    (15, "a storage with more elements than bytes", "storage", tensor(source=storage(count=2**40))),
    (15, "a storage with fewer elements than bytes", "storage", tensor((3,), source=storage(count=3))),
    (15, "one storage, two counts", "storage", {"a": tensor(), "b": tensor(source=storage(count=2))}),
    (15, "one storage, two types", "storage", {"a": tensor(), "b": tensor(source=storage(kind="IntStorage"))}),
    (15, "a count that is no number", "storage", tensor(source=storage(count="4"))),
    (15, "a storage of an unknown kind", "name", tensor(source=storage(kind="QInt8Storage"))),
    (16, "one element beyond the storage", "tensor", tensor((5,))),
    (16, "an offset beyond the storage", "tensor", tensor((4,), offset=1)),
    (16, "a stride beyond the storage", "tensor", tensor((2,), (4,))),
    (16, "an empty tensor beyond the storage", "tensor", tensor((0,), (1,), 5)),
    (16, "a negative offset", "tensor", tensor(offset=-1)),
    (16, "a negative stride", "tensor", tensor((4,), (-1,), 3)),
    (16, "a negative size", "tensor", tensor((-4,))),
    (16, "sizes that wrap", "tensor", tensor((2**61, 2**61), (0, 0))),
    (16, "a size of 2^64", "tensor", tensor((2**64,))),
    (16, "sizes and strides of two lengths", "tensor", tensor((2, 2), (1,))),
    (16, "65 dimensions", "tensor", tensor((1,) * 65, (1,) * 65)),
    (16, "a size that is true", "tensor", tensor((True,))),
    (16, "a tensor in a tensor", "tensor", tensor(source=tensor())),
    (16, "too few arguments", "call", rebuild("tensor_v2", storage())),
    (16, "hooks", "tensor", tensor(hooks={"x": 1})),
    (16, "a conjugate view", "tensor", rebuild("tensor_v2", storage(), 0, (4,), (1,), False, {}, {"conj": True})),
    (17, "a key of a tensor", "build", Ops(tensor() + value("x") + b"Ns")),
    (17, "a key of a list", "build", Ops(b"]K\x00Ns")),
    (17, "append to a dict", "build", Ops(b"}K\x00a")),
    (17, "BUILD of __class__", "build", built(call("collections", "OrderedDict"), "__class__")),
    (17, "BUILD of __class__ on a trainer's class", "build", built(call("trainer", "State"), "__class__")),
    (17, "BUILD on a tensor", "build", built(tensor(), "data")),
    (17, "BUILD on a class", "build", built(name("trainer", "State"), "x")),
    (18, "40 doublings", "budget", {"x": doubled(40)}),
    (18, "a list that holds itself", "budget", Ops(b"]q\x00h\x00a")),
    (18, "a text of a megabyte, 1,000 times", "budget", repeated),
    (18, "a dict that is copied again and again", "budget", copied),
    (19, "10^6 nested lists", "budget", {"x": deep(10**6)}),
    (19, "65 nested lists", "budget", {"x": deep(65)}),
    (19, "10^6 marks", "budget", ops(b"(" * 10**6)),
    (20, "a text of 2^32 - 1 letters", "cut", ops(b"X\xff\xff\xff\xff")),
    (20, "bytes of 2^63", "cut", ops(b"\x8e" + struct.pack("<Q", 2**63))),
    (20, "a frame of 2^63", "cut", ops(b"\x95" + struct.pack("<Q", 2**63))),
    (20, "memo 2^32 - 1", "budget", ops(b"}r\xff\xff\xff\xff")),
    (20, "a memo that was never written", "pickle", ops(b"h\x07")),
    (20, "LONG4", "opcode", ops(b"\x8b\xff\xff\xff\x7f")),
    (20, "a text that is not UTF-8", "pickle", ops(b"X\x02\0\0\0\xff\xfe")),
    (30, "a whole network", "object", file(NETWORK)),
    (31, "old: os.system", "name", legacy({"w": call("os", "system", SHELL)})),
    (31, "old: os.system in place of the magic", "name", legacy({}, magic=call("os", "system", SHELL))),
    (31, "old: os.system in the system's facts", "name", legacy({}, system=call("os", "system", SHELL))),
    (31, "old: os.system in the list of storages", "name", legacy({}, {}, order=call("os", "system", SHELL))),
    (31, "old: another version", "kind", legacy({"w": tensor()}, version=1002)),
    (31, "old: another byte order", "byteorder", legacy({"w": tensor()}, system={"little_endian": False})),
    (31, "old: a storage that is not listed", "storage", legacy({"w": tensor()}, order=[])),
    (31, "old: a storage listed twice", "storage", legacy({"w": tensor()}, order=["0", "0"])),
    (31, "old: a count lie in the storage", "storage", legacy({"w": tensor()}, {"0": (5, bytes(16))})),
    (31, "old: a storage beyond the file", "cut", legacy({"w": tensor(source=storage(count=2**40))})),
    (31, "old: bytes behind the last storage", "tail", legacy({"w": tensor()}, behind=b"x")),
    (31, "old: a storage that is a view", "storage", legacy({"w": tensor(source=VIEW)})),
    (31, "old: a pickle without torch.save", "kind", lambda: python_pickle.dumps({"w": [1, 2]}, 2)),
    (31, "old: a harmless pickle of a class", "kind", lambda: python_pickle.dumps(Path("x"), 4)),
    (34, "a key that is a fraction", "key", Ops(b"}" + value(0.5) + tensor() + b"s")),
    (34, "a key that is a tuple", "key", Ops(b"}" + value((1, 2)) + tensor() + b"s")),
    (34, "a key that is a list", "key", Ops(b"}]" + tensor() + b"s")),
    (34, "a key that is True", "key", {True: tensor()}),
    (34, "a key that is None", "key", {None: tensor()}),
    (34, "an empty key", "key", {"": tensor()}),
    (34, "a key twice", "key", Ops(b"}(" + value("a") + b"N" + value("a") + b"Nu")),
    (34, "1 and '1'", "key", {1: tensor(), "1": tensor()}),
    (34, "two ways to one name", "key", {"a.b": tensor(), "a": {"b": tensor()}}),
    (34, "a path as a name", "key", {"../../etc/passwd": tensor()}),
    (34, "an absolute path as a name", "key", {"/etc/passwd": tensor()}),
    (34, "NUL in a name", "key", {"a\0b": tensor()}),
    (34, "a line break in a name", "key", {"a\nb": tensor()}),
    (34, "a name of 501 letters", "key", {"a" * 251: {"b" * 249: tensor()}}),
    (34, "200,001 tensors", "budget", lambda: reused(200_000)),
    (34, "50,001 tensors", "budget", lambda: reused(50_000)),
    (34, "one tensor without a name", "object", file(tensor())),
]  # fmt: skip
"""Number, name, code, and what: opcodes (of the value of the key "w"), a dict, a pickle, or a whole file."""


def whole(made: Made) -> bytes:
    """The file around what was made."""
    if isinstance(made, Ops):
        made = {"w": made}
    return file(made) if isinstance(made, dict | Stream) else made


def _write(made: Made | Callable[[], Made], ending: str = ".ckpt") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"hostile{ending}"
        path.write_bytes(whole(made() if callable(made) else made))
        return path

    return write


def _cuts(what: str, of: bytes) -> list[Case]:
    return [Case(33, f"{what}cut at {at}/64", "ckpt.", _write(of[: len(of) * at // 64])) for at in range(64)]


CASES: tuple[Case, ...] = (
    *(Case(number, what, f"ckpt.{code}", _write(made)) for number, what, code, made in BUILT),
    *(Case(number, what, f"ckpt.{code}", _write(made)) for number, what, code, made in zip_cases.BUILT),
    Case(32, "a ZIP pickle called safetensors", "safetensors.length", _write(GOOD, ".safetensors")),
    Case(32, "an old pickle called safetensors", "safetensors.length", _write(GOOD_LEGACY, ".safetensors")),
    *_cuts("", GOOD),
    *_cuts("old: ", GOOD_LEGACY),
)
