"""Embeddings in prompts: names, places in chunks against A1111's walk, each tower its own, parity with diffusers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.zoo import tiny as animal
from tests.generate.conftest import gap, one, refusal
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.families.reading import Encoded
from sumuk.generate.encode import Placed, contexts
from sumuk.generate.learnt import Learnt, Word, used
from sumuk.generate.prompt import BREAK, parse
from sumuk.generate.request import Request
from sumuk.generate.settings import resolve
from sumuk.generate.text import Texts, Tower
from sumuk.nets.tokens import ClipTokens
from sumuk.weights.embedding import Embedding, read_embedding, write_embedding
from sumuk.weights.model import Model


@cache
def vocabulary() -> ClipTokens:
    return ClipTokens.openai()


def embedding(name: str, count: int = 2, width: int = 4, seed: int = 0, part: str = "text") -> Embedding:
    generator = torch.Generator().manual_seed(seed)
    return Embedding(name, {part: torch.randn(count, width, generator=generator)})


def known(*names: str | tuple[str, int]) -> dict[str, Embedding]:
    pairs = [(each, 2) if isinstance(each, str) else each for each in names]
    return {name: embedding(name, count) for name, count in pairs}


def read(text: str, *names: str | tuple[str, int]) -> list[str]:
    """What a tower reads, embeddings in angles."""
    words = Learnt(known(*names), "text", vocabulary()).words(text)
    found: list[str] = []
    for is_word, run in groupby(words, lambda each: isinstance(each, Word)):
        some = list(run)
        found += [f"<{each.name}>" for each in some] if is_word else [vocabulary().decode(some)]
    return found


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("a foxling here", ["foxling"], "a <foxling> here"),
        ("a FoxLing, here", ["foxling"], "a <foxling> , here"),
        ("foxlings", ["fox"], "fox lings"),
        ("bad-hands-5, bad", ["bad", "bad-hands-5"], "<bad-hands-5> , <bad>"),
        ("bad-hands-4", ["bad", "bad-hands-5"], "<bad> - hands - 4"),
        ("easy negative", ["easy", "easy negative"], "<easy negative>"),
        ("embedding:foxling", ["foxling"], "<foxling>"),
        ("x embedding:FOXLING, y", ["foxling"], "x <foxling> , y"),
        ("embedding:foxling.pt embedding:foxling.safetensors.", ["foxling"], "<foxling> <foxling> ."),
        ("embedding:v1.5 neg more", ["v1.5", "v1.5 neg"], "<v1.5 neg> more"),
        ("(embedding:a b)", ["a b"], "( <a b> )"),
        ("embedding:a-b embedding:a", ["a", "a-b"], "<a-b> <a>"),
        ("embedding:embedding:x embedding:x", ["embedding:x", "x"], "<embedding:x> <x>"),
        ("word embeddings: a embedding", ["a"], "word embe dd ings : <a> embe dd ing"),
        ("수묵화 여우", ["수묵화"], "<수묵화> 여우"),
    ],
)
def test_names(text, names, expected):
    assert "".join(" ".join(read(text, *names)).split()) == "".join(expected.split())


def test_names_that_are_not_there_are_refused():
    assert "an embedding 'foxlin' that is not there; did you mean 'foxling'?" in refusal(
        lambda: read("a embedding:foxlin, b", "foxling", "hill")
    )
    assert "'foxling-2' that is not there; did you mean 'foxling'?" in refusal(
        lambda: read("embedding:foxling-2", "foxling")
    )
    assert "'x' that is not there; the model was loaded without any" in refusal(lambda: read("(embedding:x)"))
    assert "'Fox' and 'fox', which read the same" in refusal(lambda: read("a fox", "Fox", "fox"))
    assert "'Fox' and 'fox', which read the same" in refusal(lambda: read("embedding:FOX", "Fox", "fox"))
    assert read("embedding:Fox embedding:fox", "Fox", "fox") == ["<Fox>", "<fox>"]


# -- chunks ----------------------------------------------------------------------------------------------------------


@dataclass
class Echo:
    """A tower that keeps what it is given; channel 0 of its encoding is 1, so that weights show."""

    tokens: ClipTokens = field(default_factory=vocabulary)
    rows: list[list[Any]] = field(default_factory=list)
    chunked = True

    def encode(self, ids: Tensor, placed: Sequence[Placed] = ()) -> Encoded:
        self.rows = ids.tolist()
        for each in placed:
            for turn, vector in enumerate(each.vectors):
                assert self.rows[each.row][each.at + turn] not in (self.tokens.bos, self.tokens.eos)
                self.rows[each.row][each.at + turn] = tuple(vector.tolist())
        return Encoded(z=torch.ones(*ids.shape, 1))


def given(prompt: str, embeddings: dict[str, Embedding]) -> tuple[list[list[Any]], list[float]]:
    """The chunks that a tower gets, their ends cut off, and the weight of each place."""
    tower = Echo()
    learnt = Learnt(embeddings, "text", tower.tokens)
    (((said, _),),) = contexts(parse(prompt), tower, 1, "no-norm", learnt=learnt)
    chunks = [row[1 : row.index(tower.tokens.eos)] for row in tower.rows]
    weights = said.z.reshape(len(chunks), -1).tolist()
    return chunks, [each[1 : 1 + len(chunk)] for each, chunk in zip(weights, chunks, strict=True)]


def a1111(prompt: str, embeddings: dict[str, Embedding]) -> tuple[list[list[Any]], list[Any]]:
    """A1111's walk over tokens, its relocation of embeddings mended: they move with their places."""
    tokens = vocabulary()
    comma = tokens.encode(",")[0]
    names = sorted(((tokens.encode(name), name) for name in embeddings), key=lambda pair: -len(pair[0]))
    chunks: list[list[tuple[Any, float]]] = []
    chunk: list[tuple[Any, float]] = []
    last_comma = -1
    (part,) = parse(prompt).at(1, 1)
    for segment in part.segments:
        if segment is BREAK:
            chunks.append(chunk)
            chunk, last_comma = [], -1
            continue
        ids, position = tokens.encode(segment.text), 0
        while position < len(ids):
            if ids[position] == comma:
                last_comma = len(chunk)
            elif len(chunk) == 75 and last_comma != -1 and len(chunk) - last_comma <= 20:
                moved = chunk[last_comma + 1 :]
                chunks.append(chunk[: last_comma + 1])
                chunk, last_comma = moved, -1
            if len(chunk) == 75:
                chunks.append(chunk)
                chunk, last_comma = [], -1
            found = next(
                ((spelt, name) for spelt, name in names if ids[position : position + len(spelt)] == spelt),
                None,
            )
            if found is None:
                chunk.append((ids[position], segment.weight))
                position += 1
                continue
            vectors = embeddings[found[1]].vectors["text"]
            if len(chunk) + len(vectors) > 75:
                chunks.append(chunk)
                chunk, last_comma = [], -1
            chunk += [(tuple(vector.tolist()), segment.weight) for vector in vectors]
            position += len(found[0])
    if chunk or not chunks:
        chunks.append(chunk)
    return [[each for each, _ in row] for row in chunks], [[weight for _, weight in row] for row in chunks]


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [
        ("foxling", [8]),
        ("a " * 67 + "foxling", [75]),
        ("a " * 68 + "foxling", [68, 8]),
        ("a " * 68 + ", foxling b", [69, 9]),
        ("foxling " * 10, [72, 8]),
        ("a " * 60 + ", " + "a " * 6 + "foxling b", [61, 15]),
        ("a " * 75 + "foxling", [75, 8]),
        ("a BREAK foxling", [1, 8]),
    ],
)
def test_an_embedding_is_never_split(prompt, sizes):
    embeddings = known(("foxling", 8))
    chunks, _ = given(prompt, embeddings)
    assert [len(chunk) for chunk in chunks] == sizes
    vectors = [tuple(each.tolist()) for each in embeddings["foxling"].vectors["text"]]
    places = [chunk.index(vectors[0]) for chunk in chunks if vectors[0] in chunk]
    holding = [chunk for chunk in chunks if vectors[0] in chunk]
    assert holding and all(chunk[at : at + 8] == vectors for chunk, at in zip(holding, places, strict=True))
    assert (chunks, given(prompt, embeddings)[1]) == a1111(prompt, embeddings)


def test_chunks_are_a1111s_whatever_stands_in_the_prompt():
    embeddings = known(("foxling", 8), ("bad-hands-5", 3), ("whole", 75), ("bad", 1))
    pieces = [
        "a",
        "ink",
        ",",
        "foxling",
        "(foxling:1.3)",
        "bad-hands-5",
        "bad",
        "BREAK",
        "[ink, wash]",
        "whole",
        ", ",
    ]
    draw = random.Random(5)
    several = 0
    for _ in range(120):
        prompt = " ".join(draw.choices(pieces, [30, 20, 8, 4, 2, 3, 3, 1, 2, 0.3, 3], k=draw.randrange(120)))
        found, expected = given(prompt, embeddings), a1111(prompt, embeddings)
        assert found[0] == expected[0], prompt
        assert found[1] == [pytest.approx(row) for row in expected[1]]
        several += len(found[0]) > 1
    assert several > 30


def test_weights_act_on_every_vector():
    chunks, weights = given("a (foxling:1.2) b", known(("foxling", 3)))
    assert weights == [[1.0, *[pytest.approx(1.2)] * 3, 1.0]]
    assert len(chunks[0]) == 5


def test_more_vectors_than_places_are_refused():
    assert len(given("foxling", known(("foxling", 75)))[0][0]) == 75
    with pytest.raises(BadInput, match="embedding 'foxling' has 76 vectors; a chunk of text has 75 places"):
        given("foxling", known(("foxling", 76)))


# -- towers ----------------------------------------------------------------------------------------------------------


def tower_of(model: Model, turn: int = 0) -> Tower:
    reading = model.readings[turn]
    return Tower(model.networks[reading.part], model.words[reading.part], reading)


def encoded(model: Model, prompt: str, turn: int = 0, **embeddings: Embedding) -> Tensor:
    tower = tower_of(model, turn)
    learnt = Learnt(embeddings, tower.reading.part, tower.tokens)
    with torch.inference_mode():
        return contexts(parse(prompt), tower, 1, learnt=learnt)[0][0][0].z


def rows_of(model: Model, text: str, turn: int = 0) -> Tensor:
    """The tower's own rows of a text."""
    tower = tower_of(model, turn)
    with torch.inference_mode():
        return tower.network.embed(torch.tensor(tower.tokens.encode(text))).clone()


@pytest.mark.parametrize(
    ("key", "turn"),
    [
        ("sd1/text-to-image", 0),
        ("sd2/text-to-image", 0),
        ("sdxl/base", 1),
        ("sd3/medium", 2),
        ("cascade/stage-c", 0),
    ],
)
def test_the_rows_of_a_word_are_the_word(key, turn):
    """Direct arithmetic: an embedding of a text's own rows must encode as the text does, bit for bit."""
    model = animal(key)
    part = model.readings[turn].part
    rows = rows_of(model, "the fox", turn)
    same = Embedding("foxling", {part: rows})
    other = Embedding("foxling", {part: rows.roll(1, 1)})
    plain = encoded(model, "a the fox sea", turn)
    bare = "a FOXLING sea" if model.readings[turn].words == "clip" else "a foxling sea"  # T5 knows capitals
    for prompt in ("a embedding:FOXLING sea", "a (foxling:1.0) sea", bare):
        assert torch.equal(encoded(model, prompt, turn, foxling=same), plain)
    assert float((encoded(model, "a foxling sea", turn, foxling=other) - plain).abs().max()) > 1e-2
    weighted = encoded(model, "a (the fox:1.3) sea", turn)
    assert torch.equal(encoded(model, "a (foxling:1.3) sea", turn, foxling=same), weighted)


def test_plain_prompts_keep_their_bits():
    model = animal("sd1/text-to-image")
    foxling = embedding("foxling", width=64)
    tower = tower_of(model)
    with torch.inference_mode():
        for prompt in ("", "a fox", "a (fox:1.2) BREAK the sea, " * 4):
            plain = contexts(parse(prompt), tower, 1)[0][0][0].z
            assert torch.equal(encoded(model, prompt), plain)
            assert torch.equal(encoded(model, prompt, foxling=foxling), plain)


def pair(model: Model, name: str = "foxling", **rows: Tensor) -> Model:
    return replace(model, embeddings={name: Embedding(name, rows)})


def test_each_tower_takes_its_own_vectors():
    model = animal("sdxl/base")
    first, second = rows_of(model, "the fox"), rows_of(model, "in", 1)
    both = pair(model, text=first, text_2=second)
    settings = resolve(Request(prompt="in foxling", steps=2, seed=1, negative="embedding:foxling"), both)
    with torch.inference_mode():
        ((said, _),), away = Texts(both, settings, 2).at(0)
    assert torch.equal(said["text"].z, encoded(model, "in the fox"))
    assert torch.equal(said["text_2"].z, encoded(model, "in in", 1))
    assert torch.equal(away["text"].z, encoded(model, "the fox"))
    assert torch.equal(away["text_2"].z, encoded(model, "in", 1))


def test_a_tower_without_vectors_reads_the_name_or_nothing():
    model = animal("flux/dev")
    only = Embedding("fox", {"text": rows_of(model, "sea")})
    assert torch.equal(encoded(model, "a fox", 0, fox=only), encoded(model, "a sea"))
    assert torch.equal(encoded(model, "a fox", 1, fox=only), encoded(model, "a fox", 1))
    assert torch.equal(encoded(model, "a embedding:fox", 1, fox=only), encoded(model, "a", 1))
    with pytest.raises(BadInput, match="'foc' that is not there"):
        encoded(model, "embedding:foc", 1, fox=only)


def test_an_embedding_of_another_width_is_refused():
    with pytest.raises(BadInput, match="an embedding 32 wide; this text tower is 64 wide"):
        encoded(animal("sd1/text-to-image"), "foxling", foxling=embedding("foxling", width=32))


def test_pictures_follow_embeddings(model: Model, tmp_path: Path):
    """Through the engine: an embedding that is the rows of words draws what the words draw."""

    def with_foxling(vectors: Tensor) -> Model:
        path = tmp_path / "foxling.safetensors"
        write_embedding(Embedding("foxling", {"text": vectors}), path, model.family)
        return replace(model, embeddings={"foxling": read_embedding(path, model.family, {"text": 64})})

    fox = with_foxling(rows_of(model, "the fox"))
    plain = one(model, prompt="the fox in snow", negative="the fox")
    assert gap(one(fox, prompt="foxling in snow", negative="embedding:foxling"), plain) == 0
    other = with_foxling(embedding("foxling", width=64).vectors["text"])
    assert gap(one(other, prompt="foxling in snow", negative="the fox"), plain) > 2
    assert "that is not there" in refusal(lambda: one(model, prompt="embedding:foxling"))


def test_what_was_used_is_told():
    embeddings = known("foxling", "hill", "bad-hands-5", "sea")
    words = {"text": vocabulary()}

    def told(prompt: str, steps: int = 4) -> tuple[str, ...]:
        return used(parse(prompt), embeddings, words, steps)

    assert told("a fox") == ()
    assert told("(bad-hands-5:1.2) AND embedding:FOXLING") == ("bad-hands-5", "foxling")
    assert told("[hill:foxling:2] [|sea]") == ("hill", "sea", "foxling")
    assert told("[hill:foxling:2]", 2) == ("hill",)
    assert told("[hill:[foxling:sea:0.9]:20] x", 40) == ("hill", "foxling", "sea")
    assert told("[hill:foxling:20]", 10) == ("hill",), "what no step reads is not told"
    assert used(parse("[hill:foxling:20]"), embeddings, words, 20, base=10) == ("hill", "foxling")
    assert used(parse("foxling"), {}, words, 4) == ()
    t5_too = {"text": vocabulary(), "text_2": animal("flux/dev").words["text_2"]}
    assert used(parse("a foxling"), embeddings, t5_too, 4) == ("foxling",)


def test_parity_with_diffusers(tmp_path: Path):
    pipelines = pytest.importorskip("tests.parity.pipelines")
    import sumuk

    pipe = pipelines.diffusers.StableDiffusionPipeline(
        vae=pipelines.vae(),
        text_encoder=pipelines.clip_l(),
        tokenizer=pipelines.clip_words.__wrapped__(),
        unet=pipelines.unet((True, False), 8),
        scheduler=pipelines.ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipelines.saved(pipe, tmp_path / "model")
    model = sumuk.load(tmp_path / "model")
    many = embedding("foxling", 3, pipelines.TEXT, 1)
    one_row = embedding("seaweed", 1, pipelines.TEXT, 2)
    for each, layout in ((many, "a1111"), (one_row, "diffusers")):
        write_embedding(each, tmp_path / f"{each.name}.safetensors", model.family, layout)
        pipe.load_textual_inversion(str(tmp_path), weight_name=f"{each.name}.safetensors", token=each.name)
    widths = {"text": pipelines.TEXT}
    read_back = [
        read_embedding(tmp_path / f"{each.name}.safetensors", model.family, widths)
        for each in (many, one_row)
    ]
    model = replace(model, embeddings={each.name: each for each in read_back})
    wanted, negative = "a foxling in the snow, seaweed", "the sea, seaweed"
    theirs = pipelines.asked(
        pipe,
        prompt=wanted,
        negative_prompt=negative,
        latents=pipelines.beginning(pipe.scheduler, pipelines.unit()),
        width=pipelines.WIDTH,
        height=pipelines.HEIGHT,
    )
    usual = pipelines.GUIDED | pipelines.SIZED | {"solver": "ddim", "grid": "leading"}
    ours = pipelines.drawn(model, **(usual | {"prompt": wanted, "negative": negative})).latents[-1]
    assert pipelines.difference(ours, theirs) < 5e-6
    plain = pipelines.drawn(model, **(usual | {"prompt": wanted.replace("foxling", "fox")})).latents[-1]
    assert pipelines.difference(plain, theirs) > 1e-2
