"""A training checkpoint to its weights, under their own names: what only training needs is left away.

Such a file holds each weight up to four times: plain, as a running average (EMA), and twice more in the optimizer's
memory. The averages lie under ``model_ema.`` and the name of the parameter below ``model.``, all dots removed; an
autoencoder trained by itself has no ``model.`` to leave out. Of plain and averaged weights one can stay: which, is
for the user to say, as either is what somebody expects.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.sd import SCHEDULE_BUFFERS
from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.layout import Pattern, some
from sumuk.files.metered import Meter
from sumuk.files.quantised import METADATA
from sumuk.files.tensors import Lazy, Tensors, length, size, write
from sumuk.weights.contents import DIGEST, STALE
from sumuk.weights.encoding import Encoding, as_stored, plain_floats, read_dtype
from sumuk.weights.source import Source, read

EMA, COUNTERS = "model_ema.", ("model_ema.decay", "model_ema.num_updates")
AVERAGED, TABLES = "averaged weights (EMA)", "tables of the noise schedule"
PLAIN = "plain weights, whose averages stand in their places (listed by the averages' names)"
OPTIMIZER, LOSS = "memory of the optimizer and the trainer", "the loss that an autoencoder was trained with"
ASKED = "named by drop="
TRAINERS = ("optimizer_states.", "optimizer.", "lr_schedulers.", "callbacks.", "loops.", "scaler.")
WEIGHTS = ("auto", "ema", "plain")


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a file held and the new one does not.

    Attributes:
        reason: in words.
        names: of the tensors.
        size: their bytes.
    """

    reason: str
    names: tuple[str, ...]
    size: int


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was done.

    Attributes:
        path: the new file.
        weights: ``ema`` if the averages are now the weights, else ``plain``.
        kept: tensors that stayed.
        cast: how many changed their type, ``{"F32 -> F16": 686}``.
        zeroed: numbers that have become zero by that.
        left: what was left away, by reason.
        notes: what else is good to know.
        before: bytes of the old file's.
        after: bytes of the new file.
        source: digests of the old files.
        target: digests of the new one.
        seconds: how long it took.
    """

    path: Path
    weights: str
    kept: int
    cast: Mapping[str, int]
    zeroed: int
    left: tuple[Left, ...]
    notes: tuple[str, ...]
    before: int
    after: int
    source: Mapping[str, Hashes]
    target: Hashes
    seconds: float


def prune(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "auto",
    dtype: str | torch.dtype | None = None,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> Pruned:
    """Write the weights of a training checkpoint, under the names that they have in it.

    Args:
        path: a file or an ``.index.json``.
        out: the new ``.safetensors`` file; it may be ``path`` itself.
        weights: ``plain`` or ``ema``, which then takes the plain ones' names. ``auto`` takes what there is, and
            refuses where both are.
        dtype: floating-point type to store; as they are by default.
        drop: patterns of further names to leave away (``"low_scale_model.*"``).
        keep: patterns of names to keep all the same (``"alphas_cumprod"``).
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        BadInput: nothing would change, a pattern fits nothing, or both kinds of weights are there and none was named.
        BadFile: the averages are not whole, or writing failed; what was there before is as it was.
    """
    began = time.monotonic()
    if weights not in WEIGHTS:
        raise BadInput(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    source, out = read(path), Path(out)
    refuse_folder(source, "pruned")
    check_target(source, out)
    check_suffix(out)
    averages = {name for name in source.tensors if name.startswith(EMA)} - set(COUNTERS)
    if weights == "ema" and not averages:
        raise BadInput(f"{path}: holds no averaged weights (names with {EMA!r}); leave weights= away")
    if weights == "auto" and averages:
        raise BadInput(
            f"{path}: holds plain and averaged weights: say weights='plain', which other tools keep, or 'ema'"
        )
    source = replace(source, tensors=as_stored(source) if dtype is None else plain_floats(source.tensors))
    tensors = _averaged(source, averages) if weights == "ema" else dict(source.tensors)
    dropped = {name: why for name in tensors if (why := _reason(name)) is not None}
    if weights == "ema":
        dropped |= dict.fromkeys(averages, PLAIN)
    for pattern in keep:
        for name in _fitting(pattern, dropped, "keep", path):
            del dropped[name]
    for pattern in drop:
        dropped |= dict.fromkeys(_fitting(pattern, set(tensors) - set(dropped), "drop", path), ASKED)
    encoding = Encoding(dtype=read_dtype(dtype))
    kept = encoding.encode({name: one for name, one in tensors.items() if name not in dropped})
    if not kept:
        raise BadInput(f"{path}: nothing would be left of it")
    if not dropped and not encoding.cast and not source.beside:
        same = "" if dtype is None else f", and all of it is in {dtype} already"
        raise BadInput(f"{path}: there is nothing to prune in it: it holds weights alone{same}")
    said = kept_texts(source)
    if dtype is None and METADATA in source.metadata:
        said[METADATA] = source.metadata[METADATA]
    before = sum(file.stat().st_size for file in source.files)
    meter = Meter(progress, before + 2 * size(kept))
    digests = {str(file): hashes(file, meter.reading()) for file in source.files}
    write(out, kept, said, digest=DIGEST, meter=meter)
    target = hashes(out, meter.reading())
    gone = [*dropped.items(), *((name, OPTIMIZER) for name in source.beside)]
    return Pruned(
        path=out,
        weights="ema" if weights == "ema" else "plain",
        kept=len(kept),
        cast=dict(encoding.cast),
        zeroed=encoding.zeroed,
        left=by_reason(gone, tensors | source.beside),
        notes=(*source.notes, *value_notes(source)),
        before=before,
        after=out.stat().st_size,
        source=digests,
        target=target,
        seconds=time.monotonic() - began,
    )


def _averaged(source: Source, averages: set[str]) -> Tensors:
    """All tensors, with the averages in the plain ones' places and theirs in the averages'.

    Raises:
        BadFile: the averages are of something else, or not whole.
    """
    inner = any(name.startswith(f"{EMA}diffusion_model") for name in averages)
    head = "model." if inner else ""
    there = {name: one for name, one in source.tensors.items() if not name.startswith(EMA)}
    short: dict[str, str] = {}
    for name in there:
        if name.startswith(head):
            squeezed = EMA + name.removeprefix(head).replace(".", "")
            if squeezed in averages and squeezed in short:
                raise BadFile(
                    f"{source.path}: {squeezed!r} may be {short[squeezed]!r} or {name!r}", "prune.ema"
                )
            short[squeezed] = name
    if lost := sorted(averages - set(short)):
        raise BadFile(
            f"{source.path}: {len(lost)} averaged weights have no plain one: {some(lost)}; say weights='plain'",
            "prune.ema",
        )
    where = "model.diffusion_model." if inner else ""
    wanted = (name for name in there if name.startswith(where) and _reason(name) is None)
    if half := [name for name in wanted if EMA + name.removeprefix(head).replace(".", "") not in averages]:
        raise BadFile(
            f"{source.path}: {len(half)} weights have no average: {some(half)}; say weights='plain'",
            "prune.ema",
        )
    made = dict(source.tensors)
    for squeezed in averages:
        plain, average = there[short[squeezed]], source.tensors[squeezed]
        if plain.shape != average.shape:
            raise BadFile(
                f"{source.path}: {squeezed!r} has the shape {list(average.shape)}, not {list(plain.shape)}",
                "prune.ema",
            )
        made[short[squeezed]] = average
        made[squeezed] = plain
    return made


def _reason(name: str) -> str | None:
    """Why a tensor is of no use but to training; None: it is not so."""
    if name.startswith(EMA) or ".model_ema." in name:
        return AVERAGED
    if name.startswith(TRAINERS):
        return OPTIMIZER
    if name.removeprefix("low_scale_model.") in SCHEDULE_BUFFERS or name in SAMPLING:
        return TABLES
    return LOSS if name.startswith("loss.") or ".loss." in name else None


SAMPLING = ("model.model_sampling.sigmas", "denoiser.sigmas")
REASONS = (
    ("position_ids", "positions, which count up from 0"),
    ("logit_scale", "a scale that only CLIP's training needs"),
    ("attn_mask", "a mask that follows from its size"),
)
"""Ends of names that layouts ignore, and what they are."""
NETWORKS = (
    "safety_checker/",
    "controlnet/",
    "image_encoder/",
    "depth_estimator/",
    "prior_lite/",
    "decoder_lite/",
)


def reason(name: str) -> str:
    """What a tensor is that a layout ignores."""
    if (why := _reason(name)) is not None:
        return why
    if name.startswith(NETWORKS):
        return f"another network of the folder: {name.partition('/')[0]}"
    return next((why for end, why in REASONS if name.endswith(end)), "known, and of no use to this model")


def by_reason(gone: Iterable[tuple[str, str]], tensors: Mapping[str, Lazy]) -> tuple[Left, ...]:
    """Names with their reasons, as one entry a reason."""
    found: dict[str, list[str]] = {}
    for name, why in gone:
        found.setdefault(why, []).append(name)
    return tuple(
        Left(reason=why, names=tuple(names), size=sum(length(tensors[name]) for name in names))
        for why, names in found.items()
    )


def _fitting(pattern: str, names: Iterable[str], what: str, path: object) -> list[str]:
    fits = Pattern(pattern)
    found = [name for name in names if fits.read(name) is not None]
    if not found:
        raise BadInput(
            f"{what} {pattern!r} fits no tensor of {path} that would otherwise be {_OTHERWISE[what]}"
        )
    return found


_OTHERWISE: Mapping[str, str] = {"keep": "left away", "drop": "kept"}


def kept_texts(source: Source) -> dict[str, str]:
    """A file's metadata, without digests that are true no longer."""
    return {"format": "pt"} | {key: text for key, text in source.metadata.items() if key not in STALE}


def value_notes(source: Source) -> tuple[str, ...]:
    """What a pickle said beside its tensors, which safetensors files do not hold."""
    told = [key for key in source.values if key not in source.metadata]
    return (f"values that are no tensors were left away: {some(told, 8)}",) if told else ()


def refuse_folder(source: Source, what: str) -> None:
    """Raise BadInput for a folder of several networks."""
    if source.path.is_dir() and any("/" in name for name in source.tensors):
        raise BadInput(
            f"{source.path}: is a folder of several networks, which cannot be {what}; convert it first"
        )


def check_target(source: Source, out: Path) -> None:
    """Refuse to write over a file that is being read, where that would break it.

    A single file may be replaced by what is made of it: it stays open until the new one has its name.
    """
    if out.exists() and len(source.files) > 1 and any(out.samefile(file) for file in source.files):
        raise BadInput(
            f"{str(out)!r} is one of the {len(source.files)} files that are read; give another name"
        )


def check_suffix(out: Path) -> None:
    """Refuse a name that says another format than the one that is written."""
    if out.suffix != ".safetensors":
        raise BadInput(f"{str(out)!r} does not end in .safetensors, which is what is written")
