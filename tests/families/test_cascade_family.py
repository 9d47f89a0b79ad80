"""Stable Cascade as published: names on all sides, what a file is, what the stages are told, latents and noise."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch
from tests.nets.inventories import KEYS, inventory, shapes_of
from tests.nets.test_cascade import STAGES, trained
from torch import Tensor

from sumuk.base.errors import BadInput
from sumuk.diffusion.cosine import ContinuousCosine
from sumuk.families.cascade import (
    DIFFUSERS_B,
    DIFFUSERS_C,
    KIND_A,
    KIND_EFFNET,
    KIND_PREVIEWER,
    SINGLE_B,
    SINGLE_C,
    STAGE_B,
    STAGE_C,
)
from sumuk.families.cascade_parts import DECODER, PRIOR, STAGE_A
from sumuk.families.detect import Match, detect
from sumuk.families.family import FAMILIES, Facts, Kind, Part
from sumuk.families.reading import Encoded, Given, Sizes
from sumuk.files.layout import Layout
from sumuk.files.tensors import Lazy, Tensors, lazy

CASCADE: list[Kind] = [STAGE_C, STAGE_B, KIND_A, KIND_EFFNET, KIND_PREVIEWER]
EVERY = pytest.mark.parametrize("stage", STAGES)


def never() -> Tensor:
    raise AssertionError("only names and shapes are known")


def known(name: str, prefix: str = "") -> Tensors:
    return {prefix + key: Lazy(shape, "BF16", never) for key, shape in inventory(name).items()}


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in tensors.items()}


def tiny(stage: str) -> Tensors:
    kind, shape, _, _ = STAGES[stage]
    with torch.device("meta"):
        net = kind(shape)
    return {name: lazy(value) for name, value in trained(net).state_dict().items()}


def rows(one: Lazy, index: int) -> Lazy:
    """One third of a stack."""
    third = one.shape[0] // 3
    return Lazy((third, *one.shape[1:]), one.dtype, lambda: one.load()[index * third : (index + 1) * third])


def comfy(tensors: Tensors) -> Tensors:
    """With query, key and value apart, as ComfyUI saves them."""
    made: Tensors = {}
    for name, one in tensors.items():
        place, _, kind = name.rpartition("in_proj_")
        if place:
            made |= {f"{place}to_{letter}.{kind}": rows(one, index) for index, letter in enumerate("qkv")}
        else:
            made[name] = one
    return made


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cascade_stage_c_3.6b", PRIOR),
        ("cascade_stage_c_1b", PRIOR),
        ("cascade_stage_b_1.5b", DECODER),
        ("cascade_stage_b_700m", DECODER),
        ("cascade_stage_a", STAGE_A),
    ],
)
def test_published_names_in_both_layouts(name: str, part: Part) -> None:
    ours, theirs = known(name), known(f"{name}.diffusers")
    forward, backward = (
        Layout(*part.diffusers(theirs)).forward(theirs),
        Layout(*part.diffusers(ours)).backward(ours),
    )
    for moved in (forward, backward):
        assert not moved.unknown and not moved.halves and not moved.ignored
    assert shapes(forward.tensors) == shapes(ours) and shapes(backward.tensors) == shapes(theirs)
    maps = KEYS / "maps" / f"{name}__to_diffusers.json.gz"
    if not maps.exists():
        return
    for key, source in json.loads(gzip.decompress(maps.read_bytes()))["map"].items():
        if isinstance(source, str):
            assert backward.origin[key] == [source]
        else:
            ((original, begin, end),) = source
            assert backward.origin[key] == [original] and "qkv".index(key.split(".to_")[1][0]) == begin // (
                end - begin
            )


@EVERY
def test_numbers_there_and_back_and_their_order(stage: str) -> None:
    part, native = STAGES[stage][2], tiny(stage)
    theirs = Layout(*part.diffusers(native)).backward(native).tensors
    back = Layout(*part.diffusers(theirs)).forward(theirs)
    back.refuse_leftovers("there and back")
    assert all(torch.equal(back.tensors[name].load(), one.load()) for name, one in native.items())
    assert len(back.tensors) == len(native)
    place = "down_blocks.2.2.attention" if stage == "b" else "up_blocks.0.5.attention"
    stacked = native[f"{place}.attn.in_proj_weight"].load()
    for letter, rows in zip("qkv", stacked.chunk(3), strict=True):
        assert torch.equal(theirs[f"{place}.to_{letter}.weight"].load(), rows)


@EVERY
def test_comfyuis_attention_is_read_and_not_written(stage: str) -> None:
    part, native = STAGES[stage][2], tiny(stage)
    moved = Layout(*part.rules("original", comfy(native))).forward(comfy(native))
    moved.refuse_leftovers("comfy")
    assert all(torch.equal(moved.tensors[name].load(), one.load()) for name, one in native.items())
    assert set(Layout(*part.rules("original", native)).backward(native).tensors) == set(native)


@EVERY
def test_half_an_attention_and_strange_names_are_reported(stage: str) -> None:
    part, native = STAGES[stage][2], tiny(stage)
    theirs = Layout(*part.diffusers(native)).backward(native).tensors
    place = next(name for name in theirs if name.endswith("attention.to_k.bias"))
    theirs["down_blocks.0.0.lora.weight"] = theirs.pop(place)
    moved = Layout(*part.diffusers(theirs)).forward(theirs)
    assert moved.unknown == ["down_blocks.0.0.lora.weight"] and moved.halves[0][1] == [place]


@EVERY
def test_configurations_make_diffusers_networks(stage: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    part, native = STAGES[stage][2], tiny(stage)
    config = part.config(shapes(native))
    with torch.device("meta"):
        theirs = getattr(diffusers, config.pop("_class_name"))(**config)
    assert shapes_of(theirs) == shapes(Layout(*part.diffusers(native)).backward(native).tensors)


@pytest.mark.parametrize("name", ["c_3.6b", "c_1b", "b_1.5b", "b_700m"])
def test_published_configurations(name: str) -> None:
    part = PRIOR if name[0] == "c" else DECODER
    native = inventory(f"cascade_stage_{name}")
    published = json.loads((KEYS / f"cascade_stage_{name}.diffusers.json").read_text())["config"]
    ours = part.config(native)
    for config in (ours, published):  # a level without attention has no heads, whatever is written there
        heads = zip(config["num_attention_heads"], config["block_types_per_layer"], strict=True)
        config["num_attention_heads"] = [count if len(kinds) == 3 else 0 for count, kinds in heads]
    assert {key: value for key, value in ours.items() if key != "_class_name"} == published


def test_stage_as_configuration() -> None:
    config = STAGE_A.config(inventory("cascade_stage_a"))
    published = json.loads((KEYS / "cascade_stage_a.diffusers.json").read_text())["config"]
    assert config == published | {"_class_name": "PaellaVQModel", "scale_factor": 0.43}


# -- detection -----------------------------------------------------------------------------------------------------

ALONE = {
    "cascade_stage_c_3.6b": "stage-c",
    "cascade_stage_c_1b": "stage-c",
    "cascade_stage_b_1.5b": "stage-b",
    "cascade_stage_b_700m": "stage-b",
    "cascade_stage_a": "stage-a",
    "cascade_effnet": "effnet",
    "cascade_previewer": "previewer",
}


@pytest.mark.parametrize("name", ALONE)
def test_each_published_file(name: str) -> None:
    for layout in ("", ".diffusers"):
        if layout and not (KEYS / f"{name}{layout}.json").exists():
            continue
        answer = detect(known(name + layout), among=CASCADE)
        assert isinstance(answer, Match), answer
        assert answer.family.key == f"cascade/{ALONE[name]}"
        assert answer.arrangement.name == ("bare-diffusers" if layout else "bare")
        assert not answer.moved.unknown and not answer.moved.halves


OTHERS = (
    "cascade_controlnet_canny", "cascade_controlnet_super_resolution", "cascade_lora_3.6b_rank4", "clip_g.diffusers",
    "dit_s_2", "ddpm_cifar10.diffusers", "sd15_unet.diffusers", "sd15_vae.diffusers", "taesd_decoder",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_names_in_common_is_not_cascade(name: str) -> None:
    assert not isinstance(detect(known(name), among=CASCADE), Match)


def comfyui_c() -> Tensors:
    return {
        **comfy(known("cascade_stage_c_1b", "model.diffusion_model.")),
        **known("clip_g.diffusers", "text_encoder.clip_g.transformer."),
        **known("cascade_effnet", "vae.encoder."),
        **known("cascade_previewer", "vae.previewer."),
        "text_encoder.clip_g.logit_scale": Lazy((), "F32", never),
    }


def test_comfyuis_stage_c() -> None:
    answer = detect(comfyui_c(), among=CASCADE)
    assert isinstance(answer, Match)
    assert (answer.family.key, answer.arrangement) == ("cascade/stage-c", SINGLE_C)
    assert not answer.moved.unknown and not answer.moved.halves
    assert answer.moved.ignored == ["text_encoder.clip_g.logit_scale"]
    heads = {name.split(".")[0] for name in answer.moved.tensors}
    assert heads == {"denoiser", "text", "effnet", "previewer"}
    assert sum(name.startswith("denoiser.") for name in answer.moved.tensors) == 654


def test_an_older_projection_is_turned_over() -> None:
    tensors = {"text_encoder.clip_g.text_projection": lazy(torch.arange(6.0).reshape(2, 3))}
    moved = SINGLE_B.layout(tensors).forward(tensors)
    got = moved.tensors["text.text_projection.weight"]
    assert got.shape == (3, 2) and torch.equal(got.load(), torch.arange(6.0).reshape(2, 3).t())


def test_comfyuis_stage_b() -> None:
    tensors = {
        **comfy(known("cascade_stage_b_700m", "model.diffusion_model.")),
        **known("clip_g.diffusers", "text_encoder.clip_g.transformer."),
        **known("cascade_stage_a", "vae."),
    }
    answer = detect(tensors, among=CASCADE)
    assert isinstance(answer, Match)
    assert (answer.family.key, answer.arrangement) == ("cascade/stage-b", SINGLE_B)
    assert not answer.moved.unknown and not answer.moved.halves
    assert {name.split(".")[0] for name in answer.moved.tensors} == {"decoder", "text", "vae"}


def test_diffusers_folders() -> None:
    prior = {**known("cascade_stage_c_1b.diffusers", "prior/"), **known("clip_g.diffusers", "text_encoder/")}
    decoder = {
        **known("cascade_stage_b_700m.diffusers", "decoder/"),
        **known("clip_g.diffusers", "text_encoder/"),
        **known("cascade_stage_a.diffusers", "vqgan/"),
    }
    small = known("cascade_stage_c_1b.diffusers", "prior_lite/")
    for tensors, family, arrangement in (
        (prior, STAGE_C, DIFFUSERS_C),
        (prior | small, STAGE_C, DIFFUSERS_C),
        (decoder, STAGE_B, DIFFUSERS_B),
        (prior | decoder, STAGE_C, DIFFUSERS_C),
    ):
        answer = detect(tensors, among=CASCADE)
        assert isinstance(answer, Match)
        assert answer.family is family and answer.arrangement is arrangement
        assert not answer.moved.unknown and not answer.moved.halves


def test_a_text_tower_of_another_width_is_noticed() -> None:
    tensors = comfyui_c()
    tensors["text_encoder.clip_g.transformer.text_projection.weight"] = Lazy((1024, 1280), "F16", never)
    answer = detect(tensors, among=CASCADE)
    assert not isinstance(answer, Match) and "1024" in answer.why


def test_a_whole_model_survives_every_arrangement() -> None:
    native: Tensors = {}
    for part, name in (
        ("denoiser", "cascade_stage_c_1b"),
        ("decoder", "cascade_stage_b_700m"),
        ("vae", "cascade_stage_a"),
        ("text", "clip_g.diffusers"),
    ):
        native |= known(name, f"{part}.")
    extra = {**known("cascade_effnet", "effnet."), **known("cascade_previewer", "previewer.")}
    for arrangement, tensors in ((SINGLE_C, native | extra), (DIFFUSERS_C, native)):
        there = arrangement.layout(tensors, backward=True).backward(tensors)
        assert not there.unknown and not there.halves
        back = arrangement.layout(there.tensors).forward(there.tensors)
        assert not back.unknown and not back.halves and shapes(back.tensors) == shapes(tensors)


# -- what they are -------------------------------------------------------------------------------------------------


def test_the_stages_are_what_was_published() -> None:
    assert FAMILIES["cascade"] is STAGE_C and FAMILIES["cascade/stage-b"] is STAGE_B
    assert {kind.key for kind in CASCADE} == {f"cascade/{variant}" for variant in ALONE.values()}
    assert [part.name for part in STAGE_C.parts] == [
        "denoiser", "text", "image", "effnet", "previewer", "decoder", "vae"
    ]  # fmt: skip
    assert (STAGE_C.defaults.steps, STAGE_C.defaults.guidance) == (20, 4.0)
    assert (STAGE_B.defaults.steps, STAGE_B.defaults.guidance) == (10, 1.1)
    assert STAGE_C.prediction == STAGE_B.prediction == "eps"
    for stage, shift in ((STAGE_C, 2.0), (STAGE_B, 1.0)):
        schedule = stage.schedule()
        assert isinstance(schedule, ContinuousCosine) and schedule.shift == shift


def test_latents() -> None:
    cells = {
        side: (STAGE_C.latent.cells(side), STAGE_B.latent.cells(side)) for side in (512, 768, 1024, 1536)
    }
    assert cells == {512: (12, 128), 768: (18, 192), 1024: (24, 256), 1536: (36, 384)}
    z = torch.randn(1, 4, 2, 2)
    assert torch.allclose(STAGE_B.latent.encode(z), z / 0.43) and torch.equal(STAGE_C.latent.encode(z), z)


def given(**more: Any) -> Given:
    said = Encoded(z=torch.randn(1, 77, 20), pooled=torch.randn(1, 24))
    return Given(
        shape=STAGES["c"][1], sizes=Sizes(original=(8, 8), target=(8, 8)), texts={"text": said}, **more
    )


def test_what_stage_c_is_told() -> None:
    plain = given()
    told = STAGE_C.condition(plain)
    assert told["clip_text"] is plain.texts["text"].z
    assert told["clip_text_pooled"].shape == (1, 1, 24) and torch.equal(
        told["clip_img"], torch.zeros(1, 1, 12)
    )
    image = torch.randn(1, 2, 12)
    assert torch.equal(STAGE_C.condition(given(image=image))["clip_img"], image)
    assert torch.equal(STAGE_C.condition(given(image=image[:, 0]))["clip_img"], image[:, :1])
    assert torch.equal(
        STAGE_C.condition(given(image=image, negative=True))["clip_img"], torch.zeros(1, 2, 12)
    )
    kind, shape, _, _ = STAGES["c"]
    with torch.device("meta"):
        net = kind(shape)
    x = torch.randn(1, 16, 3, 2, device="meta")
    named = {name: value.to("meta") for name, value in told.items()}
    assert net(x, torch.ones(1, device="meta"), **named).shape == x.shape


def test_what_stage_b_is_told() -> None:
    effnet = torch.randn(1, 16, 3, 2)
    told = STAGE_B.condition(given(coarse=effnet))
    assert torch.equal(told["effnet"], effnet) and told["clip_text_pooled"].shape == (1, 1, 24)
    assert not STAGE_B.condition(given(coarse=effnet, negative=True))["effnet"].any()
    with pytest.raises(BadInput, match="stage C's latent"):
        STAGE_B.condition(given())
    kind, shape, _, _ = STAGES["b"]
    with torch.device("meta"):
        net = kind(shape)
    x = torch.randn(1, 4, 16, 18, device="meta")
    named = {name: value.to("meta") for name, value in told.items()}
    assert net(x, torch.ones(1, device="meta"), **named).shape == x.shape


def test_a_tower_without_projection_is_refused() -> None:
    said = Encoded(z=torch.randn(1, 77, 20))
    bare = Given(shape=STAGES["c"][1], sizes=Sizes(original=(8, 8), target=(8, 8)), texts={"text": said})
    with pytest.raises(BadInput, match="projected"):
        STAGE_C.condition(bare)


@pytest.mark.parametrize(("stage", "network"), [(STAGE_C, "prior"), (STAGE_B, "decoder")])
def test_folders(stage: Any, network: str) -> None:
    facts = Facts(prediction="eps", zero_snr=False, latent=stage.latent, size=1024)
    said = stage.folder(facts)
    assert said["model_index.json"][network] == ["diffusers", "StableCascadeUNet"]
    assert said["scheduler/scheduler_config.json"]["_class_name"] == "DDPMWuerstchenScheduler"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (STAGE_A, "cascade_stage_a"),
        (STAGE_C.parts[3], "cascade_effnet"),
        (STAGE_C.parts[4], "cascade_previewer"),
        (STAGE_C.parts[1], "clip_g.diffusers"),
    ],
)
def test_other_parts_are_built_from_their_headers(part: Part, name: str) -> None:
    published = inventory(name)
    assert part.key in published
    with torch.device("meta"):
        assert shapes_of(part.build(published)) == published
