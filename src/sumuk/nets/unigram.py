"""T5's words: a sentencepiece vocabulary of pieces with scores, in which a text is its most probable spelling.

A text is normalised by a table that the vocabulary brings along (NFKC, any white space to a space, control
characters away), cut at spaces, and every word begins with U+2581 in place of its space. Of all ways to write
a word as pieces, the one with the largest sum of scores (log-probabilities) is taken; a letter in no piece
costs 10 more than the worst piece and is unknown, and unknown neighbours become one id (Kudo 2018, "Subword
Regularization", section 3.1; Kudo and Richardson 2018, "SentencePiece").

Ids: padding 0, end 1, unknown 2, pieces, then 100 sentinels ``<extra_id_99>``...``<extra_id_0>`` from T5's
training, which a ``tokenizer.json`` lists and a ``spiece.model`` does not. T5 v1.1 has 32100 in all. A text
that spells one of these special tokens contains it, as in transformers.

The tokenizers library computes it, so ids are those of transformers. As far as is known they differ from
sentencepiece's own at U+0085, and where a combining mark follows what the table has already replaced (a
compatibility letter, or a letter with another mark): the library drops that mark.

Either file may be hostile. Only pieces, scores, table and special tokens are taken from it, all of them
checked; the machine that runs on them is always the same. No torch, no disk.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sumuk.base.errors import BadFile, BadInput

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SENTINELS = 100
SPACE = "\u2581"
MOST_BYTES = 8 * 2**20
"""Of a vocabulary file; T5's has 0.8 MB, or 1.4 MB as JSON."""
MOST_PIECES = 2**18
LONGEST_PIECE = 256
"""In UTF-8. T5's longest has 20."""
MOST_TABLE = 2**20
"""Bytes of the normaliser's table; T5's has 237539."""
LONGEST_REPLACEMENT = 256
"""Bytes that one letter may become; 33 in T5's table, the Arabic ligature U+FDFA."""

Piece = tuple[str, float]


class T5Tokens:
    """A vocabulary, and text to ids.

    Args:
        pieces: by id, each with its score; padding, end and unknown come first.
        whole: tokens that stand for themselves wherever a text spells them, beside those three.
        table: sentencepiece's precompiled table of the normaliser; None: text is taken as it is.
        length: tokens of a row, end included.

    Raises:
        BadFile: pieces or table are not those of such a vocabulary; code ``unigram.*``.
        BadInput: ``length`` below 2.
    """

    def __init__(
        self, pieces: Sequence[Piece], *, whole: Sequence[str] = (), table: bytes | None = None, length: int
    ) -> None:
        if length < 2:
            raise BadInput(f"length {length} leaves no room before the end token; give at least 2")
        _check_pieces(pieces)
        if table is not None:
            _check_table(table)
        self.size = len(pieces)
        self.length = length
        self.pad, self.eos, self.unknown = range(3)
        self._engine = _engine(pieces, [PAD, END, UNKNOWN, *whole], table)

    @classmethod
    def from_sentencepiece(cls, data: bytes, length: int, *, sentinels: int = SENTINELS) -> T5Tokens:
        """Reads the bytes of a ``spiece.model``; ``sentinels`` ids follow its pieces.

        Raises:
            BadFile: no such file, damaged, or of another kind than T5's; code ``unigram.*``.
        """
        _check_size(len(data))
        model = _message(data, {1: _BYTES, 2: _BYTES, 3: _BYTES}, "the vocabulary")
        if len(model[1]) > MOST_PIECES:
            raise BadFile(f"{len(model[1])} pieces are more than {MOST_PIECES}", "unigram.size")
        trainer, normaliser = _once(model, 2, b""), _once(model, 3, b"")
        _check_trainer(_message(trainer, dict.fromkeys(_TRAINER, _WHOLE), "trainer_spec"))
        settings = _message(normaliser, {2: _BYTES, 3: _WHOLE, 4: _WHOLE, 5: _WHOLE}, "normalizer_spec")
        for number, what in [(3, "add_dummy_prefix"), (4, "remove_extra_whitespaces"), (5, "escape")]:
            if not _once(settings, number, 1):
                raise BadFile(f"the normaliser's {what} is off; in T5's vocabulary it is on", "unigram.kind")
        pieces, whole = [], []
        for index, field in enumerate(model[1]):
            piece, kind = _piece(field, index)
            pieces.append(piece)
            if kind == _CONTROL and index > 1:
                whole.append(piece[0])
        names = [f"<extra_id_{number}>" for number in reversed(range(sentinels))]
        pieces += [(name, 0.0) for name in names]
        return cls(pieces, whole=whole + names, table=_once(settings, 2, b"") or None, length=length)

    @classmethod
    def from_json(cls, text: str, length: int) -> T5Tokens:
        """Reads the text of a ``tokenizer.json``, ours (``to_json``) or another's.

        Raises:
            BadFile: it is none, or of another kind than T5's; code ``unigram.other`` for another model's, as CLIP's.
        """
        _check_size(len(text))
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadFile(f"the vocabulary is not JSON: {error}", "unigram.json") from None
        model = _table(_table(document, "the vocabulary").get("model"), "its model")
        for name, right in [("type", "Unigram"), ("byte_fallback", False), ("unk_id", 2)]:
            if (value := model.get(name, right)) != right:
                code = "unigram.other" if name == "type" else "unigram.kind"
                raise BadFile(f"the vocabulary's {name} is {_show(value)}, T5's {right!r}", code)
        pieces = [_json_piece(item) for item in _list(model.get("vocab"), "its vocab")]
        whole = [_added(item, pieces) for item in _list(document.get("added_tokens", []), "added_tokens")]
        table = None
        for step in _steps(document.get("normalizer"), "normalizers"):
            if step.get("type") == "Precompiled":
                table = _base64(step.get("precompiled_charsmap"))
            elif (step.get("type"), step.get("pattern")) not in _HARMLESS:
                raise BadFile(f"normaliser {_show(step.get('type'))} is none of T5's", "unigram.kind")
        _check_cuts(_steps(document.get("pre_tokenizer"), "pretokenizers"))
        return cls(pieces, whole=whole, table=table, length=length)

    def to_json(self) -> str:
        """The vocabulary as a ``tokenizer.json``, which transformers reads as well."""
        return str(self._engine.to_str())

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without end (which a text that spells it does contain)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"text has half a surrogate pair at character {error.start}; remove it") from None
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def row(self, ids: Sequence[int]) -> list[int]:
        """``ids``, end, padding: one row of ``length``. Longer ids are refused, never cut."""
        if len(ids) > self.length - 1:
            raise BadInput(
                f"{len(ids)} tokens do not fit a row of {self.length} with its end; shorten the text"
            )
        return [*ids, self.eos] + [self.pad] * (self.length - 1 - len(ids))

    def mask(self, row: Sequence[int]) -> list[bool]:
        """Which tokens of a row are no padding at its end, for families that hide that."""
        words = len(row)
        while words and row[words - 1] == self.pad:
            words -= 1
        return [index < words for index in range(len(row))]


def _engine(pieces: Sequence[Piece], whole: Sequence[str], table: bytes | None) -> Tokenizer:
    engine = Tokenizer(models.Unigram(list(pieces), unk_id=2, byte_fallback=False))
    if table is not None:
        engine.normalizer = normalizers.Precompiled(table)
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    engine.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    engine.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    engine.add_special_tokens(list(whole))
    return engine


def _check_size(count: int) -> None:
    if count > MOST_BYTES:
        raise BadFile(f"{count} bytes are too many for a vocabulary", "unigram.size")


def _check_pieces(pieces: Sequence[Piece]) -> None:
    if not 3 < len(pieces) <= MOST_PIECES:
        raise BadFile(f"a vocabulary of {len(pieces)} pieces, not 4 to {MOST_PIECES}", "unigram.size")
    first = tuple(text for text, _ in pieces[:3])
    if first != (PAD, END, UNKNOWN):
        raise BadFile(f"it begins with {first!r:.100}, T5's with {(PAD, END, UNKNOWN)}", "unigram.special")
    known: set[str] = set()
    for index, (text, score) in enumerate(pieces):
        try:
            count = len(text.encode())
        except UnicodeEncodeError:
            count = 0
        if not 1 <= count <= LONGEST_PIECE:
            raise BadFile(f"piece {index} is empty, too long or no text: {text!r:.40}", "unigram.piece")
        if not math.isfinite(score):
            raise BadFile(f"piece {index}, {text!r:.40}, has the score {score}", "unigram.score")
        if text in known:
            raise BadFile(f"piece {text!r:.40} has two ids, the second {index}", "unigram.twice")
        known.add(text)


def _check_table(table: bytes) -> None:
    """Follows all that a text can reach, as the library does not and would panic.

    The table: the trie's size in bytes (u32), its units (u32 each), and the texts that replace, each with a zero
    byte at its end. A unit holds a label (bits 0..7), whether a replacement hangs on it (8), and how to
    find its children: at ``place ^ offset ^ label``. The replacement's own unit is the child of label 0.
    """
    size = int.from_bytes(table[:4], "little")
    if len(table) > MOST_TABLE or not 4 <= size <= len(table) - 4 or size % 4:
        raise BadFile(f"the normaliser's table of {len(table)} bytes has a trie of {size}", "unigram.table")
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(table, np.uint8, offset=4 + size)
    starts = (texts & 0xC0) != 0x80  # the first byte of a letter
    try:
        longest = max(len(text.encode()) for text in table[4 + size :].decode().split("\0"))
    except UnicodeDecodeError:
        raise BadFile("the normaliser's replacements are no UTF-8", "unigram.table") from None
    if longest > LONGEST_REPLACEMENT:
        raise BadFile(f"the normaliser makes {longest} bytes of one letter", "unigram.table")
    offsets = (units >> 10) << ((units >> 6) & 8)
    labels = np.arange(1, 256)
    seen = np.zeros(len(units), dtype=bool)
    waiting = offsets[:1]
    while len(waiting):
        if waiting.max() | 255 >= len(units):
            raise BadFile("the normaliser's table points outside itself", "unigram.table")
        seen[waiting] = True
        found = []
        for places in np.array_split(waiting, len(waiting) // 4096 + 1):
            children = places[:, None] ^ labels
            children = children[units[children] & 0x800000FF == labels]
            below = children ^ offsets[children]
            leaves = below[(units[children] & 0x100) != 0]
            values = units[leaves[leaves < len(units)]] & 0x7FFFFFFF
            inside = values < len(texts)
            if (leaves >= len(units)).any() or not inside.all() or not starts[values].all():
                raise BadFile("the normaliser's table has a replacement outside its texts", "unigram.table")
            found.append(below)
        below = np.unique(np.concatenate(found))
        waiting = below[(below >= len(units)) | ~seen[np.minimum(below, len(units) - 1)]]


# sentencepiece_model.proto: what of it is read. Wire types of protobuf: 0 a varint, 2 bytes, 5 four bytes.
_WHOLE, _BYTES, _FLOAT = 0, 2, 5
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3
_TRAINER: Mapping[int, tuple[str, int]] = {
    3: ("model_type", 1),
    24: ("treat_whitespace_as_suffix", 0),
    35: ("byte_fallback", 0),
    40: ("unk_id", 2),
    42: ("eos_id", 1),
    43: ("pad_id", 0),
}


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, where)
        number, wire = key >> 3, key & 7
        if number < 1:
            raise BadFile(f"{where}: a field has the number 0", "unigram.proto")
        if wire == _WHOLE:
            value, at = _varint(data, at, where)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, where)
        elif wire in (1, _FLOAT):
            size = 8 if wire == 1 else 4
        else:
            raise BadFile(f"{where}: field {number} has the wire type {wire}, as none has", "unigram.proto")
        if size > len(data) - at:
            raise BadFile(
                f"{where}: field {number} of {size} bytes, {len(data) - at} are left", "unigram.proto"
            )
        yield number, wire, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """Seven bits a byte, lowest first, at most 64; the number and where it ends."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            if value >= 2**64:
                break
            return value, at + index + 1
    raise BadFile(f"{where}: a number at byte {at} does not end", "unigram.proto")


def _message(data: bytes, wanted: Mapping[int, int], where: str) -> dict[int, list[Any]]:
    """The values of the wanted fields (number to wire type), in order; others are passed by."""
    found: dict[int, list[Any]] = {number: [] for number in wanted}
    for number, wire, value in _fields(data, where):
        if number not in wanted:
            continue
        if wire != wanted[number]:
            raise BadFile(f"{where}: field {number} has the wire type {wire}", "unigram.proto")
        found[number].append(value)
    return found


def _once(message: Mapping[int, list[Any]], number: int, default: Any) -> Any:
    if len(message[number]) > 1:
        raise BadFile(
            f"field {number} stands {len(message[number])} times in the vocabulary", "unigram.proto"
        )
    return message[number][0] if message[number] else default


def _check_trainer(trainer: Mapping[int, list[Any]]) -> None:
    for number, (name, right) in _TRAINER.items():
        value = _once(trainer, number, right)
        if value != right:
            raise BadFile(f"the vocabulary's {name} is {value}, in T5's it is {right}", "unigram.kind")


def _piece(data: bytes, index: int) -> tuple[Piece, int]:
    """One piece and its kind; padding and end are control pieces, unknown is unknown, the rest are not."""
    message = _message(data, {1: _BYTES, 2: _FLOAT, 3: _WHOLE}, f"piece {index}")
    text, score, kind = _once(message, 1, b""), _once(message, 2, bytes(4)), _once(message, 3, _NORMAL)
    if kind not in (_NORMAL, _UNKNOWN, _CONTROL) or (kind == _UNKNOWN) != (index == 2):
        raise BadFile(f"piece {index}, {text!r:.40}, is of the kind {kind}", "unigram.kind")
    try:
        return (text.decode(), struct.unpack("<f", score)[0]), kind
    except UnicodeDecodeError:
        raise BadFile(f"piece {index}, {text!r:.40}, is no UTF-8", "unigram.piece") from None


# tokenizer.json: steps that change nothing beside ours, which cut at any white space, however long
_HARMLESS = (("Strip", None), ("Replace", {"Regex": " {2,}"}))


def _table(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadFile(f"{what} is a {type(value).__name__}, not a JSON object", "unigram.json")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST_PIECES:
        raise BadFile(f"{what} is no list of at most {MOST_PIECES}", "unigram.json")
    return value


def _show(value: object) -> str:
    """A value of unknown kind and size, for a message."""
    return f"{value!r:.40}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _json_piece(item: object) -> Piece:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
        raise BadFile(f"the vocab has {_show(item)} that is no piece with a score", "unigram.json")
    if type(item[1]) not in (int, float) or abs(item[1]) > 1e30:
        raise BadFile(f"piece {item[0]!r:.40} has the score {_show(item[1])}", "unigram.score")
    return item[0], float(item[1])


def _added(item: object, pieces: list[Piece]) -> str:
    """A token that is listed by itself: one of the pieces, or the next after them, which it becomes."""
    token = _table(item, "an added token")
    index, content = token.get("id"), token.get("content")
    if type(index) is not int or not isinstance(content, str) or not 0 <= index <= len(pieces):
        raise BadFile(f"added token {_show(content)} has the id {_show(index)}", "unigram.added")
    if token.get("single_word") or token.get("normalized"):
        raise BadFile(f"added token {content!r:.40} is read otherwise than T5's", "unigram.kind")
    if index == len(pieces):
        pieces.append((content, 0.0))
    if pieces[index][0] != content:
        raise BadFile(f"id {index} is {pieces[index][0]!r:.40} and {content!r:.40}", "unigram.added")
    return content


def _steps(value: object, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a normaliser or pre-tokeniser, sequences opened."""
    waiting = [] if value is None else [value]
    while waiting:
        step = _table(waiting.pop(), "a step of the vocabulary")
        if step.get("type") != "Sequence":
            yield step
        else:
            waiting += reversed(_list(step.get(inside), inside))


def _check_cuts(steps: Iterator[dict[str, Any]]) -> None:
    """Words are cut at spaces and begin with U+2581, whether the file says so in one step or in two."""
    begun = False
    for step in steps:
        kind, always = step.get("type"), step.get("prepend_scheme", "always") in ("always", "first")
        if kind == "Metaspace" and step.get("replacement") == SPACE and always:
            begun = step.get("add_prefix_space", True) is True
        elif kind != "WhitespaceSplit":
            raise BadFile(f"pre-tokeniser {_show(kind)} is none of T5's", "unigram.kind")
    if not begun:
        raise BadFile("words do not begin with U+2581, as T5's do", "unigram.kind")


def _base64(value: object) -> bytes | None:
    if not isinstance(value, str):
        raise BadFile("the normaliser's table is no text", "unigram.json")
    try:
        return base64.b64decode(value, validate=True) or None
    except ValueError as error:
        raise BadFile(f"the normaliser's table is no base64: {error}", "unigram.json") from None
