"""A model's words: in the metadata of a single file, in ``tokenizer/`` of a diffusers folder, or OpenAI's.

A file that says nothing has OpenAI's vocabulary if its token table has that many rows; with any other number
the words cannot be known, and are not guessed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadFile
from sumuk.families.reading import Reading
from sumuk.files.atomic import replacing
from sumuk.files.shards import MAX_INDEX, read_json
from sumuk.nets.tokens import BEGIN, END, ClipTokens
from sumuk.weights.inspect import Opened
from sumuk.weights.model import Words

META = "sumuk.tokenizer"
OPENAI_ROWS = 49408
T5_ROWS = 32128
FOLDER = "tokenizer"


def meta(part: str) -> str:
    """Under which metadata a single file keeps a tower's words: ``sumuk.tokenizer``, ``sumuk.tokenizer_2``, ..."""
    return META + part.removeprefix("text")


def folder(part: str) -> str:
    """Where a diffusers folder keeps them."""
    return FOLDER + part.removeprefix("text")


def read(opened: Opened, reading: Reading, shape: Any) -> Words:
    """The vocabulary of a text tower.

    Args:
        opened: the file that the tower came from.
        reading: how the family reads with it.
        shape: the tower's shape value.

    Raises:
        BadFile: none is there, or it has more words than the tower has rows.
        MissingFile: T5's lies nowhere within reach; says where to put it.
    """
    path = opened.source.path
    try:
        return _read(opened, reading, shape)
    except (RecursionError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: its vocabulary cannot be read: {error}", "model.vocabulary") from None
    except BadFile as error:
        if str(path) in str(error):
            raise
        raise BadFile(f"{path}: {error}", error.code) from None


def _read(opened: Opened, reading: Reading, shape: Any) -> Words:
    path = opened.source.path
    said = opened.source.metadata.get(meta(reading.part))
    tokens: Words
    if reading.words == "t5":
        from sumuk.nets.unigram import T5Tokens  # here, as most models have no T5
        from sumuk.weights.t5_vocabulary import find_t5

        length = reading.length or shape.length
        place = path / folder(reading.part) if path.is_dir() else None
        tokens = find_t5(place, length) if said is None else T5Tokens.from_json(said, length)
    elif said is not None:
        tokens = ClipTokens.from_json(said)
    elif (found := _from_folder(path / folder(reading.part), reading, shape)) is not None:
        tokens = found
    else:
        raise BadFile(
            f"{path}: its text tower has {shape.vocabulary} words, not OpenAI's {OPENAI_ROWS}, and the file "
            f"brings none of its own (metadata {meta(reading.part)!r}, or {folder(reading.part)}/ in a folder with "
            "vocab.json and merges.txt, or tokenizer.json)",
            "model.vocabulary",
        )
    positions = getattr(shape, "length", None)  # T5 has no table of them
    if tokens.size > shape.vocabulary or (positions is not None and tokens.length > positions):
        raise BadFile(
            f"{path}: a vocabulary of {tokens.size} words in rows of {tokens.length} does not fit a tower "
            f"of {shape.vocabulary} words and {positions} positions",
            "model.vocabulary",
        )
    return tokens


def _from_folder(folder: Path, reading: Reading, shape: Any) -> ClipTokens | None:
    """A tokenizer's folder, old (two files) or new (one); OpenAI's words where there is none and they fit."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    for name in ("vocab.json", "merges.txt"):
        if (folder / name).is_file() and (size := (folder / name).stat().st_size) > MAX_INDEX:
            raise BadFile(f"{folder / name}: {size} bytes are too many for a vocabulary", "json.size")
    if (folder / "vocab.json").exists():
        tokens = ClipTokens.from_files(folder / "vocab.json", folder / "merges.txt", length=shape.length)
    elif (folder / "tokenizer.json").exists():
        tokens = _from_tokenizer(read_json(folder / "tokenizer.json"), folder, shape.length)
    elif shape.vocabulary == OPENAI_ROWS:
        tokens = ClipTokens.openai(pad=reading.pad, length=shape.length)
    else:
        return None
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is None:
        return tokens
    if not isinstance(pad, str) or pad not in tokens.vocabulary:
        raise BadFile(f"{folder}: pad_token {pad!r:.40} is not in the vocabulary", "model.vocabulary")
    return ClipTokens(tokens.vocabulary, tokens.merges, pad=tokens.vocabulary[pad], length=shape.length)


def _from_tokenizer(document: dict[str, Any], folder: Path, length: int) -> ClipTokens:
    """The words of a ``tokenizer.json``, which transformers 5 writes alone."""
    model = document.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(words, dict) or not isinstance(merges, list):
        raise BadFile(f"{folder}: tokenizer.json holds no byte pairs as CLIP has them", "model.vocabulary")
    pairs = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in merges]
    if any(len(pair) != 2 or not all(isinstance(each, str) for each in pair) for pair in pairs):
        raise BadFile(f"{folder}: tokenizer.json has a merge that is no pair of words", "model.vocabulary")
    if any(type(index) is not int or not 0 <= index < 2**24 for index in words.values()):
        raise BadFile(f"{folder}: tokenizer.json gives a word a number that is none", "model.vocabulary")
    return ClipTokens(words, [(left, right) for left, right in pairs], length=length)


def is_usual(tokens: Words, reading: Reading, shape: Any) -> bool:
    """Whether a file with this tower need not bring its vocabulary: it has the one that everybody has."""
    if not isinstance(tokens, ClipTokens):
        return shape.vocabulary == T5_ROWS
    if shape.vocabulary != OPENAI_ROWS or tokens.size != OPENAI_ROWS or tokens.length != shape.length:
        return False
    usual = ClipTokens.openai(pad=reading.pad, length=shape.length)
    return tokens.pad == usual.pad and tokens.vocabulary == usual.vocabulary and tokens.merges == usual.merges


def write_folder(tokens: Words, folder: Path) -> None:
    """The files from which transformers makes a ``CLIPTokenizer`` or a ``T5TokenizerFast``."""
    folder.mkdir()
    for name, text in (_clip_files(tokens) if isinstance(tokens, ClipTokens) else _t5_files(tokens)).items():
        with replacing(folder / name) as file:
            file.write(text.encode())


def _t5_files(tokens: Words) -> dict[str, str]:
    config = {
        "eos_token": "</s>",
        "model_max_length": tokens.length,
        "pad_token": "<pad>",
        "tokenizer_class": "T5TokenizerFast",
        "unk_token": "<unk>",
    }
    return {"tokenizer.json": tokens.to_json(), "tokenizer_config.json": json.dumps(config, indent=2)}


def _clip_files(tokens: ClipTokens) -> dict[str, str]:
    pad = next(token for token, index in tokens.vocabulary.items() if index == tokens.pad)
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    return {
        "vocab.json": json.dumps(tokens.vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in tokens.merges), ""]),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(
            {
                **special,
                "add_prefix_space": False,
                "do_lower_case": True,
                "model_max_length": tokens.length,
                "tokenizer_class": "CLIPTokenizer",
            },
            indent=2,
        ),
    }
