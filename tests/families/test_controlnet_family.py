"""What changes a model by a picture: each file is recognised as its own kind, in each layout, and as no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import nn

import sumuk.families.controlnet as module
from sumuk.base.errors import BadFile, BadInput
from sumuk.families.detect import Match, Unknown, detect, families
from sumuk.families.family import FAMILIES, Family, Kind
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.adapters import T2IAdapter, T2IShape
from sumuk.nets.control_dit import FluxControlNet, FluxControlShape, SD3ControlNet, SD3ControlShape
from sumuk.nets.controlnet import ControlNet, ControlNetShape
from sumuk.nets.ip_adapter import IPAdapter, IPShape
from sumuk.nets.unet import UNet, UNetShape

SD1 = ControlNetShape(
    model_channels=64, channel_mult=(1, 2), transformer_depth=(1, 1), middle_depth=1, context_dim=24, heads=8
)
SD2 = replace(SD1, heads=None, head_channels=64, linear=True)
SDXL = replace(SD2, transformer_depth=(0, 2), middle_depth=2, adm_in_channels=40)
IP = IPShape(kind="image", image_dim=40, context_dim=24, widths=(64, 64, 128), tokens=4)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "controlnet/sd15": lambda: ControlNet(SD1),
    "controlnet/sd21": lambda: ControlNet(SD2),
    "controlnet/sdxl": lambda: ControlNet(SDXL),
    "controlnet/flux": lambda: FluxControlNet(
        FluxControlShape(width=64, head=32, double=1, single=1, modes=3)
    ),
    "controlnet/sd3": lambda: SD3ControlNet(SD3ControlShape(width=64, depth=1, places=4)),
    "t2i-adapter/sd": lambda: T2IAdapter(T2IShape(widths=(32, 64))),
    "t2i-adapter/sdxl": lambda: T2IAdapter(T2IShape(widths=(32, 64), factor=16)),
    "t2i-adapter/light": lambda: T2IAdapter(T2IShape(widths=(32, 64, 64), rows=4, light=True)),
    "ip-adapter/image": lambda: IPAdapter(IP),
    "ip-adapter/plus": lambda: IPAdapter(replace(IP, kind="plus", tokens=5, inner=48, depth=2, heads=1)),
    "ip-adapter/full": lambda: IPAdapter(replace(IP, kind="full", tokens=0)),
}
EVERY = pytest.mark.parametrize("key", NETWORKS)
OWN = [kind for kind in (FAMILIES[name] for name in FAMILIES) if kind in vars(module).values()]


def native(key: str) -> Tensors:
    torch.manual_seed(0)
    part = FAMILIES[key].parts[0].name
    return {f"{part}.{name}": lazy(tensor) for name, tensor in NETWORKS[key]().state_dict().items()}


def published(name: str, prefix: str = "") -> Tensors:
    def never() -> torch.Tensor:
        raise AssertionError("detection loads no tensor")

    return {prefix + key: Lazy(size, "F16", never) for key, size in inventory(name).items()}


def found(tensors: Tensors) -> tuple[str, str]:
    answer = detect(tensors)
    assert isinstance(answer, Match), answer.why
    answer.moved.refuse_leftovers("file")
    return answer.family.key, answer.arrangement.name


@EVERY
def test_every_layout_is_recognised_and_gives_the_same_network(key: str) -> None:
    kind, own = FAMILIES[key], native(key)
    assert isinstance(kind, Kind) and not isinstance(kind, Family)
    for arrangement in kind.arrangements:
        there = arrangement.layout(own, backward=True).backward(own)
        there.refuse_leftovers("native")
        answer = detect(there.tensors)
        assert isinstance(answer, Match) and answer.family is kind
        assert answer.moved.tensors.keys() == own.keys()
        assert all(torch.equal(one.load(), own[name].load()) for name, one in answer.moved.tensors.items())
        if not arrangement.ignored:  # what is laid within a whole model hides nothing
            assert len(there.tensors) == len(own)


@EVERY
def test_a_network_is_built_from_its_header(key: str) -> None:
    part = FAMILIES[key].parts[0]
    shapes = {name.partition(".")[2]: one.shape for name, one in native(key).items()}
    with torch.device("meta"):
        assert shapes_of(part.build(shapes)) == shapes


@EVERY
def test_diffusers_opens_what_the_configuration_says(key: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    part, own = FAMILIES[key].parts[0], native(key)
    shapes = {name.partition(".")[2]: one.shape for name, one in own.items()}
    config = part.config(shapes)
    if key.startswith("ip-adapter"):
        assert config == {}
        return
    with torch.device("meta"):
        theirs = getattr(diffusers, config.pop("_class_name"))(**config)
    layout = next(each for each in FAMILIES[key].arrangements if each.name == "bare-diffusers")
    there = layout.layout(own, backward=True).backward(own).tensors
    assert {name: one.shape for name, one in there.items()} == shapes_of(theirs)


@pytest.mark.parametrize(
    ("name", "prefix", "key", "layout"),
    [
        ("controlnet_sd15", "control_model.", "controlnet/sd15", "single"),
        ("controlnet_sd15", "", "controlnet/sd15", "bare"),
        ("controlnet_sd15.diffusers", "", "controlnet/sd15", "bare-diffusers"),
        ("controlnet_sd21", "control_model.", "controlnet/sd21", "single"),
        ("controlnet_sdxl.diffusers", "", "controlnet/sdxl", "bare-diffusers"),
        ("flux_controlnet_canny_instantx.diffusers", "", "controlnet/flux", "bare-diffusers"),
        ("flux_controlnet_union_instantx.diffusers", "", "controlnet/flux", "bare-diffusers"),
        ("sd3_controlnet.diffusers", "", "controlnet/sd3", "bare-diffusers"),
    ],
)
def test_published_files(name: str, prefix: str, key: str, layout: str) -> None:
    assert found(published(name, prefix)) == (key, layout)


def test_one_within_a_whole_model() -> None:
    """The first releases held the U-Net, the autoencoder and the text tower as well."""
    tensors = {
        **published("controlnet_sd15", "control_model."),
        **published("sd15_unet", "model.diffusion_model."),
        **published("sd15_vae", "first_stage_model."),
    }
    answer = detect(tensors)
    assert isinstance(answer, Match) and answer.family.key == "controlnet/sd15"
    assert not answer.moved.unknown and len(answer.moved.ignored) == 686 + 248


def test_differences_are_told_from_a_controlnet() -> None:
    names = {name.partition(".")[2]: one for name, one in native("controlnet/sd15").items()}
    mark = {"difference": lazy(torch.ones(1))}
    assert found(names | mark) == ("controlnet/difference", "bare")
    prefixed = {f"control_model.{name}": one for name, one in names.items()}
    assert found(prefixed) == ("controlnet/sd15", "single")
    assert found(prefixed | mark) == ("controlnet/difference", "single")
    kind = FAMILIES["controlnet/difference"]
    for arrangement in kind.arrangements:
        own = {f"control.{name}": one for name, one in (names | mark).items()}
        there = arrangement.layout(own, backward=True).backward(own)
        there.refuse_leftovers("native")
        assert "difference" in there.tensors
        assert arrangement.layout(there.tensors).forward(there.tensors).tensors.keys() == own.keys()


def test_a_control_lora_is_recognised_and_no_network_yet() -> None:
    tensors: Tensors = {"lora_controlnet": lazy(torch.empty(0))}
    for name, tensor in ControlNet(SDXL).state_dict().items():
        if name.startswith(("input_hint", "zero_convs", "middle_block_out")) or tensor.ndim == 1:
            tensors[name] = lazy(tensor)
        else:
            tensors[name.replace(".weight", ".up")] = lazy(torch.zeros(len(tensor), 2))
            tensors[name.replace(".weight", ".down")] = lazy(torch.zeros(2, tensor[0].numel()))
    assert found(tensors) == ("controlnet/control-lora", "bare")
    with pytest.raises(BadInput, match="control_lora"):
        FAMILIES["controlnet/control-lora"].parts[0].build({})


def test_models_and_other_files_are_none_of_these() -> None:
    unet = UNet(
        UNetShape(
            model_channels=64,
            channel_mult=(1, 2),
            transformer_depth=(1, 1),
            middle_depth=1,
            context_dim=24,
            heads=8,
        )
    )
    for layout in (FAMILIES["sd1"].arrangements[2], FAMILIES["sd1"].arrangements[3]):
        own = {f"denoiser.{name}": lazy(tensor) for name, tensor in unet.state_dict().items()}
        file = layout.layout(own, backward=True).backward(own).tensors
        answer = detect(file, among=OWN)
        assert isinstance(answer, Unknown) and not answer.parts
    assert isinstance(detect({"emb_params": lazy(torch.zeros(1, 8))}, among=OWN), Unknown)


@EVERY
def test_kinds_do_not_claim_each_other(key: str) -> None:
    shapes = {name: one.shape for name, one in native(key).items()}
    mine = [kind.key for kind in OWN if kind.recognise(shapes) is None]
    assert mine == [key]


@pytest.mark.parametrize(
    ("key", "lost"),
    [
        ("controlnet/sd15", "control.zero_convs.0.0.weight"),
        ("controlnet/sd15", "control.input_hint_block.0.weight"),
        ("controlnet/flux", "control.x_embedder.weight"),
        ("controlnet/sd3", "control.pos_embed.proj.weight"),
        ("t2i-adapter/sd", "adapter.conv_in.weight"),
        ("ip-adapter/plus", "adapter.image_proj.latents"),
    ],
)
def test_what_is_missing_is_named(key: str, lost: str) -> None:
    shapes = {name: one.shape for name, one in native(key).items() if name != lost}
    assert lost.partition(".")[2] in (FAMILIES[key].recognise(shapes) or "")


def test_face_adapters_are_refused() -> None:
    shapes = {name: one.shape for name, one in native("ip-adapter/image").items()}
    shapes["adapter.ip_adapter.0.to_q_lora.down.weight"] = (4, 64)
    assert "to_q_lora" in (FAMILIES["ip-adapter/image"].recognise(shapes) or "")


def test_a_renamed_tensor_is_refused_by_name() -> None:
    names = {name.partition(".")[2]: one for name, one in native("controlnet/sd15").items()}
    names["zero_convz.1.0.weight"] = names.pop("zero_convs.1.0.weight")
    answer = detect(names)
    assert isinstance(answer, Match)
    with pytest.raises(BadFile, match="zero_convz"):
        answer.moved.refuse_leftovers("file")


def test_names_are_found() -> None:
    families()
    assert FAMILIES["controlnet"].key == "controlnet/sd15"
    assert FAMILIES["T2I-Adapter"].key == "t2i-adapter/sd"
    assert FAMILIES["ip-adapter"].key == "ip-adapter/image"
    assert {kind.parts[0].name for kind in OWN} == {"control", "adapter"}
    assert len(OWN) == 13
