"""The compare grid without a browser: axes, the contact sheet, the table."""

from __future__ import annotations

import asyncio
import csv
import io
import json

import pytest
from PIL import Image
from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_desk import ME, OTHER, at_desk, until

from sumuk.serve.order import Job, Order, Result
from sumuk.serve.page import sheet as made
from sumuk.serve.page.axes import AXES, MOST, planned, values_of
from sumuk.serve.page.form import BLANK
from sumuk.serve.page.grids import Grid, Grids
from sumuk.serve.page.kept import Kept
from sumuk.serve.page.sheet import Sheet
from sumuk.serve.page.words import Words
from sumuk.serve.trouble import Refused

ENGLISH = Words("en")


@pytest.mark.parametrize(
    ("axis", "written", "values"),
    [
        ("steps", "5, 10\n20", [5, 10, 20]),
        ("steps", "10-30:10", [10, 20, 30]),
        ("guidance", "1, 2.5, 4", [1, 2.5, 4]),
        ("strength", "0.2-0.6:0.2", [0.2, 0.4, 0.6]),
        ("prompt", "a fox, 3d\n\n여우, 3d\na fox, 3d", ["a fox, 3d", "여우, 3d"]),
        ("solver", "euler\nheun", ["euler", "heun"]),
        ("seed", "18446744073709551615", [2**64 - 1]),
    ],
)
def test_values_are_read(axis, written, values):
    assert values_of(axis, written, ENGLISH) == values


@pytest.mark.parametrize(
    ("across", "down", "fields", "sentence"),
    [
        (("steps", "5, x"), ("none", ""), {}, "x is no number; Steps takes numbers."),
        (("steps", "1-9:0"), ("none", ""), {}, "1-9:0 is no number"),
        (("steps", " "), ("none", ""), {}, "Steps has no values"),
        (("steps", "5"), ("steps", "6"), {}, "Both axes are Steps"),
        (
            ("seed", "1-20:1"),
            ("steps", "1-20:1"),
            {},
            f"400 pictures are too many for a grid; at most {MOST}.",
        ),
        (("strength", "0.5"), ("none", ""), {}, "Strength needs a start picture"),
        (("lora", "0, 1"), ("none", ""), {"prompt": "a fox"}, "The prompt names no LoRA"),
    ],
)
def test_what_makes_no_grid_is_said(across, down, fields, sentence):
    with pytest.raises(Refused) as told:
        planned(BLANK | fields, across, down, ENGLISH)
    assert sentence in str(told.value)


def test_a_grid_spans_both_axes():
    plan = planned(BLANK | {"prompt": "a fox", "count": 4}, ("steps", "5, 10"), ("seed", "1, 2, 3"), ENGLISH)
    assert [[(cell["steps"], cell["seed"], cell["count"]) for cell in row] for row in plan.cells] == [
        [(5, "1", 1), (10, "1", 1)],
        [(5, "2", 1), (10, "2", 1)],
        [(5, "3", 1), (10, "3", 1)],
    ]
    one = planned(BLANK, ("none", ""), ("none", ""), ENGLISH)
    assert one.cells == [[BLANK]]


def test_the_weight_of_a_lora_goes_into_the_prompt_of_the_other_axis():
    for across, down in (
        (("lora", "0, 0.5"), ("prompt", "a <lora:ink:1>")),
        (("prompt", "a <lora:ink:1>"), ("lora", "0, 0.5")),
    ):
        plan = planned(BLANK, across, down, ENGLISH)
        prompts = [cell["prompt"] for row in plan.cells for cell in row]
        assert prompts == ["a <lora:ink:0>", "a <lora:ink:0.5>"]
    assert (
        AXES["lora"].put({"prompt": "<lora:a:1:0.5> <lora:b:2>"}, 0.3)["prompt"]
        == "<lora:a:0.3:0.5> <lora:b:0.3>"
    )


def job(seed: int, prompt: str = "=1+1") -> Job:
    settings = {"prompt": prompt, "seed": seed, "steps": 4, "loras": []}
    result = Result(
        image=0,
        file="x",
        seed=seed,
        width=64,
        height=48,
        sha256="0",
        receipt={"settings": settings, "model": {"title": "Toy"}},
    )
    return Job(
        id=f"{seed:032x}",
        owner="ann",
        state="done",
        order=Order(values={}),
        count=1,
        cost=1,
        created=0,
        results=(result,),
    )


@pytest.fixture
def grid() -> Sheet:
    return Sheet("여우, 3d", ("Steps", ["Steps 2", "Steps 4"]), ("Seed", ["Seed 1"]), [[job(1), None]])


def test_the_table_tells_every_picture_and_starts_no_formula(grid):
    rows = list(csv.DictReader(io.StringIO(made.as_csv(grid).removeprefix("\ufeff"))))
    assert [row["state"] for row in rows] == ["done", "refused"]
    assert rows[0]["Steps"] == "Steps 2" and rows[0]["seed"] == "1" and rows[0]["model"] == "Toy"
    assert rows[0]["prompt"] == "'=1+1"
    told = json.loads(made.as_json(grid))
    assert told["pictures"][0]["settings"]["prompt"] == "=1+1"
    assert told["pictures"][1]["job"] is None


def test_the_contact_sheet_holds_pictures_and_labels(grid, tmp_path):
    Image.new("RGB", (64, 48), "#204080").save(tmp_path / "a.png")
    sheet = Image.open(io.BytesIO(made.as_png(grid, [[tmp_path / "a.png", None]])))
    colours = sheet.convert("RGB").getcolors(1_000_000)
    assert (128 * 96, (0x20, 0x40, 0x80)) in colours, "small pictures are shown twice as large"
    assert any(sum(colour) < 150 for _, colour in colours), "the labels are written"


def test_large_grids_become_sheets_that_can_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "WIDEST", 2048)
    Image.new("RGB", (512, 512)).save(tmp_path / "a.png")
    labels = [f"a long prompt {n} " * 20 for n in range(8)]
    wide = Sheet("t" * 2000, ("Prompt", labels), ("", [""]), [[job(1)] * 8])
    sheet = Image.open(io.BytesIO(made.as_png(wide, [[tmp_path / "a.png"] * 8])))
    assert max(sheet.size) <= made.WIDEST


@pytest.fixture
def plan():
    return planned(BLANK | {"prompt": "a fox"}, ("steps", "2, 4"), ("seed", "1, 2"), ENGLISH)


def blank_sheet() -> Sheet:
    return Sheet("a fox", ("Steps", ["2", "4"]), ("Seed", ["1", "2"]))


async def over(grid: Grid) -> None:
    async with asyncio.timeout(20):
        while not grid.over:
            await asyncio.sleep(0.01)


def test_a_grid_is_drawn_though_nobody_looks_and_waits_where_there_is_too_much(tmp_path, plan):
    async def act() -> None:
        async with at_desk(tmp_path / "state", per_key="3/second") as desk:
            grid = Grid(desk, Kept(tmp_path / "kept", 10**6), ME, plan, blank_sheet())
            await over(grid)
            assert grid.trouble is None
            jobs = [job for line in grid.sheet.jobs for job in line]
            assert [job.state for job in jobs] == ["done"] * 4
            assert not any(job.order.shown for job in jobs), "nobody sees previews here"
            assert [(job.order.values["steps"], job.order.values["seed"]) for job in jobs] == [
                (2, 1),
                (4, 1),
                (2, 2),
                (4, 2),
            ]

    asyncio.run(act())


def test_a_cancelled_grid_takes_no_more_in(tmp_path, plan):
    async def act() -> None:
        backend = ToyBackend()
        async with at_desk(tmp_path / "state", backend) as desk:
            backend.hold()
            grid = Grid(desk, Kept(tmp_path / "kept", 10**6), ME, plan, blank_sheet())
            await until(lambda: all(job for line in grid.sheet.jobs for job in line))
            await grid.cancel()
            await over(grid)
            grid.look()
            assert {job.state for line in grid.sheet.jobs for job in line} == {"cancelled"}

    asyncio.run(act())


def test_what_is_wrong_with_a_picture_is_told_and_the_others_are_drawn(tmp_path):
    async def act() -> None:
        plan = planned(BLANK | {"prompt": "a fox"}, ("model", "nobody\ntoy"), ("none", ""), ENGLISH)
        async with at_desk(tmp_path / "state") as desk:
            grid = Grid(desk, Kept(tmp_path / "kept", 10**6), ME, plan, blank_sheet())
            await over(grid)
            refused, drawn = grid.sheet.jobs[0]
            assert refused is None and drawn is not None and drawn.state == "done"
            assert grid.trouble is not None and "nobody" in grid.trouble.detail

    asyncio.run(act())


def test_a_grid_is_its_owners_and_the_oldest_goes(tmp_path, plan, monkeypatch):
    async def act() -> None:
        async with at_desk(tmp_path / "state") as desk:
            many = [Grid(desk, Kept(tmp_path / "kept", 10**6), ME, plan, blank_sheet()) for _ in range(3)]
            grids = Grids()
            grids.add(many[0])
            assert grids.find(many[0].name, ME) is many[0]
            with pytest.raises(Refused):
                grids.find(many[0].name, OTHER)
            monkeypatch.setattr("sumuk.serve.page.grids.MOST", 2)
            grids.add(many[1])
            grids.add(many[2])
            with pytest.raises(Refused):
                grids.find(many[0].name, ME)
            for grid in many:
                await over(grid)

    asyncio.run(act())
