"""CLIP's tokenizer: the published vocabulary, equality with transformers, small vocabularies of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.nets.tokens import ClipTokens

CORPUS = [
    "",
    " ",
    "a photo of a cat",
    "A Photo Of A CAT",
    "여우, 눈 속의 빨간 여우 그림",
    "한글과 English를 섞은 3d 그림!!",
    "🦊🔥 emoji 👩‍👩‍👧‍👦 flags 🇰🇷",
    "  odd \t\n white\u00a0space\u3000here\r\n ",
    "don't we'll I'm they've she'd it's you're 'tis ''s",
    "12345 3.14 2nd x2 ½ ² Ⅳ ٣",
    "(masterpiece:1.2), [best] {quality} <lora:x:0.5> a_b-c--d...",
    "naïve café e\u0301 Ångström İstanbul ẞ ß ﬁ",
    "日本語 русский עברית العربية ไทย हिन्दी",
    "\u200b\ufeff\x00\x07\u0301 \ud7ff\U0010ffff",
    "supercalifragilisticexpialidocious pneumonoultramicroscopic",
    "before <|endoftext|> after<|startoftext|>x <|ENDOFTEXT|> <| endoftext |> </w>",
]
TEXTS = [
    "a red fox in the snow, it's cold",
    "빨간 여우와 눈, 수묵화",
    "a blue fox in the rain",
    "파란 여우와 비",
] * 10


@pytest.fixture(scope="module")
def openai() -> ClipTokens:
    return ClipTokens.openai()


@pytest.fixture(scope="module")
def small() -> ClipTokens:
    return ClipTokens.train(TEXTS, 560, 32)


def write_files(tokens: ClipTokens, folder: Path) -> tuple[Path, Path]:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps(tokens.vocabulary, ensure_ascii=False), encoding="utf-8")
    rules = "\n".join(f"{left} {right}" for left, right in tokens.merges)
    merges.write_text(f"#version: 0.2\n{rules}\n", encoding="utf-8")
    return vocabulary, merges


def transformers_twin(tokens: ClipTokens, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    vocabulary, merges = write_files(tokens, folder)
    assert vocabulary.parent == merges.parent == folder
    twin = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(twin) == tokens.size  # some versions ignore misnamed files in silence
    return twin


@pytest.fixture(scope="module")
def openai_twin(openai: ClipTokens, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers_twin(openai, tmp_path_factory.mktemp("openai"))


@pytest.fixture(scope="module")
def small_twin(small: ClipTokens, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers_twin(small, tmp_path_factory.mktemp("small"))


def theirs(twin: Any, text: str) -> list[int]:
    return list(twin(text, add_special_tokens=False)["input_ids"])


def test_the_published_vocabulary(openai: ClipTokens) -> None:
    assert (openai.size, openai.bos, openai.eos, openai.pad, openai.length) == (
        49408,
        49406,
        49407,
        49407,
        77,
    )
    assert len(openai.vocabulary) == 49408 and len(openai.merges) == 48894
    # ids known from the published vocab.json
    assert openai.vocabulary["!"] == 0 and openai.vocabulary["a</w>"] == 320
    assert openai.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert ClipTokens.openai(pad=0).pad == 0


@pytest.mark.parametrize("text", CORPUS)
def test_corpus_equals_transformers(openai: ClipTokens, openai_twin: Any, text: str) -> None:
    assert openai.encode(text) == theirs(openai_twin, text)


@pytest.mark.parametrize("text", CORPUS)
def test_corpus_equals_transformers_on_a_small_vocabulary(
    small: ClipTokens, small_twin: Any, text: str
) -> None:
    assert small.encode(text) == theirs(small_twin, text)


LETTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from("abcxyzABC 's't're'll  \t\n0123!?.,-()[]:'\"여우눈각힣ㄱ🦊🇰\u0301\u200d"),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(LETTERS, max_size=40))
def test_any_text_equals_transformers(openai: ClipTokens, openai_twin: Any, text: str) -> None:
    assert openai.encode(text) == theirs(openai_twin, text)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(LETTERS, max_size=40))
def test_any_text_equals_transformers_on_a_small_vocabulary(
    small: ClipTokens, small_twin: Any, text: str
) -> None:
    assert small.encode(text) == theirs(small_twin, text)


@pytest.mark.parametrize("text", CORPUS)
def test_decoding_equals_transformers(openai: ClipTokens, openai_twin: Any, text: str) -> None:
    ids = openai.encode(text)
    assert openai.decode(ids) == openai_twin.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_decoding_gives_the_words_back(openai: ClipTokens, small: ClipTokens) -> None:
    for tokens in (openai, small):
        row = [tokens.bos, *tokens.encode("빨간 여우, A FOX 🦊 12"), tokens.eos]
        assert tokens.decode(row) == "빨간 여우 , a fox 🦊 1 2"
    with pytest.raises(BadInput, match="49408"):
        openai.decode([49408])


def test_rows(openai: ClipTokens) -> None:
    ids = openai.encode("a cat")
    assert openai.row(ids) == [49406, 320, 2368] + [49407] * 74
    assert ClipTokens.openai(pad=0).row(ids) == [49406, 320, 2368, 49407] + [0] * 73
    assert len(openai.row([320] * 75)) == 77
    with pytest.raises(BadInput, match="76 tokens"):
        openai.row([320] * 76)


def test_files_give_the_same_tokens(small: ClipTokens, tmp_path: Path) -> None:
    again = ClipTokens.from_files(*write_files(small, tmp_path), pad=0, length=20)
    assert again.vocabulary == small.vocabulary and again.merges == small.merges
    assert (again.pad, again.length) == (0, 20)
    assert [again.encode(text) for text in CORPUS] == [small.encode(text) for text in CORPUS]


def test_json_gives_the_same_tokens(small: ClipTokens) -> None:
    text = small.to_json()
    assert text.isascii()
    again = ClipTokens.from_json(text)
    assert again.to_json() == text
    assert (again.bos, again.eos, again.pad, again.length) == (558, 559, 559, 32)
    assert [again.encode(text) for text in CORPUS] == [small.encode(text) for text in CORPUS]


def test_training(small: ClipTokens) -> None:
    assert small.size == 560 and sorted(small.vocabulary.values()) == list(range(560))
    assert len(small.encode("fox")) == 1 and len(small.encode("여우와")) == 1
    assert len(small.encode("zebra")) == 5  # unseen text costs its bytes, never an unknown
    assert small.to_json() == ClipTokens.train(TEXTS, 560, 32).to_json()
    bare = ClipTokens.train(TEXTS, 514, 8)
    assert bare.merges == [] and bare.decode(bare.encode("여우 fox")) == "여우 fox"
    with pytest.raises(BadInput, match="514"):
        ClipTokens.train(TEXTS, 513, 8)
    with pytest.raises(BadInput, match="give more text"):
        ClipTokens.train(["a"], 600, 8)


def test_larger_vocabularies_extend_smaller_ones(small: ClipTokens) -> None:
    assert ClipTokens.train(TEXTS, 540, 32).merges == small.merges[: 540 - 514]


def test_bad_files_are_refused(small: ClipTokens, tmp_path: Path) -> None:
    vocabulary, merges = write_files(small, tmp_path)
    with pytest.raises(MissingFile, match=r"nothing\.json"):
        ClipTokens.from_files(tmp_path / "nothing.json", merges)
    merges.write_text("#version: 0.2\na b c\n")
    with pytest.raises(BadFile, match="a b c"):
        ClipTokens.from_files(vocabulary, merges)
    with pytest.raises(BadFile, match="not JSON"):
        ClipTokens.from_json("{")
    good = json.loads(small.to_json())
    for change, words in [
        ({"pad": "x"}, "integers"),
        ({"extra": 1}, "extra"),
        ({"vocabulary": {"a": -1}}, "-1"),
        ({"vocabulary": {"a": 0}}, "startoftext"),
        ({"vocabulary": [1]}, "list"),
        ({"vocabulary": good["vocabulary"] | {"twin": 3}}, "two tokens"),
        ({"merges": ["fo x"]}, "fo"),
        ({"merges": [["f", "o"]]}, "strings"),
    ]:
        with pytest.raises(BadFile, match=words):
            ClipTokens.from_json(json.dumps(good | change))
    with pytest.raises(BadInput, match="pad id 560"):
        ClipTokens(small.vocabulary, small.merges, pad=560)
    with pytest.raises(BadInput, match="length 2"):
        ClipTokens.openai(length=2)


def test_importing_needs_no_torch() -> None:
    code = "import sys, sumuk.nets.tokens; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
