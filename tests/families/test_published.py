"""The published shapes against inventories of the published files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of

from sumuk.families.detect import families
from sumuk.families.published import RELEASES

KINDS = {kind.key: kind for kind in families()}
INVENTORIES = {
    "sd15_unet": ("sd1.5", "denoiser"),
    "sd15_inpaint_unet": ("sd1.5-inpainting", "denoiser"),
    "sd15_vae": ("sd1.5", "vae"),
    "sd15_clip_l": ("sd1.5", "text"),
    "sd2_unet": ("sd2.1", "denoiser"),
    "sd2_vae": ("sd2.1", "vae"),
    "sd2_openclip_h": ("sd2.1", "text"),
    "sd2_inpaint_unet": ("sd2-inpainting", "denoiser"),
    "sd2_depth_unet": ("sd2-depth", "denoiser"),
    "sd21_unclip_l_unet": ("sd2.1-unclip-l", "denoiser"),
    "sd21_unclip_h_unet": ("sd2.1-unclip-h", "denoiser"),
    "sd2_x4_unet": ("x4-upscaler", "denoiser"),
    "sd2_x4_vae": ("x4-upscaler", "vae"),
    "sdxl_base_unet": ("sdxl-base", "denoiser"),
    "sdxl_base_clip_l": ("sdxl-base", "text"),
    "sdxl_base_openclip_g": ("sdxl-base", "text_2"),
    "sdxl_vae": ("sdxl-base", "vae"),
    "sdxl_refiner_unet": ("sdxl-refiner", "denoiser"),
    "sdxl_refiner_openclip_g": ("sdxl-refiner", "text_2"),
    "cascade_stage_c_3.6b": ("cascade-c", "denoiser"),
    "cascade_stage_c_1b": ("cascade-c-lite", "denoiser"),
    "cascade_stage_b_1.5b": ("cascade-b", "decoder"),
    "cascade_stage_b_700m": ("cascade-b-lite", "decoder"),
    "cascade_stage_a": ("cascade-a", "vae"),
    "cascade_effnet": ("cascade-effnet", "effnet"),
    "cascade_previewer": ("cascade-previewer", "previewer"),
    "sd3_medium_mmdit": ("sd3-medium", "denoiser"),
    "sd35_medium_mmditx": ("sd3.5-medium", "denoiser"),
    "sd35_large_mmdit": ("sd3.5-large", "denoiser"),
    "sd3_vae": ("sd3-medium", "vae"),
    "sd3_clip_l.diffusers": ("sd3-medium", "text"),
    "clip_g.diffusers": ("sd3-medium", "text_2"),
    "clip_l.diffusers": ("flux1-dev", "text"),
    "t5_xxl_encoder": ("sd3-medium", "text_3"),
    "flux1_dev": ("flux1-dev", "denoiser"),
    "flux1_schnell": ("flux1-schnell", "denoiser"),
    "flux1_fill_dev": ("flux1-fill-dev", "denoiser"),
    "flux1_canny_depth_dev": ("flux1-canny-dev", "denoiser"),
    "flux_ae": ("flux1-dev", "vae"),
    "dit_xl_2": ("dit-xl-2-256", "denoiser"),
    "dit_xl_2_512": ("dit-xl-2-512", "denoiser"),
    "dit_l_2": ("dit-l-2", "denoiser"),
    "dit_b_2": ("dit-b-2", "denoiser"),
    "dit_s_2": ("dit-s-2", "denoiser"),
    "ddpm_cifar10": ("ddpm-cifar10", "denoiser"),
    "ddpm_celeba": ("ddpm-celeba", "denoiser"),
    "ddpm_lsun_bedroom": ("ddpm-lsun", "denoiser"),
    "ddpm_lsun_church": ("ddpm-lsun", "denoiser"),
    "controlnet_sd15": ("controlnet-sd1.5", "control"),
    "controlnet_sd21": ("controlnet-sd2.1", "control"),
    "flux_controlnet_canny_instantx.diffusers": ("controlnet-flux-canny", "control"),
    "flux_controlnet_union_instantx.diffusers": ("controlnet-flux-union", "control"),
    "sd3_controlnet.diffusers": ("controlnet-sd3", "control"),
    "taesd_decoder": ("taesd-decoder", "tiny_decoder"),
    "taesd3_decoder": ("taesd3-decoder", "tiny_decoder"),
}
"""Inventory -> release and part. SDXL's ControlNet and inpainting U-Net are known in the diffusers layout alone."""
UNUSED = {"text_model.embeddings.position_ids", "logit_scale"}
"""Stored beside the towers; no network has them."""


@pytest.mark.parametrize("name", INVENTORIES)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    release, part = INVENTORIES[name]
    with torch.device("meta"):
        network = RELEASES[release].network(part)
    published = inventory(name)
    assert shapes_of(network) == {key: shape for key, shape in published.items() if key not in UNUSED}


@pytest.mark.parametrize("name", RELEASES)
def test_a_header_of_it_is_read_as_the_same_shape(name: str) -> None:
    """The way that a file takes, from names and shapes alone, leads to the same networks."""
    release = RELEASES[name]
    parts = {part.name: part for part in KINDS[release.family].parts}
    with torch.device("meta"):
        for part in release.parts:
            network = release.network(part)
            again = parts[part].build(shapes_of(network))
            assert (type(again), again.shape) == (type(network), network.shape)


def test_no_torch_until_a_network_is_asked_for() -> None:
    code = "import sys, sumuk.families.published as p; assert p.RELEASES and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
