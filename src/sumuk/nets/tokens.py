"""CLIP's words: byte-level byte-pair encoding with an end-of-word mark.

A text is normalised (NFC, runs of white space to one space, lower case), cut into words, digits and runs of
marks, and each piece becomes its UTF-8 bytes, one printable letter a byte, the last marked ``</w>``. Then the
earliest rule of the merge list that applies joins two neighbours, until none does (Sennrich et al. 2016,
"Neural Machine Translation of Rare Words with Subword Units"; Radford et al. 2021, section 2.4).

Ids are bytes 0..255, the same at the end of a word 256..511, merges in order, begin, end.
``ClipTokens.openai()`` is the published vocabulary of 49408, shipped with the package; ``train`` makes a
small one by the same scheme; ``to_json`` and ``from_json`` carry it in a checkpoint's metadata. No torch.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sumuk.base.errors import BadFile, BadInput, MissingFile

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
OPENAI = "clip_bpe_simple_vocab_16e6.txt.gz"
OPENAI_MERGES = 49408 - 2 * 256 - 2  # the file holds more rules than the published vocabulary uses
PIECE = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

Merges = Sequence[tuple[str, str]]


def _alphabet() -> dict[str, int]:
    """A printable letter for each byte, by id: bytes that print stand for themselves and come first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


class ClipTokens:
    """A vocabulary, and text to ids and back.

    Args:
        vocabulary: token to id, with both special tokens.
        merges: pairs to join, earliest first.
        pad: id that fills short rows: the end token's (None) for CLIP-L, 0 for the towers H and G.
        length: tokens of a row, begin and end included.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], merges: Merges, *, pad: int | None = None, length: int = 77
    ) -> None:
        missing = [token for token in (BEGIN, END) if token not in vocabulary]
        if missing:
            raise BadFile(f"vocabulary of {len(vocabulary)} tokens lacks {missing[0]!r}", "tokens.special")
        if length < 3:
            raise BadInput(f"length {length} leaves no room between begin and end; give at least 3")
        self.vocabulary = dict(vocabulary)
        self.merges = [(left, right) for left, right in merges]
        self.size = max(self.vocabulary.values()) + 1
        self.bos = self.vocabulary[BEGIN]
        self.eos = self.vocabulary[END]
        self.pad = self.eos if pad is None else pad
        self.length = length
        if not 0 <= self.pad < self.size:
            raise BadInput(f"pad id {pad} is outside the vocabulary, 0..{self.size - 1}")
        for left, right in self.merges:
            if not self.vocabulary.keys() >= {left, right, left + right}:
                raise BadFile(
                    f"merge {left!r} + {right!r} uses tokens that the vocabulary lacks", "tokens.merges"
                )
        self._tokens = {index: token for token, index in self.vocabulary.items()}
        if len(self._tokens) != len(self.vocabulary):
            raise BadFile("vocabulary gives one id to two tokens", "tokens.twice")
        self._engine = _engine(self.vocabulary, self.merges)

    @classmethod
    def openai(cls, *, pad: int | None = None, length: int = 77) -> ClipTokens:
        """The vocabulary of every published CLIP tower: 49408 ids, begin 49406, end 49407."""
        merges = _openai_merges()
        return cls(_vocabulary(merges), merges, pad=pad, length=length)

    @classmethod
    def from_files(
        cls, vocab_json: Path, merges_txt: Path, *, pad: int | None = None, length: int = 77
    ) -> ClipTokens:
        """Reads ``vocab.json`` and ``merges.txt`` of a diffusers folder.

        Raises:
            MissingFile: either is absent.
            BadFile: either is not what it claims to be.
        """
        for path in (vocab_json, merges_txt):
            if not path.is_file():
                raise MissingFile(f"no tokenizer file at {path}")
        lines = merges_txt.read_text(encoding="utf-8").split("\n")
        rules = [line for line in lines if line and not line.startswith("#version")]
        vocabulary = _parse(vocab_json.read_text(encoding="utf-8"), str(vocab_json))
        return cls(_checked_ids(vocabulary), _pairs(rules, str(merges_txt)), pad=pad, length=length)

    @classmethod
    def from_json(cls, text: str) -> ClipTokens:
        """Reads what ``to_json`` wrote; BadFile if it is anything else."""
        document = _parse(text, "the vocabulary in the metadata")
        if sorted(document) != ["length", "merges", "pad", "vocabulary"]:
            raise BadFile(f"vocabulary in the metadata has fields {sorted(document)}", "tokens.json")
        rules, pad, length = document["merges"], document["pad"], document["length"]
        if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
            raise BadFile("merges in the metadata are not a list of strings", "tokens.json")
        if type(pad) is not int or type(length) is not int:
            raise BadFile(
                f"pad {pad!r} and length {length!r} in the metadata are not integers", "tokens.json"
            )
        pairs = _pairs(rules, "the metadata")
        return cls(_checked_ids(document["vocabulary"]), pairs, pad=pad, length=length)

    @classmethod
    def train(cls, texts: Iterable[str], size: int, length: int) -> ClipTokens:
        """Learns a vocabulary of exactly ``size`` ids; any other text stays writable, byte by byte.

        Raises:
            BadInput: ``size`` is below the 514 of bytes and special tokens, or the texts hold fewer merges.
        """
        wanted = size - 2 * 256 - 2
        if wanted < 0:
            raise BadInput(f"vocabulary size {size} is below {2 * 256 + 2}, the bytes and the special tokens")
        learner = _engine({BEGIN: 0, END: 1}, [])
        # the trainer counts only the end-of-word letters that it meets, so ask for more than can be needed
        learner.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=wanted + 2 * 256,
                initial_alphabet=list(_alphabet()),
                end_of_word_suffix=SUFFIX,
                min_frequency=2,
                show_progress=False,
            ),
        )
        merges: list[tuple[str, str]] = []
        made: set[str] = set()
        for left, right in json.loads(learner.to_str())["model"]["merges"]:
            if len(made) == wanted and left + right not in made:
                break
            made.add(left + right)
            merges.append((left, right))
        if len(made) < wanted:
            found = len(made) + 2 * 256 + 2
            raise BadInput(f"these texts support {found} ids, not {size}; give more text or size {found}")
        return cls(_vocabulary(merges), merges, length=length)

    def to_json(self) -> str:
        """The vocabulary as one line of ASCII, for a checkpoint's metadata."""
        return json.dumps(
            {
                "vocabulary": self.vocabulary,
                "merges": [f"{left} {right}" for left, right in self.merges],
                "pad": self.pad,
                "length": self.length,
            },
            separators=(",", ":"),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without begin and end (which a text that spells them does contain)."""
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def row(self, ids: Sequence[int]) -> list[int]:
        """Begin, ``ids``, end, padding: one row of ``length``. Longer ids are refused, never cut."""
        if len(ids) > self.length - 2:
            raise BadInput(
                f"{len(ids)} tokens do not fit a row of {self.length} with begin and end; split them"
            )
        return [self.bos, *ids, self.eos] + [self.pad] * (self.length - 2 - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text that a tower sees: lower case, a space after each piece, special tokens left out."""
        values, written = _alphabet(), bytearray()
        for index in ids:
            if index not in self._tokens:
                raise BadInput(f"token id {index} is outside the vocabulary, 0..{self.size - 1}")
            if index in (self.bos, self.eos):
                continue
            token = self._tokens[index]
            written.extend(values[letter] for letter in token.removesuffix(SUFFIX))
            if token.endswith(SUFFIX):
                written.extend(b" ")
        return written.decode("utf-8", errors="replace").strip()


def _engine(vocabulary: Mapping[str, int], merges: Merges) -> Tokenizer:
    engine = Tokenizer(
        models.BPE(dict(vocabulary), list(merges), unk_token=END, end_of_word_suffix=SUFFIX, fuse_unk=False)
    )
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    engine.add_special_tokens([BEGIN, END])
    return engine


def _vocabulary(merges: Merges) -> dict[str, int]:
    letters = list(_alphabet())
    tokens = [*letters, *(letter + SUFFIX for letter in letters), *(a + b for a, b in merges), BEGIN, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}  # two rules may make one token


@cache
def _openai_merges() -> list[tuple[str, str]]:
    packed = resources.files(__package__).joinpath("assets", OPENAI).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    return _pairs(islice(lines, 1, 1 + OPENAI_MERGES), OPENAI)


def _pairs(rules: Iterable[str], where: str) -> list[tuple[str, str]]:
    pairs = []
    for rule in rules:
        left, space, right = rule.partition(" ")
        if not left or not space or not right or " " in right:
            raise BadFile(f"{where}: merge {rule!r} is not two tokens and a space", "tokens.merges")
        pairs.append((left, right))
    return pairs


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BadFile(f"{where} is not JSON: {error}", "tokens.json") from error
    if not isinstance(document, dict):
        raise BadFile(f"{where} is a {type(document).__name__}, not a JSON object", "tokens.json")
    return document


def _checked_ids(vocabulary: object) -> dict[str, int]:
    if not isinstance(vocabulary, dict):
        raise BadFile(f"vocabulary is a {type(vocabulary).__name__}, not tokens and ids", "tokens.json")
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 2**24:
            raise BadFile(f"vocabulary gives token {token!r} the id {index!r}", "tokens.json")
    return vocabulary
