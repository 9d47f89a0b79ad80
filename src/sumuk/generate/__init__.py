"""Floor 4: from a request to pictures: prompt, text encoding, start, engine, and the text in a file.

The package can be called: ``sumuk.generate(model, request)`` is :func:`sumuk.generate.api.generate`. Importing any
module of it makes Python set ``sumuk.generate`` to the package, so a function of that name would be lost.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        from sumuk.generate.api import generate

        return generate(*args, **settings)


sys.modules[__name__].__class__ = _Callable
