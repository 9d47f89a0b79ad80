"""The worker process: real pictures, and what is told when it is stopped, killed or poisoned."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.serve import faulty_worker

import sumuk
from sumuk.base.errors import SumukError
from sumuk.serve.config import ServeConfig
from sumuk.serve.local import LocalWorker, work
from sumuk.serve.order import Order
from sumuk.serve.trouble import Refused
from sumuk.serve.wire import Died, Drawn, Lost, Shown, Stepped, Told

SECONDS = 60


class Heard:
    """What a worker told, and waiting for more of it."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self._more = asyncio.Event()

    def __call__(self, told: Told) -> None:
        self.told.append(told)
        self._more.set()

    def of(self, kind: type[Any], job: str | None = None) -> list[Any]:
        return [e for e in self.told if isinstance(e, kind) and (job is None or e.job == job)]

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(SECONDS):
            while not true():
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def worker(folder: Path, target: Any = work, **config: Any) -> AsyncIterator[tuple[LocalWorker, Heard]]:
    made = LocalWorker(ServeConfig(state=folder, threads=1, **config), target)
    heard = Heard()
    await made.start(heard)
    try:
        yield made, heard
    finally:
        await made.stop()


def order(**values: Any) -> Order:
    return Order(values={"prompt": "a fox, 3d style", "steps": 3, "seed": 7, **values}, shown=True)


async def drawn(made: LocalWorker, heard: Heard, job: str, **values: Any) -> Image.Image:
    made.draw(job, order(**values))
    await heard.until(lambda: heard.of(Drawn, job) or heard.of(Lost, job))
    assert not heard.of(Lost, job), heard.of(Lost, job)
    return Image.open(io.BytesIO(heard.of(Drawn, job)[-1].png)).convert("RGB")


def test_a_picture_is_the_one_that_the_engine_draws_here(tmp_path: Path):
    async def scene() -> tuple[Image.Image, list[Told]]:
        async with worker(tmp_path, preview=1) as (made, heard):
            checked = await made.check(order())
            assert (checked.count, checked.steps) == (1, 3)
            assert checked.cost == 2 * 64 * 64 * 3
            await heard.until(lambda: made.ready)
            assert await made.check(order()) == replace(checked, sure=True)
            return await drawn(made, heard, "one"), heard.told

    picture, told = asyncio.run(scene())
    steps = [each.step for each in told if isinstance(each, Stepped)]
    assert steps == [1, 2, 3]
    assert any(isinstance(each, Shown) and each.jpeg[:2] == b"\xff\xd8" for each in told)
    receipt = next(each for each in told if isinstance(each, Drawn)).receipt
    assert receipt["settings"]["seed"] == 7 and receipt["machine"]["mode"] == "exact"
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = sumuk.draw("a fox, 3d style", steps=3, seed=7)
    finally:
        torch.set_num_threads(threads)
    assert here.tobytes() == picture.tobytes()


def test_names_choices_and_what_is_refused(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path) as (made, _):
            names = {(each.sort, each.name) for each in await made.catalogue()}
            assert {("model", "miniature"), ("lora", "porcelain")} <= names
            assert (await made.describe("miniature"))["family"] == "sd1"
            some = await made.choices()
            assert "euler" in {each["name"] for each in some["solvers"]}
            assert "karras" in {each["name"] for each in some["grids"]}
            await made.load("Miniature")  # whatever the case of its letters
            for wrong, word in (
                (order(solver="oiler"), "euler"),
                (order(width=72, height=20), "20"),
                (Order(values={"prompt": "x"}, model="sd15"), "sd15"),
                (order(prompt="fox <lora:nobody:1>"), "nobody"),
                (order(steer=[{"control": "canny", "hint": png()}]), "canny"),
                (order(prompt="fox <lora:../../x:1>"), "../../x"),
            ):
                with pytest.raises(Refused) as refused:
                    await made.check(wrong)
                assert refused.value.trouble.status in (400, 404), refused.value.trouble
                assert word in refused.value.trouble.detail

    asyncio.run(scene())


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "white").save(file, "PNG")
    return file.getvalue()


def test_a_lora_named_in_a_prompt_is_put_on_and_stays_off_others(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path) as (made, heard):
            plain = await drawn(made, heard, "plain")
            blue = await drawn(made, heard, "blue", prompt="a fox, 3d style <lora:porcelain:1>")
            again = await drawn(made, heard, "again")
            assert plain.tobytes() == again.tobytes() != blue.tobytes()
            worn = heard.of(Drawn, "blue")[0].receipt["adapters"]
            assert [each["name"] for each in worn] == ["porcelain"]

    asyncio.run(scene())


def test_a_cancelled_job_stops_within_a_step(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path, mode="fast", together=4) as (made, heard):
            made.draw("long", order(steps=900, solver="euler"))
            await heard.until(lambda: heard.of(Stepped, "long"))
            made.cancel("long")
            await heard.until(lambda: heard.of(Lost, "long"))
            assert heard.of(Lost, "long")[0].trouble.type == "cancelled"
            assert len(heard.of(Stepped, "long")) < 100
            made.cancel("nobody")
            await drawn(made, heard, "next")

    asyncio.run(scene())


def test_only_the_missing_pictures_are_drawn(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path) as (made, heard):
            made.draw("job", order(count=3), done=(0, 2))
            await heard.until(lambda: heard.of(Drawn, "job"))
            await drawn(made, heard, "next")
            assert [each.image for each in heard.of(Drawn, "job")] == [1]
            assert heard.of(Drawn, "job")[0].receipt["settings"]["seed"] == 8

    asyncio.run(scene())


def test_a_killed_worker_is_replaced_and_draws_the_same_bits(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path) as (made, heard):
            before = await drawn(made, heard, "before")
            made.draw("lost", order(steps=900))
            await heard.until(lambda: heard.of(Stepped, "lost"))
            first = made.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await heard.until(lambda: heard.of(Died))
            assert heard.of(Died)[0].again and not made.ready
            after = await drawn(made, heard, "after")
            assert made.pid != first and after.tobytes() == before.tobytes()

    asyncio.run(scene())


def test_a_poisoned_device_ends_the_process_and_the_next_one_draws(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path, faulty_worker.poisoned_once) as (made, heard):
            made.draw("job", order())
            await heard.until(lambda: heard.of(Died))
            assert "70" in heard.of(Died)[0].why and not heard.of(Lost)
            await drawn(made, heard, "job")

    asyncio.run(scene())


def test_a_worker_that_never_lives_is_given_up(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path, faulty_worker.dying):
            pass

    with pytest.raises(SumukError, match="code 3"):
        asyncio.run(scene())


def test_a_model_that_is_not_there_is_said_at_the_start(tmp_path: Path):
    async def scene() -> None:
        async with worker(tmp_path, model=tmp_path / "none.safetensors"):
            pass

    with pytest.raises(SumukError, match=r"none\.safetensors"):
        asyncio.run(scene())


def test_a_damaged_model_is_told_once_and_the_worker_is_none(tmp_path: Path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{}" * 8)

    async def scene() -> None:
        async with worker(tmp_path, model=tmp_path / "bad.safetensors") as (made, heard):
            await heard.until(lambda: heard.of(Died))
            assert not heard.of(Died)[0].again and "bad.safetensors" in heard.of(Died)[0].why
            assert not made.ready

    asyncio.run(scene())
