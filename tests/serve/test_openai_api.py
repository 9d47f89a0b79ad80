"""OpenAI's image calls, made by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_type_hints

import httpx
import openai
import pytest
from fastapi import Request
from openai import OpenAI
from openai.types import image_create_variation_params, image_edit_params, image_generate_params
from PIL import Image, ImageDraw
from tests.serve.toy_backend import ToyBackend, receipt_of
from tests.serve.toy_running import Toy, toy_running

from sumuk.serve.openai_answer import _due, stream
from sumuk.serve.openai_api import _white_where_clear
from sumuk.serve.openai_form import folded
from sumuk.serve.openai_schema import Edit, Generation, Variation, Wanted
from sumuk.serve.order import Caller, Order
from sumuk.serve.trouble import MEDIA, Refused, Trouble
from sumuk.serve.wire import Drawn

TOKENS = {"ann": "a" * 16}


def of(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[Toy]:
    with toy_running(tmp_path_factory.mktemp("toy") / "state", ToyBackend(preview=1)) as made:
        yield made


@pytest.fixture(scope="module")
def client(toy) -> OpenAI:
    return of(toy.url)


@pytest.fixture(scope="module")
def real(server) -> OpenAI:
    """The client, before the real server with the miniature."""
    return of(server.url)


def png(mode: str = "RGB", colour: object = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def half_clear(size: tuple[int, int] = (64, 64)) -> bytes:
    """A picture whose left half is transparent."""
    image = Image.new("RGBA", size, (255, 0, 0, 255))
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 2 - 1, size[1]), (0, 0, 0, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def order_of(toy: Toy, job: str) -> dict:
    return toy.client.get(f"/api/jobs/{job}").json()["request"]


# The real model.


def test_the_miniature_draws_what_is_asked(real):
    answer = real.images.generate(
        prompt="a red circle",
        n=2,
        size="64x64",
        extra_body={"sumuk": {"steps": 2, "seed": 7, "solver": "Euler a"}},
    )
    assert answer.size == "64x64" and answer.output_format == "png" and answer.background == "opaque"
    assert abs(answer.created - time.time()) < 60
    assert answer.model_extra["sumuk"]["seeds"] == [7, 8]
    first, second = (opened(each.b64_json) for each in answer.data)
    assert first.format == "PNG" and first.size == (64, 64) and first.tobytes() != second.tobytes()
    receipt = json.loads(first.text["sumuk"])
    assert receipt["settings"]["solver"] == "euler-ancestral" and receipt["settings"]["seed"] == 7


def test_an_edit_keeps_what_the_mask_covers(real):
    given = png(colour=(10, 200, 30))
    answer = real.images.edit(
        image=("x.png", given, "image/png"),
        mask=half_clear(),
        prompt="a red circle",
        extra_body={"sumuk": {"steps": 3, "seed": 7, "mask_blur": 0}},
    )
    drawn = opened(answer.data[0].b64_json).convert("RGB")
    assert {drawn.getpixel((x, y)) for x in range(40, 64) for y in range(64)} == {(10, 200, 30)}
    assert len({drawn.getpixel((x, y)) for x in range(24) for y in range(64)}) > 20
    settings = json.loads(opened(answer.data[0].b64_json).text["sumuk"])["settings"]
    assert settings["strength"] == 1.0 and settings["mask"] is not None


def test_a_picture_is_varied(real):
    given = opened(
        real.images.generate(prompt="a red circle", extra_body={"sumuk": {"steps": 2}}).data[0].b64_json
    )
    file = io.BytesIO()
    given.save(file, "PNG")
    answer = real.images.create_variation(image=file.getvalue(), n=1, extra_body={"sumuk": {"steps": 5}})
    settings = json.loads(opened(answer.data[0].b64_json).text["sumuk"])["settings"]
    assert settings["strength"] == 0.6 and settings["prompt"] == "" and settings["init"] is not None


def test_the_miniature_streams(real):
    events = list(
        real.images.generate(
            prompt="a red circle",
            stream=True,
            partial_images=2,
            extra_body={"sumuk": {"steps": 6, "seed": 7}},
        )
    )
    kinds = [each.type for each in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    plain = real.images.generate(prompt="a red circle", extra_body={"sumuk": {"steps": 6, "seed": 7}})
    assert opened(events[-1].b64_json).tobytes() == opened(plain.data[0].b64_json).tobytes()


def test_the_models_are_listed(real):
    listed = list(real.models.list())
    assert "miniature" in [each.id for each in listed] and {each.object for each in listed} == {"model"}
    assert real.models.retrieve("miniature").id == "miniature"


# Formats and addresses.


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(client, kind):
    answer = client.images.generate(prompt="x", output_format=kind)
    assert opened(answer.data[0].b64_json).format == kind.upper() and answer.output_format == kind


def test_compression(client):
    said = {"prompt": "x", "size": "256x256", "output_format": "jpeg", "extra_body": {"sumuk": {"seed": 1}}}
    least, ninety, most, usual = (
        client.images.generate(**said, **more).data[0].b64_json
        for more in (*({"output_compression": each} for each in (1, 90, 100)), {})
    )
    assert len(least) < len(most) and ninety != most == usual


@pytest.mark.parametrize("more", [{}, {"output_format": "jpeg", "output_compression": 50}])
def test_urls(client, toy, more):
    answer = client.images.generate(
        prompt="x", response_format="url", n=2, extra_body={"sumuk": {"seed": 1}}, **more
    )
    kind = more.get("output_format", "png")
    assert [each.b64_json for each in answer.data] == [None, None]
    for each in answer.data:
        assert each.url.startswith(f"{toy.url}/v1/images/files/")
        got = httpx.get(each.url)
        assert got.headers["content-type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(got.content)).format == kind.upper()
    assert answer.data[0].url != answer.data[1].url
    same = client.images.generate(prompt="x", n=2, extra_body={"sumuk": {"seed": 1}}, **more)
    assert base64.b64decode(same.data[1].b64_json) == httpx.get(answer.data[1].url).content


def test_urls_need_the_token(tmp_path):
    with toy_running(tmp_path / "state", tokens=TOKENS) as toy:
        url = of(toy.url, "a" * 16).images.generate(prompt="x", response_format="url").data[0].url
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer " + "a" * 16}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            of(toy.url, "wrong").images.generate(prompt="x")


# What is asked arrives.


def test_sizes_and_own_settings(client, toy):
    answer = client.images.generate(
        prompt="x",
        model="second",
        size="128x64",
        user="someone",
        quality="standard",
        background="auto",
        moderation="auto",
        extra_body={"sumuk": {"seed": 5, "skip_layers": [1, 2], "loras": [{"name": "ink", "weight": 0.5}]}},
    )
    assert answer.size == "128x64"
    document = toy.client.get(f"/api/jobs/{answer.model_extra['sumuk']['job']}").json()
    assert document["model"] == "second"
    order = toy.do(toy.app.state.desk.job, document["id"], Caller("local")).order
    assert order.attached  # and does not outlive the server
    assert document["request"] == {
        "prompt": "x",
        "count": 1,
        "width": 128,
        "height": 64,
        "seed": 5,
        "skip_layers": [1, 2],
        "loras": [{"name": "ink", "weight": 0.5}],
    }


def test_own_settings_in_a_form(client, toy):
    said = {"steps": 5, "skip_layers": [1, 2], "hires": {"scale": 1.5}, "quick": True, "guidance": 3.5}
    answer = client.images.edit(image=png(), prompt="x", n=1, size="auto", extra_body={"sumuk": said})
    request = order_of(toy, answer.model_extra["sumuk"]["job"])
    assert {name: request[name] for name in said} == said and request["strength"] == 0.75
    lists = {"loras": [{"name": "ink"}, {"name": "b", "weight": 0.5}]}
    answer = client.images.edit(image=png(), prompt="x", extra_body={"sumuk": json.dumps(lists)})
    assert order_of(toy, answer.model_extra["sumuk"]["job"])["loras"] == lists["loras"]
    with pytest.raises(openai.BadRequestError, match="send it as JSON text"):
        client.images.edit(image=png(), prompt="x", extra_body={"sumuk": lists})


def test_an_edit_in_json(client, toy):
    body = {"prompt": "x", "image": base64.b64encode(png()).decode(), "n": 1}
    made = toy.client.post("/v1/images/edits", json=body)
    assert made.status_code == 200, made.text
    assert "mask" not in order_of(toy, made.json()["sumuk"]["job"])
    assert toy.client.post("/v1/images/edits", json=body | {"n": "1"}).status_code == 400  # strict in JSON


def test_a_clear_part_of_the_picture_is_the_mask(client, toy):
    answer = client.images.edit(image=half_clear(), prompt="x")
    request = order_of(toy, answer.model_extra["sumuk"]["job"])
    assert request["strength"] == 1.0 and "mask" in request


def test_strength_can_be_said(client, toy):
    answer = client.images.edit(image=half_clear(), prompt="x", extra_body={"sumuk": {"strength": 0.5}})
    assert order_of(toy, answer.model_extra["sumuk"]["job"])["strength"] == 0.5


def test_a_mask_is_white_where_openais_is_clear():
    mask = Image.open(io.BytesIO(_white_where_clear(half_clear())))
    assert mask.mode == "L" and mask.getpixel((0, 0)) == 255 and mask.getpixel((63, 63)) == 0
    assert _white_where_clear(png()) is None and _white_where_clear(png("RGBA")) is None


def test_every_parameter_of_the_client_is_known():
    for kinds, known in (
        ((image_generate_params.ImageGenerateParamsStreaming,), Generation),
        ((image_edit_params.ImageEditParamsStreaming,), Edit),
        ((image_create_variation_params.ImageCreateVariationParams,), Variation),
    ):
        theirs = {name for kind in kinds for name in get_type_hints(kind)}
        assert theirs <= known.model_fields.keys()
        assert known.model_fields.keys() - theirs <= {"sumuk", "moderation", "style"}
    called = set(inspect.signature(OpenAI(api_key="x").images.generate).parameters)
    assert (
        called - {"extra_headers", "extra_query", "extra_body", "timeout"} <= Generation.model_fields.keys()
    )


# Streams.


def test_partial_pictures_are_spread_evenly(client, toy):
    events = list(
        client.images.generate(
            prompt="x",
            stream=True,
            partial_images=3,
            output_format="jpeg",
            extra_body={"sumuk": {"steps": 8}},
        )
    )
    assert [each.type for each in events] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert [each.partial_image_index for each in events[:-1]] == [0, 1, 2]
    for each in events:
        assert opened(each.b64_json).format == "JPEG" and each.output_format == "jpeg"
        assert each.quality == "auto" and each.background == "opaque" and each.created_at
    assert [each.size for each in events] == ["auto"] * 3 + ["64x64"]


def test_which_previews_are_sent():
    for steps, partial, wanted in ((8, 3, [2, 4, 6]), (20, 3, [5, 10, 15]), (10, 1, [5]), (3, 3, [1, 2, 3])):
        sent: list[int] = []
        for step in range(1, steps + 1):
            if len(sent) < partial and _due(step, steps, len(sent), Wanted(partial=partial)):
                sent.append(step)
        assert sent == wanted
    assert not _due(5, 0, 0, Wanted(partial=1))


def test_an_edit_streams(client):
    events = list(client.images.edit(image=png(), prompt="x", stream=True, partial_images=1))
    assert [each.type for each in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert opened(events[0].b64_json).format == "PNG"


def test_several_pictures_stream_in_their_order(client):
    own = {"sumuk": {"seed": 3}}
    events = list(client.images.generate(prompt="x", stream=True, n=3, extra_body=own))
    plain = client.images.generate(prompt="x", n=3, extra_body=own)
    assert [each.b64_json for each in events] == [each.b64_json for each in plain.data]


def test_a_picture_is_sent_while_the_next_is_drawn(toy):
    toy.do(toy.backend.hold)
    begun = len(toy.backend.begun)
    body = {"prompt": "x", "n": 2, "stream": True, "sumuk": {"seed": 5}}
    with (
        httpx.Client(base_url=toy.url, timeout=20) as other,
        other.stream("POST", "/v1/images/generations", json=body) as response,
    ):
        toy.until(lambda: len(toy.backend.begun) > begun)
        job = toy.backend.begun[-1][0]
        order = Order(values={"prompt": "x", "seed": 5})

        def finish_the_first() -> None:
            toy.backend._work[job].pop(0).cancel()
            toy.backend.tell(Drawn(job, 0, png(), receipt_of(order, 0, 4)))

        toy.do(finish_the_first)
        lines = response.iter_lines()
        for line in lines:
            assert not line.startswith(": ping"), "nothing came until the first heartbeat"
            if line.startswith("data: "):
                assert json.loads(line[6:])["b64_json"] == base64.b64encode(png()).decode()
                break
        assert toy.state(job) == "running"
        toy.do(toy.backend.release)
        assert sum(line.startswith("data: ") for line in lines) == 1


def test_a_failure_in_a_stream(client, toy):
    toy.do(toy.backend.hold)
    begun = len(toy.backend.begun)
    events = client.images.generate(prompt="x", stream=True)
    toy.until(lambda: len(toy.backend.begun) > begun)
    job = toy.backend.begun[-1][0]
    toy.do(toy.backend.lose, job, Trouble("content-moderated", "the picture was withheld"))
    toy.do(toy.backend.release)
    with pytest.raises(openai.APIError, match="the picture was withheld") as caught:
        list(events)
    assert caught.value.code == "content_policy_violation"


# Going away, coming back.


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_stops_its_job(toy, streamed):
    toy.do(toy.backend.hold)
    try:
        begun = len(toy.backend.begun)
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(base_url=toy.url, timeout=1) as other,
            other.stream(
                "POST", "/v1/images/generations", json={"prompt": "x", "stream": streamed}
            ) as response,
        ):
            response.read()
        assert len(toy.backend.begun) == begun + 1
        job = toy.backend.begun[-1][0]
        toy.until(lambda: toy.state(job) == "cancelled")
        assert job in toy.backend.stopped
    finally:
        toy.do(toy.backend.release)


def test_a_stream_that_is_closed_at_an_event_stops_its_job(tmp_path):
    """While an event is being sent, nothing waits for news of the job."""

    async def go() -> str:
        desk, caller = toy.app.state.desk, Caller("local")
        order = Order(values={"prompt": "x", "steps": 1000}, attached=True)
        job, _ = await desk.submit(order, caller)

        async def never() -> None:
            await asyncio.Event().wait()

        request = Request({"type": "http", "app": toy.app, "sumuk.caller": caller}, never)
        events = stream(request, job, Wanted(events="image_generation", partial=1000))
        assert "partial_image" in (await anext(events)).event
        await events.aclose()
        return job.id

    with toy_running(tmp_path / "state", ToyBackend(turn=0.005, preview=1)) as toy:
        assert toy.state(toy.do(go)) == "cancelled"


def test_a_client_that_goes_away_between_two_events(tmp_path):
    with toy_running(tmp_path / "state", ToyBackend(steps=1000, turn=0.002, preview=1)) as toy:
        body = {"prompt": "x", "stream": True, "partial_images": 3, "sumuk": {"steps": 1000}}
        with (
            httpx.Client(base_url=toy.url, timeout=20) as other,
            other.stream("POST", "/v1/images/generations", json=body) as response,
        ):
            assert any("partial_image" in line for line in response.iter_lines())
        job = toy.backend.begun[-1][0]
        toy.until(lambda: toy.state(job) == "cancelled", 2)


def test_an_idempotency_key_is_answered_with_the_same_pictures(client, toy):
    key = {"Idempotency-Key": "k1"}
    for call in (
        lambda: client.images.generate(prompt="x", n=2, extra_headers=key),
        lambda: client.images.edit(image=png(), prompt="x", extra_headers={"Idempotency-Key": "k2"}),
        lambda: client.images.create_variation(image=png(), extra_headers={"Idempotency-Key": "k3"}),
    ):
        begun = len(toy.backend.begun)
        first, again = call(), call()
        assert [each.b64_json for each in first.data] == [each.b64_json for each in again.data]
        assert first.model_extra["sumuk"] == again.model_extra["sumuk"]
        assert len(toy.backend.begun) == begun + 1
    streamed = list(client.images.generate(prompt="x", n=2, stream=True, extra_headers=key))
    assert [each.type for each in streamed] == ["image_generation.completed"] * 2
    with pytest.raises(openai.UnprocessableEntityError):
        client.images.generate(prompt="y", extra_headers=key)


# Saying no.


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"size": "100x100"}, "size"),
        ({"size": "64"}, "size"),
        ({"size": "9000x64"}, "size"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": True}, "n"),
        ({"background": "transparent"}, "background"),
        ({"quality": "hd"}, "quality"),
        ({"quality": "low"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"moderation": "low"}, "moderation"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "svg"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"partial_images": 1, "stream": True, "n": 2}, "partial_images"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"complexity": "low"}, "complexity"),
        ({"frame_count": 3}, "frame_count"),
        ({"svg": {"model": "x"}}, "svg"),
        ({"extra_body": {"wibble": 1}}, "wibble"),
        ({"extra_body": {"sumuk": {"wibble": 1}}}, "sumuk.wibble"),
        ({"extra_body": {"sumuk": {"steps": "4"}}}, "sumuk.steps"),
        ({"extra_body": {"sumuk": {"steps": 0}}}, "sumuk.steps"),
        ({"extra_body": {"sumuk": {"prompt": "x"}}}, "sumuk.prompt"),
        ({"extra_body": {"sumuk": {"deadline": 1}}}, "sumuk.deadline"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", **more)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"image": [png(), png()]}, "image: there are 2"),
        ({"image": b"GIF89a"}, "image"),
        ({"image": png(), "mask": png()}, "no transparent part"),
        ({"image": png(), "mask": half_clear((32, 32))}, "mask"),
        ({"image": png(), "markup": png()}, "markup"),
        ({"image": png(), "input_fidelity": "high"}, "input_fidelity"),
        ({"image": png(), "n": 11}, "n: "),
        ({"image": png(), "extra_body": {"sumuk": "{"}}, "sumuk: the body is no JSON"),
        (
            {"image": png(), "extra_body": {"sumuk": '{"steps": 1, "steps": 2}'}},
            "sumuk: the name 'steps' stands twice",
        ),
        ({"image": png(), "user": "a\0b"}, "user: the text holds the character NUL"),
        ({"image": png(), "extra_body": {"sumuk": "[]"}}, "sumuk"),
    ],
)
def test_a_bad_edit_is_refused(client, more, why):
    with pytest.raises(openai.BadRequestError, match=why):
        client.images.edit(prompt="x", **more)


def test_a_model_that_is_not_there(client):
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="x", model="gpt-image-1.5")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-image-1.5")
    assert caught.value.param == "model" and "gpt-image-1.5" in caught.value.message


def test_a_prompt_that_is_moderated(client, toy):
    toy.do(toy.backend.hold)
    begun = len(toy.backend.begun)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: client.images.generate(prompt="x"))
        toy.until(lambda: len(toy.backend.begun) > begun)
        trouble = Trouble("content-moderated", "the picture was withheld by a safety check")
        toy.do(toy.backend.lose, toy.backend.begun[-1][0], trouble)
        toy.do(toy.backend.release)
        with pytest.raises(openai.BadRequestError, match="withheld") as caught:
            waiting.result(20)
    assert caught.value.code == "content_policy_violation"


def test_problems_have_both_shapes(toy):
    refused = toy.client.post("/v1/images/generations", json={"prompt": "x", "n": 0})
    assert refused.headers["content-type"] == MEDIA
    document = refused.json()
    assert document["type"] == "urn:sumuk:bad-value" and document["status"] == 400
    assert document["error"]["message"] == document["detail"] and document["error"]["param"] == "n"


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"content-type": "text/plain"}, b'{"prompt": "x"}'),
        ({"content-type": "application/x-www-form-urlencoded"}, b"prompt=x"),
        ({"content-type": "application/json"}, b"{"),
        ({"content-type": "application/json"}, b"[]"),
        ({"content-type": "application/json"}, b'{"prompt": "\xff"}'),
        ({"content-type": "multipart/form-data"}, b"x"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\n"),
        ({}, b""),
    ],
)
@pytest.mark.parametrize("call", ["generations", "edits", "variations"])
def test_a_body_of_another_kind_is_refused(toy, call, headers, content):
    refused = toy.client.post(f"/v1/images/{call}", content=content, headers=headers)
    assert refused.status_code in (400, 411, 415) and refused.headers["content-type"] == MEDIA
    assert refused.json()["detail"]


def test_forms_are_folded():
    items = [
        ("a", "1"),
        ("b[c]", "2"),
        ("b[d][]", "3"),
        ("b[d][]", "4"),
        ("e[]", b"5"),
        ("sumuk", '{"f": 6}'),
    ]
    assert folded(items) == {"a": "1", "b": {"c": "2", "d": ["3", "4"]}, "e": [b"5"], "sumuk": {"f": 6}}
    for bad in (
        [("a", "1"), ("a", "2")],
        [("a", "1"), ("a[b]", "2")],
        [("a[b]", "1"), ("a[]", "2")],
        [("a[]", "1"), ("a", "2")],
        [("a[][b]", "1")],
        [("a[b", "1")],
        [("[a]", "1")],
        [("", "1")],
        [("a" * 100, "1")],
        [("a", "\0")],
    ):
        with pytest.raises(Refused):
            folded(bad)
