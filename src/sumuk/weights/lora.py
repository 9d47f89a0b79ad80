"""Reading LoRA files of every layout: which native tensor each of their factors changes.

A file's names are cut into layer and factor (:mod:`~sumuk.weights.lora_names`), the factors of a layer are turned to
the sides of the native tensor (:mod:`~sumuk.weights.lora_factors`) and become a change of it
(:mod:`~sumuk.weights.changes`). Every tensor of the file is accounted for: it is in a change, or it is listed as one
whose layer the model lacks or does not fit.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sumuk.base.errors import BadFile
from sumuk.families.adapters import MOST_FACTORS, OTHER
from sumuk.families.detect import Match, detect
from sumuk.families.family import Family
from sumuk.files.layout import some
from sumuk.files.tensors import Lazy, Shape
from sumuk.weights.changes import Change, make_change
from sumuk.weights.lora_factors import from_peft, native_sides
from sumuk.weights.lora_names import BIAS, BIASES, Index, Piece, Place, cut
from sumuk.weights.lora_peft import Scales, scales
from sumuk.weights.source import Source, read

OF_BIAS = ("diff_b", "b_norm", BIAS)
"""Factors that change a layer's bias."""


@dataclass(frozen=True, eq=False)
class Patch:
    """One change of one native tensor.

    Attributes:
        part: ``denoiser``, ``text``, ...
        name: the tensor of that part: ``input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight``.
        rows: which rows of it, where it is a stack (q, k, v); None: all.
        change: what is added to them.
        source: the layer's name in the file.
    """

    part: str
    name: str
    rows: tuple[int, int] | None
    change: Change
    source: str


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file, read for one model.

    Attributes:
        path: the file.
        method: LoRA, LoHa, ..., the most frequent first.
        layout: whose names it has, as :mod:`sumuk.families.adapters` calls them.
        patches: what it changes.
        unmatched: its tensors whose layer the model does not have.
        misshapen: its layers that do not fit the model's, each with what fits ill.
        embeddings: textual inversions that came with it: name -> text tower -> rows [n, width].
        metadata: its header's texts.
    """

    path: Path
    method: str
    layout: str
    patches: tuple[Patch, ...]
    unmatched: tuple[str, ...]
    misshapen: tuple[str, ...]
    embeddings: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]


def read_lora(path: str | os.PathLike[str], family: Family, native: Mapping[str, Shape]) -> Lora:
    """Read a LoRA (LoCon, LoHa, LoKr, DoRA, ...) for a model.

    Args:
        path: a file, or the folder that PEFT or diffusers wrote.
        family: of the model.
        native: native names of the model's tensors, with the part in front, and their shapes.

    Raises:
        MissingFile: no such file.
        BadFile: it is no LoRA, a factor lacks its other half or means nothing, or none of its layers is the model's.
    """
    source = read(path)
    reader = _Reader(source, Index(family, native), scales(source))
    if len(source.tensors) > MOST_FACTORS:
        raise BadFile(f"{source.path}: is no LoRA: none has {len(source.tensors):,} tensors", "lora.none")
    for name, tensor in source.tensors.items():
        reader.take(name, tensor)
    if not reader.is_lora:
        raise BadFile(f"{source.path}: is no LoRA; it is {_seems(source)}", "lora.none")
    reader.finish()
    if not reader.patches and not reader.embeddings:
        raise BadFile(
            f"{source.path}: none of its {len(reader.layers)} layers fits {family.title}, such as "
            f"{some([*reader.layers], 1)}; it is {_seems(source)}",
            "lora.family",
        )
    methods = Counter(patch.change.method for patch in reader.patches)
    return Lora(
        path=source.path,
        method=" and ".join(name for name, _ in methods.most_common()),
        layout=" and ".join(sorted(reader.spellings)),
        patches=tuple(reader.patches),
        unmatched=tuple(reader.unmatched),
        misshapen=tuple(reader.misshapen),
        embeddings=reader.embeddings,
        metadata=source.metadata,
    )


def _seems(source: Source) -> str:
    answer = detect(source.tensors)
    return answer.family.title if isinstance(answer, Match) else f"not known here: {answer.why}"


@dataclass
class _Reader:
    """The account of one file while it is read."""

    source: Source
    index: Index
    scales: Scales
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    numbered: dict[str, str] = field(default_factory=dict)
    spellings: set[str] = field(default_factory=set)
    patches: list[Patch] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def is_lora(self) -> bool:
        """Whether there is more than names that other files have as well."""
        factors = {factor for names in self.layers.values() for factor in names}
        return bool(self.embeddings or factors - {"weight", "set_weight", "alpha"})

    def take(self, name: str, tensor: Lazy) -> None:
        """Put a tensor to those of its layer."""
        if name.startswith("bundle_emb."):
            self._bundled(name, tensor)
        elif name in ("embeddings.embeddings", "embeddings.indices"):
            self.numbered[name.partition(".")[2]] = name
        elif (piece := cut(name)) is not None:
            self._factor(name, piece)
        else:
            self.unmatched.append(name)

    def _factor(self, name: str, piece: Piece) -> None:
        factors = self.layers.setdefault(piece.layer, {})
        if piece.factor in factors:
            both = f"{factors[piece.factor]!r} and {name!r}"
            raise BadFile(f"{self.source.path}: {both} are the same factor of one layer", "lora.twice")
        factors[piece.factor] = name
        if piece.spelling:
            self.spellings.add(piece.spelling)

    def _bundled(self, name: str, tensor: Lazy) -> None:
        title, _, key = name.removeprefix("bundle_emb.").rpartition(".")
        if key == "*":
            title, key = title.removesuffix(".string_to_param"), "string_to_param"
        tower = self.index.tower(key)
        if tower is None or not title:
            self.unmatched.append(name)
            return
        width = self.index.native[f"{tower.name}.{tower.key}"][1]
        if len(tensor.shape) not in (1, 2) or tensor.shape[-1] != width:
            self.misshapen.append(f"{name}: {list(tensor.shape)} for words of width {width}")
        else:
            self.embeddings.setdefault(title, {})[tower.name] = tensor.load().reshape(-1, width)

    def finish(self) -> None:
        """Make the patches."""
        order = self._order()
        for layer, names in self.layers.items():
            self._refuse_halves(names)
            if names.keys() <= {"alpha"} or {*names} & {"weight", "on_input"} in ({"weight"}, {"on_input"}):
                self.unmatched += names.values()
                continue
            factors = {factor: self.source.tensors[name].load() for factor, name in names.items()}
            biases = {factor: factors.pop(factor) for factor in OF_BIAS if factor in factors}
            if layer in order:
                factors["alpha"] = torch.ones(())  # these files scale by 1 / rank
            place = order.get(layer) or self.index.find(layer)
            if {*factors} - {"alpha"}:
                factors = self._weight(layer, factors, place, names)
            for factor, bias in biases.items():
                self._bias(layer, factor, bias, factors, names)
        if self.numbered:
            self._tokens()

    def _refuse_halves(self, names: Mapping[str, str]) -> None:
        for factor, name in names.items():
            other = OTHER.get(factor)
            if other and other not in names:
                raise BadFile(f"{self.source.path}: {name!r} is there without its {other}", "lora.half")

    def _weight(
        self, layer: str, factors: dict[str, Tensor], place: Place | None, names: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """Change a layer's weight; its factors with their alpha."""
        if place is None:
            self.unmatched += [name for factor, name in names.items() if factor not in OF_BIAS]
            return factors
        shape = self.index.shape(place)
        down = factors.get("lora_down.weight")
        alpha = None if "alpha" in factors else self.scales.alpha(layer, 1 if down is None else _rank(down))
        factors = from_peft(factors, alpha, len(shape))
        self._patch(layer, factors, place, shape)
        return factors

    def _bias(
        self,
        layer: str,
        factor: str,
        bias: Tensor,
        factors: Mapping[str, Tensor],
        names: Mapping[str, str],
    ) -> None:
        place = self.index.find(layer, BIASES)
        if place is None:
            self.unmatched.append(names[factor])
            return
        if factor == BIAS:  # of the second thin layer, whose output is scaled
            bias = bias * self._scale(names[factor], factors)
            factor = "diff_b"
        self._patch(layer, {factor: bias}, place, self.index.shape(place))

    def _scale(self, name: str, factors: Mapping[str, Tensor]) -> float:
        down, alpha = factors.get("lora_down.weight"), factors.get("alpha")
        if down is None:
            raise BadFile(f"{self.source.path}: {name!r} is there without its lora_A.weight", "lora.half")
        if alpha is None:
            return 1.0
        if alpha.numel() != 1 or not bool(alpha.isfinite()):
            raise BadFile(f"{self.source.path}: alpha beside {name!r} is not one finite number", "lora.alpha")
        return float(alpha) / max(_rank(down), 1)

    def _patch(self, layer: str, factors: Mapping[str, Tensor], place: Place, shape: Shape) -> None:
        try:
            change = make_change(native_sides(factors, place, layer), shape, layer)
        except BadFile as error:
            if error.code not in ("lora.shape", "lora.rows"):
                raise BadFile(f"{self.source.path}: {error}", error.code) from error
            self.misshapen.append(self._wider(place, factors, shape) or str(error))
            return
        self.patches.append(Patch(place.part, place.name, place.rows, change, layer))

    def _wider(self, place: Place, factors: Mapping[str, Tensor], shape: Shape) -> str:
        """Black Forest Labs's Canny and Depth as LoRAs come with a wider first layer."""
        down = factors.get("lora_down.weight")
        if place.name != "img_in.weight" or down is None or down.ndim != 2 or down.shape[1] <= shape[1]:
            return ""
        return (
            f"img_in: reads {down.shape[1]} numbers a token, those of a control picture among them, where the model's "
            f"reads {shape[1]}; it fits FLUX.1 Canny or Depth, which it makes of FLUX.1 dev by: sumuk lora bake"
        )

    # -- Stable Cascade's own: layers by number, and rows of the token table

    def _order(self) -> dict[str, Place]:
        """The layers that are only numbered: attention, in the order of the network's modules."""
        count = sum(re.fullmatch(r"weights\.[0-9]+", layer) is not None for layer in self.layers)
        if not count:
            return {}
        places = list(_attention(self.index))
        if len(places) != count or any(f"weights.{i}" not in self.layers for i in range(count)):
            raise BadFile(
                f"{self.source.path}: names its {count} layers by number only; they would have to be the "
                f"{len(places)} of the attention of {self.index.family.title}",
                "lora.numbered",
            )
        return {f"weights.{i}": place for i, place in enumerate(places)}

    def _tokens(self) -> None:
        """Add to rows of the table of tokens."""
        if len(self.numbered) < 2:
            (name,) = self.numbered.values()
            raise BadFile(f"{self.source.path}: {name!r} is there without its other half", "lora.half")
        rows = self.source.tensors[self.numbered["embeddings"]].load()
        indices = self.source.tensors[self.numbered["indices"]].load().flatten().int().tolist()
        tower = self.index.tower("clip_g")
        if tower is None:
            self.unmatched += self.numbered.values()
            return
        words, width = self.index.native[f"{tower.name}.{tower.key}"]
        if tuple(rows.shape) != (len(indices), width):
            self.misshapen.append(
                f"embeddings.embeddings: {list(rows.shape)} for {len(indices)} words of {width}"
            )
            return
        for index, row in zip(indices, rows, strict=True):
            if 0 <= index < words:
                place = Place(tower.name, tower.key, (index, index + 1))
                self._patch(f"embeddings.{index}", {"diff": row[None]}, place, (1, width))
            else:
                self.misshapen.append(
                    f"embeddings.embeddings: changes word {index}, which the table of {words} does not have; it was "
                    "added for training, with a start that the file does not hold"
                )


def _rank(down: Tensor) -> int:
    return down.shape[0] if down.ndim else 0


def _attention(index: Index) -> Iterator[Place]:
    pattern = re.compile(
        r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<block>\d+)\.attention\.attn\.(?P<which>out_proj\.weight|in_proj_weight)"
    )
    paths = index.paths.get(index.denoiser)
    found = [match for name in (paths.native if paths else ()) if (match := pattern.fullmatch(name))]
    found.sort(key=lambda m: (m["side"], int(m["level"]), int(m["block"]), m["which"] != "out_proj.weight"))
    for match in found:
        yield Place(index.denoiser, match[0])
