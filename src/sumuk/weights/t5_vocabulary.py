"""Where T5's words lie. The package ships none: they come with a model's folder, from a place of ours, or the hub.

In this order: the folder's ``spiece.model`` or ``tokenizer.json``, ``$SUMUK_HOME/t5/`` (SUMUK_HOME is
``~/.cache/sumuk`` unless set), and ``spiece.model`` of ``google/t5-v1_1-xxl`` through huggingface_hub, which keeps
it and asks no second time.
"""

from __future__ import annotations

import os
from pathlib import Path

from sumuk.base.errors import BadFile, MissingFile
from sumuk.nets.unigram import MOST_BYTES, T5Tokens

REPOSITORY = "google/t5-v1_1-xxl"
SENTENCEPIECE, JSON = "spiece.model", "tokenizer.json"
FOLDERS = ("tokenizer_2", "tokenizer_3", "tokenizer")
"""Of a diffusers folder: FLUX.1's, SD3's (whose tokenizer_2 is CLIP's), and where T5 is the only tower."""


def find_t5(folder: Path | None, length: int) -> T5Tokens:
    """T5's vocabulary, from the nearest place that has it.

    Args:
        folder: of a tokenizer, or a diffusers folder with those; None for a model that is a single file.
        length: tokens of a row.

    Raises:
        MissingFile: it is nowhere; says which file, where it comes from and where to put it.
        BadFile: it is there and damaged. A damaged file is not passed over for another.
    """
    home = Path(os.environ.get("SUMUK_HOME") or Path.home() / ".cache" / "sumuk") / "t5"
    if folder is not None:
        for place in (folder, *(folder / name for name in FOLDERS)):
            found = _look(place, length, shared=place != folder)
            if found is not None:
                return found
    found = _look(home, length)
    if found is not None:
        return found
    try:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(REPOSITORY, SENTENCEPIECE))
    except Exception as error:  # of the HTTP library that the hub uses; each means: no file
        reason = str(error).split("\n")[0] or type(error).__name__
        near = "" if folder is None else f"in {str(folder)!r} or "
        raise MissingFile(
            f"this model reads with T5, whose vocabulary {SENTENCEPIECE} is not {near}in {str(home)!r}, and the "
            f"hub did not give it ({reason:.200}); download it from https://huggingface.co/{REPOSITORY} to "
            f"{str(home / SENTENCEPIECE)!r}"
        ) from error
    return _read(path, length)


def _look(place: Path, length: int, *, shared: bool = False) -> T5Tokens | None:
    """The vocabulary of a folder; None if there is none, or, where towers share names, another's."""
    if (place / SENTENCEPIECE).is_file():
        return _read(place / SENTENCEPIECE, length)
    if not (place / JSON).is_file():
        return None
    try:
        return _read(place / JSON, length)
    except BadFile as error:
        if shared and error.code == "unigram.other":
            return None
        raise


def _read(path: Path, length: int) -> T5Tokens:
    if path.stat().st_size > MOST_BYTES:
        raise BadFile(f"{path}: {path.stat().st_size} bytes are too many for a vocabulary", "unigram.size")
    data = path.read_bytes()
    try:
        if path.name == JSON:
            return T5Tokens.from_json(data.decode(), length)
        return T5Tokens.from_sentencepiece(data, length)
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: is not UTF-8: {error}", "unigram.json") from None
    except BadFile as error:
        raise BadFile(f"{path}: {error}", error.code) from None
