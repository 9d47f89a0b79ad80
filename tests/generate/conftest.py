"""A random Stable Diffusion 1 of a million parameters whose pictures depend on everything that they should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.weights.tiny import tiny

from sumuk.base.errors import SumukError
from sumuk.generate.engine import Engine, Failed, Finished
from sumuk.generate.request import make_request
from sumuk.weights.checkpoint import load, save
from sumuk.weights.model import Model


def lively(model: Model) -> Model:
    """Weights that keep the size of signals, so that text, noise and levels all show in the picture."""
    torch.manual_seed(1)
    for network in model.networks.values():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
            parameter.normal_(0.0, fan_in**-0.5 if fan_in else 0.1)
            if parameter.ndim == 1:
                parameter += 0.5
    for name, parameter in model.denoiser.named_parameters():
        if "attn2" in name and parameter.ndim > 1:  # where text comes in
            parameter *= 3
    return model


def saved(folder: Path, variant: str = "text-to-image") -> Path:
    path = folder / f"{variant}.safetensors"
    save(lively(tiny(variant)), path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def model_file(folder: Path) -> Path:
    return saved(folder)


@pytest.fixture(scope="session")
def model(model_file: Path) -> Model:
    return load(model_file)


@pytest.fixture(scope="session")
def inpainting(folder: Path) -> Model:
    return load(saved(folder, "inpainting"))


@pytest.fixture(scope="session")
def pix2pix(folder: Path) -> Model:
    return load(saved(folder, "instruct-pix2pix"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.int16)


def gap(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(pixels(one) - pixels(other)).max())


def run(model: Model, *requests: dict[str, Any], mode: str | None = None) -> list[list[Finished]]:
    """The pictures of requests that are drawn together; anything that fails is raised."""
    engine = Engine(model, mode=mode)
    jobs = [engine.submit(make_request(**({"seed": 1, "steps": 4} | each))) for each in requests]
    done: dict[int, dict[int, Finished]] = {job: {} for job in jobs}
    for event in engine.events():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            done[event.job][event.image] = event
    return [[done[job][image] for image in sorted(done[job])] for job in jobs]


def one(model: Model, **request: Any) -> Image.Image:
    return run(model, request)[0][0].picture


def refusal(call: Callable[[], object]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(SumukError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and 5 < len(line) < 400, line
    return line


@dataclass
class Forwards:
    """Rows of every forward of the denoiser, in their order."""

    rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


@pytest.fixture
def forwards(model: Model) -> Iterator[Forwards]:
    told = Forwards()
    hook = model.denoiser.register_forward_hook(lambda _, inputs, output: told.rows.append(len(inputs[0])))
    yield told
    hook.remove()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A picture of 64 by 64 with soft colours."""
    across = np.linspace(40, 215, 64)
    red, green = np.meshgrid(across, across)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


@pytest.fixture(scope="session")
def hole() -> Image.Image:
    """White in the middle."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    return mask
