"""The KL autoencoder: published names, parity with diffusers, moments, tiles."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from tests.nets.inventories import KEYS, inventory, shapes_of
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.vae import Moments, Vae, VaeShape, vae_shape

SMALL = VaeShape(width=32, multiples=(1, 2, 2))
RAW16 = VaeShape(width=32, multiples=(1, 2, 4, 4), blocks=1, latent=16, quantised=None)


def network(shape: VaeShape, seed: int = 0) -> Vae:
    torch.manual_seed(seed)
    vae = Vae(shape).eval().requires_grad_(False)
    for name, value in vae.named_parameters():
        if "norm" in name:  # the default 1 and 0 would hide a norm that is wired to the wrong place
            value.add_(0.2 * torch.randn_like(value))
    return vae


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("name", ["sd15_vae", "sdxl_vae", "sd2_x4_vae", "sd3_vae", "flux_ae"])
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    published = inventory(name)
    with torch.device("meta"):
        vae = Vae(vae_shape(published))
    assert shapes_of(vae) == published


def test_published_sizes() -> None:
    sd = vae_shape(inventory("sd15_vae"))
    assert (sd.width, sd.multiples, sd.blocks, sd.latent, sd.quantised) == (128, (1, 2, 4, 4), 2, 4, 4)
    assert vae_shape(inventory("sd2_x4_vae")).stride == 4
    flux = vae_shape(inventory("flux_ae"))
    assert (flux.channels, flux.quantised, flux.stride) == (16, None, 8)
    assert flux.groups == 32 and SMALL.groups == 8  # four channels to a group, where narrow


@pytest.mark.parametrize(
    "shape", [SMALL, RAW16, VaeShape(width=64, multiples=(1,), latent=3, quantised=5, colours=1, blocks=1)]
)
def test_shape_is_read_back_from_any_header(shape: VaeShape) -> None:
    with torch.device("meta"):
        assert vae_shape(shapes_of(Vae(shape))) == shape


def test_wrong_headers_and_sizes_are_refused() -> None:
    with torch.device("meta"):
        good = shapes_of(Vae(SMALL))
    with pytest.raises(BadFile, match=r"encoder\.conv_in\.weight"):
        vae_shape({})
    with pytest.raises(BadFile, match="needs 8"):
        vae_shape(good | {"encoder.conv_out.weight": (4, 64, 3, 3)})
    with pytest.raises(BadInput, match="48"):
        VaeShape(width=48)
    vae = network(SMALL)
    with pytest.raises(BadInput, match="multiples of 4"):
        vae.encode(torch.zeros(1, 3, 32, 30))
    with pytest.raises(BadInput, match=r"\[B, 4, height, width\]"):
        vae.decode(torch.zeros(1, 8, 4, 4))


def diffusers_twin(vae: Vae) -> torch.nn.Module:
    """The same weights in diffusers' autoencoder, by its own names."""
    diffusers = pytest.importorskip("diffusers")
    shape, levels = vae.shape, len(vae.shape.multiples)
    twin = diffusers.AutoencoderKL(
        in_channels=shape.colours,
        out_channels=shape.colours,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(shape.width * multiple for multiple in shape.multiples),
        layers_per_block=shape.blocks,
        latent_channels=shape.latent,
        norm_num_groups=shape.groups,
        use_quant_conv=shape.quantised is not None,
        use_post_quant_conv=shape.quantised is not None,
    )
    renamed = {_diffusers_name(key, levels): value for key, value in vae.state_dict().items()}
    wanted = twin.state_dict()
    assert set(renamed) == set(wanted)
    twin.load_state_dict({key: value.reshape(wanted[key].shape) for key, value in renamed.items()})
    return twin.eval().requires_grad_(False)


def _diffusers_name(key: str, levels: int) -> str:
    parts = key.split(".")
    if "up" in parts[:2]:
        parts[2] = str(levels - 1 - int(parts[2]))
    key = ".".join(parts)
    for ours, theirs in [
        (".down.", ".down_blocks."),
        (".up.", ".up_blocks."),
        (".block.", ".resnets."),
        (".downsample.", ".downsamplers.0."),
        (".upsample.", ".upsamplers.0."),
        (".mid.block_1.", ".mid_block.resnets.0."),
        (".mid.block_2.", ".mid_block.resnets.1."),
        (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
        (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
        (".mid.attn_1.", ".mid_block.attentions.0.to_"),
        (".norm_out.", ".conv_norm_out."),
        (".nin_shortcut.", ".conv_shortcut."),
    ]:
        key = key.replace(ours, theirs)
    return key


def test_the_name_map_of_this_test_is_the_traced_one() -> None:
    path = KEYS / "maps" / "sd15_vae__to_diffusers.json.gz"
    if not path.exists():
        pytest.skip("map absent")
    document = json.loads(gzip.decompress(path.read_bytes()))
    traced = next(value for value in document.values() if isinstance(value, dict))
    assert {source: _diffusers_name(source, 4) for source in inventory("sd15_vae")} == {
        source: target for target, source in traced.items()
    }


def _parity(shape: VaeShape, side: int) -> tuple[float, float]:
    vae = network(shape)
    twin = diffusers_twin(vae)
    pixels = torch.rand(1, shape.colours, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    theirs = twin.encode(pixels).latent_dist
    ours = vae.encode(pixels)
    encoded = max(relative(ours.mean, theirs.mean), relative(ours.log_variance, theirs.logvar))
    torch.testing.assert_close(ours.kl(), theirs.kl(), rtol=1e-4, atol=0.0)
    return encoded, relative(vae.decode(ours.mean), twin.decode(ours.mean).sample)


@pytest.mark.parametrize("shape", [SMALL, RAW16])
def test_equals_diffusers(shape: VaeShape) -> None:
    assert max(_parity(shape, 32)) <= 1e-5  # measured 2.0e-6


@pytest.mark.slow
def test_equals_diffusers_at_full_width() -> None:
    assert max(_parity(VaeShape(), 64)) <= 1e-4


def test_moments() -> None:
    mean, noise = torch.full((2, 1, 1, 2), 0.5), torch.full((2, 1, 1, 2), 2.0)
    moments = Moments(mean, torch.full((2, 1, 1, 2), 2 * 0.25))
    torch.testing.assert_close(moments.sample(noise), mean + 2.0 * torch.tensor(0.25).exp())
    assert moments.mode() is mean
    by_hand = 2 * 0.5 * (0.25 + torch.tensor(0.5).exp() - 1 - 0.5)
    torch.testing.assert_close(moments.kl(), by_hand.expand(2))
    with pytest.raises(BadInput, match="noise"):
        moments.sample(torch.zeros(2, 1, 2, 1))


def test_a_batch_equals_its_members() -> None:
    vae = network(SMALL)
    pixels = torch.rand(3, 3, 16, 24) * 2 - 1
    whole = vae.encode(pixels).mean
    single = torch.cat([vae.encode(image[None]).mean for image in pixels])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        vae.decode(whole), torch.cat([vae.decode(z[None]) for z in whole]), rtol=1e-5, atol=1e-5
    )


def test_bfloat16_channels_last_and_training() -> None:
    vae = network(SMALL)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    exact = vae.decode(vae.encode(pixels).mean)
    vae.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(True)
    moments = vae.encode(pixels.bfloat16().contiguous(memory_format=torch.channels_last))
    again = vae.decode(moments.sample(torch.zeros_like(moments.mean)))
    assert again.dtype == torch.bfloat16 and again.is_contiguous(memory_format=torch.channels_last)
    assert relative(again.float(), exact) < 0.1
    (again.float().square().mean() + 1e-6 * moments.kl().mean()).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in vae.parameters())
