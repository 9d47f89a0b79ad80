"""Fields as orders and back: blank is the model's own, nothing is lost in silence."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json

import pytest
from PIL import Image

from sumuk.serve.order import Order
from sumuk.serve.packing import pack
from sumuk.serve.page.form import BLANK, KEPT, as_data, form_of, formed, model_named, order_of, remembered
from sumuk.serve.page.kept import DAYS, MOST, Kept, named
from sumuk.serve.trouble import Refused
from sumuk.serve.wire import Entry


def png(colour: str = "red", size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def kept(tmp_path) -> Kept:
    return Kept(tmp_path / "pictures", 1_000_000)


def order(kept: Kept, **fields) -> Order:
    return asyncio.run(order_of(BLANK | fields, kept, "ann"))


def take(kept: Kept, data: bytes, owner: str = "ann") -> str:
    return asyncio.run(kept.take(owner, as_data(data), "the picture"))


def test_blank_fields_say_nothing(kept):
    assert order(kept) == Order(values={"count": 1}, shown=True)


def test_every_field_reaches_the_order(kept):
    start, hint = take(kept, png("red")), take(kept, png("blue"))
    mask = as_data(png("white", mode="L"))
    made = order(
        kept,
        **{
            "prompt": "a fox",
            "negative": "blur",
            "solver": "euler",
            "grid": "karras",
            "steps": 8.0,
            "guidance": 4.5,
        },
        **{
            "width": 64,
            "height": 128,
            "seed": " 18446744073709551615 ",
            "count": 3,
            "model": "m",
            "vae": "v",
        },
        **{"start": {"picture": start, "mask": mask}, "strength": 0.4, "mask_blur": 5},
        **{"control": "edges", "hint": {"picture": hint}, "control_weight": 0.8},
        **{
            "hires": True,
            "hires_scale": 1.5,
            "hires_strength": 0.3,
            "hires_steps": 4,
            "further": '{"clip_skip": 2}',
        },
    )
    values = dict(made.values)
    pictures = [values.pop("init"), values.pop("mask"), values["steer"][0].pop("hint")]
    assert [Image.open(io.BytesIO(each)).convert("RGB").getpixel((0, 0)) for each in pictures] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
    ]
    assert values == {
        **{
            "prompt": "a fox",
            "negative": "blur",
            "solver": "euler",
            "grid": "karras",
            "steps": 8,
            "guidance": 4.5,
        },
        **{"width": 64, "height": 128, "seed": 2**64 - 1, "count": 3, "strength": 0.4, "mask_blur": 5},
        "steer": [{"control": "control", "weight": 0.8}],
        "hires": {"scale": 1.5, "strength": 0.3, "steps": 4},
        "clip_skip": 2,
    }
    assert isinstance(values["steps"], int)
    assert (made.model, made.vae, made.controls) == ("m", "v", {"control": "edges"})


def test_an_order_comes_back_as_the_fields_that_made_it(kept):
    fields = {
        **{
            "prompt": "a fox",
            "steps": 8,
            "guidance": 4.5,
            "seed": "7",
            "count": 2,
            "strength": 0.4,
            "mask_blur": 5,
        },
        "start": {"picture": take(kept, png("red")), "mask": as_data(png("white", mode="L"))},
        **{
            "control": "edges",
            "hint": {"picture": take(kept, png("blue")), "mask": None},
            "control_weight": 0.8,
        },
        **{
            "hires": True,
            "hires_scale": 1.5,
            "hires_strength": 0.3,
            "hires_steps": 4,
            "further": '{"clip_skip": 2}',
        },
    }
    light, _ = pack(order(kept, **fields))  # as a job has it
    form, left = asyncio.run(form_of(light.values, kept, "ann", light.controls))
    mask = form["start"].pop("mask")
    assert Image.open(io.BytesIO(asyncio.run(_bytes(mask)))).getpixel((0, 0)) == 255
    fields["start"].pop("mask")
    assert left == {}
    assert form == BLANK | fields


async def _bytes(data: str) -> bytes:
    from sumuk.serve.calls import unpacked

    return unpacked(data, "it")


def test_what_has_no_place_is_listed(kept):
    gone = {"sha256": hashlib.sha256(b"gone").hexdigest()}
    values = {
        "prompt": "a fox",
        **{
            "init": gone,
            "mask": gone,
            "like": gone,
            "rescale": 0.0,
            "loras": [{"name": "ink"}],
            "preview": 2,
        },
        "steer": [{"control": "a", "hint": gone, "start": 0.5}, {"control": "b", "hint": gone}],
    }
    form, left = asyncio.run(form_of(values, kept, "ann", {"a": "edges"}))
    assert left.keys() == {"init", "mask", "like", "hint", "steer"}
    assert "start" in left["steer"]
    assert json.loads(form["further"]) == {"loras": [{"name": "ink"}]}, "defaults are not told again"
    assert form["control"] == "edges" and form["start"] is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 4.5}, "steps '4.5' is no whole number"),
        ({"seed": "abc"}, "seed 'abc' is no whole number"),
        ({"seed": "9" * 5000}, "is no whole number"),
        ({"count": float("inf")}, "count 'inf' is no whole number"),
        ({"control": "edges"}, "control 'edges' follows a picture; choose one beside it"),
        ({"start": {"picture": "0" * 32}}, "the picture is no longer kept; choose it again"),
        ({"start": {"picture": "../../jobs"}}, "the picture is no longer kept; choose it again"),
        ({"further": "[1]"}, "further settings: it is no object in braces"),
        ({"further": '{"steps": 3}'}, "further settings: 'steps' has its own field"),
        ({"further": '{"like": "AAAA"}'}, "further settings: 'like' has its own field"),
        ({"further": '{"clip_skip": 99}'}, "further settings: clip_skip: "),
        ({"further": '{"nonsense": 1}'}, "further settings: nonsense: "),
        ({"further": "{"}, "further settings: Expecting"),
    ],
)
def test_a_field_that_cannot_be_meant_is_refused_by_name(kept, fields, sentence):
    with pytest.raises(Refused) as told:
        order(kept, **fields)
    assert sentence in str(told.value)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "[" * 100_000, '{"steps": "x", "prompt": 3}', None, 5]
)
def test_what_a_browser_cannot_have_kept_is_blank(text):
    assert remembered(text) == KEPT


def test_what_a_browser_kept_comes_back():
    said = {
        "prompt": "여우",
        "steps": 8,
        "hires": True,
        "start": {"picture": "a" * 32, "mask": None},
        "current": "j",
    }
    assert remembered(json.dumps(said | {"unknown": 1})) == KEPT | said
    assert formed(BLANK, [*BLANK.values()]) == BLANK
    assert (
        formed(
            ["start", "steps", *(n for n in BLANK if n not in ("start", "steps"))], [[1], True, *[None] * 21]
        )
        == BLANK
    )


def test_pictures_are_their_owners_and_tidied(kept, tmp_path, monkeypatch):
    data = png()
    name = take(kept, data)
    assert name == named(hashlib.sha256(asyncio.run(kept.read("ann", name))).hexdigest())
    with pytest.raises(Refused):
        kept.path("ben", name)
    (tmp_path / "secret.png").write_bytes(data)
    (tmp_path / "pictures" / "secret.png").write_bytes(data)
    for way in ("../secret", "../../secret", str(tmp_path / "secret"), name.upper()):
        with pytest.raises(Refused):
            kept.path("ann", way)
    for wrong in ("not a data url", "data:image/png;base64,%%", "data:image/png;base64,bm9wZQ=="):
        with pytest.raises(Refused) as told:
            asyncio.run(kept.take("ann", wrong, "the picture"))
        assert told.value.trouble.type == "bad-picture"
    monkeypatch.setattr("sumuk.serve.page.kept.MOST", 3)
    names = [asyncio.run(kept.put("ann", png(size=(8, 8 * n)))) for n in range(1, 6)]
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 3
    assert kept.path("ann", names[-1])
    assert MOST >= 10 and DAYS >= 1


def test_the_model_of_a_picture_is_found_by_hash_file_or_title():
    common = {"sort": "model", "kind": "sd1/text-to-image", "size": 1}
    first = Entry(name="one", title="One", file="sub/one.safetensors", sha256="ab" * 32, **common)
    second = Entry(name="two", title="Two", file="two.safetensors", **common)
    assert model_named({"sha256": "ab" * 5}, [second, first]) == "one"
    assert model_named({"file": "two.safetensors"}, [first, second]) == "two"
    assert model_named({"title": "Two"}, [first, second]) == "two"
    assert model_named({"sha256": "ab", "title": None}, [first, second]) is None
