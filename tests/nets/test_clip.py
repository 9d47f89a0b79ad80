"""The CLIP text towers: published names, parity with transformers, skipping, pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.clip import ClipShape, ClipText, OpenClipText, TextOutput, clip_shape, open_clip_shape

SMALL = ClipShape(vocabulary=100, length=16, width=128, depth=3, hidden=192)
OPTIONAL = {"text_model.embeddings.position_ids", "logit_scale"}  # in files, not parameters


def without_optional(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key: size for key, size in shapes.items() if key not in OPTIONAL}


def shaken(tower: ClipText | OpenClipText, seed: int = 0) -> Any:
    """Moves biases and norms off their 0 and 1, so that a misplaced one shows."""
    generator = torch.Generator().manual_seed(seed)
    for value in tower.eval().requires_grad_(False).parameters():
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return tower


def some_ids(shape: ClipShape, batch: int = 3, seed: int = 1) -> Tensor:
    ids = torch.randint(
        1, shape.vocabulary - 2, (batch, shape.length), generator=torch.Generator().manual_seed(seed)
    )
    ids[:, 0] = shape.vocabulary - 2
    for row in range(batch):
        ids[row, 4 + row :] = shape.vocabulary - 1
    return ids


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        "sd15_clip_l",
        "sdxl_base_clip_l",
        "sd3_clip_l.diffusers",
        "clip_l.diffusers",
        "clip_g.diffusers",
        "sd2_clip_h.diffusers",
    ],
)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    published = inventory(name)
    with torch.device("meta"):
        tower = ClipText(clip_shape(published))
    assert shapes_of(tower) == without_optional(published)


@pytest.mark.parametrize("name", ["sd2_openclip_h", "sdxl_base_openclip_g", "sdxl_refiner_openclip_g"])
def test_openclip_names_and_shapes_are_the_published_ones(name: str) -> None:
    published = inventory(name)
    with torch.device("meta"):
        tower = OpenClipText(open_clip_shape(published))
    assert shapes_of(tower) == without_optional(published)


def test_published_sizes() -> None:
    large = clip_shape(inventory("sd15_clip_l"))
    assert large == ClipShape() and large.heads == 12
    giant = open_clip_shape(inventory("sdxl_base_openclip_g"))
    assert giant == ClipShape(width=1280, depth=32, hidden=5120, projection=1280) and giant.heads == 20


@pytest.mark.parametrize("projection", [None, 48])
def test_shape_is_read_back_from_any_header(projection: int | None) -> None:
    shape = ClipShape(vocabulary=700, length=32, width=64, depth=2, hidden=100, projection=projection)
    with torch.device("meta"):
        assert clip_shape(shapes_of(ClipText(shape))) == shape
        assert open_clip_shape(shapes_of(OpenClipText(shape))) == shape


def transformers_twin(tower: ClipText, activation: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = tower.shape
    config = transformers.CLIPTextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        projection_dim=shape.projection or 512,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        hidden_act=activation,
        eos_token_id=tower.eos,
        bos_token_id=shape.vocabulary - 2,
        pad_token_id=0,
    )
    kind = (
        transformers.CLIPTextModel if shape.projection is None else transformers.CLIPTextModelWithProjection
    )
    twin = kind(config).eval().requires_grad_(False)
    wanted = set(twin.state_dict())
    weights = tower.state_dict()
    if not any(key.startswith("text_model.") for key in wanted):  # transformers 5 drops it from CLIPTextModel
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    twin.load_state_dict(weights, strict=False)
    assert set(weights) == {key for key in wanted if not key.endswith("position_ids")}
    return twin


def parity(tower: ClipText | OpenClipText, twin: torch.nn.Module, ids: Tensor) -> float:
    ours, theirs = tower(ids), twin(input_ids=ids, output_hidden_states=True)
    assert len(ours.hidden) == len(theirs.hidden_states)
    errors = [relative(a, b) for a, b in zip(ours.hidden, theirs.hidden_states, strict=True)]
    errors.append(relative(ours.last, theirs.last_hidden_state))
    if tower.shape.projection is None:
        errors.append(relative(ours.pooled, theirs.pooler_output))
    else:
        assert ours.projected is not None
        errors.append(relative(ours.projected, theirs.text_embeds))
    return max(errors)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [None, 48])
def test_equals_transformers(activation: Any, projection: int | None) -> None:
    shape = ClipShape(vocabulary=100, length=16, width=128, depth=3, hidden=192, projection=projection)
    tower = shaken(ClipText(shape, activation=activation))
    assert parity(tower, transformers_twin(tower, activation), some_ids(shape)) <= 1e-5


@pytest.mark.slow
def test_equals_transformers_at_full_width() -> None:
    tower = ClipText(ClipShape()).eval().requires_grad_(False)
    assert parity(tower, transformers_twin(tower, "quick_gelu"), some_ids(tower.shape, batch=1)) <= 1e-4


def as_transformers_names(tower: OpenClipText) -> dict[str, Tensor]:
    """The conversion that transformers' users do, written out: thirds of in_proj, projection transposed."""
    given, width = tower.state_dict(), tower.shape.width
    made = {
        "text_model.embeddings.token_embedding.weight": given["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": given["positional_embedding"],
        "text_model.final_layer_norm.weight": given["ln_final.weight"],
        "text_model.final_layer_norm.bias": given["ln_final.bias"],
    }
    if "text_projection" in given:
        made["text_projection.weight"] = given["text_projection"].T.contiguous()
    for block in range(tower.shape.depth):
        here, there = f"transformer.resblocks.{block}.", f"text_model.encoder.layers.{block}."
        for end in ("weight", "bias"):
            for index, part in enumerate("qkv"):
                rows = slice(index * width, (index + 1) * width)
                made[f"{there}self_attn.{part}_proj.{end}"] = given[f"{here}attn.in_proj_{end}"][rows]
            for ours, theirs in [
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ]:
                made[f"{there}{theirs}.{end}"] = given[f"{here}{ours}.{end}"]
    return made


@pytest.mark.parametrize("projection", [None, 48])
def test_openclip_equals_transformers(projection: int | None) -> None:
    shape = ClipShape(vocabulary=100, length=16, width=128, depth=3, hidden=192, projection=projection)
    tower = shaken(OpenClipText(shape))
    named = ClipText(shape, activation="gelu")
    named.load_state_dict(as_transformers_names(tower))
    assert parity(tower, transformers_twin(named, "gelu"), some_ids(shape)) <= 1e-5


def test_skip() -> None:
    tower = shaken(ClipText(SMALL))
    out: TextOutput = tower(some_ids(SMALL))
    assert out.skip(1) is out.last
    assert out.skip(1, norm=False) is out.hidden[3]
    assert out.skip(2, norm=False) is out.hidden[2]
    by_hand = out.hidden[2] - out.hidden[2].mean(-1, keepdim=True)
    by_hand = by_hand / (by_hand.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    norm = tower.text_model.final_layer_norm
    torch.testing.assert_close(out.skip(2), by_hand * norm.weight + norm.bias, rtol=1e-4, atol=1e-5)
    for wrong in (0, 5, -1):
        with pytest.raises(BadInput, match=f"clip skip {wrong} is outside 1..4"):
            out.skip(wrong)


def test_pooling_takes_the_first_end_token() -> None:
    tower = shaken(ClipText(SMALL, eos=7))
    ids = torch.full((3, 10), 5)
    ids[0, 3], ids[0, 8], ids[1, 9] = 7, 7, 7
    out = tower(ids)
    assert torch.equal(out.pooled, torch.stack([out.last[0, 3], out.last[1, 9], out.last[2, 9]]))


def test_nothing_reads_what_comes_later() -> None:
    tower = shaken(OpenClipText(SMALL))
    ids = some_ids(SMALL, 1)
    changed = ids.clone()
    changed[:, 9:] = 3
    assert torch.equal(tower(ids).last[:, :9], tower(changed).last[:, :9])
    assert not torch.equal(tower(ids).last[:, 9:], tower(changed).last[:, 9:])


@pytest.mark.parametrize("kind", [ClipText, OpenClipText])
def test_embeddings_replace_token_rows(kind: type[ClipText] | type[OpenClipText]) -> None:
    tower = shaken(kind(SMALL))
    ids = some_ids(SMALL)
    rows = tower.embed(ids)
    assert torch.equal(tower(ids, rows).last, tower(ids).last)
    other = ids.clone()
    other[:, 2] = 50
    rows[:, 2] = tower.embed(torch.tensor([[50]]))[0]
    assert torch.equal(tower(ids, rows).last, tower(other).last)


def test_mask_hides_tokens_as_transformers_does() -> None:
    tower = shaken(ClipText(SMALL))
    twin = transformers_twin(tower, "quick_gelu")
    ids = some_ids(SMALL)
    mask = torch.arange(SMALL.length)[None] < torch.tensor([[5], [6], [16]])
    ours, theirs = tower(ids, mask=mask), twin(input_ids=ids, attention_mask=mask.long())
    # Rows after the end count as well: Stable Cascade's stage C reads them.
    assert relative(ours.last, theirs.last_hidden_state) <= 1e-5


def test_a_batch_equals_its_members() -> None:
    for tower in (shaken(ClipText(SMALL)), shaken(OpenClipText(SMALL))):
        ids = some_ids(SMALL)
        whole = tower(ids)
        single = [tower(row[None]) for row in ids]
        torch.testing.assert_close(whole.last, torch.cat([out.last for out in single]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            whole.pooled, torch.cat([out.pooled for out in single]), rtol=1e-5, atol=1e-5
        )


def test_a_new_tower_keeps_its_scale_and_learns() -> None:
    torch.manual_seed(0)
    shape = ClipShape(vocabulary=64, length=8, width=64, depth=12, hidden=256, projection=32)
    for tower in (ClipText(shape), OpenClipText(shape)):
        out = tower(some_ids(shape))
        assert 0.5 < out.last.std() < 2.0
        assert 0.3 < out.hidden[-1].std() < 2.0  # 12 blocks deep; measured 0.86
        assert out.projected is not None
        (out.projected.square().mean() + out.last[..., 0].mean()).backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in tower.parameters())


def test_bfloat16() -> None:
    tower = shaken(ClipText(SMALL))
    ids = some_ids(SMALL)
    exact = tower(ids).last
    rough = tower.bfloat16()(ids, tower.embed(ids).float()).last
    assert rough.dtype == torch.bfloat16 and relative(rough.float(), exact) < 0.05


def test_wrong_headers_and_inputs_are_refused() -> None:
    with pytest.raises(BadFile, match="token_embedding"):
        clip_shape({})
    with pytest.raises(BadFile, match="positional_embedding"):
        open_clip_shape({"token_embedding.weight": (10, 64)})
    with pytest.raises(BadInput, match="96"):
        ClipShape(width=96)
    tower = ClipText(SMALL)
    with pytest.raises(BadInput, match=r"1\.\.16"):
        tower(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(BadInput, match="embeddings"):
        tower(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5, 128))
    with pytest.raises(BadInput, match="mask"):
        tower(torch.zeros(1, 4, dtype=torch.long), mask=torch.ones(1, 5))
