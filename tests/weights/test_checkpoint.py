"""Loading and saving: bit for bit through every layout, and everything that is wrong is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from examples import zoo
from safetensors.torch import load_file, save_file
from tiny import equal, tiny, weights

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.diffusion.schedule import (
    ContinuousVP,
    Schedule,
    VarianceExploding,
    scaled_linear,
    zero_terminal_snr,
)
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import from_header, lazy, write
from sumuk.generate.api import draw
from sumuk.weights.checkpoint import load, save
from sumuk.weights.inspect import open as look
from sumuk.weights.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def single(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save(model, path, metadata={"modelspec.license": "Apache-2.0", "modelspec.title": "Tiny"})
    return path


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "tiny"
    save(model, path, layout="diffusers")
    return path


def changed(
    path: Path, target: Path, drop: str = "", rename: dict[str, str] | None = None, **add: torch.Tensor
) -> Path:
    """A copy of a single file without some tensors, with some renamed, with some more."""
    header = read_header(path)
    tensors = {
        (rename or {}).get(k, k): v
        for k, v in from_header(header).items()
        if not (drop and k.startswith(drop))
    }
    write(target, {**tensors, **add}, header.metadata)
    return target


def test_a_single_file_comes_back_bit_for_bit(model: Model, single: Path) -> None:
    loaded = load(single)
    assert equal(loaded, model)
    assert loaded.found is not None and loaded.found.layout == "single"
    assert (loaded.family.name, loaded.family.variant) == ("sd1", "text-to-image")
    assert loaded.tokens.vocabulary == model.tokens.vocabulary
    assert loaded.tokens.encode("the fox") == model.tokens.encode("the fox")
    assert loaded.text.eos == model.tokens.eos
    assert loaded.latent == model.latent and loaded.size == 64
    assert not any(
        p.requires_grad or p.is_meta for network in loaded.networks.values() for p in network.parameters()
    )
    assert [file.sha256 for file in loaded.files] == [look(single).hashes()[str(single)].sha256]


def test_published_names_are_in_the_file(single: Path) -> None:
    names = read_header(single).tensors
    for name in (
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias",
    ):
        assert name in names
    assert names["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


@pytest.mark.parametrize("variant", ["text-to-image", "inpainting", "instruct-pix2pix"])
def test_through_both_layouts_and_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    first = tiny(variant)
    save(first, tmp_path / "a.safetensors")
    one = load(tmp_path / "a.safetensors")
    save(one, tmp_path / "folder", layout="diffusers")
    two = load(tmp_path / "folder")
    assert two.found is not None and two.found.layout == "diffusers"
    save(two, tmp_path / "b.safetensors")
    assert equal(one, first) and equal(two, first)
    assert two.family.variant == variant
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_tensors_do_not_say_survives_both_layouts(tmp_path: Path) -> None:
    first = tiny(prediction="v", schedule=zero_terminal_snr(scaled_linear()))
    first = replace(
        first, latent=replace(first.latent, scale=0.7, shift=-0.25), metadata={"author": "someone"}
    )
    save(first, tmp_path / "a.safetensors")
    save(load(tmp_path / "a.safetensors"), tmp_path / "folder", layout="diffusers")
    for place in ("a.safetensors", "folder"):
        again = load(tmp_path / place)
        assert again.prediction.name == "v"
        assert again.schedule.noisiest.is_pure_noise
        assert again.latent == first.latent
        assert again.size == 64
        assert again.metadata["author"] == "someone"
    markers = read_header(tmp_path / "a.safetensors").tensors
    assert "v_pred" in markers and "ztsnr" in markers
    config = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"] is True


def test_latents_are_scaled_and_shifted(model: Model) -> None:
    shifted = replace(model, latent=replace(model.latent, scale=0.5, shift=2.0))
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    mean = model.vae.encode(pixels).mean
    assert torch.allclose(shifted.encode_latent(pixels), (mean - 2.0) * 0.5, atol=1e-6)
    noise = torch.randn_like(mean)
    drawn = model.vae.encode(pixels).sample(noise)
    assert torch.allclose(shifted.encode_latent(pixels, noise), (drawn - 2.0) * 0.5, atol=1e-6)
    assert torch.allclose(shifted.decode_latent((mean - 2.0) * 0.5), model.vae.decode(mean), atol=1e-5)


def test_dtypes(single: Path, tmp_path: Path) -> None:
    assert load(single).dtype == torch.float32
    loaded = load(single, dtype="bf16")
    assert {value.dtype for value in weights(loaded).values()} == {torch.bfloat16}
    save(loaded, tmp_path / "bf16.safetensors")
    assert load(tmp_path / "bf16.safetensors").dtype == torch.bfloat16
    save(loaded, tmp_path / "half.safetensors", dtype="float16")
    assert {info.dtype for info in read_header(tmp_path / "half.safetensors").tensors.values()} == {"F16"}
    assert load(tmp_path / "half.safetensors").dtype == torch.float32  # computing in float16 is slow on a CPU
    assert load(tmp_path / "half.safetensors", dtype="float16").dtype == torch.float16
    with pytest.raises(BadInput, match="int3"):
        load(single, dtype="int3")


def test_tensors_are_mapped_not_copied(single: Path) -> None:
    one = next(load(single).denoiser.parameters())
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(single) in line]
    assert any(int(a, 16) <= one.data_ptr() < int(b, 16) for a, b in ranges)


def test_prediction_can_be_overruled(single: Path) -> None:
    assert load(single).prediction.name == "eps"
    assert load(single, prediction="v_prediction").prediction.name == "v"
    with pytest.raises(BadInput, match="did you mean 'eps'"):
        load(single, prediction="epss")


def test_older_and_newer_names_are_understood(
    model: Model, single: Path, folder: Path, tmp_path: Path
) -> None:
    clip = "cond_stage_model.transformer."
    names = {n: n.replace("text_model.", "") for n in read_header(single).tensors if n.startswith(clip)}
    assert equal(load(changed(single, tmp_path / "headless.safetensors", rename=names)), model)

    old = tmp_path / "old"
    shutil.copytree(folder, old)
    path = old / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f".{new}.", f".{former}."): value for name, value in tensors.items()}
    save_file(tensors, path)
    assert equal(load(old), model)


def test_what_training_code_leaves_in_files_is_ignored_by_name(
    model: Model, single: Path, tmp_path: Path
) -> None:
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    extras = {
        "betas": torch.zeros(1000),
        "logvar": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.99),
        position_ids: torch.arange(16)[None],
    }
    path = changed(single, tmp_path / "extras.safetensors", **extras)
    loaded = load(path)
    assert equal(loaded, model)
    assert loaded.found is not None and loaded.found.ignored == 4


def test_averaged_weights(model: Model, single: Path, tmp_path: Path) -> None:
    state = model.denoiser.state_dict()
    ema = {"model_ema.diffusion_model" + name.replace(".", ""): value + 1 for name, value in state.items()}
    header = read_header(single)
    write(tmp_path / "ema.safetensors", {**from_header(header), **ema}, header.metadata)
    plain, averaged = load(tmp_path / "ema.safetensors"), load(tmp_path / "ema.safetensors", ema=True)
    assert plain.found is not None and plain.found.ema == len(state)
    assert equal(plain, model)
    assert all(torch.equal(averaged.denoiser.state_dict()[name], state[name] + 1) for name in state)
    with pytest.raises(BadFile, match="ema=False"):
        load(single, ema=True)


def test_parts_from_other_files(model: Model, single: Path, folder: Path, tmp_path: Path) -> None:
    unet = changed(single, tmp_path / "unet.safetensors", drop="first_stage_model.")
    with pytest.raises(MissingFile, match=r"no autoencoder .*stand-alone VAE"):
        load(unet)
    assert equal(load(unet, vae=single), model)
    assert equal(load(unet, vae=folder / "vae"), model)
    bare = {
        n.removeprefix("first_stage_model."): v
        for n, v in load_file(single).items()
        if n.startswith("first_stage")
    }
    save_file(bare, tmp_path / "vae.safetensors")
    loaded = load(unet, vae=tmp_path / "vae.safetensors")
    assert equal(loaded, model)
    assert [file.path.name for file in loaded.files] == ["unet.safetensors", "vae.safetensors"]
    with pytest.raises(BadFile, match="no part 'vae'"):
        load(unet, vae=unet)


def test_bare_unets_in_both_spellings(model: Model, single: Path, folder: Path, tmp_path: Path) -> None:
    names = {n: n.removeprefix("model.diffusion_model.") for n in read_header(single).tensors}
    bare = changed(single, tmp_path / "bare.safetensors", rename=names)
    tensors = {n: v for n, v in load_file(bare).items() if not n.startswith(("first_stage", "cond_stage"))}
    save_file(tensors, bare)
    assert look(bare).layout == "bare"
    assert equal(load(bare, vae=single, text=single), model)
    assert look(folder / "unet").layout == "bare-diffusers"
    assert equal(load(folder / "unet", vae=folder / "vae", text=single), model)


def test_shards_and_variants(model: Model, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "m"
    shutil.copytree(folder, place)
    base = place / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(base)
    save_file(
        {n: v.half() for n, v in tensors.items()}, place / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, own in shards.items():
        save_file({n: tensors[n] for n in own}, place / "unet" / shard)
    index = {"weight_map": {n: shard for shard, own in shards.items() for n in own}}
    base.unlink()
    (place / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(place)
    assert equal(loaded, model)
    assert loaded.found is not None and any("fp16" in note for note in loaded.found.notes)
    with pytest.raises(MissingFile, match="bf17"):
        load(place, variant="bf17")
    for name in ("vae", "text_encoder"):
        for file in (place / name).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert load(place, variant="fp16", dtype="float16").dtype == torch.float16


def test_unknown_tensors_are_refused_and_can_be_left_out(model: Model, single: Path, tmp_path: Path) -> None:
    path = changed(single, tmp_path / "x.safetensors", **{"embedding_manager.x": torch.zeros(2)})
    assert look(path).extra == ("embedding_manager.x",)
    with pytest.raises(BadFile, match=r"1 tensors .*'embedding_manager.x'.*ignore=") as caught:
        load(path)
    assert caught.value.code == "model.unknown_tensors"
    assert equal(load(path, ignore=["embedding_manager.*"]), model)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "first_stage_model.decoder.norm_out.bias",
            "model.missing",
            r"lacks 1 tensors: 'first_stage_model.decoder",
        ),
        ("model.diffusion_model.out.0.weight", "model.missing", "'model.diffusion_model.out.0.weight'"),
    ],
)
def test_missing_tensors_are_named(single: Path, tmp_path: Path, name: str, code: str, message: str) -> None:
    path = changed(single, tmp_path / "x.safetensors", drop=name)
    with pytest.raises(BadFile, match=message) as caught:
        load(path)
    assert caught.value.code == code


def test_missing_tensors_are_named_as_the_folder_spells_them(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "m"
    shutil.copytree(folder, place)
    path = place / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_norm_out.bias"]
    save_file(tensors, path)
    with pytest.raises(BadFile, match=r"'unet/conv_norm_out\.bias'"):
        load(place)


def test_misspelt_and_misshapen_tensors(single: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.out.0.bias"
    path = changed(single, tmp_path / "x.safetensors", rename={name: name.replace("bias", "biass")})
    with pytest.raises(BadFile, match=r"lacks 1 tensors: 'model.diffusion_model.out.0.bias'"):
        load(path)
    path = changed(single, tmp_path / "y.safetensors", **{name + "s": torch.zeros(32)})
    with pytest.raises(
        BadFile, match=r"no place for 1 .*'model.diffusion_model.out.0.biass'; did you mean 'out.0.bias'"
    ):
        load(path)
    path = changed(single, tmp_path / "z.safetensors", **{name: torch.zeros(33)})
    with pytest.raises(BadFile, match=r"shape \[33\], not \[32\]"):
        load(path)


def test_a_vocabulary_that_is_not_there_is_not_guessed(single: Path, tmp_path: Path) -> None:
    header = read_header(single)
    texts = {key: text for key, text in header.metadata.items() if key != "sumuk.tokenizer"}
    write(tmp_path / "x.safetensors", from_header(header), texts)
    with pytest.raises(BadFile, match="520 words, not OpenAI's 49408") as caught:
        load(tmp_path / "x.safetensors")
    assert caught.value.code == "model.vocabulary"
    write(tmp_path / "y.safetensors", from_header(header), {**texts, "sumuk.tokenizer": "{}"})
    with pytest.raises(BadFile):
        load(tmp_path / "y.safetensors")


def test_openai_vocabulary_needs_no_metadata(tmp_path: Path) -> None:
    save(tiny(openai=True), tmp_path / "x.safetensors")
    assert "sumuk.tokenizer" not in read_header(tmp_path / "x.safetensors").metadata
    assert load(tmp_path / "x.safetensors").tokens.size == 49408


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("sumuk.latent_scale", "many"),
        ("sumuk.latent_scale", "nan"),
        ("sumuk.latent_scale", "0"),
        ("sumuk.latent_shift", "inf"),
        ("modelspec.prediction_type", "guess"),
        ("modelspec.resolution", "large"),
    ],
)
def test_metadata_that_says_nonsense_is_refused(single: Path, tmp_path: Path, key: str, text: str) -> None:
    header = read_header(single)
    write(tmp_path / "x.safetensors", from_header(header), {**header.metadata, key: text})
    with pytest.raises(BadFile) as caught:
        load(tmp_path / "x.safetensors")
    assert caught.value.code.startswith("meta.")


def test_other_betas_than_the_familys_are_refused(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "m"
    shutil.copytree(folder, place)
    path = place / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_start": 0.0001}))
    with pytest.raises(BadFile, match=r"beta_start 0\.0001"):
        load(place)


def test_saving_refuses_what_it_cannot_do(model: Model, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="did you mean 'diffusers'"):
        save(model, tmp_path / "x", layout="difusers")
    with pytest.raises(BadInput, match="not an empty folder"):
        save(model, folder, layout="diffusers")
    with pytest.raises(BadInput, match="contradicts"):
        save(model, tmp_path / "x.safetensors", metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(MissingFile):
        load(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFile, match="no weights"):
        load(tmp_path / "empty")
    (tmp_path / "empty/model.ckpt").write_bytes(b"PK")
    with pytest.raises(BadFile, match=r"model\.ckpt"):
        load(tmp_path / "empty")


def test_a_folder_that_asks_for_other_arithmetic_is_refused(model: Model, tmp_path: Path) -> None:
    """The same tensors with other heads draw another picture, and nothing but the configuration tells."""
    save(model, tmp_path / "folder", layout="diffusers")
    path = tmp_path / "folder" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attention_head_dim": 4}))
    with pytest.raises(BadFile, match=r"unet/config\.json says attention_head_dim 4; the U-Net here has 8"):
        load(tmp_path / "folder")


def test_words_in_the_one_file_that_transformers_5_writes(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "folder", layout="diffusers")
    folder = tmp_path / "folder" / "tokenizer"
    words = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = [line.split(" ") for line in (folder / "merges.txt").read_text("utf-8").split("\n")[1:] if line]
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    document = {"model": {"type": "BPE", "vocab": words, "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    again = load(tmp_path / "folder").tokens
    assert (again.vocabulary, again.merges, again.pad) == (
        model.tokens.vocabulary, model.tokens.merges, model.tokens.pad,
    )  # fmt: skip
    for broken in (
        {"type": "Unigram"},
        {"vocab": words, "merges": [["a"]]},
        {"vocab": {"a": -1}, "merges": []},
    ):
        (folder / "tokenizer.json").write_text(json.dumps({"model": broken}), "utf-8")
        with pytest.raises(BadFile, match=r"tokenizer\.json"):
            load(tmp_path / "folder")


def test_a_key_that_the_last_block_lacks_is_named(tmp_path: Path) -> None:
    """The shape is counted off the blocks; one that is not whole would be counted as none, and the rest be too much."""
    zoo.write("flux/dev", tmp_path)
    path = tmp_path / "flux-dev.safetensors"
    tensors = {name: one.load().clone() for name, one in from_header(read_header(path)).items()}
    lost = max(name for name in tensors if ".single_blocks." in name and name.endswith("linear1.weight"))
    kept = {name: lazy(value) for name, value in tensors.items() if name != lost}
    write(tmp_path / "less.safetensors", kept, read_header(path).metadata)
    with pytest.raises(BadFile, match=re.escape(lost)):
        load(tmp_path / "less.safetensors")


@pytest.mark.parametrize("noise", [VarianceExploding(0.02, 40.0), ContinuousVP(0.1, 19.0)], ids=["ve", "vp"])
@pytest.mark.parametrize("layout", ["single", "diffusers"])
def test_the_noise_of_score_sde_is_said_and_read(noise: Schedule, layout: str, tmp_path: Path) -> None:
    """The network of DDPM trained on other noise: nothing but a text tells (Song et al. 2021)."""
    model = replace(zoo.tiny("ddpm/pixel"), schedule=noise)
    path = tmp_path / ("model.safetensors" if layout == "single" else "model")
    save(model, path, layout=layout)
    again = load(path)
    assert type(again.schedule) is type(noise) and vars(again.schedule) == vars(noise)
    save(replace(again, schedule=zoo.tiny("ddpm/pixel").schedule), tmp_path / "plain.safetensors")
    assert type(load(tmp_path / "plain.safetensors").schedule) is type(zoo.tiny("ddpm/pixel").schedule)
    solver = "euler" if layout == "single" else "predictor-corrector"
    picture = draw("", model=again, steps=3, seed=1, solver=solver, grid="uniform", width=32, height=32)
    assert picture.size == (32, 32)


def test_schedulers_of_folders_are_read_or_refused(tmp_path: Path) -> None:
    save(zoo.tiny("ddpm/pixel"), tmp_path / "folder", layout="diffusers")
    path = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps({"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 1348.0})
    )
    assert vars(load(tmp_path / "folder").schedule) == vars(VarianceExploding(0.01, 1348.0))
    for config in (
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01},
        {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 5.0, "sigma_max": 1.0},
    ):
        path.write_text(json.dumps(config))
        with pytest.raises(BadFile, match="schedule"):
            load(tmp_path / "folder")
