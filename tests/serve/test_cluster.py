"""Drawing on a Ray cluster, as far as it needs none: what is refused, what is told, what is drawn again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.serve.ray_of_tests import the_ray

from sumuk.base.errors import BadInput
from sumuk.serve import crew
from sumuk.serve.cluster import TRIES, Cluster, mark
from sumuk.serve.config import ServeConfig
from sumuk.serve.crew import Crew, Roll, fitting
from sumuk.serve.order import Order
from sumuk.serve.trouble import Refused, Trouble
from sumuk.serve.wire import Drawn, Lost, Stepped, Told, Vitals

ORDER = Order(values={"prompt": "a fox", "steps": 3, "seed": 7})


def test_the_front_imports_neither_torch_nor_ray():
    told = "import sys, sumuk.serve.cluster; print({'torch', 'ray'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("cores", "count", "threads"),
    [([8, 8], 2, 8), ([8, 8], 4, 4), ([16, 4], 2, 8), ([2], 2, 1), ([2], 5, 1), ([], 1, 1), ([7, 3], 3, 3)],
)
def test_painters_share_the_cores(cores: list[int], count: int, threads: int):
    assert fitting(cores, count) == threads


def test_painters_share_the_memory():
    node = {"CPU": 8.0, "memory": 64e9}
    assert crew.share([node], 8) == 48e9
    assert crew.share([node], 2) == 12e9
    assert crew.share([node, {"CPU": 8.0, "memory": 32e9}], 4) == 12e9
    assert crew.share([node, {"CPU": 2.0, "memory": 1e9}], 4) == 24e9  # no painter fits on the second
    assert crew.share([{"memory": 64e9}], 1) == 48e9


def test_orders_that_need_the_same_in_memory_have_the_same_mark(tmp_path: Path):
    config = ServeConfig(state=tmp_path)
    assert mark(ORDER, config) == mark(Order(values={}, model="miniature"), config) == ""
    marks = [
        mark(Order(values={}, **names), config)
        for names in ({"model": "b"}, {"vae": "b"}, {"refiner": "b"}, {"model": "b", "vae": "c"})
    ]
    assert len({*marks}) == 4 and all(marks)
    assert mark(Order(values={}, model="b"), ServeConfig(state=tmp_path, model=Path("b.safetensors"))) == ""


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BadInput, match="0 replicas"):
        Cluster(ServeConfig(state=tmp_path), 0)
    with pytest.raises(BadInput, match="'cuda:1'"):
        Cluster(ServeConfig(state=tmp_path, device="cuda:1"))
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(Refused, match="RAY_ADDRESS=auto"):
        crew.join(ServeConfig(state=tmp_path))


def test_which_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert crew._address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")
    assert crew._address() == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert crew._address() == "10.0.0.2:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert crew._address() is None


def test_no_token_stays_in_the_memory_of_the_cluster(tmp_path: Path):
    config = ServeConfig(state=tmp_path, host="0.0.0.0", tokens={"me": "0123456789abcdef"})
    assert "0123456789abcdef" not in crew._without_secrets(config).model_dump_json()


# -- a handle that does what it is told, in place of Ray's ---------------------------------------------------------


class Hand:
    """Calls of ``draw`` play these scenes, one each: what is told, and then an error, an end, or waiting for ever."""

    def __init__(self, *scenes: Any) -> None:
        self.scenes, self.stopped, self.marks = [*scenes], 0, []
        self.draw = self

    def options(self, *, stream: bool, multiplexed_model_id: str) -> Hand:
        assert stream
        self.marks.append(multiplexed_model_id)
        return self

    def remote(self, name: str, order: Order, done: tuple[int, ...]) -> Any:
        scene, hand = self.scenes.pop(0), self

        class Response:
            async def __aiter__(self) -> AsyncIterator[Any]:
                for each in scene:
                    if isinstance(each, Exception):
                        raise each
                    if each is None:
                        await asyncio.sleep(1000)
                    yield "one", [each if isinstance(each, Vitals) else each(name)]

            def cancel(self) -> None:
                hand.stopped += 1

        return Response()


def stepped(step: int) -> Callable[[str], Told]:
    return lambda name: Stepped(name, 0, step, 3)


def drawn(name: str) -> Told:
    return Drawn(name, 0, b"png", {})


def played(
    folder: Path, hand: Hand, act: Callable[[Cluster], None] = lambda cluster: None, order: Order = ORDER
) -> list[Told]:
    """What a cluster tells whose painters are this hand."""
    told: list[Told] = []

    async def scene() -> None:
        cluster = Cluster(ServeConfig(state=folder), crew=Crew("a", "a", 2))
        cluster._tell, cluster._painter, cluster._roll = told.append, hand, Roll(2, True)
        cluster.draw("job", order)
        await asyncio.sleep(0.01)
        act(cluster)
        async with asyncio.timeout(5):
            while cluster._pictures:
                await asyncio.sleep(0.001)

    asyncio.run(scene())
    return told


def lost_painter() -> Exception:
    return the_ray().exceptions.ActorDiedError()


def test_a_picture_whose_painter_is_lost_is_drawn_again(tmp_path: Path):
    hand = Hand([stepped(1), stepped(2), lost_painter()], [lost_painter()], [stepped(1), drawn])
    told = played(tmp_path, hand)
    assert [each.step for each in told if isinstance(each, Stepped)] == [1, 2, 1]
    assert told[-1] == Drawn("job", 0, b"png", {}) and len(told) == 4


def test_a_picture_over_which_painters_are_lost_is_given_up(tmp_path: Path):
    hand = Hand(*[[stepped(1), lost_painter()] for _ in range(TRIES)], [drawn])
    *_, last = told = played(tmp_path, hand)
    assert isinstance(last, Lost) and last.trouble.type == "worker-lost" and last.trouble.status == 503
    assert last.trouble.retry_after and len(told) == TRIES + 1


def test_a_painter_that_says_why_is_believed(tmp_path: Path):
    trouble = Trouble("bad-value", "no")
    assert played(tmp_path, Hand([lambda name: Lost(name, 0, trouble)])) == [Lost("job", 0, trouble)]


def test_an_error_of_ours_is_told_without_its_insides(tmp_path: Path):
    (told,) = played(tmp_path, Hand([KeyError("secret")]))
    assert isinstance(told, Lost) and told.trouble.type == "internal" and "secret" not in told.trouble.detail


def test_an_error_of_ours_at_the_painter_is_not_tried_again(tmp_path: Path):
    error = the_ray().exceptions.RayTaskError("draw", "a trace", KeyError("secret"))
    (told,) = played(tmp_path, Hand([error], [drawn]))
    assert isinstance(told, Lost) and told.trouble.type == "internal"


def test_who_is_cancelled_is_told_once_and_the_call_with_it(tmp_path: Path):
    hand = Hand([stepped(1), None], [None], [drawn])
    order = Order(values={"count": 3, "seed": 1})
    told = played(tmp_path, hand, lambda cluster: cluster.cancel("job"), order)
    assert hand.stopped == 2
    assert {each.image for each in told if isinstance(each, Lost)} == {0, 1}
    assert sum(isinstance(each, Drawn) for each in told) == 1


def test_how_painters_do_is_told_of_all_together(tmp_path: Path):
    async def scene() -> None:
        cluster = Cluster(ServeConfig(state=tmp_path), crew=Crew("a", "a", 3))
        cluster._roll = Roll(2, True)
        one = Vitals(rounds=3, resident=10, models=("a",), escalations={"free": 1})
        two = Vitals(rounds=5, resident=20, models=("a", "b"), escalations={"free": 2, "split": 1})
        cluster._together("one", one)
        both = cluster._together("two", two)
        assert both.rounds == 5 and both.resident == 30 and both.models == ("a", "b")
        assert both.escalations == {"free": 3, "split": 1}
        assert cluster._together("three", one).resident == 30  # "one" has left: there are two
        assert [*cluster.replicas] == ["two", "three"]

    asyncio.run(scene())
