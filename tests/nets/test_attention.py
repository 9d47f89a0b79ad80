from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sumuk.nets import attention
from sumuk.nets.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    Kernel,
    SpatialTransformer,
    attend,
    attention_kernel,
)


def by_definition(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The formula, one query and one head at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    width = q.shape[-1] // heads
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(q.shape[1]):
                scores = torch.stack([q[b, i, part] @ key for key in k[b, :, part]]) / math.sqrt(width)
                weights = scores.exp() / scores.exp().sum()
                out[b, i, part] = sum(w * value for w, value in zip(weights, v[b, :, part], strict=True))
    return out


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "matmul"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_its_formula(kernel: Kernel, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with attention_kernel(kernel):
        got = attend(q, k, v, 3)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), by_definition(q, k, v, 3), atol=tolerance, rtol=tolerance)


def test_the_kernel_is_restored_even_after_an_error() -> None:
    with pytest.raises(RuntimeError), attention_kernel("matmul"):
        raise RuntimeError
    assert attention._kernel == "auto"


def test_auto_takes_plain_products_only_for_small_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v: calls.append(q.dtype) or fused(q, k, v)
    )
    for dtype, tokens in [(torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 1025)]:
        x = torch.zeros(1, tokens, 8, dtype=dtype)
        attend(x, x, x, 1)
    assert calls == [torch.float32, torch.bfloat16]


def test_geglu_gates_the_first_half_by_the_second() -> None:
    layer = GEGLU(3, 2)
    x = torch.randn(4, 3)
    y = x @ layer.proj.weight.T + layer.proj.bias
    gate = y[:, 2:] * 0.5 * (1 + torch.erf(y[:, 2:] / math.sqrt(2)))
    torch.testing.assert_close(layer(x), y[:, :2] * gate)


def test_without_a_context_a_sequence_attends_to_itself() -> None:
    layer = CrossAttention(8, 8, 2)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer(x), layer(x, x))


def test_cross_only_block_mixes_no_tokens() -> None:
    torch.manual_seed(0)
    x, context = torch.randn(1, 6, 8), torch.randn(1, 3, 10)
    other = x.clone()
    other[:, 0] += 1
    for cross_only in (True, False):
        block = BasicTransformerBlock(8, 10, 2, cross_only=cross_only)
        same = torch.equal(block(x, context)[:, 1:], block(other, context)[:, 1:])
        assert same == cross_only


@pytest.mark.parametrize("linear", [False, True])
def test_untrained_transformer_is_the_identity(linear: bool) -> None:
    x, context = torch.randn(2, 32, 3, 5), torch.randn(2, 4, 10)
    torch.testing.assert_close(SpatialTransformer(32, 10, 4, linear=linear)(x, context), x)


def test_linear_and_convolutional_projections_are_the_same_mathematics() -> None:
    torch.manual_seed(0)
    conv, linear = SpatialTransformer(32, 10, 4, depth=2), SpatialTransformer(32, 10, 4, depth=2, linear=True)
    torch.nn.init.normal_(conv.proj_out.weight)
    state = conv.state_dict()
    linear.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in state.items()})
    x, context = torch.randn(2, 32, 3, 5), torch.randn(2, 4, 10)
    torch.testing.assert_close(conv(x, context), linear(x, context))
