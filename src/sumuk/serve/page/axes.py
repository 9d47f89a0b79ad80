"""The axes of a compare grid: what can differ between its pictures, and how the values are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sumuk.serve.page.form import Form
from sumuk.serve.page.words import Words
from sumuk.serve.trouble import refused

MOST = 64
"""Pictures of one grid."""
LORA = re.compile(r"(<lora:[^:>]+:)([^:>]+)")
_RANGE = re.compile(r"(-?[\d.]+)\s*-\s*(-?[\d.]+)\s*:\s*([\d.]+)")


@dataclass(frozen=True)
class Axis:
    """Something that differs.

    Attributes:
        word: what it is called, in the table of words.
        put: makes the fields of one value from those of Create.
        usual: values that are proposed.
        read: makes a value of its text; None: the text is the value.
    """

    word: str
    put: Callable[[Form, Any], Form]
    usual: str = ""
    read: Callable[[str], int | float] | None = None


def _field(name: str) -> Callable[[Form, Any], Form]:
    return lambda form, value: form | {name: value}


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


AXES: dict[str, Axis] = {
    "solver": Axis("solver", _field("solver")),
    "steps": Axis("steps", _field("steps"), "5, 10, 20, 30", int),
    "guidance": Axis("guidance", _field("guidance"), "1, 4, 7, 10", _number),
    "seed": Axis("seed", lambda form, value: form | {"seed": str(value)}, "1, 2, 3", int),
    "model": Axis("model", _field("model")),
    "prompt": Axis("prompt", _field("prompt")),
    "strength": Axis("axis:strength", _field("strength"), "0.3, 0.5, 0.7, 0.9", _number),
    "lora": Axis(
        "axis:lora",
        lambda form, value: form | {"prompt": LORA.sub(rf"\g<1>{value:g}", form["prompt"])},
        "0, 0.5, 1",
        _number,
    ),
}


def values_of(name: str, written: str, words: Words) -> list[Any]:
    """The values of an axis.

    Args:
        name: of :data:`AXES`.
        written: one a line; numbers also with commas between, or as a range such as ``10-30:5``.
        words: for what is wrong.

    Raises:
        Refused: there are none, or one is no number.
    """
    axis = AXES[name]
    pieces = re.split(r"\n" if axis.read is None else r"[\n,]", written)
    found: list[Any] = []
    for piece in filter(None, map(str.strip, pieces)):
        try:
            found += [piece] if axis.read is None else _numbers(piece, axis.read)
        except ValueError:
            said = words("not-a-number", value=piece[:60], axis=words(axis.word))
            raise refused("bad-value", said) from None
    if not found:
        raise refused("bad-value", words("no-values", axis=words(axis.word)))
    return list(dict.fromkeys(found))


def _numbers(piece: str, read: Callable[[str], int | float]) -> list[int | float]:
    if not (found := _RANGE.fullmatch(piece)):
        return [read(piece)]
    low, high, step = (read(each) for each in found.groups())
    if step <= 0 or (high - low) / step > MOST:
        raise ValueError
    return [round(low + turn * step, 6) for turn in range(int((high - low) / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Plan:
    """A grid that is to be drawn.

    Attributes:
        across, down: name and values of each axis; ``none`` with one value where there is none.
        cells: the fields of each picture, row by row.
    """

    across: tuple[str, list[Any]]
    down: tuple[str, list[Any]]
    cells: list[list[Form]]


def planned(form: Form, across: tuple[str, str], down: tuple[str, str], words: Words) -> Plan:
    """The grid that two axes and their values span, over the fields of Create.

    Raises:
        Refused: an axis has no values, would do nothing, or there are too many pictures.
    """
    axes = []
    for name, written in (across, down):
        axes.append((name, [None] if name == "none" else values_of(name, written, words)))
        if name == "strength" and not form["start"]:
            raise refused("bad-value", words("no-start"))
    (first, columns), (second, rows) = axes
    if first == second != "none":
        raise refused("bad-value", words("same-axes", axis=words(AXES[first].word)))
    if len(columns) * len(rows) > MOST:
        raise refused("bad-value", words("too-many-cells", count=len(columns) * len(rows), most=MOST))

    def changed(form: Form, name: str, value: Any) -> Form:
        return form if name == "none" else AXES[name].put(form, value)

    # The weight of a LoRA comes last, into the prompt that the other axis may have put there.
    order = sorted(((first, 0), (second, 1)), key=lambda axis: axis[0] == "lora")
    cells: list[list[Form]] = []
    for row in rows:
        cells.append([])
        for column in columns:
            cell = form | {"count": 1}
            for name, place in order:
                if name == "lora" and not LORA.search(cell["prompt"]):
                    raise refused("bad-value", words("no-lora"))
                cell = changed(cell, name, (column, row)[place])
            cells[-1].append(cell)
    return Plan((first, columns), (second, rows), cells)
