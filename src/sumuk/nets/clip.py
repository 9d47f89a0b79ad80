"""The text towers of CLIP, under the two sets of names in which they are published.

Causal pre-norm transformer; the sentence is what the end token has read (Radford et al. 2021, "Learning
Transferable Visual Models From Natural Language Supervision", section 2.4):

    h_0 = token[ids] + position,   h_n = block_n(h_{n-1}),   last = norm(h_N),   pooled = last[first EOS]

``ClipText`` has the names of the transformers library (SD1, SDXL's first tower, SD3, FLUX.1),
``OpenClipText`` those of OpenCLIP (SD2, SDXL's second tower). Neither holds ``position_ids`` or
``logit_scale``, which some files carry: the first are 0, 1, 2..., the second belongs to training CLIP. A
layout ignores both by name.

Shapes: B texts, L tokens, D width, P projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.header import count

HEAD = 64  # channels of a head in every published text tower
Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """What a header says of a text tower.

    Attributes:
        vocabulary: rows of the token table.
        length: rows of the position table, the longest text in tokens.
        width: channels, a multiple of 64; width / 64 heads.
        depth: blocks.
        hidden: channels inside the feed-forward part.
        projection: channels of the projected sentence; None where the file has no projection.
    """

    vocabulary: int = 49408
    length: int = 77
    width: int = 768
    depth: int = 12
    hidden: int = 3072
    projection: int | None = None

    def __post_init__(self) -> None:
        if self.width < HEAD or self.width % HEAD:
            raise BadInput(f"text tower width {self.width} is not a multiple of {HEAD} (one head)")
        if min(self.vocabulary, self.length, self.depth, self.hidden) < 1:
            raise BadInput(f"a text tower needs tokens, positions, blocks of at least 1, not {self}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // HEAD


@dataclass(frozen=True)
class TextOutput:
    """What a tower says of B texts.

    Attributes:
        hidden: the input of the first block, then the output of each; depth + 1 tensors [B, L, D], unnormed.
        last: [B, L, D], the final norm of ``hidden[-1]``.
        pooled: [B, D], ``last`` at the first end token (the last position of a text that has none).
        projected: [B, P], or None where the tower has no projection.
    """

    hidden: tuple[Tensor, ...]
    last: Tensor
    pooled: Tensor
    projected: Tensor | None
    _norm: Callable[[Tensor], Tensor] = field(repr=False)

    def skip(self, k: int, norm: bool = True) -> Tensor:
        """The ``k``-th hidden state from the end, [B, L, D]; 1 is the last block's, 2 the one before.

        SD1 takes 1 with the norm, or more when someone asks for clip skip; SD2 2 with it; SDXL 2 without.
        """
        if not 1 <= k <= len(self.hidden):
            raise BadInput(f"clip skip {k} is outside 1..{len(self.hidden)}, the states of this text tower")
        if not norm:
            return self.hidden[-k]
        return self.last if k == 1 else self._norm(self.hidden[-k])


def clip_shape(shapes: Mapping[str, tuple[int, ...]]) -> ClipShape:
    """Reads a tower under transformers' names off its header; BadFile if it is none."""
    size = _reader(shapes, "text_model.embeddings.token_embedding.weight")
    return ClipShape(
        vocabulary=size("text_model.embeddings.token_embedding.weight", 0),
        width=size("text_model.embeddings.token_embedding.weight", 1),
        length=size("text_model.embeddings.position_embedding.weight", 0),
        depth=count(shapes, "text_model.encoder.layers.{}.self_attn.q_proj.weight"),
        hidden=size("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        projection=size("text_projection.weight", 0) if "text_projection.weight" in shapes else None,
    )


def open_clip_shape(shapes: Mapping[str, tuple[int, ...]]) -> ClipShape:
    """Reads a tower under OpenCLIP's names off its header; BadFile if it is none."""
    size = _reader(shapes, "positional_embedding")
    return ClipShape(
        vocabulary=size("token_embedding.weight", 0),
        width=size("token_embedding.weight", 1),
        length=size("positional_embedding", 0),
        depth=count(shapes, "transformer.resblocks.{}.attn.in_proj_weight"),
        hidden=size("transformer.resblocks.0.mlp.c_fc.weight", 0),
        projection=size("text_projection", 1) if "text_projection" in shapes else None,
    )


def _reader(shapes: Mapping[str, tuple[int, ...]], marker: str) -> Callable[[str, int], int]:
    def size(name: str, axis: int) -> int:
        if name not in shapes or len(shapes[name]) <= axis:
            raise BadFile(
                f"not a CLIP text tower (known by {marker!r}): tensor {name!r} is missing or too flat",
                "clip.header",
            )
        return shapes[name][axis]

    return size


class _Attention(nn.Module):
    """Self-attention under transformers' names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        return self.out_proj(_attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), allowed))

    def start(self, inner: float, outer: float) -> None:
        for part in (self.q_proj, self.k_proj, self.v_proj):
            _normal(part, inner)
        _normal(self.out_proj, outer)


class _FusedAttention(nn.Module):
    """Self-attention under OpenCLIP's names: q, k, v stacked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(_attend(q, k, v, allowed))

    def start(self, inner: float, outer: float) -> None:
        nn.init.normal_(self.in_proj_weight, std=inner)
        _normal(self.out_proj, outer)


class _Feed(nn.Module):
    """The feed-forward part under transformers' names."""

    def __init__(self, shape: ClipShape, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_activate(self.fc1(x), self.activation))

    def start(self, inner: float, outer: float) -> None:
        _normal(self.fc1, inner)
        _normal(self.fc2, outer)


class _OpenFeed(nn.Module):
    """The feed-forward part under OpenCLIP's names."""

    def __init__(self, shape: ClipShape, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(shape.width, shape.hidden)
        self.c_proj = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(_activate(self.c_fc(x), self.activation))

    def start(self, inner: float, outer: float) -> None:
        _normal(self.c_fc, inner)
        _normal(self.c_proj, outer)


class ClipLayer(nn.Module):
    """One block under transformers' names; [B, L, D] to the same."""

    def __init__(self, shape: ClipShape, activation: Activation) -> None:
        super().__init__()
        self.self_attn = _Attention(shape.width)
        self.layer_norm1 = nn.LayerNorm(shape.width)
        self.mlp = _Feed(shape, activation)
        self.layer_norm2 = nn.LayerNorm(shape.width)
        _start_block(self.self_attn, self.mlp, shape)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), allowed)
        return x + self.mlp(self.layer_norm2(x))


class OpenClipLayer(nn.Module):
    """One block under OpenCLIP's names; [B, L, D] to the same."""

    def __init__(self, shape: ClipShape, activation: Activation) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width)
        self.attn = _FusedAttention(shape.width)
        self.ln_2 = nn.LayerNorm(shape.width)
        self.mlp = _OpenFeed(shape, activation)
        _start_block(self.attn, self.mlp, shape)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), allowed)
        return x + self.mlp(self.ln_2(x))


class _Embeddings(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.token_embedding = _table(shape.vocabulary, shape.width, 0.02)
        self.position_embedding = _table(shape.length, shape.width, 0.01)


class _Layers(nn.Module):
    def __init__(self, shape: ClipShape, activation: Activation) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(shape, activation) for _ in range(shape.depth))


class _TextModel(nn.Module):
    def __init__(self, shape: ClipShape, activation: Activation) -> None:
        super().__init__()
        self.embeddings = _Embeddings(shape)
        self.encoder = _Layers(shape, activation)
        self.final_layer_norm = nn.LayerNorm(shape.width)


class ClipText(nn.Module):
    """A text tower under transformers' names (``text_model.embeddings...``).

    Args:
        shape: as ``clip_shape`` reads it.
        activation: "quick_gelu" in OpenAI's weights (CLIP-L), "gelu" in OpenCLIP's (H, G).
        eos: id of the end token; the last of the vocabulary unless given.
    """

    def __init__(
        self, shape: ClipShape, *, activation: Activation = "quick_gelu", eos: int | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.eos = shape.vocabulary - 1 if eos is None else eos
        self.text_model = _TextModel(shape, activation)
        if shape.projection is not None:
            self.text_projection = nn.Linear(shape.width, shape.projection, bias=False)
            nn.init.normal_(self.text_projection.weight, std=shape.width**-0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Token rows of ``ids`` without positions, [B, L] to [B, L, D]."""
        return self.text_model.embeddings.token_embedding(ids)

    def forward(
        self, ids: Tensor, embeddings: Tensor | None = None, mask: Tensor | None = None
    ) -> TextOutput:
        """Reads texts.

        Args:
            ids: [B, L] integers, L at most ``shape.length``, with their begin and end tokens.
            embeddings: [B, L, D] in place of ``embed(ids)`` (textual inversion); ids still tell the end.
            mask: [B, L], true where a token may be read, for families that hide padding.
        """
        model = self.text_model
        return _read(
            self.shape,
            ids,
            self.embed(ids) if embeddings is None else embeddings,
            model.embeddings.position_embedding.weight,
            model.encoder.layers,
            model.final_layer_norm,
            self.text_projection if self.shape.projection is not None else None,
            self.eos,
            mask,
        )


class _Blocks(nn.Module):
    def __init__(self, shape: ClipShape, activation: Activation) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipLayer(shape, activation) for _ in range(shape.depth))


class OpenClipText(nn.Module):
    """A text tower under OpenCLIP's names (``transformer.resblocks...``); arguments as of ``ClipText``."""

    def __init__(self, shape: ClipShape, *, activation: Activation = "gelu", eos: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.eos = shape.vocabulary - 1 if eos is None else eos
        self.positional_embedding = nn.Parameter(torch.empty(shape.length, shape.width))
        nn.init.normal_(self.positional_embedding, std=0.01)
        self.transformer = _Blocks(shape, activation)
        self.token_embedding = _table(shape.vocabulary, shape.width, 0.02)
        self.ln_final = nn.LayerNorm(shape.width)
        if shape.projection is not None:
            self.text_projection = nn.Parameter(torch.empty(shape.width, shape.projection))
            nn.init.normal_(self.text_projection, std=shape.width**-0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Token rows of ``ids`` without positions, [B, L] to [B, L, D]."""
        return self.token_embedding(ids)

    def forward(
        self, ids: Tensor, embeddings: Tensor | None = None, mask: Tensor | None = None
    ) -> TextOutput:
        """Reads texts; arguments as of ``ClipText.forward``."""
        return _read(
            self.shape,
            ids,
            self.embed(ids) if embeddings is None else embeddings,
            self.positional_embedding,
            self.transformer.resblocks,
            self.ln_final,
            self._project if self.shape.projection is not None else None,
            self.eos,
            mask,
        )

    def _project(self, pooled: Tensor) -> Tensor:
        return pooled @ self.text_projection


def _read(
    shape: ClipShape,
    ids: Tensor,
    rows: Tensor,
    positions: Tensor,
    blocks: Iterable[nn.Module],
    norm: nn.Module,
    project: Callable[[Tensor], Tensor] | None,
    eos: int,
    mask: Tensor | None,
) -> TextOutput:
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= shape.length:
        raise BadInput(f"token ids of shape {tuple(ids.shape)}: this tower takes [B, 1..{shape.length}]")
    if rows.shape != (*ids.shape, shape.width):
        raise BadInput(f"embeddings of shape {tuple(rows.shape)} do not fit {(*ids.shape, shape.width)}")
    if mask is not None and mask.shape != ids.shape:
        raise BadInput(f"mask of shape {tuple(mask.shape)} does not fit token ids {tuple(ids.shape)}")
    x = rows.to(positions.dtype) + positions[: ids.shape[1]]
    allowed = None if mask is None else _causal(mask)
    hidden = [x]
    for block in blocks:
        x = block(x, allowed)
        hidden.append(x)
    last = norm(x)
    at = _first(ids == eos)
    pooled = last[torch.arange(len(ids), device=last.device), at]
    return TextOutput(tuple(hidden), last, pooled, None if project is None else project(pooled), norm)


def _first(found: Tensor) -> Tensor:
    """Index of the first true in each row of [B, L], the last index in a row without any; [B]."""
    return torch.where(found.any(dim=1), found.int().argmax(dim=1), found.shape[1] - 1)


def _causal(mask: Tensor) -> Tensor:
    """Who may read whom, [B, 1, L, L]: nothing later, nothing masked; itself where there is nothing else."""
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    allowed = earlier & mask.bool()[:, None, None, :]
    return allowed | (itself & ~allowed.any(dim=-1, keepdim=True))


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Causal attention of heads of 64; [B, L, D] each."""
    q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
    return seen.transpose(1, 2).flatten(2)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    """The exact GELU, or x sigmoid(1.702 x), its fast likeness with which OpenAI trained."""
    return x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else F.gelu(x)


def _table(rows: int, width: int, spread: float) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=spread)
    return table


def _normal(part: nn.Linear, spread: float) -> None:
    nn.init.normal_(part.weight, std=spread)
    nn.init.zeros_(part.bias)


def _start_block(attention: _Attention | _FusedAttention, feed: _Feed | _OpenFeed, shape: ClipShape) -> None:
    """CLIP's own start: what writes to the residual stream shrinks with depth, so that it does not grow."""
    outer = (2 * shape.depth * shape.width) ** -0.5
    attention.start(shape.width**-0.5, outer)
    feed.start((2 * shape.width) ** -0.5, outer)
