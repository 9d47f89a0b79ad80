"""LoRA files of every layout change the native weights as their own arithmetic says; what does not fit is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.nets.inventories import inventory
from tests.weights.lora_files import (
    ALPHA,
    KEYS,
    RANK,
    SPELLINGS,
    applied,
    as_diffusers,
    as_native,
    bfl,
    distance,
    make,
    model,
    natives,
    product,
    random_pair,
    save,
    shapes,
)
from torch import Tensor

from sumuk.base.errors import BadFile
from sumuk.weights import lora
from sumuk.weights.lora import Lora, read_lora

EXACT = 3e-7
"""Products are worked out in the same order, but for transposed ones; measured: 0."""


def read(path: Path, key: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Lora:
    return read_lora(
        save(path / "lora.safetensors", tensors, metadata), model(key).family, shapes(natives(key))
    )


def whole(made: Lora) -> Lora:
    assert not made.unmatched and not made.misshapen
    return made


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("key", KEYS)
def test_every_spelling_for_every_family(tmp_path: Path, key: str, name: str) -> None:
    file, expected = make(key, SPELLINGS[name])
    made = whole(read(tmp_path, key, file))
    assert (made.method, made.layout) == ("LoRA", SPELLINGS[name].layout)
    assert len(made.patches) == sum(tensor.endswith(SPELLINGS[name].down) for tensor in file)
    got = applied(natives(key), made.patches)
    assert distance(got, expected) <= EXACT
    assert distance(got, natives(key)) > 0.01


def test_the_first_diffusers(tmp_path: Path) -> None:
    key = "sd1/text-to-image"
    named = as_diffusers(key, natives(key))
    file: dict[str, Tensor] = {}
    tower = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    changed = dict(named)
    for name, weight in named.items():
        folder, _, path = name.removesuffix(".weight").partition("/")
        place, _, inner = path.removesuffix(".0").rpartition(".")
        if not name.endswith("weight") or (
            not inner.startswith("to_") and (folder, inner in tower) != ("text_encoder", True)
        ):
            continue
        down, up = random_pair(weight)
        layer = f"unet.{place}.processor.{inner}" if folder == "unet" else f"{folder}.{place}.{tower[inner]}"
        file |= {f"{layer}_lora.down.weight": down, f"{layer}_lora.up.weight": up}
        changed[name] = weight + product(down, up, weight.shape)
    assert len(file) == 2 * (4 * 8 + 3 * 4)
    made = whole(read(tmp_path, key, file))
    assert made.layout == "processor"
    assert distance(applied(natives(key), made.patches), natives(key) | as_native(key, changed)) <= EXACT


def test_xlabs(tmp_path: Path) -> None:
    key, own = "flux/dev", natives("flux/dev")
    file: dict[str, Tensor] = {}
    expected = dict(own)
    for layer, native, rows in (
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv", 192),
        ("double_blocks.0.processor.proj_lora1", "double_blocks.0.img_attn.proj", 64),
        ("double_blocks.0.processor.qkv_lora2", "double_blocks.0.txt_attn.qkv", 192),
        ("double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", 64),
        ("single_blocks.1.processor.qkv_lora", "single_blocks.1.linear1", 192),
        ("single_blocks.1.processor.proj_lora", "single_blocks.1.linear2", 64),
    ):
        weight = own[f"denoiser.{native}.weight"]
        down, up = random_pair(weight[:rows])
        file |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
        changed = weight.clone()
        changed[:rows] += up @ down
        expected[f"denoiser.{native}.weight"] = changed
    made = whole(read(tmp_path, key, file))
    assert made.layout == "xlabs"
    assert distance(applied(own, made.patches), expected) <= EXACT


def test_black_forest_labs_control_lora(tmp_path: Path) -> None:
    file, expected = bfl(natives("flux/control"))
    made = whole(read(tmp_path, "flux/control", file))
    assert made.layout == "bfl"
    # A norm is replaced by W + (N - W), which is N but for a rounding.
    assert distance(applied(natives("flux/control"), made.patches), expected) <= EXACT


def test_a_control_lora_says_that_it_needs_a_wider_model(tmp_path: Path) -> None:
    file, _ = bfl(natives("flux/dev"), width=128)
    made = read(tmp_path, "flux/dev", file)
    assert not made.unmatched
    assert len(made.misshapen) == 1 and "reads 128 numbers a token" in made.misshapen[0]
    assert made.misshapen[0].endswith("which it makes of FLUX.1 dev by: sumuk lora bake")
    native = shapes(natives("flux/dev")) | {"denoiser.img_in.weight": (64, 128)}
    assert not read_lora(made.path, model("flux/dev").family, native).misshapen


def test_stable_cascades_own(tmp_path: Path) -> None:
    key, own = "cascade/stage-c", natives("cascade/stage-c")
    order = [
        f"{side}_blocks.{level}.2.attention.attn.{which}"
        for side in ("down", "up")
        for level in (0, 1)
        for which in ("out_proj.weight", "in_proj_weight")
    ]
    file = {"embeddings.embeddings": torch.randn(2, 64), "embeddings.indices": torch.tensor([7, 300])}
    table = own["text.text_model.embeddings.token_embedding.weight"].clone()
    table[[7, 300]] += file["embeddings.embeddings"]
    expected = own | {"text.text_model.embeddings.token_embedding.weight": table}
    for i, name in enumerate(order):
        down, up = random_pair(own[f"denoiser.{name}"])
        file |= {f"weights.{i}.lora_down": down, f"weights.{i}.lora_up": up}
        expected[f"denoiser.{name}"] = own[f"denoiser.{name}"] + up @ down / RANK
    made = whole(read(tmp_path, key, file))
    assert made.layout == "cascade"
    assert distance(applied(own, made.patches), expected) <= EXACT
    added = read(tmp_path, key, file | {"embeddings.indices": torch.tensor([7, 520])})
    assert (
        len(added.misshapen) == 1
        and "changes word 520, which the table of 520 does not have" in added.misshapen[0]
    )
    fewer = {name: one for name, one in file.items() if not name.startswith("weights.7.")}
    with pytest.raises(BadFile, match="names its 7 layers by number only") as raised:
        read(tmp_path, key, fewer)
    assert raised.value.code == "lora.numbered"


def test_the_published_order_of_cascades_layers(tmp_path: Path) -> None:
    wanted = inventory("cascade_lora_3.6b_rank4")
    native = {f"denoiser.{name}": shape for name, shape in inventory("cascade_stage_c_3.6b").items()}
    zeros = {
        name: torch.zeros(shape, dtype=torch.float16) for name, shape in wanted.items() if "weights" in name
    }
    made = whole(read_lora(save(tmp_path / "c.safetensors", zeros), model("cascade/stage-c").family, native))
    assert len(made.patches) == 128
    by_number = {int(patch.source.partition(".")[2]): patch.name for patch in made.patches}
    assert by_number[0] == "down_blocks.0.2.attention.attn.out_proj.weight"
    assert by_number[1] == "down_blocks.0.2.attention.attn.in_proj_weight"
    assert by_number[2] == "down_blocks.0.5.attention.attn.out_proj.weight"
    assert by_number[127] == "up_blocks.1.23.attention.attn.in_proj_weight"


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
NATIVE_Q = "denoiser.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def test_other_methods_beside_biases_and_norms(tmp_path: Path) -> None:
    key, own = "sd1/text-to-image", natives("sd1/text-to-image")
    at = "denoiser.input_blocks.1.1"
    a1, b1, a2, b2 = torch.randn(32, 2), torch.randn(2, 32), torch.randn(32, 2), torch.randn(2, 32)
    loha = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    w1, w2 = torch.randn(4, 4), torch.randn(8, 8)
    norm = {"w_norm": torch.randn(32), "b_norm": torch.randn(32)}
    full = {"diff": torch.randn(32, 32), "diff_b": torch.randn(32)}
    base = Q.removesuffix("_attn1_to_q")
    file = {f"{Q}.{name}": one for name, one in loha.items()} | {f"{Q}.alpha": torch.tensor(1.0)}
    file |= {f"{base}_attn1_to_k.lokr_w1": w1, f"{base}_attn1_to_k.lokr_w2": w2}
    file |= {f"{base}_norm1.{name}": one for name, one in norm.items()}
    file |= {f"{base}_attn1_to_out_0.{name}": one for name, one in full.items()}
    block = f"{at}.transformer_blocks.0"
    added = {
        f"{block}.attn1.to_q.weight": (a1 @ b1) * (a2 @ b2) / 2,
        f"{block}.attn1.to_k.weight": torch.kron(w1, w2),
        f"{block}.norm1.weight": norm["w_norm"],
        f"{block}.norm1.bias": norm["b_norm"],
        f"{block}.attn1.to_out.0.weight": full["diff"],
        f"{block}.attn1.to_out.0.bias": full["diff_b"],
    }  # fmt: skip
    made = whole(read(tmp_path, key, file))
    assert {*made.method.split(" and ")} == {"LoHa", "LoKr", "norm", "full"}
    expected = own | {name: own[name] + one for name, one in added.items()}
    assert distance(applied(own, made.patches), expected) <= 1e-5


def test_dora_on_a_third_of_a_stack(tmp_path: Path) -> None:
    key, own = "flux/dev", natives("flux/dev")
    name = "denoiser.double_blocks.0.img_attn.qkv.weight"
    k = own[name][64:128]
    down, up = random_pair(k)
    lengths = torch.rand(64) + 0.5
    layer = "transformer.transformer_blocks.0.attn.to_k"
    made = whole(
        read(tmp_path, key, {
            f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.lora_magnitude_vector": lengths,
        })
    )  # fmt: skip
    assert [(patch.rows, patch.change.method) for patch in made.patches] == [((64, 128), "DoRA")]
    changed = k + up @ down
    expected = own[name].clone()
    expected[64:128] = changed * (lengths / changed.norm(dim=1))[:, None]
    assert distance(applied(own, made.patches), own | {name: expected}) <= 1e-6


def test_layers_and_kernels_of_one_written_either_way(tmp_path: Path) -> None:
    for key, flat in (("sd1/text-to-image", True), ("sd2/text-to-image", False)):
        name = "denoiser.input_blocks.1.1.proj_in.weight"
        weight = natives(key)[name]
        down, up = random_pair(weight.flatten(1))
        delta = (up @ down).reshape(weight.shape)
        if not flat:
            down, up = down[..., None, None], up[..., None, None]
        layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
        made = whole(read(tmp_path, key, {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}))
        assert distance(applied(natives(key), made.patches), natives(key) | {name: weight + delta}) <= EXACT


# -- alpha of PEFT -------------------------------------------------------------------------------------------------

PEFT_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def scale(made: Lora, index: int = 0) -> float:
    low = made.patches[index].change.low_rank()
    assert low is not None
    return low[2]


def peft(layer: str = PEFT_Q) -> dict[str, Tensor]:
    down, up = random_pair(natives("sd1/text-to-image")[NATIVE_Q])
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 5}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 3}}, 1.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"tn1.to_q": 3}}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^attn1.to_q": 3}}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{PEFT_Q.removeprefix('unet.')}": 3}}, 1.5),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_alpha_from_metadata(tmp_path: Path, said: dict[str, object], wanted: float) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(said)} if said else {}
    assert scale(read(tmp_path, "sd1/text-to-image", peft(), metadata)) == pytest.approx(wanted)


def test_alpha_from_a_configuration_beside_the_file(tmp_path: Path) -> None:
    file = save(
        tmp_path / "adapter_model.safetensors", peft("base_model.model." + PEFT_Q.removeprefix("unet."))
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": 2, "peft_type": "LORA"}))
    native = shapes(natives("sd1/text-to-image"))
    for path in (tmp_path, file):
        assert scale(read_lora(path, model("sd1/text-to-image").family, native)) == 3.0


@pytest.mark.parametrize(
    "said", ['{"unet.lora_alpha": "8"}', '{"unet.lora_alpha": NaN}', "[1]", "{", "[" * 100_000,
             '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"(a+)+$": 1}}',
             '{"unet.lora_alpha": 8, "unet.alpha_pattern": [1]}'],
)  # fmt: skip
def test_a_configuration_that_means_nothing(tmp_path: Path, said: str) -> None:
    with pytest.raises(BadFile) as raised:
        read(tmp_path, "sd1/text-to-image", peft(), {"lora_adapter_metadata": said})
    assert raised.value.code == "lora.config" and "\n" not in str(raised.value)


# -- embeddings ----------------------------------------------------------------------------------------------------


def test_embeddings_that_came_with_it(tmp_path: Path) -> None:
    rows = torch.randn(3, 64)
    more = {
        "bundle_emb.my.fox.string_to_param.*": rows,
        "bundle_emb.cat.clip_l": rows[0],
        "bundle_emb.odd.vae": rows,
    }
    made = read(tmp_path, "sd1/text-to-image", peft() | more)
    assert {name: [*towers] for name, towers in made.embeddings.items()} == {
        "my.fox": ["text"],
        "cat": ["text"],
    }
    assert torch.equal(made.embeddings["my.fox"]["text"], rows) and made.embeddings["cat"]["text"].shape == (
        1,
        64,
    )
    assert made.unmatched == ("bundle_emb.odd.vae",)
    narrow = read(tmp_path, "sd1/text-to-image", peft() | {"bundle_emb.fox.clip_l": torch.randn(3, 32)})
    assert not narrow.embeddings and narrow.misshapen == (
        "bundle_emb.fox.clip_l: [3, 32] for words of width 64",
    )
    three = {
        f"bundle_emb.fox.{tower}": torch.randn(2, width)
        for tower, width in (("clip_l", 64), ("clip_g", 64), ("t5xxl", 128))
    }
    assert read(tmp_path, "sd3/medium", three).embeddings["fox"].keys() == {"text", "text_2", "text_3"}


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    down, up = random_pair(natives("sd1/text-to-image")[NATIVE_Q])
    fits = {f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up}
    elsewhere = {f"lora_unet_double_blocks_0_img_attn_qkv.{name}": one for name, one in
                 (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(1.0)))}  # fmt: skip
    k = Q.replace("to_q", "to_k")
    wide = {f"{k}.lora_down.weight": torch.randn(2, 40), f"{k}.lora_up.weight": up}
    odd = {"step": torch.tensor(3), "lora_te_x.alpha": torch.tensor(1.0), "lora_unet_conv_in.weight": up}
    unbiased = {f"{Q}.diff_b": torch.randn(32)}
    made = read(tmp_path, "sd1/text-to-image", fits | elsewhere | wide | odd | unbiased)
    assert [patch.source for patch in made.patches] == [Q]
    assert {*made.unmatched} == {*elsewhere, *odd, *unbiased}
    (said,) = made.misshapen
    assert said.startswith(f"{k}: lora_down.weight is [2, 40], but a weight [32, 32] needs")


def refused(path: Path, key: str, tensors: dict[str, Tensor], code: str) -> str:
    with pytest.raises(BadFile) as raised:
        read(path, key, tensors)
    assert raised.value.code == code, raised.value
    assert "\n" not in str(raised.value) and "lora.safetensors" in str(raised.value)
    return str(raised.value)


def test_another_familys(tmp_path: Path) -> None:
    file, _ = make("flux/dev", SPELLINGS["kohya, published paths"])
    said = refused(tmp_path, "sd1/text-to-image", file, "lora.family")
    assert "none of its 26 layers fits Stable Diffusion 1.x" in said and "LoRA for FLUX.1" in said


def test_of_version_two_where_the_width_of_the_text_tells(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    file = {f"{layer}.lora_down.weight": torch.zeros(4, 1024), f"{layer}.lora_up.weight": torch.zeros(64, 4)}
    said = refused(tmp_path, "sd1/text-to-image", file, "lora.family")
    assert said.endswith("it is LoRA for Stable Diffusion 2.x")


def test_whole_models_and_other_files_are_no_lora(tmp_path: Path) -> None:
    own = {
        name.removeprefix("denoiser."): one
        for name, one in natives("flux/dev").items()
        if name.startswith("denoiser")
    }
    for file in (own, {f"model.diffusion_model.{name}": one for name, one in own.items()}):
        said = refused(tmp_path, "flux/dev", file, "lora.none")
        assert "is no LoRA; it is FLUX.1 [dev]" in said
    assert "not known here" in refused(tmp_path, "flux/dev", {"a": torch.zeros(2)}, "lora.none")


def test_absurdly_many_tensors_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "MOST_FACTORS", 1)
    assert "none has 2 tensors" in refused(tmp_path, "sd1/text-to-image", peft(), "lora.none")


def test_halves_and_doubles(tmp_path: Path) -> None:
    key, file = "sd1/text-to-image", peft()
    down, up = file.values()
    assert "without its lora_up.weight" in refused(
        tmp_path, key, {f"{Q}.lora_down.weight": down}, "lora.half"
    )
    assert repr(f"{PEFT_Q}.lora_B.weight") in refused(
        tmp_path, key, {f"{PEFT_Q}.lora_B.weight": up}, "lora.half"
    )
    twice = file | {f"{PEFT_Q}.lora_A.default.weight": down}
    assert "are the same factor" in refused(tmp_path, key, twice, "lora.twice")
    refused(tmp_path, "cascade/stage-c", {"embeddings.indices": torch.tensor([1]), **file}, "lora.half")


@pytest.mark.parametrize(("factor", "value", "code"), [
    ("alpha", torch.tensor(float("nan")), "lora.alpha"),
    ("alpha", torch.tensor([1.0, 2.0]), "lora.alpha"),
    ("hada_w1_a", torch.zeros(32, 2), "lora.half"),
    ("lokr_w1", torch.zeros(4, 4), "lora.method"),
])  # fmt: skip
def test_factors_that_mean_nothing(tmp_path: Path, factor: str, value: Tensor, code: str) -> None:
    down, up = peft().values()
    file = {f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up, f"{Q}.{factor}": value}
    assert Q in refused(tmp_path, "sd1/text-to-image", file, code)


def test_twice_alpha_is_twice_the_change(tmp_path: Path) -> None:
    file, _ = make("flux/dev", SPELLINGS["kohya"])
    once = read(tmp_path, "flux/dev", file)
    twice = read(
        tmp_path, "flux/dev", {n: one * 2 if n.endswith("alpha") else one for n, one in file.items()}
    )
    for index in range(len(once.patches)):
        assert scale(twice, index) == 2 * scale(once, index) == 2 * ALPHA / RANK
