"""Building blocks of the U-Nets: time embedding, resampling, the time-conditioned residual block.

Time embedding (Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B), for a width of ``2 n``::

    w_i = period^(-i / n)          embedding = [cos(t w), sin(t w)]        latent-diffusion lineage
    w_i = period^(-i / (n - 1))    embedding = [sin(t w), cos(t w)]        original DDPM

Residual block (BigGAN style without scale-shift, as in latent diffusion, Rombach et al. 2022)::

    h = conv(silu(norm(x)));   h = h + linear(silu(emb));   out = skip(x) + conv(silu(norm(h)))

Letters: B batch, C channels, H W height and width, E width of the embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32
"""Groups of every group normalisation in the published U-Nets and autoencoders."""


def timestep_embedding(t: Tensor, width: int, *, ddpm: bool = False, period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of a time, always computed in float32 (bfloat16 cannot tell 999 from 1000).

    Args:
        t: network time, ``[B]``, any real dtype, may be fractional.
        width: even number of features.
        ddpm: the original DDPM convention (sine first, exponents to ``n - 1``) instead of cosine first.
        period: longest wavelength divided by 2 pi.

    Returns:
        float32 features, ``[B, width]``.

    Raises:
        ValueError: ``width`` is odd, or below 4 with ``ddpm`` (whose exponents divide by ``width / 2 - 1``).
    """
    half = width // 2
    steps = half - 1 if ddpm else half
    if width % 2 or steps < 1:
        raise ValueError(f"time embedding width {width} is not an even number of at least {2 + 2 * ddpm}")
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / steps
    angles = t.float()[:, None] * torch.exp(-math.log(period) * exponents)[None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((sin, cos) if ddpm else (cos, sin), dim=-1)


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Group normalisation with the published 32 groups; torch already accumulates its moments in float32."""
    return nn.GroupNorm(GROUPS, channels, eps=eps)


class Downsample(nn.Module):
    """Strided 3x3 convolution, ``[B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Enlarge.

        Args:
            x: ``[B, C, H, W]``.
            size: height and width wanted; twice the input's by default. A U-Net gives the size of the skip
                that comes next, since an odd size was rounded up on the way down.
        """
        return self.conv(F.interpolate(x, size=size or (2 * x.shape[-2], 2 * x.shape[-1]), mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions around a shift by the time embedding; starts as the identity (or its 1x1 skip).

    Args:
        channels: channels in.
        out_channels: channels out.
        emb_width: width E of the embedding.
    """

    def __init__(self, channels: int, out_channels: int, emb_width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Identity(),  # the published numbering keeps a place for dropout here
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the last convolution, so that an untrained block adds nothing (Ho et al. 2020)."""
        zero(self.out_layers[-1])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x [B, C, H, W]``, ``emb [B, E]`` to ``[B, out_channels, H, W]``."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


def zero(layer: nn.Module) -> None:
    """Set all parameters of a layer to zero, in place (a no-op on the meta device)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
