"""Adapters on the command line: named one by one, or found on a shelf by what the prompt or a receipt calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadInput, MissingFile
from sumuk.generate.api import MINIATURE
from sumuk.generate.prompt import parse
from sumuk.generate.tags import may_name
from sumuk.weights.model import WeightFile
from sumuk.weights.shelf import Shelf

KINDS = {"lora": "lora/", "hypernet": "hypernetwork/", "embedding": "textual-inversion/"}
"""What prompts and receipts call adapters -> beginnings of their kinds on a shelf."""
VAE_ENDINGS = (".vae.safetensors", ".vae.pt", ".vae.ckpt")


@dataclass
class Guests:
    """What the command line says of adapters.

    Attributes:
        files: for each sort, files by name: what the model is loaded with.
        loras: fields of ``Request.loras``, for those that the prompt does not name itself.
        hypers: fields of ``Request.hypers``, likewise.
    """

    files: dict[str, dict[str, Path]] = field(default_factory=lambda: {sort: {} for sort in KINDS})
    loras: list[dict[str, Any]] = field(default_factory=list)
    hypers: list[dict[str, Any]] = field(default_factory=list)

    def loading(self, partial: Sequence[str] | None) -> dict[str, Any]:
        """What :func:`sumuk.load` is told; None where there is nothing to tell."""
        return {
            "loras": self.files["lora"] or None,
            "hypernets": self.files["hypernet"] or None,
            "embeddings": self.files["embedding"] or None,
            "partial": tuple(partial) if partial else None,
        }


def guests(
    said: Mapping[str, Sequence[str] | None],
    shelf: Path | None,
    prompt: str,
    negative: str,
    *,
    at_home: bool = False,
) -> Guests:
    """Adapters for a request.

    Args:
        said: for each sort what its option was given, ``FILE`` or ``NAME=FILE``, with ``,weight=0.8`` and the like.
        shelf: a folder to find in what the prompt names.
        prompt, negative: of the request.
        at_home: the miniature draws, and what ships with it can be named.

    Raises:
        BadInput: a name that stands twice, an embedding that the prompt does not name, a shelf without use.
        MissingFile: no such file.
    """
    found = Guests()
    tags = {(tag.sort, tag.name) for tag in parse(prompt).tags if tag.sort}
    text = f"{prompt}\n{negative}"
    for sort, options in said.items():
        for each in options or ():
            name, path, values = _option(sort, each)
            if name in found.files[sort]:
                raise BadInput(f"the {sort} {name!r} is given twice: {found.files[sort][name]} and {path}")
            found.files[sort][name] = path
            if sort == "embedding" and not may_name(text, name):
                raise BadInput(f"the embedding {name!r} does nothing, as the prompt does not name it")
            if values and (sort == "embedding" or (sort, name) in tags):
                where = "(name:1.2)" if sort == "embedding" else f"<{sort}:{name}:...>"
                raise BadInput(
                    f"{each!r}: the prompt says how much of {name!r}, by {where}; leave it out here"
                )
            if sort != "embedding" and (sort, name) not in tags:
                (found.loras if sort == "lora" else found.hypers).append({"name": name, **values})
    if shelf is None and at_home and any(name not in found.files[sort] for sort, name in tags):
        shelf = MINIATURE.parent  # what ships with the miniature is for it
    if shelf is not None:
        before = sum(map(len, found.files.values()))
        for sort, name, path in _on_shelf(Shelf(shelf), tags, text, found.files):
            found.files[sort].setdefault(name, path)
        if sum(map(len, found.files.values())) == before:
            raise BadInput(f"nothing on the shelf {str(shelf)!r} is named in the prompt; leave --shelf out")
    return found


def _option(sort: str, each: str) -> tuple[str, Path, dict[str, Any]]:
    """``[NAME=]FILE[,key=value]...``"""
    first, *rest = each.split(",")
    name, equals, file = first.partition("=")
    path = Path(file if equals else first)
    values: dict[str, Any] = {}
    for piece in rest:
        key, equal, value = piece.partition("=")
        if not (key and equal and value):
            raise BadInput(f"{each!r}: {piece!r} is not like weight=0.8")
        values[key] = value.replace("/", ",") if key == "blocks" else value
    if not path.is_file():
        raise MissingFile(f"no {sort} at {path}; give [NAME=]FILE, like ink=loras/ink.safetensors,weight=0.8")
    return (name if equals else path.stem), path, values


def _on_shelf(
    shelf: Shelf, tags: set[tuple[str, str]], text: str, given: Mapping[str, Mapping[str, Path]]
) -> Iterator[tuple[str, str, Path]]:
    for sort, name in sorted(tags):
        if name not in given[sort]:
            yield sort, name, shelf.find(name, [KINDS[sort]]).path
    for entry in shelf.entries():
        if entry.kind.startswith(KINDS["embedding"]) and may_name(text, entry.name):
            yield "embedding", entry.name, entry.path


def guests_of(
    receipt: Mapping[str, Any], said: Mapping[str, Sequence[str] | None], shelf: Path | None
) -> Guests:
    """The adapters that a picture was made with, from what is given and from a shelf, there by their hash.

    Raises:
        BadInput: one that the receipt does not know.
        MissingFile: one that is neither given nor on the shelf.
    """
    found = Guests()
    wanted = {(each["kind"], each["name"]): each["sha256"] for each in receipt.get("adapters", ())}
    for sort, options in said.items():
        for each in options or ():
            name, path, values = _option(sort, each)
            if (sort, name) not in wanted or values:
                known = ", ".join(f"{kind} {name!r}" for kind, name in wanted) or "none"
                raise BadInput(f"{each!r} is not what the picture was made with; its adapters: {known}")
            found.files[sort][name] = path
    for (sort, name), digest in wanted.items():
        if name in found.files.get(sort, {}) or sort not in found.files:
            continue
        shipped = [each for each in MINIATURE.parent.glob("*.safetensors") if each.stem == name]
        if shipped and WeightFile(shipped[0]).sha256 == digest:
            found.files[sort][name] = shipped[0]
            continue
        if shelf is None or digest is None:
            raise MissingFile(
                f"the picture was made with the {sort} {name!r}; give it with --{sort} {name}=FILE"
            )
        found.files[sort][name] = Shelf(shelf).by_hash(digest).path
    return found


def vae_of(said: str | None, model: Path | None) -> Path | None:
    """``--vae``: a file, ``none`` for the checkpoint's own, ``auto`` for one that lies beside it under its name.

    Raises:
        MissingFile: no such file, or nothing beside the checkpoint.
    """
    if said is None or said == "none":
        return None
    if said != "auto":
        return Path(said)
    if model is None:
        raise BadInput("--vae auto looks beside --model, and none is given; leave it out")
    for ending in VAE_ENDINGS:
        if (beside := model.with_name(model.stem + ending)).is_file():
            return beside
    raise MissingFile(f"no {model.stem}{VAE_ENDINGS[0]} beside {model}; give the file, or leave --vae out")
