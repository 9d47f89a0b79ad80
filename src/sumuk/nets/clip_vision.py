"""The image towers of CLIP, under the names of the transformers library.

The picture is cut into patches, each a token; the picture as a whole is what the class token, the first, has read
(Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", equations 1 to 4; Radford et al. 2021, "Learning
Transferable Visual Models From Natural Language Supervision", section 2.4)::

    h_0 = pre_norm([class, patches] + position),   h_n = block_n(h_{n-1}),   pooled = post_norm(h_N[class])

Published towers: ViT-L/14 (Stable Cascade, unCLIP-L), ViT-H/14 (IP-Adapter, unCLIP-H) and ViT-bigG/14 (IP-Adapter for
SDXL). ``pre_layrnorm`` is spelt so in all their files. Older files hold ``position_ids`` too, which are 0, 1, 2...: a
layout ignores them by name.

Shapes: B pictures, L = side^2 + 1 tokens, D width, P projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import attend
from sumuk.nets.clip import Activation
from sumuk.nets.header import reader

_size = reader("CLIP image tower", "clip")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's statistics of RGB in 0..1, by which pixels are normalised."""

SIZE = 224  # pixels a side that every published tower here sees
LARGE = 1024  # width of ViT-L


def published_heads(width: int) -> int:
    """Heads of a tower of that width, which no header shows.

    The towers from ViT-L on have 16, of 64 channels (L, 1024), 80 (H, 1280) and 104 (bigG, 1664). Smaller ones have
    heads of 64 channels, as ViT-B has 12; one narrower than that has one.
    """
    return 16 if width >= LARGE else max(1, width // 64)


def published_activation(width: int) -> Activation:
    """OpenAI trained with the fast likeness of GELU, up to ViT-L; the wider towers are OpenCLIP's, with GELU itself."""
    return "quick_gelu" if width <= LARGE else "gelu"


@dataclass(frozen=True, kw_only=True)
class ClipVisionShape:
    """What a header says of an image tower.

    Attributes:
        width: channels.
        depth: blocks.
        hidden: channels inside the feed-forward part.
        patch: pixels a side of a patch.
        side: patches a side of a picture.
        projection: channels of the projected picture; None where the file has no projection.
        heads: attention heads; they divide the width. See :func:`published_heads`.
        colours: channels of a picture.
    """

    width: int = 1024
    depth: int = 24
    hidden: int = 4096
    patch: int = 14
    side: int = 16
    projection: int | None = 768
    heads: int = 16
    colours: int = 3

    def __post_init__(self) -> None:
        counts = (self.width, self.depth, self.hidden, self.patch, self.side, self.heads, self.colours)
        if min(counts) < 1 or (self.projection is not None and self.projection < 1):
            raise BadInput(f"an image tower needs sizes of at least 1, not {self}")
        if self.width % self.heads:
            raise BadInput(f"heads {self.heads} does not divide the image tower's width {self.width}")

    @property
    def size(self) -> int:
        """Pixels a side of a picture."""
        return self.patch * self.side


def clip_vision_shape(shapes: Mapping[str, tuple[int, ...]], *, heads: int | None = None) -> ClipVisionShape:
    """Reads a tower off its header.

    Args:
        shapes: shape of each tensor, by its published name.
        heads: attention heads; those of the published towers of that width if None.

    Raises:
        BadFile: it is no such tower; a tensor is named.
    """
    patches, positions = _EMBEDDINGS + "patch_embedding.weight", _EMBEDDINGS + "position_embedding.weight"
    depth = 0
    while f"vision_model.encoder.layers.{depth}.self_attn.q_proj.weight" in shapes:
        depth += 1
    tokens = _size(shapes, positions, 0)
    side = math.isqrt(tokens - 1)
    if side < 1 or side**2 != tokens - 1:
        raise BadFile(f"tensor {positions!r} has {tokens} rows: not a square and one", "clip.header")
    width = _size(shapes, patches, 0)
    try:
        return ClipVisionShape(
            width=width,
            depth=depth,
            hidden=_size(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 0),
            patch=_size(shapes, patches, 2),
            side=side,
            projection=_size(shapes, _PROJECTION, 0) if _PROJECTION in shapes else None,
            heads=published_heads(width) if heads is None else heads,
            colours=_size(shapes, patches, 1),
        )
    except BadInput as error:
        raise BadFile(f"tensor {patches!r}: {error}", "clip.header") from error


_EMBEDDINGS = "vision_model.embeddings."
_PROJECTION = "visual_projection.weight"


@dataclass(frozen=True)
class VisionOutput:
    """What a tower says of B pictures.

    Attributes:
        hidden: the input of the first block, then the output of each; depth + 1 tensors [B, L, D], unnormed. The
            class token is the first of a row.
        pooled: [B, D], the class token of the last, normed.
        projected: [B, P], or None where the tower has no projection.
    """

    hidden: tuple[Tensor, ...]
    pooled: Tensor
    projected: Tensor | None

    @property
    def penultimate(self) -> Tensor:
        """The input of the last block, [B, L, D], unnormed: what IP-Adapter Plus reads."""
        return self.hidden[-2]


class _Embeddings(nn.Module):
    """Patches and the class token, each with its position; [B, C, size, size] to [B, L, D]."""

    def __init__(self, shape: ClipVisionShape) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(shape.width))
        self.patch_embedding = nn.Conv2d(
            shape.colours, shape.width, shape.patch, stride=shape.patch, bias=False
        )
        self.position_embedding = nn.Embedding(shape.side**2 + 1, shape.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class _Feed(nn.Module):
    def __init__(self, shape: ClipVisionShape, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.activation == "quick_gelu" else F.gelu(h))


class ClipVisionLayer(nn.Module):
    """One pre-norm block; [B, L, D] to the same."""

    def __init__(self, shape: ClipVisionShape, activation: Activation) -> None:
        super().__init__()
        self.self_attn = _Attention(shape.width, shape.heads)
        self.layer_norm1 = nn.LayerNorm(shape.width)
        self.mlp = _Feed(shape, activation)
        self.layer_norm2 = nn.LayerNorm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Layers(nn.Module):
    def __init__(self, shape: ClipVisionShape, activation: Activation) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipVisionLayer(shape, activation) for _ in range(shape.depth))


class _VisionModel(nn.Module):
    def __init__(self, shape: ClipVisionShape, activation: Activation) -> None:
        super().__init__()
        self.embeddings = _Embeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(shape.width)
        self.encoder = _Layers(shape, activation)
        self.post_layernorm = nn.LayerNorm(shape.width)


class ClipVision(nn.Module):
    """An image tower.

    Args:
        shape: as :func:`clip_vision_shape` reads it.
        activation: that of the published towers of that width if None, see :func:`published_activation`.
    """

    def __init__(self, shape: ClipVisionShape, *, activation: Activation | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.vision_model = _VisionModel(shape, activation or published_activation(shape.width))
        if shape.projection is not None:
            self.visual_projection = nn.Linear(shape.width, shape.projection, bias=False)

    def forward(self, pixels: Tensor) -> VisionOutput:
        """Reads pictures.

        Args:
            pixels: [B, C, size, size], normalised, see :func:`clip_pixels`.

        Raises:
            BadInput: another size or number of channels.
        """
        shape, model = self.shape, self.vision_model
        wanted = (shape.colours, shape.size, shape.size)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted:
            sizes = ", ".join(map(str, wanted))
            raise BadInput(f"pixels of shape {tuple(pixels.shape)}: this image tower takes [B, {sizes}]")
        x = model.pre_layrnorm(model.embeddings(pixels.to(model.embeddings.patch_embedding.weight.dtype)))
        hidden = [x]
        for block in model.encoder.layers:
            x = block(x)
            hidden.append(x)
        pooled = model.post_layernorm(x[:, 0])
        projected = self.visual_projection(pooled) if shape.projection is not None else None
        return VisionOutput(tuple(hidden), pooled, projected)


def clip_pixels(pixels: Tensor, size: int = SIZE) -> Tensor:
    """Pictures as the towers take them: shorter side resized, middle cut out, normalised.

    As CLIP's own preparation: bicubic with antialiasing, the longer side rounded down, an odd row or column too many
    cut at the end.

    Args:
        pixels: [B, 3, H, W] in -1..1, any size.
        size: pixels a side wanted.

    Returns:
        [B, 3, size, size] in the dtype of ``pixels``.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < 1:
        raise BadInput(f"pixels of shape {tuple(pixels.shape)}: takes [B, 3, height, width] in -1..1")
    x = (pixels.float() + 1) / 2
    height, width = x.shape[2:]
    short = min(height, width)
    if short != size:
        target = (size * height // short, size * width // short)
        x = F.interpolate(x, target, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots edges
    top, left = (x.shape[2] - size) // 2, (x.shape[3] - size) // 2
    x = x[:, :, top : top + size, left : left + size]
    mean, std = (x.new_tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return ((x - mean) / std).to(pixels.dtype)


class ViewStatistics(nn.Module):
    """Mean and standard deviation of a tower's sentences about pictures, ``[1, P]`` each (unCLIP).

    Args:
        width: P.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, width))
        self.std = nn.Parameter(torch.ones(1, width))
