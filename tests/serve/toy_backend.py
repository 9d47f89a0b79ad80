"""A backend without networks: real PNGs and JPEGs of one colour, drawn on the event loop, with faults on demand.

It keeps the whole promise of :class:`sumuk.serve.backend.Backend`, so that what stands before it can be tested in
milliseconds. The same order makes the same bytes, and another seed makes others.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sumuk.serve.order import Order
from sumuk.serve.trouble import Trouble, refused
from sumuk.serve.wire import Checked, Died, Drawn, Entry, Loaded, Loading, Lost, Shown, Stepped, Told

ENTRIES = (
    Entry(
        name="toy",
        sort="model",
        kind="sd1/text-to-image",
        title="Toy",
        file="toy.safetensors",
        size=1000,
        loaded=True,
        licence="Apache-2.0",
        sha256="70" * 32,
    ),
    Entry(
        name="second",
        sort="model",
        kind="sd1/text-to-image",
        title="Second toy",
        file="second.safetensors",
        size=2000,
    ),
    Entry(name="ink", sort="lora", kind="lora/sd1", title="Ink", file="ink.safetensors", size=10),
)


class ToyBackend:
    """Draws colours.

    Args:
        slots: pictures that are drawn at once.
        steps: of a picture whose order says none.
        turn: seconds that a step takes; 0: one turn of the event loop.
        preview: steps between previews; 0: none.

    Attributes:
        begun: job and ``done`` of every call of :meth:`draw`.
        stopped: jobs for which :meth:`cancel` was called.
        tell: where news go; a test may tell some of its own.
        gate: while it is clear (:meth:`hold`), no step is made.
    """

    def __init__(self, slots: int = 2, steps: int = 4, turn: float = 0.0, preview: int = 2) -> None:
        self.slots, self.steps, self.turn, self.preview = slots, steps, turn, preview
        self.ready = False
        self.begun: list[tuple[str, tuple[int, ...]]] = []
        self.stopped: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.tell: Callable[[Told], None] = lambda told: None
        self._work: dict[str, dict[int, asyncio.Task[None]]] = {}

    async def start(self, tell: Callable[[Told], None]) -> None:
        self.tell = tell
        self.ready = True

    async def stop(self) -> None:
        self.ready = False
        self.tell = lambda told: None
        self._drop()

    async def check(self, order: Order) -> Checked:
        model = self._entry(order.model or "toy")
        width, height, steps, count = _sizes(order, self.steps)
        return Checked(
            model=model.name,
            count=count,
            cost=float(width * height * steps * 2 * count),
            steps=steps,
            width=width,
            height=height,
            sure=model.loaded,
        )

    async def catalogue(self) -> list[Entry]:
        return list(ENTRIES)

    async def describe(self, name: str) -> dict[str, Any]:
        entry = self._entry(name)
        return {"kind": entry.kind, "title": entry.title, "licence": entry.licence}

    async def choices(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "solvers": [{"name": "euler", "aliases": []}, {"name": "heun", "aliases": []}],
            "grids": [{"name": "karras", "aliases": []}],
        }

    async def load(self, name: str) -> None:
        entry = self._entry(name)
        self.tell(Loading(entry.name))
        self.tell(Loaded(entry.name, 0.0, entry.size, entry.licence))

    def draw(self, job: str, order: Order, done: tuple[int, ...] = ()) -> None:
        self.begun.append((job, done))
        count = _sizes(order, self.steps)[3]
        self._work[job] = {
            image: asyncio.ensure_future(self._picture(job, order, image))
            for image in range(count)
            if image not in done
        }

    def cancel(self, job: str) -> None:
        self.stopped.append(job)
        self.lose(job, Trouble("cancelled", "it was asked for"))

    # Faults.

    def hold(self) -> None:
        """No step is made until :meth:`release`."""
        self.gate.clear()

    def release(self) -> None:
        self.gate.set()

    def lose(self, job: str, trouble: Trouble | None = None) -> None:
        """The pictures of a job that are at work will not come."""
        trouble = trouble or Trouble("out-of-memory", "there is not enough memory for this picture")
        for image, task in self._work.pop(job, {}).items():
            task.cancel()
            asyncio.get_running_loop().call_soon(lambda told: self.tell(told), Lost(job, image, trouble))

    def die(self, why: str = "the worker crashed", again: bool = True, killed: bool = False) -> None:
        """The worker is gone with all that it drew; another one is there at once if ``again``."""
        self._drop()
        self.ready = again
        self.tell(Died(why, again, killed))

    # Drawing.

    async def _picture(self, job: str, order: Order, image: int) -> None:
        try:
            await self._draw(job, order, image)
        except Exception as error:  # a test's order that is no order: told, so that nobody waits for ever
            self._settled(job, image)
            self.tell(Lost(job, image, Trouble("internal", f"{type(error).__name__}: {error}")))

    async def _draw(self, job: str, order: Order, image: int) -> None:
        steps = _sizes(order, self.steps)[2]
        drawn = colour(order, image)
        for step in range(1, steps + 1):
            await asyncio.sleep(self.turn)
            await self.gate.wait()
            self.tell(Stepped(job, image, step, steps))
            if self.preview and step % self.preview == 0:
                self.tell(Shown(job, image, step, _bytes(drawn, "JPEG")))
        self._settled(job, image)
        self.tell(Drawn(job, image, png_of(order, image, self.steps), receipt_of(order, image, self.steps)))

    def _settled(self, job: str, image: int) -> None:
        at_work = self._work.get(job, {})
        at_work.pop(image, None)
        if not at_work:
            self._work.pop(job, None)

    def _drop(self) -> None:
        for pictures in self._work.values():
            for task in pictures.values():
                task.cancel()
        self._work.clear()

    def _entry(self, name: str) -> Entry:
        for entry in ENTRIES:
            if entry.name == name:
                return entry
        raise refused("not-found", f"there is no {name!r} here; known: toy, second, ink")


def _sizes(order: Order, steps: int) -> tuple[int, int, int, int]:
    """Width, height, steps and count of an order."""
    values = order.values
    return (
        values.get("width") or 64,
        values.get("height") or 64,
        values.get("steps") or steps,
        values.get("count") or 1,
    )


def colour(order: Order, image: int) -> Image.Image:
    """Picture ``image`` of an order: one colour that its prompt and seed choose."""
    width, height, _, _ = _sizes(order, 1)
    seed = order.values["seed"] + image
    digest = hashlib.sha256(f"{order.values.get('prompt', '')}|{seed}".encode()).digest()
    return Image.new("RGB", (width, height), tuple(digest[:3]))


def png_of(order: Order, image: int, steps: int = 4) -> bytes:
    """Picture ``image`` of an order as a PNG with its receipt, which is drawn in ``steps`` if the order says none."""
    info = PngInfo()
    info.add_itxt("sumuk", json.dumps(receipt_of(order, image, steps)))
    return _bytes(colour(order, image), "PNG", pnginfo=info)


def receipt_of(order: Order, image: int, steps: int = 4) -> dict[str, Any]:
    """A receipt with the fields that a server reads."""
    width, height, steps, _ = _sizes(order, steps)
    settings = {
        "prompt": order.values.get("prompt", ""),
        "negative": order.values.get("negative", ""),
        "seed": order.values["seed"] + image,
        "width": width,
        "height": height,
        "steps": steps,
        "solver": order.values.get("solver") or "euler",
        "guidance": order.values.get("guidance") or 7.0,
    }
    return {
        "receipt": 1,
        "numerics": 1,
        "sumuk": "toy",
        "model": {"title": "Toy", "licence": "Apache-2.0", "files": [{"name": "toy", "sha256": "70" * 32}]},
        "settings": settings,
        "picture": {"width": width, "height": height},
    }


def _bytes(drawn: Image.Image, format: str, **more: Any) -> bytes:
    file = io.BytesIO()
    drawn.save(file, format, **more)
    return file.getvalue()
