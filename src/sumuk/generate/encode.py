"""Prompts to what the network reads: chunks of tokens through a text tower, weighted, side by side.

A tower reads rows of L tokens (77). Longer text becomes chunks of L - 2, each with its own begin, end and
padding, and their outputs stand one after the other: a context [1, chunks * L, D]. When a chunk is full and a
comma lies at most 20 tokens back, what follows the comma moves to the next chunk whole. An embedding takes a place
for each of its vectors; if these do not all fit, the next chunk begins with them.

Emphasis acts on a chunk's output z [L, D] with the weight w of each token (1 for begin, end and padding):

    original   z' = w z * mean(z) / mean(w z)
    no-norm    z' = w z
    none       z' = z, weights are not used

Some towers end in a norm that leaves no mean but rounding errors (below 0.001 of mean |z|). There is nothing to
restore then, and a ratio of errors would be noise: "original" leaves w z as it is.

Source: AUTOMATIC1111 stable-diffusion-webui 1.10, settings "Emphasis mode" ("none" is its "Ignore") and
"Prompt word wrap length limit". There the mean runs over all the texts that are encoded at once; here over
one chunk of one text, so that a picture does not change with its company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from sumuk.base.errors import BadInput, nearest
from sumuk.families.reading import Encoded
from sumuk.generate.learnt import Learnt, Word
from sumuk.generate.prompt import BREAK, Prompt, SubPrompt, parse
from sumuk.weights.model import Words

Emphasis = Literal["original", "no-norm", "none"]
EMPHASES: tuple[Emphasis, ...] = ("original", "no-norm", "none")
SMALLEST_MEAN = 1e-3
"""Of |z|, for a mean that is more than rounding errors; half precision makes some 1e-4 of them."""
BACKTRACK = 20
"""Tokens after a comma that may move to the next chunk."""
MOST_CHUNKS = 64
"""Of one text."""
MOST_TEXTS = 1024
"""Different texts of one prompt over all steps."""

Contexts: TypeAlias = tuple[tuple[Encoded, float], ...]
"""For each sub-prompt its context [1, chunks * L, D] and its weight."""


@dataclass(frozen=True, eq=False)
class Placed:
    """Vectors [n, D] in place of the tokens ``at`` to ``at + n`` of a row (all from 0)."""

    row: int
    at: int
    vectors: Tensor


class TextTower(Protocol):
    """Reads rows of tokens. Which layer it takes (clip skip) and whether it is normed is its own affair."""

    @property
    def tokens(self) -> Words:
        """The vocabulary, the length of a row and its special tokens."""
        ...

    @property
    def chunked(self) -> bool:
        """Whether longer text goes on in further rows, as with CLIP; T5 reads one row."""
        ...

    def encode(self, ids: Tensor, placed: Sequence[Placed] = ()) -> Encoded:
        """Rows [n, L] of int64 on the CPU to z [n, L, D] on any device, and the first row's sentence [1, P]."""
        ...


@dataclass
class _Chunk:
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    words: list[tuple[int, Word]] = field(default_factory=list)
    """Embeddings, each with its first place."""

    def put(self, word: int | Word, weight: float, filler: int) -> None:
        size = 1 if isinstance(word, int) else len(word.vectors)
        if isinstance(word, Word):
            self.words.append((len(self.ids), word))
        self.ids += [word] if isinstance(word, int) else [filler] * size
        self.weights += [weight] * size

    def split(self, cut: int) -> tuple[_Chunk, _Chunk]:
        """What stands before a place, and what stands from there on; no embedding lies across it."""
        early = [each for each in self.words if each[0] < cut]
        late = [(at - cut, word) for at, word in self.words if at >= cut]
        return _Chunk(self.ids[:cut], self.weights[:cut], early), _Chunk(
            self.ids[cut:], self.weights[cut:], late
        )


_Read: TypeAlias = Callable[[str], Sequence[int | Word]]


def contexts(
    prompt: Prompt,
    tower: TextTower,
    steps: int,
    emphasis: Emphasis = "original",
    *,
    base: int | None = None,
    learnt: Learnt | None = None,
) -> list[Contexts]:
    """The contexts of every step; steps that read the same share the same tensors, each text is encoded once.

    Args:
        prompt: what was parsed.
        tower: the text tower.
        steps: steps of this pass; item i of the result belongs to step i + 1.
        emphasis: how weights act.
        base: steps of the first pass, if this is a second.
        learnt: the model's embeddings as this tower reads them; None: names of embeddings are plain text.

    Raises:
        BadInput: an unknown emphasis, steps below 1, more text than is encoded, an embedding that is not there or
            has more vectors than a chunk has places, or weights that leave no finite number.
    """
    if emphasis not in EMPHASES:
        raise BadInput(f"unknown emphasis {emphasis!r}{nearest(emphasis, EMPHASES)}")
    if steps < 1:
        raise BadInput(f"steps must be at least 1, got {steps}")
    known: dict[tuple[object, ...], Encoded] = {}
    changes = prompt.changes(steps, base)
    found: list[Contexts] = []
    for step, following in zip(changes, [*changes[1:], steps + 1], strict=True):
        here: list[tuple[Encoded, float]] = []
        for part in prompt.at(step, steps, base):
            if part.segments not in known:
                if len(known) == MOST_TEXTS:
                    raise BadInput(f"the prompt reads more than {MOST_TEXTS} different ways; alternate less")
                known[part.segments] = _encode(part, tower, emphasis, learnt)
            here.append((known[part.segments], part.weight))
        found += [tuple(here)] * (following - step)
    return found


def empty_context(tower: TextTower) -> Tensor:
    """What the tower makes of no words, [1, L, D]."""
    return contexts(parse(""), tower, 1)[0][0][0].z


def lengthen(context: Tensor, length: int, empty: Tensor) -> Tensor:
    """A context [B, n, D] with chunks of no words after it, so that it fits one forward with a longer one.

    Args:
        context: n is a multiple of L.
        length: tokens wanted, a multiple of L as well.
        empty: [1, L, D], :func:`empty_context`.

    Raises:
        BadInput: lengths that are no multiple of L.
    """
    for tokens in (context.shape[1], length):
        if tokens % empty.shape[1]:
            raise BadInput(f"a context of {tokens} tokens is not made of chunks of {empty.shape[1]}")
    missing = (length - context.shape[1]) // empty.shape[1]
    if missing <= 0:
        return context
    return torch.cat([context, empty.to(context).repeat(len(context), missing, 1)], dim=1)


def _encode(part: SubPrompt, tower: TextTower, emphasis: Emphasis, learnt: Learnt | None) -> Encoded:
    """One text to its context [1, chunks * L, D]."""
    tokens = tower.tokens
    read: _Read = tokens.encode if learnt is None else learnt.words
    filler = 0 if learnt is None else learnt.filler
    chunks = _chunks(part, tokens, read, filler) if tower.chunked else [_row(part, read, filler)]
    before = [1.0] * tower.chunked  # CLIP's rows begin with a token of their own
    placed = [
        Placed(row, len(before) + at, word.vectors)
        for row, chunk in enumerate(chunks)
        for at, word in chunk.words
    ]
    ids = torch.tensor([tokens.row(chunk.ids) for chunk in chunks], dtype=torch.int64)
    said = tower.encode(ids, placed) if placed else tower.encode(ids)
    z = said.z
    rows = [[*before, *chunk.weights] for chunk in chunks]
    rows = [row + [1.0] * (tokens.length - len(row)) for row in rows]
    if emphasis != "none" and any(weight != 1.0 for row in rows for weight in row):
        z = _emphasise(z, torch.tensor(rows, dtype=z.dtype, device=z.device), restore=emphasis == "original")
    return Encoded(z=z.reshape(1, -1, z.shape[-1]), pooled=said.pooled)


def _emphasise(z: Tensor, weights: Tensor, restore: bool) -> Tensor:
    """``z`` [n, L, D] times ``weights`` [n, L], each chunk brought back to its mean if ``restore``."""
    weighted = z * weights[..., None]
    if restore:
        # double: the mean of thousands of numbers of both signs is small beside them
        before, after, size = (each.double().mean(dim=(1, 2)) for each in (z, weighted, z.abs()))
        useful = (before.abs() > SMALLEST_MEAN * size) & (weights != 1).any(dim=1)
        weighted = weighted * torch.where(useful, before / after, 1.0).to(z)[:, None, None]
    if not torch.isfinite(weighted).all():
        raise BadInput("the weights of the prompt leave no finite text encoding; bring them closer to 1")
    return weighted


def _row(part: SubPrompt, read: _Read, filler: int) -> _Chunk:
    """All of a text in one row; a row that is too long is refused by the vocabulary."""
    row = _Chunk()
    for segment in part.segments:
        if segment is not BREAK:
            for word in read(segment.text):
                row.put(word, segment.weight, filler)
    return row


def _chunks(part: SubPrompt, tokens: Words, read: _Read, filler: int) -> list[_Chunk]:
    """Tokens and embeddings in chunks of at most ``length - 2`` places; at least one chunk."""
    room = tokens.length - 2
    comma = tokens.encode(",")[-1:]
    done: list[_Chunk] = []
    chunk, last_comma = _Chunk(), -1

    def finish(done_one: _Chunk, moved: _Chunk) -> None:
        nonlocal chunk, last_comma
        if len(done) == MOST_CHUNKS - 1:
            raise BadInput(f"the prompt fills more than {MOST_CHUNKS} chunks of {room} tokens; shorten it")
        done.append(done_one)
        chunk, last_comma = moved, -1

    for segment in part.segments:
        if segment is BREAK:
            finish(chunk, _Chunk())
            continue
        for word in read(segment.text):
            size = 1 if isinstance(word, int) else len(word.vectors)
            if isinstance(word, Word) and size > room:
                raise BadInput(
                    f"embedding {word.name!r} has {size} vectors; a chunk of text has {room} places"
                )
            if [word] == comma:
                last_comma = len(chunk.ids)  # forgotten at once if the chunk is full, as in the original
            elif len(chunk.ids) == room and last_comma >= 0 and room - last_comma <= BACKTRACK:
                finish(*chunk.split(last_comma + 1))
            if len(chunk.ids) + size > room:
                finish(chunk, _Chunk())
            chunk.put(word, segment.weight, filler)
    return [*done, chunk] if chunk.ids or not done else done
