"""The floors of the house: every import goes to the same package or strictly down, also inside functions.

Siblings do not import each other. Networks do no file input or output beyond the package's own assets, files know
no networks, and the field's other engines stand nowhere in the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "sumuk"
FLOORS = {
    "base": 0,
    "diffusion": 1,
    "nets": 1,
    "files": 1,
    "families": 2,
    "memory": 2,
    "weights": 3,
    "generate": 4,
    "train": 5,
    "compare": 5,
    "serve": 6,
    "cli": 7,
    "__main__": 8,
}
ENGINES = {"diffusers", "transformers", "k_diffusion", "ldm", "comfy"}
OUTSIDE_NETS = {
    "os", "io", "shutil", "tempfile", "mmap", "pickle", "subprocess", "socket", "urllib", "http", "glob",
    "safetensors", "PIL", "requests", "huggingface_hub",
}  # fmt: skip
"""What a network has no business with: the disk, the net, other programs."""
FILE_CALLS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink"}


def trees() -> dict[str, ast.Module]:
    """Path below the source -> syntax tree."""
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text("utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def imports(tree: ast.AST, package: tuple[str, ...] = ("sumuk",)) -> Iterator[str]:
    """Dotted names that a module imports, wherever it does; ``from a import b`` gives ``a.b``.

    ``import_module`` with a literal counts as well: it is the same import in other words.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [*package[: len(package) - node.level + 1]] if node.level else []
            start += [node.module] if node.module else []
            yield from (".".join([*start, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def all_imports() -> list[tuple[str, str]]:
    return [
        (file, name)
        for file, tree in trees().items()
        for name in imports(tree, ("sumuk", *Path(file).parts[:-1]))
    ]


def home(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def climbs(here: str, there: str) -> bool:
    """Whether an import from package ``here`` to package ``there`` breaks the law."""
    return here != there and FLOORS[there] >= FLOORS[here]


def test_every_package_has_a_floor():
    packages = {home(file) for file in trees()} - {"__init__"}
    assert packages and packages <= FLOORS.keys(), f"without a floor: {packages - FLOORS.keys()}"


def test_imports_only_go_down():
    broken = []
    for file, name in all_imports():
        parts = name.split(".")
        if file == "__init__.py" or parts[0] != "sumuk":
            continue
        # ``from sumuk import draw`` names the public face, which may reach any floor.
        if len(parts) == 1 or parts[1] not in FLOORS or climbs(home(file), parts[1]):
            broken.append(f"{file} imports {name}")
    assert not broken, "\n".join(broken)


def test_the_public_face_is_lazy():
    """``sumuk/__init__`` may name anything, but only where nothing runs at import."""
    tree = trees()["__init__.py"]
    eager = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not [name for node in eager for name in imports(node) if name.startswith("sumuk.")]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def f():\n    from sumuk.cli.main import app", "sumuk.cli.main.app"),
        ("from sumuk import cli", "sumuk.cli"),
        ("from ..cli import main", "sumuk.cli.main"),
        ("from . import vae", "sumuk.nets.vae"),
        ("import sumuk.cli as c", "sumuk.cli"),
        ("importlib.import_module('sumuk.cli')", "sumuk.cli"),
    ],
)
def test_the_law_sees_hidden_imports(code: str, found: str):
    assert list(imports(ast.parse(code), ("sumuk", "nets"))) == [found]


def test_the_law_refuses_up_and_sideways():
    assert climbs("nets", "cli") and climbs("nets", "files") and climbs("train", "compare")
    assert not climbs("nets", "nets") and not climbs("cli", "nets")


def test_networks_touch_no_files():
    broken = []
    for file, name in all_imports():
        if home(file) == "nets" and name.split(".")[0] in OUTSIDE_NETS:
            broken.append(f"{file} imports {name}")
    for file, tree in trees().items():
        if home(file) != "nets":
            continue
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and _touches(call) and not _packed(call, function):
                    broken.append(f"{file}:{call.lineno} {function.name} calls {ast.unparse(call.func)}")
    # A vocabulary is two small files of text, which its class reads itself.
    assert {each for each in broken if " from_files calls " not in each} == set()


def _touches(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        owner = ast.unparse(call.func.value)
        return call.func.attr in FILE_CALLS or (owner == "torch" and call.func.attr in ("load", "save"))
    return isinstance(call.func, ast.Name) and call.func.id == "open"


def _packed(call: ast.Call, function: ast.AST) -> bool:
    """Whether a call reads one of the package's own assets."""
    return "resources.files(__package__)" in ast.unparse(call.func)


def test_files_know_no_networks():
    broken = [f"{f} imports {n}" for f, n in all_imports() if home(f) == "files" and n.startswith("torch.nn")]
    for file, tree in trees().items():
        if home(file) == "files":
            broken += [
                f"{file}:{node.lineno} says torch.nn"
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.nn"
            ]
    assert not broken, "\n".join(broken)


def test_no_other_engine_in_the_source():
    broken = [f"{file} imports {name}" for file, name in all_imports() if name.split(".")[0] in ENGINES]
    assert not broken, "\n".join(broken)
