"""LoRAs as they are put into a checkpoint: read, rated by part and block, and added to one weight, some rows at a time.

No weight is widened as a whole. What is added is counted, and what rounding to the stored type makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.layout import some
from sumuk.files.tensors import Lazy, dtype_name
from sumuk.weights.blocks import Blocks, Rates
from sumuk.weights.live import Applied, BlockRates
from sumuk.weights.lora import Lora, Patch, read_lora
from sumuk.weights.lora_tools import bake, relative_change
from sumuk.weights.lora_work import Host, Place

NUMBERS = 1 << 18
"""Numbers of a weight that are widened at a time: a few MB, which stay in the processor's caches."""

Given = tuple[Place, float, float | None, str | None]
"""A LoRA, its strength, that for text towers (None: the same), and rates by block (None: 1 everywhere)."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A LoRA that was baked.

    Attributes:
        path: its file.
        strength: of what it changes.
        text_strength: of what it changes of text towers; None: the same.
        blocks: rates by block as they were given; None: 1 everywhere.
        applied: its account.
    """

    path: Path
    strength: float
    text_strength: float | None
    blocks: str | None
    applied: Applied


@dataclass(frozen=True)
class Worn:
    """A LoRA and how it is worn."""

    lora: Lora
    strength: float
    text_strength: float | None
    blocks: BlockRates | None

    @classmethod
    def read(
        cls,
        given: Given,
        home: Host,
        partial: bool,
        account: Account,
    ) -> Worn:
        path, strength, text_strength, blocks = given
        for value in (strength, text_strength):
            if value is not None and not math.isfinite(value):
                raise BadInput(f"{path}: strength {value} is not a finite number")
        lora = read_lora(path, home.family, home.native)
        lost = (*lora.unmatched, *lora.misshapen)
        if lost and not partial:
            raise BadFile(
                f"{path}: {len(lost)} of its tensors do not fit {home.path}, {home.family.title}, such as "
                f"{some(lost, 1)}; to bake the rest all the same: partial=True",
                "lora.partial",
            )
        if lora.embeddings and not partial:
            raise BadFile(
                f"{path}: brings the embeddings {some([*lora.embeddings])}, for which a checkpoint has no place; save "
                "them by themselves, and bake the rest with partial=True",
                "lora.partial",
            )
        if not account.added(lora):
            raise BadFile(f"{path}: changes nothing: all that it would add is zero", "lora.zero")
        rates = None
        if blocks is not None:
            found = Blocks.of(home.native)
            rates = BlockRates(blocks, found, Rates.parse(blocks, found, rest=1.0))
        made = cls(lora, strength, text_strength, rates)
        made._refuse_idle(path)
        return made

    def _refuse_idle(self, path: Place) -> None:
        """Refuse settings without effect."""
        patches = self.lora.patches
        if not any(self.rate(patch) for patch in patches):
            raise BadInput(
                f"{path}: at strength {self.strength:g} it changes nothing; leave it away, or give another"
            )
        if self.text_strength is not None and not any(patch.part.startswith("text") for patch in patches):
            raise BadInput(f"{path}: text_strength would do nothing: it changes no text tower")
        if self.blocks is not None and all(self.blocks.of(patch.part, patch.name) == 1 for patch in patches):
            raise BadInput(
                f"{path}: the block rates {self.blocks.text!r} would do nothing: those of its layers are 1"
            )

    def rate(self, patch: Patch) -> float:
        """The strength for one change."""
        text = patch.part.startswith("text") and self.text_strength is not None
        strength = self.text_strength if text else self.strength
        assert strength is not None
        return strength * (1.0 if self.blocks is None else self.blocks.of(patch.part, patch.name))

    def told(self, change: float) -> Ingredient:
        """For the report."""
        lora = self.lora
        return Ingredient(
            path=lora.path,
            strength=self.strength,
            text_strength=self.text_strength,
            blocks=None if self.blocks is None else self.blocks.text,
            applied=Applied(
                matched=len(lora.patches), unmatched=lora.unmatched, misshapen=lora.misshapen, change=change
            ),
        )


# -- the numbers -----------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What is added to what, in squared Frobenius norms. A tensor may be made more than once and counts once."""

    home: Host
    size: dict[int, float] = field(default_factory=dict)
    weights: dict[tuple[int, str, int], float] = field(default_factory=dict)
    rounded: dict[str, tuple[float, float]] = field(default_factory=dict)

    def added(self, lora: Lora) -> float:
        """Of all that a LoRA adds at strength 1."""
        energy = 0.0
        for patch in lora.patches:
            change = patch.change
            weight = torch.zeros(()) if change.low_rank() is not None else torch.zeros(change.shape)
            if change.reads_weight:
                weight = self.home.opened.moved.tensors[f"{patch.part}.{patch.name}"].load()
                weight = weight if patch.rows is None else weight[slice(*patch.rows)]
            energy += relative_change(change, weight)[0] ** 2
        self.size[len(self.size)] = energy
        return energy

    def change(self, number: int) -> float:
        """Size of what one LoRA adds at strength 1 against the weights that it is added to."""
        weights = sum(energy for (of, _, _), energy in self.weights.items() if of == number)
        return math.sqrt(self.size[number] / weights) if weights else 0.0

    @property
    def rounding(self) -> float:
        """What rounding did, relative to what was added."""
        lost, added = (sum(each[i] for each in self.rounded.values()) for i in (0, 1))
        return math.sqrt(lost / added) if added else 0.0

    def baked(
        self, name: str, weight: Lazy, some_: Sequence[tuple[int, Patch, float]], dtype: torch.dtype | None
    ) -> Lazy:
        """A weight with changes in it, computed when it is loaded."""
        if any(patch.change.result != patch.change.shape for _, patch, _ in some_):
            return bake(weight, [(patch.change, rate) for _, patch, rate in some_], name=name, dtype=dtype)

        def load() -> Tensor:
            stored = weight.load()
            made = torch.empty(stored.shape, dtype=dtype or stored.dtype)
            sums = _Sums(name, weight.source, stored, some_)
            for begin in range(0, len(stored), sums.step):
                sums.piece(begin, made)
            self.weights |= {(number, name, i): sums.weights[i] for i, (number, _, _) in enumerate(some_)}
            self.rounded[name] = (sums.lost, sums.added)
            return made

        if not weight.dtype.startswith(("F", "BF")):
            raise BadInput(f"{name}: is {weight.dtype}; only floating-point tensors can be changed")
        return weight.become(load, dtype=dtype_name(dtype) if dtype else weight.dtype)


class _Sums:
    """One weight while changes are added to it, some rows at a time.

    Args:
        name: of the tensor.
        source: its file, for messages.
        stored: itself.
        some_: the changes, each with its rate.
    """

    def __init__(
        self, name: str, source: str, stored: Tensor, some_: Sequence[tuple[int, Patch, float]]
    ) -> None:
        self.name, self.source, self.stored = name, source, stored
        self.work = torch.float64 if stored.dtype == torch.float64 else torch.float32
        self.step = max(1, NUMBERS // max(stored[0].numel(), 1))
        self.weights = [0.0] * len(some_)
        self.lost = self.added = 0.0
        self.dense: Tensor | None = None
        self.spans: list[tuple[int, int]] = []
        self.thin: list[tuple[int, Tensor, Tensor, float]] = []
        for _, patch, rate in some_:
            first, last = patch.rows or (0, len(stored))
            self.spans.append((first, last))
            self._take(patch, first, last, rate)

    def _take(self, patch: Patch, first: int, last: int, rate: float) -> None:
        low = patch.change.low_rank()
        if low is not None and "lora_mid.weight" not in patch.change.factors:
            down, up, scale = low
            self.thin.append((first, down.flatten(1).to(self.work), up.to(self.work), scale * rate))
            return
        if self.dense is None:
            self.dense = torch.zeros(self.stored.shape, dtype=self.work)
        self.dense[first:last] += patch.change.delta(self.stored[first:last], rate)

    def piece(self, begin: int, made: Tensor) -> None:
        """Make some rows of the result."""
        rows = slice(begin, begin + self.step)
        weight = self.stored[rows].to(self.work)
        change = torch.zeros_like(weight) if self.dense is None else self.dense[rows]
        for first, down, up, scale in self.thin:
            low, high = max(begin, first), min(begin + len(weight), first + len(up))
            if low < high:
                product = (up[low - first : high - first] @ down).reshape(-1, *weight.shape[1:])
                change[low - begin : high - begin] += product * scale
        total = weight + change
        # Asked before the cast, as some types of 8 bits take their largest number for what is larger.
        least, most = map(float, total.aminmax())  # neither is a number if one in it is none
        if not max(-least, most) <= torch.finfo(made.dtype).max:
            raise BadFile(
                f"{self.source}: {self.name} with what is added to it goes beyond what {dtype_name(made.dtype)} holds; "
                "write a wider type, or give less strength",
                "lora.values",
            )
        made[rows] = total
        self.added += _energy(change)
        self.lost += _energy(made[rows].to(self.work) - total)
        for i, (first, last) in enumerate(self.spans):
            self.weights[i] += _energy(weight[max(first - begin, 0) : max(last - begin, 0)])


def _energy(tensor: Tensor) -> float:
    """Of a piece, in its own type: in a wider one it takes fifteen times as long."""
    return float(torch.linalg.vector_norm(tensor)) ** 2
