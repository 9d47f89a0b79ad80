"""Attention over image tokens and text, and the transformer that a U-Net puts between its residual blocks.

One head, for queries q, keys k and values v of width d (Vaswani et al. 2017, equation 1)::

    attend(q, k, v) = softmax(q k^T / sqrt(d)) v

Block (Rombach et al. 2022, appendix E.2.1), with y the context::

    x = x + attn1(norm1(x));   x = x + attn2(norm2(x), y);   x = x + geglu(norm3(x))

Letters: B batch, L tokens of the image, M tokens of the context, C width, D width of the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.nets.layers import group_norm, zero

Kernel = Literal["auto", "sdpa", "matmul"]
_kernel: Kernel = "auto"


@contextmanager
def attention_kernel(kernel: Kernel) -> Iterator[None]:
    """Choose how :func:`attend` computes, for the whole process, until the block ends.

    ``sdpa`` is torch's fused attention: least memory. ``matmul`` is two plain products around a softmax, and
    writes the whole ``[B, heads, L, M]`` matrix of scores. ``auto`` is ``sdpa``, but ``matmul`` for bfloat16
    on a CPU up to :data:`MATMUL_SCORES` scores a head. The answers agree to rounding.
    """
    global _kernel
    before, _kernel = _kernel, kernel
    try:
        yield
    finally:
        _kernel = before


MATMUL_SCORES = 1024 * 1024
"""Largest ``L M`` for which ``auto`` takes plain products. Measured with torch 2.13 on one core of a Zen 4
with AVX512-BF16: in bfloat16 they are 1.1 to 1.7 times as fast as the fused kernel, and 1.3 to 10 times with
the backward pass; at 4096 x 4096 they fall behind (0.7 times), as they do at nearly all sizes in float32."""


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention without a mask: the one place where all of a U-Net's attention is computed.

    Args:
        q: queries, ``[B, L, C]``; the heads lie side by side along C.
        k: keys, ``[B, M, C]``.
        v: values, ``[B, M, C]``.
        heads: number of heads; divides C.

    Returns:
        ``[B, L, C]``.
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    plain = _kernel == "matmul"
    if _kernel == "auto" and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        plain = q.shape[-2] * k.shape[-2] <= MATMUL_SCORES
    if plain:
        out = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Attention of a sequence to a context, or to itself when no context is given.

    Args:
        width: width C of the sequence, also that of the heads together.
        context_dim: width D of what is attended to.
        heads: number of heads.
    """

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x [B, L, C]``, ``context [B, M, D]`` to ``[B, L, C]``."""
        seen = x if context is None else context
        return self.to_out(attend(self.to_q(x), self.to_k(seen), self.to_v(seen), self.heads))


class GEGLU(nn.Module):
    """Gated linear unit ``a * gelu(b)`` with ``a, b = split(W x + c)`` (Shazeer 2020, equation 6)."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers around a gate, four times as wide inside: ``[B, L, C] -> [B, L, C]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The published numbering keeps a place for dropout between the two.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each normalised before and added after.

    Args:
        width: width C of the tokens.
        context_dim: width D of the context.
        heads: number of heads.
        cross_only: the first attention looks at the context too (the x4 upscaler's large levels, where
            attention among all pixels would cost too much).
    """

    def __init__(self, width: int, context_dim: int, heads: int, *, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(width, context_dim if cross_only else width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``x [B, L, C]``, ``context [B, M, D]`` to ``[B, L, C]``."""
        x = x + self.attn1(self.norm1(x), context if self.cross_only else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, added to it; starts as the identity.

    Args:
        channels: channels C of the map, also the width of the tokens.
        context_dim: width D of the context.
        heads: number of heads.
        depth: number of blocks.
        linear: project tokens by linear layers (SD 2, SDXL) instead of the map by 1x1 convolutions (SD 1);
            the same numbers, but stored with other shapes.
        cross_only: see :class:`BasicTransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        *,
        depth: int = 1,
        linear: bool = False,
        cross_only: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads, cross_only=cross_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the last projection, so that an untrained transformer adds nothing."""
        zero(self.proj_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``x [B, C, H, W]``, ``context [B, M, D]`` to ``[B, C, H, W]``, in the memory format of ``x``."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        # In channels_last memory the map already is a row of tokens, and neither turn copies it.
        h = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            return x + _image(self.proj_out(h), height, width)
        return x + self.proj_out(_image(h, height, width))


def _tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W] -> [B, H W, C]``, contiguous, as all that follows reads it token by token."""
    return image.flatten(2).transpose(1, 2).contiguous()


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """``[B, H W, C] -> [B, C, H, W]``."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)
