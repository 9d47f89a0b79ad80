"""Models in memory: brought in when an order wants them, let go when others need the room.

Worker side. A resident is a model with its engine. Adapters that orders name are put on it as they come, sharing its
networks, so that requests with different LoRAs still meet in one batch.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sumuk.base.errors import BadFile, BadInput, MissingFile, OutOfMemory, SumukError
from sumuk.files.safetensors import stamp
from sumuk.files.tensors import torch_dtype
from sumuk.generate.engine import Engine
from sumuk.generate.prompt import parse
from sumuk.generate.request import Request
from sumuk.generate.tags import may_name
from sumuk.serve.config import ServeConfig
from sumuk.serve.offered import Offered
from sumuk.serve.order import Order
from sumuk.weights.checkpoint import load
from sumuk.weights.control import load_control
from sumuk.weights.guests import with_guests
from sumuk.weights.inspect import open as look
from sumuk.weights.model import Model

log = logging.getLogger("sumuk.serve.worker")

TRIES = 3
"""How often a file is read again after an error of the disk or the net that it lies on."""
PAUSE = 0.5
"""Seconds before the second try; the third waits twice as long."""
MOST_GUESTS = 32
"""Adapters that stay on a model after use."""
TABLES = {"lora": "loras", "hypernet": "hypernets", "embedding": "embeddings", "control": "controls"}

Key = tuple[str, str | None, str | None]
"""Names of the model, its autoencoder and its refiner."""


@dataclass(eq=False)
class Resident:
    """A model in memory.

    Attributes:
        key: what it was asked for as.
        model: grows by the adapters that orders name.
        engine: draws with it.
        size: bytes of its parameters.
        used: when it was last wanted.
        leaving: no order is begun with it any more, as another model needs the room.
    """

    key: Key
    model: Model
    engine: Engine
    size: int
    seconds: float
    used: float = field(default_factory=time.monotonic)
    leaving: bool = False
    _guests: OrderedDict[tuple[str, str], tuple[int, ...]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def dress(self, request: Request, offered: Offered) -> Model:
        """Put on the model what a request names and it does not have yet.

        Returns:
            The model for this request: without the controls of others, which receipts would name.

        Raises:
            SumukError: something is not there, or made for another model.
        """
        with self._lock:
            for sort, name in sorted(self._named(request, offered)):
                path = offered.find(name, sort)
                now = stamp(path)
                known = self._guests.get((sort, name))
                if known != now:
                    self._put(sort, name, path, fresh=known is not None)
                    self._guests[sort, name] = now
                self._guests.move_to_end((sort, name))
            while len(self._guests) > MOST_GUESTS:
                (sort, name), _ = self._guests.popitem(last=False)
                self._drop(sort, name)
            wanted = {each.control for each in request.steer}
            controls = {name: each for name, each in self.model.controls.items() if name in wanted}
            return replace(self.model, controls=controls)

    def _named(self, request: Request, offered: Offered) -> set[tuple[str, str]]:
        tags = [(tag.sort, tag.name) for tag in parse(request.prompt).tags if tag.sort]
        tags += [("lora", each.name) for each in request.loras]
        tags += [("hypernet", each.name) for each in request.hypers]
        tags += [("control", each.control) for each in request.steer]
        text = f"{request.prompt}\n{request.negative}"
        kind = f"textual-inversion/{self.model.family.name}"
        tags += [
            ("embedding", each.name)
            for each in (offered.entries() if self.model.readings else ())
            if each.kind == kind and may_name(text, each.name)
        ]
        return {*tags}

    def _put(self, sort: str, name: str, path: Path, *, fresh: bool) -> None:
        if fresh:
            self._drop(sort, name)
        if sort == "control":
            controls = {**self.model.controls, name: load_control(path, self.model)}
            self.model = replace(self.model, controls=controls)
            self.size = size_of(self.model)  # controls are as large as models
        else:
            some: dict[str, Any] = {TABLES[sort]: {name: path}}
            self.model = with_guests(self.model, **some)

    def _drop(self, sort: str, name: str) -> None:
        """Pictures that are being drawn with it keep it; it is gone for those to come."""
        table = {key: value for key, value in getattr(self.model, TABLES[sort]).items() if key != name}
        some: dict[str, Any] = {TABLES[sort]: table}
        self.model = replace(self.model, **some)
        self.size = size_of(self.model)


Ready = Callable[["Resident | Exception"], None]


class Residents:
    """The models in memory, within a budget.

    Args:
        config: device, types, budget.
        offered: where things lie.
        tell: told ``loading`` and ``loaded`` with the name of the model, from the loading thread.
    """

    def __init__(self, config: ServeConfig, offered: Offered, tell: Callable[[str, str, Any], None]) -> None:
        self._config, self._offered, self._tell = config, offered, tell
        self.budget = config.memory or usual_budget(config.device)
        self.here: dict[Key, Resident] = {}
        self._broken: dict[Key, tuple[tuple[tuple[int, ...], ...], SumukError]] = {}
        self._waiting: dict[Key, list[Ready]] = {}
        self._wanted: queue.SimpleQueue[Key] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._load_forever, name="loader", daemon=True).start()

    def key(self, order: Order) -> Key:
        """What an order is drawn with.

        Raises:
            MissingFile: a name that is not offered.
        """
        name = self._offered.usual if order.model is None else self._offered.named(order.model, "model")
        return name, order.vae, order.refiner

    def get(self, key: Key) -> Resident | None:
        """The model if it is here, and stays."""
        found = self.here.get(key)
        if found is None or found.leaving:
            return None
        found.used = time.monotonic()
        return found

    def want(self, key: Key, ready: Ready) -> None:
        """Bring a model in, and then call ``ready`` from the loading thread with it or with the error."""
        with self._lock:
            first = key not in self._waiting
            self._waiting.setdefault(key, []).append(ready)
        if first:
            self._wanted.put(key)

    def size(self) -> int:
        """Bytes of all of them."""
        return sum(each.size for each in [*self.here.values()])

    def _load_forever(self) -> None:
        while True:
            key = self._wanted.get()
            try:
                found: Resident | Exception = self.get(key) or self._load(key)
            except Exception as error:
                found = error
            with self._lock:
                waiting = self._waiting.pop(key)
            for ready in waiting:
                ready(found)

    def _load(self, key: Key) -> Resident:
        name, vae, refiner = key
        paths = [self._offered.find(name, "model")]
        paths += [] if vae is None else [self._offered.find(vae, "vae")]
        paths += [] if refiner is None else [self._offered.find(refiner, "model")]
        stamps = tuple(stamp(_file(path)) for path in paths)
        if key in self._broken and self._broken[key][0] == stamps:
            raise self._broken[key][1]  # told once; until the file is another one, the answer is the same
        self._tell("loading", name, None)
        began = time.monotonic()
        needed = sum(needs(path, self._config) for path in paths)
        if name == self._offered.usual:
            needed += sum(needs(path, self._config, part) for part, path in self._config.parts.items())
        self._make_room(key, needed)
        how: dict[str, Any] = {
            "vae": None if vae is None else paths[1],
            "refiner": None if refiner is None else paths[-1],
        }
        if name == self._offered.usual:
            how["parts"] = self._config.parts or None
        try:
            model = _patiently(
                lambda: load(paths[0], self._config.device, self._config.dtype, **how), str(paths[0])
            )
        except (BadFile, BadInput, MissingFile) as error:
            log.error("%s cannot be used: %s", name, error)
            self._broken[key] = (stamps, error)
            raise
        made = Resident(
            key, model, Engine(model, mode=self._config.mode), size_of(model), time.monotonic() - began
        )
        self.here[key] = made
        self._tell("loaded", name, made)
        return made

    def _make_room(self, key: Key, needed: int) -> None:
        """Let the least recently used go until there is room.

        One that is at work is waited for, and begins nothing new meanwhile: who is asked for without end would stay
        for ever. Orders for it wait behind the model that comes.
        """
        if needed > self.budget:
            raise OutOfMemory(
                f"the model {key[0]!r} has {needed / 2**30:.1f} GiB, but models may take {self.budget / 2**30:.1f} GiB "
                "together; start the server with more --memory, or convert it to a smaller type"
            )
        while self.size() + needed > self.budget:
            here = [*self.here.values()]
            goes = min(here, key=lambda each: (not each.engine.idle, not each.leaving, each.used))
            if goes.engine.idle:
                log.info("%s makes room for %s", goes.key[0], key[0])
                self.let_go(goes)
            else:
                goes.leaving = True
                time.sleep(0.05)
        for each in [*self.here.values()]:
            each.leaving = False

    def let_go(self, resident: Resident) -> None:
        """Take a model out of memory."""
        self.here.pop(resident.key, None)
        if torch.device(self._config.device).type == "cuda":
            torch.cuda.empty_cache()


def usual_budget(device: str) -> int:
    """Three quarters of the memory where models lie."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * 3 // 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def size_of(model: Model) -> int:
    """Bytes of a model's parameters, its refiner's too."""
    networks = [*model.networks.values(), *(each.network for each in model.controls.values())]
    found = {p.data_ptr(): p.nbytes for each in networks for p in each.parameters()}
    return sum(found.values()) + (0 if model.refiner is None else size_of(model.refiner))


def _patiently(read: Callable[[], Model], what: str) -> Model:
    """Read again after an error that may pass: of the disk, or of the net that it lies on; nothing else."""
    for attempt in range(1, TRIES + 1):
        try:
            return read()
        except SumukError:
            raise
        except OSError as error:
            if attempt == TRIES:
                raise BadFile(f"{what} cannot be read: {error.strerror or error}", "file.read") from error
            log.warning("%s: %s; trying again", what, error)
            time.sleep(PAUSE * attempt)
    raise AssertionError("unreachable")


def _file(path: Path) -> Path:
    return path / "model_index.json" if (path / "model_index.json").is_file() else path


def needs(path: Path, config: ServeConfig, only: str | None = None) -> int:
    """Bytes that a model will take, from its header: numbers x the size of the type that they are loaded as.

    Args:
        path: its file or folder.
        config: says the device and the type.
        only: the one part that is taken of it; None: all.
    """
    found = look(path).parts
    parts = [part for part in found if part.name == only] or found
    numbers = sum(part.parameters for part in parts)
    if config.dtype is not None:
        return numbers * torch_dtype(config.dtype).itemsize
    small = Counter[str]()
    for part in parts:
        small.update(part.dtypes)
    usual = small.most_common(1)[0][0] if small else "F32"
    wide = torch.device(config.device).type == "cpu" and usual != "BF16"
    return numbers * (4 if wide or usual == "F32" else 2)
