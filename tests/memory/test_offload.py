"""Networks leave their device and come back bit for bit.

No device but the CPU is needed: data that "left" is made unusable here, so that whatever touches it shows.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from tests.memory.elsewhere import Elsewhere
from torch import nn

from sumuk.memory import offload
from sumuk.memory.offload import away
from sumuk.memory.pressure import Stranded, is_poisoned


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.tied = nn.Parameter(
            self.layer.weight.data.t(), requires_grad=False
        )  # another view of the same memory
        self.register_buffer("table", torch.arange(5, dtype=torch.int16))


def bits(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(network: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    return Elsewhere(monkeypatch)


def test_on_the_cpu_nothing_happens_and_that_is_said():
    network = Network()
    where = [value.data_ptr() for value in network.parameters()]
    with away([network]) as freed:
        assert freed == 0
    assert [value.data_ptr() for value in network.parameters()] == where


def test_bit_for_bit_and_the_very_same_parameters(elsewhere: Elsewhere):
    network = Network()
    before, parameters = bits(network), list(network.parameters())
    with torch.inference_mode(), away([network, network]) as freed:
        assert freed == sum(value.nbytes for value in (*network.parameters(), *network.buffers()))
        assert elsewhere.gone(network)
    assert same(network, before) and not elsewhere.gone(network)
    assert all(now is then for now, then in zip(network.parameters(), parameters, strict=True))
    assert network.layer.weight.requires_grad


def test_what_is_busy_stays_with_all_that_others_share_with_it(elsewhere: Elsewhere):
    network, guest = Network(), Network()
    guest.layer.weight = network.layer.weight
    with away([network, guest], busy=[network]):
        assert not any(map(elsewhere.is_gone, network.parameters()))
        assert [elsewhere.is_gone(value) for value in (guest.layer.weight, guest.layer.bias)] == [False, True]
    assert not elsewhere.gone(guest)


def test_an_error_inside_passes_and_everything_is_back(elsewhere: Elsewhere):
    network = Network()
    before = bits(network)
    with pytest.raises(KeyError), away([network]):
        raise KeyError("x")
    assert same(network, before)


def test_what_a_full_memory_left_behind_is_freed_before_the_way_back(elsewhere: Elsewhere):
    seen: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        held = torch.zeros(3)
        seen.append(weakref.ref(held))
        raise MemoryError

    alive: list[bool] = []
    elsewhere.before_returning = lambda: alive.append(seen[0]() is not None)
    with pytest.raises(MemoryError), away([Network()]):
        work()
    assert alive and not any(alive)


def test_one_that_finds_no_room_halfway_out_is_brought_back(elsewhere: Elsewhere):
    network = Network()
    before = bits(network)
    elsewhere.fail_at = {2}
    with pytest.raises(MemoryError), away([network]):
        raise AssertionError("not reached")
    assert same(network, before)


def test_the_way_back_is_tried_twice(elsewhere: Elsewhere):
    network = Network()
    before = bits(network)
    with away([network]):
        elsewhere.fail_at = {elsewhere.moves + 1}
    assert same(network, before)


def test_one_that_does_not_fit_back_poisons_the_process(elsewhere: Elsewhere):
    with pytest.raises(Stranded, match="does not fit back onto it") as caught, away([Network()]):
        elsewhere.fail_at = {elsewhere.moves + 1, elsewhere.moves + 2}
    assert is_poisoned(caught.value)


def test_a_parameter_with_other_data_is_what_it_was():
    """Data of inference mode would make it one that no training takes."""
    parameter = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    before, place, stride = parameter.detach().clone(), parameter.data_ptr(), parameter.stride()
    with torch.inference_mode():
        offload._move(parameter, torch.device("cpu"))
    assert parameter.data_ptr() != place and torch.equal(parameter, before)
    assert parameter.stride() == stride and parameter.requires_grad and not parameter.is_inference()
