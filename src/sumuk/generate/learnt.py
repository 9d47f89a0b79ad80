"""Embeddings in prompts: where a text names one, its vectors stand in place of tokens.

===================  ==================================================================================================
``embedding:name``   as ComfyUI writes it; letter case and the file's extension do not matter, and a name that is not
                     there is an error. The name ends at white space, a bracket or a mark of punctuation, unless the
                     embedding's own name goes on
``name``             as A1111 does: the tokens of the name, wherever they stand in the text; the longest such name.
                     CLIP does not know letter case, T5 does
===================  ==================================================================================================

Both may stand in brackets, ``(name:1.2)``. A tower for which an embedding has no vectors (T5, mostly) reads the bare
name as any other words, and nothing in place of ``embedding:name``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from torch import Tensor

from sumuk.base.errors import BadInput, nearest
from sumuk.generate.prompt import BREAK, Prompt

if TYPE_CHECKING:
    from sumuk.weights.embedding import Embedding
    from sumuk.weights.model import Words

_MARKS = r"\s,;:!?()\[\]{}<>|\"'"
_NAMED = re.compile(r"(?<!\w)embedding:(?=\S)")
_MARK = re.compile(rf"[{_MARKS}]")
_END = re.compile(rf"(?:\.(?:pt|bin|safetensors|png|webp))?(?=$|[{_MARKS}]|\.(?:\s|$))", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Word:
    """An embedding in a text, with its vectors [n, D] for the tower at hand."""

    name: str
    vectors: Tensor


class Learnt:
    """A model's embeddings as one of its towers reads them.

    Args:
        embeddings: by the names that prompts use.
        part: the tower.
        tokens: its vocabulary.
    """

    def __init__(self, embeddings: Mapping[str, Embedding], part: str, tokens: Words) -> None:
        self._tokens = tokens
        self._words = {
            name: Word(name, each.vectors[part]) if part in each.vectors else None
            for name, each in embeddings.items()
        }
        self._spelt: dict[int, dict[tuple[int, ...], list[Word]]] = defaultdict(dict)
        for name, word in self._words.items():
            ids = tuple(tokens.encode(name))
            if word is not None and ids:
                self._spelt[ids[0]].setdefault(ids, []).append(word)

    @property
    def filler(self) -> int:
        """An ordinary token to stand in place of vectors: none that begins, ends or fills a row."""
        special = {*self._tokens.row([])}
        return next(each for each in count() if each not in special)

    def words(self, text: str) -> list[int | Word]:
        """A text as tokens and embeddings.

        Raises:
            BadInput: an embedding that is not there, or a name that two of them bear.
        """
        found: list[int | Word] = []
        at = 0
        for mark in _NAMED.finditer(text):
            if mark.start() < at:
                continue  # inside the name of the one before
            found += self._bare(text[at : mark.start()])
            name, at = self._name(text, mark.end())
            word = self._words[name]
            found += [] if word is None else [word]
        return [*found, *self._bare(text[at:])]

    def _name(self, text: str, start: int) -> tuple[str, int]:
        """The longest name that stands there, and where the text goes on."""
        fit: dict[int, list[str]] = defaultdict(list)
        for name in self._words:
            said = text[start : start + len(name)]
            end = _END.match(text, start + len(name)) if said.lower() == name.lower() else None
            if end is not None:
                fit[end.end()].append(name)
        if not fit:
            said = _MARK.split(text[start:], maxsplit=1)[0].rstrip(".")
            hint = nearest(said, self._words) if self._words else "; the model was loaded without any"
            raise BadInput(f"the prompt names an embedding {said!r:.80} that is not there{hint}")
        end_at = max(fit)
        names = fit[end_at]
        exact = [name for name in names if text.startswith(name, start)]
        return self._only(exact or names), end_at

    def _bare(self, text: str) -> list[int | Word]:
        """Tokens, but for the embeddings whose names they spell."""
        ids = self._tokens.encode(text)
        if not self._spelt:
            return [*ids]
        found: list[int | Word] = []
        at = 0
        while at < len(ids):
            here = self._spelt.get(ids[at], {})
            length = max((len(name) for name in here if tuple(ids[at : at + len(name)]) == name), default=0)
            if length:
                words = {word.name: word for word in here[tuple(ids[at : at + length])]}
                found.append(words[self._only([*words])])
            else:
                found.append(ids[at])
            at += length or 1
        return found

    def _only(self, names: list[str]) -> str:
        if len(names) > 1:
            said = " and ".join(map(repr, names[:2]))
            raise BadInput(
                f"the prompt could mean the embedding {said}, which read the same; load one of them under another name"
            )
        return names[0]


def used(
    prompt: Prompt,
    embeddings: Mapping[str, Embedding],
    vocabularies: Mapping[str, Words],
    steps: int,
    base: int | None = None,
) -> tuple[str, ...]:
    """The embeddings that a prompt reads at any step, for a receipt; in the order in which they come.

    Args:
        prompt: what was parsed.
        embeddings: by the names that prompts use.
        vocabularies: of the model's towers, by part.
        steps: of this pass.
        base: steps of the first pass, if this is a second.
    """
    if not embeddings:
        return ()
    towers = [Learnt(embeddings, part, tokens) for part, tokens in vocabularies.items()]
    found: dict[str, None] = {}
    for step in prompt.changes(steps, base):
        texts = [each for part in prompt.at(step, steps, base) for each in part.segments if each is not BREAK]
        words = [word for each in texts for tower in towers for word in tower.words(each.text)]
        found |= dict.fromkeys(word.name for word in words if isinstance(word, Word))
    return tuple(found)
