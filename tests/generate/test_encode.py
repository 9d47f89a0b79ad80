"""Prompts through towers: chunks, commas, BREAK, emphasis against numpy, sharing over steps, equal lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.families.reading import Encoded
from sumuk.generate.encode import contexts, empty_context, lengthen
from sumuk.generate.prompt import parse
from sumuk.nets.clip import ClipShape, ClipText
from sumuk.nets.tokens import ClipTokens

COMMA, WORD = 267, 320  # ",</w>" and "a</w>" of the published vocabulary


@cache
def vocabulary(length: int = 77, pad: int | None = None) -> ClipTokens:
    return ClipTokens.openai(length=length, pad=pad)


@dataclass
class Echo:
    """A tower whose encoding is readable: channel 0 is the token, channel 1 its place, channel 2 a constant."""

    tokens: ClipTokens = field(default_factory=vocabulary)
    calls: list[list[list[int]]] = field(default_factory=list)

    chunked = True

    def encode(self, ids: Tensor) -> Encoded:
        self.calls.append(ids.tolist())
        place = torch.arange(ids.shape[1]).expand_as(ids)
        return Encoded(z=torch.stack([ids, place, torch.full_like(ids, -7)], dim=-1).float())


@dataclass
class Clip:
    """A real tower of random weights, its last layer normed as in SD1."""

    tokens: ClipTokens
    network: ClipText
    chunked = True

    def encode(self, ids: Tensor) -> Encoded:
        with torch.inference_mode():
            return Encoded(z=self.network(ids).skip(1))


@cache
def clip() -> Clip:
    torch.manual_seed(0)
    texts = ["a red fox, a blue hill, ink wash on paper", "수묵 여우 그림", "paper, fox"] * 20
    tokens = ClipTokens.train(texts, size=530, length=32)
    network = ClipText(ClipShape(vocabulary=tokens.size, length=32, width=64, depth=2, hidden=96))
    with torch.no_grad():  # a norm as it starts leaves a mean of 0, which cannot be restored
        network.text_model.final_layer_norm.bias += 0.3
    return Clip(tokens, network.eval())


def rows(prompt: str, tokens: ClipTokens | None = None) -> list[list[int]]:
    """What the tower is given for a prompt: ids of each chunk, begin and end with what follows it cut off."""
    tower = Echo(tokens or vocabulary())
    contexts(parse(prompt), tower, 1)
    (given,) = tower.calls
    for row in given:
        assert len(row) == tower.tokens.length
        assert row[0] == tower.tokens.bos
        end = row.index(tower.tokens.eos)
        assert set(row[end + 1 :]) <= {tower.tokens.pad}
    return [row[1 : row.index(tower.tokens.eos)] for row in given]


def one(prompt: str, tower: Echo | Clip, emphasis: str = "original") -> Tensor:
    ((context, weight),) = contexts(parse(prompt), tower, 1, emphasis)[0]
    assert weight == 1.0
    return context.z


def test_an_empty_prompt_is_one_chunk():
    assert rows("") == [[]]
    assert rows("()") == [[]]
    assert empty_context(Echo()).shape == (1, 77, 3)
    assert torch.equal(empty_context(clip()), clip().encode(torch.tensor([clip().tokens.row([])])).z)


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("a " * 150, [75, 75]),
        ("BREAK", [0]),
        ("BREAK a", [0, 1]),
        ("a BREAK", [1]),
        ("a BREAK BREAK a", [1, 0, 1]),
        ("a " * 75 + "BREAK a", [75, 1]),
        ("(a " * 3 + "BREAK a", [3, 1]),
    ],
)
def test_chunks_and_breaks(prompt, sizes):
    assert [len(row) for row in rows(prompt)] == sizes


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        # a comma at place p (from 0) of a full chunk moves what follows it if 75 - p <= 20
        (55, 19 + 1, [56, 20]),
        (54, 20 + 1, [75, 1]),
        (74, 1, [75, 1]),
        (70, 4 + 30, [71, 34]),
        (75, 3, [75, 4]),
    ],
)
def test_a_nearby_comma_keeps_phrases_whole(before, after, sizes):
    found = rows("a " * before + ", " + "a " * after)
    assert [len(row) for row in found] == sizes
    assert [token for row in found for token in row] == [WORD] * before + [COMMA] + [WORD] * after


def test_the_last_comma_counts_and_only_in_its_own_chunk():
    assert [len(row) for row in rows("a, " * 100)] == [75, 75, 50]
    assert [len(row) for row in rows("a, " * 30 + "a " * 90)] == [60, 75, 15]


def test_moved_words_keep_their_weight():
    tower = Echo()
    context = one("a " * 60 + ", (" + "a " * 20 + ":3)", tower, "no-norm")
    assert [len(row) for row in rows("a " * 60 + ", (" + "a " * 20 + ":3)")] == [61, 20]
    weights = (context[0, :, 2] / -7).tolist()
    assert weights == [1.0] * 77 + [1.0] + [3.0] * 20 + [1.0] * 56


def test_chunks_are_as_long_as_the_tower_reads():
    tokens = vocabulary(32, 0)
    found = rows("a " * 31, tokens)
    assert [len(row) for row in found] == [30, 1]
    assert one("a " * 31, Echo(tokens)).shape == (1, 64, 3)
    with pytest.raises(BadInput, match="more than 64 chunks of 30 tokens"):
        rows("a " * (64 * 30 + 1), tokens)
    assert len(rows("a " * 64 * 30, tokens)) == 64


def reference(prompt: list[tuple[str, float]], tower: Clip, restore: bool) -> np.ndarray:
    """One chunk of weighted words the slow way, in double."""
    tokens = tower.tokens
    ids, weights = [tokens.bos], [1.0]
    for text, weight in prompt:
        for token in tokens.encode(text):
            ids.append(token)
            weights.append(weight)
    missing = tokens.length - len(ids)
    z = tower.encode(torch.tensor([ids + [tokens.eos] * missing])).z[0].double().numpy()
    weighted = z * np.array(weights + [1.0] * missing)[:, None]
    return weighted * (z.mean() / weighted.mean()) if restore else weighted


@pytest.mark.parametrize(("emphasis", "restore"), [("original", True), ("no-norm", False)])
def test_emphasis_on_a_real_tower(emphasis, restore):
    context = one("a (red:1.3) fox, [ink] wash", clip(), emphasis)
    expected = reference(
        [("a ", 1.0), ("red", 1.3), (" fox, ", 1.0), ("ink", 1 / 1.1), (" wash", 1.0)], clip(), restore
    )
    assert np.allclose(context[0].double().numpy(), expected, rtol=1e-5, atol=1e-6)
    plain = one("a red fox, ink wash", clip())
    assert float((context - plain).abs().max()) > 0.1
    if restore:
        assert float(context.mean()) == pytest.approx(float(plain.mean()), rel=1e-4)
    assert torch.equal(one("a (red:1.3) fox, [ink] wash", clip(), "none"), plain)


def test_a_mean_of_rounding_errors_is_not_restored():
    tower = Clip(clip().tokens, ClipText(clip().network.shape).eval())  # its last norm subtracts the mean
    plain = one("a red fox", tower)
    assert 0 < abs(float(plain.double().mean())) < 1e-6
    assert torch.equal(one("a (red:1.5) fox", tower), one("a (red:1.5) fox", tower, "no-norm"))


def test_chunks_without_weights_keep_their_bits():
    apart = torch.cat([one("a fox", clip()), one("(ink:1.5)", clip())], dim=1)
    assert torch.equal(one("a fox BREAK (ink:1.5)", clip()), apart)


def test_weights_that_leave_no_number_are_refused():
    @dataclass
    class Cancelling(Echo):
        def encode(self, ids: Tensor) -> Encoded:
            z = torch.ones(*ids.shape, 1)
            z[ids == WORD] = 76.0
            return Encoded(z=z)

    with pytest.raises(BadInput, match="leave no finite text encoding"):
        one("(a:-1)", Cancelling())


def test_steps_that_read_the_same_share_one_encoding():
    tower = Echo()
    found = contexts(parse("[fox|hill] :0.5 AND paper [ink:wash:0.5]"), tower, 6)
    assert len(found) == 6
    assert len(tower.calls) == 4
    assert [[weight for _, weight in step] for step in found] == [[0.5, 1.0]] * 6
    fox, hill, ink, wash = (one(text, Echo()) for text in ("fox", "hill", "paper ink", "paper wash"))
    expected = [(fox, ink), (hill, ink), (fox, ink), (hill, wash), (fox, wash), (hill, wash)]
    for step, texts in zip(found, expected, strict=True):
        assert all(torch.equal(said.z, text) for (said, _), text in zip(step, texts, strict=True))
    assert found[0][0][0] is found[4][0][0]
    assert found[0][1][0] is found[2][1][0]


def test_a_second_pass_goes_on_with_the_schedule():
    prompt = parse("[fox:hill:1.5] AND [ink:wash:10]")
    first, second = contexts(prompt, Echo(), 8), contexts(prompt, Echo(), 4, base=8)
    fox, hill, ink, wash = (one(text, Echo()) for text in ("fox", "hill", "ink", "wash"))
    assert all(torch.equal(a.z, fox) and torch.equal(b.z, ink) for (a, _), (b, _) in first)
    for step, (a, b) in zip(second, [(fox, ink), (fox, ink), (hill, wash), (hill, wash)], strict=True):
        assert torch.equal(step[0][0].z, a)
        assert torch.equal(step[1][0].z, b)


def test_contexts_are_made_equally_long():
    tower = clip()
    empty = empty_context(tower)
    long, short = one("a BREAK b BREAK c", tower), one("fox", tower)
    assert lengthen(long, 96, empty) is long
    assert torch.equal(lengthen(short, 96, empty), torch.cat([short, empty, empty], dim=1))
    more = lengthen(short.half().expand(2, -1, -1), 96, empty)
    assert more.dtype == torch.float16
    assert more.shape == (2, 96, 64)
    with pytest.raises(BadInput, match="a context of 31 tokens is not made of chunks of 32"):
        lengthen(short[:, 1:], 96, empty)


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(BadInput, match=r"unknown emphasis 'originals'; did you mean 'original'\?"):
        contexts(parse("a"), Echo(), 1, "originals")
    with pytest.raises(BadInput, match="steps must be at least 1, got 0"):
        contexts(parse("a"), Echo(), 0)
    many = " ".join(f"[{'|'.join(ascii_lowercase[:size])}]" for size in (3, 11, 13, 16))
    with pytest.raises(BadInput, match="more than 1024 different ways"):
        contexts(parse(many), Echo(vocabulary(32)), 2000)
