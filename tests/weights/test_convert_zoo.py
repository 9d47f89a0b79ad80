"""Every family from a single file to a folder and back, networks by themselves, 8-bit floats, the miniature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples import zoo
from moments import alike, tensors

import sumuk
from sumuk.base.errors import BadInput
from sumuk.families.autoencoder import ENCODER
from sumuk.files.safetensors import read_header
from sumuk.nets.tiny import TinyDecoder, TinyEncoder
from sumuk.weights.convert import convert
from sumuk.weights.model import Model

MINIATURE = Path(sumuk.__file__).parent / "assets" / "miniature.safetensors"
DIGEST = "modelspec.hash_sha256"
SHORTENED = "sd2/"
"""Whose folders end the text tower where it is read."""
ALIKE = ("ddpm/cifar10", "ddpm/celeba", "ddpm/lsun", "sd2/unclip-h", "flux/schnell", "sd3/medium")
"""Converted as all are, but not loaded: their networks are those of another variant."""


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part, network in model.networks.items()
        for name, value in network.state_dict().items()
    }


@pytest.mark.parametrize("key", zoo.ZOO)
def test_every_family_there_and_back(key: str, tmp_path: Path) -> None:
    model, file = zoo.tiny(key), tmp_path / "a.safetensors"
    sumuk.save(model, file)
    folder = convert(file, tmp_path / "f", layout="diffusers")
    back = convert(folder.path, tmp_path / "b.safetensors", layout="single")
    left = [name for each in folder.left for name in each.names]
    assert bool(left) == key.startswith(SHORTENED) and not back.left and not folder.notes and not back.notes
    was, now = tensors(file), tensors(back.path)
    if key.startswith(SHORTENED):
        assert all(torch.equal(value, was[name]) for name, value in now.items())
        assert sum(left.size for left in folder.left) == sum(
            value.nbytes for name, value in was.items() if name not in now
        )
    else:
        assert alike(now, was)
    texts = read_header(back.path).metadata
    assert texts.pop(DIGEST) and texts == read_header(file).metadata
    if key not in (*ALIKE, *zoo.COMPLETES):
        wanted, got = weights(model), weights(sumuk.load(folder.path))
        assert all(torch.equal(value, wanted[name]) for name, value in got.items())
        assert len(got) == len(wanted) - len(left)


@pytest.mark.parametrize("name", zoo.GUESTS)
def test_networks_by_themselves(name: str, tmp_path: Path) -> None:
    path = zoo.write_guest(name, tmp_path)
    folder = convert(path, tmp_path / "f", layout="diffusers")
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    known = folder.layouts[0]
    if known == "bare-diffusers":  # the diffusers library's names are the published ones
        with pytest.raises(BadInput, match="known: bare-diffusers"):
            convert(folder.path, tmp_path / "b.safetensors", layout="bare")
        return
    back = convert(folder.path, tmp_path / "b.safetensors", layout="bare")
    assert alike(tensors(back.path), tensors(path)) and back.renamed > 100
    file = convert(path, tmp_path / "c.safetensors", layout="bare-diffusers")
    assert alike(tensors(file.path), tensors(folder.files[0]))


def test_a_tiny_decoder(tmp_path: Path) -> None:
    from sumuk.files.tensors import write
    from sumuk.nets.tiny import TinyShape

    shape = TinyShape(channels=4, width=8)
    parts = {"encoder": TinyEncoder(shape), "decoder": TinyDecoder(shape)}
    whole = {f"taesd_{n}.{k}": v for n, net in parts.items() for k, v in net.state_dict().items()}
    write(tmp_path / "a.safetensors", whole)
    file = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="diffusers")
    assert file.layouts == ("single", "diffusers") and ENCODER.name == "tiny_encoder"
    back = convert(file.path, tmp_path / "c.safetensors", layout="single")
    assert alike(tensors(back.path), whole)


def test_a_denoiser_alone(tmp_path: Path) -> None:
    """As FLUX.1 is published: bare, beside which the other networks lie in files of their own."""
    sumuk.save(zoo.tiny("flux/dev"), tmp_path / "all.safetensors")
    head = "model.diffusion_model."
    bare = {
        n.removeprefix(head): v
        for n, v in tensors(tmp_path / "all.safetensors").items()
        if n.startswith(head)
    }
    sumuk_file = tmp_path / "bare.safetensors"
    from sumuk.files.tensors import write

    write(sumuk_file, bare)
    names = convert(sumuk_file, tmp_path / "names", layout="bare-diffusers")
    assert {file.name for file in names.path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert alike(tensors(convert(names.path, tmp_path / "b.safetensors", layout="bare").path), bare)
    single = convert(sumuk_file, tmp_path / "s.safetensors", layout="single")
    assert all(name.startswith(head) for name in tensors(single.path)) and "no autoencoder" in single.notes[0]
    folder = convert(sumuk_file, tmp_path / "f", layout="diffusers")
    assert {p.name for p in folder.path.iterdir()} == {"model_index.json", "scheduler", "transformer"}
    with pytest.raises(BadInput, match="original names"):
        convert(sumuk_file, tmp_path / "x", layout="diffusers", quantise="fp8")


@pytest.mark.parametrize("scheme", ["fp8", "fp8-scaled"])
@pytest.mark.parametrize("key", ["flux/dev", "sd3/3.5-large", "sdxl/base", "dit/class-conditional"])
def test_eight_bits(scheme: str, key: str, tmp_path: Path) -> None:
    """Matrices within the denoiser, and nothing else; what they lose is what is told."""
    model, path = zoo.tiny(key), tmp_path / "a.safetensors"
    sumuk.save(model, path)
    done = convert(path, tmp_path / "b.safetensors", quantise=scheme, dtype="bf16")
    types = {name: info.dtype for name, info in read_header(done.path).tensors.items()}
    small = {name for name, dtype in types.items() if dtype == "F8_E4M3" and not name.endswith("scaled_fp8")}
    assert len(small) == done.cast["F32 -> F8_E4M3"] > 5
    head = "model.diffusion_model."
    assert all(name.startswith(head) and len(read_header(path).tensors[name].shape) == 2 for name in small)
    layers = {name.removeprefix(head).removesuffix(".weight") for name in small}
    ends = (
        "final_layer",
        "img_in",
        "txt_in",
        "time_in",
        "x_embedder",
        "y_embedder",
        "time_embed",
        "label_emb",
    )
    assert not any(layer.startswith(ends) or "norm" in layer.rpartition(".")[2] for layer in layers)
    scales = {name for name in types if name.endswith(".scale_weight")}
    assert scales == (
        {n.removesuffix("weight") + "scale_weight" for n in small} if scheme != "fp8" else set()
    )
    assert (f"{head}scaled_fp8" in types) == (scheme != "fp8")
    again, was = weights(sumuk.load(done.path, dtype="float32")), weights(model)
    errors = {n: float((v - was[n]).norm() / was[n].norm()) for n, v in again.items() if was[n].ndim == 2}
    assert done.worst is not None and 0.02 < done.worst[1] < 0.03
    assert max(errors.values()) == pytest.approx(done.worst[1], rel=1e-3)
    # Once more as bfloat16: the scales are folded in, and said to have been.
    wide = convert(done.path, tmp_path / "c.safetensors", dtype="bf16")
    packed = "F8_E4M3" if scheme == "fp8" else "F8_E4M3 scaled"
    assert wide.cast == {f"{packed} -> BF16": len(small)}
    assert not any("scale_weight" in name or "scaled" in name for name in read_header(wide.path).tensors)


def test_eight_bits_keep_every_bit_under_their_names(tmp_path: Path) -> None:
    sumuk.save(zoo.tiny("flux/dev"), tmp_path / "a.safetensors")
    for scheme in ("fp8", "fp8-scaled"):
        small = convert(tmp_path / "a.safetensors", tmp_path / f"{scheme}.safetensors", quantise=scheme).path
        same = convert(small, tmp_path / "same.safetensors", metadata={"note": "x"})
        assert alike(tensors(same.path), tensors(small)) and not same.cast
    plain = convert(tmp_path / "fp8.safetensors", tmp_path / "bits", layout="diffusers")
    back = convert(plain.path, tmp_path / "back.safetensors", layout="single")
    assert alike(tensors(back.path), tensors(tmp_path / "fp8.safetensors")) and not plain.cast


def test_the_miniature(tmp_path: Path) -> None:
    """44 MB with a vocabulary of its own, both ways."""
    folder = convert(MINIATURE, tmp_path / "f", layout="diffusers")
    back = convert(folder.path, tmp_path / "b.safetensors", layout="single")
    assert alike(tensors(back.path), tensors(MINIATURE)) and not folder.left and not back.left
    texts, was = read_header(back.path).metadata, read_header(MINIATURE).metadata
    assert {key: text for key, text in texts.items() if key in was} == was
