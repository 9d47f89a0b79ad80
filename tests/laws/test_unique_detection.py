"""Every header belongs to one kind or to none, and the answer is the right one.

The inventories of published files stand in for the files: names and shapes are all that detection sees.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from sumuk.families.detect import Match, Unknown, candidates, detect, families, moved
from sumuk.families.family import FAMILIES, Family
from sumuk.files.layout import Moved
from sumuk.files.tensors import Lazy, Tensors

KEYS = Path(__file__).parents[2].parent / "shared" / "facts" / "keys"
NAMES = sorted(path.name.removesuffix(".json") for path in KEYS.glob("*.json"))

EXPECTED = {
    "cascade_controlnet_canny": ("controlnet/cascade", "bare"),
    "cascade_controlnet_inpainting": ("controlnet/cascade", "bare"),
    "cascade_controlnet_super_resolution": ("controlnet/cascade", "bare"),
    "cascade_effnet": ("cascade/effnet", "bare"),
    "cascade_lora_3.6b_rank4": ("lora/cascade", "cascade"),
    "cascade_previewer": ("cascade/previewer", "bare"),
    "cascade_stage_a": ("cascade/stage-a", "bare"),
    "cascade_stage_a.diffusers": ("cascade/stage-a", "bare-diffusers"),
    "cascade_stage_b_1.5b": ("cascade/stage-b", "bare"),
    "cascade_stage_b_1.5b.diffusers": ("cascade/stage-b", "bare-diffusers"),
    "cascade_stage_b_700m": ("cascade/stage-b", "bare"),
    "cascade_stage_b_700m.diffusers": ("cascade/stage-b", "bare-diffusers"),
    "cascade_stage_c_1b": ("cascade/stage-c", "bare"),
    "cascade_stage_c_1b.diffusers": ("cascade/stage-c", "bare-diffusers"),
    "cascade_stage_c_3.6b": ("cascade/stage-c", "bare"),
    "cascade_stage_c_3.6b.diffusers": ("cascade/stage-c", "bare-diffusers"),
    "clip_g.diffusers": ("text-encoder/openclip-g", "bare-diffusers"),
    "clip_l.diffusers": ("text-encoder/clip-l", "bare"),
    "controlnet_sd15": ("controlnet/sd15", "single"),
    "controlnet_sd15.diffusers": ("controlnet/sd15", "bare-diffusers"),
    "controlnet_sd21": ("controlnet/sd21", "single"),
    "controlnet_sdxl.diffusers": ("controlnet/sdxl", "bare-diffusers"),
    "ddpm_celeba": ("ddpm/celeba", "single"),
    "ddpm_cifar10": ("ddpm/cifar10", "single"),
    "ddpm_cifar10.diffusers": ("ddpm/cifar10", "bare-diffusers"),
    "ddpm_lsun_256.diffusers": ("ddpm/lsun", "bare-diffusers"),
    "ddpm_lsun_bedroom": ("ddpm/lsun", "single"),
    "ddpm_lsun_church": ("ddpm/lsun", "single"),
    "dit_b_2": ("dit/class-conditional", "bare"),
    "dit_l_2": ("dit/class-conditional", "bare"),
    "dit_s_2": ("dit/class-conditional", "bare"),
    "dit_xl_2": ("dit/class-conditional", "bare"),
    "dit_xl_2.diffusers": ("dit/class-conditional", "bare-diffusers"),
    "dit_xl_2_512": ("dit/class-conditional", "bare"),
    "flux1_canny_depth_dev": ("flux/control", "bare"),
    "flux1_dev": ("flux/dev", "bare"),
    "flux1_dev.diffusers": ("flux/dev", "bare-diffusers"),
    "flux1_fill_dev": ("flux/fill", "bare"),
    "flux1_schnell": ("flux/schnell", "bare"),
    "flux1_schnell.diffusers": ("flux/schnell", "bare-diffusers"),
    "flux_ae": ("vae/kl-f8-16ch", "bare"),
    "flux_ae.diffusers": ("vae/kl-f8-16ch", "bare-diffusers"),
    "flux_controlnet_canny_instantx.diffusers": ("controlnet/flux", "bare-diffusers"),
    "flux_controlnet_union_instantx.diffusers": ("controlnet/flux", "bare-diffusers"),
    "sd15_clip_l": ("text-encoder/clip-l", "single"),
    "sd15_inpaint_unet": ("sd1/inpainting", "single"),
    "sd15_inpaint_unet.diffusers": ("sd1/inpainting", "bare-diffusers"),
    "sd15_unet": ("sd1/text-to-image", "single"),
    "sd15_unet.diffusers": ("sd1/text-to-image", "bare-diffusers"),
    "sd15_vae": ("vae/kl-f8", "single"),
    "sd15_vae.diffusers": ("vae/kl-f8", "bare-diffusers"),
    "sd21_unclip_h_unet": ("sd2/unclip-h", "single"),
    "sd21_unclip_l_unet": ("sd2/unclip-l", "single"),
    "sd21_unet.diffusers": ("sd2/text-to-image", "bare-diffusers"),
    "sd2_clip_h.diffusers": ("text-encoder/openclip-h", "bare-diffusers"),
    "sd2_depth_unet": ("sd2/depth", "single"),
    "sd2_depth_unet.diffusers": ("sd2/depth", "bare-diffusers"),
    "sd2_inpaint_unet": ("sd2/inpainting", "single"),
    "sd2_inpaint_unet.diffusers": ("sd2/inpainting", "bare-diffusers"),
    "sd2_openclip_h": ("text-encoder/openclip-h", "single"),
    "sd2_unet": ("sd2/text-to-image", "single"),
    "sd2_vae": ("vae/kl-f8", "single"),
    "sd2_x4_unet": ("sd2/x4-upscaler", "single"),
    "sd2_x4_unet.diffusers": ("sd2/x4-upscaler", "bare-diffusers"),
    "sd2_x4_vae": ("vae/kl-f4", "single"),
    "sd2_x4_vae.diffusers": ("vae/kl-f4", "bare-diffusers"),
    "sd35_large.diffusers": ("sd3/3.5-large", "bare-diffusers"),
    "sd35_large_mmdit": ("sd3/3.5-large", "single"),
    "sd35_medium.diffusers": ("sd3/3.5-medium", "bare-diffusers"),
    "sd35_medium_mmditx": ("sd3/3.5-medium", "single"),
    "sd3_clip_l.diffusers": ("text-encoder/clip-l", "bare"),
    "sd3_controlnet.diffusers": ("controlnet/sd3", "bare-diffusers"),
    "sd3_medium.diffusers": ("sd3/medium", "bare-diffusers"),
    "sd3_medium_mmdit": ("sd3/medium", "single"),
    "sd3_text_encoders": ("text-encoder/bundle", "single"),
    "sd3_vae": ("vae/kl-f8-16ch", "single"),
    "sd3_vae.diffusers": ("vae/kl-f8-16ch", "bare-diffusers"),
    "sdxl_base_clip_l": ("text-encoder/clip-l", "single"),
    "sdxl_base_openclip_g": ("text-encoder/openclip-g", "single"),
    "sdxl_base_unet": ("sdxl/base", "single"),
    "sdxl_base_unet.diffusers": ("sdxl/base", "bare-diffusers"),
    "sdxl_inpaint_unet.diffusers": ("sdxl/inpainting", "bare-diffusers"),
    "sdxl_refiner_openclip_g": ("text-encoder/openclip-g", "single"),
    "sdxl_refiner_unet": ("sdxl/refiner", "single"),
    "sdxl_refiner_unet.diffusers": ("sdxl/refiner", "bare-diffusers"),
    "sdxl_vae": ("vae/kl-f8", "single"),
    "sdxl_vae.diffusers": ("vae/kl-f8", "bare-diffusers"),
    "t5_xxl_encoder": ("text-encoder/t5", "bare"),
    "taef1_decoder": ("tiny-vae/taesd3", "bare"),
    "taef1_encoder": ("tiny-vae/taesd3", "bare"),
    "taef2_decoder": ("tiny-vae/taef2", "bare"),
    "taef2_encoder": ("tiny-vae/taef2", "bare"),
    "taesd.diffusers": ("tiny-vae/taesd", "bare-diffusers"),
    "taesd3.diffusers": ("tiny-vae/taesd3", "bare-diffusers"),
    "taesd3_decoder": ("tiny-vae/taesd3", "bare"),
    "taesd3_encoder": ("tiny-vae/taesd3", "bare"),
    "taesd_decoder": ("tiny-vae/taesd", "bare"),
    "taesd_encoder": ("tiny-vae/taesd", "bare"),
    "taesdxl_decoder": ("tiny-vae/taesd", "bare"),
    "taesdxl_encoder": ("tiny-vae/taesd", "bare"),
}
"""Every inventory of a file or of a network in one, with the prefix that it has there."""

NOTHING = {
    "sd15_ckpt_extras": "tables of a noise schedule",  # buffers alone: no network
    "sd15_model_ema": "averaged weights without the plain ones",  # their names cannot be taken apart again
    "sd2_depth_midas": "MiDaS",  # makes depth maps, which are given here
    "sd2_x4_low_scale": "tables of a noise schedule",
}
"""What lies beside networks in published files and is none, and what the answer says it is."""


def never() -> torch.Tensor:
    raise AssertionError("detection loads no tensor")


@cache
def table(name: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    path = KEYS / f"{name}.json"
    if not path.exists():
        pytest.skip("the inventories of published files are not here")
    said = json.loads(path.read_text())
    return said.get("prefix_in_file", ""), {key: tuple(shape) for key, shape in said["tensors"].items()}


def inventory(name: str, prefix: str | None = None) -> Tensors:
    usual, shapes = table(name)
    prefix = usual if prefix is None else prefix
    return {prefix + key: Lazy(shape, "F16", never) for key, shape in shapes.items()}


def together(parts: dict[str, str]) -> Tensors:
    return {key: one for name, prefix in parts.items() for key, one in inventory(name, prefix).items()}


def check(tensors: Tensors, family: str, layout: str) -> Match:
    """Exactly this kind, in this layout, and nothing is left over: another that explained all of it would tie."""
    answer = detect(tensors)
    assert isinstance(answer, Match), answer.why
    assert (answer.family.key, answer.arrangement.name) == (family, layout)
    assert not answer.moved.unknown and not answer.moved.halves
    assert family not in {near.family for near in answer.near}
    return answer


def test_each_inventory_has_its_line() -> None:
    if not NAMES:
        pytest.skip("the inventories of published files are not here")
    assert set(NAMES) == {*EXPECTED, *NOTHING}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_published_file_is_of_its_kind_and_of_no_other(name: str) -> None:
    check(inventory(name), *EXPECTED[name])


@pytest.mark.parametrize("name", [name for name in EXPECTED if name in NAMES and table(name)[0]])
def test_the_same_without_its_prefix(name: str) -> None:
    family, layout = EXPECTED[name]
    if name != "sd3_text_encoders":
        check(inventory(name, ""), family, {"single": "bare"}.get(layout, layout))


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_network_is_unknown_and_said_what_it_is(name: str) -> None:
    for prefix in (None, ""):
        answer = detect(inventory(name, prefix))
        assert isinstance(answer, Unknown) and NOTHING[name] in answer.why and "\n" not in answer.why


# -- whole files ---------------------------------------------------------------------------------------------------

UNET, FIRST, COND = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders."
SD1_REST = {"sd15_vae": FIRST, "sd15_clip_l": "cond_stage_model.transformer."}
SD1_FOLDER = {"sd15_vae.diffusers": "vae/", "clip_l.diffusers": "text_encoder/"}
SD2_REST = {"sd2_vae": FIRST, "sd2_openclip_h": "cond_stage_model.model."}
SD2_FOLDER = {"sd15_vae.diffusers": "vae/", "sd2_clip_h.diffusers": "text_encoder/"}
SDXL_FOLDER = {
    "sdxl_vae.diffusers": "vae/",
    "clip_l.diffusers": "text_encoder/",
    "clip_g.diffusers": "text_encoder_2/",
}
SD3_REST = {"sd3_vae": FIRST, "sd3_text_encoders": ""}
SD3_FOLDER = {
    "sd3_vae.diffusers": "vae/", "sd3_clip_l.diffusers": "text_encoder/", "clip_g.diffusers": "text_encoder_2/",
    "t5_xxl_encoder": "text_encoder_3/",
}  # fmt: skip
FLUX_REST = {
    "flux_ae": "vae.",
    "clip_l.diffusers": "text_encoders.clip_l.transformer.",
    "t5_xxl_encoder": "text_encoders.t5xxl.transformer.",
}
FLUX_FOLDER = {
    "flux_ae.diffusers": "vae/",
    "clip_l.diffusers": "text_encoder/",
    "t5_xxl_encoder": "text_encoder_2/",
}
SD1 = {"sd15_unet": UNET, **SD1_REST}

WHOLE = {
    ("sd1/text-to-image", "single"): SD1,
    ("sd1/text-to-image", "diffusers"): {"sd15_unet.diffusers": "unet/", **SD1_FOLDER},
    ("sd1/inpainting", "single"): {"sd15_inpaint_unet": UNET, **SD1_REST},
    ("sd1/inpainting", "diffusers"): {"sd15_inpaint_unet.diffusers": "unet/", **SD1_FOLDER},
    ("sd2/text-to-image", "single"): {"sd2_unet": UNET, **SD2_REST},
    ("sd2/text-to-image", "diffusers"): {"sd21_unet.diffusers": "unet/", **SD2_FOLDER},
    ("sd2/inpainting", "single"): {"sd2_inpaint_unet": UNET, **SD2_REST},
    ("sd2/inpainting", "diffusers"): {"sd2_inpaint_unet.diffusers": "unet/", **SD2_FOLDER},
    ("sd2/depth", "single"): {"sd2_depth_unet": UNET, "sd2_depth_midas": "depth_model.model.", **SD2_REST},
    ("sd2/depth", "diffusers"): {"sd2_depth_unet.diffusers": "unet/", **SD2_FOLDER},
    ("sd2/x4-upscaler", "single"): {
        "sd2_x4_unet": UNET, "sd2_x4_low_scale": "low_scale_model.", "sd2_x4_vae": FIRST,
        "sd2_openclip_h": "cond_stage_model.model.",
    },
    ("sd2/x4-upscaler", "diffusers"): {
        "sd2_x4_unet.diffusers": "unet/", "sd2_x4_vae.diffusers": "vae/", "sd2_clip_h.diffusers": "text_encoder/",
    },
    ("sd2/unclip-h", "single"): {"sd21_unclip_h_unet": UNET, **SD2_REST},
    ("sd2/unclip-l", "single"): {"sd21_unclip_l_unet": UNET, **SD2_REST},
    ("sdxl/base", "single"): {
        "sdxl_base_unet": UNET, "sdxl_vae": FIRST, "sdxl_base_clip_l": f"{COND}0.transformer.",
        "sdxl_base_openclip_g": f"{COND}1.model.",
    },
    ("sdxl/base", "diffusers"): {"sdxl_base_unet.diffusers": "unet/", **SDXL_FOLDER},
    ("sdxl/inpainting", "diffusers"): {"sdxl_inpaint_unet.diffusers": "unet/", **SDXL_FOLDER},
    ("sdxl/refiner", "single"): {
        "sdxl_refiner_unet": UNET, "sdxl_vae": FIRST, "sdxl_refiner_openclip_g": f"{COND}0.model.",
    },
    ("sdxl/refiner", "diffusers"): {
        "sdxl_refiner_unet.diffusers": "unet/", "sdxl_vae.diffusers": "vae/", "clip_g.diffusers": "text_encoder_2/",
    },
    ("sd3/medium", "single"): {"sd3_medium_mmdit": UNET, **SD3_REST},
    ("sd3/medium", "diffusers"): {"sd3_medium.diffusers": "transformer/", **SD3_FOLDER},
    ("sd3/3.5-medium", "single"): {"sd35_medium_mmditx": UNET, **SD3_REST},
    ("sd3/3.5-medium", "diffusers"): {"sd35_medium.diffusers": "transformer/", **SD3_FOLDER},
    ("sd3/3.5-large", "single"): {"sd35_large_mmdit": UNET, **SD3_REST},
    ("sd3/3.5-large", "diffusers"): {"sd35_large.diffusers": "transformer/", **SD3_FOLDER},
    ("flux/dev", "single"): {"flux1_dev": UNET, **FLUX_REST},
    ("flux/dev", "diffusers"): {"flux1_dev.diffusers": "transformer/", **FLUX_FOLDER},
    ("flux/schnell", "single"): {"flux1_schnell": UNET, **FLUX_REST},
    ("flux/schnell", "diffusers"): {"flux1_schnell.diffusers": "transformer/", **FLUX_FOLDER},
    ("flux/fill", "single"): {"flux1_fill_dev": UNET, **FLUX_REST},
    ("flux/control", "single"): {"flux1_canny_depth_dev": UNET, **FLUX_REST},
    ("cascade/stage-c", "single"): {
        "cascade_stage_c_3.6b": UNET, "clip_g.diffusers": "text_encoder.clip_g.transformer.",
        "cascade_effnet": "vae.encoder.", "cascade_previewer": "vae.previewer.",
    },
    ("cascade/stage-c", "diffusers"): {
        "cascade_stage_c_3.6b.diffusers": "prior/", "clip_g.diffusers": "text_encoder/",
    },
    ("cascade/stage-b", "single"): {
        "cascade_stage_b_1.5b": UNET, "clip_g.diffusers": "text_encoder.clip_g.transformer.", "cascade_stage_a": "vae.",
    },
    ("cascade/stage-b", "diffusers"): {
        "cascade_stage_b_1.5b.diffusers": "decoder/", "clip_g.diffusers": "text_encoder/",
        "cascade_stage_a.diffusers": "vqgan/",
    },
    ("dit/class-conditional", "diffusers"): {"dit_xl_2.diffusers": "transformer/", "sd15_vae.diffusers": "vae/"},
    ("ddpm/cifar10", "diffusers"): {"ddpm_cifar10.diffusers": "unet/"},
}  # fmt: skip
"""Whole single files and folders, by what they are."""


@pytest.mark.parametrize("what", WHOLE, ids=" ".join)
def test_whole_files_and_folders(what: tuple[str, str]) -> None:
    answer = check(together(WHOLE[what]), *what)
    assert isinstance(answer.family, Family)


def test_extras_of_training_do_not_disturb() -> None:
    tensors = {**together(SD1), **inventory("sd15_ckpt_extras", ""), **inventory("sd15_model_ema")}
    answer = check(tensors, "sd1/text-to-image", "single")
    assert len(answer.moved.ignored) == 12 + 1 + 688  # buffers, position_ids, averages


def test_what_is_shared_between_arrangements_is_what_each_layout_makes() -> None:
    """Detection moves each network once for all that name it alike; the result is the layout's own."""

    def facts(one: Moved) -> tuple[object, ...]:
        shapes = {name: tensor.shape for name, tensor in one.tensors.items()}
        return shapes, one.origin, one.unknown, sorted(one.ignored), sorted(one.halves)

    files = [together(SD1), together(WHOLE["flux/dev", "diffusers"])]
    files += [inventory(name) for name in ("clip_g.diffusers", "sd3_vae", "taesd_decoder", "controlnet_sd15")]
    for tensors in files:
        for each in candidates(tensors):
            whole = each.arrangement.layout(tensors).forward(tensors)
            alone = moved(each.arrangement, tensors)
            assert facts(each.moved) == facts(whole) == facts(alone), each.family.key


# -- what is not quite one -----------------------------------------------------------------------------------------


def test_instruct_pix2pix_and_an_unknown_number_of_channels() -> None:
    tensors = together(SD1)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = Lazy((320, 8, 3, 3), "F16", never)
    check(tensors, "sd1/instruct-pix2pix", "single")
    tensors[first] = Lazy((320, 7, 3, 3), "F16", never)
    answer = detect(tensors)
    assert isinstance(answer, Unknown) and "takes 7 channels" in answer.why
    assert not answer.parts, "the autoencoder in it does not make it an autoencoder"
    assert {"sd1/inpainting", "sd2/text-to-image"} <= {near.family for near in answer.near}


def test_a_text_tower_of_another_width_is_noticed() -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    answer = detect({**together(SD1), name: Lazy((49408, 1024), "F16", never)})
    assert isinstance(answer, Unknown) and "1024" in answer.why


@pytest.mark.parametrize("what", [what for what in WHOLE if what[1] == "single"], ids=" ".join)
def test_a_model_without_its_networks_key_is_no_other_kind(what: tuple[str, str]) -> None:
    family = FAMILIES[what[0]]
    part, prefix = family.arrangements[0].parts[0]
    tensors = together(WHOLE[what])
    del tensors[prefix + part.key]
    answer = detect(tensors)
    assert isinstance(answer, Unknown), answer.family.key


def test_the_same_twice_ties_and_says_so() -> None:
    sd1 = FAMILIES["sd1"]
    answer = detect(together(SD1), among=[sd1, replace(sd1, variant="again")])
    assert isinstance(answer, Unknown) and "fit alike" in answer.why and "sd1/again" in answer.why


def test_junk_is_unknown() -> None:
    for shapes in (
        {},
        {"weight": (3,)},
        {"weight": (10, 768)},
        {f"layer.{i}.weight": (4, 4) for i in range(9)},
    ):
        answer = detect({name: Lazy(shape, "F32", never) for name, shape in shapes.items()})
        assert isinstance(answer, Unknown) and "no known network" in answer.why and not answer.near


def test_towers_and_autoencoders_of_no_published_width_are_parts() -> None:
    clip = {n: Lazy((49408, 96) if "token_embedding" in n else t.shape, "F16", never)
            for n, t in inventory("sd15_clip_l").items()}  # fmt: skip
    answer = detect(clip)
    assert isinstance(answer, Unknown) and "only the text tower" in answer.why
    assert [part.name for part in answer.parts] == ["text"]
    vae = inventory("sd15_vae")
    vae["first_stage_model.decoder.conv_in.weight"] = Lazy((512, 12, 3, 3), "F16", never)
    answer = detect(vae)
    assert isinstance(answer, Unknown) and [part.name for part in answer.parts] == ["vae"]


def test_kinds_are_named_once_and_their_words_are_there() -> None:
    keys = [kind.key for kind in families()]
    assert len(keys) == len(set(keys))
    for kind in families():
        assert FAMILIES[kind.key] is kind and kind.title and kind.licence and kind.architecture
        if isinstance(kind, Family):
            assert {reading.part for reading in kind.readings} <= {part.name for part in kind.parts}
        whole = {part.name for part in kind.parts}
        for arrangement in kind.arrangements:
            assert {part.name for part, _ in arrangement.parts} <= whole, (
                "the first arrangement lists all parts"
            )


def test_detection_takes_a_fraction_of_a_second() -> None:
    """Of processor time, as other programs run beside; measured 0.1 to 0.2 s for the largest headers."""
    families()
    for name, prefix in (("sdxl_base_unet.diffusers", "unet/"), ("sdxl_base_unet", ""), ("flux1_dev", "")):
        tensors = inventory(name, prefix)
        began = time.process_time()
        detect(tensors)
        assert time.process_time() - began < 1.0, name
