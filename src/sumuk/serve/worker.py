"""The process that owns the device: it draws what the front orders, and tells what becomes of it.

Four threads: this one goes round the engines and touches the device; one reads what the front says; one answers its
questions, which need no device, so that an order is checked while a forward runs; one loads models. Pictures are made
into files by a fifth. When the front is gone, so is this process: nobody would hear of its pictures.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from sumuk.generate import engine
from sumuk.generate.receipt import write_png
from sumuk.generate.request import Request
from sumuk.generate.settings import resolve
from sumuk.memory.pressure import is_poisoned
from sumuk.serve.config import ServeConfig
from sumuk.serve.logs import set_up
from sumuk.serve.offered import Offered, choices
from sumuk.serve.order import Order
from sumuk.serve.pricing import check, request_of
from sumuk.serve.residents import Resident, Residents
from sumuk.serve.trouble import Trouble, trouble_of
from sumuk.serve.vitals import Gauge, counts
from sumuk.serve.wire import (
    Answer,
    Ask,
    Draw,
    Drawn,
    Loaded,
    Loading,
    Lost,
    Shown,
    Stepped,
    Stop,
)
from sumuk.weights.licences import everything, warning
from sumuk.weights.model import Model

log = logging.getLogger("sumuk.serve.worker")

POISONED = 70
"""Exit code of a worker whose device is lost to it."""
LIGHT = 20_000_000
"""Parameters of an autoencoder that is quick enough to show previews with."""


@dataclass
class _Job:
    """A job at work: where it is drawn, under which number, and which pictures are still to come."""

    draw: Draw
    resident: Resident | None = None
    number: int | None = None
    left: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Came:
    """A model that a job waited for, or why it did not come."""

    job: str
    found: Resident | Exception


class Worker:
    """Draws for the front.

    Args:
        config: of the server.
        send: takes values of :mod:`~sumuk.serve.wire`; may be called from any thread.
    """

    def __init__(self, config: ServeConfig, send: Callable[[Any], None]) -> None:
        self._send = send
        self._config = config
        self._offered = Offered(config)
        self._residents = Residents(config, self._offered, self._loading)
        self._inbox: queue.SimpleQueue[Draw | Stop | _Came] = queue.SimpleQueue()
        self._asked = ThreadPoolExecutor(1, "answers")
        self._filing = ThreadPoolExecutor(1, "files")
        self._jobs: dict[str, _Job] = {}
        self._engines: dict[Resident, dict[int, str]] = {}
        self._vitals = Gauge()

    def begin(self) -> None:
        """Bring the usual model in; a server without it is told why, and is none."""

        def came(found: Resident | Exception) -> None:
            if isinstance(found, Exception):
                self._send(self._told(found, self._offered.usual))

        self._residents.want((self._offered.usual, None, None), came)

    # -- what the front says ---------------------------------------------------------------------------------------

    def hear(self, said: Ask | Draw | Stop) -> None:
        """Take what the front says; returns at once."""
        if isinstance(said, Ask):
            self._asked.submit(self._answer, said)
        else:
            self._inbox.put(said)

    def _answer(self, ask: Ask) -> None:
        verbs: dict[str, Callable[[Any], Any]] = {
            "check": lambda order: check(order, self._offered, self._residents),
            "catalogue": lambda _: self._catalogue(),
            "describe": self._offered.describe,
            "choices": lambda _: choices(),
        }
        try:
            if ask.verb == "load":
                key = self._residents.key(Order(values={}, model=ask.about))
                self._residents.want(key, lambda found: self._arrived(ask.number, found))
            else:
                self._send(Answer(ask.number, verbs[ask.verb](ask.about)))
        except Exception as error:
            self._send(Answer(ask.number, trouble=self._told(error, f"{ask.verb} {ask.about!r:.200}")))

    def _arrived(self, number: int, found: Resident | Exception) -> None:
        bad = self._told(found, "load") if isinstance(found, Exception) else None
        self._send(Answer(number, trouble=bad))

    def _catalogue(self) -> list[Any]:
        here = {key[0] for key in [*self._residents.here]}  # a copy: models come in another thread
        return [
            replace(each, loaded=each.sort == "model" and each.name in here)
            for each in self._offered.entries()
        ]

    # -- the round -------------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Go round the engines for ever; if the device or our mind is lost, the process is."""
        try:
            self.run()
        except BaseException as error:
            poisoned = isinstance(error, Exception) and is_poisoned(error)
            log.critical("the worker stops: %s", error, exc_info=error)
            os._exit(POISONED if poisoned else 1)

    def run(self) -> None:
        """Go round the engines for ever."""
        while True:
            self._take()
            for resident in [*self._engines]:
                began, before = time.perf_counter(), counts(resident)
                for event in resident.engine.round():
                    self._tell(resident, event)
                self._vitals.add(time.perf_counter() - began, before, counts(resident))
                if resident.engine.idle:
                    del self._engines[resident]
            if self._vitals.due:
                self._send(self._vitals.report(self._drawing(), self._residents))

    def _drawing(self) -> int:
        return sum(len(job.left) for job in self._jobs.values() if job.number is not None)

    def _take(self) -> None:
        """Everything that was said since the last round; waits where there is nothing to draw."""
        while True:
            try:
                said = self._inbox.get(block=not self._engines, timeout=None)
            except queue.Empty:
                return
            if isinstance(said, Draw):
                self._begin(said)
            elif isinstance(said, Stop):
                self._stop(said.job)
            else:
                self._came(said)

    def _begin(self, draw: Draw) -> None:
        job = self._jobs[draw.job] = _Job(draw, left=set(range(_count(draw.order))) - {*draw.done})
        try:
            key = self._residents.key(draw.order)
        except Exception as error:
            self._lose(job, self._told(error, draw.job))
            return
        here = self._residents.get(key)
        if here is not None:
            self._came(_Came(draw.job, here))
        else:
            self._residents.want(key, lambda found: self._inbox.put(_Came(draw.job, found)))

    def _came(self, came: _Came) -> None:
        job = self._jobs.get(came.job)
        if job is None or job.number is not None:
            return
        if isinstance(came.found, Exception):
            self._lose(job, self._told(came.found, came.job))
            return
        try:
            request = request_of(job.draw.order)
            came.found.engine.model = model = came.found.dress(request, self._offered)
            request = self._shown(request, model) if job.draw.order.shown else request
            job.number = came.found.engine.submit(request, only=job.left)
        except Exception as error:
            self._lose(job, self._told(error, came.job))
            return
        job.resident = came.found
        self._engines.setdefault(came.found, {})[job.number] = came.job

    def _shown(self, request: Request, model: Model) -> Request:
        """The request with previews for who looks on, where they cost little and it says nothing of them."""
        every = self._config.preview
        if request.preview or not every:
            return request
        networks = model.networks
        painter = networks.get("tiny_decoder") or networks.get("previewer") or networks.get("vae")
        if painter is not None and sum(p.numel() for p in painter.parameters()) > LIGHT:
            return request
        steps = resolve(request, model).walked
        return request.model_copy(update={"preview": every}) if steps > every else request

    def _stop(self, name: str) -> None:
        job = self._jobs.get(name)
        if job is None:
            return
        if job.resident is not None and job.number is not None:
            job.resident.engine.cancel(job.number)
        else:
            self._lose(job, Trouble("cancelled", "the job was cancelled"))

    def _tell(self, resident: Resident, event: engine.Event) -> None:
        name = self._engines[resident].get(event.job)
        job = self._jobs.get(name or "")
        if name is None or job is None:
            return
        if isinstance(event, engine.Progress):
            self._send(Stepped(name, event.image, event.step, event.steps))
        elif isinstance(event, engine.Preview):
            self._filing.submit(self._show, name, event)
        elif isinstance(event, engine.Finished):
            self._filing.submit(self._file, name, event)
            self._leave(job, event.image)
        elif isinstance(event, engine.Failed):
            trouble = self._told(event.error, name)
            self._filing.submit(self._send, Lost(name, event.image, trouble))  # behind what came before it
            self._leave(job, event.image)

    def _leave(self, job: _Job, image: int) -> None:
        job.left.discard(image)
        if not job.left:
            del self._jobs[job.draw.job]
            if job.resident is not None and job.number is not None:
                self._engines[job.resident].pop(job.number, None)

    def _lose(self, job: _Job, trouble: Trouble) -> None:
        for image in sorted(job.left):
            self._send(Lost(job.draw.job, image, trouble))
        job.left.clear()
        self._jobs.pop(job.draw.job, None)

    # -- what is told ----------------------------------------------------------------------------------------------

    def _file(self, name: str, event: engine.Finished) -> None:
        file = io.BytesIO()
        try:
            write_png(event.picture, event.receipt, file)
        except Exception as error:
            self._send(Lost(name, event.image, self._told(error, name)))
        else:
            self._send(Drawn(name, event.image, file.getvalue(), event.receipt))

    def _show(self, name: str, event: engine.Preview) -> None:
        file = io.BytesIO()
        event.picture.convert("RGB").save(file, "JPEG", quality=85)
        self._send(Shown(name, event.image, event.step, file.getvalue()))

    def _loading(self, what: str, name: str, about: Any) -> None:
        if what == "loading":
            self._send(Loading(name))
        elif what == "loaded":
            licence = everything(about.model).licence
            if careful := warning(licence):
                log.warning("%s: %s", name, careful)
            self._send(Loaded(name, about.seconds, about.size, licence.name))

    def _told(self, error: BaseException, what: str) -> Trouble:
        trouble = trouble_of(error)
        if trouble.status >= 500:
            log.error("%s: %s", what, error, exc_info=error if trouble.type == "internal" else None)
        return replace(trouble, detail=self._offered.inside(trouble.detail))


def _count(order: Order) -> int:
    count = order.values.get("count", 1)
    return count if isinstance(count, int) else 1


def work(config: ServeConfig, connection: Connection) -> None:
    """The whole life of a worker process."""
    # Who stops the front stops this too, by its silence; a signal to the whole group is the front's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_up(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    lock = threading.Lock()

    def send(value: Any) -> None:
        with lock:
            try:
                connection.send(value)
            except OSError:
                os._exit(0)

    try:
        worker = Worker(config, send)
    except Exception as error:
        send(trouble_of(error))
        return
    send(None)  # it answers questions from now on
    worker.begin()

    def listen() -> None:
        while True:
            try:
                worker.hear(connection.recv())
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=listen, name="front", daemon=True).start()
    worker.live()
