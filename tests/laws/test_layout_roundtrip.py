"""What every layout of every family must obey.

There and back is the identity, on names, shapes and numbers; and nothing is left over in either direction: what a
layout has no place for it names. Each family lends its animal from the zoo; Stable Diffusion 1 also networks at random,
with any number of levels and blocks, with and without attention. For those that were published, the names are compared
with the published ones.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from examples import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from sumuk.families.detect import families
from sumuk.families.diffusers import unet_rules, vae_rules
from sumuk.families.family import Arrangement, Family
from sumuk.families.sd import DIFFUSERS, SINGLE
from sumuk.files.layout import Layout
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.clip import ClipShape, ClipText
from sumuk.nets.unet import UNet, UNetShape
from sumuk.nets.vae import Vae, VaeShape

KEYS = Path(__file__).parents[2].parent / "shared" / "facts" / "keys"
SD1 = (SINGLE, DIFFUSERS)
EVERY = [
    pytest.param(family.key, arrangement, id=f"{family.key}-{arrangement.name}")
    for family in families()
    if isinstance(family, Family)
    for arrangement in family.arrangements
    if not arrangement.name.startswith("bare")
]


@st.composite
def networks(draw: st.DrawFn) -> dict[str, torch.nn.Module]:
    levels = draw(st.integers(1, 3))
    depth = tuple(draw(st.lists(st.integers(0, 2), min_size=levels, max_size=levels)))
    unet = UNetShape(
        in_channels=draw(st.sampled_from([4, 8, 9])),
        model_channels=32,
        channel_mult=tuple(draw(st.lists(st.integers(1, 2), min_size=levels, max_size=levels))),
        num_res_blocks=draw(st.integers(1, 3)),
        transformer_depth=depth,
        middle_depth=draw(st.integers(1, 2)),
        context_dim=64,
        heads=8,
        linear=draw(st.booleans()),
    )
    multiples = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=4)))
    vae = VaeShape(
        width=32,
        multiples=multiples,
        blocks=draw(st.integers(1, 2)),
        quantised=draw(st.sampled_from([4, None])),
    )
    text = ClipShape(vocabulary=20, length=8, width=64, depth=draw(st.integers(1, 3)), hidden=64)
    with torch.device("meta"):
        return {"denoiser": UNet(unet), "vae": Vae(vae), "text": ClipText(text)}


def tensors_of(parts: dict[str, torch.nn.Module], values: bool = False) -> Tensors:
    made: Tensors = {}
    for part, network in parts.items():
        for name, value in network.state_dict().items():
            made[f"{part}.{name}"] = lazy(torch.randn(value.shape) if values else value)
    return made


@pytest.mark.parametrize("arrangement", SD1, ids=lambda each: each.name)
@settings(max_examples=10, deadline=None)
@given(parts=networks())
def test_there_and_back_is_the_identity_on_names_and_shapes(
    arrangement: Arrangement, parts: dict[str, torch.nn.Module]
) -> None:
    native = tensors_of(parts)
    there = arrangement.layout(native, backward=True).backward(native)
    assert not there.unknown and not there.halves and not there.ignored
    back = arrangement.layout(there.tensors).forward(there.tensors)
    assert not back.unknown and not back.halves and not back.ignored
    assert {name: one.shape for name, one in back.tensors.items()} == {
        name: one.shape for name, one in native.items()
    }
    assert sum(one.parameters for one in there.tensors.values()) == sum(
        one.parameters for one in native.values()
    )


@pytest.mark.parametrize("arrangement", SD1, ids=lambda each: each.name)
def test_there_and_back_is_the_identity_on_numbers(arrangement: Arrangement) -> None:
    shape = UNetShape(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        transformer_depth=(1, 0),
        middle_depth=1,
        context_dim=64,
        heads=8,
    )
    vae, text = (
        VaeShape(width=32, multiples=(1, 2), blocks=1),
        ClipShape(vocabulary=20, length=8, width=64, depth=1, hidden=64),
    )
    native = tensors_of({"denoiser": UNet(shape), "vae": Vae(vae), "text": ClipText(text)}, values=True)
    there = arrangement.layout(native, backward=True).backward(native).tensors
    back = arrangement.layout(there).forward(there).tensors
    for name, one in native.items():
        assert torch.equal(back[name].load(), one.load()), name


@pytest.mark.parametrize(("key", "arrangement"), EVERY)
def test_every_family_there_and_back(key: str, arrangement: Arrangement) -> None:
    assert key in zoo.ZOO, f"add a tiny model of {key} to examples/zoo.py"
    networks = zoo.tiny("cascade/stage-c" if key in zoo.COMPLETES else key).networks
    held = {part.name for part, _ in arrangement.parts}
    native: Tensors = {
        f"{part}.{name}": lazy(value)
        for part, network in networks.items()
        if part in held
        for name, value in network.state_dict().items()
    }
    there = arrangement.layout(native, backward=True).backward(native)
    assert not there.unknown and not there.halves
    back = arrangement.layout(there.tensors).forward(there.tensors)
    assert not back.unknown and not back.halves
    assert set(back.tensors) == set(native) - set(there.ignored), "dropped, and not named"
    for name, one in back.tensors.items():
        assert torch.equal(one.load(), native[name].load()), name


def inventory(name: str) -> Tensors:
    def never() -> torch.Tensor:
        raise AssertionError("only names and shapes are known")

    path = KEYS / f"{name}.json"
    if not path.exists():
        pytest.skip("the inventories of published files are not here")
    return {
        key: Lazy(tuple(shape), "F32", never)
        for key, shape in json.loads(path.read_text())["tensors"].items()
    }


PUBLISHED = {
    "sd15_unet": unet_rules,
    "sd15_inpaint_unet": unet_rules,
    "sd21_unet": unet_rules,
    "sd15_vae": vae_rules,
    "sd2_x4_vae": vae_rules,
    "sd3_vae": vae_rules,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name: str) -> None:
    """Key by key against what the published converters do, in both directions."""
    theirs, ours = inventory(f"{name}.diffusers"), inventory("sd2_unet" if name == "sd21_unet" else name)
    rules = PUBLISHED[name]
    forward, backward = Layout(*rules(theirs)).forward(theirs), Layout(*rules(ours)).backward(ours)
    assert not forward.unknown and not backward.unknown
    assert {key: one.shape for key, one in forward.tensors.items()} == {
        key: one.shape for key, one in ours.items()
    }
    assert {key: one.shape for key, one in backward.tensors.items()} == {
        key: one.shape for key, one in theirs.items()
    }
    maps = KEYS / "maps" / f"{'sd2_unet' if name == 'sd21_unet' else name}__to_diffusers.json.gz"
    if maps.exists():
        known = json.loads(gzip.decompress(maps.read_bytes()))["map"]
        assert {key: sources[0] for key, sources in backward.origin.items()} == known
