r"""The ``parameters`` text of a picture, as A1111's web UI writes it and every gallery reads it.

    a fox, 3d style
    Negative prompt: blurry
    Steps: 20, Sampler: euler, CFG scale: 7, Seed: 5, Size: 512x512, Model: "a, b", Version: ...

The last line holds the settings, ``Key: value`` joined by commas; a value that holds a comma, colon or line
break (or would not survive bare) is a JSON string. Readers take a last line of fewer than three settings for
a part of the prompt, strip every line, and begin the negative prompt at the line that says so; a prompt of
which a line begins with these words gets a backslash before them, which the prompt grammar drops again.

Source: AUTOMATIC1111 stable-diffusion-webui 1.10, behaviour of "PNG Info". Reading takes linear time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sumuk.base.errors import BadInput

LONGEST = 1_000_000
"""Characters of a text that is read."""
FEWEST = 3
"""Settings that a last line must hold to be one."""
NEGATIVE = "Negative prompt:"
ORDER = (
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Distilled CFG Scale",
    "Image CFG scale",
    "Seed",
    "Face restoration",
    "Size",
    "Model hash",
    "Model",
    "VAE hash",
    "VAE",
    "Variation seed",
    "Variation seed strength",
    "Seed resize from",
    "Denoising strength",
    "Clip skip",
    "ENSD",
    "RNG",
    "Tiling",
)
"""Settings that come first; others follow as given, and ``Version`` is last."""

_KEY = re.compile(r"\w[\w \-/]+")
_RUN = re.compile(r"[\w \-/]++")
_LEADING = re.compile(r"[ \-/]*+")
_SPACE = re.compile(r"\s*+")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])++"(?=,|$)', re.DOTALL)
_BARE = re.compile(r"[^,]*+")
_MARKED = re.compile(rf"^([^\S\n]*+)(\\*{NEGATIVE})", re.MULTILINE)


@dataclass(frozen=True)
class Infotext:
    """What a picture says of itself; nothing in it is checked, it may come from anywhere."""

    prompt: str = ""
    negative: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def write_infotext(prompt: str, negative: str, settings: Mapping[str, object]) -> str:
    """The text for a picture.

    Args:
        prompt: as given.
        negative: as given.
        settings: at least three besides those that are None, which are left out.

    Raises:
        BadInput: a key that readers would not find, or fewer than three settings.
    """
    written = {key: _shown(value) for key, value in settings.items() if value is not None}
    if len(written) < FEWEST:
        raise BadInput(f"{len(written)} settings read as a part of the prompt; give at least {FEWEST}")
    for key in written:
        if not _KEY.fullmatch(key) or key != key.strip():
            raise BadInput(
                f"setting {key!r} cannot be read back; use two or more of letters, digits, space, - and /"
            )
    places = {key: place for place, key in enumerate([*ORDER, "", "Version"])}
    keys = sorted(written, key=lambda key: places.get(key, places[""]))
    lines = [_MARKED.sub(r"\1\\\2", prompt)]
    if negative.strip():
        lines.append(f"{NEGATIVE} " + _MARKED.sub(r"\1\\\2", negative))
    lines.append(", ".join(f"{key}: {_quote(written[key])}" for key in keys))
    return "\n".join(lines).strip()


def parse_infotext(text: str) -> Infotext:
    """The inverse, up to white space at the ends of lines; of a key that is there twice, the last counts.

    Raises:
        BadInput: the text is too long.
    """
    if len(text) > LONGEST:
        raise BadInput(f"the text of the picture has {len(text):,} characters; at most {LONGEST:,} are read")
    *lines, last = text.strip().split("\n")
    pairs = list(_pairs(last))
    if len(pairs) < FEWEST:
        lines.append(last)
        pairs = []
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            target = negative
            line = line.removeprefix(NEGATIVE)
        target.append(re.sub(rf"^\\(\\*{NEGATIVE})", r"\1", line.strip()))
    return Infotext("\n".join(prompt).strip(), "\n".join(negative).strip(), dict(pairs))


def _shown(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def _quote(value: str) -> str:
    bare = value and value == value.strip() and value[0] != '"' and not any(mark in value for mark in ",:\n")
    return value if bare else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Keys and values of a line; what is neither is passed over."""
    position = 0
    while run := _RUN.search(line, position):
        position = run.end()
        key = line[_LEADING.match(line, run.start()).end() : position]  # type: ignore[union-attr]
        if len(key) < 2 or line[position : position + 1] != ":":
            continue
        start = _SPACE.match(line, position + 1).end()  # type: ignore[union-attr]
        found = _QUOTED.match(line, start) or _BARE.match(line, start)
        assert found is not None  # a bare value may be empty
        yield key, _unquote(found[0])
        position = found.end()
