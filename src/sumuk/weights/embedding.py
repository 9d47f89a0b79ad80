"""Textual inversion (Gal et al. 2022): words that are learnt, a few vectors of a text tower's token table each.

=========================================  ====================================================================
``.pt`` of A1111                           ``string_to_param`` holds one table [n, D]; beside it name, step, model
``.safetensors`` of A1111 and kohya        ``emb_params`` [n, D]
SDXL, SD3: one table for each tower        ``clip_l`` [n, 768], ``clip_g`` [n, 1280], ``t5xxl`` [n, 4096]
``learned_embeds`` of diffusers            the token is the name: [D] or [n, D]
PNG and WebP of A1111                      see :mod:`sumuk.weights.embedding_picture`
=========================================  ====================================================================

What a table is for is read off its name and width. A table that fits no tower of the model, or a tower that gets none,
is refused: nothing is cut, filled up or left away.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.families.family import Family
from sumuk.files.ckpt import read_ckpt
from sumuk.files.safetensors import read_header, regular
from sumuk.files.tensors import Tensors, from_header, lazy, write
from sumuk.weights.embedding_picture import PICTURES, read_picture, tensors_in
from sumuk.weights.licences import said_in
from sumuk.weights.model import WeightFile
from sumuk.weights.source import PICKLES

MOST_VECTORS = 128
"""Of one embedding; a chunk of text has 75 places."""
LAYOUTS = ("a1111", "diffusers")
CLIP, SECOND, T5 = "clip_l", "clip_g", "t5xxl"
"""Names of tables, by tower."""
ALONE = (CLIP, SECOND, "clip_h")
"""Any of these is for the one CLIP tower of a model that has one."""
FLOATS = ("F16", "BF16", "F32", "F64")
USUAL = {
    768: "Stable Diffusion 1 or SDXL's first tower",
    1024: "Stable Diffusion 2",
    1280: "SDXL's second tower",
    4096: "T5",
}
"""Which models have towers of that width."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learnt word.

    Attributes:
        name: what prompts call it.
        vectors: for each text tower that has some, by part (``text``, ``text_2``), its vectors [n, D] in float32; the
            same n in each.
        path: its file; None if it has none.
        step: steps of training, as the file tells.
        model: the model that it was trained on, as the file tells.
        metadata: further texts of the file.

    Raises:
        BadInput: a name that no prompt can say, or vectors that are no such tables.
    """

    name: str
    vectors: Mapping[str, Tensor]
    path: Path | None = None
    step: int | None = None
    model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def file(self) -> WeightFile | None:
        """Its file, for its hash and its licence."""
        return None if self.path is None else WeightFile(self.path, said_in(self.metadata))

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable() or len(self.name) > 200:
            raise BadInput(f"{self.name!r:.60} cannot name an embedding; give it a name of 1 to 200 letters")
        counts = {tuple(each.shape[:-1]) for each in self.vectors.values()}
        if len(counts) != 1 or len(next(iter(counts))) != 1 or not 1 <= self.count <= MOST_VECTORS:
            said = {part: list(each.shape) for part, each in self.vectors.items()}
            raise BadInput(
                f"embedding {self.name!r} needs tables [n, width] of one n, 1 to {MOST_VECTORS}, not {said}"
            )

    @property
    def count(self) -> int:
        """Vectors, and places in a prompt."""
        return len(next(iter(self.vectors.values())))


def read_embedding(
    path: str | os.PathLike[str], family: Family, widths: Mapping[str, int], name: str | None = None
) -> Embedding:
    """Read an embedding for a model.

    Args:
        path: its file, of any kind that is listed above; its ending tells which.
        family: of the model.
        widths: of the model's text towers, by part.
        name: how prompts shall name it; None takes the file's name without extension.

    Raises:
        MissingFile: no such file.
        BadFile: not an embedding, one for another model, or damaged; code ``embedding.*``, or of the reader of its
            kind of file.
    """
    path = regular(path)
    tensors, told = _stored(path)
    tables = _tables(path, tensors)
    vectors = {
        part: _vectors(path, tables[key], family, key, widths[part])
        for part, key in _towers(path, tables, family, widths).items()
    }
    counts = {part: len(each) for part, each in vectors.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} for {part}" for part, count in counts.items())
        raise BadFile(
            f"{path}: has {said}; each tower must get as many vectors as the others", "embedding.count"
        )
    step = told.get("step", told.get("ss_steps"))
    trained = told.get("sd_checkpoint_name") or told.get("ss_sd_model_name")
    token = next((key for key in tables if key not in (*ALONE, T5, "emb_params")), None)
    metadata = {key: each for key, each in told.items() if isinstance(each, str)}
    return Embedding(
        name=path.stem if name is None else name,
        vectors=vectors,
        path=path,
        step=int(step) if str(step).isdecimal() and len(str(step)) < 16 else None,
        model=trained if isinstance(trained, str) else None,
        metadata=metadata if token is None else metadata | {"token": token},
    )


def _stored(path: Path) -> tuple[Tensors, Mapping[str, Any]]:
    """The tensors of a file and what it says beside them; each reader refuses what is not what its name says."""
    ending = path.suffix.lower()
    if ending in PICTURES:
        table = read_picture(path)
        return {key: lazy(value, str(path)) for key, value in tensors_in(table).items()}, table
    if ending in PICKLES:
        pickled = read_ckpt(path)
        return pickled.tensors, pickled.values
    header = read_header(path)
    return from_header(header), header.metadata


def _tables(path: Path, tensors: Tensors) -> Tensors:
    """The tables by the names of towers; ``emb_params`` or the token, where one serves without."""
    params = {key: each for key, each in tensors.items() if key.startswith("string_to_param.")}
    # the first implementation kept the numbers of its tokens as tensors
    others = {key: each for key, each in tensors.items() if not key.startswith("string_to_")}
    found = params or others
    if params and not others and len(params) == 1:
        return {"emb_params": next(iter(params.values()))}
    if not params and others and (len(others) == 1 or others.keys() <= {*ALONE, T5}):
        return others
    names = ", ".join(sorted(tensors)[:4])
    what = f"holds {len(found)} tables ({names}, ...)" if found else "holds no tensor"
    raise BadFile(f"{path}: {what}, which is not one embedding", "embedding.tensors")


def _towers(path: Path, tables: Tensors, family: Family, widths: Mapping[str, int]) -> dict[str, str]:
    """Which table is for which part."""
    clips = [reading.part for reading in family.readings if reading.words == "clip"]
    named = _named(family)
    single = [key for key in tables if key != T5]
    if len(clips) == 1 and len(single) == 1:
        named[clips[0]] = single[0]
    if not set(widths) & set(clips):
        raise BadFile(f"{path}: {family.title} has no text tower that takes embeddings", "embedding.towers")
    # an embedding for SDXL serves its refiner too, which has the second of the towers alone
    spare = {CLIP} if clips == ["text_2"] and SECOND in tables else set()
    if odd := sorted(tables.keys() - set(named.values()) - spare):
        what = " and ".join(f"{key!r}, {_width(tables, key)} wide" for key in odd)
        raise BadFile(
            f"{path}: has a table {what}; {family.title} takes "
            + " and ".join(
                f"{name!r}, {widths[part]} wide" for part, name in named.items() if part in widths
            ),
            "embedding.towers",
        )
    lost = [named[part] for part in clips if part in widths and named[part] not in tables]
    if lost:
        raise BadFile(
            f"{path}: has no table {lost[0]!r}, without which one of the towers of {family.title} would read nothing",
            "embedding.towers",
        )
    return {part: key for part, key in named.items() if part in widths and key in tables}


def _named(family: Family) -> dict[str, str]:
    """What files call the tables, by part."""
    return {
        reading.part: T5 if reading.words == "t5" else SECOND if reading.part == "text_2" else CLIP
        for reading in family.readings
    }


def _width(tables: Tensors, key: str) -> int:
    return tables[key].shape[-1] if tables[key].shape else 0


def _vectors(path: Path, table: Any, family: Family, key: str, width: int) -> Tensor:
    """One table, checked before it is read."""
    shape = table.shape if len(table.shape) == 2 else (1, *table.shape)
    if len(shape) != 2 or table.dtype not in FLOATS:
        raise BadFile(
            f"{path}: {key!r} is {table.dtype} {list(table.shape)!s:.60}, not vectors [n, width]",
            "embedding.shape",
        )
    if shape[1] != width:
        usual = f", made for {USUAL[shape[1]]}" if shape[1] in USUAL else ""
        raise BadFile(
            f"{path}: {key!r} is {shape[1]} wide{usual}; the tower of this {family.title} is {width} wide",
            "embedding.width",
        )
    if not 1 <= shape[0] <= MOST_VECTORS:
        raise BadFile(f"{path}: has {shape[0]:,} vectors, not 1 to {MOST_VECTORS}", "embedding.count")
    vectors: Tensor = table.load().reshape(shape).to(torch.float32, copy=True)
    if not torch.isfinite(vectors).all():
        at = int((~torch.isfinite(vectors)).any(dim=1).int().argmax())
        raise BadFile(f"{path}: vector {at + 1} of {key!r} holds NaN or infinity", "embedding.numbers")
    return vectors


def write_embedding(
    embedding: Embedding, path: str | os.PathLike[str], family: Family, layout: str = "a1111"
) -> None:
    """Write a safetensors file that others read too.

    Args:
        embedding: what to write.
        path: a ``.safetensors`` file, replaced when the new one is complete.
        family: of the model that it is for.
        layout: ``a1111``, which ComfyUI reads as well: ``emb_params``, or for several towers ``clip_l``, ``clip_g``,
            ``t5xxl``. Or ``diffusers``: the token as the tensor's name, for one tower.

    Raises:
        BadInput: an unknown layout, or one that does not hold it.
        BadFile: writing failed.
    """
    if layout not in LAYOUTS:
        raise BadInput(f"unknown layout {layout!r} of embeddings{nearest(layout, LAYOUTS)}")
    if Path(path).suffix != ".safetensors":
        raise BadInput(f"embeddings are written as .safetensors files, not {str(path)!r}")
    named = _named(family)
    if odd := sorted(embedding.vectors.keys() - named.keys()):
        raise BadInput(
            f"embedding {embedding.name!r} has vectors for {odd[0]!r}, which {family.title} does not have"
        )
    several = len(embedding.vectors) > 1
    if several and layout == "diffusers":
        raise BadInput(
            f"diffusers keeps an embedding of {len(embedding.vectors)} towers in as many files; write it as 'a1111', "
            "from which its tables can be taken"
        )
    token = embedding.metadata.get("token", embedding.name)
    alone = token if layout == "diffusers" else "emb_params"
    names = {part: named[part] if several or named[part] == T5 else alone for part in embedding.vectors}
    told = {"name": embedding.name, "step": embedding.step, "sd_checkpoint_name": embedding.model}
    texts = {key: str(each) for key, each in told.items() if each is not None}
    kept = {key: text for key, text in embedding.metadata.items() if key != "token"}
    tables = {names[part]: each.contiguous() for part, each in embedding.vectors.items()}
    write(path, tables, {"format": "pt"} | kept | texts)
