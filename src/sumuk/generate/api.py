"""The one-line interface: load once, draw, get a picture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sumuk.base.errors import MissingFile
from sumuk.generate.engine import Engine, Event, Failed, Finished, Mode
from sumuk.generate.request import Request, make_request
from sumuk.weights.checkpoint import load
from sumuk.weights.model import Model

MINIATURE = Path(__file__).parent.parent / "assets" / "miniature.safetensors"


@lru_cache(maxsize=1)
def miniature() -> Model:
    """The small model that ships with Sumuk, on the CPU.

    Raises:
        MissingFile: this installation came without it.
    """
    if not MINIATURE.is_file():
        raise MissingFile(f"the miniature is not at {MINIATURE}; reinstall sumuk, or name a model")
    return load(MINIATURE)


def generate(model: Model, request: Request, *, mode: Mode | None = None) -> Iterator[Event]:
    """Draw one request, an engine with one request in it.

    Args:
        model: what :func:`sumuk.load` returned.
        request: what to draw.
        mode: ``exact`` or ``fast``, see :mod:`sumuk.generate.engine`.

    Yields:
        Progress, Preview, Finished (with the picture and its receipt), Failed.
    """
    engine = Engine(model, mode=mode)
    engine.submit(request)
    yield from engine.events()


def draw(prompt: str, *, model: Model | None = None, **settings: Any) -> Image.Image:
    """One picture of a prompt.

    Args:
        prompt: what to draw, English or Korean for the miniature.
        model: what :func:`sumuk.load` returned; the miniature if None.
        settings: fields of :class:`sumuk.Request`.

    Raises:
        SumukError: a setting is unknown or out of range, by its name.
    """
    request = make_request(prompt=prompt, **settings)
    for event in generate(model or miniature(), request):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return event.picture
    raise AssertionError("the engine ended without a picture")
