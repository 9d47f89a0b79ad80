"""LoRA files made of LoRA files: other ranks, other names.

::

    resize_lora("big.safetensors", "small.safetensors", Wanted(rank=8), model="base.safetensors")
    convert_lora("xlabs.safetensors", "kohya.safetensors", model="flux.safetensors", layout="kohya")

Several are added up by :mod:`~sumuk.weights.lora_merge`, one is taken out of two checkpoints by
:mod:`~sumuk.weights.lora_extract`, and some are put into a checkpoint by :mod:`~sumuk.weights.lora_bake`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sumuk.base.errors import BadInput
from sumuk.families.adapters import FACTORS
from sumuk.files.hashes import Progress
from sumuk.files.layout import some
from sumuk.weights.encoding import read_dtype
from sumuk.weights.lora import Patch
from sumuk.weights.lora_names import Index, layer_of
from sumuk.weights.lora_peft import scales
from sumuk.weights.lora_tools import Wanted, resize
from sumuk.weights.lora_work import (
    Host,
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
from sumuk.weights.lora_writing import LAYOUTS
from sumuk.weights.source import Source, read

SPELT = {"kohya": FACTORS, "peft": ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")}
"""What written files call a layer's factors."""

# -- resizing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraResized(Made):
    """What was done.

    Attributes:
        resized: layers that have another rank now, or are products where they were something else.
        error: relative error of all matrices together (Frobenius norm), before the numbers are rounded to their type.
        worst: the layer that lost most, and its error.
    """

    resized: int
    error: float
    worst: tuple[str, float] | None


def resize_lora(
    path: Place,
    out: Place,
    wanted: Wanted,
    *,
    model: Place,
    dtype: str | torch.dtype | None = None,
    to_lora: bool = False,
    progress: Progress | None = None,
) -> LoraResized:
    """Give a LoRA smaller ranks. Its layout stays if that is kohya's or PEFT's, and becomes kohya's else.

    Args:
        path: the LoRA; each of its layers, as it names them, gets a rank by itself. What changes biases and norms
            stays as it is.
        out: the new ``.safetensors`` file, which may be ``path`` itself.
        wanted: how much to keep.
        model: a checkpoint that it is for; only the header is read.
        dtype: type of the factors; each as it was by default.
        to_lora: whether layers of other methods (LoHa, LoKr, whole differences) become products.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        BadInput: nothing would change; layers of other methods without ``to_lora``, or such as DoRA that no product
            can stand for.
        MissingFile, BadFile: see :func:`fitting`.
    """
    home, kind = host(model), read_dtype(dtype)
    lora = fitting(path, home)
    others = [each for each in lora.patches if is_matrix(each.change) and each.change.low_rank() is None]
    fixed = [each for each in others if each.change.reads_weight or each.change.result != each.change.shape]
    if fixed:
        raise BadInput(
            f"{path}: {told(fixed)} depend on the weights or their size, and have no rank to change"
        )
    if others and not to_lora:
        raise BadInput(
            f"{path}: {told(others)} are no products of two factors; to make such of them: to_lora=True"
        )
    if to_lora and not others:
        raise BadInput(f"{path}: to_lora would do nothing, all of its layers are products of two factors")
    refuse_over(Path(out), home.opened.source.files)
    layout = lora.layout if lora.layout in LAYOUTS else "kohya"
    work = Work(out, home, read(path).files, layout, progress)
    losses, patches, resized, most = Losses(), [], 0, 0
    idle: list[str] = []
    for patch in lora.patches:
        change = patch.change
        if is_matrix(change):
            if (low := change.low_rank()) is not None:
                most = max(most, len(low[0]))
            elif is_zero(change):
                idle.append(patch.source)
                continue
            made, kept = resize(change, wanted)
            losses.add(patch.source, kept)
            resized += made is not change
            change = made
        patches.append(cast(replace(patch, change=change), kind or type_of(patch.change)))
        work.done(patch.change)
    if not resized:
        raise BadInput(
            f"{path}: {wanted} would change nothing, its largest rank is {most}; another type alone: convert_lora()"
        )
    return LoraResized(
        **work.write(patches, lora.metadata, lora.embeddings),
        notes=_left(idle),
        resized=resized,
        error=losses.error,
        worst=losses.worst,
    )


def _left(idle: Sequence[str]) -> tuple[str, ...]:
    return (f"{len(idle)} layers add nothing and were left away: {some(idle)}",) if idle else ()


# -- converting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraConverted(Made):
    """What was done.

    Attributes:
        layouts: of the file that was read, and of the new one.
        rounded: layers whose alpha had to go into a factor, some of whose numbers were rounded by that.
    """

    layouts: tuple[str, str]
    rounded: int


def convert_lora(
    path: Place,
    out: Place,
    *,
    model: Place,
    layout: str,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> LoraConverted:
    """Write a LoRA of any layout that is read in kohya's or PEFT's.

    The change is the same to the bit, but that PEFT's layout has no place for alpha, see
    :attr:`LoraConverted.rounded`.

    Args:
        path: the LoRA.
        out: the new ``.safetensors`` file, which may be ``path`` itself.
        model: a checkpoint that it is for; only the header is read.
        layout: ``kohya`` or ``peft``.
        dtype: type of the factors; each as it was by default.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        BadInput: nothing would change, or the layout has no place for something.
        MissingFile, BadFile: see :func:`fitting`; a number is too large for the type.
    """
    home, kind, source = host(model), read_dtype(dtype), read(path)
    lora = fitting(path, home)
    refuse_over(Path(out), home.opened.source.files)
    work = Work(out, home, source.files, layout, progress)
    patches, retyped = [], 0
    for patch in lora.patches:
        patches.append(cast(patch, kind))
        retyped += kind is not None and type_of(patch.change) != kind
        work.done(patch.change)
    spelt = _is_spelt(source, layout, home)
    if spelt and not retyped:
        raise BadInput(
            f"{path}: is in the layout {layout!r}{' and in ' + str(dtype) if kind else ''} already"
        )
    rounded = sum(_is_rounded(each) for each in patches) if layout == "peft" else 0
    return LoraConverted(
        **work.write(patches, lora.metadata, lora.embeddings),
        notes=(),
        layouts=(lora.layout, layout),
        rounded=rounded,
    )


def _is_rounded(patch: Patch) -> bool:
    """Whether alpha in ``up`` is more than its type holds."""
    low = patch.change.low_rank()
    if low is None:
        return False
    _, up, scale = low
    scaled = up.double() * scale
    return not torch.equal(scaled.to(up.dtype).double(), scaled)


def _is_spelt(source: Source, layout: str, home: Host) -> bool:
    """Whether a file has all the names that it would get."""
    if source.path.is_dir() or scales(source).configs:
        return False
    speller = LAYOUTS[layout](Index(home.family, home.native))
    layers = {
        speller.layer(part, layer_of(name)[0])
        for part, paths in speller.index.paths.items()
        for name in speller.paths(paths)
    }
    return all(
        name.startswith("bundle_emb.") or any(name.removesuffix(f".{end}") in layers for end in SPELT[layout])
        for name in source.tensors
    )
