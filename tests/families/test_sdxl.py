"""SDXL: base, refiner and inpainting, their two towers, and the vector of sentence and sizes."""

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
    shapes,
    trained,
)
from tests.nets.inventories import inventory, shapes_of

from sumuk.base.errors import BadInput
from sumuk.families.detect import Match, detect
from sumuk.families.family import FAMILIES, Facts, Family
from sumuk.families.reading import Encoded, Given, Sizes
from sumuk.families.sdxl import CLIP_G, CLIP_L, UNET, vector
from sumuk.files.layout import Layout
from sumuk.files.tensors import Tensors, lazy
from sumuk.nets.clip import ClipShape
from sumuk.nets.unet import UNetShape

SINGLE = {
    "base": {
        "sdxl_base_unet": "model.diffusion_model.",
        "sdxl_vae": "first_stage_model.",
        "sdxl_base_clip_l": "conditioner.embedders.0.transformer.",
        "sdxl_base_openclip_g": "conditioner.embedders.1.model.",
    },
    "refiner": {
        "sdxl_refiner_unet": "model.diffusion_model.",
        "sdxl_vae": "first_stage_model.",
        "sdxl_refiner_openclip_g": "conditioner.embedders.0.model.",
    },
}
FOLDER = {
    "base": {
        "sdxl_base_unet": "unet/",
        "sd15_vae": "vae/",
        "clip_l": "text_encoder/",
        "clip_g": "text_encoder_2/",
    },
    "refiner": {"sdxl_refiner_unet": "unet/", "sd15_vae": "vae/", "clip_g": "text_encoder_2/"},
    "inpainting": {
        "sdxl_inpaint_unet": "unet/",
        "sd15_vae": "vae/",
        "clip_l": "text_encoder/",
        "clip_g": "text_encoder_2/",
    },
}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def family(variant: str) -> Family:
    found = FAMILIES[f"sdxl/{variant}"]
    assert isinstance(found, Family)
    return found


def single(variant: str) -> Tensors:
    made: Tensors = {}
    for name, prefix in SINGLE["base" if variant == "inpainting" else variant].items():
        made |= lazies(inventory(name), prefix)
    if variant == "inpainting":
        made[FIRST] = replace(made[FIRST], shape=(320, 9, 3, 3))
    return made


def folder(variant: str) -> Tensors:
    made: Tensors = {}
    for name, prefix in FOLDER[variant].items():
        made |= lazies(inventory(f"{name}.diffusers"), prefix)
    return made


# -- which variant -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FOLDER)
@pytest.mark.parametrize("layout", ["single", "diffusers"])
def test_whole_files_and_folders_are_known(variant: str, layout: str) -> None:
    answer = detect(single(variant) if layout == "single" else folder(variant))
    assert isinstance(answer, Match), answer.why
    assert (answer.family.key, answer.arrangement.name) == (f"sdxl/{variant}", layout)
    assert not answer.moved.unknown and not answer.moved.halves
    ignored = {"base": 2, "inpainting": 2, "refiner": 1}[variant] if layout == "single" else 0
    assert len(answer.moved.ignored) == ignored  # position_ids and logit_scale


@pytest.mark.parametrize("variant", FOLDER)
def test_the_two_layouts_are_each_other_backward(variant: str) -> None:
    one, other = family(variant).arrangements[:2]
    file, tensors = single(variant), folder(variant)
    native = one.layout(file).forward(file).tensors
    again = other.layout(tensors).forward(tensors).tensors
    assert shapes(again) == shapes(native)
    assert shapes(other.layout(native, backward=True).backward(native).tensors) == shapes(tensors)
    there = one.layout(again, backward=True).backward(again)
    assert {name: file[name].shape for name in there.tensors} == shapes(there.tensors) and not there.unknown
    assert not [
        name for name in set(file) - set(there.tensors) if not name.endswith(("position_ids", "scale"))
    ]


@pytest.mark.parametrize("variant", FOLDER)
def test_single_networks_are_known(variant: str) -> None:
    arrangements = family(variant).arrangements
    assert known(arrangements[2], single(variant), "model.diffusion_model.") == [f"sdxl/{variant}"]
    assert known(arrangements[3], folder(variant), "unet/") == [f"sdxl/{variant}"]


@pytest.mark.parametrize(("name", "part"), [("clip_g", "text_2"), ("clip_l", "text")])
def test_a_tower_by_itself_is_told_by_its_projection(name: str, part: str) -> None:
    bare = family("base").arrangements[3]
    tensors = lazies(inventory(f"{name}.diffusers"))
    moved = bare.layout(tensors).forward(tensors)
    assert not moved.unknown and {native.split(".")[0] for native in moved.tensors} == {part}


def test_other_noise_and_other_towers_are_refused() -> None:
    markers = ["edm_mean", "edm_std", "edm_vpred.sigma_max"]
    answer = detect(single("base") | lazies(dict.fromkeys(markers, ())), among=NEAR)
    assert isinstance(answer, Match) and answer.moved.unknown == markers  # load() refuses them
    answer = detect(single("base") | lazies({"v_pred": (0,), "ztsnr": (0,)}), among=NEAR)
    assert isinstance(answer, Match) and not answer.moved.unknown
    for name, shape in (
        ("conditioner.embedders.1.model.token_embedding.weight", (49408, 1024)),
        ("conditioner.embedders.1.model.text_projection", (1280, 1024)),
        (FIRST, (320, 5, 3, 3)),
    ):
        tensors = single("base")
        tensors[name] = replace(tensors[name], shape=shape)
        native = family("base").arrangements[0].layout(tensors).forward(tensors).tensors
        assert str(shape[1]) in str(family("base").recognise(shapes(native)))


@pytest.mark.parametrize("variant", FOLDER)
def test_others_are_not_of_this_family(variant: str) -> None:
    for other in ("sd15_unet", "sd2_unet", "sd2_x4_unet", "sd21_unclip_l_unet", "sd21_unclip_h_unet"):
        native = {f"denoiser.{name}": size for name, size in inventory(other).items()}
        assert family(variant).recognise(native) is not None
    native = {f"denoiser.{name}": size for name, size in inventory("sdxl_base_unet").items()}
    odd: dict[str, tuple[int, ...]] = {
        **native,
        "text.token_embedding.weight": (),
        "denoiser.out.2.weight": (),
    }
    assert family(variant).recognise(odd) is not None


# -- names and configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("sdxl_base_unet", 1680), ("sdxl_refiner_unet", 1220)])
def test_every_name_lands_where_the_converters_put_it(name: str, count: int) -> None:
    assert check_map(UNET, name, inventory(name)) == count


@pytest.mark.parametrize(
    ("name", "depths", "heads", "length"),
    [
        ("sdxl_base_unet", [1, 2, 10], [5, 10, 20], 2816),
        ("sdxl_refiner_unet", [1, 4, 4, 4], [6, 12, 24, 24], 2560),
    ],
)
def test_the_configuration_is_the_published_one(
    name: str, depths: list[int], heads: list[int], length: int
) -> None:
    said, published = UNET.config(inventory(name)), published_config(f"{name}.diffusers")
    assert said["transformer_layers_per_block"] == depths and said["attention_head_dim"] == heads
    assert said["projection_class_embeddings_input_dim"] == length
    for key in set(said) & set(published) - {
        "transformer_layers_per_block"
    }:  # 4 is short for all the refiner's
        assert said[key] == published[key], key
    assert {"addition_embed_type", "addition_time_embed_dim", "use_linear_projection"} <= set(said)


@pytest.mark.parametrize("variant", FOLDER)
def test_the_folder_lists_what_the_pipeline_takes(variant: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    mine = family(variant)
    said = mine.folder(Facts(prediction="eps", zero_snr=False, latent=mine.latent, size=1024))
    index = said["model_index.json"]
    taken = set(inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters) - {"self"}
    given = {key for key in index if not key.startswith("_")}
    assert given <= taken and taken - given <= {"add_watermarker"}
    assert said["vae/config.json"] == {
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "shift_factor": None,
        "force_upcast": True,
    }
    assert said["unet/config.json"] == {"sample_size": 128}
    assert (index["text_encoder"] == [None, None]) == (variant == "refiner")


def test_what_was_published() -> None:
    base, refiner = family("base"), family("refiner")
    assert (
        FAMILIES["sdxl"] is base
        and base.prediction == "eps"
        and base.licence.startswith("CreativeML-OpenRAIL++")
    )
    assert (base.defaults.size, base.defaults.steps, base.defaults.guidance) == (1024, 30, 5.0)
    small, large = base.readings
    assert (small.part, small.layer, small.norm, small.pad, small.pool) == ("text", 2, False, None, None)
    assert (large.part, large.layer, large.norm, large.pad, large.pool) == (
        "text_2",
        2,
        False,
        0,
        "projected",
    )
    assert refiner.readings == (large,) and [part.name for part in refiner.parts] == [
        "denoiser",
        "vae",
        "text_2",
    ]
    assert family("inpainting").beside == ("mask", "masked")


# -- numbers -------------------------------------------------------------------------------------------------

BASE = UNetShape(
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    transformer_depth=(0, 1, 2),
    middle_depth=2,
    context_dim=128 + 192,
    head_channels=64,
    linear=True,
    adm_in_channels=192 + 6 * 256,
)
REFINER = replace(
    BASE, transformer_depth=(0, 2, 0), middle_depth=2, context_dim=192, adm_in_channels=192 + 5 * 256
)
SIZES = Sizes(original=(768, 1152), crop=(16, 40), target=(1024, 832))


def given(**more: Any) -> Given:
    torch.manual_seed(4)
    texts = {
        "text": Encoded(z=torch.randn(1, 7, 128)),
        "text_2": Encoded(z=torch.randn(1, 7, 192), pooled=torch.randn(1, 192)),
    }
    return Given(shape=BASE, sizes=SIZES, texts=texts, **more)


def their_ids(variant: str) -> tuple[Any, Any]:
    """The numbers that diffusers tells, of what is wanted and of what is not."""
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionXLImg2ImgPipeline

    refines = variant == "refiner"
    shape = REFINER if refines else BASE
    unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=256),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=shape.adm_in_channels)),
    )
    them = SimpleNamespace(config=SimpleNamespace(requires_aesthetics_score=refines), unet=unet)
    sizes = (SIZES.original, SIZES.crop, SIZES.target)
    return StableDiffusionXLImg2ImgPipeline._get_add_time_ids(
        them, *sizes, 6.0, 2.5, *sizes, dtype=torch.float32, text_encoder_projection_dim=192
    )


@pytest.mark.parametrize("variant", ["base", "refiner"])
@pytest.mark.parametrize("size", [(16, 8), (11, 7)], ids=["even", "odd"])
@torch.no_grad()
def test_equals_diffusers(variant: str, size: tuple[int, int]) -> None:
    """Sizes, sentence and text of our condition against theirs, through the whole U-Net."""
    mine, net = family(variant), trained(REFINER if variant == "refiner" else BASE)
    recognised = {f"denoiser.{name}": one for name, one in header(net).items()}
    assert [v for v in FOLDER if family(v).recognise(recognised) is None] == [variant]
    theirs = oracle(UNET, net)
    x, t = torch.randn(1, 4, *size), torch.tensor([437.0])
    answers = []
    for ids, negative in zip(their_ids(variant), (False, True), strict=True):
        inputs = mine.condition(given(negative=negative))
        texts = given().texts
        added = {"text_embeds": texts["text_2"].pooled, "time_ids": ids}
        want = theirs(x, t, inputs["context"], added_cond_kwargs=added).sample
        answers.append(net(x, t, **inputs))
        assert relative(answers[-1], want) <= 1e-5
    assert torch.equal(*answers) == (variant == "base")  # the score of what is not wanted is another
    low = net.bfloat16()(x.bfloat16(), t, **{key: value.bfloat16() for key, value in inputs.items()})
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


@pytest.mark.parametrize("variant", ["base", "refiner"])
def test_the_vector_equals_diffusers(variant: str) -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import Timesteps

    features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    for ids, negative in zip(their_ids(variant), (False, True), strict=True):
        got = family(variant).condition(given(negative=negative))["y"]
        pooled = given().texts["text_2"].pooled
        assert pooled is not None
        want = torch.cat((pooled, features(ids.flatten()).reshape(1, -1)), dim=1)
        assert relative(got, want) <= 1e-6


@torch.no_grad()
def test_both_towers_equal_transformers() -> None:
    """Their random weights through our folder layout: context and sentence as diffusers puts them together."""
    transformers = pytest.importorskip("transformers")
    small = ClipShape(vocabulary=100, length=16, width=64, depth=3, hidden=96)
    large = replace(small, width=128, depth=4, projection=80)
    files: Tensors = {}
    theirs = {}
    for part, place, shape in ((CLIP_L, "text_encoder/", small), (CLIP_G, "text_encoder_2/", large)):
        with torch.device("meta"):
            native = shapes_of(part.build(_native(part, shape)))
        config = part.config(native)
        kind = getattr(transformers, config["architectures"][0])
        torch.manual_seed(5)
        theirs[part.name] = kind(transformers.CLIPTextConfig(**config)).eval()
        for name, value in theirs[part.name].named_parameters():
            value.copy_(torch.randn(value.shape) * (0.1 if value.ndim == 1 else value.shape[-1] ** -0.5))
            files[place + name] = lazy(value)
    moved = family("base").arrangements[1].layout(files).forward(files)
    assert not moved.unknown and not moved.halves
    ids = torch.randint(1, 98, (1, 16), generator=torch.Generator().manual_seed(1))
    ids[0, 0], ids[0, 6], ids[0, 7:] = 98, 99, 0
    encoded, states = {}, {}
    for reading in family("base").readings:
        part = next(part for part in family("base").parts if part.name == reading.part)
        own = {
            n.removeprefix(f"{part.name}."): t
            for n, t in moved.tensors.items()
            if n.startswith(f"{part.name}.")
        }
        network: Any = part.build(shapes(own)).eval()
        network.load_state_dict({name: one.load() for name, one in own.items()})
        said = network(ids)
        pooled = None if reading.pool is None else getattr(said, reading.pool)
        encoded[part.name] = Encoded(z=said.skip(reading.layer, reading.norm), pooled=pooled)
        states[part.name] = theirs[part.name](input_ids=ids, output_hidden_states=True)
    inputs = family("base").condition(Given(shape=BASE, sizes=SIZES, texts=encoded))
    context = torch.cat([states[part].hidden_states[-2] for part in ("text", "text_2")], dim=-1)
    assert inputs["context"].shape == (1, 16, 64 + 128)
    assert relative(inputs["context"], context) <= 5e-6
    assert relative(inputs["y"][:, :80], states["text_2"].text_embeds) <= 5e-6


def _native(part: Any, shape: ClipShape) -> dict[str, tuple[int, ...]]:
    from sumuk.nets.clip import ClipText, OpenClipText

    return shapes_of((OpenClipText if part is CLIP_G else ClipText)(shape))


def test_there_and_back_bit_for_bit() -> None:
    net = trained(BASE)
    native = {name: lazy(value) for name, value in net.state_dict().items()}
    foreign = Layout(*UNET.diffusers(native)).backward(native).tensors
    assert "add_embedding.linear_1.weight" in foreign
    back = Layout(*UNET.diffusers(foreign)).forward(foreign)
    assert back.tensors.keys() == native.keys() and not back.unknown
    assert all(torch.equal(back.tensors[name].load(), native[name].load()) for name in native)
    foreign["add_embeding.linear_1.weight"] = foreign.pop("add_embedding.linear_1.weight")
    assert Layout(*UNET.diffusers(foreign)).forward(foreign).unknown == ["add_embeding.linear_1.weight"]


def test_a_tower_without_projection_is_refused_in_words() -> None:
    with pytest.raises(BadInput, match="text_projection"):
        vector(None, (1.0,))
