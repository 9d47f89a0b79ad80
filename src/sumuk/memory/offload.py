"""Networks that are not needed leave their device for a while, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from sumuk.memory.pressure import Stranded, free_caches, is_full, let_go

HOME = torch.device("cpu")
"""Where they wait."""


@contextmanager
def away(networks: Iterable[nn.Module], busy: Iterable[nn.Module] = ()) -> Iterator[int]:
    """Keep networks off their device until the block ends.

    The parameters themselves stay the objects that they are; it is their data that travels. A network on the CPU has
    nowhere to go, and is left alone.

    Args:
        networks: which; one that stands there twice counts once.
        busy: networks that must stay, with everything that others share with them.

    Yields:
        Bytes that this frees on devices; 0 if all were on the CPU.

    Raises:
        Stranded: what left does not fit back.
    """
    needed = {tensor.untyped_storage().data_ptr() for tensor in _tensors(busy) if _abroad(tensor)}
    moved: dict[int, tuple[Tensor, torch.device]] = {}
    freed = 0
    try:
        for tensor in _tensors(networks):
            if _abroad(tensor) and tensor.untyped_storage().data_ptr() not in needed:
                place, size = tensor.device, tensor.nbytes
                _move(tensor, HOME)
                moved[id(tensor)] = (tensor, place)
                freed += size
        yield freed
    except Exception as error:
        if is_full(error):
            let_go(error)  # the way back needs the room
        raise
    finally:
        for tensor, place in moved.values():
            _bring_back(tensor, place)


def _tensors(networks: Iterable[nn.Module]) -> Iterator[Tensor]:
    return chain.from_iterable(chain(each.parameters(), each.buffers()) for each in networks)


def _abroad(tensor: Tensor) -> bool:
    return tensor.device != HOME


def _move(tensor: Tensor, place: torch.device) -> None:
    """Give a tensor a copy of its data elsewhere; in inference mode it would become one that no training takes."""
    with torch.inference_mode(False):
        tensor.data = tensor.data.to(place, copy=True)


def _bring_back(tensor: Tensor, place: torch.device) -> None:
    try:
        return _move(tensor, place)
    except Exception as error:
        if not is_full(error):
            raise
    free_caches(place)
    try:
        _move(tensor, place)
    except Exception as error:
        raise Stranded(f"a network that left {place} does not fit back onto it: {error}") from None
