"""Autoencoders out of checkpoints and into them.

By itself an autoencoder goes by bare names (``decoder.conv_in.weight``), and its tensors do not tell for which model it
is: scale and shift of the latents, which only the model knows, go into the metadata. In a checkpoint another one fits
if it makes latents of as many channels, as many pixels a cell, and of the same scale and shift as far as that is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.families.detect import Match
from sumuk.families.family import FAMILIES, Family, Part
from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.layout import some
from sumuk.files.metered import Meter
from sumuk.files.quantised import METADATA
from sumuk.files.tensors import Tensors, size, write
from sumuk.weights.building import build, check_config
from sumuk.weights.contents import (
    DIGEST,
    LATENT,
    MODELSPEC,
    known,
    latent_config,
    latent_texts,
    of_opened,
    whole,
)
from sumuk.weights.encoding import Encoding, as_stored, plain_floats, read_dtype
from sumuk.weights.inspect import Opened, recognise
from sumuk.weights.prune import AVERAGED, LOSS, check_suffix, check_target, kept_texts, reason
from sumuk.weights.source import Source, read
from sumuk.weights.supply import supply
from sumuk.weights.writing import arrange, store

VAE = "vae"
KEPT = ("modelspec.license", "modelspec.author", "modelspec.date")
"""Of a checkpoint's metadata, what is true of its autoencoder as well."""


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What was done.

    Attributes:
        path: the new file.
        title: the model that it was taken from, in words.
        tensors: how many it has.
        cast: how many changed their type.
        zeroed: numbers that have become zero by that.
        after: bytes of the new file.
        target: digests of the new file.
        seconds: how long it took.
    """

    path: Path
    title: str
    tensors: int
    cast: Mapping[str, int]
    zeroed: int
    after: int
    target: Hashes
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Baked:
    """What was done.

    Attributes:
        path: the new file or folder.
        title: what the checkpoint is, in words.
        replaced: names of the tensors that the checkpoint's own autoencoder had in its file; none if it had none.
        tensors: how many the new one has.
        dtypes: types of the old one's numbers, and of the new one's, which stay as they are.
        notes: what else is good to know.
        source: digests of the two files, or what was read of two folders.
        target: digests of the new files.
        seconds: how long it took.
    """

    path: Path
    title: str
    replaced: tuple[str, ...]
    tensors: int
    dtypes: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]
    source: Mapping[str, Hashes]
    target: Mapping[str, Hashes]
    seconds: float


def extract_vae(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Write a checkpoint's autoencoder as a file of its own, under bare names.

    Args:
        path: a checkpoint, in any layout.
        out: the new ``.safetensors`` file.
        dtype: floating-point type to store; as it is by default.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        MissingFile: it has none.
        BadFile: it is not whole, or writing failed; what was there before is as it was.
        BadInput: ``path`` is an autoencoder by itself; ``out`` is read.
    """
    began = time.monotonic()
    opened, out = _open(path), Path(out)
    check_suffix(out)
    _check_apart(opened.source, out)
    family, part = _model(opened)
    tensors = _own(opened, part)
    build(part, tensors, opened)
    check_config(part, tensors, opened)
    encoding = Encoding(dtype=read_dtype(dtype))
    made = encoding.encode(tensors)
    meter = Meter(progress, 2 * size(made))
    write(out, made, _texts(opened, family), digest=DIGEST, meter=meter)
    return Extracted(
        path=out,
        title=family.title,
        tensors=len(made),
        cast=dict(encoding.cast),
        zeroed=encoding.zeroed,
        after=out.stat().st_size,
        target=hashes(out, meter.reading()),
        seconds=time.monotonic() - began,
    )


def bake_vae(
    path: str | os.PathLike[str],
    vae: str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Progress | None = None,
) -> Baked:
    """Put another autoencoder in the place of a checkpoint's own, or where it has none; all else stays as it is.

    Args:
        path: a checkpoint: a file, an ``.index.json``, or a diffusers folder.
        vae: an autoencoder by itself, or a checkpoint whose own is taken.
        out: the new ``.safetensors`` file, which may be ``path`` itself, or a new folder for a folder.
        progress: called with bytes done and bytes in all; an exception that it raises stops the work.

    Raises:
        MissingFile: no such file.
        BadFile: ``vae`` holds none, or one that does not fit or is not whole; writing failed. What was there before
            is as it was.
        BadInput: the checkpoint is a network alone, with no place for another.
    """
    began = time.monotonic()
    opened, out = _open(path), Path(out)
    family, part = _model(opened)
    prefix = _place(opened)
    check_target(opened.source, out)
    donor, new = _donor(family, part, vae)
    _check_apart(donor.source, out)
    old = _own(opened, part) if opened.has(part) else {}
    notes = _check_fit(opened, part, old, donor, new)
    sources = (*opened.source.files, *donor.source.files)
    before = sum(file.stat().st_size for file in sources)
    if opened.source.path.is_dir():
        kept = {name: one for name, one in opened.moved.tensors.items() if not name.startswith(f"{VAE}.")}
        contents = replace(
            of_opened(opened, folder=True), tensors=kept | {f"{VAE}.{name}": one for name, one in new.items()}
        )
        arranged = arrange(contents, whole(opened).arrangement.name, Encoding())
        meter = Meter(progress, before + 2 * arranged.size)
        digests = {str(file): hashes(file, meter.reading()) for file in sources}
        files = store(arranged, out, meter=meter)
    else:
        check_suffix(out)
        made = _with(opened, prefix, new)
        meter = Meter(progress, before + 2 * size(made))
        digests = {str(file): hashes(file, meter.reading()) for file in sources}
        said = kept_texts(opened.source) | {
            key: opened.source.metadata[key] for key in (METADATA,) if key in opened.source.metadata
        }
        write(out, made, said, digest=DIGEST, meter=meter)
        files = (out,)
    origin = opened.moved.origin
    return Baked(
        path=out,
        title=family.title,
        replaced=tuple(each for name in old for each in origin[f"{VAE}.{name}"]),
        tensors=len(new),
        dtypes=(_dtypes(old), _dtypes(new)),
        notes=notes,
        source=digests,
        target={str(file): hashes(file, meter.reading()) for file in files},
        seconds=time.monotonic() - began,
    )


def _open(path: str | os.PathLike[str]) -> Opened:
    source = read(path)
    return recognise(replace(source, tensors=plain_floats(source.tensors)))


def _model(opened: Opened) -> tuple[Family, Part]:
    """What a checkpoint is, and its family's autoencoder.

    Raises:
        BadInput: it is no model.
        MissingFile: its family has no autoencoder.
    """
    kind = whole(opened).family
    if not isinstance(kind, Family):
        raise BadInput(f"{opened.source.path}: is {kind.title}, not a model with an autoencoder in it")
    part = next((part for part in kind.parts if part.name == VAE), None)
    if part is None:
        raise MissingFile(f"{opened.source.path}: {kind.title} has no autoencoder")
    return kind, part


def _own(opened: Opened, part: Part) -> Tensors:
    """A checkpoint's autoencoder, all of it.

    Raises:
        MissingFile: it has none.
        BadFile: something lies beside it that belongs to it and that nobody knows.
    """
    if not opened.has(part):
        raise MissingFile(f"{opened.source.path}: has no {part.title} ({part.name})")
    prefix = _place(opened)
    if odd := [name for name in opened.moved.unknown if prefix and name.startswith(prefix)]:
        raise BadFile(
            f"{opened.source.path}: its {part.title} holds {len(odd)} unknown tensors: {some(odd)}",
            "vae.unknown",
        )
    return opened.tensors(part.name)


def _place(opened: Opened) -> str:
    """What stands before the names of a checkpoint's autoencoder.

    Raises:
        BadInput: its file is for one network, without a name for others.
    """
    arrangement = whole(opened).arrangement
    prefix = next((prefix for part, prefix in arrangement.parts if part.name == VAE), "")
    if not prefix:
        raise BadInput(
            f"{opened.source.path}: is a network alone ({arrangement.title}), with no place for an autoencoder; "
            "convert it with layout='single' first"
        )
    return prefix


def _texts(opened: Opened, family: Family) -> dict[str, str]:
    metadata = opened.source.metadata
    said = {key: metadata[key] for key in KEPT if key in metadata}
    if title := metadata.get("modelspec.title"):
        said["modelspec.title"] = f"{title} (autoencoder)"
    if (
        family.then is not None
    ):  # the autoencoder is a later stage's, whose latents this file does not tell of
        later = FAMILIES[family.then]
        return said | _spec(later.architecture)
    facts = known(opened).facts
    assert facts is not None  # it is a model
    return said | _spec(family.architecture) | latent_texts(family, facts)


def _spec(architecture: str) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": f"{architecture}/{VAE}",
    }


def _donor(family: Family, part: Part, path: str | os.PathLike[str]) -> tuple[Opened, Tensors]:
    """Another file's autoencoder."""
    source = read(path)
    opened = supply(family, replace(source, tensors=plain_floats(source.tensors)), part)
    return opened, opened.tensors(part.name)


def _check_fit(opened: Opened, part: Part, old: Tensors, donor: Opened, new: Tensors) -> tuple[str, ...]:
    """Refuse an autoencoder of other latents; tell what is taken on trust."""
    where, family = donor.source.path, opened.family
    made: Any = build(part, new, donor)
    check_config(part, new, donor)
    if old:
        network: Any = build(part, old, opened)
        wanted: tuple[int, float] = (network.shape.channels, network.stride)
    else:
        wanted = (opened.latent().channels, opened.latent().stride)
    if (here := (made.shape.channels, made.stride)) != wanted:
        raise BadFile(
            f"{where}: makes latents of {here[0]} channels and {here[1]} pixels a cell; {family.title} here has "
            f"{wanted[0]} and {wanted[1]}",
            "vae.misfit",
        )
    if family.then is not None:
        return ()
    latent = opened.latent()
    ours = {"scaling_factor": latent.scale, "shift_factor": latent.shift}
    theirs = _said(donor)
    for key, value in theirs.items():
        if value != ours[key]:
            what = LATENT[key].rpartition("_")[2]
            raise BadFile(
                f"{where}: its latents have the {what} {value:g}, those of {opened.source.path} {ours[key]:g}",
                "vae.misfit",
            )
    if "scaling_factor" in theirs:
        return ()
    return (
        f"{where} does not say the scale of its latents; it is taken to be {latent.scale:g}, as the model's",
    )


def _said(donor: Opened) -> dict[str, float]:
    """Scale and shift of a donor's latents, as far as it says them."""
    assert isinstance(donor.answer, Match)
    arrangement = donor.answer.arrangement
    if isinstance(donor.answer.family, Family) and not arrangement.name.startswith("bare"):
        latent = donor.latent()
        return {"scaling_factor": latent.scale, "shift_factor": latent.shift}
    return latent_config(donor)


def _with(opened: Opened, prefix: str, new: Tensors) -> Tensors:
    """All tensors of a file, with another autoencoder among them."""
    source, native = opened.source, {f"{VAE}.{name}": one for name, one in new.items()}
    placed = whole(opened).arrangement.layout(native, backward=True).backward(native)
    placed.refuse_leftovers(str(source.path))
    raw = as_stored(source)
    gone = {
        each for name, names in opened.moved.origin.items() if name.startswith(f"{VAE}.") for each in names
    }
    gone |= {
        name for name in opened.moved.ignored if name.startswith(prefix) and reason(name) in (LOSS, AVERAGED)
    }
    gone |= {
        name for name in raw if name.startswith(prefix) and name not in source.tensors
    }  # scales of what goes
    return {name: one for name, one in raw.items() if name not in gone} | placed.tensors


def _dtypes(tensors: Tensors) -> tuple[str, ...]:
    return tuple(sorted({one.stored for one in tensors.values()}))


def _check_apart(source: Source, out: Path) -> None:
    """Refuse to write over a file that has something else in it than what is written."""
    if out.exists() and any(out.samefile(file) for file in source.files):
        raise BadInput(f"{str(out)!r} is what the autoencoder is read from; give another name")
