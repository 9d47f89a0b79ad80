"""The engine: it holds any number of requests, answers what they ask in shared batches, and tells what happens.

Each picture of a request is a coroutine (:mod:`draw`) that yields rows for the network. A round gathers the rows of
all pictures that fit together (same shapes), runs them as one forward, and sends the answers back. So requests with
different solvers, step counts, guidance and prompts share batches, and join and leave between steps. One request at
the command line is an engine with one request in it; there is no second path.

Two modes: ``exact`` runs every row by itself, so that a picture has the same bits alone and in company; ``fast`` runs
rows together and lets kernels round as they like (differences of a few units in the last place of the network).

What is tried when memory is full is the :mod:`ladder`'s affair. A picture for which nothing helps is lost alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from sumuk.base.errors import BadInput, Cancelled, OutOfMemory, SumukError, nearest
from sumuk.diffusion.guidance import Row
from sumuk.diffusion.sample import Moved
from sumuk.generate.control import at_work
from sumuk.generate.draw import Condition, draw, preview
from sumuk.generate.ladder import Ladder, Rung
from sumuk.generate.pixels import keep_outside, to_image
from sumuk.generate.receipt import make_receipt
from sumuk.generate.request import Request
from sumuk.generate.settings import Settings, resolve
from sumuk.generate.wear import dressed
from sumuk.weights.model import Model

Mode = Literal["exact", "fast"]


@dataclass(frozen=True)
class Event:
    """Something happened to picture ``image`` (from 0) of request ``job``."""

    job: int
    image: int


@dataclass(frozen=True)
class Progress(Event):
    step: int
    steps: int
    seconds: float
    """Since the picture was begun."""


@dataclass(frozen=True)
class Preview(Event):
    step: int
    picture: Image.Image


@dataclass(frozen=True)
class Finished(Event):
    picture: Image.Image
    receipt: dict[str, Any]


@dataclass(frozen=True)
class Failed(Event):
    """The picture will not come, the others will; ``error`` is :class:`Cancelled` when it was stopped on request."""

    error: Exception


@dataclass(eq=False)
class _Track:
    """One picture on its way."""

    job: int
    image: int
    model: Model
    settings: Settings
    ladder: Ladder
    coroutine: Generator[list[Row] | Moved, Any, Tensor]
    began: float = field(default_factory=time.perf_counter)
    asked: list[Row] | None = None
    cancelled: bool = False


class Engine:
    """Draws for one loaded model.

    Args:
        model: what :func:`sumuk.load` returned.
        mode: see above; None takes ``exact`` on a CPU and ``fast`` elsewhere.
        most_rows: rows of one forward in fast mode.

    Attributes:
        model: draws what is submitted from now on. It may be replaced between rounds, by one with other guests too:
            a picture keeps the model that it was begun with.
        rows_at_once: for how many rows a forward has room.
        forwards, rows_answered: forwards that were run, and rows in them.

    Raises:
        BadInput: an unknown mode, most_rows below 1.
    """

    def __init__(self, model: Model, *, mode: Mode | None = None, most_rows: int = 16) -> None:
        if most_rows < 1:
            raise BadInput(f"most_rows {most_rows} is below 1")
        if mode is not None and mode not in get_args(Mode):
            raise BadInput(f"unknown mode {mode!r}{nearest(str(mode), get_args(Mode))}")
        self.model = model
        self.mode: Mode = mode or ("exact" if torch.device(model.device).type == "cpu" else "fast")
        self.rows_at_once = 1 if self.mode == "exact" else most_rows
        self.forwards = self.rows_answered = 0
        self._ladder = Ladder()
        self._tracks: list[_Track] = []
        self._jobs = itertools.count()

    @property
    def escalations(self) -> dict[Rung, int]:
        """How often each rung of the ladder against full memory was climbed."""
        return self._ladder.climbed

    @property
    def row_room(self) -> int:
        """For how many rows there was room in all forwards; ``rows_answered`` of them were used."""
        return self.forwards * self.rows_at_once

    def submit(self, request: Request, *, only: Collection[int] | None = None) -> int:
        """Take a request in; it joins the next round.

        Args:
            request: what to draw.
            only: which of its pictures, from 0; None: all.

        Raises:
            SumukError: a value of the request does not fit the model; nothing was taken in.
        """
        settings = resolve(request, self.model)
        images = range(request.count) if only is None else sorted({*only})
        if strange := [image for image in images if not 0 <= image < request.count]:
            raise BadInput(f"a request for {request.count} pictures (from 0) has no picture {strange[0]}")
        job = next(self._jobs)
        for image in images:
            ladder = Ladder(self.escalations)
            coroutine = draw(self.model, settings, image, ladder)
            self._tracks.append(_Track(job, image, self.model, settings, ladder, coroutine))
        return job

    def cancel(self, job: int) -> None:
        """Stop a request within one step; its pictures end as :class:`Failed` with :class:`Cancelled`."""
        for track in self._tracks:
            track.cancelled = track.cancelled or track.job == job

    @property
    def idle(self) -> bool:
        return not self._tracks

    def events(self) -> Iterator[Event]:
        """Work until nothing is left; requests may be submitted and cancelled between events."""
        while self._tracks:
            yield from self.round()

    def round(self) -> list[Event]:
        """One forward for everyone who waits, and what came of it.

        Raises:
            Exception: one that says that the device is lost to this process, and every picture with it.
        """
        events: list[Event] = []
        with torch.inference_mode():
            for track in list(self._tracks):
                if track.cancelled:
                    self._drop(track, Cancelled(f"request {track.job} was cancelled"), events)
                elif track.asked is None:
                    self._advance(track, None, events)
            waiting = [track for track in self._tracks if track.asked]
            rows = [row for track in waiting for row in track.asked or ()]
            outputs = iter(self._forward(rows))
            for track in waiting:
                answers = [next(outputs) for _ in track.asked or ()]
                if wrong := next((each for each in answers if isinstance(each, Exception)), None):
                    self._drop(track, wrong, events)
                else:
                    self._advance(track, answers, events)
        return events

    def _forward(self, rows: list[Row]) -> list[Tensor | Exception]:
        """The network's raw outputs for rows in their order; rows of equal shapes share a forward."""
        groups: dict[Any, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault((row.x.shape, row.condition.key), []).append(index)
        outputs: dict[int, Tensor | Exception] = {}
        for members in groups.values():
            for start in range(0, len(members), self.rows_at_once):
                some = members[start : start + self.rows_at_once]
                answers = self._ladder.answer([rows[i] for i in some], self._run)
                outputs |= zip(some, answers, strict=True)
        return [outputs[index] for index in range(len(rows))]

    def _run(self, rows: Sequence[Row]) -> list[Tensor]:
        """One forward."""
        asked: Condition = rows[0].condition
        network = asked.networks[0]
        parameter = next(network.parameters())
        device, dtype = parameter.device, parameter.dtype
        x = torch.cat([row.x for row in rows]).to(device, dtype)
        wide = torch.cat([row.condition.widen(row.x) for row in rows]).to(device, dtype)
        time_ = torch.tensor([row.level.time for row in rows], device=device, dtype=torch.float32)
        inputs = Condition.stack([row.condition for row in rows], device, dtype)
        steered, outfits = zip(*((row.condition.steered, row.condition.outfit) for row in rows), strict=True)
        with (
            dressed(asked.network, network, outfits),
            at_work(asked.model, steered, x, time_, inputs) as extra,
        ):
            output = network(wide, time_, **inputs, **extra, **dict(asked.options))
        self.forwards += 1
        self.rows_answered += len(rows)
        # A network that also predicts a variance appends its channels; no solver here uses it.
        return list(output[:, : x.shape[1]].to("cpu", torch.float32).split(1))

    def _advance(self, track: _Track, reply: Any, events: list[Event]) -> None:
        """Send answers to a picture's coroutine until it asks again or ends."""
        try:
            while True:
                event = track.coroutine.send(reply)
                reply = None
                if not isinstance(event, Moved):
                    track.asked = event
                    return
                events.append(
                    Progress(
                        track.job, track.image, event.step, event.steps, time.perf_counter() - track.began
                    )
                )
                every = track.settings.request.preview
                if every and event.step % every == 0 and event.clean is not None and event.step < event.steps:
                    self._show(track, event.step, event.clean, events)
        except StopIteration as stop:
            try:
                finished = self._finish(track, stop.value)
            except Exception as error:
                self._drop(track, error, events)
            else:
                self._tracks.remove(track)
                events.append(finished)
        except Exception as error:  # whatever it is, the other pictures have nothing to do with it
            self._drop(track, error, events)

    def _show(self, track: _Track, step: int, clean: Tensor, events: list[Event]) -> None:
        """A preview, if there is one, and memory for it."""
        with suppress(OutOfMemory):
            shown = track.ladder.climb(self.model.device, partial(preview, track.model, clean))
            if shown is not None:
                events.append(Preview(track.job, track.image, step, to_image(shown)))

    def _finish(self, track: _Track, pixels: Tensor) -> Finished:
        if not torch.isfinite(pixels).all():
            raise SumukError(
                f"the network's numbers overflowed in {str(track.model.dtype).removeprefix('torch.')}; "
                "load the model in bfloat16 or float32, or lower guidance and weights of the prompt"
            )
        drawn = keep_outside(to_image(pixels), track.settings.request)
        receipt = make_receipt(
            track.model, track.settings, track.image, drawn, self.mode, tiled=track.ladder.tiled
        )
        return Finished(track.job, track.image, drawn, receipt)

    def _drop(self, track: _Track, error: Exception, events: list[Event]) -> None:
        track.coroutine.close()
        self._tracks.remove(track)
        events.append(Failed(track.job, track.image, track.ladder.verdict(error, self.model.device)))
