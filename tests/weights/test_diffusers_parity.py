"""A folder written here is a pipeline there: same configuration, same words, same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny

from sumuk.weights.checkpoint import load, save

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.mark.parametrize("openai", [True, False])
def test_a_saved_folder_is_a_pipeline_of_diffusers(tmp_path: Path, openai: bool) -> None:
    model = tiny(openai=openai)
    save(model, tmp_path / "m", layout="diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    latent, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 64)
    time, pixels = torch.tensor([10, 700]), torch.rand(1, 3, 16, 16) * 2 - 1
    texts = ["a fox in the snow", "the sea"]
    ids = pipe.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    ours = torch.tensor([model.tokens.row(model.tokens.encode(text)) for text in texts])
    assert torch.equal(ids, ours)
    with torch.no_grad():
        pairs = {
            "unet": (pipe.unet(latent, time, context).sample, model.denoiser(latent, time, context)),
            "text": (pipe.text_encoder(ids)[0], model.text(ours).last),
            "encoder": (pipe.vae.encode(pixels).latent_dist.mean, model.vae.encode(pixels).mean),
            "decoder": (pipe.vae.decode(latent).sample, model.vae.decode(latent)),
        }
    for name, (theirs, mine) in pairs.items():
        assert theirs.abs().max() > 0.01, name
        assert torch.allclose(theirs, mine, atol=1e-4), (name, float((theirs - mine).abs().max()))
    assert pipe.vae.config.scaling_factor == 0.18215
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.unet.config.sample_size == 64 // 4


@pytest.mark.parametrize(
    ("variant", "name"), [("inpainting", "Inpaint"), ("instruct-pix2pix", "InstructPix2Pix")]
)
def test_variants_name_their_pipelines(tmp_path: Path, variant: str, name: str) -> None:
    save(tiny(variant, openai=True), tmp_path / "m", layout="diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    assert type(pipe).__name__ == f"StableDiffusion{name}Pipeline"


def test_a_folder_saved_there_is_a_model_here(tmp_path: Path) -> None:
    model = tiny(openai=True)
    save(model, tmp_path / "m", layout="diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    pipe.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    again = load(tmp_path / "theirs")
    for name, network in model.networks.items():
        state = again.networks[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items()), name
    assert again.tokens.encode("a fox in the snow") == model.tokens.encode("a fox in the snow")
