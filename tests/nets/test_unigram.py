"""T5's tokenizer: equality with transformers and with sentencepiece's algorithm, rows, hostile files.

The sentencepiece package is an oracle where it is installed. Where not, :class:`Reference` is: its algorithm
written again from its description, slow and without the tokenizers library.
"""

from __future__ import annotations

import base64
import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.unigram import SPACE, T5Tokens

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "t5_spiece.model"
CORPUS = [
    "",
    " ",
    "\n\t ",
    "a photo of A CAT, 8k, highly-detailed; by Hokusai (1831)!",
    "여우, 눈 속의 빨간 여우 그림",
    "한글과 English를 섞은 3d 그림!!",
    "🦊🔥 emoji 👩‍👩‍👧‍👦 flags 🇰🇷 heart ❤️ key 1️⃣",
    "  odd \t\n white\u00a0space\u3000here\r\n \u2028line\u200bzero ",
    "first line\nsecond line\r\n\r\nthird",
    "don't we'll I'm they've \u201cquoted\u201d \u2014 dash\u2026 ``tick''",
    "12345 3.14 2nd x2 ½ ² Ⅳ ٣ ㎏ ﷺ",
    "ein großer Füchse-Schwarm, l'été où ça brûle, București țară",
    "naïve café e\u0301 A\u030angstro\u0308m İstanbul ẞ ß ﬁ ＦＵＬＬ ｗｉｄｔｈ ﾊﾟ",
    "日本語 русский עברית العربية ไทย हिन्दी",
    "\ufeff\x07\u00ad \ud7ff\U0010ffff",
    "under_score --flag a▁b ▁ <lora:x:0.5> {a|b} [c] (d:1.2)",
    "supercalifragilisticexpialidocious pneumonoultramicroscopic",
]
SPECIAL = ["end</s>middle", "<pad> <unk>", "a <extra_id_0> b<extra_id_99>", "<extra_id_100> </S>"]
DROPPED = ["a\x85b", "x\xb2\u0301"]  # by the tokenizers library, not by sentencepiece
SMALL = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0), (SPACE + "fox", -3.0), ("x", -4.0)]


class Reference:
    """sentencepiece: the longest match of the table, spaces collapsed and prefixed, the best path of pieces."""

    def __init__(self, tokens: T5Tokens) -> None:
        document = json.loads(tokens.to_json())
        vocabulary = document["model"]["vocab"]
        table = base64.b64decode(document["normalizer"]["precompiled_charsmap"])
        size = int.from_bytes(table[:4], "little")
        self.units = struct.unpack(f"<{size // 4}I", table[4 : 4 + size])
        self.texts = table[4 + size :]
        special = {token["content"] for token in document["added_tokens"]}
        known = ((text, (score, id_)) for id_, (text, score) in enumerate(vocabulary))
        self.scores = {text: found for text, found in known if text not in special}
        self.most = max(map(len, self.scores))
        self.unknown = min(score for score, _ in self.scores.values()) - 10

    def encode(self, text: str) -> list[int]:
        data, plain, at = text.encode(), b"", 0
        while at < len(data):
            size, found = self.match(data, at)
            plain, at = plain + found, at + size
        words = [word for word in plain.decode().split(" ") if word]
        return self.best("".join(SPACE + word for word in words))

    def match(self, data: bytes, at: int) -> tuple[int, bytes]:
        """How many bytes the longest entry of the table covers, and what replaces them; else one letter."""
        size = 1
        while at + size < len(data) and data[at + size] & 0xC0 == 0x80:
            size += 1
        best, place = (size, data[at : at + size]), self.below(0)
        for end in range(at, len(data)):
            child = place ^ data[end]
            if self.units[child] & 0x800000FF != data[end]:
                break
            place = self.below(child)
            if self.units[child] & 0x100:
                start = self.units[place] & 0x7FFFFFFF
                best = (end + 1 - at, self.texts[start : self.texts.index(b"\0", start)])
        return best

    def below(self, place: int) -> int:
        unit = self.units[place]
        return place ^ ((unit >> 10) << (8 if unit & 0x200 else 0))

    def best(self, text: str) -> list[int]:
        paths: list[tuple[float, int, int]] = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(text)
        for start in range(len(text)):
            before = paths[start][0]
            for end in range(start + 1, min(start + self.most, len(text)) + 1):
                usual = (self.unknown, 2) if end == start + 1 else None
                if (piece := self.scores.get(text[start:end], usual)) and before + piece[0] > paths[end][0]:
                    paths[end] = (before + piece[0], start, piece[1])
        ids: list[int] = []
        end = len(text)
        while end:
            _, end, id_ = paths[end]
            if not (id_ == 2 and ids[-1:] == [2]):
                ids.append(id_)
        return ids[::-1]


@pytest.fixture(scope="module")
def t5() -> T5Tokens:
    if not PUBLISHED.exists():
        pytest.skip("T5's spiece.model absent")
    return T5Tokens.from_sentencepiece(PUBLISHED.read_bytes(), 256)


@pytest.fixture(scope="module")
def reference(t5: T5Tokens) -> Reference:
    return Reference(t5)


def varint(value: int) -> bytes:
    low, value = value & 127, value >> 7
    return bytes([low | 128]) + varint(value) if value else bytes([low])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str | bytes, score: float = 0.0, kind: int | None = None) -> bytes:
    made = field(1, text if isinstance(text, bytes) else text.encode()) + field(2, score)
    return field(1, made if kind is None else made + field(3, kind))


HEAD = piece("<pad>", 0.0, 3) + piece("</s>", 0.0, 3) + piece("<unk>", 0.0, 2)
TINY = HEAD + b"".join(piece(text, score) for text, score in SMALL[3:])


def tiny(data: bytes = TINY, **given: Any) -> T5Tokens:
    return T5Tokens.from_sentencepiece(data, 8, **given)


def test_published_vocabulary(t5: T5Tokens) -> None:
    assert (t5.size, t5.length, t5.pad, t5.eos, t5.unknown) == (32100, 256, 0, 1, 2)
    assert t5.encode("a photo of a cat") == [3, 9, 1202, 13, 3, 9, 1712]
    assert t5.encode("<extra_id_0> <extra_id_99>") == [32099, 32000]
    assert t5.encode("여우 fox") == [3, 2, 3, 20400]  # it was trained on no Korean


@pytest.mark.parametrize("text", CORPUS)
def test_equals_sentencepiece_as_described(t5: T5Tokens, reference: Reference, text: str) -> None:
    assert t5.encode(text) == reference.encode(text)


def test_equals_the_sentencepiece_package(t5: T5Tokens) -> None:
    package = pytest.importorskip("sentencepiece")
    processor = package.SentencePieceProcessor(model_proto=PUBLISHED.read_bytes())
    assert [t5.encode(text) for text in CORPUS] == [processor.encode(text) for text in CORPUS]


@pytest.fixture(scope="module")
def fast(t5: T5Tokens, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' own T5 tokenizer, on the file that we write."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(t5.to_json(), encoding="utf-8")
    return transformers.T5TokenizerFast.from_pretrained(folder)


def test_equals_transformers(t5: T5Tokens, fast: Any) -> None:
    for text in CORPUS + SPECIAL + DROPPED:
        assert [*t5.encode(text), 1] == fast(text)["input_ids"], text
    padded = fast("a red fox", padding="max_length", max_length=256)
    row = t5.row(t5.encode("a red fox"))
    assert row == padded["input_ids"] and t5.mask(row) == [bool(one) for one in padded["attention_mask"]]


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(exclude_categories=("Cs", "M"), exclude_characters="\x85<"), max_size=60))
def test_any_text(t5: T5Tokens, reference: Reference, text: str) -> None:
    assert t5.encode(text) == reference.encode(text)


def test_very_long_text(t5: T5Tokens, reference: Reference) -> None:
    text = " ".join(random.Random(0).choices(CORPUS, k=300))
    ids = t5.encode(text)
    assert len(ids) > 4000 and ids == reference.encode(text)
    assert t5.encode("a" * 100_000 + "가" * 100_000)[-1] == 2
    assert t5.encode(" \n" * 50_000) == []
    with pytest.raises(BadInput, match=f"{len(ids)} tokens do not fit a row of 256"):
        t5.row(ids)


def test_json_gives_the_same_tokens(t5: T5Tokens) -> None:
    text = t5.to_json()
    again = T5Tokens.from_json(text, 512)
    assert again.to_json() == text and (again.size, again.length) == (32100, 512)
    assert [again.encode(text) for text in CORPUS + SPECIAL] == [t5.encode(text) for text in CORPUS + SPECIAL]


def test_reads_what_transformers_published(t5: T5Tokens) -> None:
    """As the converters of transformers 4 wrote it: one cut, other spaces, sentinels beside the vocabulary."""
    document = json.loads(t5.to_json())
    document["model"]["vocab"] = document["model"]["vocab"][:32000]
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            document["normalizer"],
            {"type": "Strip", "strip_left": False, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE},
        ],
    }
    document["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True}
    document |= {"truncation": {"max_length": 8}, "padding": {"strategy": {"Fixed": 8}}}
    again = T5Tokens.from_json(json.dumps(document), 256)
    assert [again.encode(text) for text in CORPUS + SPECIAL] == [t5.encode(text) for text in CORPUS + SPECIAL]


def test_rows() -> None:
    tokens = tiny()
    assert tokens.encode(" fox  x\nfox") == [4, 3, 5, 4] and tokens.size == 106
    assert tokens.row([4, 3, 5, 4]) == [4, 3, 5, 4, 1, 0, 0, 0]
    assert tokens.row([]) == [1, 0, 0, 0, 0, 0, 0, 0] and tokens.row([4] * 7) == [4] * 7 + [1]
    # padding that a text spells is read
    assert tokens.mask(tokens.row([4, 0, 5])) == [True] * 4 + [False] * 4
    assert tokens.mask([0, 0]) == [False, False]
    with pytest.raises(BadInput, match="8 tokens do not fit a row of 8"):
        tokens.row([4] * 8)
    with pytest.raises(BadInput, match="length 1 "):
        T5Tokens(SMALL, length=1)
    with pytest.raises(BadInput, match="character 3"):
        tokens.encode("fox\ud800")


def test_sentinels_and_unknown_letters() -> None:
    assert tiny(sentinels=0).size == 6 and tiny(sentinels=2).encode("<extra_id_0><extra_id_1>") == [7, 6]
    assert tiny(sentinels=0).encode("<extra_id_0>") == [3, 2, 5, 2]
    assert tiny().encode("여우") == [3, 2]  # neighbours are one
    assert tiny().encode("x여x우") == [3, 5, 2, 5, 2]


def test_fields_of_other_kinds_are_passed_by() -> None:
    beside = varint(200 << 3 | 1) + bytes(8) + field(4, b"self test") + field(2, field(1, b"/tmp/corpus"))
    assert tiny(TINY + beside).to_json() == tiny().to_json()


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "size", "0 pieces"),
        (TINY[:-3], "proto", "are left"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "proto", r"field 1 of 18446744073709551615 bytes"),  # size -1
        (b"\x0a" + b"\xff" * 30, "proto", "does not end"),
        (b"\x0a" + b"\xff" * 9 + b"\x02", "proto", "does not end"),  # 65 bits
        (b"\x0b\x0c", "proto", "wire type 3"),
        (b"\x00\x00", "proto", "number 0"),
        (b"GGUF\x03\0\0\0", "proto", "field|wire|end"),
        (field(1, 7), "proto", "field 1 has the wire type 0"),
        (TINY + field(2, b"") + field(2, b""), "proto", "2 times"),
        (TINY + piece(SPACE + "fox"), "twice", "fox' has two ids, the second 6"),
        (TINY + piece("nan", math.nan), "score", "'nan', has the score nan"),
        (TINY + field(1, field(1, b"a") + field(2, 3)), "proto", "piece 6: field 2 has the wire type 0"),
        (TINY + piece(b"\xff\xfe"), "piece", "no UTF-8"),
        (TINY + piece(""), "piece", "piece 6 is empty"),
        (TINY + piece("a" * 257), "piece", "too long"),
        (TINY + piece("<0x00>", 0.0, 6), "kind", "of the kind 6"),
        (TINY + piece("again", 0.0, 2), "kind", "of the kind 2"),
        (piece("<unk>", 0.0, 2) + TINY, "kind", "piece 0"),
        (piece("<s>", 0.0, 3) + TINY, "kind", "piece 2"),
        (TINY.replace(b"</s>", b"<xs>"), "special", "<xs>"),
        (TINY + field(2, field(3, 2)), "kind", "model_type is 2"),
        (TINY + field(2, field(40, 0)), "kind", "unk_id is 0"),
        (TINY + field(2, field(35, 1)), "kind", "byte_fallback"),
        (TINY + field(3, field(3, 0)), "kind", "add_dummy_prefix"),
    ],
)
def test_hostile_protobufs_are_refused(data: bytes, code: str, words: str) -> None:
    with pytest.raises(BadFile, match=words) as caught:
        tiny(data, sentinels=0 if code == "size" else 100)
    assert caught.value.code == f"unigram.{code}"


def test_every_shortened_file_is_refused_or_whole() -> None:
    for end in set(range(len(TINY))) - {len(HEAD + piece(SPACE)), len(TINY) - len(piece("x"))}:
        with pytest.raises(BadFile):
            tiny(TINY[:end], sentinels=0)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_is_more_than_bad_file(data: st.DataObject) -> None:
    damaged = bytearray(TINY + field(3, field(2, table({"x": "y"}))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        tokens = tiny(bytes(damaged))
    except BadFile:
        return
    assert max(tokens.encode("fox x 여 \x00\xff"), default=0) < tokens.size


def test_too_large_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sumuk.nets.unigram.MOST_BYTES", len(TINY) - 1)
    with pytest.raises(BadFile, match="too many"):
        tiny()
    with pytest.raises(BadFile, match="too many"):
        T5Tokens.from_json(" " * len(TINY), 8)


def table(pairs: dict[str, str]) -> bytes:
    """A table for single ASCII letters: the root's children begin at 256, each letter's own at 512, 768..."""
    units = [0] * 256 * (len(pairs) + 2)
    texts = b""
    units[0] = 256 << 10
    for index, (letter, text) in enumerate(pairs.items()):
        place = 256 ^ ord(letter)
        units[place] = (place ^ 256 * (index + 2)) << 10 | 0x100 | ord(letter)
        units[256 * (index + 2)] = 0x80000000 | len(texts)
        texts += text.encode() + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


def test_small_table() -> None:
    tokens = T5Tokens(SMALL, table=table({"y": "x", "Z": "fox"}), length=8)
    assert tokens.encode("y Z Zy") == [3, 5, 4, 4, 5]
    assert T5Tokens.from_json(tokens.to_json(), 8).to_json() == tokens.to_json()


def changed(at: int, unit: int) -> bytes:
    made = bytearray(table({"y": "한"}))
    made[4 + 4 * at : 8 + 4 * at] = struct.pack("<I", unit)
    return bytes(made)


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (b"\0\0\0", "trie of 0"),
        (struct.pack("<I", 0), "trie of 0"),
        (struct.pack("<I", 8) + bytes(4), "trie of 8"),
        (struct.pack("<I", 0xFFFFFFFC) + bytes(8), "trie of 4294967292"),
        (struct.pack("<II", 4, 0), "outside itself"),  # one unit where 256 are reached for
        (changed(0, 0xFFFFFFFF), "outside itself"),
        (changed(256 ^ ord("y"), 0x7FFFFFFF << 10 & 0x7FFFFC00 | 0x100 | ord("y")), "outside its texts"),
        (changed(256 ^ ord("y"), 0x3FFFFF << 10 & 0x7FFFFC00 | ord("y")), "outside itself"),
        (changed(512, 0x80000000 | 4), "outside its texts"),
        (changed(512, 0x80000000 | 1), "outside its texts"),  # within a letter
        (table({"y": "x"}) + b"\xff", "no UTF-8"),
        (table({"y": "x" * 257}), "257 bytes of one letter"),
        (bytes(2**20 + 1), "1048577 bytes"),
    ],
)
def test_hostile_tables_are_refused(hostile: bytes, words: str) -> None:
    with pytest.raises(BadFile, match=words) as caught:
        T5Tokens(SMALL, table=hostile, length=8)
    assert caught.value.code == "unigram.table"


def test_a_table_that_goes_round_ends() -> None:
    """A letter whose children are the root's: the walk does not go on for ever."""
    place = 256 ^ ord("y")
    tokens = T5Tokens(SMALL, table=changed(place, (place ^ 256) << 10 | ord("y")), length=8)
    assert tokens.encode("y" * 1000) == [3, 2]


def token(**parts: Any) -> list[dict[str, Any]]:
    return [{"id": 3, "content": SPACE} | parts]


def cuts(**parts: Any) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE} | parts


NEST = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", None, "model is a NoneType"),
        ("model.type", NEST, "type is a list"),
        ("model.byte_fallback", True, "byte_fallback is True"),
        ("model.unk_id", 0, "unk_id is 0"),
        ("model.vocab", {}, "its vocab is no list"),
        ("model.vocab", [], "3 pieces"),
        ("model.vocab", [["a", "b"]], "score 'b'"),
        ("model.vocab", [*SMALL, ["a", math.nan]], "score nan"),
        ("model.vocab", [["a", 10**400]], "score 1000"),
        ("model.vocab", [*SMALL, ["\ud800", 0]], "no text"),
        ("model.vocab", [NEST], "a list that is no piece"),
        ("model.vocab", [*SMALL, ["x", -1.0]], "two ids"),
        ("added_tokens", token(id=NEST), "has the id a list"),
        ("added_tokens", token(id=7), "has the id 7"),
        ("added_tokens", token(id=2), "'<unk>' and"),
        ("added_tokens", token(id=6, content="x"), "two ids"),
        ("added_tokens", token(id=6, content=""), "empty"),
        ("added_tokens", token(normalized=True), "otherwise"),
        ("added_tokens", token(single_word=True), "otherwise"),
        ("added_tokens", [3], "added token is a int"),
        ("normalizer", {"type": "Lowercase"}, "normaliser 'Lowercase'"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}, "'Replace'"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "%"}, "base64"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": 3}, "no text"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "trie of 0"),
        ("normalizer", NEST, "step of the vocabulary is a list"),
        ("pre_tokenizer", None, "do not begin"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "'ByteLevel'"),
        ("pre_tokenizer", cuts(replacement="_"), "'Metaspace'"),
        ("pre_tokenizer", cuts(prepend_scheme="never"), "Meta"),
        ("pre_tokenizer", cuts(add_prefix_space=False), "begin"),
    ],
)
def test_hostile_json_is_refused(path: str, value: Any, words: str) -> None:
    document = json.loads(tiny(sentinels=0).to_json())
    T5Tokens.from_json(json.dumps(document), 8)
    *inside, last = path.split(".")
    (document[inside[0]] if inside else document)[last] = value
    with pytest.raises(BadFile, match=words):
        T5Tokens.from_json(json.dumps(document), 8)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000, '{"model": ' * 100_000, "9" * 5000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(BadFile):
        T5Tokens.from_json(text, 8)


def test_clip_is_told_apart_by_its_code() -> None:
    with pytest.raises(BadFile, match="type is 'BPE'") as caught:
        T5Tokens.from_json('{"model": {"type": "BPE", "vocab": {}}}', 77)
    assert caught.value.code == "unigram.other"


def test_a_token_after_the_vocabulary_becomes_a_piece() -> None:
    document = json.loads(tiny(sentinels=0).to_json())
    document["added_tokens"] += token(id=6, content="<cat>")
    tokens = T5Tokens.from_json(json.dumps(document), 8)
    assert tokens.size == 7 and tokens.encode("fox<cat>x") == [4, 6, 3, 5]


def test_importing_needs_no_torch() -> None:
    code = "import sys, sumuk.nets.unigram; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
