"""OpenCLIP's towers against the transformers library: names, numbers, and the tower that ends where it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor

from sumuk.base.errors import BadFile
from sumuk.families.openclip import OPENCLIP_G, OPENCLIP_H, layer_read, openclip_rules
from sumuk.files.layout import Layout, Moved
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.clip import ClipShape, OpenClipText, open_clip_shape

SMALL = ClipShape(vocabulary=100, length=16, width=128, depth=3, hidden=192, projection=64)


def lazies(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: Lazy(shape, "F16", lambda: torch.empty(0)) for name, shape in shapes.items()}


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in tensors.items()}


def there(part: Any, native: Tensors) -> Moved:
    return Layout(*part.diffusers(native)).backward(native)


def back(part: Any, foreign: Tensors) -> Moved:
    return Layout(*part.diffusers(foreign)).forward(foreign)


def tower(shape: ClipShape = SMALL) -> Any:
    torch.manual_seed(0)
    made = OpenClipText(shape).eval().requires_grad_(False)
    for value in made.parameters():
        value.add_(0.1 * torch.randn(value.shape))
    return made


def some_ids(shape: ClipShape = SMALL) -> Tensor:
    """Three texts, filled up with zeros, as these towers are."""
    ids = torch.randint(
        1, shape.vocabulary - 2, (3, shape.length), generator=torch.Generator().manual_seed(1)
    )
    ids[:, 0] = shape.vocabulary - 2
    for row in range(3):
        ids[row, 4 + row] = shape.vocabulary - 1
        ids[row, 5 + row :] = 0
    return ids


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def twin(kind: str, config: dict[str, Any], weights: Tensors) -> Any:
    """The transformers library's tower with these tensors."""
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, kind)(transformers.CLIPTextConfig(**config)).eval().requires_grad_(False)
    state = {name: one.load() for name, one in weights.items()}
    if not any(name.startswith("text_model.") for name in made.state_dict()):  # transformers 5 leaves it out
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    lost, extra = made.load_state_dict(state, strict=False)
    assert not extra and not [name for name in lost if not name.endswith("position_ids")]
    return made


# -- names ---------------------------------------------------------------------------------------------------


def test_big_g_lands_on_the_published_names() -> None:
    native = inventory("sdxl_base_openclip_g")
    del native["logit_scale"]
    foreign = inventory("clip_g.diffusers")
    moved = back(OPENCLIP_G, lazies(foreign))
    assert shapes(moved.tensors) == native and not moved.unknown and not moved.halves
    moved = there(OPENCLIP_G, lazies(native))
    assert shapes(moved.tensors) == foreign and not moved.unknown and not moved.ignored
    for third, letter in enumerate("qkv"):
        name = f"text_model.encoder.layers.7.self_attn.{letter}_proj.weight"
        assert moved.origin[name] == ["transformer.resblocks.7.attn.in_proj_weight"]
        origin = back(OPENCLIP_G, lazies(foreign)).origin["transformer.resblocks.7.attn.in_proj_weight"]
        assert origin[third] == name


def test_h_loses_its_last_block_and_projection_in_a_diffusers_folder() -> None:
    native = inventory("sd2_openclip_h")
    del native["logit_scale"]
    moved = there(OPENCLIP_H, lazies(native))
    foreign = inventory("sd2_clip_h.diffusers")
    assert shapes(moved.tensors) == foreign and not moved.unknown
    assert len(moved.ignored) == 12 + 1
    assert all(name == "text_projection" or ".resblocks.23." in name for name in moved.ignored)
    short = back(OPENCLIP_H, lazies(foreign))
    kept = {name: size for name, size in native.items() if name not in moved.ignored}
    assert shapes(short.tensors) == kept and not short.unknown
    again = there(OPENCLIP_H, short.tensors)
    assert shapes(again.tensors) == foreign and not again.ignored


def test_the_layer_that_is_read() -> None:
    whole, short = (
        open_clip_shape(inventory("sd2_openclip_h")),
        open_clip_shape(shapes(back(OPENCLIP_H, lazies(inventory("sd2_clip_h.diffusers"))).tensors)),
    )
    assert (whole.depth, layer_read(whole)) == (24, 2)
    assert (short.depth, layer_read(short)) == (23, 1)


def test_towers_without_the_leading_name_are_read_as_well() -> None:
    foreign = inventory("sd2_clip_h.diffusers")
    headless = {name.removeprefix("text_model."): size for name, size in foreign.items()}
    assert shapes(back(OPENCLIP_H, lazies(headless)).tensors) == shapes(
        back(OPENCLIP_H, lazies(foreign)).tensors
    )


@pytest.mark.parametrize(("part", "name"), [(OPENCLIP_G, "clip_g"), (OPENCLIP_H, "sd2_clip_h")])
def test_the_configuration_is_the_published_one(part: Any, name: str) -> None:
    native = inventory({"clip_g": "sdxl_base_openclip_g", "sd2_clip_h": "sd2_openclip_h"}[name])
    said = part.config({key: size for key, size in native.items() if key != "logit_scale"})
    layers = {key for key in inventory(f"{name}.diffusers") if key.endswith(".mlp.fc1.weight")}
    assert said["num_hidden_layers"] == len(layers) == {"clip_g": 32, "sd2_clip_h": 23}[name]
    assert said["hidden_size"] == {"clip_g": 1280, "sd2_clip_h": 1024}[name]
    assert said["num_attention_heads"] * 64 == said["hidden_size"] and said["hidden_act"] == "gelu"
    assert said["architectures"] == [
        {"clip_g": "CLIPTextModelWithProjection", "sd2_clip_h": "CLIPTextModel"}[name]
    ]


def test_half_of_a_fused_set_and_unknown_names_are_reported() -> None:
    foreign = there(OPENCLIP_G, {name: lazy(value) for name, value in tower().state_dict().items()}).tensors
    lost = foreign.pop("text_model.encoder.layers.1.self_attn.k_proj.weight")
    foreign["text_model.encoder.layers.1.self_attn.k_project.weight"] = lost
    moved = back(OPENCLIP_G, foreign)
    assert moved.unknown == ["text_model.encoder.layers.1.self_attn.k_project.weight"]
    with pytest.raises(BadFile, match="k_proj"):
        moved.refuse_leftovers("a file")


# -- numbers -------------------------------------------------------------------------------------------------


def test_there_and_back_bit_for_bit() -> None:
    network = tower()
    native = {name: lazy(value) for name, value in network.state_dict().items()}
    moved = back(OPENCLIP_G, there(OPENCLIP_G, native).tensors)
    assert shapes(moved.tensors) == shapes_of(network)
    assert all(torch.equal(moved.tensors[name].load(), value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("projection", [64, 128])
@torch.no_grad()
def test_equals_transformers_read_from_its_own_file(projection: int) -> None:
    """Their random weights through our rules into our tower: penultimate state and projected sentence."""
    transformers = pytest.importorskip("transformers")
    config = OPENCLIP_G.config(shapes_of(tower(ClipShape(**{**SMALL.__dict__, "projection": projection}))))
    torch.manual_seed(2)
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)).eval()
    for value in theirs.parameters():
        value.copy_(torch.randn(value.shape) * (0.1 if value.ndim == 1 else value.shape[-1] ** -0.5))
    moved = Layout(*openclip_rules(theirs.state_dict())).forward(
        {name: lazy(value) for name, value in theirs.state_dict().items() if "position_ids" not in name}
    )
    assert not moved.unknown and not moved.halves
    network = OPENCLIP_G.build(shapes(moved.tensors)).eval()
    network.load_state_dict({name: one.load() for name, one in moved.tensors.items()})
    ours, wanted = network(some_ids()), theirs(input_ids=some_ids(), output_hidden_states=True)
    assert relative(ours.skip(2, norm=False), wanted.hidden_states[-2]) <= 5e-6
    assert relative(ours.projected, wanted.text_embeds) <= 5e-6


@torch.no_grad()
def test_a_shortened_tower_says_the_same() -> None:
    network = tower()
    native = {name: lazy(value) for name, value in network.state_dict().items()}
    foreign = there(OPENCLIP_H, native).tensors
    theirs = twin("CLIPTextModel", OPENCLIP_H.config(shapes_of(network)), foreign)
    whole = network(some_ids()).skip(layer_read(network.shape))
    assert relative(whole, theirs(input_ids=some_ids()).last_hidden_state) <= 5e-6
    moved = back(OPENCLIP_H, foreign)
    short: Any = OPENCLIP_H.build(shapes(moved.tensors)).eval()
    short.load_state_dict({name: one.load() for name, one in moved.tensors.items()})
    assert short.shape.depth == 2
    assert torch.equal(short(some_ids()).skip(layer_read(short.shape)), whole)


@torch.no_grad()
def test_bfloat16_runs() -> None:
    said = tower().bfloat16()(some_ids())
    assert said.projected.dtype == torch.bfloat16 and said.projected.isfinite().all()
