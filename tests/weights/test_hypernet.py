"""Hypernetwork files: A1111's own, old names, the safetensors form, and everything that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import write
from sumuk.weights.hypernet import read_hypernet, write_hypernet

WIDTHS = (32, 24)


def side(width: int, seed: int, *layers: nn.Module) -> nn.Sequential:
    """A1111's construction, written out by each test; random numbers."""
    torch.manual_seed(seed)
    made = nn.Sequential(*(layers or (nn.Linear(width, 2 * width), nn.Linear(2 * width, width))))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def a1111(path: Path, made: dict[int, tuple[nn.Sequential, nn.Sequential]], **said: Any) -> Path:
    """A file as A1111 saves it."""
    state: dict[Any, Any] = {
        width: tuple({f"linear.{name}": value for name, value in each.state_dict().items()} for each in pair)
        for width, pair in made.items()
    }
    usual = {"step": 5000, "name": "ink", "layer_structure": [1, 2, 1], "sd_checkpoint_name": "sd-v1-5"}
    torch.save(state | usual | said, path)
    return path


def both(
    make: Callable[[int], list[nn.Module]] | None = None,
) -> dict[int, tuple[nn.Sequential, nn.Sequential]]:
    return {
        width: tuple(side(width, seed, *(make(width) if make else ())) for seed in (width, width + 1))  # type: ignore
        for width in WIDTHS
    }


def equal(found: Any, made: dict[int, tuple[nn.Sequential, nn.Sequential]]) -> bool:
    """Whether each side makes the same of the same numbers, bit for bit."""
    for width, pair in made.items():
        x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
        for ours, theirs in zip(found.network[str(width)], pair, strict=True):
            assert float(theirs(x).detach().abs().max()) > 0.1
            if not torch.equal(ours(x), theirs(x)):
                return False
    return True


BUILT: dict[str, tuple[dict[str, Any], Callable[[int], list[nn.Module]] | None]] = {
    "nothing said": ({}, None),
    "linear": ({"activation_func": "linear", "activate_output": True, "is_layer_norm": False}, None),
    "output too": (
        {"activation_func": "relu"},
        lambda d: [nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d), nn.ReLU()],
    ),
    "output not": (
        {"activation_func": "swish", "activate_output": False},
        lambda d: [nn.Linear(d, 2 * d), nn.Hardswish(), nn.Linear(2 * d, d)],
    ),
    "norms": (
        {"activation_func": "elu", "is_layer_norm": True, "activate_output": False},
        lambda d: [nn.Linear(d, 2 * d), nn.ELU(), nn.LayerNorm(2 * d), nn.Linear(2 * d, d), nn.LayerNorm(d)],
    ),
    "dropout by flag": (
        {
            "activation_func": "mish",
            "use_dropout": True,
            "layer_structure": [1, 2, 2, 1],
            "activate_output": False,
        },
        lambda d: [
            *(nn.Linear(d, 2 * d), nn.Mish(), nn.Dropout(0.3), nn.Linear(2 * d, 2 * d), nn.Mish()),
            nn.Linear(2 * d, d),
        ],
    ),
    "last dropout by flag": (
        {"use_dropout": True, "last_layer_dropout": True, "is_layer_norm": True},
        lambda d: [
            *(nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.Dropout(0.3)),
            *(nn.Linear(2 * d, d), nn.LayerNorm(d)),
        ],
    ),
    "dropout by list": (
        {
            "dropout_structure": [0, 0.05, 0.15, 0],
            "layer_structure": [1, 0.5, 1.5, 1],
            "activation_func": "tanh",
        },
        lambda d: [
            *(nn.Linear(d, d // 2), nn.Tanh(), nn.Dropout(0.05), nn.Linear(d // 2, 3 * d // 2), nn.Tanh()),
            *(nn.Dropout(0.15), nn.Linear(3 * d // 2, d), nn.Tanh()),
        ],
    ),
}


@pytest.mark.parametrize("how", BUILT)
def test_files_of_a1111(tmp_path, how):
    said, make = BUILT[how]
    made = both(make)
    found = read_hypernet(a1111(tmp_path / "fine ink.pt", made, **said))
    assert equal(found, made)
    assert (found.name, found.step, found.model) == ("fine ink", 5000, "sd-v1-5")
    assert found.network.shape.widths == (24, 32)
    assert not any(each.requires_grad or each.dtype != torch.float32 for each in found.network.parameters())
    write_hypernet(found, tmp_path / "again.safetensors")
    again = read_hypernet(tmp_path / "again.safetensors", "ink")
    assert equal(again, made)
    assert again.network.shape == found.network.shape
    assert (again.name, again.step, again.model) == ("ink", 5000, "sd-v1-5")
    write_hypernet(read_hypernet(tmp_path / "again.safetensors", found.name), tmp_path / "third.safetensors")
    assert (tmp_path / "third.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_the_first_files(tmp_path):
    """Nothing but tensors, under linear1 and linear2, and an optimizer's memory."""
    made = both()
    state = {
        width: tuple(
            {f"linear{int(name[0]) + 1}{name[1:]}": value.half() for name, value in each.state_dict().items()}
            for each in pair
        )
        for width, pair in made.items()
    }
    torch.save(state | {"optimizer_state_dict": {"state": {0: torch.zeros(4)}}}, tmp_path / "old.pt")
    found = read_hypernet(tmp_path / "old.pt")
    assert found.network.shape.layers == (1, 2, 1)
    assert found.step is None
    for pair in made.values():
        for each in pair:
            each.half().float()  # in place
    assert equal(found, made)


def flat(made: dict[int, tuple[nn.Sequential, nn.Sequential]]) -> dict[str, Tensor]:
    return {
        f"{width}.{turn}.linear.{name}": value
        for width, pair in made.items()
        for turn, each in enumerate(pair)
        for name, value in each.state_dict().items()
    }


def test_names_in_safetensors(tmp_path):
    found = read_hypernet(a1111(tmp_path / "ink.pt", both(), activation_func=None))
    write_hypernet(found, tmp_path / "ink.safetensors")
    header = read_header(tmp_path / "ink.safetensors")
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(value.shape) for name, value in flat(both()).items()
    }
    assert header.metadata["layer_structure"] == "[1.0, 2.0, 1.0]"
    assert header.metadata["activation_func"] == '"linear"'
    assert header.metadata["sd_checkpoint_name"] == "sd-v1-5"


DROP = "24.1.linear.0.weight"
VALUES = [name for name in flat(both()) if name.startswith("24.1.")]
WRONG: dict[str, tuple[str, str, dict[str, Any]]] = {
    # what: code, what the message says, what is changed (None: the tensor is left out)
    "side": ("missing", "lacks 4 tensors .*'24.1.linear.0.bias'", dict.fromkeys(VALUES)),
    "tensor": ("missing", f"lacks 1 tensors that layers .* call for: {DROP!r}", {DROP: None}),
    "extra": ("extra", "'24.1.linear.2.weight'", {"24.1.linear.2.weight": torch.zeros(24, 24)}),
    "other places": ("missing", "lacks 8 tensors .* relu call for", {"activation_func": "relu"}),
    "more layers": ("missing", "linear.2", {"layer_structure": [1, 2, 2, 1]}),
    "shape": ("shape", r"F32 \[48, 23\]; layers .* call for \[48, 24\]", {DROP: torch.zeros(48, 23)}),
    "kind": ("shape", "is I64", {DROP: torch.zeros(48, 24, dtype=torch.int64)}),
    "nan": ("numbers", f"{DROP!r} holds NaN", {DROP: torch.full((48, 24), float("nan"))}),
    "foreign": ("tensors", "'lora_unet.weight' is of no hypernetwork", {"lora_unet.weight": torch.zeros(2)}),
    "third side": ("tensors", "is of no hypernetwork", {"24.2.linear.0.weight": torch.zeros(48, 24)}),
    "twice": ("tensors", "has '24.1.linear.0.weight' twice", {"24.1.linear1.weight": torch.zeros(48, 24)}),
    "wide": ("tensors", "up to 4096", {"99999.0.linear.0.weight": torch.zeros(2)}),
    "many": ("tensors", "for 18 widths", {f"{n}.0.linear.0.weight": torch.zeros(2) for n in range(1, 17)}),
    "none": ("tensors", "for 0 widths", dict.fromkeys(flat(both()))),
    "activation": ("structure", "unknown activation 'rellu'; did you mean 'relu'", {"activation_func": "rellu"}),
    "softmax": ("structure", "mixes the pictures", {"activation_func": "softmax"}),
    "no name": ("structure", "is no name", {"activation_func": 7}),
    "no list": ("structure", "no list of numbers", {"layer_structure": "1, 2, 1"}),
    "no number": ("structure", "no list of numbers", {"layer_structure": [1, "2", 1]}),
    "huge": ("structure", "at most 64 each", {"layer_structure": [1, 1e12, 1]}),
    "ends": ("structure", "must begin and end with 1", {"layer_structure": [1, 2]}),
    "flag": ("structure", "neither true nor false", {"is_layer_norm": "no"}),
    "dropout": ("structure", "must be 3 shares", {"dropout_structure": [0, 0.5]}),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(tmp_path, what):
    code, says, changed = WRONG[what]
    tensors = flat(both())
    said: dict[str, str] = {}
    for name, value in changed.items():
        if value is None:
            del tensors[name]
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            said[name] = json.dumps(value)
    write(tmp_path / "ink.safetensors", tensors, said)
    with pytest.raises(BadFile, match=says) as caught:
        read_hypernet(tmp_path / "ink.safetensors")
    assert caught.value.code == f"hypernet.{code}"
    assert "ink.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_structure_that_is_no_json(tmp_path):
    write(tmp_path / "ink.safetensors", flat(both()), {"layer_structure": "[1,"})
    with pytest.raises(BadFile, match=r"layer_structure '\[1,', which is no JSON"):
        read_hypernet(tmp_path / "ink.safetensors")


def test_other_files(tmp_path):
    with pytest.raises(MissingFile):
        read_hypernet(tmp_path / "none.pt")
    torch.save({"state_dict": {"x": torch.zeros(2)}}, tmp_path / "model.pt")
    with pytest.raises(BadFile, match=r"'state_dict\.x' is of no hypernetwork"):
        read_hypernet(tmp_path / "model.pt")
    found = read_hypernet(a1111(tmp_path / "ink.pt", both()))
    with pytest.raises(BadInput, match=r"written as .safetensors files, not '.*ink.pt'"):
        write_hypernet(found, tmp_path / "ink.pt")
