"""LoRAs added to the weights of a checkpoint, for good: a file that any program can load without them.

::

    bake_loras("base.safetensors", [("ink.safetensors", 0.8, None, None)], "base-ink.safetensors")

``W' = W + sum_i strength_i * rate_i(block) * delta_i(W)``, each change worked out from the weights as they were, as
:func:`sumuk.weights.live.fuse` does it. Nothing is loaded but the tensor that is being written, and of that only some
rows are widened at a time. Every other tensor keeps its name and its bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sumuk.base.errors import BadInput, nearest
from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.metered import Meter
from sumuk.files.quantised import METADATA
from sumuk.files.tensors import Lazy, Shape, Tensors, size, write
from sumuk.weights.contents import DIGEST, known, of_opened, texts
from sumuk.weights.convert import CARRIED, UNREAD
from sumuk.weights.encoding import Encoding, as_stored, read_dtype
from sumuk.weights.inspect import Opened
from sumuk.weights.lora import Patch
from sumuk.weights.lora_sums import Account, Given, Ingredient, Worn
from sumuk.weights.lora_work import FIRST, Host, Place, host, refuse_over, widened
from sumuk.weights.prune import OPTIMIZER, Left, by_reason, check_suffix, check_target, reason, value_notes
from sumuk.weights.source import read
from sumuk.weights.writing import DIFFUSERS, LAYOUTS, SUFFIX, arrange, store

BAKED = "sumuk.baked"
"""Metadata that tell what was baked into a checkpoint, as JSON."""


@dataclass(frozen=True, kw_only=True)
class LoraBaked:
    """What was done.

    Attributes:
        path: the new file or folder.
        files: its weight files.
        kind: key of what it is (``sdxl/base``).
        title: the same in words.
        layouts: the layout before and after; ``as it was`` where every tensor keeps its name.
        loras: what was baked in, with what of each fits.
        changed: native tensors that were changed.
        rounding: what rounding to the stored types did, relative to what was added (Frobenius norms): at 1 the change
            is drowned.
        cast: how many tensors changed their type.
        zeroed: numbers that have become zero by that.
        left: what was left away, by reason.
        notes: what else is good to know.
        before: bytes of the old files.
        after: bytes of the new ones.
        source: digests of the files that were read.
        target: digests of the new ones.
        seconds: how long it took.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    title: str
    layouts: tuple[str, str]
    loras: tuple[Ingredient, ...]
    changed: int
    rounding: float
    cast: Mapping[str, int]
    zeroed: int
    left: tuple[Left, ...]
    notes: tuple[str, ...]
    before: int
    after: int
    source: Mapping[str, Hashes]
    target: Mapping[str, Hashes]
    seconds: float


def bake_loras(
    model: Place,
    loras: Sequence[Given],
    out: Place,
    *,
    dtype: str | torch.dtype | None = None,
    partial: bool = False,
    layout: str | None = None,
    progress: Progress | None = None,
) -> LoraBaked:
    """Write a checkpoint with LoRAs in its weights.

    Args:
        model: a checkpoint of any layout.
        loras: each LoRA with its strength, that for text towers (None: the same), and rates by block as
            :class:`~sumuk.weights.blocks.Rates` reads them (None: 1 everywhere).
        out: the new ``.safetensors`` file, which may be ``model`` itself, or a new folder for a folder.
        dtype: floating-point type to store; each as it is by default.
        partial: whether LoRAs are welcome of which only a part fits.
        layout: ``single`` or ``diffusers``; names stay as they are by default.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        BadInput: nothing to bake; a strength or a setting that would do nothing; weights that are quantised, without a
            type for the result.
        BadFile: a LoRA that is none, changes nothing, or fits in part only; a number beyond what the type holds.
            What was there before is as it was.
        MissingFile: no such file.
    """
    began = time.monotonic()
    out, kind = Path(out), read_dtype(dtype)
    plain = host(model)
    home = widened(plain, [path for path, *_ in loras])
    source = home.opened.source
    layout = _layout(home.opened, layout, out)
    check_target(source, out)
    lora_files = _lora_files(loras)
    refuse_over(out, lora_files)
    account = Account(home)
    worn = [Worn.read(given, home, partial, account) for given in loras]
    groups: dict[str, list[tuple[int, Patch, float]]] = {}
    for number, each in enumerate(worn):
        for patch in each.lora.patches:
            if rate := each.rate(patch):
                groups.setdefault(f"{patch.part}.{patch.name}", []).append((number, patch, rate))
    native = dict(home.opened.moved.tensors)
    _check_packed(home, groups if layout is None and _is_safetensors(home) else native, kind)
    encoding = Encoding(dtype=kind, part=home.family.parts[0].name)
    for name, some_ in groups.items():
        stored, native[name] = native[name].stored, account.baked(name, native[name], some_, kind)
        if stored != native[name].dtype:
            encoding.cast[f"{stored} -> {native[name].dtype}"] += 1
    before = sum(file.stat().st_size for file in source.files)
    work = _same(home, native, groups, encoding) if layout is None else _anew(home, native, layout, encoding)
    meter = Meter(progress, before + sum(file.stat().st_size for file in lora_files) + 2 * size(work.tensors))
    digests = {str(file): hashes(file, meter.reading()) for file in (*source.files, *lora_files)}
    said = _texts(home, worn, digests)
    files = work.write(out, said, meter)
    target = {str(file): hashes(file, meter.reading()) for file in files}
    arrangement = home.opened.answer.arrangement
    assert arrangement is not None
    return LoraBaked(
        path=out,
        files=files,
        kind=home.family.key,
        title=home.family.title,
        layouts=(arrangement.name, layout or "as it was"),
        loras=tuple(each.told(account.change(number)) for number, each in enumerate(worn)),
        changed=len(groups),
        rounding=account.rounding,
        cast=dict(encoding.cast),
        zeroed=encoding.zeroed,
        left=work.left,
        notes=(*source.notes, *value_notes(source), *_wider(plain, home)),
        before=before,
        after=sum(file.stat().st_size for file in files),
        source=digests,
        target=target,
        seconds=time.monotonic() - began,
    )


# -- what is given ---------------------------------------------------------------------------------------------------


def _layout(opened: Opened, layout: str | None, out: Path) -> str | None:
    """The layout to write in; None: every tensor keeps its name, in a file."""
    if layout is not None and layout not in LAYOUTS:
        raise BadInput(f"layout {layout!r} is not known{nearest(layout, LAYOUTS)}")
    here = opened.answer.arrangement
    assert here is not None
    if layout is None and opened.source.path.is_dir() and here.name in DIFFUSERS:
        layout = here.name
    if layout == "diffusers" and out.suffix == SUFFIX:
        raise BadInput(
            f"{str(out)!r} names a file, and the layout 'diffusers' is a folder; give layout='single' for a file"
        )
    if layout not in DIFFUSERS:
        check_suffix(out)
    return layout


def _wider(before: Host, after: Host) -> list[str]:
    if before.native == after.native:
        return []
    has, reads = (each.native[FIRST][1] for each in (before, after))
    return [
        f"{before.family.title} reads {has} numbers a token, and the result {reads}, those of a control picture among "
        f"them: it is {after.family.title}"
    ]


def _lora_files(loras: Sequence[Given]) -> list[Path]:
    if not loras:
        raise BadInput("there is nothing to bake: no LoRA was given")
    files: list[Path] = []
    for path, *_ in loras:
        for file in read(path).files:
            if any(file.samefile(each) for each in files):
                raise BadInput(f"{path}: is given twice; give it once, with the sum of its strengths")
            files.append(file)
    return files


def _is_safetensors(home: Host) -> bool:
    return all(file.suffix == SUFFIX for file in home.opened.source.files)


def _check_packed(home: Host, names: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """Refuse weights that cannot be stored as they were, if nobody says how else."""
    packed = {
        n: home.opened.moved.tensors[n].stored
        for n in names
        if home.opened.moved.tensors[n].packed is not None
    }
    if packed and dtype is None:
        kinds = " and ".join(sorted(set(packed.values())))
        raise BadInput(
            f"{home.path}: {len(packed)} of its weights are quantised ({kinds}), and what is added to them cannot be; "
            "say the type of the result: dtype='float16'"
        )


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be written, how, and what is left away."""

    tensors: Tensors
    write: Any
    left: tuple[Left, ...]


def _same(home: Host, native: Tensors, changed: Mapping[str, Any], encoding: Encoding) -> _Work:
    """Every tensor under its name."""
    opened, source = home.opened, home.opened.source
    raw = encoding.dtype is None
    table = as_stored(source) if raw else source.tensors
    made = encoding.encode(table | _placed(opened, native, changed))

    def put(out: Path, said: Mapping[str, str], meter: Meter) -> tuple[Path, ...]:
        every = texts(known(opened), said)
        if raw and METADATA in source.metadata:
            every[METADATA] = source.metadata[METADATA]
        write(out, made, every, digest=DIGEST, meter=meter)
        return (out,)

    gone = [(name, OPTIMIZER) for name in source.beside]
    return _Work(tensors=made, write=put, left=by_reason(gone, source.beside))


def _anew(home: Host, native: Tensors, layout: str, encoding: Encoding) -> _Work:
    """Every tensor under the name that a layout gives it."""
    opened, source = home.opened, home.opened.source
    contents = replace(of_opened(opened, folder=layout == "diffusers"), tensors=native)
    arranged = arrange(contents, layout, encoding)

    def put(out: Path, said: Mapping[str, str], meter: Meter) -> tuple[Path, ...]:
        return store(arranged, out, metadata=said, digest=True, meter=meter)

    gone = [(name, reason(name)) for name in opened.moved.ignored if name not in CARRIED]
    left = by_reason(gone, source.tensors) + by_reason([(name, UNREAD) for name in arranged.ignored], native)
    beside = by_reason([(name, OPTIMIZER) for name in source.beside], source.beside)
    return _Work(tensors=arranged.tensors, write=put, left=left + beside)


def _placed(opened: Opened, native: Tensors, changed: Mapping[str, Any]) -> Tensors:
    """Changed tensors under the names that they have in their file.

    Raises:
        BadInput: an old spelling, which is read and not written.
    """
    arrangement, origin = opened.answer.arrangement, opened.moved.origin
    assert arrangement is not None
    back = arrangement.layout(native, backward=True).backward(native)
    made: Tensors = {}
    for name in changed:
        for there in origin[name]:
            if name in back.origin.get(there, ()):
                made[there] = back.tensors[there]
            elif origin[name] == [there] and _is_renamed(opened, there, name):
                made[there] = native[name]
            else:
                raise BadInput(
                    f"{opened.source.path}: {there!r} is an old spelling, which is not written; give layout='single'"
                )
    return made


def _is_renamed(opened: Opened, there: str, name: str) -> bool:
    """Whether a tensor of a file is the native one under another name: its row numbers arrive as they left."""
    arrangement, shape = opened.answer.arrangement, opened.source.tensors[there].shape
    assert arrangement is not None
    thin: Shape = (*shape[:1], *(1 for _ in shape[1:]))
    rows = torch.arange(thin[0]).reshape(thin)
    probes = {there: Lazy(thin, "I64", lambda: rows)}
    moved = arrangement.layout(opened.source.tensors).forward(probes).tensors
    return list(moved) == [name] and moved[name].shape == thin and torch.equal(moved[name].load(), rows)


def _texts(home: Host, worn: Sequence[Worn], digests: Mapping[str, Hashes]) -> dict[str, str]:
    """What was baked, after what had been before."""
    source = home.opened.source
    try:
        older = json.loads(source.metadata.get(BAKED, "[]"))
    except (ValueError, RecursionError):
        older = []
    told: list[dict[str, Any]] = []
    for each in worn:
        found = [digests[str(file)].sha256 for file in read(each.lora.path).files]
        told.append(
            {
                "name": each.lora.path.name,
                "sha256": found[0] if len(found) == 1 else found,
                "strength": each.strength,
                "text_strength": each.text_strength,
                "blocks": None if each.blocks is None else each.blocks.text,
            }
        )
    names = [source.path.name, *(each.lora.path.name for each in worn)]
    return {
        BAKED: json.dumps([*(older if isinstance(older, list) else []), *told]),
        "modelspec.merged_from": ", ".join(names),
        "modelspec.title": " + ".join(Path(name).stem for name in names),
    }
