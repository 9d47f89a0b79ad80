"""What a merge is made of, as a value and as a text that makes it again; it is kept in the result's metadata.

::

    method = "add-difference"
    alpha = 0.7
    blocks = "IN04:0.3,OUT*:0.5"
    dtype = "float16"

    [parts]
    vae = 0.0

    [[models]]
    name = "a.safetensors"
    sha256 = "e3b0c442..."

The text is TOML. What A1111 writes of its merges (``sd_merge_recipe``, ``sd_merge_models``) is written too, for those
who look there, and read where it says what this knows.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.files.tensors import torch_dtype
from sumuk.weights.merge_methods import METHODS, MOST, Method
from sumuk.weights.source import read

META = "sumuk.merge"
A1111, A1111_MODELS = "sd_merge_recipe", "sd_merge_models"
LONGEST = 100_000
"""Characters of a recipe that is read; ten models take a few thousand."""
_FIELDS = (
    "method",
    "alpha",
    "blocks",
    "dtype",
    "layout",
    "seed",
    "extra_channels",
    "settings",
    "parts",
    "models",
)
_PRIMARY = ("primary", "secondary", "tertiary")
_INTERPOLATIONS = {"Weighted sum": "weighted-sum", "Add difference": "add-difference"}


@dataclass(frozen=True)
class Parent:
    """One input: the name of its file or folder, and the SHA-256 of its weights, None while it is not known.

    Of several files it is the SHA-256 of the lines ``<sha256>  <name>`` of each, in their order.
    """

    name: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to merge.

    Attributes:
        models: the inputs, in the order that the method asks for.
        method: a name in ``METHODS``.
        alpha: the rate where nothing else says; None: the method's usual.
        settings: of the method (``density``).
        blocks: rates of blocks, see :mod:`~sumuk.weights.blocks`.
        parts: rates of whole parts. ``text`` stands for every text tower that is not named itself. ``denoiser`` is for
            the blocks that ``blocks`` does not name; for other parts these go before the rate of ``BASE``.
        dtype: floating-point type of the result; None: each tensor's in the first model.
        layout: of the result, ``single`` or ``diffusers``; None: the first model's.
        seed: for methods that draw random numbers.
        extra_channels: ``keep``: where the first model's input takes more channels than the others' (inpainting), they
            change only those that they have. None: such models are refused.
    """

    models: tuple[Parent, ...]
    method: str = "weighted-sum"
    alpha: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    blocks: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    dtype: str | None = None
    layout: str | None = None
    seed: int | None = None
    extra_channels: str | None = None

    def __post_init__(self) -> None:
        method = METHODS[self.method]
        change = object.__setattr__  # names as they are registered, numbers as they are written
        change(self, "method", method.name)
        if len(self.models) > MOST:
            raise BadInput(f"{len(self.models)} models are more than the {MOST} of one merge")
        lists = {name: tuple(v) if isinstance(v, list) else v for name, v in self.settings.items()}
        change(self, "settings", lists)
        method.check(lists, len(self.models))
        if self.alpha is not None:
            change(self, "alpha", method.alpha.check("alpha", self.alpha))
        change(self, "parts", {name: method.alpha.check(f"{name}=", r) for name, r in self.parts.items()})
        if self.dtype is not None:
            change(self, "dtype", str(torch_dtype(self.dtype)).removeprefix("torch."))
        if self.seed is not None and not method.seeded:
            raise BadInput(
                f"{method.name} draws no random numbers, so that the seed {self.seed} would do nothing"
            )
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise BadInput(f"seed {self.seed!r} is not a whole number")
        if self.extra_channels not in (None, "keep"):
            raise BadInput(f"extra_channels {self.extra_channels!r} is not 'keep'")
        if method.neutral and self.alpha == 0 and self.blocks is None and not any(self.parts.values()):
            raise BadInput(
                "alpha 0 leaves the first model as it is: nothing of the others would be in the result"
            )

    @property
    def rule(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    @property
    def values(self) -> dict[str, Any]:
        """The method's settings with the defaults of those that are not given."""
        seed = {"seed": self.seed or 0} if self.rule.seeded else {}
        return self.rule.check(self.settings, len(self.models)) | seed

    @property
    def text(self) -> str:
        """The recipe as TOML; :func:`parse` reads it back."""
        lines = [f"method = {_toml(self.method)}"]
        for name in ("alpha", "blocks", "dtype", "layout", "seed", "extra_channels"):
            if (value := getattr(self, name)) is not None:
                lines.append(f"{name} = {_toml(value)}")
        for table in ("settings", "parts"):
            if values := getattr(self, table):
                lines += ["", f"[{table}]", *(f"{name} = {_toml(values[name])}" for name in sorted(values))]
        for model in self.models:
            lines += ["", "[[models]]", f"name = {_toml(model.name)}"]
            lines += [f"sha256 = {_toml(model.sha256)}"] if model.sha256 else []
        return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def parse(text: str) -> Recipe:
    """Read a recipe.

    Raises:
        BadInput: it is no TOML, or says something that is not understood.
    """
    if len(text) > LONGEST:
        raise BadInput(f"a recipe of {len(text)} characters is above {LONGEST}")
    try:
        said = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"the recipe is no TOML: {error}") from None
    for name in said:
        if name not in _FIELDS:
            raise BadInput(f"a recipe has no {name!r}{nearest(name, _FIELDS)}")
    models = said.pop("models", [])
    if not isinstance(models, list) or not all(isinstance(each, dict) for each in models):
        raise BadInput("the models of a recipe are tables: [[models]] with name and sha256")
    kinds = {"method": str, "blocks": str, "dtype": str, "layout": str, "extra_channels": str, "seed": int}
    for name, kind in (kinds | {"settings": dict, "parts": dict}).items():
        if name in said and not isinstance(said[name], kind):
            raise BadInput(f"{name} of a recipe is {said[name]!r:.60}, not of the type {kind.__name__}")
    return Recipe(models=tuple(map(_parent, models)), **said)


def _parent(said: dict[str, Any]) -> Parent:
    if odd := said.keys() - {"name", "sha256"}:
        raise BadInput(f"a model of a recipe has no {min(odd)!r}; it has a name and a sha256")
    name, digest = said.get("name"), said.get("sha256")
    if not isinstance(name, str) or not name:
        raise BadInput(f"a model of a recipe has the name {name!r:.60}; give the name of a file")
    if digest is not None and (not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest)):
        raise BadInput(f"the sha256 of {name!r} is {digest!r:.80}, not 64 hexadecimal digits in lower case")
    return Parent(name, digest)


def recipe_of(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a merged file's or folder's metadata; A1111's where there is none of ours.

    Raises:
        BadFile: it says nothing of a merge, or only what cannot be made again.
    """
    metadata = read(path).metadata
    try:
        if META in metadata:
            return parse(metadata[META])
        if A1111 in metadata:
            return _from_a1111(metadata)
    except BadInput as error:
        raise BadFile(f"{path}: its recipe cannot be followed: {error}", "merge.recipe") from error
    raise BadFile(f"{path}: does not say that it was merged (no metadata {META} or {A1111})", "merge.none")


def _from_a1111(metadata: Mapping[str, str]) -> Recipe:
    try:
        said, models = json.loads(metadata[A1111]), json.loads(metadata.get(A1111_MODELS, "{}"))
    except (ValueError, RecursionError):
        raise BadInput(f"{A1111} or {A1111_MODELS} is no JSON") from None
    if not isinstance(said, dict) or not isinstance(models, dict):
        raise BadInput(f"{A1111} or {A1111_MODELS} is no table")
    asked = said.get("interp_method")
    method = _INTERPOLATIONS.get(asked) if isinstance(asked, str) else None
    if method is None:
        wanted = " and ".join(map(repr, _INTERPOLATIONS))
        raise BadInput(f"it is of {said.get('type')!r:.40}, {asked!r:.40}; known are A1111's {wanted}")
    for name in ("bake_in_vae", "discard_weights"):
        if said.get(name) not in (None, "", "None"):
            raise BadInput(f"it has {name} {said[name]!r:.60}, which is not done here")
    parents = []
    for name in _PRIMARY[: 2 if method == "weighted-sum" else 3]:
        digest = said.get(f"{name}_model_hash")
        entry = models.get(digest) if isinstance(digest, str) else None
        called = entry.get("name") if isinstance(entry, dict) else None
        parents.append(_parent({"name": called or digest, "sha256": digest}))
    channels = "keep" if said.get("is_inpainting") or said.get("is_instruct_pix2pix") else None
    dtype = "float16" if said.get("save_as_half") else None
    alpha = said.get("multiplier")
    return Recipe(models=tuple(parents), method=method, alpha=alpha, dtype=dtype, extra_channels=channels)


def metadata_of(recipe: Recipe, parents: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What a result says of its making.

    Args:
        recipe: with the hash of every model.
        parents: the metadata of each, by hash; what they say of their own parents is kept.
    """
    short = {"type": "sumuk", "interp_method": recipe.method, "multiplier": recipe.alpha}
    hashes = {
        f"{place}_model_hash": model.sha256 for place, model in zip(_PRIMARY, recipe.models, strict=False)
    }
    models: dict[str, Any] = {}
    for model in recipe.models:
        assert model.sha256 is not None
        said = parents[model.sha256]
        models[model.sha256] = {"name": model.name, A1111: _json(said.get(A1111))}
        older = _json(said.get(A1111_MODELS))
        models = (older if isinstance(older, dict) else {}) | models
    return {
        META: recipe.text,
        A1111: json.dumps(short | hashes),
        A1111_MODELS: json.dumps(models, ensure_ascii=False),
        "modelspec.merged_from": ", ".join(model.name for model in recipe.models),
    }


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
