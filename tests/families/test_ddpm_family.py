"""DDPM pixel models as a family: recognised by the shapes that were published, in each layout, and no others."""

from __future__ import annotations

import pytest
import torch
from tests.nets.inventories import KEYS, inventory, shapes_of

from sumuk.base.errors import BadFile
from sumuk.families import ddpm
from sumuk.families.family import FAMILIES, Arrangement, Facts, Family, Latent
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.ddpm import PixelUNet, PixelUNetShape

VARIANTS = {"pixel": ddpm.PIXEL, "cifar10": ddpm.CIFAR10, "celeba": ddpm.CELEBA, "lsun": ddpm.LSUN}
TINY = PixelUNetShape(
    model_channels=32, channel_mult=(1, 2, 2, 2), attends=(False, True, False, False), num_res_blocks=1
)
OTHER = PixelUNetShape(
    model_channels=32, channel_mult=(1, 1, 2), attends=(True, False, True), num_res_blocks=2
)


def never() -> torch.Tensor:
    raise AssertionError("only names and shapes are known")


def headers(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> Tensors:
    return {prefix + name: Lazy(shape, "F32", never) for name, shape in shapes.items()}


def native(shape: PixelUNetShape) -> Tensors:
    torch.manual_seed(0)
    return {
        f"denoiser.{name}": lazy(torch.randn(v.shape)) for name, v in PixelUNet(shape).state_dict().items()
    }


def answers(tensors: Tensors, arrangement: Arrangement) -> dict[str, str | None]:
    """What each variant says of a file in one layout."""
    moved = arrangement.layout(tensors).forward(tensors).tensors
    return {name: f.recognise({k: one.shape for k, one in moved.items()}) for name, f in VARIANTS.items()}


def mine(tensors: Tensors, arrangement: Arrangement) -> list[str]:
    return [name for name, reason in answers(tensors, arrangement).items() if reason is None]


@pytest.mark.parametrize(
    ("name", "variant", "arrangement", "prefix"),
    [
        ("ddpm_cifar10", "cifar10", ddpm.SINGLE, ""),
        ("ddpm_celeba", "celeba", ddpm.BARE_PARALLEL, "module."),
        ("ddpm_lsun_bedroom", "lsun", ddpm.SINGLE, ""),
        ("ddpm_lsun_church", "lsun", ddpm.SINGLE, ""),
        ("ddpm_cifar10.diffusers", "cifar10", ddpm.BARE_DIFFUSERS, ""),
        ("ddpm_cifar10.diffusers", "cifar10", ddpm.DIFFUSERS, "unet/"),
        ("ddpm_lsun_256.diffusers", "lsun", ddpm.DIFFUSERS, "unet/"),
    ],
)
def test_published_files(name: str, variant: str, arrangement: Arrangement, prefix: str) -> None:
    tensors = headers(inventory(name), prefix)
    moved = arrangement.layout(tensors).forward(tensors)
    assert not moved.unknown and not moved.halves and not moved.ignored
    assert mine(tensors, arrangement) == [variant]
    for other in ddpm.PIXEL.arrangements:
        if other is not arrangement:
            assert not mine(tensors, other)


@pytest.mark.parametrize("original", ["ddpm_cifar10", "ddpm_lsun_bedroom"])
def test_their_names_are_those_of_the_published_folders(original: str) -> None:
    theirs = inventory({"ddpm_cifar10": "ddpm_cifar10.diffusers"}.get(original, "ddpm_lsun_256.diffusers"))
    tensors = headers(inventory(original), "denoiser.")
    moved = ddpm.BARE_DIFFUSERS.layout(tensors, backward=True).backward(tensors)
    assert not moved.unknown
    assert {name: one.shape for name, one in moved.tensors.items()} == theirs


def test_any_other_shape_is_the_general_variant() -> None:
    assert mine(native(OTHER), _from_native()) == ["pixel"]
    assert mine(native(TINY), _from_native()) == ["cifar10"]


def _from_native() -> Arrangement:
    return Arrangement(name="native", title="", dialect="original", parts=((ddpm.UNET, "denoiser."),))


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("temb.dense.0.weight", None, "temb.dense.0.weight"),
        ("temb.dense.0.weight", (128, 64), "[128, 64]"),
        ("conv_in.weight", (32, 6, 3, 3), "takes 6 channels"),
        ("conv_out.weight", (6, 32, 3, 3), "makes 6"),
        ("conv_out.weight", (3,), "conv_out.weight"),
        ("mid.attn_1.q.weight", None, "mid.attn_1.q.weight"),
    ],
)
def test_the_reason_names_what_is_amiss(name: str, size: tuple[int, ...] | None, why: str) -> None:
    shapes = {key: one.shape for key, one in native(TINY).items()}
    del shapes[f"denoiser.{name}"]
    if size:
        shapes[f"denoiser.{name}"] = size
    for family in VARIANTS.values():
        reason = family.recognise(shapes)
        assert reason is not None and why in reason and "\n" not in reason


@pytest.mark.skipif(not KEYS.exists(), reason="inventories absent")
def test_no_other_published_network_is_one() -> None:
    names = sorted(path.name.removesuffix(".json") for path in KEYS.glob("*.json"))
    for name in names:
        tensors = headers(inventory(name))
        found = []
        for arrangement in ddpm.PIXEL.arrangements:
            try:
                found += mine(tensors, arrangement)
            except BadFile:
                continue
        assert len(found) == name.startswith("ddpm_"), name


@pytest.mark.parametrize("arrangement", ddpm.PIXEL.arrangements, ids=lambda a: a.name)
@pytest.mark.parametrize("shape", [TINY, OTHER], ids=["cifar10", "other"])
def test_there_and_back_bit_for_bit(arrangement: Arrangement, shape: PixelUNetShape) -> None:
    ours = native(shape)
    there = arrangement.layout(ours, backward=True).backward(ours)
    assert not there.unknown and not there.halves and len(there.tensors) == len(ours)
    back = arrangement.layout(there.tensors).forward(there.tensors)
    assert not back.unknown and not back.halves and back.tensors.keys() == ours.keys()
    for name, one in ours.items():
        assert torch.equal(back.tensors[name].load(), one.load()), name


def test_older_names_of_attention_are_understood() -> None:
    ours = native(TINY)
    layout = ddpm.BARE_DIFFUSERS.layout(ours, backward=True)
    theirs = layout.backward(ours).tensors
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = dict(theirs)
    for name in theirs:
        for now, then in new.items():
            if f".{now}." in name:
                older[name.replace(f".{now}.", f".{then}.")] = older.pop(name)
    assert older.keys() != theirs.keys()
    moved = ddpm.BARE_DIFFUSERS.layout(older).forward(older)
    assert not moved.unknown and moved.tensors.keys() == ours.keys()
    one = "denoiser.down.1.attn.0.k.weight"
    assert torch.equal(moved.tensors[one].load(), ours[one].load())


def test_a_renamed_tensor_is_refused_by_name() -> None:
    tensors = {name.removeprefix("denoiser."): one for name, one in native(TINY).items()}
    tensors["middle.block_1.norm1.weight"] = tensors.pop("mid.block_1.norm1.weight")
    moved = ddpm.SINGLE.layout(tensors).forward(tensors)
    with pytest.raises(BadFile, match=r"middle\.block_1\.norm1\.weight"):
        moved.refuse_leftovers("file")


def test_what_they_say_of_themselves() -> None:
    sizes = {name: family.defaults.size for name, family in VARIANTS.items()}
    assert sizes == {"pixel": 64, "cifar10": 32, "celeba": 64, "lsun": 256}
    for family in VARIANTS.values():
        assert isinstance(family, Family) and FAMILIES[family.key] is family
        assert family.latent == Latent(channels=3, stride=1, scale=1.0)
        assert (family.readings, family.guidance, family.prediction) == ((), "none", "eps")
        assert [part.name for part in family.parts] == ["denoiser"]
        assert 1 - family.schedule().level(0).alpha ** 2 == pytest.approx(1e-4)
    assert FAMILIES["ddpm"] is ddpm.PIXEL


def test_a_folder_is_what_diffusers_opens() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        shapes = shapes_of(PixelUNet(OTHER))
        facts = Facts(prediction="eps", zero_snr=False, latent=ddpm.PIXEL.latent, size=48)
        said = ddpm.PIXEL.folder(facts)
        config = ddpm.UNET.config(shapes) | said["unet/config.json"]
        theirs = diffusers.UNet2DModel.from_config(config)
    assert theirs.config.sample_size == 48
    ours = headers(shapes, "denoiser.")
    there = ddpm.DIFFUSERS.layout(ours, backward=True).backward(ours).tensors
    assert {name.removeprefix("unet/"): one.shape for name, one in there.items()} == shapes_of(theirs)
    scheduler = diffusers.DDPMScheduler.from_config(said["scheduler/scheduler_config.json"])
    level = ddpm.PIXEL.schedule().level(500)
    assert float(scheduler.alphas_cumprod[500]) == pytest.approx(level.alpha**2, rel=1e-5)
    assert said["model_index.json"]["_class_name"] == "DDPMPipeline"


def test_the_part_builds_what_was_read() -> None:
    with torch.device("meta"):
        shapes = shapes_of(PixelUNet(OTHER))
        assert shapes_of(ddpm.UNET.build(shapes)) == shapes
