"""What is converted here opens there: pipelines, shards, and networks by themselves, in the diffusers library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples import zoo
from tiny import tiny

import sumuk
from sumuk.weights.convert import convert
from sumuk.weights.vae import extract_vae

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def test_a_converted_folder_is_a_pipeline(tmp_path: Path) -> None:
    """In shards as well, whose index that library reads."""
    model = tiny(openai=True)
    sumuk.save(model, tmp_path / "a.safetensors")
    folder = convert(tmp_path / "a.safetensors", tmp_path / "f", layout="diffusers", shard_bytes=1 << 20).path
    assert (folder / "unet/diffusion_pytorch_model.safetensors.index.json").exists()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    latent, context, time = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 64), torch.tensor([700])
    with torch.no_grad():
        theirs, ours = pipe.unet(latent, time, context).sample, model.denoiser(latent, time, context)
    assert theirs.abs().max() > 0.01 and torch.allclose(theirs, ours, atol=1e-4)
    pipe.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    back = convert(tmp_path / "theirs", tmp_path / "b.safetensors", layout="single")
    again = sumuk.load(back.path)
    for name, network in model.networks.items():
        state = again.networks[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items()), name


def test_networks_by_themselves(tmp_path: Path) -> None:
    model = tiny()
    sumuk.save(model, tmp_path / "a.safetensors")
    alone = extract_vae(tmp_path / "a.safetensors", tmp_path / "vae.safetensors")
    folder = convert(alone.path, tmp_path / "vae", layout="diffusers").path
    theirs = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(pixels).latent_dist.mean
    assert torch.allclose(mean, model.vae.encode(pixels).mean, atol=1e-4)
    assert theirs.config.scaling_factor == 0.18215
    guest = convert(
        zoo.write_guest("controlnet-sd1", tmp_path), tmp_path / "control", layout="diffusers"
    ).path
    network = diffusers.ControlNetModel.from_pretrained(guest, local_files_only=True)
    assert sum(p.numel() for p in network.parameters()) == sum(
        p.numel() for p in zoo.GUESTS["controlnet-sd1"][1]().parameters()
    )
