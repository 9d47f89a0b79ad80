"""The diffusion transformer: patches of a latent as tokens, told the time and the class by their norms.

    c = t_embedder(features(t)) + y_embedder(y)
    x = patches(x) + position
    a, b, g, a', b', g' = modulation(silu(c))                                    in each block
    x = x + g  attn((1 + b) norm(x) + a)
    x = x + g' mlp((1 + b') norm(x) + a')
    out = unpatch(linear((1 + b) norm(x) + a))                                   a, b from c once more

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2 (adaLN-Zero). Parameter names are those
of the published files. The position of a token is a constant, but the files store it, so it is a buffer here.

Letters: B batch, C channels, H W height and width of the latent, p side of a patch, L = (H / p) (W / p) tokens of
width D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import attend
from sumuk.nets.header import missing, reader
from sumuk.nets.layers import timestep_embedding, zero

_size = reader("DiT", "dit")

FREQUENCIES = 256
"""Sinusoidal features of the time."""

HEAD = 64
"""Width of one attention head, but in XL."""

XL = 1152
"""Width of XL, whose 16 heads have 72 channels each."""


@dataclass(frozen=True, kw_only=True)
class DiTShape:
    """Everything that decides which tensors a DiT has, and how its heads divide them.

    Args:
        in_channels: channels of the latent.
        out_channels: channels of the prediction; twice the latent's where the variance is predicted as well.
        patch: side p of a patch.
        width: width D of the tokens.
        depth: blocks.
        heads: attention heads.
        classes: rows of the table of classes; the last one stands for no class.
        tokens: tokens of the stored positions, those of a square.

    Raises:
        BadInput: values that contradict each other.
    """

    in_channels: int = 4
    out_channels: int = 8
    patch: int = 2
    width: int
    depth: int
    heads: int
    classes: int = 1001
    tokens: int = 256

    def __post_init__(self) -> None:
        if min(self.in_channels, self.out_channels, self.patch, self.depth, self.heads, self.classes) < 1:
            raise BadInput(f"a DiT needs channels, blocks, heads and classes of at least 1, not {self}")
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise BadInput(f"DiT width {self.width} is no multiple of 4 and of its {self.heads} heads")
        if self.tokens < 1 or math.isqrt(self.tokens) ** 2 != self.tokens:
            raise BadInput(f"{self.tokens} stored positions are not those of a square")

    @property
    def null(self) -> int:
        """The class number that stands for no class."""
        return self.classes - 1

    @property
    def side(self) -> int:
        """Tokens a side of the stored positions."""
        return math.isqrt(self.tokens)


def positions(rows: int, columns: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Where each token of a grid stands: sines and cosines of its column, then of its row.

    ``w_i = 10000^(-i / n)`` for ``i < n = width / 4``; [sin(c w), cos(c w), sin(r w), cos(r w)]. Rows and columns are
    counted from 0 and not stretched, so a smaller grid's table is a corner of a larger one's.

    Args:
        rows: tokens from top to bottom.
        columns: tokens from left to right.
        width: D, a multiple of 4.
        device: where to, torch's present default if None.

    Returns:
        float32 ``[1, rows * columns, width]``, row by row; computed in float64, as what was published is.
    """
    steps = torch.arange(width // 4, device=device, dtype=torch.float64) / (width // 4)
    angles = [
        torch.arange(count, device=device, dtype=torch.float64)[:, None] * 10_000.0**-steps
        for count in (columns, rows)
    ]
    across, down = (torch.cat((angle.sin(), angle.cos()), dim=-1) for angle in angles)
    grid = (across.expand(rows, -1, -1), down[:, None].expand(-1, columns, -1))
    return torch.cat(grid, dim=-1).reshape(1, rows * columns, width).float()


class Attention(nn.Module):
    """Self-attention, q, k and v stacked; ``[B, L, D]`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads))


class Mlp(nn.Module):
    """Two linear layers, four times as wide inside; ``[B, L, D]`` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens ``[B, L, D]``, normed, then scaled and shifted by ``[B, D]``."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def modulation(width: int, parts: int) -> nn.Sequential:
    """What tells ``parts`` shifts, scales and gates from ``c``; zero at first, so that blocks add nothing."""
    layers = nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))
    zero(layers)
    return layers


class Block(nn.Module):
    """Attention and feed-forward, each normed, scaled, shifted and gated by ``c``."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.attn = Attention(shape.width, shape.heads)
        self.mlp = Mlp(shape.width)
        self.adaLN_modulation = modulation(shape.width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """``x [B, L, D]``, ``c [B, D]`` to ``[B, L, D]``."""
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class Final(nn.Module):
    """Tokens to patches, ``[B, L, D]`` to ``[B, L, p p C]``."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.width, shape.patch**2 * shape.out_channels)
        self.adaLN_modulation = modulation(shape.width, 2)
        zero(self.linear)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(x, shift, scale))


class DiT(nn.Module):
    """The network.

    Args:
        shape: see :class:`DiTShape`.
    """

    pos_embed: Tensor

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.register_buffer("pos_embed", positions(shape.side, shape.side, width))
        patches = nn.Conv2d(shape.in_channels, width, shape.patch, stride=shape.patch)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(shape.classes, width)})
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.final_layer = Final(shape)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in a latent, and its variance where the model was trained to.

        The stored positions serve the square that they were made for. For another height or width they are computed
        anew by the same formula: tokens keep their distance and stand where training put none.

        Args:
            x: noisy latent, ``[B, in_channels, H, W]``; H and W are multiples of the patch.
            t: network time, ``[B]``, 0 to 999 for the published models, may be fractional.
            y: class numbers, ``[B]``, long; ``shape.null`` for no class.

        Returns:
            ``[B, out_channels, H, W]``: first the noise, then the variance's interpolation (Nichol & Dhariwal 2021,
            equation 15) where ``out_channels`` is twice ``in_channels``.

        Raises:
            BadInput: a latent, time or class of another shape.
        """
        shape = self.shape
        if (
            x.ndim != 4
            or x.shape[1] != shape.in_channels
            or any(not n or n % shape.patch for n in x.shape[2:])
        ):
            raise BadInput(
                f"a latent of shape {tuple(x.shape)} does not fit this DiT, which takes "
                f"[B, {shape.in_channels}, H, W] with H and W multiples of {shape.patch}"
            )
        if t.shape != x.shape[:1]:
            raise BadInput(f"time of shape {tuple(t.shape)} does not fit a batch of {x.shape[0]}: give [B]")
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise BadInput(
                f"this DiT needs y, one class number for each image: shape [B], dtype long; got "
                f"{y.dtype} {tuple(y.shape)} for a batch of {x.shape[0]}"
            )
        h = self.x_embedder["proj"](x)
        rows, columns = h.shape[-2:]
        place = self.pos_embed
        if (rows, columns) != (shape.side, shape.side):
            place = positions(rows, columns, shape.width, "cpu")  # not every device has float64
        h = h.flatten(2).transpose(1, 2) + place.to(h)
        c = self.t_embedder["mlp"](timestep_embedding(t, FREQUENCIES).to(x.dtype))
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            h = block(h, c)
        patches = self.final_layer(h, c).unflatten(-1, (shape.patch, shape.patch, -1))
        image = patches.unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4)  # B, C, rows, p, columns, p
        return image.flatten(4, 5).flatten(2, 3)


def dit_heads(width: int) -> int:
    """The published numbers of heads: 6, 12 and 16 of 64 channels in S, B and L, 16 of 72 in XL."""
    return 16 if width == XL else width // HEAD


def dit_shape(shapes: Mapping[str, tuple[int, ...]]) -> DiTShape:
    """Read the shape off the names and shapes of a header.

    Args:
        shapes: shape of each tensor, by its published name.

    Raises:
        BadFile: a tensor is missing, or of a shape that no DiT has; named.
    """
    proj, last = "x_embedder.proj.weight", "final_layer.linear.weight"
    width, patch = _size(shapes, proj, 0), _size(shapes, proj, 3)
    if width % HEAD:
        raise BadFile(f"tensor {proj!r}: width {width} is no multiple of {HEAD}, one head", "dit.shape")
    if (out := _size(shapes, last, 0)) % patch**2:
        raise BadFile(
            f"tensor {last!r} has {out} rows, which are no patches of {patch} x {patch}", "dit.shape"
        )
    depth = 0
    while f"blocks.{depth}.attn.qkv.weight" in shapes:
        depth += 1
    if not depth:
        raise missing("blocks.0.attn.qkv.weight", "DiT", "dit")
    tokens = _size(shapes, "pos_embed", 1)
    try:
        return DiTShape(
            in_channels=_size(shapes, proj, 1),
            out_channels=out // patch**2,
            patch=patch,
            width=width,
            depth=depth,
            heads=dit_heads(width),
            classes=_size(shapes, "y_embedder.embedding_table.weight", 0),
            tokens=tokens,
        )
    except BadInput as error:
        raise BadFile(
            f"tensor 'pos_embed' has the shape {list(shapes['pos_embed'])}: {error}", "dit.shape"
        ) from error
