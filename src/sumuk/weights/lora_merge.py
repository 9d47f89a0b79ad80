"""Several LoRAs added up to one.

::

    merge_loras([("a.safetensors", 0.7), ("b.safetensors", 0.5)], "ab.safetensors", model="base.safetensors")

A sum of products is one, exactly: ``a up1 @ down1 + b up2 @ down2 = [a up1, b up2] @ [down1; down2]``. Of other methods
it is not, and becomes the nearest product of a rank or is stored whole, as the caller says.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.files.hashes import Progress
from sumuk.files.tensors import Shape
from sumuk.weights.changes import stacked
from sumuk.weights.encoding import read_dtype
from sumuk.weights.lora import Lora, Patch
from sumuk.weights.lora_tools import Wanted, merge, resize
from sumuk.weights.lora_work import (
    Losses,
    Made,
    Place,
    Work,
    cast,
    fitting,
    host,
    is_matrix,
    is_zero,
    refuse_over,
    told,
    type_of,
)
from sumuk.weights.source import read


@dataclass(frozen=True, kw_only=True)
class LoraMerged(Made):
    """What was done.

    Attributes:
        shared: tensors, or rows of them, that several of the files change.
        dense: sums of matrices that were no products; they are now if a rank was wanted, else they are stored whole.
        error: relative error of all matrices together that the wanted rank costs; 0 without one.
        worst: the layer that lost most, and its error.
        embeddings: names of the textual inversions that came with them.
    """

    shared: int
    dense: int
    error: float
    worst: tuple[str, float] | None
    embeddings: tuple[str, ...]


def merge_loras(
    paths: Sequence[tuple[Place, float]],
    out: Place,
    *,
    model: Place,
    wanted: Wanted | None = None,
    whole: bool = False,
    layout: str = "kohya",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> LoraMerged:
    """Add LoRAs up to one: of products exactly, with the sum of their ranks.

    Args:
        paths: the LoRAs, each with its weight.
        out: the new ``.safetensors`` file, which is none of them.
        model: a checkpoint that they are for; only the header is read.
        wanted: how much of each matrix to keep, whatever it is; all by default.
        whole: whether sums that are no products (of LoHa, LoKr, ...) are stored whole, as large as the weights.
        layout: ``kohya`` or ``peft``.
        dtype: type of the factors; by default the one that holds those of all files.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        BadInput: nothing to add up; sums that are no products without ``wanted`` or ``whole``; a method such as DoRA
            that cannot be added; two embeddings of one name; a setting that would do nothing.
        MissingFile, BadFile: see :func:`fitting`.
    """
    _check_weights(paths)
    if wanted is not None and whole:
        raise BadInput("wanted and whole exclude each other: sums become products, or are stored whole")
    home, files = host(model), [file for path, _ in paths for file in read(path).files]
    if twice := [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]:
        raise BadInput(f"{twice[0]}: is given twice; give it once, with the sum of its weights")
    loras = [(fitting(path, home), weight) for path, weight in paths]
    refuse_over(Path(out), (*home.opened.source.files, *files))
    embeddings = _bundled([lora for lora, _ in loras])
    work = Work(out, home, files, layout, progress)
    groups = _grouped(loras, home.native)
    types = [type_of(each.change) for group in groups for each, _ in group]
    kind = read_dtype(dtype) or (reduce(torch.promote_types, types) if types else None)
    losses, patches, dense, reduced = Losses(), [], [], 0
    for group in groups:
        first, total = group[0][0], merge([(each.change, weight) for each, weight in group])
        if is_matrix(total):
            low = total.low_rank()
            if low is None and total is not first.change and not all(_is_whole(each) for each, _ in group):
                dense.append(first)
            if wanted is not None and (low is not None or not is_zero(total)):
                before, (total, kept) = total, resize(total, wanted)
                losses.add(first.source, kept)
                reduced += total is not before
        patches.append(cast(replace(first, change=total), kind))
        for each, _ in group:
            work.done(each.change)
    if dense and wanted is None and not whole:
        raise BadInput(
            f"{told(dense)} make sums that are no products: give wanted, for the nearest ones, or whole=True"
        )
    if whole and not dense:
        raise BadInput(
            "whole would do nothing: every sum is a product, or of differences that are whole as it is"
        )
    if wanted is not None and not reduced:
        raise BadInput(f"{wanted} would do nothing: no sum has a larger rank; leave it away")
    return LoraMerged(
        **work.write(patches, _merged_texts(loras, work), embeddings),
        notes=(),
        shared=sum(len(group) > 1 for group in groups),
        dense=len(dense),
        error=losses.error,
        worst=losses.worst,
        embeddings=tuple(embeddings),
    )


def _check_weights(paths: Sequence[tuple[Place, float]]) -> None:
    if not paths or (len(paths) == 1 and paths[0][1] == 1):
        raise BadInput(
            "there is nothing to merge: give two LoRAs or more, or one with a weight that is not 1"
        )
    for path, weight in paths:
        if not math.isfinite(weight) or weight == 0:
            raise BadInput(f"{path}: weight {weight} adds nothing; leave it away, or give another")


def _is_whole(patch: Patch) -> bool:
    return patch.change.factors.keys() <= {"diff", "diff_b", "w_norm", "b_norm"}


def _grouped(
    loras: Sequence[tuple[Lora, float]], native: Mapping[str, Shape]
) -> list[list[tuple[Patch, float]]]:
    """Patches of the same rows, each with its weight. Where rows of different files overlap only in part (a ``qkv``
    and its ``q``), each file's become one patch of the whole tensor.
    """
    tensors: dict[tuple[str, str], list[tuple[int, Patch, float]]] = {}
    for number, (lora, weight) in enumerate(loras):
        for patch in lora.patches:
            tensors.setdefault((patch.part, patch.name), []).append((number, patch, weight))
    groups: list[list[tuple[Patch, float]]] = []
    for (part, name), members in tensors.items():
        shape = native[f"{part}.{name}"]
        spans: dict[tuple[int, int], list[tuple[Patch, float]]] = {}
        for _, patch, weight in members:
            spans.setdefault(patch.rows or (0, shape[0]), []).append((patch, weight))
        edges = sorted(spans)
        if all(one[1] <= other[0] for one, other in pairwise(edges)):
            groups += spans.values()
            continue
        group = []
        for number in dict.fromkeys(number for number, _, _ in members):
            own = [(patch, weight) for i, patch, weight in members if i == number]
            first, weight = own[0]
            if len(own) > 1 or first.rows is not None:
                pieces = [((patch.rows or (0, 0))[0], patch.change) for patch, _ in own]
                first = replace(first, rows=None, change=stacked(pieces, shape, first.source))
            group.append((first, weight))
        groups.append(group)
    return groups


def _bundled(loras: Sequence[Lora]) -> dict[str, Mapping[str, Tensor]]:
    """All embeddings; of one name there may be one."""
    found: dict[str, tuple[Path, Mapping[str, Tensor]]] = {}
    for lora in loras:
        for name, towers in lora.embeddings.items():
            path, before = found.setdefault(name, (lora.path, towers))
            same = before.keys() == towers.keys() and all(
                torch.equal(before[key], towers[key]) for key in towers
            )
            if not same:
                raise BadInput(f"{path} and {lora.path} bring different embeddings of the name {name!r}")
    return {name: towers for name, (_, towers) in found.items()}


def _merged_texts(loras: Sequence[tuple[Lora, float]], work: Work) -> dict[str, str]:
    """What all files say, and what was added up."""
    first = loras[0][0].metadata
    common = {
        key: text for key, text in first.items() if all(lora.metadata.get(key) == text for lora, _ in loras)
    }
    names = [lora.path.name for lora, _ in loras]
    parents = [
        {
            "name": lora.path.name,
            "sha256": work.source[str(read(lora.path).files[0])].sha256,
            "weight": weight,
        }
        for lora, weight in loras
    ]
    return common | {
        "modelspec.title": " + ".join(Path(name).stem for name in names),
        "modelspec.merged_from": ", ".join(names),
        "sumuk.merged": json.dumps(parents),
    }
