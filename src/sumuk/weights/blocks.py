"""Blocks of a denoiser by the names that merging people use, and a rate for each.

U-Nets have ``IN00``.. ``M00`` ``OUT00``.. (12 + 1 + 12 in Stable Diffusion 1 and 2, 9 + 1 + 9 in SDXL), FLUX.1
``D00``.. ``S00``.., SD3 ``J00``.., DiT ``B00``..; everything else of the model is ``BASE``. As in merge-block-weighted
and supermerger the time embedding of a U-Net belongs to its first block, and what follows the last block to the last.

Rates are written as

* numbers, one a block in the network's order, or one more with ``BASE`` first; the LoRA Block Weight extension's short
  forms of 17 (Stable Diffusion 1 and 2) and 12 (SDXL) name only blocks with attention;
* a preset by name (``GRAD_V``), its 26 numbers from https://github.com/hako-mikan/sd-webui-supermerger; SDXL takes
  those of the blocks that it has;
* pairs: ``IN04:0.3,OUT*:0.5,M00:1``; after a preset, they change it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

from sumuk.base.errors import BadInput, nearest

BASE = "BASE"
UNET, UNET_XL = (12, 1, 12), (9, 1, 9)

_PLACES = (
    (re.compile(r"input_blocks\.([0-9]+)\."), "IN"),
    (re.compile(r"output_blocks\.([0-9]+)\."), "OUT"),
    (re.compile(r"double_blocks\.([0-9]+)\."), "D"),
    (re.compile(r"single_blocks\.([0-9]+)\."), "S"),
    (re.compile(r"joint_blocks\.([0-9]+)\."), "J"),
    (re.compile(r"blocks\.([0-9]+)\."), "B"),
)
_ORDER = ("IN", "M", "OUT", "D", "S", "J", "B")
_NAME = re.compile(r"([A-Z]+)([0-9]+)")

ATTENDING: Mapping[tuple[int, ...], tuple[str, ...]] = {
    UNET: (*(f"IN{i:02d}" for i in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{i:02d}" for i in range(3, 12))),
    UNET_XL: (*(f"IN{i:02d}" for i in (4, 5, 7, 8)), "M00", *(f"OUT{i:02d}" for i in range(6))),
}
"""Blocks with attention, which the short forms of LoRA Block Weight name after ``BASE``."""


def block_of(part: str, name: str, last: str = "OUT11") -> str:
    """The block that a tensor or module lies in.

    Args:
        part: of the family: ``denoiser``, ``vae``, ``text``; only a denoiser has blocks.
        name: its native name in that part (``input_blocks.4.1.norm.weight``).
        last: the U-Net's last block, to which ``out.*`` belongs; ``OUT08`` in SDXL.
    """
    if part != "denoiser":
        return BASE
    for pattern, kind in _PLACES:
        if found := pattern.match(name):
            return f"{kind}{int(found[1]):02d}"
    if name.startswith("middle_block."):
        return "M00"
    if name.startswith(("time_embed.", "label_emb.")):
        return "IN00"
    return last if name.startswith("out.") else BASE


@dataclass(frozen=True)
class Blocks:
    """The blocks that a model has.

    Attributes:
        names: in the network's order, without ``BASE``.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, native: Iterable[str]) -> Blocks:
        """From native names with their part in front (``denoiser.input_blocks.0.0.weight``)."""
        inside = (name.removeprefix("denoiser.") for name in native if name.startswith("denoiser."))
        found = {block_of("denoiser", name, last=BASE) for name in inside} - {BASE}
        return cls(tuple(sorted(found, key=_place)))

    def block(self, part: str, name: str) -> str:
        """The block of a tensor of this model."""
        last = self.names[-1] if self.names and self.names[-1].startswith("OUT") else BASE
        return block_of(part, name, last)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many of each kind: ``(12, 1, 12)``."""
        kinds = [_NAME.match(name)[1] for name in self.names]  # type: ignore[index]  # we made them
        return tuple(kinds.count(kind) for kind in _ORDER if kind in kinds)

    def __str__(self) -> str:
        if not self.names:
            return "no blocks, only BASE"
        counts = self.counts
        total = f" = {len(self.names)}" if len(counts) > 1 else ""
        return f"{' + '.join(map(str, counts))}{total} blocks ({self.names[0]} to {self.names[-1]})"


def _place(name: str) -> tuple[int, int]:
    found = _NAME.fullmatch(name)
    assert found is not None
    return _ORDER.index(found[1]), int(found[2])


@dataclass(frozen=True)
class Rates:
    """A rate for each block.

    Attributes:
        values: of the blocks that were named.
        rest: of all others; None: there are none, or asking for one is an error.
        named: blocks that were named one by one or by a pattern, so that each must matter.
        note: what is worth knowing of how they were read; empty if nothing is.
    """

    values: Mapping[str, float]
    rest: float | None = None
    named: frozenset[str] = field(default_factory=frozenset)
    note: str = ""

    def of(self, block: str) -> float:
        """The rate of one block.

        Raises:
            BadInput: it was not named, and no rate was given for the rest.
        """
        rate = self.values.get(block, self.rest)
        if rate is None:
            raise BadInput(f"no rate for the block {block}, and none for the rest; name it, or give alpha")
        return rate

    @classmethod
    def parse(cls, text: str, blocks: Blocks, rest: float | None = None) -> Rates:
        """Read rates in any of the forms above.

        Args:
            text: the rates.
            blocks: those of the model that they are for.
            rest: the rate of what the text does not name.

        Raises:
            BadInput: no such preset or block, a count that does not fit, or something that is no number.
        """
        pieces = [piece for piece in re.split(r"[,\s]+", text.strip()) if piece]
        if not pieces:
            raise BadInput(
                "block rates are empty; give numbers, a preset, or pairs such as 'IN04:0.3,OUT*:0.5'"
            )
        if all(":" not in piece for piece in pieces) and (len(pieces) > 1 or _is_number(pieces[0])):
            return cls(vector([_number(piece) for piece in pieces], blocks), rest)
        values: dict[str, float] = {}
        note = ""
        if ":" not in pieces[0]:
            values = preset(pieces[0], blocks)
            if blocks.counts == UNET_XL:
                note = (
                    f"the preset {pieces[0].upper()} is for 12 + 1 + 12 blocks; these are those that SDXL has"
                )
            pieces = pieces[1:]
        named = _pairs(pieces, blocks)
        return cls(values | named, rest, frozenset(named), note)

    @property
    def text(self) -> str:
        """The same as pairs, which :meth:`parse` reads back."""
        return ",".join(f"{block}:{rate!r}" for block, rate in self.values.items())


def _pairs(pieces: Sequence[str], blocks: Blocks) -> dict[str, float]:
    """``IN04:0.3`` and ``OUT*:0.5``; a name goes before a pattern, wherever they stand."""
    known = (BASE, *blocks.names)
    exact: dict[str, float] = {}
    wide: dict[str, float] = {}
    for piece in pieces:
        name, colon, number = piece.partition(":")
        if not colon:
            raise BadInput(f"block rate {piece!r} is no pair such as 'IN04:0.3'")
        name, into = name.strip().upper(), exact
        found = [block for block in known if fnmatchcase(block, name)]
        if not found:
            raise BadInput(f"no block {name!r} in this model, which has {blocks}{nearest(name, known)}")
        if found != [name]:
            into = wide
        for block in found:
            if block in into:
                raise BadInput(f"two rates for the block {block}: {into[block]!r} and {number!r}")
            into[block] = _number(number)
    return wide | exact


def vector(numbers: Sequence[float], blocks: Blocks) -> dict[str, float]:
    """Numbers in the network's order to the blocks that they are for.

    Raises:
        BadInput: neither as many as there are blocks, nor one more, nor a short form.
    """
    names: list[str] | None = None
    if len(numbers) == len(blocks.names):
        names = list(blocks.names)
    elif len(numbers) == len(blocks.names) + 1:
        names = [BASE, *blocks.names]
    elif (short := ATTENDING.get(blocks.counts)) and len(numbers) == len(short) + 1:
        names = [BASE, *short]
    if names is None or not blocks.names:
        count = len(blocks.names)
        raise BadInput(
            f"{len(numbers)} block rates do not fit this model, which has {blocks}: "
            + (f"give {count}, or {count + 1} with BASE first" if count else "give one alpha")
        )
    return dict(zip(names, numbers, strict=True))


def preset(name: str, blocks: Blocks) -> dict[str, float]:
    """A preset's rates, with ``BASE`` as published.

    Raises:
        BadInput: no such preset, or a model with other blocks than those of Stable Diffusion 1, 2 or XL.
    """
    made = PRESETS.get(name.upper())
    short = SHORT_PRESETS.get(name.upper())
    if made is None and short is None:
        known = {*PRESETS, *SHORT_PRESETS}
        raise BadInput(f"unknown preset of block rates {name!r}{_close(name.upper(), known)}")
    if blocks.counts not in ((UNET, UNET_XL) if made else (UNET,)):
        fits = "Stable Diffusion 1, 2 and XL" if made else "Stable Diffusion 1 and 2"
        raise BadInput(f"the preset {name.upper()} is for {fits}; this model has {blocks}")
    if made is None:
        assert short is not None
        return vector(short, blocks)
    whole = dict(zip((BASE, *_WHOLE), made, strict=True))
    return {block: whole[block] for block in (BASE, *blocks.names)}


def _close(name: str, known: Iterable[str]) -> str:
    lower = {each.lower(): each for each in known}
    hint = nearest(name.lower(), lower)
    return (
        re.sub(r"'(.*)'", lambda found: f"'{lower[found[1]]}'", hint)
        if "did you mean" in hint
        else hint.upper()
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> float:
    value = float(text) if _is_number(text) else math.nan
    if not math.isfinite(value):
        raise BadInput(f"block rate {text!r} is not a number")
    return value


# -- presets ---------------------------------------------------------------------------------------------------------

_WHOLE = (*(f"IN{i:02d}" for i in range(12)), "M00", *(f"OUT{i:02d}" for i in range(12)))


def _curve(at: Callable[[float], float], base: float = 0.0) -> tuple[float, ...]:
    """A function of depth, 0 at the first block and 1 at the last."""
    return (base, *(round(at(i / 24), 12) for i in range(25)))  # the last bits may lead beyond 0 and 1


def _runs(*pieces: tuple[float, int]) -> tuple[float, ...]:
    """Values with how often each follows."""
    return (0.0, *(value for value, times in pieces for _ in range(times)))


def _fold(t: float) -> float:
    """Up from 0 to 1, down again, and so on."""
    return 1 - abs(1 - t % 2)


def _smooth(x: float) -> float:
    return x * x * (3 - 2 * x)


def _presets() -> dict[str, tuple[float, ...]]:
    made = {
        "GRAD_V": _curve(lambda x: abs(2 * x - 1)),
        "GRAD_A": _curve(lambda x: 1 - abs(2 * x - 1)),
        "FLAT_25": _curve(lambda _: 0.25),
        "FLAT_75": _curve(lambda _: 0.75),
        **{f"WRAP{2 * n:02d}": _runs((1, n), (0, 25 - 2 * n), (1, n)) for n in (4, 6, 7, 8)},
        "MID12_50": _runs((0, 5), (0.5, 14), (0, 6)),
        "OUT07": _runs((0, 18), (1, 7)),
        "OUT12": _runs((0, 13), (1, 12)),
        "OUT12_5": _runs((0, 12), (0.5, 1), (1, 12)),
        "RING08_SOFT": _runs((0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5)),
        "RING08_5": _runs((0, 6), (1, 4), (0, 5), (1, 4), (0, 6)),
        "RING10_5": _runs((0, 5), (1, 5), (0, 5), (1, 5), (0, 5)),
        "RING10_3": _runs((0, 6), (1, 5), (0, 3), (1, 5), (0, 6)),
        "SMOOTHSTEP": _curve(_smooth),
        "REVERSE-SMOOTHSTEP": _curve(lambda x: 1 - _smooth(x)),
        "COSINE": _curve(lambda x: (1 + math.cos(math.pi * x)) / 2),
        "REVERSE_COSINE": _curve(lambda x: (1 - math.cos(math.pi * x)) / 2),
        # The first number of the published list is 0, where its polynomial has 1/24.
        "TRUE_CUBIC_HERMITE": _curve(lambda x: _cubic(77, x) + 1 / 24 if x else 0.0),
        "TRUE_REVERSE_CUBIC_HERMITE": _curve(lambda x: 1 - _cubic(77, x) - 1 / 24 if x else 1.0),
        "FAKE_CUBIC_HERMITE": _curve(lambda x: _cubic(76, x)),
        "FAKE_REVERSE_CUBIC_HERMITE": _curve(lambda x: 1 - _cubic(76, x)),
        "ALL_A": _curve(lambda _: 0.0),
        "ALL_B": _curve(lambda _: 1.0, base=1.0),
    }
    for n in (2, 3, 4):
        made[f"SMOOTHSTEP*{n}"] = _curve(partial(_higher, n))
        made[f"SMOOTHSTEP/{n}"] = _curve(partial(_oftener, n))
    for name in [name for name in made if name.startswith("SMOOTHSTEP") and name != "SMOOTHSTEP"]:
        made[f"R_{name}"] = _runs(*((1 - value, 1) for value in made[name][1:]))
    return made


def _cubic(n: int, x: float) -> float:
    return n / 12 * x**3 - n / 8 * x**2 + 25 / 6 * x


def _higher(n: int, x: float) -> float:
    return _fold(n * _smooth(x))


def _oftener(n: int, x: float) -> float:
    return _smooth(_fold(n * x))


PRESETS: Mapping[str, tuple[float, ...]] = _presets()
"""26 numbers each, ``BASE`` first."""

SHORT_PRESETS: Mapping[str, tuple[float, ...]] = {
    name: tuple(map(float, digits))
    for name, digits in {
        "NONE": "00000000000000000", "ALL": "11111111111111111", "INS": "11110000000000000",
        "IND": "10001110000000000", "INALL": "11111110000000000", "MIDD": "10001111111100000",
        "OUTD": "10000000111100000", "OUTS": "10000000000011111", "OUTALL": "10000000111111111",
    }.items()
} | {"ALL0.5": (0.5,) * 17}  # fmt: skip
"""17 numbers each, of LoRA Block Weight: ``BASE`` and the blocks with attention."""
