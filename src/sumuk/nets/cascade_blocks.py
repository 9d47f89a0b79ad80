"""Blocks of Stable Cascade's two denoisers (Würstchen, version 3), under their published names.

Three kinds (Pernias et al. 2023)::

    C   x + W2 grn(gelu(W1 [norm(depthwise(x)), skip]))        with   grn(h) = gamma h n + beta + h
    T   x (1 + a) + b                                          a, b   linear in the features of time
    A   x + attention(norm(x) to [norm(x), linear(silu(c))])   c      the condition as tokens

where ``n = |h| / mean |h|`` weighs each channel's length over the picture against the mean of all (Woo et al. 2023,
ConvNeXt V2). Letters: B batch, C channels, H W height and width, L positions, M condition tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.nets.attention import attend

EPS = 1e-6
"""Of every normalisation."""


def normed(x: Tensor) -> Tensor:
    """Each row ``[..., C]`` to mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class ChannelNorm(nn.Module):
    """Each position to mean 0 and variance 1 over its channels, without parameters: ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return normed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Response(nn.Module):
    """Global response normalisation of ``[B, H, W, C]``; an untrained one is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        share = length / (length.mean(dim=-1, keepdim=True) + EPS)
        return self.gamma * (x * share) + self.beta + x


class ConvBlock(nn.Module):
    """C: a depthwise convolution, then a perceptron at each position, which may see a skip as well."""

    def __init__(self, width: int, skip: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.channelwise = nn.Sequential(
            nn.Linear(width + skip, 4 * width),
            nn.GELU(),
            Response(4 * width),
            nn.Identity(),  # the published numbering keeps a place for dropout
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = normed(self.depthwise(x).permute(0, 2, 3, 1))
        if skip is not None:
            h = torch.cat((h, skip.permute(0, 2, 3, 1)), dim=-1)
        return x + self.channelwise(h).permute(0, 3, 1, 2)


class TimeBlock(nn.Module):
    """T: scale and shift of each channel, summed over all times that the network is told."""

    def __init__(self, width: int, time_width: int, times: Sequence[str]) -> None:
        super().__init__()
        self.times = tuple(times)
        self.mapper = nn.Linear(time_width, 2 * width)
        for name in self.times:
            self.add_module(f"mapper_{name}", nn.Linear(time_width, 2 * width))

    def forward(self, x: Tensor, times: Sequence[Tensor]) -> Tensor:
        """``x [B, C, H, W]``; ``times``: features [B, time_width] of the time and of each further one."""
        told = self.mapper(times[0])
        for name, features in zip(self.times, times[1:], strict=True):
            told = told + self.get_submodule(f"mapper_{name}")(features)
        scale, shift = told[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class Projections(nn.Module):
    """Multi-head attention under the names of ``torch.nn.MultiheadAttention``: q, k, v stacked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the stacked projections anew."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """``x [B, L, C]`` attends to ``seen [B, M, C]``."""
        width = x.shape[-1]
        q = F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width])
        k, v = F.linear(seen, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads))


class Attention(nn.Module):
    """The place that published names give the projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Projections(width, heads)


class AttentionBlock(nn.Module):
    """A: every position attends to all positions and to the condition."""

    def __init__(self, width: int, cond_width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """``x [B, C, H, W]``, ``cond [B, M, D]``."""
        h = normed(x.flatten(2).transpose(1, 2))
        h = self.attention.attn(h, torch.cat((h, self.kv_mapper(cond)), dim=1))
        return x + h.transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """Stage C's change of level: a 1x1 convolution, at the place that its published name gives it."""

    def __init__(self, channels: int, out_channels: int, place: int) -> None:
        super().__init__()
        mapping = nn.Conv2d(channels, out_channels, 1)
        # The other place is that of an interpolation, which no published model uses.
        self.blocks = nn.Sequential(*([nn.Identity(), mapping] if place else [mapping, nn.Identity()]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``[B, C, h, w]`` at another height and width: bilinear with aligned corners, in float32."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x.float(), tuple(size), mode="bilinear", align_corners=True).to(x.dtype)
