"""The pickle machine: what Python and torch write is described, nothing is imported, called or outgrown."""

from __future__ import annotations

import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.hostile import pickle_files as make
from tests.hostile.pickle_cases import expanded

from sumuk.base.errors import BadFile
from sumuk.files import ckpt_process, pickle_child
from sumuk.files.ckpt import read_ckpt
from sumuk.files.pickle_answer import answer
from sumuk.files.pickle_names import judge
from sumuk.files.pickle_nodes import Refused

PLAIN = {
    "text": "수묵\n\x00'", "numbers": [0, 255, 256, 65536, -1, 2**31, -(2**63), 2**100, 1.5, -0.0],
    "nested": {"a": [{"b": ({"c": []},)}], "d": {}}, "flags": [True, False, None], "long": list(range(3000)),
    "wide": {str(at): at for at in range(2500)}, "letters": "x" * 70_000, "shared": [["s"]] * 3,
}  # fmt: skip


def read(raw: bytes) -> dict[str, Any]:
    return answer(raw, 0, len(raw))


def plain(of: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(of))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_as_python_wrote_them(protocol: int) -> None:
    found = read(pickle.dumps(PLAIN, protocol))
    assert plain(found["values"]) == plain(PLAIN)
    assert not found["tensors"] and not found["storages"] and not found["foreign"]
    kinds = {
        "od": collections.OrderedDict(a=1),
        "dd": collections.defaultdict(dict, b=2),
        "set": {3},
        "fs": frozenset("x"),
    }
    assert read(pickle.dumps(kinds, protocol))["values"] == {
        "od": {"a": 1},
        "dd": {"b": 2},
        "set": [3],
        "fs": ["x"],
    }


def test_numbers_of_numpy_become_numbers() -> None:
    np = pytest.importorskip("numpy")
    kinds = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", ">f4", ">i8"]
    of = {kind: np.dtype(kind).type(1) if kind[0] != ">" else np.array([1], kind)[0] for kind in kinds}
    for protocol in (2, 4):
        found = read(pickle.dumps({**of, "array": np.arange(3), "word": np.str_("x")}, protocol))
        assert found["values"] == dict.fromkeys(kinds, 1)
        assert {name for name, _, _ in found["foreign"]} >= {"numpy.generic"}


def test_a_list_keeps_the_places_of_what_is_left_out() -> None:
    found = read(make.pickle({"a": [make.tensor(), 5], "b": [make.tensor()], "c": (b"x", 1)}))
    assert found["values"] == {"a": [None, 5], "c": [None, 1]}
    assert [one[0] for one in found["tensors"]] == ["a.0", "b.0"]
    assert found["foreign"] == [["bytes", 1, "c.0"]]


def test_what_lies_in_foreign_objects_is_told() -> None:
    inner = make.call("omegaconf.listconfig", "ListConfig", [make.tensor(), make.name("a.b", "Kind")])
    outer = make.Ops(make.call("trainer", "State") + make.value({"config": inner, "self": 1}) + b"b")
    found = read(make.pickle({"x": outer, "y": [outer], "w": make.tensor()}))
    assert [one[0] for one in found["tensors"]] == ["w"] and found["values"] == {}
    assert sorted(found["foreign"]) == [
        ["a.b.Kind", 1, "x"], ["omegaconf.listconfig.ListConfig", 2, "x"], ["torch.Tensor", 2, "x"],
        ["trainer.State", 2, "x"],
    ]  # fmt: skip


def test_a_foreign_object_may_hold_itself() -> None:
    """As configurations do, which know their parents."""
    cycle = make.Ops(make.call("omegaconf", "Node") + b"q\x01" + b"}X\x06\0\0\0parenth\x01sb")
    assert read(make.pickle({"x": cycle}))["foreign"] == [["omegaconf.Node", 1, "x"]]


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "omegaconf.dictconfig.DictConfig",
        "argparse.Namespace", "pathlib.PosixPath", "__main__.Options", "datetime.datetime", "numpy.ndarray",
        "torch.optim.adamw.AdamW", "torch.nn.modules.linear.Linear", "numpy.random._pickle.__randomstate_ctor",
        "transformers.trainer_utils.SchedulerType", "deepspeed.utils.tensor_fragment.fragment_address", "a.B.C",
    ],
)  # fmt: skip
def test_data_of_trainers_is_foreign(name: str) -> None:
    module, _, last = name.rpartition(".")
    if name == "a.B.C":
        module, last = "a", "B.C"
    found = judge(module, last)
    assert not found.known and found.dotted == name


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "nt.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.type",
        "builtins.__import__", "builtins.open", "builtins.bytearray", "builtins.memoryview", "__builtin__.apply",
        "subprocess.Popen", "pty.spawn", "runpy.run_path", "code.InteractiveInterpreter", "ctypes.CDLL", "timeit.Timer",
        "functools.partial", "operator.attrgetter", "operator.methodcaller", "pkgutil.resolve_name", "pickle.loads",
        "pickle.Unpickler", "copyreg._reconstructor", "types.FunctionType", "types.CodeType", "importlib.import_module",
        "socket.socket", "urllib.request.urlopen", "webbrowser.open", "threading.Thread", "multiprocessing.Process",
        "multiprocessing.connection.Client", "ssl.SSLContext", "tempfile.NamedTemporaryFile", "shutil.rmtree",
        "io.FileIO", "logging.config.dictConfig", "cProfile.Profile", "pdb.Pdb", "bdb.Bdb", "trace.Trace",
        "doctest.DocTestRunner",
        "idlelib.pyshell.ModifiedInterpreter", "lib2to3.pgen2.grammar.Grammar", "distutils.file_util.write_file",
        "commands.getoutput", "asyncio.base_subprocess.BaseSubprocessTransport", "zipfile.ZipFile", "sqlite3.connect",
        "torch.load", "torch.hub.load", "torch.jit.ScriptModule", "torch.package.PackageImporter", "torch._C.Generator",
        "torch.utils.cpp_extension.load", "torch.utils.collect_env.run", "torch._inductor.codecache.compile_file",
        "torch.fx.Interpreter", "torch.FloatTensor", "torch.nn.functional.relu", "torch.optim.adam.adam",
        "numpy.load", "numpy.memmap", "numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef",
        "numpy.distutils.exec_command.exec_command", "pip._internal.Main", "setuptools.Distribution", "dill.Unpickler",
        "cloudpickle.loads", "joblib.load", "IPython.Application", "pandas.eval", "evil.run", "evil.Good.bad",
        "a.b.__init__",
    ],
)  # fmt: skip
def test_what_runs_code_is_refused(name: str) -> None:
    module, _, last = name.rpartition(".")
    if name == "evil.Good.bad":
        module, last = "evil", "Good.bad"
    with pytest.raises(Refused) as caught:
        judge(module, last)
    assert caught.value.code == "name" and "\n" not in caught.value.what


AUDIT = """
import sys, tempfile
from pathlib import Path
from tests.hostile.pickle_cases import CASES
from sumuk.base.errors import BadFile
from sumuk.files.ckpt import read_with
from sumuk.files.ckpt_process import in_process
seen = []
harmless = {"object", "sys", "mmap", "array", "gc", "builtins", "code", "_thread", "time", "cpython"}
def hook(event, args):
    if event.partition(".")[0] not in harmless and not (event == "open" and args[0] == str(watched)):
        seen.append((event, str(args)[:100]))
with tempfile.TemporaryDirectory() as folder:
    places = []
    for at, case in enumerate(CASES):
        if case.number != 33 and case.name not in ("200,001 tensors", "100,000 views of one storage"):
            (Path(folder) / str(at)).mkdir()
            place = case.make(Path(folder) / str(at))
            places += [place] if place.suffix == ".ckpt" else []
    watched = None
    for warm in (True, False):
        if not warm:
            sys.addaudithook(hook)
        for watched in places[:3] if warm else places:
            try:
                read_with(watched, in_process)
            except BadFile:
                continue
            raise SystemExit(f"{watched} was read")
    found, seen = seen, []
print(len(places), found)
"""


def test_hostile_files_open_nothing_but_themselves() -> None:
    """No process, socket, import or other file: what the interpreter itself would tell an auditor of."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    said = subprocess.run(
        [sys.executable, "-c", AUDIT], env=environment, check=True, capture_output=True, text=True
    )
    count, _, seen = said.stdout.partition(" ")
    assert int(count) > 150 and seen == "[]\n"


LIMITS = """
import resource, sys
sys.path.append({root!r})
from sumuk.files.pickle_child import limit
limit(1000)
told = []
for act in (lambda: bytearray(200 * 2**20), lambda: open({path!r}, "w"), lambda: open({path!r})):
    try:
        act()
        told.append("done")
    except (MemoryError, OSError) as error:
        told.append(type(error).__name__)
print(*told, resource.getrlimit(resource.RLIMIT_CPU)[0], len(bytearray(20 * 2**20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space")
def test_the_process_has_given_up_memory_files_and_time(tmp_path: Path) -> None:
    root = str(Path(pickle_child.__file__).parents[2])
    code = LIMITS.format(root=root, path=str(tmp_path / "x"))
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True
    )
    assert said.stdout.split() == [
        "MemoryError",
        "OSError",
        "OSError",
        str(pickle_child.SECONDS),
        str(20 * 2**20),
    ]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program",
    ["raise SystemExit(3)", "import time; time.sleep(60)", "print('[]')", "print('{')", "print('{\"values\": 1}')",
     "print('[' * 100_000)", "import os; os.kill(os.getpid(), 9)",
     "while True: print('x' * 10**6)"],
)  # fmt: skip
def test_a_process_that_fails_refuses_the_file(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child.py").write_text(program)
    (tmp_path / "x.ckpt").write_bytes(make.GOOD)
    monkeypatch.setattr(ckpt_process, "pickle_child", SimpleNamespace(__file__=str(tmp_path / "child.py")))
    monkeypatch.setattr(ckpt_process, "SECONDS", 0.5)
    monkeypatch.setattr(ckpt_process, "MAX_ANSWER", 10**7)
    with pytest.raises(BadFile) as caught:
        read_ckpt(tmp_path / "x.ckpt")
    assert caught.value.code == "ckpt.limits"


def test_an_answer_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process says of a tensor is held against the bytes that are there."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(make.GOOD)
    good = {
        "values": {},
        "foreign": [],
        "storages": {"0": ["F32", 4]},
        "tensors": [["w", "0", "F32", 0, [4], [1]]],
    }

    def told(**more: Any) -> str:
        (tmp_path / "child.py").write_text(f"print({json.dumps({**good, **more})!r})")
        try:
            return str(len(read_ckpt(path).tensors))
        except BadFile as error:
            return error.code

    monkeypatch.setattr(ckpt_process, "pickle_child", SimpleNamespace(__file__=str(tmp_path / "child.py")))
    assert told() == "1"
    assert told(tensors=[["w", "0", "F32", 1, [4], [1]]]) == "ckpt.tensor"
    assert told(tensors=[["w", "0", "F32", 0, [2**40], [0]]]) == "ckpt.tensor"
    assert told(tensors=[["w", "0", "F32", -1, [4], [1]]]) == "ckpt.limits"
    assert told(tensors=[["w", "1", "F32", 0, [4], [1]]]) == "ckpt.limits"
    assert told(tensors=[["w", "0", "X", 0, [4], [1]]]) == "ckpt.limits"
    assert told(tensors=[["w", "0", "F32", 0, [True], [1]]]) == "ckpt.limits"
    assert told(storages={"0": ["F32", 5]}) == "ckpt.storage"
    assert told(storages={"0": ["F33", 4]}) == "ckpt.limits"


def test_budgets_hold_without_a_process() -> None:
    for made in (expanded(5), {"x": make.Ops(b"]" * 300_000)}):
        with pytest.raises(Refused):
            read(make.pickle(made))
