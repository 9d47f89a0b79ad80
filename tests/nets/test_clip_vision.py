"""CLIP's image towers: published sizes, parity with transformers, the preparation of pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.nets.inventories import shapes_of
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import attention_kernel
from sumuk.nets.clip import Activation
from sumuk.nets.clip_vision import (
    MEAN,
    SIZE,
    STD,
    ClipVision,
    ClipVisionShape,
    clip_pixels,
    clip_vision_shape,
    published_activation,
    published_heads,
)

SMALL = ClipVisionShape(width=48, depth=3, hidden=80, patch=7, side=4, projection=20, heads=4)
LARGE = ClipVisionShape()
HUGE = ClipVisionShape(width=1280, depth=32, hidden=5120, projection=1024)
BIG_G = ClipVisionShape(width=1664, depth=48, hidden=8192, projection=1280)
OLD = "vision_model.embeddings.position_ids"


def shaken(tower: ClipVision, seed: int = 0) -> ClipVision:
    """Every parameter off its 0 and 1, so that a misplaced one shows."""
    generator = torch.Generator().manual_seed(seed)
    for value in tower.eval().requires_grad_(False).parameters():
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return tower


def twin(shape: ClipVisionShape, activation: str = "quick_gelu", meta: bool = False) -> Any:
    """transformers' tower of that shape."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        projection_dim=shape.projection,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_channels=shape.colours,
        image_size=shape.size,
        patch_size=shape.patch,
        hidden_act=activation,
    )
    with torch.device("meta" if meta else "cpu"):
        return transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# -- names and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "millions"),  # as OpenCLIP's table of models gives them
    [(LARGE, 303.97), (HUGE, 632.08), (BIG_G, 1844.91)],
    ids=["L", "H", "bigG"],
)
def test_names_and_shapes_are_those_of_transformers(shape: ClipVisionShape, millions: float) -> None:
    published = shapes_of(twin(shape, meta=True))
    assert clip_vision_shape(published) == shape and shape.size == SIZE and shape.heads == 16
    with torch.device("meta"):
        tower = ClipVision(shape)
    assert shapes_of(tower) == published
    assert round(sum(value.numel() for value in tower.parameters()) / 1e6, 2) == millions


def test_rules_of_the_published_towers() -> None:
    assert [1024 // published_heads(1024), 1280 // published_heads(1280), 1664 // published_heads(1664)] == [
        64,
        80,
        104,
    ]
    assert [published_heads(width) for width in (32, 64, 768)] == [1, 1, 12]
    assert [published_activation(width) for width in (768, 1024, 1280, 1664)] == ["quick_gelu"] * 2 + [
        "gelu"
    ] * 2


@pytest.mark.parametrize("projection", [None, 20])
def test_shape_is_read_back_from_any_header(projection: int | None) -> None:
    shape = replace(SMALL, projection=projection)
    with torch.device("meta"):
        shapes = shapes_of(ClipVision(shape))
    assert clip_vision_shape(shapes, heads=4) == shape
    assert clip_vision_shape(shapes | {OLD: (1, 17)}, heads=4) == shape
    assert clip_vision_shape(shapes).heads == 1


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("vision_model.embeddings.patch_embedding.weight", None),
        ("vision_model.embeddings.patch_embedding.weight", (48, 3)),
        ("vision_model.embeddings.patch_embedding.weight", (50, 3, 7, 7)),
        ("vision_model.embeddings.position_embedding.weight", None),
        ("vision_model.embeddings.position_embedding.weight", (18, 48)),
        ("vision_model.embeddings.position_embedding.weight", (1, 48)),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("visual_projection.weight", (0, 48)),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(key: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(ClipVision(SMALL))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile, match="tensor ") as caught:
        clip_vision_shape(shapes, heads=4)
    assert key in str(caught.value)


def test_contradictory_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match="heads 5 does not divide"):
        replace(SMALL, heads=5)
    with pytest.raises(BadInput, match="depth=0"):
        replace(SMALL, depth=0)


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_equals_transformers(activation: Activation) -> None:
    tower = shaken(ClipVision(SMALL, activation=activation))
    theirs = twin(SMALL, activation)
    theirs.load_state_dict(tower.state_dict(), strict=True)
    pixels = torch.randn(3, 3, SMALL.size, SMALL.size, generator=torch.Generator().manual_seed(1))
    got, want = tower(pixels), theirs(pixels, output_hidden_states=True)
    assert len(got.hidden) == len(want.hidden_states) == SMALL.depth + 1
    for ours, wanted in zip(got.hidden, want.hidden_states, strict=True):
        assert relative(ours, wanted) <= 2e-6
    assert got.penultimate is got.hidden[-2]
    assert relative(got.penultimate, want.hidden_states[-2]) <= 2e-6
    assert got.projected is not None and relative(got.projected, want.image_embeds) <= 2e-6
    assert relative(got.pooled, theirs.vision_model(pixels).pooler_output) <= 2e-6
    other = ClipVision(SMALL, activation="gelu" if activation == "quick_gelu" else "quick_gelu").eval()
    other.load_state_dict(tower.state_dict())
    assert relative(other(pixels).pooled, got.pooled) > 1e-3  # the activations do differ here


@torch.no_grad()
def test_without_a_projection_there_is_none() -> None:
    tower = shaken(ClipVision(replace(SMALL, projection=None)))
    got = tower(torch.randn(1, 3, 28, 28))
    assert got.projected is None and got.pooled.shape == (1, 48)


@torch.no_grad()
def test_other_kernels_and_bfloat16_change_only_the_rounding() -> None:
    tower, pixels = shaken(ClipVision(SMALL)), torch.randn(2, 3, 28, 28)
    want = tower(pixels)
    with attention_kernel("matmul"):
        assert relative(tower(pixels).pooled, want.pooled) <= 2e-6
    low = tower.bfloat16()(pixels)  # in float32: it takes the tower's own
    assert low.pooled.dtype == torch.bfloat16
    assert relative(low.pooled.float(), want.pooled) <= 0.1


def test_what_does_not_fit_is_refused() -> None:
    with torch.device("meta"):
        tower = ClipVision(SMALL)
        for wrong in (torch.zeros(1, 3, 28, 27), torch.zeros(1, 4, 28, 28), torch.zeros(3, 28, 28)):
            with pytest.raises(BadInput, match=r"\[B, 3, 28, 28\]"):
                tower(wrong)
    with pytest.raises(BadInput, match=r"\[B, 3, height, width\]"):
        clip_pixels(torch.zeros(1, 1, 8, 8))


# -- pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(224, 224), (256, 256), (300, 451), (513, 260), (97, 61), (224, 301)], ids=str
)
def test_pixels_equal_those_of_transformers(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rows, columns = torch.meshgrid(*(torch.linspace(0, 9, side) for side in size), indexing="ij")
    waves = torch.stack((rows.sin(), (rows * columns / 9).cos(), (columns - rows).sin()), dim=-1)
    picture = (waves * 90 + 127).round().to(torch.uint8)
    prepared = CLIPImageProcessorPil()(picture.numpy(), return_tensors="np")
    want = torch.from_numpy(np.asarray(prepared["pixel_values"]))
    got = clip_pixels(picture.permute(2, 0, 1)[None] / 127.5 - 1)
    assert got.shape == want.shape == (1, 3, SIZE, SIZE)
    levels = (got - want).abs() * torch.tensor(STD)[:, None, None] * 255
    assert float(levels.max()) <= 1.51  # theirs rounds to whole levels twice: after rows and after columns
    assert float(levels.mean()) <= 0.5


def test_pixels_are_normalised_and_keep_their_dtype() -> None:
    white = clip_pixels(torch.ones(1, 3, 30, 50))
    torch.testing.assert_close(white[0, :, 5, 5], (1 - torch.tensor(MEAN)) / torch.tensor(STD))
    assert clip_pixels(torch.zeros(1, 3, 9, 9, dtype=torch.bfloat16), 14).dtype == torch.bfloat16
    assert clip_pixels(torch.zeros(2, 3, 9, 20), 14).shape == (2, 3, 14, 14)
