"""A1111's calls as its own clients make them: the package webuiapi against the real server, faults against the toy."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image, ImageDraw
from tests.serve.conftest import Running
from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_running import Toy, toy_running

from sumuk.generate.infotext import parse_infotext
from sumuk.generate.receipt import read_receipt
from sumuk.serve.offered import choices
from sumuk.serve.order import Order

SMALL: dict[str, Any] = {
    "prompt": "a red heart, flat style",
    "width": 64,
    "height": 64,
    "steps": 2,
    "seed": 7,
}


class Named(ToyBackend):
    """Knows what the real one knows by name."""

    async def choices(self) -> dict[str, list[dict[str, Any]]]:
        return choices()


class Uneven(Named):
    """Never finishes more than two pictures."""

    async def _picture(self, job: str, order: Order, image: int) -> None:
        if image > 1:
            await asyncio.Event().wait()
        await super()._picture(job, order, image)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    with toy_running(tmp_path / "state", Named(steps=4, turn=0.01)) as made:
        yield made


@pytest.fixture(scope="module")
def api(server: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.convert("RGB").tobytes() == second.convert("RGB").tobytes()


# The client that we did not write, and the real thing.


def test_a_picture_and_what_made_it(api, tmp_path):
    made = api.txt2img(
        **SMALL, batch_size=2, sampler_name="DPM++ 2M Karras", cfg_scale=5, negative_prompt="blurry"
    )
    assert [image.size for image in made.images] == [(64, 64)] * 2
    assert not same(*made.images)
    info = made.info
    assert (info["seed"], info["all_seeds"], info["all_prompts"]) == (7, [7, 8], [SMALL["prompt"]] * 2)
    assert (info["sampler_name"], info["steps"], info["cfg_scale"]) == ("DPM++ 2M", 2, 5.0)
    said = parse_infotext(info["infotexts"][1])
    assert (said.prompt, said.negative) == (SMALL["prompt"], "blurry")
    assert said.settings["Seed"] == "8" and said.settings["Model hash"] == info["sd_model_hash"]
    assert made.images[1].info["parameters"] == info["infotexts"][1]
    (tmp_path / "a.png").write_bytes(base64.b64decode(made.json["images"][1]))
    assert read_receipt(tmp_path / "a.png")[1]["settings"]["seed"] == 8
    assert same(
        made.images[1],
        api.txt2img(
            **SMALL | {"seed": 8},
            sampler_name="DPM++ 2M",
            scheduler="Karras",
            cfg_scale=5,
            negative_prompt="blurry",
        ).image,
    )


def test_what_the_client_leaves_out_is_the_models_own(server):
    answer = server.client.post("/sdapi/v1/txt2img", json={"prompt": "a star", "steps": 2}).json()
    parameters = answer["parameters"]
    made = json.loads(answer["info"])
    assert (parameters["width"], parameters["height"]) == (64, 64) == (made["width"], made["height"])
    assert parameters["cfg_scale"] == made["cfg_scale"] > 1
    assert parameters["sampler_name"] == made["sampler_name"] == "DPM++ 2M"
    assert parameters["tiling"] is None and parameters["seed"] == -1


def test_a_picture_drawn_over(api):
    first = api.txt2img(**SMALL).image
    again = api.img2img(images=[first], **SMALL, denoising_strength=0.5)
    assert again.image.size == (64, 64) and not same(first, again.image)
    assert again.info["denoising_strength"] == 0.5 and again.parameters["init_images"] is None
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((8, 8, 23, 23), fill=255)
    kept = np.asarray(mask) == 0
    for more in ({"inpaint_full_res": False}, {}):
        part = api.img2img(images=[first], mask_image=mask, mask_blur=0, **SMALL, **more).image
        assert (np.asarray(part)[kept] == np.asarray(first)[kept]).all()
        assert (np.asarray(part)[~kept] != np.asarray(first)[~kept]).any()


def test_a_second_pass_and_another_format(api, server):
    made = api.txt2img(**SMALL, enable_hr=True, hr_scale=1.5, override_settings={"samples_format": "jpg"})
    assert made.image.format == "JPEG" and made.image.size == (96, 96)
    assert parse_infotext(made.info["infotexts"][0]).settings["Hires upscale"] == "1.5"
    assert api.txt2img(**SMALL).image.format == "PNG"
    silent = server.client.post("/sdapi/v1/txt2img", json={**SMALL, "send_images": False}).json()
    assert silent["images"] == [] and json.loads(silent["info"])["seed"] == 7


def test_what_a_picture_says(api):
    made = api.txt2img(**SMALL, negative_prompt="밤")
    said = api.png_info(made.image)
    assert said.info == made.info["infotexts"][0]
    assert said.parameters["Prompt"] == SMALL["prompt"] and said.parameters["Negative prompt"] == "밤"
    assert (said.parameters["Seed"], said.parameters["Size-1"], said.parameters["Size-2"]) == (
        "7",
        "64",
        "64",
    )
    assert "sumuk" in said.json["items"]
    nothing = api.png_info(Image.new("RGB", (4, 4)))
    assert nothing.info == "" and nothing.parameters == {} == nothing.json["items"]


def test_pictures_are_enlarged(api):
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    double = api.extra_single_image(image, upscaler_1="Lanczos").image
    assert same(double, image.resize((128, 96), Image.Resampling.LANCZOS))
    assert same(api.extra_single_image(image).image, image)
    to = {"resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 90, "upscaler_1": "Nearest"}
    assert api.extra_single_image(image, **to).image.size == (100, 90)
    assert api.extra_single_image(image, **to, upscaling_crop=False).image.size == (120, 90)
    both = api.extra_single_image(
        image, upscaler_1="Lanczos", upscaler_2="Nearest", extras_upscaler_2_visibility=1
    )
    assert same(both.image, image.resize((128, 96), Image.Resampling.NEAREST))
    some = api.extra_batch_images([image, image.rotate(90, expand=True)], upscaler_1="Nearest")
    assert [each.size for each in some.images] == [(128, 96), (96, 128)]
    for bad, why in (
        ({"upscaler_1": "LDSR"}, "is not here; known: None, Lanczos, Nearest"),
        ({"gfpgan_visibility": 1}, "gfpgan_visibility 1 is not supported"),
        (
            {"upscaler_1": "Nearest", "resize_mode": 1, "upscaling_resize_h": 16000},
            "that are left for this call",
        ),
    ):
        with pytest.raises(RuntimeError, match=why):
            api.extra_single_image(image, **bad)


def test_everything_that_the_client_looks_up(api):
    assert api.util_get_current_model() in api.util_get_model_names()
    assert {"Euler a", "DPM++ 2M", "deis"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras", "trailing"} <= set(api.util_get_scheduler_names())
    assert {each["name"] for each in api.get_upscalers()} == {"None", "Lanczos", "Nearest"}
    assert "Latent" in {each["name"] for each in api.get_latent_upscale_modes()}
    assert api.get_face_restorers() == api.get_realesrgan_models() == api.get_prompt_styles() == []
    assert api.get_sd_vae() == api.get_hypernetworks() == [] and api.get_embeddings() == {
        "loaded": {},
        "skipped": {},
    }
    assert isinstance(api.get_loras(), list)
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_cmd_flags()["listen"] is False
    ram = api.get_memory()["ram"]
    assert 0 < ram["used"] < ram["total"] == ram["used"] + ram["free"]
    assert api.refresh_checkpoints() == api.skip() == api.interrupt() == {}
    assert (
        api.controlnet_version() == 2
        and api.controlnet_model_list() == []
        and api.controlnet_module_list() == ["none"]
    )
    api.util_wait_for_ready()
    api.util_set_model("miniature")
    api.set_options(api.get_options())
    assert api.txt2img(**SMALL).info["sd_model_name"]


def test_samplers_and_schedulers_of_both_programs_draw(api):
    for name, scheduler in (
        ("Euler a", "SGM Uniform"),
        ("deis", "trailing"),
        ("DPM++ 3M SDE Exponential", None),
    ):
        assert api.txt2img(**SMALL | {"steps": 3}, sampler_name=name, scheduler=scheduler).image.size == (
            64,
            64,
        )


def test_the_client_is_told_why(api, server):
    with pytest.raises(RuntimeError, match="tiling true is not supported; leave it out"):
        api.txt2img(**SMALL, tiling=True)
    with pytest.raises(RuntimeError, match="interrogate needs a captioning model"):
        api.interrogate(Image.new("RGB", (4, 4)))
    refused = server.client.post("/sdapi/v1/unload-checkpoint")
    assert refused.status_code == 501 and refused.json()["error"] == refused.json()["title"]
    assert server.client.post("/sdapi/v1/reload-checkpoint").json() == {}


@pytest.mark.parametrize(
    "picture", ["!", "AAAA", "http://127.0.0.1/a.png", base64.b64encode(b"GIF89a").decode()]
)
def test_what_is_no_png_says_nothing(server, picture):
    answer = server.client.post("/sdapi/v1/png-info", json={"image": picture})
    assert answer.status_code == 400 and answer.headers["content-type"] == "application/problem+json"


# What happens while a call waits.


def calling(toy: Toy, **body: Any) -> Future[httpx.Response]:
    """A txt2img in another thread, and the answer to come."""
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(httpx.post, f"{toy.url}/sdapi/v1/txt2img", json=body, timeout=20)
    pool.shutdown(wait=False)
    return answer


def progress(toy: Toy, **query: Any) -> dict[str, Any]:
    return toy.client.get("/sdapi/v1/progress", params=query).json()


def test_progress(toy):
    idle = progress(toy)
    assert idle["progress"] == 0.0 and idle["state"]["job_count"] == 0 and idle["current_image"] is None
    answer = calling(toy, prompt="a", steps=40, batch_size=2)
    told = toy.until(
        lambda: (found := progress(toy))["state"]["sampling_step"] > 10 and found["current_image"] and found
    )
    state = told["state"]
    assert 0.2 < told["progress"] < 1 and told["eta_relative"] > 0
    assert state["job_count"] == 2 and state["sampling_steps"] == 40 and len(state["job"]) == 32
    assert Image.open(io.BytesIO(base64.b64decode(told["current_image"]))).format == "JPEG"
    assert progress(toy, skip_current_image=True)["current_image"] is None
    assert answer.result().status_code == 200
    assert progress(toy)["progress"] == 0.0 and progress(toy)["state"]["job_count"] == 0


def test_a_call_that_waits_for_its_turn_has_not_begun(toy):
    toy.do(toy.backend.hold)
    first = calling(toy, prompt="a", batch_size=2)
    toy.until(lambda: progress(toy)["state"]["job_count"] == 2)
    second = calling(toy, prompt="b", batch_size=3)
    toy.until(lambda: len(toy.client.get("/api/jobs").json()["jobs"]) == 2)
    told = progress(toy)
    assert told["state"]["job_count"] == 2 and told["progress"] > 0
    toy.do(toy.backend.release)
    assert first.result().status_code == second.result().status_code == 200


def test_interrupt_ends_what_runs(toy):
    toy.do(toy.backend.hold)
    answer = calling(toy, prompt="a")
    toy.until(lambda: progress(toy)["progress"] > 0)
    assert toy.client.post("/sdapi/v1/interrupt").json() == {}
    told = answer.result()
    assert told.status_code == 499 and told.json()["detail"] == "cancelled: it was interrupted"
    assert progress(toy)["state"]["job_count"] == 0
    toy.do(toy.backend.release)
    assert calling(toy, prompt="a").result().status_code == 200


def test_interrupt_leaves_what_waits_for_its_turn(toy):
    toy.do(toy.backend.hold)
    first = calling(toy, prompt="a", batch_size=2)
    toy.until(lambda: progress(toy)["progress"] > 0)
    second = calling(toy, prompt="b")
    toy.until(lambda: len(toy.client.get("/api/jobs").json()["jobs"]) == 2)
    toy.client.post("/sdapi/v1/interrupt")
    assert first.result().status_code == 499
    toy.do(toy.backend.release)
    assert second.result().status_code == 200


def test_interrupt_leaves_what_is_finished(tmp_path):
    with toy_running(tmp_path / "state", Uneven()) as toy:
        answer = calling(toy, prompt="a", seed=3, batch_size=6)
        toy.until(lambda: progress(toy)["state"]["job_no"] == 2)
        assert 2 / 6 < progress(toy)["progress"] < 3 / 6
        toy.client.post("/sdapi/v1/interrupt")
        told = answer.result()
        assert told.status_code == 200 and len(told.json()["images"]) == 2
        assert json.loads(told.json()["info"])["all_seeds"] == [3, 4]
        answer = calling(toy, prompt="b", batch_size=6)  # a job that ends in another way is no answer
        toy.until(lambda: progress(toy)["state"]["job_no"] == 2)
        assert toy.client.delete("/api/jobs/" + progress(toy)["state"]["job"]).status_code == 200
        assert answer.result().status_code == 499


def test_skip_is_for_one_picture(toy):
    toy.do(toy.backend.hold)
    answer = calling(toy, prompt="a", batch_size=2)
    toy.until(lambda: progress(toy)["progress"] > 0)
    refused = toy.client.post("/sdapi/v1/skip")
    assert refused.status_code == 409 and "interrupt ends the call" in refused.json()["detail"]
    toy.client.post("/sdapi/v1/interrupt")
    assert answer.result().status_code == 499
    answer = calling(toy, prompt="a")
    toy.until(lambda: progress(toy)["progress"] > 0)
    assert toy.client.post("/sdapi/v1/skip").json() == {}
    assert answer.result().json()["detail"] == "cancelled: it was skipped"


def test_nobody_sees_or_ends_anothers_call(tmp_path):
    with toy_running(tmp_path / "state", Named(), tokens={"ann": "a" * 16, "bob": "b" * 16}) as two:
        two.do(two.backend.hold)
        two.client.headers["Authorization"] = "Bearer " + "b" * 16
        anns = webuiapi.WebUIApi(baseurl=f"{two.url}/sdapi/v1", username="ann", password="a" * 16)
        made: list[Any] = []
        thread = threading.Thread(target=lambda: made.append(anns.txt2img(prompt="a", width=64, height=64)))
        thread.start()
        two.until(lambda: anns.get_progress()["progress"] > 0)
        assert progress(two)["state"]["job_count"] == 0
        two.client.post("/sdapi/v1/interrupt")
        time.sleep(0.05)
        assert anns.get_progress()["state"]["job_count"] == 1
        two.do(two.backend.release)
        thread.join(20)
        assert made[0].image.size == (64, 64)


def test_a_client_that_goes_away_stops_its_job(toy):
    toy.do(toy.backend.hold)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{toy.url}/sdapi/v1/txt2img", json={"prompt": "a"}, timeout=0.3)
    toy.until(lambda: toy.backend.stopped)
    toy.until(lambda: toy.state(toy.backend.stopped[0]) == "cancelled")
    toy.until(lambda: progress(toy)["state"]["job_count"] == 0)
