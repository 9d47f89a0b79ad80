"""A checkpoint in another layout, type or kind of file; nothing of it is loaded but the tensor that is being written.

What a file holds is moved, named as left away, or refused. Between layouts the family's own rules do it, so that what
comes out is what :func:`sumuk.save` would write of the loaded model; without a layout every tensor keeps its name, and
without a type every bit. The same file gives the same bytes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.families.detect import Match, Unknown
from sumuk.families.family import Family
from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.metered import Meter
from sumuk.files.quantised import METADATA
from sumuk.files.shards import index_of, write_shards
from sumuk.files.tensors import Tensors
from sumuk.files.tensors import size as bytes_of
from sumuk.weights.contents import DIGEST, Contents, known, of_opened, texts
from sumuk.weights.encoding import Encoding, as_stored, plain_floats, read_dtype, read_quantise
from sumuk.weights.inspect import CONTRADICTS, PREDICTION_KEYS, Opened, recognise
from sumuk.weights.prune import OPTIMIZER, Left, by_reason, check_target, kept_texts, reason, value_notes
from sumuk.weights.source import Source, read
from sumuk.weights.writing import DIFFUSERS, LAYOUTS, SUFFIX, Arranged, arrange, store

CARRIED = ("v_pred", "ztsnr")
"""Markers, which are written anew from what they say."""
UNREAD = "left away by the layout: its family does not read it"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was done.

    Attributes:
        path: the new file or folder.
        files: its weight files.
        kind: key of what it is (``sdxl/base``); None for a file that nobody recognises.
        title: the same in words.
        layouts: the layout before and after; ``as it was`` where no other was asked for.
        moved: tensors in the new files.
        renamed: how many of them have another name or were cut anew.
        cast: how many changed their type, ``{"F32 -> F16": 686}``.
        zeroed: numbers that have become zero by that.
        worst: of 8-bit tensors the name and the relative error of the one that lost most.
        left: what was left away, by reason.
        notes: what else is good to know.
        before: bytes of the old files.
        after: bytes of the new ones.
        source: digests of the old files.
        target: digests of the new ones.
        seconds: how long it took.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str | None
    title: str
    layouts: tuple[str, str]
    moved: int
    renamed: int
    cast: Mapping[str, int]
    zeroed: int
    worst: tuple[str, float] | None
    left: tuple[Left, ...]
    notes: tuple[str, ...]
    before: int
    after: int
    source: Mapping[str, Hashes]
    target: Mapping[str, Hashes]
    seconds: float


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantise: str | None = None,
    shard_bytes: int | None = None,
    variant: str | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert a checkpoint, or a network by itself.

    Args:
        path: a file, an ``.index.json`` or a folder; whatever :func:`~sumuk.weights.source.read` reads.
        out: the new ``.safetensors`` file, which may be ``path`` itself, or for a folder a new one.
        layout: ``single``, ``diffusers``, and of one network alone ``bare`` or ``bare-diffusers``, see
            :data:`~sumuk.weights.writing.LAYOUTS`. By default names stay as they are.
        dtype: floating-point type to store: float32, float16, bfloat16; each as it is by default.
        quantise: ``fp8`` or ``fp8-scaled`` for the denoiser's matrices.
        shard_bytes: the most bytes of one file; what takes more becomes several, with an index.
        variant: which weights of a diffusers folder to read, ``fp16`` for ``model.fp16.safetensors``.
        metadata: further texts for the header. What a file does not say of itself can be said so:
            ``{"modelspec.prediction_type": "v"}``.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        BadInput: nothing would change; a layout, dtype or scheme that is none; a folder that is not empty.
        BadFile: it is damaged, not whole, of no known family though a layout is asked for, or holds numbers that are
            too large for the type. What was there before is as it was.
        MissingFile: nothing there; words that a folder needs lie nowhere within reach.
    """
    began = time.monotonic()
    encoding = Encoding(dtype=read_dtype(dtype), quantise=read_quantise(quantise))
    if layout is not None and layout not in LAYOUTS:
        raise BadInput(f"layout {layout!r} is not known{nearest(layout, LAYOUTS)}")
    if shard_bytes is not None and shard_bytes < 1:
        raise BadInput(f"shard_bytes {shard_bytes} is not at least 1")
    out, added = Path(out), dict(metadata or {})
    source = read(path, variant)
    opened = _opened(source, added)
    layout = _layout(opened, layout, out)
    work = _same(opened, encoding, added) if layout is None else _anew(opened, layout, encoding)
    check_target(source, out)
    _refuse_overlap(source, out, shard_bytes)
    _refuse_idle(source, work, encoding, shard_bytes, added, out)
    before = sum(file.stat().st_size for file in source.files)
    meter = Meter(progress, before + 2 * bytes_of(work.tensors))
    digests = {str(file): hashes(file, meter.reading()) for file in source.files}
    if work.arranged is None:
        digest = None if shard_bytes is not None else DIGEST
        files = write_shards(out, work.tensors, work.texts, shard_bytes, digest=digest, meter=meter)
    else:
        files = store(
            work.arranged,
            out,
            metadata=added,
            shard_bytes=shard_bytes,
            digest=shard_bytes is None,
            meter=meter,
        )
    target = {str(file): hashes(file, meter.reading()) for file in files}
    match = opened.answer if isinstance(opened.answer, Match) else None
    return Converted(
        path=index_of(out) if len(files) > 1 and files[0].parent == out.parent else out,
        files=files,
        kind=match.family.key if match else None,
        title=match.family.title if match else "unknown",
        layouts=(match.arrangement.name if match else "unknown", layout or "as it was"),
        moved=len(work.tensors),
        renamed=work.renamed,
        cast=dict(encoding.cast),
        zeroed=encoding.zeroed,
        worst=encoding.worst,
        left=work.left,
        notes=(*source.notes, *work.notes, *value_notes(source)),
        before=before,
        after=sum(file.stat().st_size for file in files),
        source=digests,
        target=target,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be written, and what is to be told of it. ``arranged`` is None where names stay as they are."""

    arranged: Arranged | None = None
    tensors: Tensors
    texts: Mapping[str, str]
    renamed: int = 0
    left: tuple[Left, ...] = ()
    notes: tuple[str, ...] = ()


def _opened(source: Source, added: dict[str, str]) -> Opened:
    """The source recognised, as what is added to its metadata makes it.

    Raises:
        BadInput: what is added contradicts what it says of its prediction.
    """
    opened = recognise(
        replace(source, metadata=source.metadata | added, tensors=plain_floats(source.tensors))
    )
    if isinstance(opened.answer, Match) and isinstance(opened.answer.family, Family):
        said = opened.prediction()
        if CONTRADICTS in said.evidence and any(key in added for key in PREDICTION_KEYS):
            raise BadInput(f"{source.path}: {said.evidence}; leave it away from metadata=")
    return opened


def _layout(opened: Opened, layout: str | None, out: Path) -> str | None:
    """The layout to write in; None: every tensor keeps its name, in a file.

    Raises:
        BadInput: the new name is not one for such a layout.
    """
    here, source = opened.answer.arrangement, opened.source
    if layout is None and source.path.is_dir():
        if any("/" in name for name in source.tensors):
            if isinstance(opened.answer, Unknown):
                raise BadFile(
                    f"{source.path}: is a folder of no known family ({opened.answer.why}); convert its networks "
                    "one by one",
                    "model.unknown",
                )
            layout = "diffusers"
        elif here is not None and here.name in DIFFUSERS and out.suffix != SUFFIX:
            layout = "bare-diffusers"
    if (
        layout == "diffusers"
        and isinstance(opened.answer, Match)
        and isinstance(opened.answer.family, Family)
    ):
        if out.suffix == SUFFIX:
            raise BadInput(
                f"{str(out)!r} names a file, and the layout 'diffusers' is a folder; give layout='single' for a file"
            )
    elif out.suffix != SUFFIX and layout not in DIFFUSERS:
        raise BadInput(
            f"{str(out)!r} does not end in {SUFFIX}, which is what is written; layout='diffusers' is a folder"
        )
    return layout


def _same(opened: Opened, encoding: Encoding, added: Mapping[str, str]) -> _Work:
    """Every tensor under its name."""
    source, answer = opened.source, opened.answer
    raw = encoding.dtype is None and encoding.quantise is None
    native: dict[str, str] = {}
    said = kept_texts(source) | dict(added)
    if isinstance(answer, Match):
        if answer.arrangement.dialect == "original":
            native = {names[0]: name for name, names in answer.moved.origin.items() if len(names) == 1}
        if answer.family.parts:
            encoding.part = answer.family.parts[0].name
        said = texts(known(opened), added)
    if raw and METADATA in source.metadata:
        said[METADATA] = source.metadata[METADATA]
    tensors = encoding.encode(as_stored(source) if raw else source.tensors, lambda name: native.get(name, ""))
    return _Work(tensors=tensors, texts=said, left=_beside(source))


def _anew(opened: Opened, layout: str, encoding: Encoding) -> _Work:
    """Every tensor under the name that a layout gives it."""
    source, moved = opened.source, opened.moved
    contents = of_opened(opened, folder=layout == "diffusers")
    encoding.part = contents.kind.parts[0].name
    arranged = arrange(contents, layout, encoding)
    renamed = 0
    for name, natives in arranged.origin.items():
        renamed += [each for native in natives for each in moved.origin[native]] != [name]
    gone = [(name, reason(name)) for name in moved.ignored if name not in CARRIED]
    unread = [(name, UNREAD) for name in arranged.ignored]
    left = by_reason(gone, source.tensors) + by_reason(unread, contents.tensors) + _beside(source)
    return _Work(
        arranged=arranged,
        tensors=arranged.tensors,
        texts={},
        renamed=renamed,
        left=left,
        notes=tuple(_notes(opened, contents, arranged)),
    )


def _beside(source: Source) -> tuple[Left, ...]:
    return by_reason([(name, OPTIMIZER) for name in source.beside], source.beside)


def _notes(opened: Opened, contents: Contents, arranged: Arranged) -> Iterator[str]:
    """What the new layout had to say though nobody had said it, and what it lacks."""
    kind, folder = contents.kind, arranged.arrangement.name in DIFFUSERS
    if contents.facts is not None and folder:
        said = opened.prediction()
        if "prediction" in contents.guessed:
            yield (
                f"the scheduler's configuration says that it predicts {said.value}: {said.evidence}; if that is wrong, "
                "convert with metadata={'modelspec.prediction_type': ...}"
            )
    if folder and kind.name == "vae" and "scaling_factor" not in contents.config:
        yield "nothing says the scale of its latents, so config.json leaves it to the library, which takes 0.18215"
    if isinstance(kind, Family) and not arranged.arrangement.name.startswith("bare"):
        lost = [part.title for part in kind.parts if part.name not in contents.present and not part.optional]
        if lost:
            yield f"it has no {', no '.join(lost)}, and neither has what was made of it"


def _refuse_overlap(source: Source, out: Path, shard_bytes: int | None) -> None:
    """Refuse shards that would take the names of those that are being read."""
    if shard_bytes is None or source.path == index_of(out):  # the latter is looked at when they are written
        return
    pattern = re.escape(out.name.removesuffix(SUFFIX)) + r"-[0-9]{5}-of-[0-9]{5}\.safetensors"
    for file in source.files:
        if re.fullmatch(pattern, file.name) and file.absolute().parent == out.absolute().parent:
            raise BadInput(
                f"{str(out)!r} would have shards named like {file.name!r}, which is read; give another name"
            )


def _refuse_idle(
    source: Source,
    work: _Work,
    encoding: Encoding,
    shard_bytes: int | None,
    added: Mapping[str, str],
    out: Path,
) -> None:
    """Refuse settings that change nothing."""
    total = bytes_of(work.tensors)
    if shard_bytes is not None and total <= shard_bytes:
        raise BadInput(f"shard_bytes {shard_bytes} cuts nothing: the tensors take {total} bytes")
    folders = {file.parent for file in source.files}
    alike = len(folders) == len(source.files) and all(file.suffix == SUFFIX for file in source.files)
    alike = alike and source.path.is_dir() == (out.suffix != SUFFIX)
    if alike and not (work.renamed or encoding.cast or work.left or added or shard_bytes):
        raise BadInput(f"{source.path}: is already what is asked for; there is nothing to convert")
