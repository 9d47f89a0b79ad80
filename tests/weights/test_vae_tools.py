"""Autoencoders out of checkpoints and into them: bit for bit, and only where they fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from examples import zoo
from moments import alike, tensors
from tiny import equal, tiny

import sumuk
from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import write
from sumuk.weights.convert import convert
from sumuk.weights.vae import bake_vae, extract_vae

HEAD = "first_stage_model."
KEYS = ("sd1/text-to-image", "sd2/x4-upscaler", "sdxl/base", "sd3/medium", "flux/dev", "dit/class-conditional",
        "cascade/stage-c", "cascade/stage-b")  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "sd1.safetensors"
    sumuk.save(tiny(), path, metadata={"modelspec.license": "Apache-2.0", "modelspec.title": "Tiny"})
    return path


@pytest.fixture(scope="module")
def other(single: Path) -> Path:
    """Another autoencoder of the same kind, from a checkpoint with other weights."""
    sumuk.save(tiny(seed=5), single.parent / "other.safetensors")
    return extract_vae(single.parent / "other.safetensors", single.parent / "other-vae.safetensors").path


@pytest.mark.parametrize("key", KEYS)
def test_out_of_every_family_and_back(key: str, tmp_path: Path) -> None:
    model, path = zoo.tiny(key), tmp_path / "a.safetensors"
    sumuk.save(model, path)
    out = extract_vae(path, tmp_path / "vae.safetensors")
    assert alike(tensors(out.path), dict(model.vae.state_dict())) and out.tensors == len(tensors(out.path))
    said = read_header(out.path).metadata["modelspec.architecture"]
    assert said.endswith("/vae") and not any(
        name.startswith("sumuk.") for name in read_header(out.path).metadata
    )
    baked = bake_vae(path, out.path, tmp_path / "b.safetensors")
    assert alike(tensors(baked.path), tensors(path)) and len(baked.replaced) == baked.tensors == out.tensors


def test_what_an_autoencoder_is_told(single: Path, tmp_path: Path) -> None:
    model = sumuk.load(single)
    odd = replace(model, latent=replace(model.latent, scale=0.7, shift=-0.25))
    sumuk.save(odd, tmp_path / "odd.safetensors")
    texts = read_header(extract_vae(tmp_path / "odd.safetensors", tmp_path / "v.safetensors").path).metadata
    assert len(texts.pop("modelspec.hash_sha256")) == 66
    assert texts == {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v1/vae",
        "modelspec.license": "Apache-2.0",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "Tiny (autoencoder)",
        "sumuk.latent_scale": "0.7",
        "sumuk.latent_shift": "-0.25",
    }
    with pytest.raises(BadFile, match=r"the scale 0\.7, those of .* 0\.18215") as caught:
        bake_vae(single, tmp_path / "v.safetensors", tmp_path / "x.safetensors")
    assert caught.value.code == "vae.misfit"


def test_types_and_folders(single: Path, tmp_path: Path) -> None:
    folder = convert(single, tmp_path / "f", layout="diffusers").path
    half = extract_vae(folder, tmp_path / "v.safetensors", dtype="fp16")
    assert half.cast == {"F32 -> F16": half.tensors} and half.title == "Stable Diffusion 1.x"
    whole = tensors(single)
    assert all(torch.equal(value, whole[HEAD + name].half()) for name, value in tensors(half.path).items())


def test_another_autoencoder(single: Path, other: Path, tmp_path: Path) -> None:
    done = bake_vae(single, other, tmp_path / "a.safetensors")
    was, now, new = tensors(single), tensors(done.path), tensors(other)
    assert now.keys() == was.keys() and set(done.replaced) == {n for n in was if n.startswith(HEAD)}
    assert all(
        torch.equal(one, new[n.removeprefix(HEAD)] if n.startswith(HEAD) else was[n])
        for n, one in now.items()
    )
    mixed = replace(tiny(), networks=tiny().networks | {"vae": tiny(seed=5).vae})
    assert equal(sumuk.load(done.path), mixed) and done.dtypes == (("F32",), ("F32",)) and not done.notes
    texts = read_header(done.path).metadata
    assert {k: t for k, t in texts.items() if "hash" not in k} == read_header(single).metadata
    # A whole checkpoint lends its own as well, and a folder has its configuration written anew.
    assert alike(
        tensors(bake_vae(single, single.parent / "other.safetensors", tmp_path / "b.safetensors").path), now
    )
    folder = convert(single, tmp_path / "f", layout="diffusers").path
    baked = bake_vae(folder, other, tmp_path / "g")
    assert equal(sumuk.load(baked.path), mixed)
    assert json.loads((baked.path / "vae/config.json").read_text())["scaling_factor"] == 0.18215


def test_in_the_checkpoints_own_place(single: Path, other: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(single.read_bytes())
    bake_vae(path, other, path)
    assert torch.equal(
        sumuk.load(path).vae.state_dict()["quant_conv.bias"], tensors(other)["quant_conv.bias"]
    )
    with pytest.raises(BadInput, match="read from; give another name"):
        bake_vae(path, other, other)
    with pytest.raises(BadInput, match="read from; give another name"):
        extract_vae(path, path)


def test_where_there_was_none(single: Path, other: Path, tmp_path: Path) -> None:
    kept = {name: one for name, one in tensors(single).items() if not name.startswith(HEAD)}
    loss = {f"{HEAD}loss.logvar": torch.zeros(1)}
    write(tmp_path / "a.safetensors", kept | loss, read_header(single).metadata)
    with pytest.raises(MissingFile, match="no autoencoder"):
        extract_vae(tmp_path / "a.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(
        BadFile, match=r"makes latents of 4 channels and 4 pixels a cell; .* here has 4 and 8"
    ):
        bake_vae(tmp_path / "a.safetensors", other, tmp_path / "b.safetensors")
    large = replace(zoo.tiny("sd1/text-to-image").networks["vae"].shape, multiples=(1, 1, 2, 2))
    vae = type(zoo.tiny("sd1/text-to-image").networks["vae"])(large)
    write(tmp_path / "v.safetensors", dict(vae.state_dict()))
    done = bake_vae(tmp_path / "a.safetensors", tmp_path / "v.safetensors", tmp_path / "b.safetensors")
    assert done.replaced == () and "does not say the scale of its latents" in done.notes[0]
    assert f"{HEAD}loss.logvar" not in tensors(done.path)
    assert sumuk.load(done.path).vae.stride == 8


def test_what_does_not_fit_is_refused(single: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    for key, message in (
        ("flux/dev", "makes latents of 16 channels"),
        ("sdxl/base", r"the scale 0\.13025, those of .* 0\.18215"),
    ):
        sumuk.save(zoo.tiny(key), tmp_path / "m.safetensors")
        extract_vae(tmp_path / "m.safetensors", tmp_path / "v.safetensors")
        with pytest.raises(BadFile, match=message):
            bake_vae(single, tmp_path / "v.safetensors", out)
    broken = {name: one for name, one in tensors(other).items() if name != "decoder.norm_out.bias"}
    write(tmp_path / "v.safetensors", broken)
    with pytest.raises(BadFile, match=r"lacks 1 tensors.*decoder\.norm_out\.bias"):
        bake_vae(single, tmp_path / "v.safetensors", out)
    write(tmp_path / "u.safetensors", {"x": torch.ones(2)})
    with pytest.raises(BadFile, match="has no part 'vae' to supply"):
        bake_vae(single, tmp_path / "u.safetensors", out)
    with pytest.raises(BadFile, match="unknown model"):
        bake_vae(tmp_path / "u.safetensors", other, out)
    with pytest.raises(BadInput, match="not a model with an autoencoder"):
        extract_vae(other, out)
    sumuk.save(zoo.tiny("ddpm/pixel"), tmp_path / "p.safetensors")
    with pytest.raises(MissingFile, match="has no autoencoder"):
        extract_vae(tmp_path / "p.safetensors", out)
    head = "model.diffusion_model."
    bare = {n.removeprefix(head): v for n, v in tensors(single).items() if n.startswith(head)}
    write(tmp_path / "bare.safetensors", bare)
    with pytest.raises(BadInput, match="convert it with layout='single' first"):
        bake_vae(tmp_path / "bare.safetensors", other, out)
    assert not out.exists()
