"""What goes between the front and what draws: plain values that can be pickled.

To the worker: :class:`Ask` (answered by :class:`Answer`), :class:`Draw`, :class:`Stop`. From it, of its own accord:
:class:`Stepped`, :class:`Shown`, :class:`Drawn`, :class:`Lost` for a job's pictures; :class:`Loading`, :class:`Loaded`,
:class:`Vitals` for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sumuk.serve.order import Order
from sumuk.serve.trouble import Trouble

Verb = Literal["check", "catalogue", "describe", "choices", "load"]


@dataclass(frozen=True)
class Ask:
    """A question: ``check`` an Order, the ``catalogue``, ``describe`` or ``load`` an entry by its name, ``choices``."""

    number: int
    verb: Verb
    about: Any = None


@dataclass(frozen=True)
class Answer:
    number: int
    value: Any = None
    trouble: Trouble | None = None


@dataclass(frozen=True)
class Draw:
    """Draw a job's pictures, but those that are ``done`` already."""

    job: str
    order: Order
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stop:
    """A job is not wanted any more; its pictures end as :class:`Lost` with ``cancelled``, within one step."""

    job: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The answer to ``check``: the order can be drawn.

    Attributes:
        model: the name of the checkpoint that draws it.
        count: of pictures.
        cost: pixels x steps x rows, all pictures together.
        steps: of one picture.
        width, height: of the first pass.
        sure: False where the model was not loaded, so that the order is checked again when it is drawn.
    """

    model: str
    count: int
    cost: float
    steps: int
    width: int
    height: int
    sure: bool = True


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file that the server offers, by name.

    Attributes:
        name: by which orders ask for it.
        sort: ``model``, ``lora``, ``hypernet``, ``embedding``, ``vae``, ``control``, or ``other``.
        kind: ``sd1/text-to-image``, ``lora/sdxl``, ...
        title: in words.
        file: its name within the shelf, never an absolute path.
        size: bytes.
        loaded: whether it is in memory now.
        licence: identifier or name; empty: unknown.
        sha256: where it is known already.
    """

    name: str
    sort: str
    kind: str
    title: str
    file: str
    size: int
    loaded: bool = False
    licence: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class OfJob:
    """Something happened to picture ``image`` (from 0) of a job."""

    job: str
    image: int


@dataclass(frozen=True)
class Stepped(OfJob):
    step: int
    steps: int


@dataclass(frozen=True)
class Shown(OfJob):
    """A preview: a whole JPEG."""

    step: int
    jpeg: bytes


@dataclass(frozen=True)
class Drawn(OfJob):
    """A finished picture: a whole PNG with its receipt inside."""

    png: bytes
    receipt: dict[str, Any]


@dataclass(frozen=True)
class Lost(OfJob):
    """The picture will not come."""

    trouble: Trouble


@dataclass(frozen=True)
class Loading:
    model: str


@dataclass(frozen=True)
class Loaded:
    model: str
    seconds: float
    size: int
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """How the worker does, once a second while it works.

    Attributes:
        pictures: that are being drawn now.
        rounds: since the last one.
        round_seconds: of them together.
        rows: that were answered in them.
        row_room: how many there was room for in their forwards (rows / row_room: batch fill).
        resident: bytes of the process in memory.
        device_memory: bytes taken on the device; 0 on a CPU.
        models: names of those in memory.
        escalations: how often each rung of the ladder against full memory was climbed.
    """

    pictures: int = 0
    rounds: int = 0
    round_seconds: float = 0.0
    rows: int = 0
    row_room: int = 0
    resident: int = 0
    device_memory: int = 0
    models: tuple[str, ...] = ()
    escalations: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Died:
    """The worker is gone, with all it was drawing; another one is being started if ``again``.

    ``killed``: somebody put an end to it from outside (SIGKILL): a person, or a system that has run out of memory.
    """

    why: str
    again: bool = True
    killed: bool = False


Told = Stepped | Shown | Drawn | Lost | Loading | Loaded | Vitals | Died
