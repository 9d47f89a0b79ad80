r"""The encoder of T5 v1.1, which reads the prompt for SD3 and FLUX.1, under the names of its published files.

Pre-norm transformer without biases or position table; every block adds one table of relative positions to the
scores (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
section 2.1; gated feed-forward part: Shazeer 2020, "GLU Variants Improve Transformer"):

    scores_ij = q_i . k_j + table[bucket(j - i)]        not divided by sqrt(d): the start of training did that
    x = x + o(softmax(scores) v);    x = x + wo(gelu(wi_0 y) * wi_1 y),   y = norm(x)
    norm(x) = w x / sqrt(mean(x^2) + 1e-6)

A distance n has a bucket of its own below 8; from there buckets widen by sqrt(2) each to 128, which they never
pass. Later text (j > i) has 16 buckets of its own.

Precision: squares of a norm are summed in float32. In bfloat16 all else is bfloat16. In float16 the output of
``wo`` overflows in the published weights, so that product and the running sum x are float32; this is what
transformers does, too.

Some files repeat ``shared.weight`` as ``encoder.embed_tokens.weight``; layouts ignore it by name.

Shapes: B texts, L tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput

EOS = 1
"""Id of the end token in T5's vocabulary."""
STARTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
"""Smallest distance of bucket 1, 2...: from 8 on the ceiling of 8 * 2 ** (k / 2)."""
BUCKETS = 2 * (len(STARTS) + 1)


@dataclass(frozen=True, kw_only=True)
class T5Shape:
    """What a header says of the encoder.

    Attributes:
        vocabulary: rows of the token table; 28 more than T5's words in the published files.
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        head: channels of a head; heads * head need not be the width.
        hidden: channels inside the feed-forward part.
    """

    vocabulary: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head: int = 64
    hidden: int = 10240

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.width, self.depth, self.heads, self.head, self.hidden) < 1:
            raise BadInput(f"a T5 encoder needs sizes of at least 1, not {self}")


@dataclass(frozen=True)
class T5Output:
    """What the encoder says of B texts: ``last`` [B, L, D], normed. T5 has no sentence vector."""

    last: Tensor


def t5_shape(shapes: Mapping[str, tuple[int, ...]]) -> T5Shape:
    """Reads an encoder off its header.

    Raises:
        BadFile: it is none, or T5 v1.0 (which has ``wi`` instead of ``wi_0`` and ``wi_1``).
    """
    attention = "encoder.block.0.layer.0.SelfAttention."
    table = attention + "relative_attention_bias.weight"
    heads, inner = _size(shapes, table, 1), _size(shapes, attention + "q.weight", 0)
    if _size(shapes, table, 0) != BUCKETS:
        raise BadFile(f"{table!r} has {shapes[table][0]} buckets of distance, T5 has {BUCKETS}", "t5.header")
    if not heads or inner % heads:
        raise BadFile(f"{attention + 'q.weight'!r}: {inner} channels are not {heads} heads", "t5.header")
    depth = 0
    while f"encoder.block.{depth}.layer.0.SelfAttention.q.weight" in shapes:
        depth += 1
    return T5Shape(
        vocabulary=_size(shapes, "shared.weight", 0),
        width=_size(shapes, "shared.weight", 1),
        depth=depth,
        heads=heads,
        head=inner // heads,
        hidden=_size(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
    )


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int:
    if len(shapes.get(name, ())) != 2:
        raise BadFile(f"not a T5 v1.1 encoder: tensor {name!r} is missing or no matrix", "t5.header")
    return shapes[name][axis]


class T5Norm(nn.Module):
    """Root mean square norm; [..., D] to the same in the weight's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * unit.to(self.weight.dtype)


class T5Attention(nn.Module):
    """Self-attention; [B, L, D] and what is added to the scores, [1 or B, H, L, L], to [B, L, D].

    Args:
        shape: the encoder's.
        table: whether this block holds the table of relative positions; only the first does, for all.
    """

    def __init__(self, shape: T5Shape, *, table: bool) -> None:
        super().__init__()
        inner = shape.heads * shape.head
        self.heads = shape.heads
        self.q = nn.Linear(shape.width, inner, bias=False)
        self.k = nn.Linear(shape.width, inner, bias=False)
        self.v = nn.Linear(shape.width, inner, bias=False)
        self.o = nn.Linear(inner, shape.width, bias=False)
        if table:
            self.relative_attention_bias = nn.Embedding(BUCKETS, shape.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(seen.transpose(1, 2).flatten(2))

    def bias(self, length: int) -> Tensor:
        """Scores of relative positions, [1, H, L, L]."""
        place = torch.arange(length, device=self.relative_attention_bias.weight.device)
        ahead = place[None, :] - place[:, None]
        bucket = torch.bucketize(ahead.abs(), torch.tensor(STARTS, device=place.device), right=True)
        rows = self.relative_attention_bias(bucket + BUCKETS // 2 * (ahead > 0))
        return rows.permute(2, 0, 1)[None].contiguous()  # fused attention reads it row by row


class T5Feed(nn.Module):
    """The gated feed-forward part; [B, L, D] to the same, in float32 if the weights are float16."""

    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(shape.width, shape.hidden, bias=False)
        self.wi_1 = nn.Linear(shape.width, shape.hidden, bias=False)
        self.wo = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if gated.dtype == torch.float16:
            return F.linear(gated.float(), self.wo.weight.float())
        return self.wo(gated)


class _SelfAttention(nn.Module):
    def __init__(self, shape: T5Shape, *, table: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(shape, table=table)
        self.layer_norm = T5Norm(shape.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class _FeedForward(nn.Module):
    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.DenseReluDense = T5Feed(shape)
        self.layer_norm = T5Norm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    """One block; [B, L, D] to the same."""

    def __init__(self, shape: T5Shape, *, table: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_SelfAttention(shape, table=table), _FeedForward(shape)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attend, feed = self.layer
        return feed(attend(x, bias))


class _Encoder(nn.Module):
    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.block = nn.ModuleList(T5Block(shape, table=index == 0) for index in range(shape.depth))
        self.final_layer_norm = T5Norm(shape.width)


class T5Encoder(nn.Module):
    """The encoder (``shared.weight``, ``encoder.block...``).

    Args:
        shape: as ``t5_shape`` reads it.
        eos: id of the end token.
    """

    def __init__(self, shape: T5Shape, *, eos: int = EOS) -> None:
        super().__init__()
        self.shape = shape
        self.eos = eos
        self.shared = nn.Embedding(shape.vocabulary, shape.width)
        self.encoder = _Encoder(shape)

    def embed(self, ids: Tensor) -> Tensor:
        """Token rows of ``ids``, [B, L] to [B, L, D]."""
        return self.shared(ids)

    def forward(
        self, ids: Tensor, *, embeddings: Tensor | None = None, mask: Tensor | None = None
    ) -> T5Output:
        """Reads texts.

        Args:
            ids: [B, L] integers with their end token; any L from 1.
            embeddings: [B, L, D] in place of ``embed(ids)`` (textual inversion).
            mask: [B, L], true where a token may be read; None hides nothing, as SD3 and FLUX.1 read padding too.
        """
        if ids.ndim != 2 or ids.shape[1] < 1:
            raise BadInput(f"token ids of shape {tuple(ids.shape)}: T5 takes [B, L] with L of at least 1")
        x = self.embed(ids) if embeddings is None else embeddings.to(self.shared.weight.dtype)
        if x.shape != (*ids.shape, self.shape.width):
            raise BadInput(
                f"embeddings of shape {tuple(x.shape)} do not fit {(*ids.shape, self.shape.width)}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise BadInput(f"mask of shape {tuple(mask.shape)} does not fit token ids {tuple(ids.shape)}")
        first: Any = self.encoder.block[0]
        bias = first.layer[0].SelfAttention.bias(ids.shape[1])
        if mask is not None:
            # the smallest number, not -inf: a text without any token is then read evenly and stays finite
            hidden = ~mask.bool()[:, None, None, :]
            bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        for block in self.encoder.block:
            x = block(x, bias)
        return T5Output(self.encoder.final_layer_norm(x))
