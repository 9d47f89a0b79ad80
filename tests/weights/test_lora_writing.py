"""Written LoRAs: read back they change the same, other tools read them as meant, and nothing is left out silently."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.nets.inventories import KEYS as FACTS
from tests.nets.inventories import inventory
from tests.weights.lora_files import (
    ALPHA,
    KEYS,
    RANK,
    SPELLINGS,
    applied,
    as_diffusers,
    distance,
    make,
    model,
    natives,
    random_pair,
    save,
    shapes,
)
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.safetensors import read_header
from sumuk.weights.lora import Lora, read_lora
from sumuk.weights.lora_writing import write_lora

ROUNDED = 2e-7
"""alpha that went into a factor costs one rounding of numbers below 1; measured: 1.2e-7."""


def read(path: Path, key: str) -> Lora:
    return read_lora(path, model(key).family, shapes(natives(key)))


def converted(path: Path, key: str, file: dict[str, Tensor], layout: str, **more: Any) -> Lora:
    """Written in one layout, read, written in another, and read."""
    before = read(save(path / "before.safetensors", file), key)
    after = path / "after.safetensors"
    more = {"embeddings": before.embeddings} | more
    write_lora(
        after, before.patches, layout, model(key).family, shapes(natives(key)), before.metadata, **more
    )
    return read(after, key)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("spelling", ["kohya", "kohya, published paths", "PEFT with alpha"])
@pytest.mark.parametrize("key", KEYS)
def test_what_is_converted_changes_the_same(tmp_path: Path, key: str, spelling: str, layout: str) -> None:
    file, expected = make(key, SPELLINGS[spelling])
    after = converted(tmp_path, key, file, layout)
    assert after.layout == layout and not after.unmatched and not after.misshapen
    assert distance(applied(natives(key), after.patches), expected) <= ROUNDED


def test_there_and_back_is_the_same_file(tmp_path: Path) -> None:
    key = "sdxl/base"
    file, _ = make(key, SPELLINGS["kohya, published paths"])
    converted(tmp_path, key, file, "kohya")
    again = load_file(tmp_path / "after.safetensors")
    assert again.keys() == file.keys() and all(torch.equal(again[name], file[name]) for name in file)


PUBLISHED = {
    "sd15_unet": ("sd1/text-to-image", "denoiser"), "sd15_te": ("sd1/text-to-image", "text"),
    "sd2_unet": ("sd2/text-to-image", "denoiser"), "sd2_te": ("sd2/text-to-image", "text"),
    "sdxl_unet": ("sdxl/base", "denoiser"), "sdxl_te1": ("sdxl/base", "text"), "sdxl_te2": ("sdxl/base", "text_2"),
    "flux": ("flux/dev", "denoiser"), "flux_te3_t5": ("flux/dev", "text_2"), "sd3_medium": ("sd3/medium", "denoiser"),
}  # fmt: skip
NETWORKS = {
    "sd15_unet": "sd15_unet", "sd15_te": "sd15_clip_l", "sd2_unet": "sd2_unet", "sd2_te": "sd2_openclip_h",
    "sdxl_unet": "sdxl_base_unet", "sdxl_te1": "sd15_clip_l", "sdxl_te2": "sdxl_base_openclip_g", "flux": "flux1_dev",
    "flux_te3_t5": "t5_xxl_encoder", "sd3_medium": "sd3_medium_mmdit",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_written_as_they_were(tmp_path: Path, name: str) -> None:
    if not (FACTS / "lora_kohya_names.json.gz").exists():
        pytest.skip("the names of published LoRAs are not here")
    key, part = PUBLISHED[name]
    names = json.loads(gzip.decompress((FACTS / "lora_kohya_names.json.gz").read_bytes()))["models"][name]
    native = {f"{part}.{tensor}": shape for tensor, shape in inventory(NETWORKS[name]).items()}
    file: dict[str, Tensor] = {}
    for layer, (_, (rows, columns, *kernel)) in names.items():
        up = torch.ones(rows, 1, *(1 for _ in kernel), dtype=torch.float16)
        file |= {f"{layer}.lora_down.weight": up.new_ones(1, columns, *kernel), f"{layer}.lora_up.weight": up}
        file[f"{layer}.alpha"] = torch.tensor(1.0)
    family = model(key).family
    lora = read_lora(save(tmp_path / "before.safetensors", file), family, native)
    assert (
        not lora.unmatched
        and not lora.misshapen
        and len({patch.source for patch in lora.patches}) == len(names)
    )
    write_lora(tmp_path / "after.safetensors", lora.patches, "kohya", family, native)
    after = read_header(tmp_path / "after.safetensors").tensors
    if name == "sd2_te":  # OpenCLIP's projection and last block are no part of it, and have no names
        assert "lora_te_text_model_encoder_layers_23_mlp_fc1.alpha" not in after
    # q, k and v of OpenCLIP's towers lie in one tensor here, and are written apart.
    assert {n: info.shape for n, info in after.items()} == {n: tuple(one.shape) for n, one in file.items()}


# -- stacks --------------------------------------------------------------------------------------------------------


def qkv(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    file: dict[str, Tensor] = {}
    for i, which in enumerate(("to_q", "to_v")):
        down, up = random_pair(torch.zeros(64, 64), rank=2 + i)
        layer = f"transformer.transformer_blocks.0.attn.{which}"
        file |= {f"{layer}.lora_A.weight": down.to(dtype), f"{layer}.lora_B.weight": up.to(dtype)}
        file[f"{layer}.alpha"] = torch.tensor(4.0)
    return file


def test_thirds_become_a_stack_in_blocks_and_thirds_again(tmp_path: Path) -> None:
    key, file = "flux/dev", qkv()
    stack = converted(tmp_path, key, file, "kohya")
    tensors = load_file(tmp_path / "after.safetensors")
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    assert {n: tuple(one.shape) for n, one in tensors.items()} == {
        f"{layer}.lora_down.weight": (5, 64), f"{layer}.lora_up.weight": (192, 5), f"{layer}.alpha": (),
    }  # fmt: skip
    assert not tensors[f"{layer}.lora_up.weight"][64:128].any()  # k
    again = converted(tmp_path, key, tensors, "peft")
    assert [(patch.source.rpartition(".")[2], patch.rows) for patch in again.patches] == [
        ("to_q", (0, 64)), ("to_v", (128, 192)),
    ]  # fmt: skip
    back = load_file(tmp_path / "after.safetensors")
    assert {n: one.shape for n, one in back.items()} == {
        n: one.shape for n, one in file.items() if "alpha" not in n
    }
    first = applied(natives(key), read(save(tmp_path / "first.safetensors", file), key).patches)
    for lora in (stack, again):
        assert distance(applied(natives(key), lora.patches), first) <= ROUNDED


def test_the_type_of_the_numbers_stays(tmp_path: Path) -> None:
    for layout in ("kohya", "peft"):
        converted(tmp_path, "flux/dev", qkv(torch.bfloat16), layout)
        found = load_file(tmp_path / "after.safetensors")
        assert {one.dtype for name, one in found.items() if not name.endswith("alpha")} == {torch.bfloat16}


def test_methods_without_rows_are_not_cut(tmp_path: Path) -> None:
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    lokr = {f"{layer}.lokr_w1": torch.randn(3, 4), f"{layer}.lokr_w2": torch.randn(64, 16)}
    with pytest.raises(BadFile, match="cannot be cut into the rows"):
        converted(tmp_path, "flux/dev", lokr, "peft")
    kept = converted(tmp_path, "flux/dev", lokr, "kohya")
    assert kept.method == "LoKr" and kept.metadata["ss_network_module"] == "lycoris.kohya"
    block = "transformer.transformer_blocks.0.attn"
    halves = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(16, 16)}
    thirds = {f"{block}.{which}.{name}": one for which in ("to_q", "to_k") for name, one in halves.items()}
    with pytest.raises(BadInput, match="LoKr of parts of a weight cannot be written as one layer's"):
        converted(tmp_path, "flux/dev", thirds, "kohya")


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def test_every_method_stays_in_kohyas_layout(tmp_path: Path) -> None:
    pair = random_pair(torch.zeros(32, 32))
    tucker = {"lora_down.weight": torch.randn(2, 32, 1, 1), "lora_up.weight": torch.randn(32, 2, 1, 1),
              "lora_mid.weight": torch.randn(2, 2, 3, 3), "alpha": torch.tensor(1.0)}  # fmt: skip
    norm = "lora_unet_down_blocks_0_attentions_0_norm"
    file = {
        f"{Q}.lora_down.weight": pair[0],
        f"{Q}.lora_up.weight": pair[1],
        f"{Q}.dora_scale": torch.rand(32, 1),
    }
    file |= {f"{CONV}.{name}": one for name, one in tucker.items()}
    file |= {f"{norm}.w_norm": torch.randn(32), f"{norm}.b_norm": torch.randn(32)}
    file |= {f"{CONV.replace('conv1', 'conv2')}.diff": torch.randn(32, 32, 3, 3)}
    file |= {f"{Q.replace('to_q', 'to_out_0')}.diff_b": torch.randn(32)}
    file |= {"bundle_emb.fox.string_to_param.*": torch.randn(2, 64)}
    after = converted(tmp_path, "sd1/text-to-image", file, "kohya")
    again = load_file(tmp_path / "after.safetensors")
    assert again.keys() == file.keys() and all(torch.equal(again[name], file[name]) for name in file)
    assert "fox" in after.embeddings and after.metadata["ss_network_dim"] == "2"
    assert after.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_what_peft_can_say(tmp_path: Path) -> None:
    key = "sd1/text-to-image"
    down, up = random_pair(torch.zeros(32, 32))
    out = Q.replace("to_q", "to_out_0")
    file = {f"{out}.lora_down.weight": down, f"{out}.lora_up.weight": up, f"{out}.alpha": torch.tensor(ALPHA)}
    file |= {f"{out}.diff_b": torch.randn(32), f"{out}.dora_scale": torch.rand(32, 1) + 0.5}
    file |= {f"{CONV}.lora_down.weight": torch.randn(2, 32, 1, 1), f"{CONV}.lora_up.weight": torch.randn(32, 2, 1, 1),
             f"{CONV}.lora_mid.weight": torch.randn(2, 2, 3, 3)}  # fmt: skip
    after = converted(tmp_path, key, file, "peft")
    names = {name.rpartition("lora_")[2] for name in load_file(tmp_path / "after.safetensors")}
    assert names == {"A.weight", "B.weight", "B.bias", "magnitude_vector"}
    before = read(tmp_path / "before.safetensors", key)
    a, b = (applied(natives(key), each.patches) for each in (before, after))
    assert distance(a, b) <= 5e-6


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({f"{Q}.diff": torch.zeros(32, 32)}, "diff have no place in PEFT's names"),
        ({f"{Q.replace('to_q', 'to_out_0')}.diff_b": torch.zeros(32)}, "diff_b have no place"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2": torch.ones(8, 8)}, "lokr_w1, lokr_w2 have no place"),
        ({f"{Q}.lora_down.weight": torch.ones(2, 32), f"{Q}.lora_up.weight": torch.ones(32, 2),
          f"{Q}.dora_scale": torch.ones(1, 32)}, "dora_scale goes over columns"),
        ({"bundle_emb.fox.clip_l": torch.zeros(2, 64)}, "no place for the embeddings fox"),
    ],
)  # fmt: skip
def test_what_peft_cannot_say_is_refused(tmp_path: Path, file: dict[str, Tensor], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        converted(tmp_path, "sd1/text-to-image", file, "peft")
    assert not (tmp_path / "after.safetensors").exists()


def test_what_has_no_name_is_refused(tmp_path: Path) -> None:
    own = shapes(natives("cascade/stage-c"))
    file = {"embeddings.embeddings": torch.randn(1, 64), "embeddings.indices": torch.tensor([3])}
    file |= {f"lora_prior_unet_clip_txt_mapper.{name}": one for name, one in
             (("lora_down.weight", torch.zeros(2, 64)), ("lora_up.weight", torch.zeros(64, 2)))}  # fmt: skip
    with pytest.raises(BadInput, match="single words"):
        converted(tmp_path, "cascade/stage-c", file, "kohya")
    family = model("cascade/stage-c").family
    with pytest.raises(BadInput, match="nothing to write"):
        write_lora(tmp_path / "x.safetensors", [], "kohya", family, own)
    with pytest.raises(BadInput, match="did you mean 'kohya'"):
        write_lora(tmp_path / "x.safetensors", [], "koyha", family, own)
    flux, _ = make("flux/dev", SPELLINGS["kohya, published paths"])
    lora = read(save(tmp_path / "flux.safetensors", flux), "flux/dev")
    with pytest.raises(BadInput, match="for which the layout has no name"):
        write_lora(tmp_path / "x.safetensors", lora.patches, "kohya", family, own)


def test_metadata(tmp_path: Path) -> None:
    file, _ = make("sdxl/base", SPELLINGS["kohya"])
    native, family = shapes(natives("sdxl/base")), model("sdxl/base").family
    lora = read(save(tmp_path / "a.safetensors", file), "sdxl/base")
    old = {"ss_output_name": "fox", "ss_network_dim": "64", "sshs_model_hash": "ab", "modelspec.title": "Fox"}
    write_lora(tmp_path / "b.safetensors", lora.patches, "kohya", family, native, old)
    said = read_header(tmp_path / "b.safetensors").metadata
    assert said["ss_network_module"] == "networks.lora" and said["ss_output_name"] == "fox"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == (str(RANK), f"{ALPHA:g}")
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.title"] == "Fox" and "sshs_model_hash" not in said


# -- the field's reader --------------------------------------------------------------------------------------------

CLASSES = {
    "sd1/text-to-image": "UNet2DConditionModel", "sd2/text-to-image": "UNet2DConditionModel",
    "sdxl/base": "UNet2DConditionModel", "sd3/medium": "SD3Transformer2DModel", "flux/dev": "FluxTransformer2DModel",
}  # fmt: skip


@pytest.mark.parametrize("key", CLASSES)
def test_diffusers_merges_a_peft_file_to_the_same_weights(tmp_path: Path, key: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    file, expected = make(key, SPELLINGS["kohya, published paths"])
    converted(tmp_path, key, file, "peft")
    part, folder = model(key).family.parts[0], "unet" if "UNet" in CLASSES[key] else "transformer"
    own = {
        name.removeprefix("denoiser."): one
        for name, one in natives(key).items()
        if name.startswith("denoiser.")
    }
    network = getattr(diffusers, CLASSES[key]).from_config(part.config(shapes(own)))
    network.load_state_dict(below(folder, as_diffusers(key, natives(key))))
    network.load_lora_adapter(load_file(tmp_path / "after.safetensors"), prefix=folder)
    network.fuse_lora()
    network.unload_lora()
    assert distance(network.state_dict(), below(folder, as_diffusers(key, expected))) <= ROUNDED


def below(folder: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{folder}/"): one for name, one in tensors.items() if name.startswith(f"{folder}/")
    }


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_diffusers_pipeline_reads_both_layouts(tmp_path: Path, layout: str) -> None:
    """U-Net's attention and text tower, which its reader of kohya's files knows."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    key = "sd1/text-to-image"
    file, _ = make(key, SPELLINGS["kohya"])
    file = {name: one for name, one in file.items() if "attn" in name}
    after = converted(tmp_path, key, file, layout)
    expected = as_diffusers(key, applied(natives(key), after.patches))
    named = as_diffusers(key, natives(key))
    parts = {part.name: part for part in model(key).family.parts}
    configs = {
        name: parts[name].config(shapes({n.removeprefix(f"{name}."): one for n, one in natives(key).items()
                                         if n.startswith(f"{name}.")}))
        for name in ("denoiser", "text")
    }  # fmt: skip
    unet = diffusers.UNet2DConditionModel.from_config(configs["denoiser"])
    unet.load_state_dict(below("unet", named))
    tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text"]))
    state = below("text_encoder", named)
    bare = "text_model.embeddings.token_embedding.weight" not in tower.state_dict()
    head = "text_model." if bare else ""  # transformers 5 leaves it out
    tower.load_state_dict({name.removeprefix(head): one for name, one in state.items()})
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=tower, tokenizer=None, unet=unet, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(str(tmp_path), weight_name="after.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert distance(unet.state_dict(), below("unet", expected)) <= ROUNDED
    wanted = {name.removeprefix(head): one for name, one in below("text_encoder", expected).items()}
    assert distance(tower.state_dict(), wanted) <= ROUNDED
