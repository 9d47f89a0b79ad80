"""Autoencoders in files of their own: told apart by levels and channels, built whole, in every layout."""

from __future__ import annotations

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of

from sumuk.base.errors import BadFile
from sumuk.families.autoencoder import DECODER, ENCODER, KL_16, KL_F4, KL_F8, TINY_FILES
from sumuk.families.detect import Match, Unknown, detect, families
from sumuk.families.family import FAMILIES, Family, Kind
from sumuk.families.sd import VAE
from sumuk.files.layout import Layout
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.tiny import TinyDecoder, TinyEncoder, TinyShape
from sumuk.nets.vae import Vae, VaeShape

KL = {
    "sd15_vae": KL_F8,
    "sd2_vae": KL_F8,
    "sdxl_vae": KL_F8,
    "sd2_x4_vae": KL_F4,
    "sd3_vae": KL_16,
    "flux_ae": KL_16,
}
DIFFUSERS = {"sd15_vae", "sdxl_vae", "sd2_x4_vae", "sd3_vae", "flux_ae"}


def never() -> torch.Tensor:
    raise AssertionError("only names and shapes are looked at")


def header(name: str, prefix: str = "") -> Tensors:
    return {prefix + key: Lazy(shape, "F16", never) for key, shape in inventory(name).items()}


def matched(tensors: Tensors) -> Match:
    answer = detect(tensors)
    assert isinstance(answer, Match), answer.why
    assert not answer.moved.unknown and not answer.moved.halves
    return answer


@pytest.mark.parametrize("name", KL)
def test_kl_autoencoders_in_all_their_places(name: str) -> None:
    places = [("", "", "bare"), ("", "first_stage_model.", "single"), ("", "vae.", "single")]
    if name in DIFFUSERS:
        places += [(".diffusers", "", "bare-diffusers"), (".diffusers", "vae/", "diffusers")]
    for which, prefix, layout in places:
        answer = matched(header(name + which, prefix))
        assert (answer.family, answer.arrangement.name) == (KL[name], layout)
        own = {key.removeprefix("vae."): one.shape for key, one in answer.moved.tensors.items()}
        assert own == inventory(name)
        with torch.device("meta"):
            assert shapes_of(VAE.build(own)) == own


def test_models_that_share_an_autoencoder_are_named() -> None:
    said = {kind.variant: kind.tells(inventory(name)) for name, kind in KL.items() if kind.tells is not None}
    assert "Stable Diffusion 1 and 2" in said["kl-f8"]["serves"] and "SDXL" in said["kl-f8"]["serves"]
    assert "0.18215" in said["kl-f8"]["serves"] and "0.13025" in said["kl-f8"]["serves"]
    assert "Stable Diffusion 3" in said["kl-f8-16ch"]["serves"] and "FLUX.1" in said["kl-f8-16ch"]["serves"]
    assert said["kl-f4"]["latent"] == "4 channels, 4 pixels a cell"
    families()
    for kind in (KL_F8, KL_F4, KL_16):  # the numbers said are those of the families
        for family in (FAMILIES[name] for name in FAMILIES):
            if isinstance(family, Family) and (family.latent.channels, family.latent.stride) == {
                "kl-f8": (4, 8), "kl-f4": (4, 4), "kl-f8-16ch": (16, 8),
            }[kind.variant] and family.name != "cascade":  # fmt: skip
                assert f"{family.latent.scale:g}" in said[kind.variant]["serves"], family.key


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 32, "multiples": (1, 2, 2, 2, 2)}, "5 levels"),
        ({"width": 32, "multiples": (1, 2, 2, 2), "latent": 12, "quantised": 12}, "12 channels"),
        ({"width": 32, "multiples": (1, 2, 2, 2), "latent": 16, "quantised": 16}, "quant_conv"),
        ({"width": 32, "multiples": (1, 2), "quantised": None}, "2 levels"),
    ],
)
def test_other_autoencoders_are_parts_of_no_kind(change: dict[str, object], reason: str) -> None:
    with torch.device("meta"):
        state = Vae(VaeShape(**change)).state_dict()  # type: ignore[arg-type]
    answer = detect({name: lazy(value) for name, value in state.items()})
    assert isinstance(answer, Unknown) and [part.name for part in answer.parts] == ["vae"]
    assert any(reason in near.why for near in answer.near if near.family.startswith("vae/"))


def test_what_training_leaves_is_ignored() -> None:
    extras = {"loss.logvar": Lazy((), "F32", never), "model_ema.decay": Lazy((), "F32", never)}
    assert len(matched({**header("sd15_vae"), **extras}).moved.ignored) == 2


# -- tiny ----------------------------------------------------------------------------------------------------------

TINY = {
    "taesd": ("tiny-vae/taesd", 4), "taesdxl": ("tiny-vae/taesd", 4),
    "taesd3": ("tiny-vae/taesd3", 16), "taef1": ("tiny-vae/taesd3", 16), "taef2": ("tiny-vae/taef2", 32),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_tiny_autoencoders(name: str) -> None:
    kind, _ = TINY[name]
    for side in ("encoder", "decoder"):
        answer = matched(header(f"{name}_{side}"))
        assert answer.family is FAMILIES[kind] and f"{side} alone" in answer.arrangement.title
    both = {**header(f"{name}_encoder", "taesd_encoder."), **header(f"{name}_decoder", "taesd_decoder.")}
    scales = {key: Lazy((1,), "F32", never) for key in ("vae_scale", "vae_shift")}
    answer = matched({**both, **scales})
    assert answer.family is FAMILIES[kind] and answer.arrangement is TINY_FILES[0]


@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_diffusers_numbers_them_otherwise(name: str) -> None:
    answer = matched(header(f"{name}.diffusers"))
    assert answer.family is FAMILIES[TINY[name][0]] and answer.arrangement.name == "bare-diffusers"
    for part, side in ((ENCODER, "encoder"), (DECODER, "decoder")):
        own = {
            key.removeprefix(f"{part.name}."): one.shape
            for key, one in answer.moved.tensors.items()
            if key.startswith(f"{part.name}.")
        }
        assert own == inventory(f"{name}_{side}")
        with torch.device("meta"):
            assert shapes_of(part.build(own)) == own


@pytest.mark.parametrize(("part", "network"), [(ENCODER, TinyEncoder), (DECODER, TinyDecoder)])
def test_there_and_back_is_the_identity(part: object, network: type[torch.nn.Module]) -> None:
    assert part in (ENCODER, DECODER)
    rules = Layout(*(ENCODER if part is ENCODER else DECODER).rules("diffusers", ()))
    native = {name: lazy(value) for name, value in network(TinyShape(width=8)).state_dict().items()}  # type: ignore[call-arg]
    there = rules.backward(native)
    places = {int(name.split(".")[1]) for name in there.tensors}
    assert (min(places), max(places)) == ((0, 14) if part is ENCODER else (0, 18))
    back = rules.forward(there.tensors)
    assert not there.unknown and not back.unknown and back.tensors.keys() == native.keys()
    assert all(torch.equal(back.tensors[name].load(), one.load()) for name, one in native.items())


def test_parity_with_diffusers() -> None:
    """The layout's rules, by numbers: the decoder's places are one lower there."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    )
    theirs.eval().requires_grad_(False)
    for value in theirs.state_dict().values():
        value.copy_(torch.randn(value.shape) * 0.2)
    answer = matched({name: lazy(value) for name, value in theirs.state_dict().items()})
    made = {}
    for part in (ENCODER, DECODER):
        own = {
            n.removeprefix(f"{part.name}."): t
            for n, t in answer.moved.tensors.items()
            if n.startswith(part.name)
        }
        network = part.build({name: one.shape for name, one in own.items()})
        network.load_state_dict({name: one.load() for name, one in own.items()}, strict=True)
        made[part.name] = network.eval().requires_grad_(False)
    latent, pixels = torch.randn(2, 4, 6, 8), torch.rand(1, 3, 32, 48)
    want = theirs.decoder(latent).add(1).div(2)  # its decoder ends in -1..1
    assert float((made["tiny_decoder"](latent) - want).abs().max() / want.abs().max()) < 1e-5
    want = theirs.encoder(pixels.mul(2).sub(1))  # and its encoder takes -1..1
    assert float((made["tiny_encoder"](pixels) - want).abs().max() / want.abs().max()) < 1e-5


def test_sequences_of_other_networks_are_none() -> None:
    for shapes in (
        {"0.weight": (64, 3, 3, 3), "2.weight": (64, 64, 3, 3)},
        {"1.weight": (64, 4), "19.weight": (3, 64)},
    ):
        answer = detect({name: Lazy(shape, "F32", never) for name, shape in shapes.items()})
        assert isinstance(answer, Unknown)


def test_flux2s_is_known_and_not_built() -> None:
    with pytest.raises(BadFile, match="pooled"):
        DECODER.build(inventory("taef2_decoder"))


def test_none_of_them_draws() -> None:
    for kind in (KL_F8, KL_F4, KL_16, FAMILIES["taesd"], FAMILIES["vae"]):
        assert isinstance(kind, Kind) and not isinstance(kind, Family)
