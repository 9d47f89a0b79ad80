"""Stable Diffusion 2: each variant is known by its header, and says to diffusers what it is."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.families.unets import (
    NEAR,
    check_map,
    header,
    known,
    lazies,
    oracle,
    published_config,
    relative,
    trained,
)
from tests.nets.inventories import inventory

from sumuk.base.errors import BadInput
from sumuk.families.detect import Match, Unknown, detect
from sumuk.families.family import FAMILIES, Facts, Family
from sumuk.families.reading import Encoded, Given, Sizes
from sumuk.families.sd import VAE
from sumuk.families.sd2 import LINEAR_UNET, X4_UNET, noised_view
from sumuk.files.layout import Layout
from sumuk.files.tensors import Tensors, lazy
from sumuk.nets.clip import ClipShape
from sumuk.nets.unet import UNet, UNetShape

UNETS = {
    "text-to-image": "sd2_unet",
    "inpainting": "sd2_inpaint_unet",
    "depth": "sd2_depth_unet",
    "x4-upscaler": "sd2_x4_unet",
    "unclip-l": "sd21_unclip_l_unet",
    "unclip-h": "sd21_unclip_h_unet",
}
EXTRAS = {
    "depth": ("sd2_depth_midas", "depth_model.model.", 368),
    "x4-upscaler": ("sd2_x4_low_scale", "low_scale_model.", 8),
}
PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.model."}
FOLDERS = {"unet": "unet/", "vae": "vae/", "text": "text_encoder/"}


def family(variant: str) -> Family:
    found = FAMILIES[f"sd2/{variant}"]
    assert isinstance(found, Family)
    return found


def single(variant: str) -> Tensors:
    vae = "sd2_x4_vae" if variant == "x4-upscaler" else "sd2_vae"
    names = {"unet": UNETS[variant], "vae": vae, "text": "sd2_openclip_h"}
    made: Tensors = {}
    for part, name in names.items():
        made |= lazies(inventory(name), PARTS[part])
    if variant in EXTRAS:
        name, prefix, _ = EXTRAS[variant]
        made |= lazies(inventory(name), prefix)
    return made


# -- which variant -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", UNETS)
def test_whole_files_are_known(variant: str) -> None:
    answer = detect(single(variant))
    assert isinstance(answer, Match), answer.why
    assert (answer.family.key, answer.arrangement.name) == (f"sd2/{variant}", "single")
    assert not answer.moved.unknown and not answer.moved.halves
    assert len(answer.moved.ignored) == 1 + (EXTRAS[variant][2] if variant in EXTRAS else 0)  # logit_scale


@pytest.mark.parametrize("variant", UNETS)
def test_folders_and_single_networks_are_known(variant: str) -> None:
    """The folder is made by the layout backward, so that it is tested with it."""
    whole = single(variant)
    arrangement = family(variant).arrangements
    native = arrangement[0].layout(whole).forward(whole).tensors
    said = arrangement[1].layout(native, backward=True).backward(native)
    assert not said.unknown and not said.halves and len(said.ignored) == 13  # H's last block, its projection
    published = {"text-to-image": "sd21_unet", "unclip-l": None, "unclip-h": None}.get(
        variant, UNETS[variant]
    )
    if published:
        theirs = inventory(f"{published}.diffusers")
        assert {n[5:]: one.shape for n, one in said.tensors.items() if n[:5] == "unet/"} == theirs
    text = {n[13:]: one.shape for n, one in said.tensors.items() if n.startswith("text_encoder/")}
    assert text == inventory("sd2_clip_h.diffusers")
    answer = detect(said.tensors)
    assert isinstance(answer, Match), answer.why
    assert (answer.family.key, answer.arrangement.name) == (f"sd2/{variant}", "diffusers")
    assert not answer.moved.unknown and not answer.moved.halves
    assert known(arrangement[3], said.tensors, "unet/") == [f"sd2/{variant}"]
    assert known(arrangement[2], whole, "model.diffusion_model.") == [f"sd2/{variant}"]


def test_what_is_none_of_them() -> None:
    unet = single("text-to-image")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    unet[first] = replace(unet[first], shape=(320, 6, 3, 3))
    assert isinstance(detect(unet, among=NEAR), Unknown)
    unet = single("text-to-image")
    tokens = "cond_stage_model.model.token_embedding.weight"
    unet[tokens] = replace(unet[tokens], shape=(49408, 768))
    assert isinstance(detect(unet, among=NEAR), Unknown)
    for other in ("sd15_unet", "sdxl_base_unet", "sdxl_refiner_unet"):
        native = {f"denoiser.{name}": size for name, size in inventory(other).items()}
        for variant in UNETS:
            assert family(variant).recognise(native) is not None, (other, variant)


def test_a_header_of_senseless_shapes_is_refused_in_words() -> None:
    native: dict[str, tuple[int, ...]] = {
        f"denoiser.{n}": s for n, s in inventory("sd21_unclip_h_unet").items()
    }
    for name in (
        "input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight", "middle_block.1.proj_in.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    ):  # fmt: skip
        for shape in ((), (3,), (3, 3, 3)):
            reason = family("unclip-h").recognise(native | {f"denoiser.{name}": shape})
            assert reason is not None and name in reason
    assert family("unclip-h").recognise(native | {"text.token_embedding.weight": ()}) is not None
    assert "no" in str(family("unclip-h").recognise({}))


# -- names and configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name", "count"),
    [(LINEAR_UNET, "sd2_unet", 686), (X4_UNET, "sd2_x4_unet", 687), (VAE, "sd2_x4_vae", 204)],
)
def test_every_name_lands_where_the_converters_put_it(part: Any, name: str, count: int) -> None:
    assert check_map(part, name, inventory(name)) == count


@pytest.mark.parametrize("variant", UNETS)
def test_built_networks_have_the_published_tensors(variant: str) -> None:
    published = inventory(UNETS[variant])
    with torch.device("meta"):
        assert header(family(variant).parts[0].build(published)) == published


@pytest.mark.parametrize(
    ("variant", "name"),
    [("text-to-image", "sd21_unet"), ("depth", "sd2_depth_unet"), ("x4-upscaler", "sd2_x4_unet")],
)
def test_the_configuration_is_the_published_one(variant: str, name: str) -> None:
    said = family(variant).parts[0].config(inventory(UNETS[variant]))
    published = published_config(f"{name}.diffusers")
    # Upcasting is for all, as it does no harm; the upscaler's first level has nothing that could be cross-only.
    for key in set(said) & set(published) - {"upcast_attention", "only_cross_attention"}:
        assert said[key] == published[key], key
    assert {"attention_head_dim", "use_linear_projection", "cross_attention_dim"} <= set(said)
    if variant == "x4-upscaler":
        assert said["num_class_embeds"] == 1000
        assert said["only_cross_attention"][1:] == published["only_cross_attention"][1:]


PIPELINES = {
    "text-to-image": ("StableDiffusionPipeline", set()),
    "inpainting": ("StableDiffusionInpaintPipeline", set()),
    "depth": ("StableDiffusionDepth2ImgPipeline", {"depth_estimator"}),
    "x4-upscaler": ("StableDiffusionUpscalePipeline", {"watermarker"}),
    "unclip-l": ("StableUnCLIPImg2ImgPipeline", set()),
    "unclip-h": ("StableUnCLIPImg2ImgPipeline", set()),
}


@pytest.mark.parametrize("variant", PIPELINES)
def test_the_folder_lists_what_the_pipeline_takes(variant: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    mine = family(variant)
    facts = Facts(prediction=mine.prediction, zero_snr=False, latent=mine.latent, size=mine.defaults.size)
    said = mine.folder(facts)
    name, absent = PIPELINES[variant]
    index = said["model_index.json"]
    assert index["_class_name"] == name
    taken = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    given = {key for key in index if not key.startswith("_")}
    assert given <= taken and taken - given <= absent
    scheduler = said["scheduler/scheduler_config.json"]
    assert scheduler["prediction_type"] == {"v": "v_prediction", "eps": "epsilon"}[mine.prediction]
    theirs = diffusers.DDIMScheduler(**{k: v for k, v in scheduler.items() if k != "_class_name"})
    ours: Any = mine.schedule()
    assert torch.allclose(theirs.alphas_cumprod, torch.tensor(ours.alphas_cumprod), rtol=2e-5, atol=0)
    assert said["vae/config.json"]["scaling_factor"] == mine.latent.scale
    assert said["unet/config.json"]["sample_size"] == {512: 64, 768: 96}.get(
        mine.defaults.size if variant != "x4-upscaler" else 0, 128
    )


def test_what_was_published() -> None:
    usual = family("text-to-image")
    assert (usual.prediction, usual.defaults.size, usual.latent.scale) == ("v", 768, 0.18215)
    assert usual.licence == "CreativeML-OpenRAIL++-M"
    (reading,) = usual.readings
    assert (reading.norm, reading.pad, reading.pool) == (True, 0, None)
    # A whole tower is read one block before its end; one that was shortened for diffusers, at its end.
    assert [reading.layer_of(ClipShape(projection=p)) for p in (1024, None)] == [2, 1]
    assert [family(v).prediction for v in UNETS] == ["v", "eps", "eps", "v", "v", "v"]
    upscaler = family("x4-upscaler")
    assert (upscaler.latent.scale, upscaler.latent.stride) == (0.08333, 4)
    assert [family(v).beside for v in UNETS] == [(), ("mask", "masked"), ("depth",), ("low",), (), ()]


# -- numbers -------------------------------------------------------------------------------------------------

SMALL = UNetShape(
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    transformer_depth=(1, 1, 0),
    middle_depth=1,
    context_dim=48,
    head_channels=64,
    linear=True,
)
UNCLIP = replace(SMALL, adm_in_channels=40)
X4 = replace(
    SMALL,
    in_channels=7,
    transformer_depth=(0, 1, 1),
    cross_only=(False, True, False),
    head_channels=None,
    heads=8,
    num_classes=20,
)


def given(shape: UNetShape, **more: Any) -> Given:
    torch.manual_seed(4)
    texts = {"text": Encoded(z=torch.randn(1, 7, shape.context_dim or 1))}
    sizes = Sizes(original=(64, 64), target=(64, 64))
    return Given(shape=shape, sizes=sizes, texts=texts, **more)


@pytest.mark.parametrize("size", [(16, 8), (11, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("variant", UNETS)
@torch.no_grad()
def test_equals_diffusers(variant: str, size: tuple[int, int]) -> None:
    channels = {"inpainting": 9, "depth": 5, "x4-upscaler": 7}.get(variant, 4)
    width = {"unclip-l": 40, "unclip-h": 96}.get(variant)
    shape = X4 if variant == "x4-upscaler" else replace(SMALL, in_channels=channels, adm_in_channels=width)
    net, mine = trained(shape), family(variant)
    part = mine.parts[0]
    assert mine.recognise({f"denoiser.{name}": one for name, one in header(net).items()}) is None
    assert [
        v for v in UNETS if not family(v).recognise({f"denoiser.{n}": s for n, s in header(net).items()})
    ] == [variant]
    with torch.device("meta"):
        built: Any = part.build(header(net))
    assert built.shape == net.shape
    more = {"image": torch.randn(1, width // 2)} if width else {}
    inputs = mine.condition(given(shape, noise_level=13, **more))
    x, t = torch.randn(1, channels, *size), torch.tensor([437.0])
    labels = {"class_labels": inputs["y"]} if "y" in inputs else {}
    want = oracle(part, net)(x, t, inputs["context"], **labels).sample
    assert relative(net(x, t, **inputs), want) <= 1e-5
    half = net.bfloat16()(
        x.bfloat16(), t, **{k: v.bfloat16() if v.ndim > 1 else v for k, v in inputs.items()}
    )
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_there_and_back_bit_for_bit() -> None:
    for part, shape in ((LINEAR_UNET, UNCLIP), (X4_UNET, X4)):
        net = trained(shape)
        native = {name: lazy(value) for name, value in net.state_dict().items()}
        foreign = Layout(*part.diffusers(native)).backward(native).tensors
        back = Layout(*part.diffusers(foreign)).forward(foreign)
        assert back.tensors.keys() == native.keys() and not back.unknown
        assert all(torch.equal(back.tensors[name].load(), native[name].load()) for name in native)
        foreign["class_embeding.weight"] = next(iter(foreign.values()))
        assert Layout(*part.diffusers(foreign)).forward(foreign).unknown == ["class_embeding.weight"]


@pytest.mark.parametrize("variant", ["unclip-l", "unclip-h"])
def test_a_view_of_a_picture_equals_diffusers(variant: str) -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    mine, level = family(variant), 321
    width = {"unclip-l": 768, "unclip-h": 1024}[variant]
    with torch.device("meta"):
        shape = UNet(replace(SMALL, adm_in_channels=2 * width)).shape
    torch.manual_seed(0)
    view, noise = torch.randn(2, 1, width)
    normalizer = StableUnCLIPImageNormalizer(width)
    mean, std = torch.randn(1, width), torch.rand(1, width) + 0.5
    normalizer.load_state_dict({"mean": mean, "std": std})
    facts = Facts(prediction="v", zero_snr=False, latent=mine.latent, size=768)
    config = dict(mine.folder(facts)["image_noising_scheduler/scheduler_config.json"])
    del config["_class_name"]
    them = SimpleNamespace(image_normalizer=normalizer, image_noising_scheduler=DDPMScheduler(**config))
    with torch.no_grad():
        want = StableUnCLIPImg2ImgPipeline.noise_image_embeddings(them, view, level, noise)
    noised = noised_view(view, level, noise, mean, std)
    got = mine.condition(given(shape, image=noised, noise_level=level))["y"]
    assert relative(got, want) <= 1e-5
    away = mine.condition(given(shape, image=noised, noise_level=level, negative=True))["y"]
    assert away.shape == got.shape and not away.any()


def test_wrong_inputs_are_refused() -> None:
    upscale, draw = family("x4-upscaler").condition, family("unclip-l").condition
    assert upscale(given(X4, noise_level=19))["y"].dtype == torch.int64
    with pytest.raises(BadInput, match=r"noise level 20 is outside 0\.\.19"):
        upscale(given(X4, noise_level=20))
    with pytest.raises(BadInput, match="give one"):
        draw(given(UNCLIP))
    with pytest.raises(BadInput, match=r"\(1, 21\), not \(1, 20\)"):
        draw(given(UNCLIP, image=torch.zeros(1, 21)))
