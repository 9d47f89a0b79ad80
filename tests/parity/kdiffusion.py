"""k-diffusion as an oracle: its formulas, loaded file by file because the package itself may not import.

The package's ``__init__`` pulls in training code with heavy requirements; ``sampling.py`` and ``external.py``
need only ``append_dims`` and an ODE integrator that no test calls.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

_NAME = "kdiffusion_oracle"


def _append_dims(x: torch.Tensor, dims: int) -> torch.Tensor:
    return x.reshape(x.shape + (1,) * (dims - x.ndim))


def _absent(*_: object, **__: object) -> None:
    raise RuntimeError("this part of k-diffusion is not loaded for tests")


def _folder() -> Path | None:
    found = importlib.util.find_spec("k_diffusion")  # finds the folder without running the package
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


@cache
def _load(part: str) -> ModuleType | None:
    folder = _folder()
    if folder is None or not (folder / f"{part}.py").is_file():
        return None
    if _NAME not in sys.modules:
        package = types.ModuleType(_NAME)
        package.__path__ = []
        tools = types.ModuleType(f"{_NAME}.utils")
        tools.append_dims = _append_dims
        package.utils = tools
        sys.modules.update({_NAME: package, f"{_NAME}.utils": tools})
    if importlib.util.find_spec("torchdiffeq") is None and "torchdiffeq" not in sys.modules:
        integrator = types.ModuleType("torchdiffeq")
        integrator.odeint = _absent
        integrator.__spec__ = importlib.util.spec_from_loader("torchdiffeq", loader=None)
        sys.modules["torchdiffeq"] = integrator
    spec = importlib.util.spec_from_file_location(f"{_NAME}.{part}", folder / f"{part}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    setattr(sys.modules[_NAME], part, module)
    return module


def sampling() -> ModuleType:
    """``k_diffusion.sampling``; skips the calling test when it cannot be had (package or torchsde absent)."""
    pytest.importorskip("scipy")
    pytest.importorskip("torchsde")
    pytest.importorskip("tqdm")
    module = _load("sampling")
    if module is None:
        pytest.skip("k-diffusion is not installed")
    return module


def external() -> ModuleType:
    """``k_diffusion.external``: the wrappers that map network time to sigma."""
    sampling()
    module = _load("external")
    if module is None:
        pytest.skip("k-diffusion is not installed")
    return module
