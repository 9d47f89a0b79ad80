"""The transformer of Stable Diffusion 3 and 3.5: text and picture as two streams that attend to each other.

MMDiT (Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 4,
figure 2). Each stream has its own weights; in between, all tokens attend to all::

    emb            = t_embedder(features(t)) + y_embedder(y)
    a, b, g, ...   = adaLN_modulation(emb)                        shift, scale, gate: of attention, of the mlp
    q, k, v        = qkv(norm(x) (1 + b) + a)                     of both streams, then side by side
    x              = x + g proj(attend(q, k, v));   x = x + g' mlp(norm(x) (1 + b') + a')

One implementation for three shapes: SD3 medium; SD3.5 large, which normalises q and k of each head (RMS); SD3.5
medium (MMDiT-X), whose first blocks have a second attention among the picture's tokens alone, beside the joint one.
The last block's text goes nowhere any more, so that it has no more than a shift, a scale and its q, k, v.

Parameter names are those of the published single files, without their ``model.diffusion_model.`` prefix.
Letters: B batch, H W height and width of the latent, L tokens of the picture, M of the text, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import attend
from sumuk.nets.header import count, missing, reader
from sumuk.nets.layers import timestep_embedding, zero

_size = reader("MMDiT", "mmdit")

HEAD = 64
"""Channels of one attention head in all published models, which have as many heads as blocks."""

FREQUENCIES = 256
"""Features of the time."""

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class MMDiTShape:
    """Everything that decides which tensors an MMDiT has.

    Attributes:
        width: D; a multiple of 64.
        depth: blocks.
        context: width of the text's rows.
        pooled: length of the vector y.
        positions: side of the square table of positions, in patches; no picture may be larger.
        channels: of the latent that comes in.
        out_channels: of the prediction.
        patch: side of a patch, in latent cells.
        qk_norm: whether q and k are normalised, head by head (SD3.5).
        dual: how many of the first blocks have a second attention (SD3.5 medium: 13).

    Raises:
        BadInput: values that contradict each other.
    """

    width: int
    depth: int
    context: int
    pooled: int
    positions: int
    channels: int = 16
    out_channels: int = 16
    patch: int = 2
    qk_norm: bool = False
    dual: int = 0

    def __post_init__(self) -> None:
        if self.width < HEAD or self.width % HEAD:
            raise BadInput(f"MMDiT width {self.width} is not a positive multiple of {HEAD} (one head)")
        if not 0 <= self.dual <= self.depth or self.depth < 1:
            raise BadInput(
                f"{self.dual} blocks with two attentions do not fit an MMDiT of depth {self.depth}"
            )
        sizes = (self.context, self.pooled, self.positions, self.channels, self.out_channels, self.patch)
        if min(sizes) < 1:
            raise BadInput(f"all sizes of an MMDiT must be at least 1, not {self}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // HEAD


class Attention(nn.Module):
    """Queries, keys and values of a stream, and the projection of what they found.

    Args:
        shape: see :class:`MMDiTShape`.
        writes: whether anything is done with what was found.
    """

    def __init__(self, shape: MMDiTShape, *, writes: bool = True) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        if writes:
            self.proj = nn.Linear(shape.width, shape.width)
        self.qk_norm = shape.qk_norm
        if shape.qk_norm:
            self.ln_q = nn.RMSNorm(HEAD, eps=EPSILON)
            self.ln_k = nn.RMSNorm(HEAD, eps=EPSILON)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x [B, L, D]``, each ``[B, L, D]``."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.qk_norm:
            q = self.ln_q(q.unflatten(-1, (self.heads, HEAD))).flatten(-2)
            k = self.ln_k(k.unflatten(-1, (self.heads, HEAD))).flatten(-2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """Attention of a stream to itself, ``[B, L, D]`` to the same."""
        return self.proj(attend(*self.read(x), self.heads))


class Mlp(nn.Module):
    """Two linear layers around a GELU (its tanh form), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulation(width: int, count: int) -> nn.Sequential:
    """``count`` vectors from the embedding; none at first (adaLN-Zero, Peebles & Xie 2023, section 3.2)."""
    linear = nn.Linear(width, count * width)
    zero(linear)
    return nn.Sequential(nn.SiLU(), linear)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class Stream(nn.Module):
    """One side of a joint block: the picture's tokens or the text's, ``[B, L, D]``.

    Args:
        shape: see :class:`MMDiTShape`.
        dual: whether it has a second attention, to itself alone.
        last: whether it is only looked at and not carried on.
    """

    def __init__(self, shape: MMDiTShape, *, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.dual = dual
        self.count = 2 if last else 9 if dual else 6
        self.attn = Attention(shape, writes=not last)
        if dual:
            self.attn2 = Attention(shape)
        if not last:
            self.mlp = Mlp(shape.width)
        self.adaLN_modulation = _modulation(shape.width, self.count)

    def signals(self, emb: Tensor) -> tuple[Tensor, ...]:
        """What the embedding ``[B, D]`` says to this block, each ``[B, 1, D]``.

        Shift, scale and gate of the joint attention, of the mlp, of the second attention, as far as there are such.
        """
        return self.adaLN_modulation(emb)[:, None].chunk(self.count, dim=-1)

    def read(self, x: Tensor, signals: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values for the joint attention."""
        return self.attn.read(_modulate(x, *signals[:2]))

    def write(self, x: Tensor, found: Tensor, signals: tuple[Tensor, ...]) -> Tensor:
        """The stream after the block, with what the joint attention found for it."""
        before = x
        x = x + signals[2] * self.attn.proj(found)
        if self.dual:
            shift, scale, gate = signals[6:]
            x = x + gate * self.attn2(_modulate(before, shift, scale))
        shift, scale, gate = signals[3:6]
        return x + gate * self.mlp(_modulate(x, shift, scale))


class JointBlock(nn.Module):
    """One block: both streams read, all attend to all, each stream writes.

    Args:
        shape: see :class:`MMDiTShape`.
        dual: whether the picture has a second attention.
        last: whether the text ends here.
    """

    def __init__(self, shape: MMDiTShape, *, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.heads, self.last = shape.heads, last
        self.context_block = Stream(shape, last=last)
        self.x_block = Stream(shape, dual=dual)

    def forward(self, x: Tensor, context: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """``x [B, L, D]``, ``context [B, M, D]``, ``emb [B, D]`` to the next ``x`` and ``context``."""
        to_x, to_context = self.x_block.signals(emb), self.context_block.signals(emb)
        text, own = self.context_block.read(context, to_context), self.x_block.read(x, to_x)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, own, strict=True))
        if self.last:  # nobody asks what the text found
            return self.x_block.write(x, attend(own[0], k, v, self.heads), to_x), context
        found, seen = attend(q, k, v, self.heads).split((context.shape[1], x.shape[1]), dim=1)
        return self.x_block.write(x, seen, to_x), self.context_block.write(context, found, to_context)


class Embedder(nn.Module):
    """Two linear layers around a SiLU: a vector to the width of the tokens."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Patches(nn.Module):
    """The latent ``[B, C, H, W]`` cut into patches, each a vector: ``[B, D, H / p, W / p]``."""

    def __init__(self, shape: MMDiTShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(shape.channels, shape.width, shape.patch, stride=shape.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FinalLayer(nn.Module):
    """Tokens ``[B, L, D]`` to the cells of their patches, ``[B, L, p p C]``; an untrained one says zero."""

    def __init__(self, shape: MMDiTShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.width, shape.patch**2 * shape.out_channels)
        zero(self.linear)
        self.adaLN_modulation = _modulation(shape.width, 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(emb)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(x, shift, scale))


class MMDiT(nn.Module):
    """The denoiser.

    Args:
        shape: see :class:`MMDiTShape`; usually read off a file by :func:`mmdit_shape`.
    """

    pos_embed: Tensor

    def __init__(self, shape: MMDiTShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("pos_embed", _places(shape))  # files store it
        self.x_embedder = Patches(shape)
        self.t_embedder = Embedder(FREQUENCIES, shape.width)
        self.y_embedder = Embedder(shape.pooled, shape.width)
        self.context_embedder = nn.Linear(shape.context, shape.width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(shape, dual=number < shape.dual, last=number == shape.depth - 1)
            for number in range(shape.depth)
        )
        self.final_layer = FinalLayer(shape)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        skip_layers: Sequence[int] = (),
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict the velocity, noise minus picture, from a noisy latent.

        Args:
            x: noisy latent, ``[B, C, H, W]``. A side that is no multiple of the patch is worked on as if its last
                row or column were there again.
            t: network time, ``[B]``, 1000 times sigma.
            context: rows of the text, ``[B, M, context]``.
            y: the sentence as one vector, ``[B, pooled]``.
            skip_layers: numbers of blocks to leave out, for skip-layer guidance (SD3.5 medium: 7, 8, 9).
            residuals: what a control adds to the picture's tokens ``[B, L, D]``: any number of tensors up to the
                depth, spread evenly over the blocks and added after each but the last.

        Returns:
            ``[B, out_channels, H, W]``.

        Raises:
            BadInput: a part is missing or of the wrong shape, a block is none, or the picture is too large.
        """
        self._check(x, t, context, y)
        depth, patch = self.shape.depth, self.shape.patch
        skipped = set(skip_layers)
        if not skipped <= set(range(depth)):
            raise BadInput(f"skip_layers {list(skip_layers)}: this MMDiT has the blocks 0 to {depth - 1}")
        if residuals is not None and not 1 <= len(residuals) <= depth:
            raise BadInput(f"{len(residuals)} control residuals do not fit this MMDiT of {depth} blocks")

        height, width = x.shape[-2:]
        if height % patch or width % patch:
            x = F.pad(x, (0, -width % patch, 0, -height % patch), mode="replicate")
        cells = self.x_embedder(x)
        rows, columns = cells.shape[-2:]
        h = (cells.flatten(2).transpose(1, 2) + self._crop(rows, columns)).to(x.dtype)
        text = self.context_embedder(context.to(x.dtype))
        emb = self.t_embedder(timestep_embedding(t, FREQUENCIES).to(x.dtype)) + self.y_embedder(y.to(x.dtype))
        for number, block in enumerate(self.joint_blocks):
            if number not in skipped:
                h, text = block(h, text, emb)
            if residuals is not None and number < depth - 1:
                h = h + residuals[number * len(residuals) // depth].to(h.dtype)
        h = self.final_layer(h, emb)
        h = h.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
        h = h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * patch, columns * patch)
        return h[..., :height, :width]

    def _check(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> None:
        shape = self.shape
        if x.ndim != 4 or x.shape[1] != shape.channels or not x.numel():
            wanted = f"[B, {shape.channels}, H, W]"
            raise BadInput(f"this MMDiT needs x of shape {wanted}, not {tuple(x.shape)}")
        batch, most = len(x), shape.positions * shape.patch
        if max(x.shape[2:]) > most:
            raise BadInput(
                f"a latent of {x.shape[2]} x {x.shape[3]} is too large: this MMDiT knows places for {most} a side"
            )
        if t.shape != (batch,):
            raise BadInput(f"this MMDiT needs t of shape [{batch}], not {tuple(t.shape)}")
        if context.ndim != 3 or context.shape[::2] != (batch, shape.context):
            wanted = f"[{batch}, M, {shape.context}]"
            raise BadInput(f"this MMDiT needs a context of shape {wanted}, not {tuple(context.shape)}")
        if y.shape != (batch, shape.pooled):
            raise BadInput(f"this MMDiT needs y of shape [{batch}, {shape.pooled}], not {tuple(y.shape)}")

    def _crop(self, rows: int, columns: int) -> Tensor:
        """The middle of the table of positions, ``[1, rows columns, D]``."""
        side = self.shape.positions
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.pos_embed.unflatten(1, (side, side))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


def _places(shape: MMDiTShape) -> Tensor:
    """The table of an untrained network, ``[1, positions^2, D]``: sinusoids of column and of row.

    Both are counted in quarters of a patch from where a picture of 64 patches a side begins (Esser et al. 2024,
    section 5.3.2, for 1024 pixels), so that all sizes that are cut from the middle share one scale.
    """
    side = shape.positions
    at = timestep_embedding((torch.arange(side) - (side - 64) / 2) / 4, shape.width // 2)
    table = torch.cat((at[None].expand(side, -1, -1), at[:, None].expand(-1, side, -1)), dim=-1)
    return table.flatten(0, 1)[None]


def mmdit_shape(shapes: Mapping[str, tuple[int, ...]]) -> MMDiTShape:
    """Read the shape of an MMDiT off names and shapes.

    Args:
        shapes: shape of each tensor, by its published name without prefix. Those that the reading does not need are
            not looked at; whoever loads them compares them with the network's own.

    Raises:
        BadFile: a tensor that tells the shape is missing or senseless; named.
    """
    first, places, last = "x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight"
    patch, cells, square = _size(shapes, first, 2), _size(shapes, last, 0), _size(shapes, places, 1)
    if cells % patch**2:
        raise BadFile(
            f"{last!r} has {cells} rows, no multiple of the {patch**2} cells of a patch", "mmdit.shape"
        )
    if isqrt(square) ** 2 != square:
        raise BadFile(f"{places!r} has {square} places, which are no square", "mmdit.shape")
    depth = count(shapes, "joint_blocks.{}.x_block.attn.qkv.weight")
    if not depth:
        raise missing("joint_blocks.0.x_block.attn.qkv.weight", "MMDiT", "mmdit")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    if norm in shapes and _size(shapes, norm, 0) != HEAD:
        raise BadFile(f"{norm!r} has {_size(shapes, norm, 0)} channels; heads have {HEAD}", "mmdit.shape")
    try:
        return MMDiTShape(
            width=_size(shapes, first, 0),
            depth=depth,
            context=_size(shapes, "context_embedder.weight", 1),
            pooled=_size(shapes, "y_embedder.mlp.0.weight", 1),
            positions=isqrt(square),
            channels=_size(shapes, first, 1),
            out_channels=cells // patch**2,
            patch=patch,
            qk_norm=norm in shapes,
            dual=count(shapes, "joint_blocks.{}.x_block.attn2.qkv.weight"),
        )
    except BadInput as error:
        raise BadFile(f"{first!r} of shape {list(shapes[first])}: {error}", "mmdit.shape") from error
