"""The tiny autoencoder: published names, parity with diffusers, conventions."""

from __future__ import annotations

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.tiny import TinyDecoder, TinyEncoder, TinyShape, tiny_decoder_shape, tiny_encoder_shape

FAMILIES = {"taesd": 4, "taesdxl": 4, "taesd3": 16, "taef1": 16}


def pair(shape: TinyShape) -> tuple[TinyEncoder, TinyDecoder]:
    torch.manual_seed(0)
    return TinyEncoder(shape).eval().requires_grad_(False), TinyDecoder(shape).eval().requires_grad_(False)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_the_published_ones(family: str) -> None:
    encoder, decoder = inventory(f"{family}_encoder"), inventory(f"{family}_decoder")
    expected = TinyShape(channels=FAMILIES[family])
    assert tiny_encoder_shape(encoder) == tiny_decoder_shape(decoder) == expected
    with torch.device("meta"):
        assert shapes_of(TinyEncoder(expected)) == encoder
        assert shapes_of(TinyDecoder(expected)) == decoder


def diffusers_names(encoder: TinyEncoder, decoder: TinyDecoder) -> dict[str, Tensor]:
    """diffusers has no place for the squash, so its decoder counts from one lower."""
    named = {f"encoder.layers.{key}": value for key, value in encoder.state_dict().items()}
    for key, value in decoder.state_dict().items():
        place, _, rest = key.partition(".")
        named[f"decoder.layers.{int(place) - 1}.{rest}"] = value
    return named


@pytest.mark.parametrize(("name", "channels"), [("taesd.diffusers", 4), ("taesd3.diffusers", 16)])
def test_the_name_map_of_this_test_is_complete(name: str, channels: int) -> None:
    published = inventory(name)
    with torch.device("meta"):
        named = diffusers_names(
            TinyEncoder(TinyShape(channels=channels)), TinyDecoder(TinyShape(channels=channels))
        )
    assert {key: tuple(value.shape) for key, value in named.items()} == published


@pytest.mark.parametrize("shape", [TinyShape(), TinyShape(width=24, channels=16)])
def test_equals_diffusers(shape: TinyShape) -> None:
    diffusers = pytest.importorskip("diffusers")
    encoder, decoder = pair(shape)
    twin = diffusers.AutoencoderTiny(
        latent_channels=shape.channels,
        encoder_block_out_channels=(shape.width,) * 4,
        decoder_block_out_channels=(shape.width,) * 4,
    )
    twin.load_state_dict(diffusers_names(encoder, decoder))
    twin.eval().requires_grad_(False)
    pixels = torch.rand(2, 3, 32, 48)
    assert relative(encoder(pixels), twin.encode(pixels * 2 - 1).latents) <= 1e-5  # theirs takes -1..1
    latent = 4 * torch.randn(2, shape.channels, 4, 6)  # far enough out to be squashed
    assert relative(decoder(latent), (twin.decode(latent).sample + 1) / 2) <= 1e-5


def test_far_latents_are_squashed_not_cut() -> None:
    _, decoder = pair(TinyShape(width=16))
    far = torch.full((1, 4, 2, 2), 1e4)
    torch.testing.assert_close(decoder(far), decoder(2 * far))
    seen: list[Tensor] = []
    decoder[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    decoder(torch.full((1, 4, 2, 2), 3.0))
    torch.testing.assert_close(seen[0], torch.full((1, 4, 2, 2), 2.2847824))  # 3 tanh 1


def test_a_batch_equals_its_members_and_bfloat16_is_near() -> None:
    encoder, decoder = pair(TinyShape(width=16))
    pixels = torch.rand(3, 3, 16, 24)
    latent = encoder(pixels)
    assert latent.shape == (3, 4, 2, 3) and decoder(latent).shape == pixels.shape
    torch.testing.assert_close(
        latent, torch.cat([encoder(one[None]) for one in pixels]), rtol=1e-5, atol=1e-6
    )
    exact = decoder(latent)
    torch.testing.assert_close(exact, torch.cat([decoder(one[None]) for one in latent]), rtol=1e-5, atol=1e-6)
    assert relative(decoder.bfloat16()(latent.bfloat16()).float(), exact) < 0.05


def test_wrong_headers_and_sizes_are_refused() -> None:
    with pytest.raises(BadFile, match=r"tiny encoder.*0\.weight"):
        tiny_encoder_shape({})
    encoder, decoder = pair(TinyShape(width=8))
    with pytest.raises(BadFile, match="tiny decoder"):
        tiny_decoder_shape(shapes_of(encoder))
    with pytest.raises(BadFile, match="tiny encoder"):
        tiny_encoder_shape(shapes_of(decoder))
    with pytest.raises(BadFile, match=r"3\.pool"):
        tiny_decoder_shape(shapes_of(decoder) | {"3.pool.0.weight": (32, 8, 1, 1)})
    with pytest.raises(BadInput, match="multiples of 8"):
        encoder(torch.zeros(1, 3, 16, 12))
    with pytest.raises(BadInput, match=r"\[B, 4, height, width\]"):
        decoder(torch.zeros(1, 3, 4, 4))
