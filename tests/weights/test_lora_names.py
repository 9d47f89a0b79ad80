"""Names of LoRAs' layers: every published one finds its tensor, and the rows of it that it means."""

from __future__ import annotations

import gzip
import json
from functools import cache

import pytest
from tests.nets.inventories import KEYS, inventory
from tests.weights.lora_files import KEYS as TINY
from tests.weights.lora_files import model, natives, shapes

from sumuk.families.detect import families
from sumuk.files.tensors import Shape
from sumuk.weights.lora_names import BIASES, WEIGHTS, Index, Place, cut, layer_of

KINDS = {kind.key: kind for kind in families()}
LEFT_OUT = ("logit_scale", "attn_mask", "text_model.embeddings.position_ids")

FULL: dict[str, tuple[str, dict[str, str]]] = {
    "sd1": ("sd1/text-to-image", {"denoiser": "sd15_unet", "text": "sd15_clip_l"}),
    "sd2": ("sd2/text-to-image", {"denoiser": "sd2_unet", "text": "sd2_openclip_h"}),
    "sdxl": (
        "sdxl/base",
        {"denoiser": "sdxl_base_unet", "text": "sdxl_base_clip_l", "text_2": "sdxl_base_openclip_g"},
    ),
    "sdxl-refiner": ("sdxl/refiner", {"denoiser": "sdxl_refiner_unet", "text_2": "sdxl_refiner_openclip_g"}),
    "flux": ("flux/dev", {"denoiser": "flux1_dev", "text": "sd15_clip_l", "text_2": "t5_xxl_encoder"}),
    "sd3": ("sd3/medium", {"denoiser": "sd3_medium_mmdit"}),
    "sd35-medium": ("sd3/3.5-medium", {"denoiser": "sd35_medium_mmditx"}),
    "sd35-large": ("sd3/3.5-large", {"denoiser": "sd35_large_mmdit"}),
    "cascade": ("cascade/stage-c", {"denoiser": "cascade_stage_c_3.6b"}),
}


@cache
def index(name: str) -> Index:
    key, networks = FULL[name]
    native: dict[str, Shape] = {
        f"{part}.{tensor}": shape
        for part, file in networks.items()
        for tensor, shape in inventory(file).items()
        if tensor not in LEFT_OUT
    }
    return Index(KINDS[key], native)  # type: ignore[arg-type]


def stored(name: str) -> dict:  # type: ignore[type-arg]
    path = KEYS / name
    if not path.exists():
        pytest.skip(f"{name} absent")
    return json.loads(gzip.decompress(path.read_bytes()))  # type: ignore[no-any-return]


PUBLISHED = {
    "sd15_unet": "sd1", "sd15_te": "sd1", "sd2_unet": "sd2", "sd2_te": "sd2", "sdxl_unet": "sdxl", "sdxl_te1": "sdxl",
    "sdxl_te2": "sdxl", "flux": "flux", "flux_te1": "flux", "flux_te3_t5": "flux", "sd3_medium": "sd3",
    "sd35_medium": "sd35-medium", "sd35_large": "sd35-large",
}  # fmt: skip


@pytest.mark.parametrize("names", PUBLISHED)
def test_every_published_name_of_kohyas_finds_its_tensor(names: str) -> None:
    here = index(PUBLISHED[names])
    for layer, (key, shape) in stored("lora_kohya_names.json.gz")["models"][names].items():
        place = here.find(layer)
        assert place is not None, layer
        assert here.shape(place) == tuple(shape), layer
        if not key.startswith("(HF)"):
            assert place.name == key.removeprefix("model.diffusion_model."), layer


MAPS = {
    "sd15_unet": ("sd1", "unet."), "sd2_unet": ("sd2", "unet."), "sdxl_base_unet": ("sdxl", "unet."),
    "sdxl_refiner_unet": ("sdxl-refiner", "unet."), "flux1_dev": ("flux", "transformer."),
    "sd3_medium_mmdit": ("sd3", "transformer."), "sd35_medium_mmditx": ("sd35-medium", "transformer."),
    "sd35_large_mmdit": ("sd35-large", "transformer."), "cascade_stage_c_3.6b": ("cascade", "prior."),
}  # fmt: skip


@pytest.mark.parametrize("file", MAPS)
def test_every_name_of_diffusers_means_the_rows_that_the_published_maps_say(file: str) -> None:
    name, prefix = MAPS[file]
    here = index(name)
    for theirs, ours in stored(f"maps/{file}__to_diffusers.json.gz")["map"].items():
        place = here.find(prefix + layer_of(theirs)[0], layer_of(theirs)[1])
        assert place is not None, theirs
        segments = (
            [(ours, 0, here.shape(place)[0])] if isinstance(ours, str) else [tuple(each) for each in ours]
        )
        assert {place.name} == {native for native, _, _ in segments}, theirs
        if len(segments) == 2:
            assert place.rolled == segments[0][1] > 0 == segments[1][1], theirs
        else:
            whole = (0, here.native[f"denoiser.{place.name}"][0])
            assert (place.rows or whole) == segments[0][1:] and not place.rolled, theirs


def test_thirds_of_a_stack_and_a_projection_that_is_turned() -> None:
    here = index("sdxl")
    layer = "lora_te2_text_model_encoder_layers_3_self_attn"
    for third, letter in enumerate("qkv"):
        for kind, name in ((WEIGHTS, "in_proj_weight"), (BIASES, "in_proj_bias")):
            place = here.find(f"{layer}_{letter}_proj", kind)
            wanted = f"transformer.resblocks.3.attn.{name}"
            assert place == Place("text_2", wanted, (1280 * third, 1280 * (third + 1)))
    assert here.find(f"{layer}_out_proj") == Place("text_2", "transformer.resblocks.3.attn.out_proj.weight")
    assert here.find("lora_te2_text_projection") == Place("text_2", "text_projection", turned=True)


def test_swapped_halves() -> None:
    for name, layer, native, half in (
        ("flux", "transformer.norm_out.linear", "final_layer.adaLN_modulation.1.weight", 3072),
        ("sd3", "transformer.norm_out.linear", "final_layer.adaLN_modulation.1.weight", 1536),
        ("sd3", "transformer.transformer_blocks.23.norm1_context.linear",
         "joint_blocks.23.context_block.adaLN_modulation.1.weight", 1536),
    ):  # fmt: skip
        assert index(name).find(layer) == Place("denoiser", native, rolled=half)
        published = "lora_unet_" + native.removesuffix(".weight").replace(".", "_")
        assert index(name).find(published) == Place("denoiser", native)


@pytest.mark.parametrize("key", TINY)
def test_no_name_means_two_tensors(key: str) -> None:
    here = Index(model(key).family, shapes(natives(key)))
    for paths in here.paths.values():
        seen: dict[tuple[str, str], str] = {}
        for table in (paths.native, paths.old, paths.diffusers):
            for name, place in table.items():
                layer, kind = layer_of(name)
                flat = layer.replace(".", "_"), kind
                assert seen.setdefault(flat, place.name) == place.name, name


def test_towers_by_every_number() -> None:
    q = "encoder_block_0_layer_0_SelfAttention_q"
    for prefix in ("lora_te2_", "lora_te3_"):  # OneTrainer's, kohya's
        place = index("flux").find(prefix + q)
        assert place == Place("text_2", "encoder.block.0.layer.0.SelfAttention.q.weight")
    clip = "text_model.encoder.layers.0.mlp.fc1"
    for name, layer, part in (
        ("sd1", f"text_encoder.{clip}", "text"),
        ("sd1", f"base_model.model.{clip}", "text"),
        ("sd1", f"text_encoder.{clip.removeprefix('text_model.')}", "text"),  # as transformers 5 names it
        ("sd1", f"cond_stage_model.transformer.{clip}", "text"),
        ("flux", f"text_encoders.clip_l.transformer.{clip}", "text"),
        ("sdxl", f"text_encoder_2.{clip}", "text_2"),
        ("sdxl-refiner", f"lora_te2_{clip.replace('.', '_')}", "text_2"),
    ):
        place = index(name).find(layer)
        assert place is not None and place.part == part, layer
    assert (
        index("sdxl").find(f"base_model.model.{clip}") is None
    )  # one of two towers, and it does not say which
    assert index("sd1").find(f"text_encoder_2.{clip}") is None


@pytest.mark.parametrize(
    ("name", "layer", "factor", "spelling"),
    [
        ("lora_unet_a.lora_down.weight", "lora_unet_a", "lora_down.weight", "kohya"),
        ("lora_unet_a.alpha", "lora_unet_a", "alpha", ""),
        ("lora_unet_a.hada_w1_a", "lora_unet_a", "hada_w1_a", "kohya"),
        ("lora_unet_a.a1.weight", "lora_unet_a", "a1.weight", "kohya"),
        ("lora_unet_a.weight", "lora_unet_a", "weight", "kohya"),
        ("diffusion_model.a.b.lora_up.weight", "diffusion_model.a.b", "lora_up.weight", "dotted"),
        ("unet.a.b.lora_A.weight", "unet.a.b", "lora_down.weight", "peft"),
        ("unet.a.b.lora_B.default.weight", "unet.a.b", "lora_up.weight", "peft"),
        ("unet.a.b.lora_magnitude_vector", "unet.a.b", "magnitude", "peft"),
        ("unet.a.b.lora.up.weight", "unet.a.b", "lora_up.weight", "diffusers"),
        ("text_encoder.a.lora_linear_layer.down.weight", "text_encoder.a", "lora_down.weight", "diffusers"),
        ("a.attn1.processor.to_out_lora.up.weight", "a.attn1.to_out", "lora_up.weight", "processor"),
        ("text_encoder.a.self_attn.to_q_lora.down.weight", "text_encoder.a.self_attn.to_q", "lora_down.weight",
         "processor"),
        ("double_blocks.3.processor.qkv_lora2.down.weight", "double_blocks.3.qkv2", "lora_down.weight", "xlabs"),
        ("single_blocks.3.processor.proj_lora.up.weight", "single_blocks.3.proj", "lora_up.weight", "xlabs"),
        ("img_in.lora_B.bias", "img_in", "lora_B.bias", "bfl"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_attn.norm.query_norm", "set_weight",
         "bfl"),
        ("weights.12.lora_up", "weights.12", "lora_up.weight", "cascade"),
    ],
)  # fmt: skip
def test_names_are_cut_into_layer_and_factor(name: str, layer: str, factor: str, spelling: str) -> None:
    piece = cut(name)
    assert piece is not None and (piece.layer, piece.factor, piece.spelling) == (layer, factor, spelling)


def test_what_is_no_factor() -> None:
    for name in ("optimizer.step", "lora_unet_a", "lora_unet_a.scaling", ".alpha", "epoch"):
        assert cut(name) is None, name
