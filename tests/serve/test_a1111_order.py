"""What A1111's clients ask for is ordered in our words, or refused by name; the backend keeps its orders."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from tests.serve.toy_backend import ENTRIES, ToyBackend
from tests.serve.toy_running import Toy, toy_running

from sumuk.serve.a1111_names import walk_of
from sumuk.serve.offered import choices
from sumuk.serve.order import Order
from sumuk.serve.wire import Entry

MORE = (
    replace(ENTRIES[2], name="canny", sort="control", kind="controlnet/sd1", file="canny.safetensors"),
    replace(ENTRIES[2], name="soft", sort="vae", kind="vae/sd", file="soft.safetensors"),
)
FAST = {"steps": 1}


class Keeping(ToyBackend):
    """Keeps the orders that are drawn, and knows what the real one knows by name."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.orders: list[Order] = []

    async def choices(self) -> dict[str, list[dict[str, Any]]]:
        return choices()

    async def catalogue(self) -> list[Entry]:
        return [*ENTRIES, *MORE]

    def draw(self, job: str, order: Order, done: tuple[int, ...] = ()) -> None:
        self.orders.append(order)
        super().draw(job, order, done)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    with toy_running(tmp_path_factory.mktemp("a1111") / "state", Keeping()) as made:
        yield made


def b64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ordered(toy: Toy, verb: str = "txt2img", **body: Any) -> Order:
    """The order that a call becomes."""
    answer = toy.client.post(f"/sdapi/v1/{verb}", json={**FAST, **body})
    assert answer.status_code == 200, answer.text
    return toy.backend.orders[-1]


def told(toy: Toy, verb: str = "txt2img", **body: Any) -> str:
    """Why a call is refused."""
    before = len(toy.backend.orders)
    answer = toy.client.post(f"/sdapi/v1/{verb}", json={**FAST, **body})
    assert answer.status_code == 400 and answer.headers["content-type"] == "application/problem+json", (
        answer.text
    )
    assert len(toy.backend.orders) == before
    document = answer.json()
    assert document["errors"] == document["detail"] and document["error"] == document["title"]
    return document["detail"]


def opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture))


def test_what_is_left_out_is_the_models_own_choice(toy):
    order = ordered(toy, steps=None, prompt="a fox")
    assert set(order.values) == {"prompt", "count", "seed"}
    assert order.values["count"] == 1 and order.attached
    assert order.model is None and order.vae is None and order.refiner is None


def test_what_is_said_is_followed(toy):
    order = ordered(
        toy,
        prompt="a fox <lora:ink:0.8>",
        negative_prompt="blurry",
        seed=2**63,
        sampler_name="DPM++ 2M SDE Karras",
        n_iter=2,
        batch_size=3,
        steps=3,
        cfg_scale=5,
        width=72,
        height=64,
        eta=0.5,
        refiner_checkpoint="second",
        refiner_switch_at=0.75,
        override_settings={
            "sd_model_checkpoint": "toy.safetensors [7070707070]",
            "sd_vae": "soft",
            "CLIP_stop_at_last_layers": 2,
        },
    )
    assert order.values == {
        "prompt": "a fox <lora:ink:0.8>",
        "negative": "blurry",
        "seed": 2**63,
        "solver": "dpmpp-2m-sde",
        "grid": "karras",
        "eta": 0.5,
        "count": 6,
        "steps": 3,
        "guidance": 5.0,
        "width": 72,
        "height": 64,
        "clip_skip": 2,
        "refiner_start": 0.75,
    }
    assert (order.model, order.vae, order.refiner) == ("toy", "soft", "second")


@pytest.mark.parametrize(
    ("sampler", "eta", "ordered_eta"),
    [
        ("Euler", 1.0, None),
        ("DPM++ 2M", 1.0, None),
        ("Euler a", 1.0, 1.0),
        ("DDIM", 1, 1.0),
        ("DDIM", 0, 0.0),
        (None, 1.0, None),
    ],
)
def test_eta_goes_where_it_goes_there(toy, sampler, eta, ordered_eta):
    """webuiapi always sends 1; the solver of DPM++ 2M has an eta here, and would become another one by it."""
    assert ordered(toy, sampler_name=sampler, eta=eta).values.get("eta") == ordered_eta


def test_eta_that_would_do_nothing_is_refused(toy):
    assert (
        told(toy, sampler_name="Euler", eta=0.3) == "eta 0.3 does nothing for sampler 'Euler'; leave it out"
    )
    assert told(toy, eta=0.3).startswith("eta 0.3 does nothing for the model's usual sampler")


def test_every_name_that_is_listed_is_taken(toy):
    known = choices()
    samplers, schedulers = (toy.client.get(f"/sdapi/v1/{what}").json() for what in ("samplers", "schedulers"))
    assert {each["name"] for each in known["solvers"]} == {
        walk_of(each["name"], each["options"]["scheduler"], known).solver for each in samplers
    }
    for each in samplers:
        assert len({walk_of(name, None, known).solver for name in [each["name"], *each["aliases"]]}) == 1
    for each in schedulers:
        assert walk_of(None, each["name"], known) == walk_of(None, each["label"], known)


def test_variations(toy):
    values = ordered(toy, seed=3, subseed=9, subseed_strength=0.25).values
    assert (values["seed"], values["variation_seed"], values["variation"]) == (3, 9, 0.25)
    assert ordered(toy, subseed_strength=0.25).values["variation_seed"] >= 0
    assert "variation" not in ordered(toy, subseed=9).values
    assert "for one picture a call, not for 2" in told(toy, subseed_strength=0.25, batch_size=2)


def test_chance_falls_alike_for_a_repeated_call(toy):
    body = {**FAST, "subseed_strength": 0.5}
    first, second = (
        toy.client.post("/sdapi/v1/txt2img", json=body, headers={"Idempotency-Key": "chance"})
        for _ in range(2)
    )
    assert first.status_code == second.status_code == 200, second.text
    assert first.json()["images"] == second.json()["images"]
    assert sum(order == toy.backend.orders[-1] for order in toy.backend.orders) == 1


def test_the_second_pass(toy):
    hires = {
        "enable_hr": True,
        "hr_upscaler": "Latent (bicubic antialiased)",
        "hr_scale": 1.5,
        "hr_second_pass_steps": 4,
    }
    same = {
        "hr_sampler_name": "Use same sampler",
        "hr_scheduler": "Use same scheduler",
        "hr_checkpoint_name": "Use same checkpoint",
    }
    wanted = {"scale": 1.5, "steps": 4, "strength": 0.6}
    assert ordered(toy, **hires, denoising_strength=0.6).values["hires"] == wanted
    assert ordered(toy, **hires, **same, denoising_strength=0.6).values["hires"] == wanted
    alike = {"sampler_name": "Euler", "hr_sampler_name": "k_euler", "prompt": "a", "hr_prompt": "a"}
    assert ordered(toy, enable_hr=True, **alike).values["hires"] == {
        "scale": 2.0,
        "steps": 0,
        "strength": 0.75,
    }


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler 'R-ESRGAN 4x+' is not here"),
        ({"hr_resize_x": 128}, "hr_resize_x 128 is not supported; say hr_scale"),
        ({"hr_prompt": "other"}, "hr_prompt is not supported"),
        ({"hr_sampler_name": "Euler", "sampler_name": "Heun"}, "hr_sampler_name 'Euler' is not supported"),
        ({"hr_scheduler": "Karras"}, "hr_scheduler 'Karras' is not supported"),
        ({"hr_checkpoint_name": "second"}, 'hr_checkpoint_name "second" is not supported'),
    ],
)
def test_of_the_second_pass_what_is_not_here_is_refused_if_it_is_on(toy, body, why):
    assert why in told(toy, enable_hr=True, **body)
    assert "hires" not in ordered(toy, **body).values


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"tiling": True}, "tiling true is not supported"),
        ({"sampler_name": "Restart"}, "unknown sampler 'Restart'"),
        ({"scheduler": "KL Optimal"}, "unknown scheduler 'KL Optimal'"),
        ({"batch_size": 64, "n_iter": 2}, "are 128 pictures; one call draws 64"),
        ({"override_settings": {"sd_model_checkpoint": "tay"}}, "no model 'tay' here; did you mean 'toy'?"),
        ({"override_settings": {"sd_vae": "hard"}}, "sd_vae: no vae 'hard' here"),
        ({"override_settings": {"randn_source": "GPU"}}, 'randn_source "GPU" is not supported'),
        ({"refiner_checkpoint": "none"}, "refiner_checkpoint: no model 'none' here"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "script 'ADetailer' is not here"),
        ({"controlnet_units": []}, "unknown field 'controlnet_units'"),
    ],
)
def test_what_cannot_be_followed_is_refused(toy, body, why):
    assert why in told(toy, **body)


def test_what_is_off_says_nothing(toy):
    off = {
        "refiner_checkpoint": "",
        "refiner_switch_at": 0.8,
        "alwayson_scripts": {"ControlNet": {"args": []}},
    }
    order = ordered(toy, **off, denoising_strength=0.1, sampler_name="", scheduler="", script_name="")
    assert set(order.values) == {"steps", "count", "seed"} and order.refiner is None


PICTURE = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
MASK = Image.new("L", (64, 48))
MASK.paste(255, (8, 8, 24, 24))
OVER = {"init_images": [b64(PICTURE)], "width": 64, "height": 64}


def test_a_picture_is_drawn_over(toy):
    order = ordered(
        toy, "img2img", init_images=["data:image/png;base64," + b64(PICTURE)], denoising_strength=0.4
    )
    assert order.values["strength"] == 0.4 and "width" not in order.values and "mask" not in order.values
    assert opened(order.values["init"]).tobytes() == PICTURE.tobytes()
    assert opened(ordered(toy, "img2img", **OVER, resize_mode=1).values["init"]).size == (48, 48)
    assert opened(ordered(toy, "img2img", **OVER, resize_mode=2).values["init"]).size == (64, 64)


def test_a_masked_part_is_drawn(toy):
    whole = {"inpaint_full_res": False, "inpainting_fill": 1}
    order = ordered(toy, "img2img", **OVER, mask=b64(MASK), **whole, mask_blur=0)
    assert order.values["mask_blur"] == 0
    assert opened(order.values["mask"]).tobytes() == MASK.tobytes()
    assert opened(order.values["init"]).tobytes() == PICTURE.tobytes()
    order = ordered(toy, "img2img", **OVER, mask=b64(MASK), **whole, inpainting_mask_invert=1)
    assert order.values["mask_blur"] == 4
    assert opened(order.values["mask"]).getpixel((9, 9)) == 0
    order = ordered(toy, "img2img", **OVER, mask=b64(MASK), inpaint_full_res=False)
    drawn_on = opened(order.values["init"])
    assert drawn_on.crop((0, 0, 8, 48)).tobytes() == PICTURE.crop((0, 0, 8, 48)).tobytes()
    assert drawn_on.tobytes() != PICTURE.tobytes()


def test_only_the_masked_part_is_drawn_where_it_is_wanted(toy):
    order = ordered(toy, "img2img", **OVER, mask=b64(MASK), mask_blur=1, inpaint_full_res_padding=2)
    assert opened(order.values["init"]).size == opened(order.values["mask"]).size == (24, 24)
    answer = toy.client.post(
        "/sdapi/v1/img2img",
        json={**FAST, **OVER, "mask": b64(MASK), "mask_blur": 0, "include_init_images": True},
    ).json()
    made = opened(base64.b64decode(answer["images"][0]))
    assert made.size == PICTURE.size and made.getpixel((16, 16)) != PICTURE.getpixel((16, 16))
    assert made.crop((24, 0, 64, 48)).tobytes() == PICTURE.crop((24, 0, 64, 48)).tobytes()
    assert answer["parameters"]["init_images"] == OVER["init_images"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"init_images": []}, "init_images has 0 pictures"),
        ({"init_images": [b64(PICTURE)] * 2}, "init_images has 2 pictures"),
        ({"init_images": ["file:///etc/passwd"]}, "nothing is fetched"),
        ({"init_images": ["!"]}, "init_images.0 is no base64"),
        ({"mask": b64(MASK), "inpainting_fill": 2}, "inpainting_fill 2 is not supported"),
        ({"mask": b64(MASK), "mask_blur_x": 3}, "mask_blur_x 3 and mask_blur_y 4"),
        ({"mask": b64(MASK), "width": None}, "inpaint_full_res true needs width and height"),
        ({"mask": b64(MASK.point(lambda value: 0))}, "black everywhere"),
        ({"resize_mode": 3}, "resize_mode: "),
        ({"image_cfg_scale": 2.0}, "image_cfg_scale 2.0 is not supported"),
        ({"initial_noise_multiplier": 0.5}, "initial_noise_multiplier 0.5 is not supported"),
    ],
)
def test_pictures_that_cannot_be_drawn_over_are_refused(toy, body, why):
    assert why in told(toy, "img2img", **(OVER | body))


def test_without_a_mask_its_settings_say_nothing(toy):
    idle = {"mask_blur": 9, "inpainting_fill": 2, "inpaint_full_res": True, "image_cfg_scale": 1.5}
    assert set(ordered(toy, "img2img", **OVER, **idle).values) == {
        "steps",
        "count",
        "seed",
        "width",
        "height",
        "init",
        "strength",
    }


def unit(**more: Any) -> dict[str, Any]:
    unit = {"image": b64(PICTURE), "model": "canny [d14c016b]", **more}
    return {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}


def test_a_controlnet_steers(toy):
    order = ordered(toy, **unit(weight=0.5, guidance_start=0.1, guidance_end=0.6, control_mode=2))
    (steer,) = order.values["steer"]
    assert opened(steer.pop("hint")).tobytes() == PICTURE.tobytes()
    assert steer == {"control": "canny", "weight": 0.5, "start": 0.1, "end": 0.6, "guess": True}
    assert order.controls == {"canny": "canny"}


def test_older_names_of_a_controlnets_fields(toy):
    old = {"image": None, "input_image": b64(PICTURE), "guidance": 0.5, "lowvram": True, "guessmode": False}
    (steer,) = ordered(toy, **unit(**old)).values["steer"]
    assert steer["end"] == 0.5 and steer["guess"] is False


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        (None, (48, 48)),
        ("Crop and Resize", (48, 48)),
        ("Resize and Fill", (64, 64)),
        ("Just Resize", (64, 48)),
        (1, (48, 48)),
    ],
)
def test_a_controlnets_picture_gets_the_shape_that_is_wanted(toy, mode, size):
    (steer,) = ordered(toy, width=64, height=64, **unit(resize_mode=mode)).values["steer"]
    assert opened(steer["hint"]).size == size


def test_a_controlnet_without_a_picture_looks_at_the_one_that_is_drawn_over(toy):
    (steer,) = ordered(toy, "img2img", **OVER, **unit(image=None, resize_mode=0)).values["steer"]
    assert opened(steer["hint"]).tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"model": "depth"}, "ControlNet model: no control 'depth' here; known: canny"),
        ({"model": "None"}, "no control 'None' here"),
        ({"module": "canny"}, "ControlNet module 'canny' is not here: send the finished picture"),
        ({"image": None}, "no image to follow"),
        (
            {"control_mode": "My prompt is more important"},
            "control_mode 'My prompt is more important' is not",
        ),
        ({"hr_option": "High res only"}, "hr_option 'High res only' is not supported"),
        ({"resize_mode": 1}, "resize_mode 1 needs width and height"),
        ({"resize_mode": "Stretch"}, "resize_mode 'Stretch' is not known"),
        ({"mask": b64(MASK)}, "ControlNet unit 0: mask"),
        ({"wieght": 1}, "ControlNet unit 0: unknown field 'wieght'; did you mean 'weight'?"),
        ({"image": "https://example.org/a.png"}, "nothing is fetched"),
    ],
)
def test_what_a_controlnet_cannot_do_is_refused_if_it_is_on(toy, more, why):
    assert why in told(toy, **unit(**more))
    if "ControlNet unit" not in why:
        assert "steer" not in ordered(toy, **unit(**more, enabled=False)).values


@pytest.mark.parametrize(
    "scripts", [{"controlnet": {"args": "x"}}, {"controlnet": [1]}, {"controlnet": {"args": [None]}}]
)
def test_units_are_tables(toy, scripts):
    assert "each unit a table" in told(toy, alwayson_scripts=scripts)


def test_options_are_kept(tmp_path):
    with toy_running(tmp_path / "state", Keeping(), tokens={"ann": "a" * 16, "bob": "b" * 16}) as two:
        for name in ("ann", "bob"):
            two.client.headers["Authorization"] = f"Bearer {name[0] * 16}"
            if name == "ann":
                body = {"sd_model_checkpoint": "second.safetensors", "CLIP_stop_at_last_layers": 2}
                assert two.client.post("/sdapi/v1/options", json=body).status_code == 200
                assert two.client.post("/sdapi/v1/options", json={"samples_format": "jpg"}).status_code == 200
            options = two.client.get("/sdapi/v1/options").json()
            hers = name == "ann"
            assert options["sd_model_checkpoint"] == (
                "second.safetensors" if hers else "toy.safetensors [7070707070]"
            )
            assert two.client.post("/sdapi/v1/options", json=options).status_code == 200
            order = ordered(two)
            assert (order.model, order.values.get("clip_skip")) == (("second", 2) if hers else ("toy", None))
        two.client.headers["Authorization"] = "Bearer " + "a" * 16
        override = {"sd_model_checkpoint": "toy", "CLIP_stop_at_last_layers": 1}
        order = ordered(two, override_settings=override)
        assert (order.model, order.values.get("clip_skip")) == ("toy", None)
        assert ordered(two).model == "second"
        ordered(two, override_settings=override, override_settings_restore_afterwards=False)
        assert ordered(two).model == "toy"


def test_an_option_that_is_not_here_changes_nothing(toy):
    answer = toy.client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2, "sd_vae": "hard"})
    assert answer.status_code == 400 and "sd_vae: no vae 'hard' here" in answer.json()["detail"]
    answer = toy.client.post("/sdapi/v1/options", json={"sd_lora": "x"})
    assert answer.status_code == 400 and "unknown field 'sd_lora'" in answer.json()["detail"]
    assert toy.client.get("/sdapi/v1/options").json()["CLIP_stop_at_last_layers"] == 1


def test_a_picture_that_this_server_cannot_sign_is_not_made(tmp_path):
    from tests.serve.test_sign import chain

    chain(tmp_path / "credentials")
    with toy_running(tmp_path / "state", Keeping(), sign=tmp_path / "credentials") as signing:
        assert "cannot sign; send it false" in told(signing, "img2img", **OVER, mask=b64(MASK))


def test_no_more_is_made_than_one_picture_may_have(tmp_path):
    with toy_running(tmp_path / "state", Keeping(), picture_pixels=20_000) as small:
        two = [{"data": b64(PICTURE), "name": str(number)} for number in range(2)]
        answer = small.client.post(
            "/sdapi/v1/extra-batch-images", json={"imageList": two, "upscaler_1": "Nearest"}
        )
        assert answer.status_code == 400
        assert "imageList.1.data would have 128 x 96 pixels, more than the 7,712" in answer.json()["detail"]
        answer = small.client.post(
            "/sdapi/v1/extra-batch-images", json={"imageList": two[:1], "upscaler_1": "Nearest"}
        )
        assert answer.status_code == 200
