"""What is tried when memory is full, the cheapest first, before a picture is given up.

    free caches -> split the batch -> work in tiles -> take idle networks off the device -> OutOfMemory

Every rung does the same work with less memory, and is left when the work is done. Nothing of it is remembered, so that
the next picture is what a fresh process makes. Freeing and offloading change no bit; nor does splitting in exact mode,
which shares no batch. Tiles do, and the receipt says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from sumuk.base.errors import OutOfMemory
from sumuk.diffusion.guidance import Row
from sumuk.memory.offload import away
from sumuk.memory.pressure import free_caches, is_full, is_poisoned, let_go
from sumuk.memory.tiles import sides
from sumuk.weights.model import Model

T = TypeVar("T")
Work: TypeAlias = Callable[[], T]
Rows: TypeAlias = Sequence[Row]
Rung = Literal["free", "split", "tile", "offload", "failed"]


def no_escalations() -> dict[Rung, int]:
    """How often each rung was climbed: never yet."""
    return dict.fromkeys(get_args(Rung), 0)


@dataclass
class Ladder:
    """The way up for one picture, or for the forwards that pictures share.

    Attributes:
        climbed: how often each rung was; several ladders may count in one place. ``failed`` counts lost pictures.
        tiled: whether an autoencoder worked in tiles.
    """

    climbed: dict[Rung, int] = field(default_factory=no_escalations)
    tiled: bool = False

    def climb(self, device: torch.device, work: Work[T], *rungs: tuple[Rung, Work[T]]) -> T:
        """What the first of several ways makes for which there is memory.

        Args:
            device: where.
            work: the plain way; it is tried again after caches were freed.
            rungs: further ways, each with the name that it is counted under.

        Raises:
            OutOfMemory: there is no memory for any of them.
        """
        tries: list[tuple[Rung | None, Work[T]]] = [(None, work), ("free", work), *rungs]
        for rung, way in tries:
            if rung is not None:
                self.climbed[rung] += 1
            if rung == "free":
                free_caches(device)
            try:
                return way()
            except Exception as error:
                if not is_full(error):
                    raise
                let_go(error)
        raise _too_little(device)

    def answer(self, rows: Rows, run: Callable[[Rows], list[Tensor]]) -> list[Tensor | Exception]:
        """What each of some rows is answered, or why it is not.

        A batch that is too large for memory is run in halves. One that fails otherwise, as the network refuses some row
        of it, is run row by row.

        Args:
            rows: that can share a forward, each with a :class:`sumuk.generate.draw.Condition`.
            run: one forward.
        """
        asked, half = rows[0].condition, len(rows) // 2

        def whole() -> list[Tensor | Exception]:
            return [*run(rows)]

        def halves() -> list[Tensor | Exception]:
            return self.answer(rows[:half], run) + self.answer(rows[half:], run)

        def alone() -> list[Tensor | Exception]:
            return self.alone(asked.model, whole, asked.networks)

        try:
            return self.climb(asked.model.device, whole, ("split", halves) if half else ("offload", alone))
        except Exception as error:
            if is_poisoned(error):
                raise
            if not half:
                return [error]
        return [self.answer([row], run)[0] for row in rows]

    def prepare(self, model: Model, work: Work[T]) -> T:
        """Work of text and picture towers, before any step: for it the networks of the steps can go."""
        steps = [model.network(stage.network) for stage in model.stages]
        steps += [] if model.refiner is None else [model.refiner.denoiser]
        return self.climb(model.device, work, ("offload", partial(_without, steps, (), work)))

    def alone(self, model: Model, work: Work[T], busy: Iterable[nn.Module]) -> T:
        """Do some work with only those networks of a model on its device that are busy with it."""
        return _without(_every(model), busy, work)

    def autoencode(
        self, model: Model, whole: Work[T], tiled: Callable[[int], T], cells: tuple[int, int]
    ) -> T:
        """Pixels to a latent or back.

        Args:
            model: whose autoencoder.
            whole: all at once.
            tiled: the same in tiles of so many cells a side.
            cells: height and width of the latent.
        """

        def in_tiles(side: int) -> T:
            made = tiled(side)
            self.tiled = True
            return made

        tiles: list[tuple[Rung, Work[T]]] = [("tile", partial(in_tiles, side)) for side in sides(*cells)]
        busy = [model.networks[name] for name in AUTOENCODERS if name in model.networks]
        roomy = partial(self.climb, model.device, whole, *tiles)  # whole once more: it may fit now
        return self.climb(model.device, whole, *tiles, ("offload", partial(self.alone, model, roomy, busy)))

    def verdict(self, error: Exception, device: torch.device) -> Exception:
        """What a picture ends with that an error befell.

        Raises:
            error: it says that the process is of no use any more, for any picture.
        """
        if is_poisoned(error):
            raise error
        if is_full(error):  # where there is no other way to do the work
            let_go(error)
            error = _too_little(device)
        if isinstance(error, OutOfMemory):
            self.climbed["failed"] += 1
            free_caches(device)
        return error


AUTOENCODERS = ("vae", "tiny_decoder", "effnet")


def _every(model: Model) -> list[Any]:
    """The networks of a model, its controls and its refiner."""
    guests = [control.network for control in model.controls.values()]
    return [*model.networks.values(), *guests, *([] if model.refiner is None else _every(model.refiner))]


def _without(networks: Iterable[nn.Module], busy: Iterable[nn.Module], work: Work[T]) -> T:
    with away(networks, busy):
        return work()


def _too_little(device: torch.device) -> OutOfMemory:
    return OutOfMemory(
        f"there is not enough memory on {device} for this picture, whatever was tried; ask for a smaller one, or again "
        "when less is drawn"
    )
