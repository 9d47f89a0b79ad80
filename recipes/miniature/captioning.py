"""The words of the miniature: what an object is called, which prompts name it, which pictures are held out.

Pure functions only; ``data.py`` downloads, draws and writes.

**Claims.** A word belongs to one object of the whole set, so that a prompt never has two right answers.
Words are claimed in three rounds, each over all objects in Unicode order; a word once taken stays taken:

1. the words of ``words.txt``: the natural ones, picked by hand among CLDR's keywords and common speech;
2. the CLDR name ("fox", "여우 얼굴");
3. that name without a trailing " face" / " 얼굴" and a leading "a ", save for smileys ("hot face").

CLDR's keywords are not taken as they come: even those that one object alone has are more often moods and uses
("lol", "치과의사") than names. An animal whose plain name its own face holds becomes "whole cat" /
"고양이 전신".

**Hold-out.** ``u = sha256(object) / 2**256``; the k-th style is held out when ``k <= 10 u < k + 1``: a tenth
of each style, never two styles of one object, and adding a style changes nothing of the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STYLES = ("3d", "flat", "noto", "twemoji")
"""Every style, in the order that the hold-out counts them: append only."""

DEFAULT_STYLES = ("3d", "flat")

LANGUAGES = ("en", "ko")

STYLE_WORDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {"3d": ("3d",), "flat": ("flat",), "noto": ("noto",), "twemoji": ("twemoji",)},
    "ko": {
        "3d": ("3d", "입체"),
        "flat": ("플랫", "평면", "flat"),
        "noto": ("노토", "noto"),
        "twemoji": ("트웨모지", "twemoji"),
    },
}

_FORMS: Mapping[str, tuple[str, ...]] = {
    "en": ("{word}, {style}", "{a_word}, {style} style", "{word} {style}", "a {style} picture of {a_word}"),
    "ko": ("{word}, {style}", "{word}, {style} 스타일", "{word} {style}", "{style} {word} 그림"),
}

_FACE = {"en": " face", "ko": " 얼굴"}
_WHOLE = {"en": "whole {}", "ko": "{} 전신"}
# fmt: off
_PREPOSITIONS = frozenset([
    "with", "of", "in", "on", "at", "without", "from", "over", "behind", "showing", "for", "around", "and", "to",
])
_UNCOUNTED = frozenset([
    "badminton", "bamboo", "baseball", "basketball", "beer", "blood", "bowling", "bread",
    "broccoli", "butter", "camping", "cereal", "champagne", "cheese", "chocolate", "coffee",
    "coral", "corn", "curry", "cutlery", "dice", "dna", "dynamite", "fire", "fog", "fondue",
    "football", "garlic", "ginger", "golf", "hockey", "honey", "ice", "lacrosse", "lettuce",
    "lightning", "liquid", "luggage", "meat", "milk", "money", "muscle", "oden", "paella",
    "paper", "pasta", "polish", "pong", "popcorn", "pudding", "rain", "ramen", "rice",
    "salad", "salt", "soap", "soccer", "soda", "softball", "spaghetti", "stew", "sushi",
    "tea", "tennis", "thread", "volleyball", "water", "whisky", "wine", "wood", "yarn",
])
# fmt: on
_NAMES = frozenset(
    ["santa", "santa claus", "mrs. claus", "statue of liberty", "mount fuji", "earth", "saturn", "yin yang"]
)
_SINGULAR_S = frozenset({"rhinoceros"})
_CONSONANT = re.compile(r"uni|ufo|eu|ewe|one-")
_VOWEL = re.compile(r"[aeiou]|hour|x-ray|suv\b")


@dataclass(frozen=True)
class Named:
    """An object with everything that it is called: the material of the claims."""

    object: str
    """Codepoints, lower-case hexadecimal joined by ``-``, without fe0f."""
    subgroup: str
    name: Mapping[str, str]
    """Language -> CLDR name."""


@dataclass(frozen=True)
class Alias:
    """One side of a line of ``words.txt``."""

    words: tuple[str, ...]
    only: bool
    """These words only, not the CLDR name: the side began with ``=``."""


def read_words(text: str) -> dict[str, dict[str, Alias]]:
    """Parse ``words.txt``: object -> language -> its words.

    Raises:
        ValueError: a line that is not ``CODEPOINTS  English | Korean``, or a word that two objects claim.
    """
    table: dict[str, dict[str, Alias]] = {}
    owner: dict[tuple[str, str], str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        code, _, rest = line.partition("  ")
        sides = rest.split("|")
        if len(sides) != 2 or not re.fullmatch(r"[0-9a-f]{2,6}(-[0-9a-f]{2,6})*", code) or code in table:
            raise ValueError(f"words.txt line {number}: not a new 'CODEPOINTS  English | Korean': {line!r}")
        table[code] = {}
        for language, side in zip(LANGUAGES, sides, strict=True):
            only = side.strip().startswith("=")
            listed = side.strip().removeprefix("=").split(",")
            words = tuple(tidy(word, language) for word in listed if word.strip())
            for word in words:
                holder = owner.setdefault((language, word), code)
                if holder != code:
                    raise ValueError(f"words.txt line {number}: {word!r} belongs to {holder} already")
            table[code][language] = Alias(words, only)
    return table


def read_objects(text: str) -> list[str]:
    """The codepoints of an object list (first column), in its order."""
    return [line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")]


def tidy(name: str, language: str) -> str:
    """A CLDR name as people type it: lower case, plain quotes, no colon.

    ``person: red hair`` becomes "person with red hair", ``사람: 빨간 머리`` "빨간 머리인 사람".
    """
    name = " ".join(name.lower().replace("’", "'").replace("“", "").replace("”", "").split())
    who, colon, what = name.partition(": ")
    if not colon:
        return name
    return f"{who} with {what}" if language == "en" else f"{what}인 {who}"


def claim_words(
    objects: Sequence[Named], table: Mapping[str, Mapping[str, Alias]]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Give every word to one object (see the module's text).

    Args:
        objects: all objects of the set, in Unicode order.
        table: what :func:`read_words` returned.

    Returns:
        object -> language -> its words, the most natural first; an empty tuple where every name was taken.
    """
    claims: dict[str, dict[str, tuple[str, ...]]] = {named.object: {} for named in objects}
    for language in LANGUAGES:
        owner = {word: code for code, sides in table.items() for word in sides[language].words}
        mine: dict[str, list[str]] = {
            named.object: list(table[named.object][language].words) if named.object in table else []
            for named in objects
        }
        free = [n for n in objects if n.object not in table or not table[n.object][language].only]

        def claim(
            code: str, word: str, owner: dict[str, str] = owner, mine: dict[str, list[str]] = mine
        ) -> None:
            if word and owner.setdefault(word, code) == code and word not in mine[code]:
                mine[code].append(word)

        for named in free:
            claim(named.object, tidy(named.name[language], language))
        for named in free:
            if not named.subgroup.startswith("face-") and not named.name[language].endswith("with face"):
                claim(named.object, simplified(tidy(named.name[language], language), language))
        for named in objects:
            if not mine[named.object] and named.subgroup.startswith("animal"):
                claim(named.object, _WHOLE[language].format(tidy(named.name[language], language)))
            claims[named.object][language] = tuple(mine[named.object])
    return claims


def simplified(name: str, language: str) -> str:
    """The name without a trailing " face" / " 얼굴" and a leading "a "."""
    short = name.removeprefix("a ") if language == "en" else name
    return short.removesuffix(_FACE[language])


def with_article(word: str) -> str:
    """``fox`` -> ``a fox``, ``eye`` -> ``an eye``; ``grapes``, ``honey`` and proper names as they are."""
    tokens = word.split()
    cut = next((place for place, token in enumerate(tokens) if place and token in _PREPOSITIONS), len(tokens))
    head = tokens[cut - 1]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in _SINGULAR_S
    if plural or head in _UNCOUNTED or word in _NAMES:
        return word
    return f"an {word}" if _VOWEL.match(word) and not _CONSONANT.match(word) else f"a {word}"


def prompts(words: Sequence[str], style: str, language: str) -> list[str]:
    """Every prompt that names one of the words and the style, without repetition, in a fixed order."""
    texts: dict[str, None] = {}
    for word in words:
        for style_word in STYLE_WORDS[language][style]:
            for form in _FORMS[language]:
                a_word = with_article(word) if language == "en" else word
                texts[form.format(word=word, a_word=a_word, style=style_word)] = None
    return list(texts)


def held_out(code: str, style: str, available: Collection[str]) -> bool:
    """Whether the picture of an object in a style is kept from training.

    Args:
        available: the styles that the object exists in; with fewer than two nothing of it is held out.
    """
    if len(available) < 2:
        return False
    slot = int.from_bytes(hashlib.sha256(code.encode()).digest(), "big") * 10 >> 256
    return slot < len(STYLES) and STYLES[slot] == style


def select(
    records: Iterable[Mapping[str, Any]],
    styles: Collection[str] = (),
    groups: Collection[str] = (),
    limit: int | None = None,
    objects: Collection[str] | None = None,
) -> list[Mapping[str, Any]]:
    """The records of some styles and groups.

    Args:
        records: parsed lines of ``captions.jsonl``.
        styles, groups: what to keep; empty keeps all. A group is named as in the records ("animals-nature").
        limit: at most this many objects (not pictures), the first in the order of the records.
        objects: keep only these (see :func:`read_objects`).

    Raises:
        ValueError: a style or group that no record has, by its name.
    """
    records = list(records)
    for key, wanted in (("style", styles), ("group", groups)):
        known = {record[key] for record in records}
        for name in wanted:
            if name not in known:
                raise ValueError(f"no record has {key} {name!r}; known: {', '.join(sorted(known))}")
    kept = [
        record
        for record in records
        if (not styles or record["style"] in styles)
        and (not groups or record["group"] in groups)
        and (objects is None or record["object"] in objects)
    ]
    first = list(dict.fromkeys(record["object"] for record in kept))[:limit]
    chosen = set(first)
    return [record for record in kept if record["object"] in chosen]
