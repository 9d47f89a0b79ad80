"""The T5 encoder: published names, parity with transformers, masks, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.t5 import EOS, T5Encoder, T5Shape, t5_shape

SMALL = T5Shape(vocabulary=100, width=96, depth=3, heads=4, head=16, hidden=160)
WIDE = T5Shape(vocabulary=64, width=128, depth=2, heads=2, head=64, hidden=256)


def made(shape: T5Shape = SMALL, seed: int = 0) -> T5Encoder:
    """Every parameter random: norms off 1, a large table, so that each shows."""
    generator = torch.Generator().manual_seed(seed)
    tower = T5Encoder(shape).eval().requires_grad_(False)
    for name, value in tower.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(1 + 0.2 * noise if "norm" in name else noise * value.shape[-1] ** -0.5)
    tower.shared.weight.mul_(shape.width**0.5)
    tower.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(4)
    return tower


def some_ids(shape: T5Shape, length: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(shape.vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_mask(length: int) -> Tensor:
    """The first text is read whole, the second to its middle."""
    return torch.arange(length)[None] < torch.tensor([[length], [(length + 1) // 2]])


def transformers_twin(tower: T5Encoder) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = tower.shape
    config = transformers.T5Config(
        vocab_size=shape.vocabulary,
        d_model=shape.width,
        d_kv=shape.head,
        d_ff=shape.hidden,
        num_layers=shape.depth,
        num_heads=shape.heads,
        feed_forward_proj="gated-gelu",
    )
    twin = transformers.T5EncoderModel(config).eval().requires_grad_(False)
    loaded = twin.load_state_dict(tower.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"encoder.embed_tokens.weight"}  # shared.weight again
    return twin


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_names_and_shapes_are_the_published_ones() -> None:
    published = inventory("t5_xxl_encoder")
    assert t5_shape(published) == T5Shape()
    with torch.device("meta"):
        assert shapes_of(T5Encoder(T5Shape())) == published


@pytest.mark.parametrize("shape", [SMALL, WIDE])
def test_a_small_one_takes_the_same_path(shape: T5Shape) -> None:
    assert t5_shape(shapes_of(T5Encoder(shape))) == shape


def test_other_files_are_refused() -> None:
    good = shapes_of(T5Encoder(SMALL))
    first = "encoder.block.0.layer.0.SelfAttention."
    gate = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    for name in ["shared.weight", first + "q.weight", first + "relative_attention_bias.weight", gate]:
        with pytest.raises(BadFile, match=name.replace(".", r"\.")):
            t5_shape({key: size for key, size in good.items() if key != name})
        with pytest.raises(BadFile, match="no matrix"):
            t5_shape(good | {name: (32,)})
    with pytest.raises(BadFile, match="64 buckets"):
        t5_shape(good | {first + "relative_attention_bias.weight": (64, 4)})
    for heads in (0, 5):
        with pytest.raises(BadFile, match=f"64 channels are not {heads} heads"):
            t5_shape(good | {first + "relative_attention_bias.weight": (32, heads)})
    with pytest.raises(BadInput, match="at least 1"):
        T5Shape(depth=0)


@pytest.mark.parametrize("length", [1, 7, 512])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(length: int, masked: bool) -> None:
    tower = made()
    ids, mask = some_ids(SMALL, length), some_mask(length) if masked else None
    theirs = transformers_twin(tower)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative(tower(ids, mask=mask).last, theirs) <= 2e-6


def test_equals_transformers_with_heads_of_64() -> None:
    tower = made(WIDE)
    ids = some_ids(WIDE, 33)
    assert relative(tower(ids).last, transformers_twin(tower)(input_ids=ids).last_hidden_state) <= 2e-6


def test_equals_transformers_in_bfloat16() -> None:
    """Not bit for bit, as fused attention rounds elsewhere, but within bfloat16's own error."""
    tower = made()
    ids, mask = some_ids(SMALL, 77), some_mask(77)
    exact = tower(ids, mask=mask).last
    twin = transformers_twin(tower).bfloat16()
    ours, theirs = tower.bfloat16()(ids, mask=mask).last, twin(ids, attention_mask=mask).last_hidden_state
    assert ours.dtype == torch.bfloat16 and ours.isfinite().all()
    assert relative(ours.float(), exact) <= 1.5 * relative(theirs.float(), exact) <= 0.1


def test_every_distance_has_its_bucket() -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    attention = made().encoder.block[0].layer[0].SelfAttention
    table = attention.relative_attention_bias.weight
    ahead = torch.arange(300)[None] - torch.arange(300)[:, None]
    bucket = modeling.T5Attention._relative_position_bucket(ahead)
    assert torch.equal(attention.bias(300)[0], table[bucket].permute(2, 0, 1))


def test_masked_tokens_are_not_read() -> None:
    tower, ids = made(), some_ids(SMALL, 12)
    mask = some_mask(12)
    other = torch.where(mask, ids, (ids + 1) % SMALL.vocabulary)
    assert not torch.equal(other, ids)
    assert torch.equal(tower(ids, mask=mask).last[mask], tower(other, mask=mask).last[mask])
    alone = tower(ids[1:, :6]).last
    assert torch.allclose(tower(ids, mask=mask).last[1:, :6], alone, atol=1e-5)
    assert torch.equal(tower(ids, mask=torch.ones_like(mask)).last, tower(ids).last)
    assert tower(ids, mask=torch.zeros_like(mask)).last.isfinite().all()


def test_embeddings_stand_in_for_ids() -> None:
    tower, ids = made(), some_ids(SMALL, 7)
    assert torch.equal(tower(ids, embeddings=tower.embed(ids)).last, tower(ids).last)
    assert not torch.equal(tower(ids, embeddings=2 * tower.embed(ids)).last, tower(ids).last)
    assert tower.bfloat16()(ids, embeddings=tower.embed(ids).float()).last.dtype == torch.bfloat16


def test_float16_survives_what_overflows_in_it() -> None:
    """The published weights' feed-forward outputs exceed 65504; norms bring them back."""
    tower = made()
    tower.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(2e4)
    tower.encoder.block[1].layer[1].layer_norm.weight.mul_(3)
    ids = some_ids(SMALL, 9)
    exact = tower(ids).last
    ours = tower.half()(ids).last
    assert ours.dtype == torch.float16 and ours.isfinite().all()
    assert relative(ours.float(), exact) <= 0.02


@pytest.mark.parametrize(
    ("ids", "given", "words"),
    [
        ((3,), {}, r"\(3,\)"),
        ((2, 0), {}, r"\(2, 0\)"),
        ((2, 5), {"mask": (2, 4)}, r"mask of shape \(2, 4\)"),
        ((2, 5), {"embeddings": (2, 5, 95)}, r"\(2, 5, 95\)"),
    ],
)
def test_wrong_shapes_are_refused(ids: tuple[int, ...], given: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        made()(
            torch.zeros(ids, dtype=torch.int64), **{name: torch.ones(size) for name, size in given.items()}
        )


def test_end_token() -> None:
    assert T5Encoder(SMALL).eos == EOS == 1
