"""ControlNets for the transformers FLUX.1 and SD3: their first blocks once more, reading a picture as well.

The picture comes as a latent. Its patches are projected and added to those of the noisy latent; the image
tokens after each block pass a linear layer that started at zero, and are added to those of the big network
(Zhang, Rao & Agrawala 2023, carried over to transformers)::

    x_0 = embed(latent) + embed_hint(picture);    x_i = block_i(x_{i-1}, text, v);    r_i = zero_i(x_i)

These ControlNets were published in the diffusers layout, so its names are the native ones.

Letters: B batch, C channels, H W height and width of the latent, L = H W / 4 image tokens, M text tokens, D
width, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.control_blocks import JointBlock, SingleBlock, TimeText
from sumuk.nets.flux import PATCH, FluxShape, pack, rotation
from sumuk.nets.header import count, reader
from sumuk.nets.layers import zero

_size = reader("ControlNet", "control")

HEAD = 64
"""Width of a head in SD3; FLUX.1 shows it by its norms."""


@dataclass(frozen=True, kw_only=True)
class FluxControlShape(FluxShape):
    """The shape of the copied blocks, and that of the inputs that control them.

    Attributes:
        hint_channels: channels of the picture's latent before packing.
        modes: how many kinds of pictures a union tells apart by number; None: it reads one kind.
    """

    hint_channels: int = 16
    modes: int | None = None


@dataclass(frozen=True, kw_only=True)
class SD3ControlShape:
    """What a header says of an SD3 ControlNet.

    Attributes:
        in_channels: channels C of the noisy latent.
        hint_channels: those of the picture's latent, with a mask appended where the net takes one.
        width: width D of the tokens.
        head: width d of a head.
        depth: number of blocks.
        context_dim: width of the text's features.
        vector_dim: width of the sentence's vector.
        places: rows, and columns, of the table of places.
        normed: whether queries and keys are normalised (SD3.5).
    """

    in_channels: int = 16
    hint_channels: int = 16
    width: int
    head: int = HEAD
    depth: int
    context_dim: int = 4096
    vector_dim: int = 2048
    places: int = 192
    normed: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.head, self.depth, self.places) < 1 or self.width % self.head:
            raise BadInput(f"heads of width {self.head} do not divide the width {self.width} of {self}")


class FluxControlNet(nn.Module):
    """ControlNet of FLUX.1 as InstantX published it, for one kind of picture or, as a union, for several.

    Args:
        shape: see :class:`FluxControlShape`; usually read off a file by :func:`flux_control_shape`.
    """

    def __init__(self, shape: FluxControlShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.time_text_embed = TimeText(shape.vector_dim, width, guidance=shape.guidance)
        self.context_embedder = nn.Linear(shape.context_dim, width)
        self.x_embedder = nn.Linear(PATCH**2 * shape.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, shape.head, normed=True) for _ in range(shape.double)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, shape.head) for _ in range(shape.single)
        )
        self.controlnet_blocks = _zero_layers(width, shape.double)
        self.controlnet_single_blocks = _zero_layers(width, shape.single)
        if shape.modes is not None:
            self.controlnet_mode_embedder = nn.Embedding(shape.modes, width)
        self.controlnet_x_embedder = nn.Linear(PATCH**2 * shape.hint_channels, width)
        zero(self.controlnet_x_embedder)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        hint: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        mode: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What ``Flux.forward(residuals=...)`` takes, for the same inputs.

        Args:
            x: noisy latent, ``[B, C, H, W]``; H and W even.
            t: network time ``1000 sigma``, ``[B]``.
            hint: the picture's latent, shifted and scaled as the model's own, ``[B or 1, C, H, W]``.
            context: features of the text (T5), ``[B, M, context_dim]``.
            y: the sentence as one vector (CLIP), ``[B, vector_dim]``.
            guidance: scale, ``[B]``, for networks that take it.
            mode: kind of the picture by number, ``[B]`` long, for unions.

        Returns:
            One tensor ``[B, L, D]`` for each double block, and one for each single block.

        Raises:
            BadInput: a part is missing, superfluous, or of the wrong shape.
        """
        shape = self.shape
        _check(x, t, hint, context, y, shape)
        if x.shape[2] % PATCH or x.shape[3] % PATCH:
            raise BadInput(f"FLUX.1 needs a latent of even height and width, not {list(x.shape[2:])}")
        if (guidance is not None) != shape.guidance:
            raise BadInput(f"this ControlNet {'needs a' if shape.guidance else 'takes no'} guidance scale")
        text = self.context_embedder(context.to(x.dtype))
        if (mode is not None) != (shape.modes is not None):
            raise BadInput(
                f"this ControlNet {'takes no' if shape.modes is None else 'needs a'} mode of its picture"
            )
        if mode is not None:
            if mode.shape != x.shape[:1] or mode.is_floating_point():
                raise BadInput(f"mode needs the shape [{x.shape[0]}] and dtype long, not {tuple(mode.shape)}")
            if not all(0 <= each < (shape.modes or 0) for each in mode.tolist()):
                raise BadInput(
                    f"modes {mode.tolist()} are not all among the {shape.modes} of this union, from 0"
                )
            text = torch.cat((self.controlnet_mode_embedder(mode)[:, None], text), dim=1)
        v = self.time_text_embed(t, y, guidance, x.dtype)
        rows, columns, words = x.shape[2] // PATCH, x.shape[3] // PATCH, text.shape[1]
        turn = rotation(shape, rows, columns, words, x.device)
        image = self.x_embedder(pack(x)) + self.controlnet_x_embedder(pack(hint.to(x.dtype)))
        double, single = [], []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            image, text = block(image, text, v, turn)
            double.append(out(image))
        both = torch.cat((text, image), dim=1)
        for block, out in zip(self.single_transformer_blocks, self.controlnet_single_blocks, strict=True):
            both = block(both, v, turn)
            single.append(out(both[:, words:]))
        return double, single


class Patches(nn.Module):
    """Patches of 2x2 as tokens, ``[B, C, H, W] -> [B, L, D]``, with their places if there is a table of them."""

    def __init__(self, channels: int, width: int, places: int | None = None) -> None:
        super().__init__()
        self.places = places
        self.proj = nn.Conv2d(channels, width, PATCH, stride=PATCH)
        if places is not None:
            self.pos_embed: Tensor
            self.register_buffer("pos_embed", torch.zeros(1, places**2, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        if self.places is not None:
            (rows, columns), side = h.shape[-2:], self.places
            if max(rows, columns) > side:
                raise BadInput(
                    f"a latent of {x.shape[2]}x{x.shape[3]} has more than the {side}x{side} places this "
                    "ControlNet knows; draw smaller"
                )
            top, left = (side - rows) // 2, (side - columns) // 2
            table = self.pos_embed[0].unflatten(0, (side, side))[top : top + rows, left : left + columns]
            h = h + table.permute(2, 0, 1).to(h.dtype)
        return h.flatten(2).transpose(1, 2)


class SD3ControlNet(nn.Module):
    """ControlNet of SD3 as InstantX published it.

    Args:
        shape: see :class:`SD3ControlShape`; usually read off a file by :func:`sd3_control_shape`.
    """

    def __init__(self, shape: SD3ControlShape) -> None:
        super().__init__()
        self.shape = shape
        self.pos_embed = Patches(shape.in_channels, shape.width, shape.places)
        self.time_text_embed = TimeText(shape.vector_dim, shape.width)
        self.context_embedder = nn.Linear(shape.context_dim, shape.width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(shape.width, shape.head, normed=shape.normed) for _ in range(shape.depth)
        )
        self.controlnet_blocks = _zero_layers(shape.width, shape.depth)
        self.pos_embed_input = Patches(shape.hint_channels, shape.width)
        zero(self.pos_embed_input)

    def forward(self, x: Tensor, t: Tensor, hint: Tensor, context: Tensor, y: Tensor) -> list[Tensor]:
        """What SD3's transformer adds to its image tokens, for the same inputs.

        Args:
            x: noisy latent, ``[B, C, H, W]``. An odd side is worked on as if its last row were there again.
            t: network time ``1000 sigma``, ``[B]``.
            hint: the picture's latent, ``[B or 1, C', H, W]``. InstantX's nets want it scaled but not shifted.
            context: features of the text, ``[B, M, context_dim]``.
            y: the sentence as one vector, ``[B, vector_dim]``; InstantX's nets were trained with zeros.

        Returns:
            One tensor ``[B, L, D]`` for each block. Of n blocks in the transformer, that with the number i
            takes the one with the number ``i len / n``, rounded down.

        Raises:
            BadInput: a part is of the wrong shape.
        """
        shape = self.shape
        _check(x, t, hint, context, y, shape)
        v = self.time_text_embed(t, y, None, x.dtype)
        text, image = self.context_embedder(context.to(x.dtype)), self.pos_embed(_whole(x))
        image = image + self.pos_embed_input(_whole(hint.to(x.dtype)))
        found = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            image, text = block(image, text, v)
            found.append(out(image))
        return found


def _whole(x: Tensor) -> Tensor:
    """With its last row and column once more where a patch would be cut."""
    down, right = -x.shape[2] % PATCH, -x.shape[3] % PATCH
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x


def _zero_layers(width: int, count: int) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
    zero(layers)
    return layers


def _check(
    x: Tensor, t: Tensor, hint: Tensor, context: Tensor, y: Tensor, shape: FluxControlShape | SD3ControlShape
) -> None:
    if x.ndim != 4 or x.shape[1] != shape.in_channels or not x.numel():
        raise BadInput(
            f"this ControlNet needs x of shape [B, {shape.in_channels}, H, W], not {list(x.shape)}"
        )
    batch = x.shape[0]
    if (
        hint.ndim != 4
        or hint.shape[1:] != (shape.hint_channels, *x.shape[2:])
        or hint.shape[0] not in (1, batch)
    ):
        wanted = [batch, shape.hint_channels, *x.shape[2:]]
        raise BadInput(
            f"this ControlNet needs the picture's latent of shape {wanted}, not {list(hint.shape)}"
        )
    if t.shape != (batch,):
        raise BadInput(f"this ControlNet needs one time for each image, [{batch}], not {list(t.shape)}")
    if context.ndim != 3 or context.shape[::2] != (batch, shape.context_dim):
        raise BadInput(
            f"this ControlNet needs a context of shape [{batch}, M, {shape.context_dim}], not {list(context.shape)}"
        )
    if y.shape != (batch, shape.vector_dim):
        raise BadInput(f"this ControlNet needs y of shape [{batch}, {shape.vector_dim}], not {list(y.shape)}")


def flux_control_shape(shapes: Mapping[str, tuple[int, ...]]) -> FluxControlShape:
    """Read the shape of a FLUX.1 ControlNet off a header.

    Raises:
        BadFile: a tensor that tells a width is missing or of a shape that no such network has; named.
    """
    mode = "controlnet_mode_embedder.weight"
    norm = "transformer_blocks.0.attn.norm_q.weight"
    try:
        return FluxControlShape(
            in_channels=_size(shapes, "x_embedder.weight", 1, PATCH**2),
            out_channels=_size(shapes, "x_embedder.weight", 1, PATCH**2),
            hint_channels=_size(shapes, "controlnet_x_embedder.weight", 1, PATCH**2),
            width=_size(shapes, "x_embedder.weight", 0),
            head=_size(shapes, norm, 0),
            double=count(shapes, "transformer_blocks.{}.attn.to_q.weight"),
            single=count(shapes, "single_transformer_blocks.{}.attn.to_q.weight"),
            context_dim=_size(shapes, "context_embedder.weight", 1),
            vector_dim=_size(shapes, "time_text_embed.text_embedder.linear_1.weight", 1),
            guidance="time_text_embed.guidance_embedder.linear_1.weight" in shapes,
            modes=_size(shapes, mode, 0) if mode in shapes else None,
        )
    except BadInput as error:
        raise BadFile(f"{norm!r} of shape {list(shapes[norm])}: {error}", "control.shape") from error


def sd3_control_shape(shapes: Mapping[str, tuple[int, ...]]) -> SD3ControlShape:
    """Read the shape of an SD3 ControlNet off a header.

    Raises:
        BadFile: a tensor that tells a width is missing or of a shape that no such network has; named.
    """
    proj, norm = "pos_embed.proj.weight", "transformer_blocks.0.attn.norm_q.weight"
    table = _size(shapes, "pos_embed.pos_embed", 1)
    try:
        return SD3ControlShape(
            in_channels=_size(shapes, proj, 1),
            hint_channels=_size(shapes, "pos_embed_input.proj.weight", 1),
            width=_size(shapes, proj, 0),
            head=_size(shapes, norm, 0) if norm in shapes else HEAD,
            depth=count(shapes, "transformer_blocks.{}.attn.to_q.weight"),
            context_dim=_size(shapes, "context_embedder.weight", 1),
            vector_dim=_size(shapes, "time_text_embed.text_embedder.linear_1.weight", 1),
            places=math.isqrt(table),
            normed=norm in shapes,
        )
    except BadInput as error:
        raise BadFile(f"{proj!r} of shape {list(shapes[proj])}: {error}", "control.shape") from error
