"""Sumuk: one open system for the Stable Diffusion lineage.

Three nouns: a checkpoint (a file that says what it is), a model (a checkpoint placed on a device), a request (what
someone wants drawn). Importing this package imports no torch; that waits until something needs it.

    >>> import sumuk
    >>> image = sumuk.draw("a fox, 3d style")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sumuk.generate.api import draw, generate, miniature
    from sumuk.generate.request import Hires, Request
    from sumuk.weights.checkpoint import load, save
    from sumuk.weights.inspect import open

__all__ = ["Hires", "Request", "draw", "generate", "load", "miniature", "open", "save"]

_HOMES = {
    "Hires": "sumuk.generate.request",
    "Request": "sumuk.generate.request",
    "draw": "sumuk.generate.api",
    "miniature": "sumuk.generate.api",
    "load": "sumuk.weights.checkpoint",
    "save": "sumuk.weights.checkpoint",
    "open": "sumuk.weights.inspect",
}


def __getattr__(name: str) -> Any:
    if name == "generate":  # a package that can be called
        return import_module("sumuk.generate")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sumuk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
