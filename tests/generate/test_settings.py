from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image
from tests.generate.conftest import refusal

from sumuk.base.errors import BadInput
from sumuk.diffusion.guidance import Cfg, Plain
from sumuk.diffusion.solvers import SOLVERS
from sumuk.generate.request import Hires, Request, make_request
from sumuk.generate.settings import resolve
from sumuk.weights.model import Model


def refused(model: Model, **values: object) -> str:
    return refusal(lambda: resolve(make_request(**values), model))


def test_what_is_left_open_comes_from_the_model(model: Model):
    found = resolve(make_request(prompt="a fox"), model)
    assert (found.width, found.height, found.steps, found.guidance_scale) == (64, 64, 25, 7.5)
    assert (found.solver, found.grid, found.walked, found.larger) == ("dpmpp-2m", "karras", 25, None)
    assert 0 <= found.seed < 2**32
    assert resolve(make_request(), model).seed != found.seed


def test_names_become_canonical(model: Model):
    found = resolve(make_request(solver="Euler a", grid="SGM Uniform"), model)
    assert found.solver == "euler-ancestral" and found.as_dict(0)["solver"] == "euler-ancestral"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"solver": "eulr"}, "unknown solver 'eulr'; did you mean 'euler'?"),
        ({"grid": "karas"}, "did you mean 'karras'?"),
        ({"grid": ""}, "unknown"),
        ({"solver": "euler", "eta": 0.5}, "solver 'euler' has no eta; leave it out or take one of "),
        ({"prompt": "a <lora:fox:1>"}, "the model was loaded without a LoRA 'fox'"),
        ({"prompt": "a (fox:x1.2.3)" + "(" * 100}, "brackets are nested deeper"),
        ({"clip_skip": 3}, "clip_skip 3 is more than the 2 layers of this model's text tower"),
        ({"width": 8192, "height": 8192}, "8192 x 8192 pixels; at most 16,777,216 are drawn"),
        ({"width": 4096, "height": 1024, "hires": {"scale": 4}}, "second pass would have 16384 x 4096 pixels"),
        # What would do nothing.
        ({"guidance": 1, "negative": "sea"}, "a negative prompt does nothing at guidance 1"),
        ({"guidance": 1, "rescale": 0.5}, "rescale 0.5 does nothing at guidance 1"),
        ({"guidance": 1, "guidance_start": 0.2}, "guidance_start 0.2 does nothing at guidance 1"),
        ({"guidance": 1, "guidance_end": 0.9}, "guidance_end 0.9 does nothing at guidance 1"),
        ({"guidance": 0, "prompt": "a fox"}, "the prompt does nothing at guidance 0; 1 is no guidance"),
        (
            {"steps": 4, "guidance_start": 0.3, "guidance_end": 0.4},
            "no step of 4 lies from guidance_start 0.3 to guidance_end 0.4",
        ),
        ({"hires": {"scale": 1.01}}, "hires scale 1.01 leaves 64 x 64 as it is"),
        ({"steps": 4, "preview": 4}, "a preview every 4 steps never comes in 4 steps"),
        ({"steps": 4, "init": Image.new("RGB", (64, 64)), "strength": 0.2}, "strength 0.2 of 4 steps leaves no"),
        ({"steps": 4, "hires": {"strength": 0.2}}, "strength 0.2 of 4 steps leaves no step"),
    ],
)  # fmt: skip
def test_refusals_name_the_value(model: Model, values: dict, told: str):
    assert told in refused(model, **values)


def test_every_field_has_a_reason_to_be_here():
    """When a field is added, say below (or above) when it would do nothing, then name it here."""
    assert set(Request.model_fields) == {
        "prompt", "negative", "width", "height", "steps", "solver", "grid", "eta", "guidance", "rescale",
        "guidance_start", "guidance_end", "skip_layers", "skip_scale", "skip_start", "skip_end",
        "seed", "variation_seed", "variation", "count", "clip_skip", "label",
        "original", "crop", "decoder_steps", "decoder_guidance", "refiner_start", "hint", "like", "noise_level",
        "steer", "loras", "hypers", "init", "strength", "mask", "mask_blur", "hires", "quick", "preview",
    }  # fmt: skip
    assert set(Hires.model_fields) == {"scale", "steps", "strength"}


def test_models_that_begin_from_a_picture_say_so(inpainting: Model, pix2pix: Model):
    assert "inpainting) needs an init image" in refused(inpainting)
    assert "needs an init image" in refused(pix2pix)


@pytest.mark.parametrize(
    ("given", "asked", "size"),
    [
        ((64, 96), {}, (64, 96)),
        ((100, 71), {}, (96, 64)),
        ((3, 3), {}, (8, 8)),
        ((64, 96), {"width": 72}, (72, 96)),
        (None, {"height": 72}, (64, 72)),
        (None, {"width": 128, "height": 64}, (128, 64)),
    ],
)
def test_sizes(model: Model, given: tuple[int, int] | None, asked: dict, size: tuple[int, int]):
    init = {} if given is None else {"init": Image.new("RGB", given)}
    found = resolve(make_request(**init, **asked), model)
    assert (found.width, found.height) == size


def test_a_model_with_a_larger_stride_refuses_what_it_cannot_draw(model: Model):
    coarse = replace(model, latent=replace(model.latent, stride=16))
    assert "width 72 is not a multiple of 16, which this model draws in" in refused(coarse, width=72)


def test_guidance(model: Model):
    assert resolve(make_request(guidance=1), model).guidance == Plain()
    found = resolve(make_request(guidance=5, rescale=0.7, guidance_start=0.1, guidance_end=0.8), model)
    assert found.guidance == Cfg(scale=5, rescale=0.7, start=0.1, end=0.8)


def test_strength_shortens_the_walk(model: Model):
    init = Image.new("RGB", (64, 64))
    assert resolve(make_request(init=init, steps=20, strength=0.6), model).walked == 12
    assert resolve(make_request(init=init, steps=20, strength=1.0), model).walked == 20


def test_a_window_of_guidance_may_lie_in_the_second_pass(model: Model):
    window = {"guidance_start": 0.5, "guidance_end": 0.6}
    assert "no step of 3" in refused(model, steps=3, **window)
    resolve(make_request(steps=3, hires={"steps": 8, "strength": 0.5}, **window), model)


def test_the_receipts_settings_leave_nothing_open(model: Model):
    request = make_request(prompt="a fox", seed=7, count=3, hires={}, solver="euler-a", preview=2)
    found = resolve(request, model).as_dict(2)
    assert (found["seed"], found["count"], found["preview"], found["eta"]) == (9, 1, 0, 1.0)
    assert found["hires"] == {"scale": 2.0, "steps": 25, "strength": 0.5}
    may_be_none = {"init", "mask", "variation_seed", "label", "original", "crop", "hint"}
    may_be_none |= {"decoder_steps", "decoder_guidance", "refiner_start", "like", "noise_level"}
    assert {key for key, value in found.items() if value is None} == may_be_none
    assert set(found) == set(Request.model_fields)


def test_the_last_seed_is_followed_by_the_first(model: Model):
    assert resolve(make_request(seed=2**64 - 1, count=2), model).as_dict(1)["seed"] == 0


@pytest.mark.parametrize("name", [name for name in SOLVERS if "eta" in SOLVERS[name].settings])
def test_eta_is_stated_for_every_solver_that_has_it(model: Model, name: str):
    for eta in (None, 0.25):
        found = resolve(make_request(solver=name, eta=eta), model)
        stated = found.as_dict(0)["eta"]
        assert stated == eta if eta is not None else isinstance(stated, float)
        again = resolve(make_request(solver=name, eta=stated), model)
        assert again.make_solver() == found.make_solver()


def test_and_is_a_word_in_a_negative_prompt(model: Model):
    assert len(resolve(make_request(negative="a AND b"), model).negative.parts) == 1
    assert len(resolve(make_request(prompt="a AND b"), model).prompt.parts) == 2


def test_it_raises_bad_input(model: Model):
    with pytest.raises(BadInput):
        resolve(make_request(solver="x"), model)
