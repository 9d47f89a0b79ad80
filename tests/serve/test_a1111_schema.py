"""Every field of A1111's schema is followed, harmless, or refused by name."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from sumuk.base.errors import BadInput
from sumuk.serve.a1111_schema import (
    Img2Img,
    OnePicture,
    Options,
    SomePictures,
    Txt2Img,
    Unit,
    body_of,
)

COMMON = """
prompt negative_prompt styles seed subseed subseed_strength seed_resize_from_h seed_resize_from_w
sampler_name scheduler batch_size n_iter steps cfg_scale width height restore_faces tiling
do_not_save_samples do_not_save_grid eta denoising_strength s_min_uncond s_churn s_tmax s_tmin s_noise
override_settings override_settings_restore_afterwards refiner_checkpoint refiner_switch_at
disable_extra_networks firstpass_image comments sampler_index script_name script_args send_images
save_images alwayson_scripts force_task_id infotext
"""
"""Of ``StableDiffusionTxt2ImgProcessingAPI`` and ``...Img2Img...`` in stable-diffusion-webui 1.10."""
TXT2IMG = """
enable_hr firstphase_width firstphase_height hr_scale hr_upscaler hr_second_pass_steps hr_resize_x
hr_resize_y hr_checkpoint_name hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt
"""
IMG2IMG = """
init_images resize_mode image_cfg_scale mask mask_blur_x mask_blur_y mask_blur mask_round inpainting_fill
inpaint_full_res inpaint_full_res_padding inpainting_mask_invert initial_noise_multiplier latent_mask
include_init_images
"""
EXTRAS = """
resize_mode show_extras_results gfpgan_visibility codeformer_visibility codeformer_weight upscaling_resize
upscaling_resize_w upscaling_resize_h upscaling_crop upscaler_1 upscaler_2 extras_upscaler_2_visibility
upscale_first
"""
UNIT = """
enabled module model weight image resize_mode low_vram processor_res threshold_a threshold_b guidance_start
guidance_end pixel_perfect control_mode inpaint_crop_input_image hr_option save_detected_map
advanced_weighting effective_region_mask pulid_mode ipadapter_input mask is_ui input_mode batch_images
output_dir loopback input_image lowvram guidance mask_image
"""

# What the package webuiapi 0.9.17 sends where its user says nothing.
SAID_BY_WEBUIAPI = {
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 0,
    "restore_faces": False,
    "tiling": False,
    "eta": 1.0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "styles": [],
    "script_args": [],
    "script_name": None,
    "firstphase_width": 0,
    "firstphase_height": 0,
}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Txt2Img, COMMON + TXT2IMG),
        (Img2Img, COMMON + IMG2IMG),
        (OnePicture, EXTRAS + "image"),
        (SomePictures, EXTRAS + "imageList"),
        (Unit, UNIT),
    ],
)
def test_every_field_of_theirs_is_known(kind, names):
    assert set(names.split()) <= set(kind.model_fields)


@pytest.mark.parametrize("kind", [Txt2Img, Img2Img, OnePicture, Options, Unit])
def test_null_is_as_if_it_were_left_out(kind):
    needed = {"image": "AA"} if kind is OnePicture else {}
    assert kind.read(dict.fromkeys(kind.model_fields) | needed) == kind.read(needed)


def test_what_their_client_always_sends_is_taken():
    Txt2Img.read(SAID_BY_WEBUIAPI)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"tiling": True}, "tiling true is not supported; leave it out"),
        ({"restore_faces": True}, "restore_faces true is not supported; leave it out"),
        ({"styles": ["anime"]}, r"styles \['anime'\] is not supported; leave it out"),
        ({"s_churn": 0.5}, "s_churn 0.5 is not supported; leave it out"),
        ({"s_churn": False}, "s_churn false is not supported; leave it out"),
        ({"s_noise": 0}, "s_noise 0 is not supported; leave it out"),
        ({"script_name": "x/y/z plot"}, 'script_name "x/y/z plot" is not supported'),
        ({"promt": "a"}, r"unknown field 'promt'; did you mean 'prompt'\?"),
        ({"promt": None}, r"unknown field 'promt'"),
        ({"width": "512"}, "width: input should be a valid integer"),
        ({"width": True}, "width: input should be a valid integer"),
        ({"width": 0}, "width: .*8"),
        ({"width": 2**31}, "width: .*8192"),
        ({"steps": 10**6}, "steps: .*1000"),
        ({"batch_size": 10**6}, "batch_size: .*64"),
        ({"seed": 2**64}, "seed: "),
        ({"seed": -2}, "seed: "),
        ({"cfg_scale": float("nan")}, "cfg_scale: .*finite"),
        ({"cfg_scale": 10**400}, "cfg_scale: "),
        ({"prompt": 7}, "prompt: "),
        ({"tiling": "x" * 10**6}, 'tiling "x{40}" is not supported'),
        ({"styles": ["x"] * 10**6}, "styles .* is not supported"),
        ({"prompt": "x" * 10**6, "foo" * 1000: 1}, "unknown field 'foofoo"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(body, told):
    with pytest.raises(BadInput, match=told) as error:
        Txt2Img.read(body)
    assert len(str(error.value)) < 1000


def test_options_say_what_they_are_not():
    with pytest.raises(BadInput, match="override_settings: unknown field 'sd_hypernetwork'"):
        Options.read({"sd_hypernetwork": "x"}, "override_settings: ")
    assert Options.read(Options().model_dump()).said == {
        key: value for key, value in Options().model_dump().items() if value is not None
    }


def test_the_document_says_that_null_is_taken():
    schema = body_of(Txt2Img)["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["width"]["anyOf"][-1] == {"type": "null"}
    assert schema["properties"]["tiling"]["enum"] == [None, False]
    assert schema["additionalProperties"] is False
    assert "$ref" not in TypeAdapter(dict).dump_json(schema).decode()
