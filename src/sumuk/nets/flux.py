"""FLUX.1 (Black Forest Labs 2024): one transformer over the tokens of text and image, a rectified flow.

The latent is cut into 2x2 patches, one token each. With ``v`` the embedding of time, sentence and guidance::

    v = time_in(1000 sigma) + vector_in(y) + guidance_in(1000 g)      mod(x; a, b) = (1 + b) layernorm(x) + a

Double blocks keep own weights for each stream s in (text, image), joined in attention alone (MM-DiT, Esser
et al. 2024, section 4); a, b, c, a', b', c' are six linear functions of ``silu(v)``::

    q_s, k_s, v_s = qkv(mod(x_s; a, b));   h = attend([q_text, q_image], ...)
    x_s = x_s + c proj(h_s);               x_s = x_s + c' mlp(mod(x_s; a', b'))

Single blocks see the two streams as one, and do attention and feed-forward side by side (Dehghani et al.
2023, section 2.1), with three functions a, b, c of ``silu(v)``::

    q, k, v, m = linear1(mod(x; a, b));    x = x + c linear2([attend(q, k, v), gelu(m)])

Queries and keys are RMS-normalised head by head, then rotated by their place (RoPE, Su et al. 2021): part of
each head by the row of its patch, part by the column. Text stands at the origin and is not rotated.

Letters: B batch, C channels, H and W the latent's cells, L = H W / 4 image tokens, M text tokens, D width,
d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import attend
from sumuk.nets.layers import timestep_embedding

PATCH = 2
TIME = 256
"""Sinusoidal features of time and of guidance."""
MLP = 4
"""Width of the feed-forward parts over that of the tokens."""
THETA = 10_000.0
"""Longest wavelength of the rotation over 2 pi."""
EPS = 1e-6

Turn = tuple[Tensor, Tensor]
"""Cosines and sines by which each token's heads are rotated, both float32 ``[M + L, 1, d / 2]``."""
Residuals = tuple[Sequence[Tensor], Sequence[Tensor]]
"""What a control adds to the image tokens: after double blocks, after single blocks; each ``[B, L, D]``."""


@dataclass(frozen=True, kw_only=True)
class FluxShape:
    """What a header says of a FLUX.1 transformer. The defaults are FLUX.1 [dev].

    Attributes:
        in_channels: channels C of the input before packing, those laid beside the latent included: 16, 32
            (canny, depth) or 96 (fill).
        out_channels: channels of the latent.
        width: width D of the tokens.
        head: width d of a head.
        double: number of double blocks.
        single: number of single blocks.
        context_dim: width of the text's features (T5).
        vector_dim: width of the sentence's vector (CLIP).
        guidance: whether the guidance scale is an input (dev and its tools; not schnell).
    """

    in_channels: int = 16
    out_channels: int = 16
    width: int = 3072
    head: int = 128
    double: int = 19
    single: int = 38
    context_dim: int = 4096
    vector_dim: int = 768
    guidance: bool = True

    def __post_init__(self) -> None:
        widths = (self.in_channels, self.out_channels, self.width, self.context_dim, self.vector_dim)
        if min(*widths, self.double) < 1 or self.single < 0:
            raise BadInput(f"FLUX.1 needs widths and double blocks of at least 1, not {self}")
        if self.head < 6 or self.head % 2:
            raise BadInput(
                f"a head of width {self.head} has no room for three rotated axes; use 6, 8, 10, ..."
            )
        if self.width % self.head:
            raise BadInput(f"heads of width {self.head} do not divide the width {self.width}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // self.head

    @property
    def patch(self) -> int:
        """Cells a side of the patch that becomes a token; the latent's sides are multiples of it."""
        return PATCH

    @property
    def axes(self) -> tuple[int, int, int]:
        """Features of a head that turn with (unused axis, row, column), each an even number.

        A file does not show them. Published are (16, 56, 56) of 128; here row and column each get the largest
        even number up to 7/16 of any head, and the unused axis, which never turns, gets the rest.
        """
        side = 7 * self.head // 32 * 2
        return self.head - 2 * side, side, side


class Embedder(nn.Sequential):
    """Two linear layers around SiLU, ``[B, features] -> [B, D]``, named as published."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(features, width)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(width, width)


class RmsNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis (Zhang & Sennrich 2019), always in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), EPS)


class HeadNorm(nn.Module):
    """Normalisation of queries and keys, each head ``[..., d]`` by itself; float32."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.query_norm = RmsNorm(head)
        self.key_norm = RmsNorm(head)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    """``count`` vectors of the embedding, each ``[B, 1, D]``."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.count, dim=-1)


class Attention(nn.Module):
    """The layers around one stream's share in a double block's attention."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = HeadNorm(head)
        self.proj = nn.Linear(width, width)

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys by head, normalised, ``[B, n, heads, d]``, and values ``[B, n, D]``."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.norm(_by_head(q, self.head), _by_head(k, self.head))
        return q, k, v


class DoubleBlock(nn.Module):
    """A step of both streams, each with its own weights; see the head of this file."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.img_mod = Modulation(width, 6)
        self.img_attn = Attention(width, head)
        self.img_mlp = _mlp(width)
        self.txt_mod = Modulation(width, 6)
        self.txt_attn = Attention(width, head)
        self.txt_mlp = _mlp(width)

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """``image [B, L, D]``, ``text [B, M, D]`` and ``vector [B, D]`` to the next image and text."""
        i_shift, i_scale, i_gate, *i_after = self.img_mod(vector)
        t_shift, t_scale, t_gate, *t_after = self.txt_mod(vector)
        asked = (
            self.txt_attn.ask(_mod(text, t_shift, t_scale)),
            self.img_attn.ask(_mod(image, i_shift, i_scale)),
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*asked, strict=True))
        seen = _attend(q, k, v, turn)
        text = text + t_gate * self.txt_attn.proj(seen[:, : text.shape[1]])
        image = image + i_gate * self.img_attn.proj(seen[:, text.shape[1] :])
        shift, scale, gate = t_after
        text = text + gate * self.txt_mlp(_mod(text, shift, scale))
        shift, scale, gate = i_after
        return image + gate * self.img_mlp(_mod(image, shift, scale)), text


class SingleBlock(nn.Module):
    """A step of both streams as one; see the head of this file."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.modulation = Modulation(width, 3)
        self.linear1 = nn.Linear(width, (3 + MLP) * width)
        self.norm = HeadNorm(head)
        self.linear2 = nn.Linear((1 + MLP) * width, width)

    def forward(self, x: Tensor, vector: Tensor, turn: Turn) -> Tensor:
        """``x [B, M + L, D]`` (text first) and ``vector [B, D]`` to the next x."""
        shift, scale, gate = self.modulation(vector)
        width = x.shape[-1]
        q, k, v, inner = self.linear1(_mod(x, shift, scale)).split((width, width, width, MLP * width), dim=-1)
        q, k = self.norm(_by_head(q, self.head), _by_head(k, self.head))
        inner = F.gelu(inner, approximate="tanh")
        return x + gate * self.linear2(torch.cat((_attend(q, k, v, turn), inner), dim=-1))


class LastLayer(nn.Module):
    """Modulated norm and projection to patches, ``[B, L, D] -> [B, L, 4 C]``."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, PATCH**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(_mod(x, shift, scale))


class Flux(nn.Module):
    """The denoiser.

    Guests attach from outside: adapters replace or hook the plain ``nn.Linear`` modules, controls hand their
    findings to ``forward(residuals=...)``.

    Args:
        shape: see :class:`FluxShape`; usually read off a file by :func:`flux_shape`.
    """

    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.img_in = nn.Linear(PATCH**2 * shape.in_channels, width)
        self.txt_in = nn.Linear(shape.context_dim, width)
        self.time_in = Embedder(TIME, width)
        self.vector_in = Embedder(shape.vector_dim, width)
        if shape.guidance:
            self.guidance_in = Embedder(TIME, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, shape.head) for _ in range(shape.double))
        self.single_blocks = nn.ModuleList(SingleBlock(width, shape.head) for _ in range(shape.single))
        self.final_layer = LastLayer(width, shape.out_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """Predict the flow from a noisy latent.

        Args:
            x: noisy latent, with further channels appended where the model takes them, ``[B, C, H, W]``; H and
                W even. Packing keeps channels in order, so that what was appended here is appended there.
            t: network time ``1000 sigma``, ``[B]``.
            context: features of the text (T5), ``[B, M, context_dim]``.
            y: the sentence as one vector (CLIP), ``[B, vector_dim]``.
            guidance: scale, ``[B]``, for models that have learnt it and no others.
            residuals: what controls add to the image tokens, one list for the double blocks and one for the
                single ones; either may be empty. A list shorter than its blocks is spread over them: of n
                blocks, ``ceil(n / len)`` in a row get the same.

        Returns:
            ``[B, out_channels, H, W]``.

        Raises:
            BadInput: a part is missing, superfluous, or of the wrong shape.
        """
        self._check(x, t, context, y, guidance)
        vector = self.embed(t, y, guidance, x.dtype)
        rows, columns, words = x.shape[2] // PATCH, x.shape[3] // PATCH, context.shape[1]
        turn = rotation(self.shape, rows, columns, words, x.device)
        image, text = self.img_in(pack(x)), self.txt_in(context.to(x.dtype))
        double, single = residuals or ((), ())
        for block, more in zip(self.double_blocks, self._spread("double", double, image), strict=True):
            image, text = block(image, text, vector, turn)
            image = image if more is None else image + more
        both = torch.cat((text, image), dim=1)
        for block, more in zip(self.single_blocks, self._spread("single", single, image), strict=True):
            both = block(both, vector, turn)
            if more is not None:
                both = torch.cat((both[:, :words], both[:, words:] + more), dim=1)
        return unpack(self.final_layer(both[:, words:], vector), rows, columns)

    def embed(self, t: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embedding of time, sentence and guidance, ``[B, D]``; see :meth:`forward`."""
        vector = self.time_in(timestep_embedding(t, TIME).to(dtype))
        if guidance is not None:
            vector = vector + self.guidance_in(timestep_embedding(1000.0 * guidance.float(), TIME).to(dtype))
        return vector + self.vector_in(y.to(dtype))

    def _check(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor, guidance: Tensor | None) -> None:
        shape = self.shape
        if x.ndim != 4 or x.shape[1] != shape.in_channels:
            raise BadInput(
                f"this FLUX.1 needs x of shape [B, {shape.in_channels}, H, W], not {tuple(x.shape)}"
            )
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        if height % PATCH or width % PATCH or not height * width:
            raise BadInput(
                f"FLUX.1 cuts the latent into patches of {PATCH}x{PATCH}, so its height and width must be even, "
                f"not {height}x{width}"
            )
        if t.shape != (batch,):
            raise BadInput(f"this FLUX.1 needs one time for each image, [{batch}], not {tuple(t.shape)}")
        if context.ndim != 3 or context.shape[::2] != (batch, shape.context_dim):
            wanted = f"[{batch}, M, {shape.context_dim}]"
            raise BadInput(f"this FLUX.1 needs a context of shape {wanted}, not {tuple(context.shape)}")
        if y.shape != (batch, shape.vector_dim):
            raise BadInput(
                f"this FLUX.1 needs y of shape [{batch}, {shape.vector_dim}], not {tuple(y.shape)}"
            )
        if (guidance is not None) != shape.guidance:
            verb = "needs a" if shape.guidance else "takes no"
            raise BadInput(f"this FLUX.1 {verb} guidance scale as an input (dev does, schnell does not)")
        if guidance is not None and guidance.shape != (batch,):
            raise BadInput(f"this FLUX.1 needs a guidance of shape [{batch}], not {tuple(guidance.shape)}")

    def _spread(self, kind: str, given: Sequence[Tensor], image: Tensor) -> list[Tensor | None]:
        """One residual, or None, for each block of a kind; see :meth:`forward`."""
        blocks = getattr(self.shape, kind)
        if not given:
            return [None] * blocks
        if len(given) > blocks:
            raise BadInput(f"{len(given)} control residuals do not fit this FLUX.1 of {blocks} {kind} blocks")
        for each in given:
            if each.shape[1:] != image.shape[1:]:
                wanted = f"[B, {image.shape[1]}, {image.shape[2]}]"
                raise BadInput(
                    f"a control residual of shape {tuple(each.shape)} does not fit tokens {wanted}"
                )
        in_a_row = -(-blocks // len(given))
        return [given[index // in_a_row].to(image.dtype) for index in range(blocks)]


def pack(x: Tensor) -> Tensor:
    """Patches as tokens, row by row: ``[B, C, H, W] -> [B, H W / 4, 4 C]``, features ordered (C, row, column)."""
    return F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: ``[B, rows columns, 4 C] -> [B, C, 2 rows, 2 columns]``."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)


def rotation(shape: FluxShape, rows: int, columns: int, words: int, device: torch.device) -> Turn:
    """The rotation of every token, text first: by ``n THETA^(-2 i / a)`` for row or column n, an axis of a."""
    real = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    unused, *sides = shape.axes
    parts = []
    for axis, count, view in zip(sides, (rows, columns), ((-1, 1, 1), (1, -1, 1)), strict=True):
        speed = THETA ** (-torch.arange(0, axis, 2, device=device, dtype=real) / axis)
        place = torch.arange(count, device=device, dtype=real).view(view)
        parts.append((place * speed).expand(rows, columns, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, 1)
    angles = F.pad(angles, (unused // 2, 0, words, 0))[:, None]  # the unused axis and the text do not turn
    return angles.cos().float(), angles.sin().float()


def _rotated(x: Tensor, turn: Turn) -> Tensor:
    """Features 2 i and 2 i + 1 of every head ``[B, n, heads, d]`` turned as a pair."""
    (cos, sin), (even, odd) = turn, x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
    """Rotated attention, ``[B, n, D]``, in the dtype of the values."""
    q, k = (_rotated(x, turn) for x in (q, k))
    return attend(q.flatten(2).to(v.dtype), k.flatten(2).to(v.dtype), v, q.shape[2])


def _by_head(x: Tensor, head: int) -> Tensor:
    return x.unflatten(-1, (-1, head))


def _mod(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, MLP * width), nn.GELU("tanh"), nn.Linear(MLP * width, width))


def flux_shape(shapes: Mapping[str, tuple[int, ...]]) -> FluxShape:
    """Read the shape of a FLUX.1 transformer off a header (published names without prefix).

    Raises:
        BadFile: a tensor that tells a width is missing or of a shape that no FLUX.1 has; named.
    """

    def size(name: str, axis: int, unit: int = 1) -> int:
        if name not in shapes:
            raise BadFile(f"tensor {name!r} is missing; the file is incomplete or no FLUX.1", "flux.missing")
        shape = shapes[name]
        if axis >= len(shape) or not 0 < shape[axis] <= 2**20 or shape[axis] % unit:
            raise BadFile(f"tensor {name!r} has the shape {list(shape)}, which no FLUX.1 has", "flux.shape")
        return shape[axis] // unit

    def count(pattern: str) -> int:
        number = 0
        while pattern.format(number) in shapes:
            number += 1
        return number

    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    try:
        return FluxShape(
            in_channels=size("img_in.weight", 1, PATCH**2),
            out_channels=size("final_layer.linear.weight", 0, PATCH**2),
            width=size("img_in.weight", 0),
            head=size(norm, 0),
            double=count("double_blocks.{}.img_attn.norm.query_norm.scale"),
            single=count("single_blocks.{}.linear1.weight"),
            context_dim=size("txt_in.weight", 1),
            vector_dim=size("vector_in.in_layer.weight", 1),
            guidance="guidance_in.in_layer.weight" in shapes,
        )
    except BadInput as error:
        raise BadFile(f"{norm!r} of shape {list(shapes[norm])}: {error}", "flux.shape") from error
