"""Families as values: what they say of latents and folders, and how U-Nets are numbered."""

from __future__ import annotations

import pytest
import torch

from sumuk.base.errors import BadInput
from sumuk.families.detect import families
from sumuk.families.diffusers import Grid, unet_rules
from sumuk.families.family import FAMILIES, Facts, Latent
from sumuk.files.layout import Layout
from sumuk.files.tensors import lazy
from sumuk.nets.unet import UNet, UNetShape


def test_names_are_found_and_misspelt_ones_get_a_hint() -> None:
    families()
    assert FAMILIES["sd1"].variant == "text-to-image"
    assert FAMILIES["SD1/Inpainting"].title.endswith("inpainting")
    with pytest.raises(BadInput, match="did you mean 'sd1/inpainting'"):
        FAMILIES["sd1/inpaintin"]


def test_sd1_is_what_was_published() -> None:
    sd1 = FAMILIES["sd1"]
    assert sd1.latent == Latent(channels=4, stride=8, scale=0.18215, shift=0.0)
    assert sd1.prediction == "eps" and sd1.guidance == "classifier-free" and sd1.defaults.size == 512
    ratios = [sd1.schedule().level(t).ratio for t in (0, 999)]
    assert ratios == pytest.approx([0.0292, 14.6146], abs=1e-4)


def test_latents_there_and_back() -> None:
    latent = Latent(channels=4, stride=8, scale=0.3611, shift=0.1159)
    z = torch.randn(2, 4, 3, 3)
    assert torch.allclose(latent.encode(z), (z - 0.1159) * 0.3611)
    assert torch.allclose(latent.decode(latent.encode(z)), z, atol=1e-6)


def test_folder_facts() -> None:
    sd1 = FAMILIES["sd1"]
    facts = Facts(
        prediction="v", zero_snr=True, latent=Latent(channels=4, stride=4, scale=2.0, shift=0.5), size=64
    )
    said = sd1.folder(facts)
    assert said["unet/config.json"] == {"sample_size": 16}
    assert said["vae/config.json"] == {"sample_size": 64, "scaling_factor": 2.0, "shift_factor": 0.5}
    scheduler = said["scheduler/scheduler_config.json"]
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]


def test_the_grid_is_read_alike_from_either_side() -> None:
    shape = UNetShape(
        model_channels=32,
        channel_mult=(1, 1, 2),
        num_res_blocks=2,
        transformer_depth=(0, 2, 1),
        middle_depth=1,
        context_dim=64,
        heads=8,
    )
    with torch.device("meta"):
        native = {name: lazy(value) for name, value in UNet(shape).state_dict().items()}
    grid = Grid.read(native)
    assert grid == Grid(attends=(False, True, True), blocks=2, middle=True)
    theirs = Layout(*unet_rules(native)).backward(native).tensors
    assert Grid.read(theirs) == grid
    assert "up_blocks.1.upsamplers.0.conv.weight" in theirs  # after attention: output_blocks.5.2
    assert "up_blocks.0.attentions.2.proj_in.weight" in theirs
    assert not any(name.startswith("up_blocks.2.attentions") for name in theirs)


def test_a_hostile_header_of_many_levels_is_not_followed() -> None:
    names = {f"down_blocks.{i}.resnets.{j}.x" for i in range(200) for j in range(20)}
    grid = Grid.read(names)
    assert len(grid.attends) == 16 and grid.blocks == 16
