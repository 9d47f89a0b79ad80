"""Transformer blocks of FLUX.1 and SD3 under the names of the diffusers layout, in which their ControlNets come.

A block of two streams s in (image x, text c) joins them in attention alone (Esser et al. 2024, section 4);
a, b, g, a', b', g' are linear in ``silu(v)``, and ``mod(x; a, b) = (1 + b) layernorm(x) + a``::

    h = attend([q_c, q_x], [k_c, k_x], [v_c, v_x])    of mod(s; a, b)
    s = s + g out(h_s);    s = s + g' ff(mod(s; a', b'))

A single block takes both streams as one: ``x = x + g out([attend(q, k, v), gelu(m)])`` of ``mod(x; a, b)``.
FLUX.1 turns queries and keys by their places, SD3 does not.

Letters: B batch, L image tokens, M text tokens, D width, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.nets.attention import attend
from sumuk.nets.flux import EPS, MLP, TIME, Turn
from sumuk.nets.layers import timestep_embedding


class Embedder(nn.Module):
    """Two linear layers around SiLU, ``[B, features] -> [B, D]``."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeText(nn.Module):
    """Embedding v of time, sentence and, where the network takes it, guidance: ``[B, D]``."""

    def __init__(self, vector_dim: int, width: int, *, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(TIME, width)
        if guidance:
            self.guidance_embedder = Embedder(TIME, width)
        self.text_embedder = Embedder(vector_dim, width)

    def forward(self, t: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        v = self.timestep_embedder(timestep_embedding(t, TIME).to(dtype))
        if guidance is not None:
            v = v + self.guidance_embedder(timestep_embedding(1000.0 * guidance.float(), TIME).to(dtype))
        return v + self.text_embedder(y.to(dtype))


class Modulation(nn.Module):
    """``count`` vectors of the embedding, each ``[B, 1, D]``."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(v))[:, None].chunk(self.count, dim=-1)


class GeluIn(nn.Module):
    """The first layer of a feed-forward part, with its activation."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers around GELU; the names keep a place for dropout between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GeluIn(width, MLP * width), nn.Identity(), nn.Linear(MLP * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SelfAttention(nn.Module):
    """Queries, keys and values of one stream.

    Args:
        width: width D.
        head: width d of a head.
        normed: whether queries and keys are RMS-normalised, head by head.
    """

    def __init__(self, width: int, head: int, *, normed: bool) -> None:
        super().__init__()
        self.head = head
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (_head_norm(head, normed) for _ in range(2))

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``[B, n, heads, d]``, values ``[B, n, D]``."""
        q, k = (layer(x).unflatten(-1, (-1, self.head)) for layer in (self.to_q, self.to_k))
        return self.norm_q(q), self.norm_k(k), self.to_v(x)


class JointAttention(SelfAttention):
    """Attention of two streams, each with its own layers around it."""

    def __init__(self, width: int, head: int, *, normed: bool) -> None:
        super().__init__(width, head, normed=normed)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (_head_norm(head, normed) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.to_add_out = nn.Linear(width, width)

    def forward(self, image: Tensor, text: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor]:
        """``image [B, L, D]``, ``text [B, M, D]`` to what each of the two saw."""
        q, k = (layer(text).unflatten(-1, (-1, self.head)) for layer in (self.add_q_proj, self.add_k_proj))
        words = (self.norm_added_q(q), self.norm_added_k(k), self.add_v_proj(text))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(words, self.ask(image), strict=True))
        seen = _attend(q, k, v, turn)
        return self.to_out(seen[:, text.shape[1] :]), self.to_add_out(seen[:, : text.shape[1]])


class JointBlock(nn.Module):
    """A step of both streams; see the head of this file."""

    def __init__(self, width: int, head: int, *, normed: bool) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 6)
        self.attn = JointAttention(width, head, normed=normed)
        self.ff = FeedForward(width)
        self.ff_context = FeedForward(width)

    def forward(
        self, image: Tensor, text: Tensor, v: Tensor, turn: Turn | None = None
    ) -> tuple[Tensor, Tensor]:
        """``image [B, L, D]``, ``text [B, M, D]`` and ``v [B, D]`` to the next image and text."""
        shift, scale, gate, *after = self.norm1(v)
        shift_c, scale_c, gate_c, *after_c = self.norm1_context(v)
        seen, read = self.attn(_mod(image, shift, scale), _mod(text, shift_c, scale_c), turn)
        image, text = image + gate * seen, text + gate_c * read
        shift, scale, gate = after
        shift_c, scale_c, gate_c = after_c
        image = image + gate * self.ff(_mod(image, shift, scale))
        return image, text + gate_c * self.ff_context(_mod(text, shift_c, scale_c))


class SingleBlock(nn.Module):
    """A step of both streams as one; see the head of this file."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.attn = SelfAttention(width, head, normed=True)
        self.proj_mlp = nn.Linear(width, MLP * width)
        self.proj_out = nn.Linear((1 + MLP) * width, width)

    def forward(self, x: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """``x [B, M + L, D]`` (text first) and ``v [B, D]`` to the next x."""
        shift, scale, gate = self.norm(v)
        h = _mod(x, shift, scale)
        inner = F.gelu(self.proj_mlp(h), approximate="tanh")
        return x + gate * self.proj_out(torch.cat((_attend(*self.attn.ask(h), turn), inner), dim=-1))


def _head_norm(head: int, normed: bool) -> nn.Module:
    return nn.RMSNorm(head, eps=EPS) if normed else nn.Identity()


def _mod(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def _attend(q: Tensor, k: Tensor, v: Tensor, turn: Turn | None) -> Tensor:
    """Attention, ``[B, n, D]``, of queries and keys that are turned by their places where FLUX.1 says so."""
    heads = q.shape[2]
    if turn is not None:
        cos, sin = turn
        pairs = (x.float().unflatten(-1, (-1, 2)).unbind(-1) for x in (q, k))
        q, k = (torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2) for a, b in pairs)
    return attend(q.flatten(2).to(v.dtype), k.flatten(2).to(v.dtype), v, heads)
