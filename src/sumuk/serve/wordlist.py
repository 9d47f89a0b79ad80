r"""Words that prompts may not hold, looked for in what a model would read.

A prompt is text with syntax in it: ``[nu|nu]de``, ``(nu:1.0)de`` and ``n\ude`` all come to the same word. So the list
is held against everything that a prompt can read at any step: each option of a schedule is followed, and a mark of
weight counts both as nothing and as the end of a word. One walk along the text carries the words that are half read, as
places in a tree of letters, so that time is linear in the prompt.

Letters are compared without case, width, accents and what cannot be seen (zero-width and bidirectional characters):
Unicode's compatibility decomposition, folded, with those left out. A word begins where one begins and ends where one
ends. Korean nouns may have particles after them (``칼을``, ``칼로는``); scripts that are written without spaces have no
borders.

Other spellings, other words for the same thing, and embeddings or LoRAs that stand for it are not found.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sumuk.base.errors import BadInput, MissingFile
from sumuk.generate.prompt import Scheduled, Tree, parse

MOST_BYTES = 4 * 2**20
"""Of a list."""
MOST_WAYS = 128
"""Words that may be half read at one place of a prompt; those that people write have a few."""
PARTICLES = (
    "은", "는", "이", "가", "을", "를", "의", "에", "에서", "에게", "에게서", "께", "께서", "한테", "와", "과", "랑",
    "이랑", "하고", "로", "으로", "로서", "으로서", "로써", "으로써", "도", "만", "까지", "부터", "마저", "조차",
    "처럼", "같이", "보다", "나", "이나", "라도", "이라도", "든지", "이든지", "밖에", "들", "마다", "뿐", "대로",
)  # fmt: skip
"""What Korean hangs on nouns; several may follow each other."""

_COMMENT = re.compile(r"(?:^|\s)#.*")
_MARK = re.compile(r":\s*+[-+]?[.0-9]++\s*+\)|[()\[\]\\]")
"""What weights and escapes are written with."""
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana, Han."""
_HANGUL = re.compile("[\u1100-\u11ff]")
_ACCENTS = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f]")
_FILLERS = "\u115f\u1160"
"""Korean letters without a shape."""


class _Folds(dict[int, str]):
    """Each character as it is compared: letters, or a space for what stands between words. Filled as it is used."""

    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        self[code] = "".join(map(_letter, plain))
        return self[code]


def _letter(plain: str) -> str:
    kind = unicodedata.category(plain)
    if kind == "Cf" or plain in _FILLERS or _ACCENTS.match(plain):
        return ""
    return plain if kind[0] in "LNM" else " "


_FOLDS = _Folds()


@dataclass(eq=False, slots=True)
class _Place:
    """A place in a tree of letters: where each letter leads, the word that ends here, whether a space led here."""

    next: dict[str, _Place] = field(default_factory=dict)
    word: str | None = None
    spaced: bool = False

    def grow(self, letters: str, word: str) -> None:
        """Add a word."""
        place = self
        for letter in letters:
            place = place.next.setdefault(letter, _Place(spaced=letter == " "))
        place.word = place.word or word


_Reading = frozenset[tuple[_Place, str | None]]
"""Words that are half read: where, and of which word it is a particle if the word itself is over."""


class _Met(Exception):
    """A word was read to its end."""


class Wordlist:
    """Words and phrases, ready to be looked for.

    Args:
        lines: a word or phrase each; what follows a ``#`` at the beginning or after a space is a comment.
        name: what to call the list in messages.

    Raises:
        BadInput: a line without a letter or digit, or no word at all.
    """

    def __init__(self, lines: Iterable[str], name: str = "the list") -> None:
        self._root, self._particles = _Place(), _Place()
        self._start: _Reading = frozenset({(self._root, None)})
        for number, line in enumerate(lines, start=1):
            word = _COMMENT.sub("", line).strip()
            letters = " ".join(word.translate(_FOLDS).split())
            if letters:
                self._root.grow(letters, word)
            elif word:
                raise BadInput(f"{name}, line {number}: {word!r:.60} holds no letter or digit to look for")
        if not self._root.next:
            raise BadInput(f"{name} holds no word; write one a line")
        for particle in PARTICLES:
            self._particles.grow(particle.translate(_FOLDS), particle)

    @classmethod
    def read(cls, path: Path) -> Wordlist:
        """A list in a text file, UTF-8.

        Raises:
            MissingFile: no such file.
            BadInput: it is too large or no text, and see above.
        """
        if not path.is_file():
            raise MissingFile(f"no list of blocked words at {path}")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise BadInput(f"the list of blocked words {path} has {size:,} bytes; at most {MOST_BYTES:,}")
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the list of blocked words {path} cannot be read as UTF-8: {error}") from None
        return cls(text.splitlines(), str(path))

    def find(self, prompt: str, *, conjunction: bool = True) -> str | None:
        """The first word of the list that a prompt can come to read, as the list writes it; None: none.

        Args:
            prompt: as typed.
            conjunction: see :func:`sumuk.generate.prompt.parse`.

        Raises:
            BadInput: it is no prompt.
        """
        try:
            for part in parse(prompt, conjunction=conjunction).parts:
                self._border(self._walk(part.tree, self._start))
        except _Met as met:
            return str(met)
        return None

    def _walk(self, tree: Tree, reading: _Reading) -> _Reading:
        """Along what is text, and along every option of what changes from step to step."""
        for node in tree:
            if isinstance(node, str):
                reading = self._along(node, reading)
            else:
                options = (node.before, node.after) if isinstance(node, Scheduled) else node.options
                reading = frozenset().union(*(self._walk(option, reading) for option in options))
        return reading

    def _along(self, text: str, reading: _Reading) -> _Reading:
        at = 0
        for mark in _MARK.finditer(text):
            reading = self._spell(text[at : mark.start()], reading)
            reading |= self._space(reading)
            at = mark.end()
        return self._spell(text[at:], reading)

    def _spell(self, text: str, reading: _Reading) -> _Reading:
        for letter in text.translate(_FOLDS):
            if letter == " ":
                reading = self._space(reading)
            elif _UNSPACED.match(letter):
                self._border(reading)
                reading = self._read(letter, reading | self._start) | self._start
            elif reading:
                reading = self._read(letter, reading)
        return reading

    def _read(self, letter: str, reading: _Reading) -> _Reading:
        """A letter further. A Korean word that is complete may go on with a particle, and so may a particle."""
        found = set()
        for place, noun in reading:
            then = place.next.get(letter)
            if then is None:
                continue
            found.add((then, noun))
            if then.word is not None:
                if _UNSPACED.match(letter):
                    raise _Met(then.word)
                if noun is not None or _HANGUL.match(letter):
                    found.add((self._particles, noun or then.word))
        if len(found) > MOST_WAYS:
            raise BadInput("the prompt can be read in too many ways to be checked; leave some options out")
        return frozenset(found)

    def _space(self, reading: _Reading) -> _Reading:
        """What stands between words; several such are as one."""
        self._border(reading)
        on = {
            (place if place.spaced else place.next.get(" "), None) for place, noun in reading if noun is None
        }
        return self._start | {(place, None) for place, _ in on if place is not None}

    def _border(self, reading: _Reading) -> None:
        """A word ends here, if one was read to its end."""
        for place, noun in reading:
            if place.word is not None:
                raise _Met(noun or place.word)
