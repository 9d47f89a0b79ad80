"""Adapters are known by their names, in every spelling; what they say of themselves; and what is none."""

from __future__ import annotations

import gzip
import json
from functools import cache

import pytest
import torch
from tests.nets.inventories import KEYS, inventory

from sumuk.families.adapters import read_lora
from sumuk.families.detect import Match, Unknown, detect
from sumuk.files.tensors import Lazy, Shape, Tensors

RANK = 8


def never() -> torch.Tensor:
    raise AssertionError("only names and shapes are looked at")


def header(shapes: dict[str, Shape]) -> Tensors:
    return {name: Lazy(shape, "F16", never) for name, shape in shapes.items()}


@cache
def published() -> dict[str, dict[str, tuple[str, list[int]]]]:
    path = KEYS / "lora_kohya_names.json.gz"
    if not path.exists():
        pytest.skip("the names of published LoRAs are not here")
    models: dict[str, dict[str, tuple[str, list[int]]]] = json.loads(gzip.decompress(path.read_bytes()))[
        "models"
    ]
    return models


def kohya(model: str, only: str = "") -> dict[str, Shape]:
    """A LoRA as kohya's scripts write it: down, up and alpha for each layer."""
    made: dict[str, Shape] = {}
    for layer, (_, (rows, columns, *kernel)) in published()[model].items():
        if only in layer:
            made[f"{layer}.lora_down.weight"] = (RANK, columns, *kernel)
            made[f"{layer}.lora_up.weight"] = (rows, RANK, *(1 for _ in kernel))
            made[f"{layer}.alpha"] = ()
    return made


def respelt(
    shapes: dict[str, Shape], prefix: str, down: str, up: str, original: bool = False
) -> dict[str, Shape]:
    """The same factors on dotted names, as PEFT and diffusers have them."""
    made: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            rows, columns = shape
            made[f"{prefix}{layer}.{down}.weight"] = (RANK, columns)
            made[f"{prefix}{layer}.{up}.weight"] = (rows, RANK)
    return made


def matched(shapes: dict[str, Shape], kind: str, layout: str) -> dict[str, str]:
    """Of exactly this kind; and what it tells."""
    answer = detect(header(shapes))
    assert isinstance(answer, Match), answer.why
    assert (answer.family.key, answer.arrangement.name) == (kind, layout)
    assert not answer.moved.unknown and answer.family.tells is not None and answer.family.parts == ()
    return dict(answer.family.tells({name: one.shape for name, one in answer.moved.tensors.items()}))


KOHYA = {
    ("sd15_unet",): "sd1", ("sd15_unet", "sd15_te"): "sd1", ("sd15_te",): "sd1",
    ("sd2_unet",): "sd2", ("sd2_unet", "sd2_te"): "sd2", ("sd2_te",): "sd2",
    ("sdxl_unet",): "sdxl", ("sdxl_unet", "sdxl_te1", "sdxl_te2"): "sdxl", ("sdxl_te1", "sdxl_te2"): "sdxl",
    ("flux",): "flux", ("flux", "flux_te1"): "flux", ("flux", "flux_te1", "flux_te3_t5"): "flux",
    ("sd3_medium",): "sd3", ("sd35_medium",): "sd3", ("sd35_large", "sdxl_te1", "sdxl_te2", "flux_te3_t5"): "sd3",
}  # fmt: skip


@pytest.mark.parametrize("models", KOHYA, ids="+".join)
def test_kohyas_names_for_every_model(models: tuple[str, ...]) -> None:
    made = {name: shape for model in models for name, shape in kohya(model).items()}
    said = matched(made, f"lora/{KOHYA[models]}", "kohya")
    assert said["method"] == "LoRA" and said["rank"] == str(RANK)
    assert sum(int(part.split()[0]) for part in said["layers"].split(", ")) == len(made) // 3


def test_attention_to_itself_does_not_tell_version_one_from_two() -> None:
    for model in ("sd15_unet", "sd2_unet"):
        assert matched(kohya(model, "attn1"), "lora/sd", "kohya")["layers"] == "64 of the denoiser"
    both = kohya("sd2_unet", "attn1") | kohya("sd2_te")
    assert matched(both, "lora/sd2", "kohya")["layers"] == "64 of the denoiser, 138 of the text tower"
    matched(kohya("sdxl_unet", "attn1"), "lora/sdxl", "kohya")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd15_unet.diffusers", "sd1"), ("sd21_unet.diffusers", "sd2"), ("sdxl_base_unet.diffusers", "sdxl"),
        ("flux1_dev.diffusers", "flux"), ("sd3_medium.diffusers", "sd3"), ("sd35_large.diffusers", "sd3"),
    ],
)  # fmt: skip
def test_peft_and_diffusers_names(name: str, kind: str) -> None:
    net = inventory(name)
    prefix = "unet." if "unet" in name else "transformer."
    matched(respelt(net, prefix, "lora_A", "lora_B"), f"lora/{kind}", "peft")
    matched(respelt(net, prefix, "lora_A.default", "lora_B.default"), f"lora/{kind}", "peft")
    matched(respelt(net, "base_model.model.", "lora_A", "lora_B"), f"lora/{kind}", "peft")
    matched(respelt(net, prefix, "lora.down", "lora.up"), f"lora/{kind}", "diffusers")


def test_original_names_below_diffusion_model() -> None:
    for name, kind in (
        ("flux1_dev", "flux"),
        ("sd15_unet", "sd1"),
        ("sdxl_base_unet", "sdxl"),
        ("sd3_medium_mmdit", "sd3"),
    ):
        matched(respelt(inventory(name), "diffusion_model.", "lora_A", "lora_B"), f"lora/{kind}", "peft")


def test_text_towers_in_diffusers_names() -> None:
    for name, prefix, factors, kind, layout in (
        (
            "clip_l",
            "text_encoder.",
            ("lora_linear_layer.down", "lora_linear_layer.up"),
            "lora/sd1",
            "diffusers",
        ),
        ("clip_g", "text_encoder_2.", ("lora_A", "lora_B"), "lora/sdxl", "peft"),
    ):
        tower = {n: shape for n, shape in inventory(f"{name}.diffusers").items() if "_proj." in n}
        said = matched(respelt(tower, prefix, *factors), kind, layout)
        assert said["layers"].endswith("text tower")


def test_the_first_names_of_diffusers() -> None:
    made: dict[str, Shape] = {}
    for name, (rows, columns, *_) in (
        (n, s) for n, s in inventory("sd15_unet.diffusers").items() if len(s) == 2
    ):
        attention, _, which = name.removesuffix(".weight").partition(".to_")
        if which and "attn" in attention:
            place = f"{attention}.processor.to_{which.removesuffix('.0')}_lora"
            made[f"{place}.down.weight"] = (4, columns)
            made[f"{place}.up.weight"] = (rows, 4)
    matched(made, "lora/sd1", "processor")
    matched({f"unet.{name}": shape for name, shape in made.items()}, "lora/sd1", "processor")


def test_xlabs_and_black_forest_labs() -> None:
    flux = inventory("flux1_dev")
    xlabs: dict[str, Shape] = {}
    for i in range(19):
        for which, columns, rows in (("qkv", 3072, 9216), ("proj", 3072, 3072)):
            for stream in (1, 2):
                place = f"double_blocks.{i}.processor.{which}_lora{stream}"
                xlabs[f"{place}.down.weight"] = (16, columns)
                xlabs[f"{place}.up.weight"] = (rows, 16)
    assert matched(xlabs, "lora/flux", "xlabs")["layers"] == "38 of the denoiser"
    bfl = respelt(flux, "", "lora_A", "lora_B")
    bfl |= {n.replace("weight", "lora_B.bias"): s[:1] for n, s in flux.items() if n.endswith("weight")}
    bfl |= {name: shape for name, shape in flux.items() if name.endswith("_norm.scale")}
    matched(bfl, "lora/flux", "bfl")


def test_cascades_own() -> None:
    said = matched(inventory("cascade_lora_3.6b_rank4"), "lora/cascade", "cascade")
    assert (said["rank"], said["layers"]) == ("4", "128 of the denoiser")
    made = {f"lora_prior_unet_down_blocks_0_{i}_attention.{part}.weight": (4, 4) for i in range(3) for part in
            ("lora_down", "lora_up")}  # fmt: skip
    matched(made, "lora/cascade", "kohya")


def test_lycoris() -> None:
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    loha = {
        f"{layer}.hada_w{i}_{half}": (RANK, 768) if half == "b" else (640, RANK)
        for i in (1, 2)
        for half in "ab"
    }
    said = matched({**loha, f"{layer}.alpha": ()}, "lora/sd1", "kohya")
    assert (said["method"], said["rank"]) == ("LoHa", str(RANK))
    lokr = {
        f"{layer}.lokr_w1": (8, 8),
        f"{layer}.lokr_w2_a": (80, 4),
        f"{layer}.lokr_w2_b": (4, 96),
        f"{layer}.alpha": (),
    }
    said = matched(lokr | kohya("sd15_te"), "lora/sd1", "kohya")
    assert (said["method"], said["rank"]) == ("LoRA and LoKr", "4 to 8")
    dora = {
        f"{layer}.lora_down.weight": (4, 768),
        f"{layer}.lora_up.weight": (640, 4),
        f"{layer}.dora_scale": (640, 1),
    }
    assert matched(dora, "lora/sd1", "kohya")["method"] == "LoRA and DoRA"
    assert matched({f"{layer}.diff": (640, 768)}, "lora/sd1", "kohya")["method"] == "whole differences"


def test_embeddings_that_came_with_it() -> None:
    bundled = {"bundle_emb.fox.string_to_param.*": (2, 768), "bundle_emb.cat.clip_l": (2, 768)}
    assert matched(kohya("sd15_unet") | bundled, "lora/sd1", "kohya")["embeddings"] == "cat, fox"


def test_half_a_pair_is_refused_by_name() -> None:
    flux = inventory("flux1_dev.diffusers")
    for lost, shapes in (
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", kohya("sd15_unet")),
        ("transformer.proj_out.lora_A.weight", respelt(flux, "transformer.", "lora_A", "lora_B")),
        ("weights.7.lora_down", inventory("cascade_lora_3.6b_rank4")),
    ):  # fmt: skip
        answer = detect(header({name: shape for name, shape in shapes.items() if name != lost}))
        assert isinstance(answer, Unknown) and repr(lost) in answer.why


def test_another_models_lora_says_so() -> None:
    for names in (
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
         "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
         "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"),
    ):  # fmt: skip
        answer = detect(header(dict.fromkeys(names, (4, 4))))
        assert isinstance(answer, Unknown) and "LoRA for a model that is not among" in answer.why


def test_whole_networks_are_no_lora() -> None:
    for name in ("sd15_unet.diffusers", "flux1_dev", "controlnet_sd15"):
        assert read_lora({f"peft.{key}": shape for key, shape in inventory(name).items()}) is None


def test_textual_inversions() -> None:
    for shapes, kind, layout, said in (
        ({"emb_params": (8, 768)}, "sd1", "a1111", {"vectors": "8"}),
        ({"emb_params": (3, 1024)}, "sd2", "a1111", {"vectors": "3"}),
        ({"emb_params": (3, 192)}, "other", "a1111", {"vectors": "3"}),
        ({"string_to_param.*": (2, 768)}, "sd1", "a1111", {"vectors": "2"}),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl", "towers", {"vectors": "2"}),
        ({"clip_l": (1, 768), "clip_g": (1, 1280), "t5xxl": (1, 4096)}, "sd3", "towers", {"vectors": "1"}),
        ({"<fox>": (768,)}, "sd1", "token", {"vectors": "1", "token": "<fox>"}),
        ({"my-cat": (4, 1024)}, "sd2", "token", {"vectors": "4", "token": "my-cat"}),
    ):
        assert matched(shapes, f"textual-inversion/{kind}", layout) == said  # type: ignore[arg-type]


def test_what_is_no_textual_inversion() -> None:
    for shapes in (
        {"weight": (4, 768)}, {"<fox>": (4, 100)}, {"a.b": (4, 768)}, {"emb_params": (49408, 768)},
        {"<fox>": (2, 768, 1)}, {"<fox>": (768,), "<cat>": (768,)},
    ):  # fmt: skip
        assert isinstance(detect(header(shapes)), Unknown), shapes  # type: ignore[arg-type]


def test_hypernetworks_made_flat() -> None:
    for widths, kind in (((320, 640, 768, 1280), "sd1"), ((320, 640, 1024, 1280), "sd2")):
        made: dict[str, Shape] = {}
        for width in widths:
            for side in (0, 1):
                for i, (rows, columns) in enumerate(((2 * width, width), (width, 2 * width))):
                    made |= {
                        f"{width}.{side}.linear.{i}.weight": (rows, columns),
                        f"{width}.{side}.linear.{i}.bias": (rows,),
                    }
        said = matched(made, f"hypernetwork/{kind}", "a1111")
        assert said["widths"] == ", ".join(map(str, widths))
    assert isinstance(detect(header({"5.0.linear.0.weight": (5, 5)})), Unknown)
