"""What a request's prompts become: for each step what every tower says of each text, all equally long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.families.reading import Encoded, Reading
from sumuk.generate.encode import Contexts, Placed, contexts, empty_context, lengthen
from sumuk.generate.learnt import Learnt
from sumuk.generate.prompt import Prompt
from sumuk.generate.settings import Settings
from sumuk.generate.wear import NOTHING, Outfit, dressed
from sumuk.weights.model import Model, Words

Said = Mapping[str, Encoded]
"""What each tower says of one text, by part."""


@dataclass(frozen=True)
class Tower:
    """One of a model's text towers, read as its family reads it: see :class:`sumuk.generate.encode.TextTower`."""

    network: Any
    tokens: Words
    reading: Reading
    clip_skip: int = 1
    outfit: Outfit = NOTHING

    @property
    def chunked(self) -> bool:
        return self.reading.words == "clip"

    def encode(self, ids: Tensor, placed: Sequence[Placed] = ()) -> Encoded:
        """Each row by itself, so that a text's encoding does not know its company."""
        device = next(self.network.parameters()).device
        with dressed(self.reading.part, self.network, [self.outfit]):
            outputs = [
                self._read(row[None].to(device), [each for each in placed if each.row == index])
                for index, row in enumerate(ids)
            ]
        rows = [self._layer(output) for output in outputs]
        pooled = self._pooled(outputs[0])
        return Encoded(
            z=torch.cat(rows).to("cpu", torch.float32),
            pooled=None if pooled is None else pooled.to("cpu", torch.float32),
        )

    def _read(self, ids: Tensor, placed: Sequence[Placed]) -> Any:
        more = {"embeddings": self._embedded(ids, placed)} if placed else {}
        if not self.reading.masked:
            return self.network(ids, **more)
        ends = (ids == self.network.eos).int().argmax(dim=1, keepdim=True)
        return self.network(ids, mask=torch.arange(ids.shape[1], device=ids.device)[None] <= ends, **more)

    def _embedded(self, ids: Tensor, placed: Sequence[Placed]) -> Tensor:
        """The rows of tokens [1, L, D], with vectors in their places."""
        rows: Tensor = self.network.embed(ids).clone()
        for each in placed:
            if each.vectors.shape[1] != rows.shape[2]:
                raise BadInput(
                    f"the prompt names an embedding {each.vectors.shape[1]} wide; this text tower is {rows.shape[2]} "
                    "wide, so it was read for another model"
                )
            rows[0, each.at : each.at + len(each.vectors)] = each.vectors.to(rows)
        return rows

    def _pooled(self, output: Any) -> Tensor | None:
        if self.reading.pool is None:
            return None
        # CLIP-L files without a projection circulate for SD3, which then takes the sentence as it is.
        plain = self.reading.pool == "pooled" or output.projected is None
        return output.pooled if plain else output.projected

    def _layer(self, output: Any) -> Tensor:
        if not self.chunked:
            return output.last
        return output.skip(self.reading.layer_of(self.network.shape) + self.clip_skip - 1, self.reading.norm)


class Texts:
    """Both prompts of a request, encoded by every tower for one pass.

    Args:
        model: whose towers read them, and whose embeddings they may name.
        settings: the request.
        steps: steps of this pass.
        base: steps of the first pass when this is the second, which continues prompt schedules.
    """

    def __init__(self, model: Model, settings: Settings, steps: int, base: int | None = None) -> None:
        self._towers = {
            reading.part: Tower(
                model.networks[reading.part],
                model.words[reading.part],
                reading,
                settings.request.clip_skip,
                settings.wardrobe.on_tower(model, reading.part),
            )
            for reading in model.readings
        }
        self._learnt = {
            part: Learnt(model.embeddings, part, tower.tokens) for part, tower in self._towers.items()
        }
        self._empty: dict[str, Tensor] = {}
        self._wanted = self._read(settings.prompt, steps, base)
        self._negative = self._read(settings.negative, steps, base)
        every = [*self._wanted.values(), *self._negative.values()]
        self._since = [0] * steps
        for step in range(1, steps):
            same = all(each[step] is each[step - 1] for each in every)
            self._since[step] = self._since[step - 1] if same else step

    def _read(self, prompt: Prompt, steps: int, base: int | None) -> dict[str, list[Contexts]]:
        return {
            part: contexts(prompt, tower, steps, base=base, learnt=self._learnt[part])
            for part, tower in self._towers.items()
        }

    def since(self, step: int) -> int:
        """The first of the steps up to ``step`` (from 0) that read the same."""
        return self._since[step]

    def at(self, step: int) -> tuple[tuple[tuple[Said, float], ...], Said]:
        """What to go towards, with weights, and what to go away from, all equally long; ``step`` from 0."""
        wanted: list[dict[str, Encoded]] = []
        weights: list[float] = []
        negative: dict[str, Encoded] = {}
        for part in self._towers:
            positive, ((away, _),) = (
                self._wanted[part][step],
                self._negative[part][step],
            )  # AND is a word in it
            weights = [weight for _, weight in positive]
            longest = max(said.z.shape[1] for said in (away, *(said for said, _ in positive)))
            negative[part] = self._long(part, away, longest)
            wanted = wanted or [{} for _ in positive]
            for texts, (said, _) in zip(wanted, positive, strict=True):
                texts[part] = self._long(part, said, longest)
        if not self._towers:
            return (({}, 1.0),), {}
        return tuple(zip(wanted, weights, strict=True)), negative

    def _long(self, part: str, said: Encoded, length: int) -> Encoded:
        if said.z.shape[1] == length:
            return said
        if part not in self._empty:  # a whole pass through the tower, which few prompts need
            self._empty[part] = empty_context(self._towers[part])
        return Encoded(z=lengthen(said.z, length, self._empty[part]), pooled=said.pooled)
