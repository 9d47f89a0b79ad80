"""What a request's prompts become: for each step the weighted contexts to go towards and the one to go away from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sumuk.generate.encode import Contexts, contexts, empty_context, match_lengths
from sumuk.generate.settings import Settings
from sumuk.nets.tokens import ClipTokens
from sumuk.weights.model import Model


@dataclass(frozen=True)
class Tower:
    """A model's text tower, read at a layer: see :class:`sumuk.generate.encode.TextTower`."""

    model: Model
    clip_skip: int

    @property
    def tokens(self) -> ClipTokens:
        return self.model.tokens

    def encode(self, ids: Tensor) -> Tensor:
        """Rows [n, L] to [n, L, D]; each row by itself, so that a text's encoding does not know its company."""
        rows = [self.model.text(row[None].to(self.model.device)).skip(self.clip_skip) for row in ids]
        return torch.cat(rows).to("cpu", torch.float32)


class Texts:
    """Both prompts of a request, encoded for one pass.

    Args:
        model: whose tower reads them.
        settings: the request.
        steps: steps of this pass.
        base: steps of the first pass when this is the second, which continues prompt schedules.
    """

    def __init__(self, model: Model, settings: Settings, steps: int, base: int | None = None) -> None:
        tower = Tower(model, settings.request.clip_skip)
        self._wanted = contexts(settings.prompt, tower, steps, base=base)
        self._negative = contexts(settings.negative, tower, steps, base=base)
        self._empty = empty_context(tower)

    def at(self, step: int) -> tuple[Contexts, Tensor]:
        """The positive contexts with their weights, and the negative one, all equally long; ``step`` from 0."""
        wanted = [context for context, _ in self._wanted[step]]
        ((negative, _),) = self._negative[step]  # AND is a word in it
        longest = max([negative, *wanted], key=lambda each: each.shape[1])
        negative = match_lengths(negative, longest, self._empty)[0]
        wanted = [match_lengths(context, longest, self._empty)[0] for context in wanted]
        weights = [weight for _, weight in self._wanted[step]]
        return tuple(zip(wanted, weights, strict=True)), negative
