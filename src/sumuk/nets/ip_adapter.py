"""IP-Adapter (Ye et al. 2023): a U-Net attends to a picture beside the text.

What CLIP sees in the picture becomes a few tokens z, and each attention to the text c gets keys and values for
them (their equation 5)::

    attend(q, K c, V c) + scale attend(q, K' z, V' z)

It attaches from outside and leaves the U-Net as it was, bit for bit. Parameter names are those of the
published files.

Letters: B batch, L tokens of the latent, C their width, M tokens of the text, T tokens of the picture, D the
width of both, P the width of what CLIP says of the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import BasicTransformerBlock, CrossAttention, attend
from sumuk.nets.header import count, reader
from sumuk.nets.unet import UNet

_size = reader("adapter", "adapter")

Shapes = Mapping[str, tuple[int, ...]]
HEAD = 64
"""Width of a head in the resampler of IP-Adapter plus."""


@dataclass(frozen=True, kw_only=True)
class IPShape:
    """What a header says of an IP-Adapter.

    Attributes:
        kind: how it makes tokens: ``image`` of one vector, ``full`` or ``plus`` of all of CLIP's tokens.
        image_dim: width of what CLIP says.
        context_dim: width D of the tokens, that of the U-Net's context.
        widths: for each attention to the text, in order, its width.
        tokens: number T of tokens; 0 where it is CLIP's own (``full``).
        inner: width of the resampler (``plus``), and of its heads together.
        depth: number of the resampler's blocks.
        heads: its heads.
    """

    kind: str
    image_dim: int
    context_dim: int
    widths: tuple[int, ...]
    tokens: int = 0
    inner: int = 0
    depth: int = 0
    heads: int = 0


class ImageProjection(nn.Module):
    """One vector to T tokens, ``[B, P] -> [B, T, D]``."""

    def __init__(self, image_dim: int, context_dim: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Linear(image_dim, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).unflatten(-1, (-1, self.norm.normalized_shape[0])))


class FullProjection(nn.Module):
    """Each of CLIP's tokens by itself, ``[B, n, P] -> [B, n, D]``."""

    def __init__(self, image_dim: int, context_dim: int) -> None:
        super().__init__()
        wide = nn.Linear(image_dim, image_dim)
        self.proj = nn.Sequential(
            wide, nn.GELU(), nn.Linear(image_dim, context_dim), nn.LayerNorm(context_dim)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class PerceiverAttention(nn.Module):
    """Latents that look at the picture and at themselves (Alayrac et al. 2022, Flamingo, section 3.1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, HEAD * heads, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD * heads, bias=False)
        self.to_out = nn.Linear(HEAD * heads, width, bias=False)

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        image, latents = self.norm1(image), self.norm2(latents)
        k, v = self.to_kv(torch.cat((image, latents), dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), k, v, self.heads))


class Resampler(nn.Module):
    """All of CLIP's tokens to T, ``[B, n, P] -> [B, T, D]``, by learnt latents that look at them."""

    def __init__(self, shape: IPShape) -> None:
        super().__init__()
        width = shape.inner
        self.latents = nn.Parameter(torch.randn(1, shape.tokens, width) * width**-0.5)
        self.proj_in = nn.Linear(shape.image_dim, width)
        self.proj_out = nn.Linear(width, shape.context_dim)
        self.norm_out = nn.LayerNorm(shape.context_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(width, shape.heads), _feed_forward(width)))
            for _ in range(shape.depth)
        )

    def forward(self, image: Tensor) -> Tensor:
        image, latents = self.proj_in(image), self.latents.expand(len(image), -1, -1)
        for layer in self.layers:
            look, think = layer.children()
            latents = latents + look(image, latents)
            latents = latents + think(latents)
        return self.norm_out(self.proj_out(latents))


def _feed_forward(width: int) -> nn.Sequential:
    wide, narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), narrow)


class KeysValues(nn.Module):
    """Keys and values of the picture's tokens, for one attention."""

    def __init__(self, context_dim: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)


class IPAdapter(nn.Module):
    """The network; a U-Net is told of its tokens by :func:`with_image`.

    Its attentions are numbered as the published files do, which count all attentions of the way down, then of
    the way up, then of the middle: those to the text have the odd numbers.

    Args:
        shape: see :class:`IPShape`; usually read off a file by :func:`ip_shape`.
    """

    def __init__(self, shape: IPShape) -> None:
        super().__init__()
        self.shape = shape
        if shape.kind == "plus":
            self.image_proj: nn.Module = Resampler(shape)
        elif shape.kind == "full":
            self.image_proj = FullProjection(shape.image_dim, shape.context_dim)
        else:
            self.image_proj = ImageProjection(shape.image_dim, shape.context_dim, shape.tokens)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): KeysValues(shape.context_dim, width) for i, width in enumerate(shape.widths)}
        )

    def forward(self, image: Tensor) -> Tensor:
        """The picture's tokens, ``[B, T, D]``.

        Args:
            image: the projected vector of CLIP's image tower, ``[B, P]`` (kind ``image``), or its last hidden
                state but one, ``[B, n, P]`` (``plus`` and ``full``).

        Raises:
            BadInput: another shape.
        """
        vector = self.shape.kind == "image"
        if image.ndim != 3 - vector or image.shape[-1] != self.shape.image_dim:
            wanted = f"[B, {'' if vector else 'n, '}{self.shape.image_dim}]"
            raise BadInput(
                f"this IP-Adapter needs a picture's features of shape {wanted}, not {list(image.shape)}"
            )
        return self.image_proj(image)


@dataclass
class ImagePrompt:
    """What an attached IP-Adapter tells, to be changed at any time.

    Attributes:
        tokens: ``[B, T, D]`` of the U-Net's batch, or of batch 1 for all; None: nothing, exactly. A row whose
            tokens are all zero gets nothing either.
        scale: factor, or one for each row of the batch, ``[B]``.
    """

    tokens: Tensor | None = None
    scale: float | Tensor = 1.0


class ImageAttention(CrossAttention):
    """An attention to the text that attends to pictures beside it.

    Its layers are the text's own, not copies; those of the adapter are not registered, so that the U-Net's
    ``state_dict`` stays what it is.
    """

    def __init__(self, text: CrossAttention, layers: KeysValues, prompt: ImagePrompt) -> None:
        nn.Module.__init__(self)
        self.heads = text.heads
        self.to_q, self.to_k, self.to_v, self.to_out = text.to_q, text.to_k, text.to_v, text.to_out
        before = text.pictures if isinstance(text, ImageAttention) else ()
        self.pictures: tuple[tuple[KeysValues, ImagePrompt], ...] = (*before, (layers, prompt))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x [B, L, C]``, ``context [B, M, D]`` to ``[B, L, C]``."""
        seen = x if context is None else context
        q = self.to_q(x)
        out = attend(q, self.to_k(seen), self.to_v(seen), self.heads)
        for layers, prompt in self.pictures:
            if prompt.tokens is None:
                continue
            if prompt.tokens.ndim != 3 or len(prompt.tokens) not in (1, len(x)):
                raise BadInput(
                    f"the picture's tokens, {list(prompt.tokens.shape)}, are not [B, T, D] of 1 or {len(x)} rows"
                )
            tokens = prompt.tokens.to(x).expand(len(x), -1, -1)
            more = attend(q, layers.to_k_ip(tokens), layers.to_v_ip(tokens), self.heads)
            scale = prompt.scale
            out = out + more * (scale.to(x)[:, None, None] if isinstance(scale, Tensor) else scale)
        return self.to_out(out)


@contextmanager
def with_image(unet: UNet, adapter: IPAdapter) -> Iterator[ImagePrompt]:
    """Let a U-Net attend to a picture until the block ends; several may be attached, one inside the other.

    Yields:
        The prompt, empty at first: give it ``tokens``.

    Raises:
        BadInput: the adapter was made for another model.
    """
    blocks = _attending(unet)
    width = unet.shape.context_dim
    found = tuple(block.attn2.to_q.in_features for block in blocks)
    if found != adapter.shape.widths or width != adapter.shape.context_dim:
        raise BadInput(
            f"an IP-Adapter for {len(adapter.shape.widths)} attentions to a context of width "
            f"{adapter.shape.context_dim} does not fit a U-Net with {len(found)} to one of width {width}, "
            "or their widths differ"
        )
    prompt = ImagePrompt()
    before = [block.attn2 for block in blocks]
    try:
        for block, attention, layers in zip(blocks, before, adapter.ip_adapter.values(), strict=True):
            assert isinstance(layers, KeysValues)
            block.attn2 = ImageAttention(attention, layers, prompt)
        yield prompt
    finally:
        for block, attention in zip(blocks, before, strict=True):
            block.attn2 = attention


def _attending(unet: UNet) -> list[BasicTransformerBlock]:
    """Every transformer block, in the order of the published numbers: down, up, middle."""
    rows = (*unet.input_blocks, *unet.output_blocks, unet.middle_block)
    return [each for row in rows for each in row.modules() if isinstance(each, BasicTransformerBlock)]


def ip_shape(shapes: Shapes) -> IPShape:
    """Read the shape of an IP-Adapter off a header (published names).

    Raises:
        BadFile: a tensor that tells a width is missing or of a shape that no IP-Adapter has; named.
    """
    widths: list[int] = []
    while (name := f"ip_adapter.{2 * len(widths) + 1}.to_k_ip.weight") in shapes:
        widths.append(_size(shapes, name, 0))
    context_dim = _size(shapes, "ip_adapter.1.to_k_ip.weight", 1)
    known = IPShape(kind="image", image_dim=1, context_dim=context_dim, widths=tuple(widths))
    if "image_proj.latents" in shapes:
        inner = _size(shapes, "image_proj.layers.0.0.to_q.weight", 0)
        if inner % HEAD:
            raise BadFile(
                f"tensor 'image_proj.layers.0.0.to_q.weight' has {inner} rows, no multiple of {HEAD}",
                "ip.shape",
            )
        return replace(
            known,
            kind="plus",
            image_dim=_size(shapes, "image_proj.proj_in.weight", 1),
            tokens=_size(shapes, "image_proj.latents", 1),
            inner=_size(shapes, "image_proj.latents", 2),
            depth=count(shapes, "image_proj.layers.{}.0.to_q.weight"),
            heads=inner // HEAD,
        )
    if "image_proj.proj.3.weight" in shapes:
        return replace(known, kind="full", image_dim=_size(shapes, "image_proj.proj.0.weight", 1))
    wide = _size(shapes, "image_proj.proj.weight", 0)
    if wide % context_dim:
        raise BadFile(
            f"tensor 'image_proj.proj.weight' has {wide} rows, no multiple of {context_dim}", "ip.shape"
        )
    return replace(
        known,
        image_dim=_size(shapes, "image_proj.proj.weight", 1),
        tokens=wide // context_dim,
    )
