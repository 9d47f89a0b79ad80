"""A model's words: in the metadata of a single file, in ``tokenizer/`` of a diffusers folder, or OpenAI's.

A file that says nothing has OpenAI's vocabulary if its token table has that many rows; with any other number
the words cannot be known, and are not guessed.
"""

from __future__ import annotations

import json
from pathlib import Path

from sumuk.base.errors import BadFile
from sumuk.files.atomic import replacing
from sumuk.files.shards import read_json
from sumuk.nets.clip import ClipShape
from sumuk.nets.tokens import BEGIN, END, ClipTokens
from sumuk.weights.inspect import Opened

META = "sumuk.tokenizer"
OPENAI_ROWS = 49408
FOLDER = "tokenizer"


def read(opened: Opened, shape: ClipShape) -> ClipTokens:
    """The vocabulary of a text tower.

    Raises:
        BadFile: none is there, or it has more words than the tower has rows.
    """
    path = opened.source.path
    folder = path / FOLDER
    if (said := opened.source.metadata.get(META)) is not None:
        tokens = ClipTokens.from_json(said)
    elif path.is_dir() and (folder / "vocab.json").exists():
        tokens = _from_folder(folder, shape)
    elif shape.vocabulary == OPENAI_ROWS:
        tokens = ClipTokens.openai(length=shape.length)
    else:
        raise BadFile(
            f"{path}: its text tower has {shape.vocabulary} words, not OpenAI's {OPENAI_ROWS}, and the file "
            f"brings none of its own (metadata {META!r}, or {FOLDER}/vocab.json and merges.txt in a folder)",
            "model.vocabulary",
        )
    if tokens.size > shape.vocabulary or tokens.length > shape.length:
        raise BadFile(
            f"{path}: a vocabulary of {tokens.size} words in rows of {tokens.length} does not fit a tower "
            f"of {shape.vocabulary} words and {shape.length} positions",
            "model.vocabulary",
        )
    return tokens


def _from_folder(folder: Path, shape: ClipShape) -> ClipTokens:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    tokens = ClipTokens.from_files(folder / "vocab.json", folder / "merges.txt", length=shape.length)
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad in (None, END):
        return tokens
    if pad not in tokens.vocabulary:
        raise BadFile(f"{folder}: pad_token {pad!r:.40} is not in vocab.json", "model.vocabulary")
    return ClipTokens(tokens.vocabulary, tokens.merges, pad=tokens.vocabulary[pad], length=shape.length)


def is_openai(tokens: ClipTokens, shape: ClipShape) -> bool:
    """Whether a file with this tower need not bring its vocabulary."""
    if shape.vocabulary != OPENAI_ROWS or tokens.size != OPENAI_ROWS or tokens.length != shape.length:
        return False
    usual = ClipTokens.openai(length=shape.length)
    return tokens.pad == usual.pad and tokens.vocabulary == usual.vocabulary and tokens.merges == usual.merges


def write_folder(tokens: ClipTokens, folder: Path) -> None:
    """The four files from which transformers makes a ``CLIPTokenizer``."""
    pad = next(token for token, index in tokens.vocabulary.items() if index == tokens.pad)
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    texts = {
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
    folder.mkdir()
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
