"""Files of full-size models that hold a header and otherwise a hole: as large as the published ones, and a few kB on
disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from sumuk.families.detect import families
from sumuk.families.family import FAMILIES, Arrangement
from sumuk.families.published import RELEASES
from sumuk.files.safetensors import BITS
from sumuk.files.tensors import Lazy, Tensors


def never() -> torch.Tensor:
    raise AssertionError("only names and shapes are looked at")


def arrangement(family: str, layout: str) -> Arrangement:
    families()
    return next(each for each in FAMILIES[family].arrangements if each.name == layout)


def release(name: str, layout: str = "single", only: str | None = None) -> Tensors:
    """A published model's header in a layout, whole or one of its parts, without numbers."""
    one = RELEASES[name]
    native: Tensors = {}
    with torch.device("meta"):
        for part, make in one.parts.items():
            if only in (None, part):
                for key, value in make().state_dict().items():
                    native[f"{part}.{key}"] = Lazy(tuple(value.shape), one.dtype, never)
    moved = arrangement(one.family, layout).layout(native, backward=True).backward(native)
    assert not moved.unknown
    return moved.tensors


def write_sparse(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> int:
    """A file with these tensors in its header, all of them holes; its length in bytes."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.parameters * BITS[tensor.dtype] // 8
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return 8 + len(header) + at
