"""The U-Net of Stable Diffusion 1 and 2, SDXL and their relatives: one implementation, many shapes.

Encoder, middle and decoder of residual blocks and transformers; every output of the encoder is kept and
concatenated to the decoder's input of the same size (Ho et al. 2020; Rombach et al. 2022; Podell et al.
2023)::

    emb  = time_embed(features(t)) + label_emb(y)
    skip = []; h = x
    h = block(h, emb, context); skip.append(h)            for each of input_blocks
    h = middle(h, emb, context)
    h = block(concat(h, skip.pop()), emb, context)        for each of output_blocks
    out(h)

Parameter names are those of the published single files, without their ``model.diffusion_model.`` prefix.
Letters: B batch, C channels, H W height and width of the latent, M tokens of the context, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import SpatialTransformer
from sumuk.nets.header import missing, reader
from sumuk.nets.layers import GROUPS, Downsample, ResBlock, Upsample, group_norm, timestep_embedding, zero
from sumuk.nets.unfilled import unfilled

_size = reader("such U-Net", "unet")


@dataclass(frozen=True, kw_only=True)
class UNetShape:
    """Everything that decides which tensors a U-Net has, and how its heads divide them.

    Args:
        in_channels: channels of the input: 4 of the latent, plus those of mask, masked image, depth or image.
        out_channels: channels of the prediction.
        model_channels: width of the first level; a multiple of 32.
        channel_mult: width of each level in units of ``model_channels``.
        num_res_blocks: residual blocks of each level of the encoder (the decoder has one more).
        transformer_depth: transformer blocks after each residual block, for each level; 0 for no attention.
        middle_depth: transformer blocks of the middle; 0 for no attention.
        context_dim: width D of the context; None without any attention.
        heads: number of attention heads, the same at all widths (SD 1, x4 upscaler).
        head_channels: width of one head, the same at all widths (SD 2, SDXL); exactly one is given.
        linear: transformers project by linear layers (all but SD 1).
        cross_only: for each level, whether its first attention looks at the context as well; empty: nowhere.
        adm_in_channels: length of the vector that is added to the time (SDXL, unCLIP), or None.
        num_classes: number of classes that are added to the time (x4 upscaler: noise levels), or None.

    Raises:
        BadInput: values that contradict each other.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...]
    middle_depth: int
    context_dim: int | None
    heads: int | None = None
    head_channels: int | None = None
    linear: bool = False
    cross_only: tuple[bool, ...] = ()
    adm_in_channels: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        if not levels or len(self.transformer_depth) != levels or len(self.cross_only) not in (0, levels):
            raise BadInput(
                f"channel_mult {self.channel_mult}, transformer_depth {self.transformer_depth} and "
                f"cross_only {self.cross_only} must have one entry per level"
            )
        if self.model_channels <= 0 or self.model_channels % GROUPS:
            raise BadInput(f"model_channels {self.model_channels} is not a positive multiple of {GROUPS}")
        if self.adm_in_channels is not None and self.num_classes is not None:
            raise BadInput("a U-Net has either adm_in_channels or num_classes, not both; leave one None")
        if not self.attends:
            return
        if self.context_dim is None:
            raise BadInput("a U-Net with transformers needs context_dim, the width of the text features")
        if (self.heads is None) == (self.head_channels is None):
            raise BadInput("give exactly one of heads (SD 1: 8) and head_channels (SD 2, SDXL: 64)")
        divisor = self.heads or self.head_channels or 0
        depths = (*self.transformer_depth, self.middle_depth)
        for mult, depth in zip((*self.channel_mult, self.channel_mult[-1]), depths, strict=True):
            width = self.model_channels * mult
            if depth and (divisor <= 0 or width % divisor):
                name = "heads" if self.heads is not None else "head_channels"
                raise BadInput(f"{name} {divisor} does not divide {width}, the width of a level")

    @property
    def attends(self) -> bool:
        """Whether there is any transformer, hence a context."""
        return any(self.transformer_depth) or self.middle_depth > 0

    @property
    def emb_width(self) -> int:
        """Width of the embedding of time and label."""
        return 4 * self.model_channels


class Block(nn.ModuleList):
    """A row of layers, each given what it takes of ``emb``, ``context`` and ``size``."""

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Run the layers.

        Args:
            x: ``[B, C, H, W]``.
            emb: embedding of time and label, ``[B, E]``.
            context: ``[B, M, D]``; needed where the row holds a transformer.
            size: height and width that an upsampling layer has to reach; twice its input's by default.
        """
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


def _transformer(shape: UNetShape, channels: int, level: int | None) -> list[nn.Module]:
    """The transformer that follows a residual block of a level (None: the middle), if there is one."""
    depth = shape.middle_depth if level is None else shape.transformer_depth[level]
    if not depth or shape.context_dim is None:
        return []
    heads = shape.heads or channels // (shape.head_channels or channels)
    cross_only = level is not None and bool(shape.cross_only) and shape.cross_only[level]
    return [
        SpatialTransformer(
            channels, shape.context_dim, heads, depth=depth, linear=shape.linear, cross_only=cross_only
        )
    ]


class Encoder(nn.Module):
    """Time and label embedding, the way down, and the middle: what a U-Net shares with its ControlNets.

    Args:
        shape: see :class:`UNetShape`.
    """

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        self.shape = shape
        width, emb = shape.model_channels, shape.emb_width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if shape.num_classes is not None:
            self.label_emb: nn.Module = nn.Embedding(shape.num_classes, emb)
        elif shape.adm_in_channels is not None:
            layers = nn.Sequential(nn.Linear(shape.adm_in_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
            self.label_emb = nn.Sequential(layers)

        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(shape.in_channels, width, 3, padding=1)])])
        self.skip_widths = [width]
        for level, mult in enumerate(shape.channel_mult):
            if level:
                self.input_blocks.append(Block([Downsample(width)]))
                self.skip_widths.append(width)
            for _ in range(shape.num_res_blocks):
                block = ResBlock(width, shape.model_channels * mult, emb)
                width = shape.model_channels * mult
                self.input_blocks.append(Block([block, *_transformer(shape, width, level)]))
                self.skip_widths.append(width)
        first, last = ResBlock(width, width, emb), ResBlock(width, width, emb)
        self.middle_block = Block([first, *_transformer(shape, width, None), last])

    def embed(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Embedding of time and label, ``[B, E]``, in the dtype of ``x``; see :meth:`UNet.forward`."""
        emb = self.time_embed(timestep_embedding(t, self.shape.model_channels).to(x.dtype))
        if self.shape.num_classes is None and self.shape.adm_in_channels is None:
            if y is not None:
                raise BadInput(f"this U-Net takes no vector y, but was given one of shape {tuple(y.shape)}")
            return emb
        if self.shape.num_classes is not None:
            if y is None or y.ndim != 1 or y.is_floating_point():
                raise BadInput("this U-Net needs y, one class number for each image: shape [B], dtype long")
            return emb + self.label_emb(y)
        if y is None or y.ndim != 2 or y.shape[1] != self.shape.adm_in_channels:
            given = None if y is None else tuple(y.shape)
            raise BadInput(f"this U-Net needs y of shape [B, {self.shape.adm_in_channels}], not {given}")
        return emb + self.label_emb(y.to(x.dtype))

    def check(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """The context in the dtype of ``x``, if both fit this network; else BadInput."""
        if x.ndim != 4 or x.shape[1] != self.shape.in_channels:
            wanted = f"[B, {self.shape.in_channels}, H, W]"
            raise BadInput(f"this U-Net needs x of shape {wanted}, not {tuple(x.shape)}")
        if not self.shape.attends:
            if context is not None:
                raise BadInput(f"this U-Net has no attention, but was given a context {tuple(context.shape)}")
            return None
        if context is None or context.ndim != 3 or context.shape[2] != self.shape.context_dim:
            given = None if context is None else tuple(context.shape)
            wanted = f"[B, M, {self.shape.context_dim}]"
            raise BadInput(f"this U-Net needs a context of shape {wanted}, not {given}")
        return context.to(x.dtype)


class UNet(Encoder):
    """The denoiser. An untrained one predicts zero, as every residual branch and the output end in zeros.

    Guests attach from outside: adapters replace or hook the plain ``nn.Linear`` and ``nn.Conv2d`` modules,
    controls hand their findings to ``forward(residuals=...)``.

    Args:
        shape: see :class:`UNetShape`; usually read off a file by :func:`unet_shape`.
    """

    def __init__(self, shape: UNetShape) -> None:
        super().__init__(shape)
        skips, width = list(self.skip_widths), self.skip_widths[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(shape.channel_mult))):
            for i in range(shape.num_res_blocks + 1):
                block = ResBlock(width + skips.pop(), shape.model_channels * mult, shape.emb_width)
                width = shape.model_channels * mult
                up = [Upsample(width)] if level and i == shape.num_res_blocks else []
                self.output_blocks.append(Block([block, *_transformer(shape, width, level), *up]))
        self.out = nn.Sequential(
            group_norm(width), nn.SiLU(), nn.Conv2d(width, shape.out_channels, 3, padding=1)
        )
        zero(self.out[-1])

    def reset_parameters(self) -> None:
        """Draw all parameters anew, in place: what ``to_empty`` needs after a start on ``meta``."""
        for module in reversed(list(self.modules())):  # parts first, as the whole zeroes some of them
            reset = getattr(module, "reset_parameters", None)
            if reset is not None and module is not self:
                reset()
        zero(self.out[-1])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        residuals: tuple[Sequence[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Predict (noise, v, or whatever the model was trained for) from a noisy latent.

        Args:
            x: noisy latent, with further channels appended where the model takes them, ``[B, C, H, W]``.
                Any height and width.
            t: network time, ``[B]``, 0 to 999 for the published models, may be fractional.
            context: features of the text, ``[B, M, D]``.
            y: vector ``[B, adm_in_channels]`` or class ``[B]``, for models that have one.
            residuals: what a control adds: one tensor for each of ``input_blocks``, added to its output where
                the decoder reads it (not on the way down), and one for the output of the middle.

        Returns:
            ``[B, out_channels, H, W]``.

        Raises:
            BadInput: a part is missing, superfluous, or of the wrong shape.
        """
        context = self.check(x, context)
        emb = self.embed(x, t, y)
        skips: list[Tensor] = []
        h = x
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        if residuals is not None:
            extra, middle = residuals
            if len(extra) != len(skips):
                raise BadInput(
                    f"{len(extra)} control residuals do not fit this U-Net of {len(skips)} input blocks"
                )
            skips = [skip + more for skip, more in zip(skips, extra, strict=True)]
            h = h + middle
        for block in self.output_blocks:
            h = torch.cat((h, skips.pop()), dim=1)
            h = block(h, emb, context, (skips[-1].shape[-2], skips[-1].shape[-1]) if skips else None)
        return self.out(h)


def unet_shape(
    shapes: Mapping[str, tuple[int, ...]], *, heads: int | None = None, head_channels: int | None = None
) -> UNetShape:
    """Read the whole shape of a U-Net off a header, and make sure that it explains every tensor.

    Args:
        shapes: shape of each tensor, by its published name without prefix; all of them and no others.
        heads: see :class:`UNetShape`; no tensor shows how its heads lie, so the family has to say.
        head_channels: see :class:`UNetShape`.

    Returns:
        The shape whose network has exactly these tensors.

    Raises:
        BadFile: a tensor is missing, unexplained, or has a shape that does not fit the others; named.
        BadInput: not exactly one of ``heads`` and ``head_channels`` is given.
    """
    shape = encoder_shape(shapes, heads=heads, head_channels=head_channels, out_key="out.2.weight")
    with unfilled():
        expected = {key: tuple(tensor.shape) for key, tensor in UNet(shape).state_dict().items()}
    for key, wanted in expected.items():
        if key not in shapes:
            raise missing(key, "such U-Net", "unet")
        if tuple(shapes[key]) != wanted:
            raise BadFile(
                f"tensor {key!r} has shape {list(shapes[key])}, but the rest of this U-Net calls for "
                f"{list(wanted)}; the file is damaged or of another kind",
                "unet.shape",
            )
    for key in shapes:
        if key not in expected:
            raise BadFile(f"tensor {key!r} has no place in a U-Net of this kind; remove it", "unet.unknown")
    return shape


def encoder_shape(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    heads: int | None = None,
    head_channels: int | None = None,
    out_key: str | None = None,
) -> UNetShape:
    """Read the shape off the encoder and the middle alone, which a ControlNet's header has as well.

    Arguments and errors are those of :func:`unet_shape`, but tensors that the reading does not need are not
    looked at. Without ``out_key``, the name of the last convolution, ``out_channels`` is left at its default.
    """
    if (heads is None) == (head_channels is None):
        raise BadInput("give exactly one of heads (SD 1: 8) and head_channels (SD 2, SDXL: 64)")
    first = "input_blocks.0.0.weight"
    width = _size(shapes, first, 0)
    levels: list[list[str]] = [[]]  # names of the rows with a residual block, level by level
    index = 1
    while True:
        row = f"input_blocks.{index}"
        if f"{row}.0.op.weight" in shapes:
            levels.append([])
        elif f"{row}.0.in_layers.2.weight" in shapes:
            levels[-1].append(row)
        else:
            break
        index += 1
    if not all(levels):
        raise missing(f"input_blocks.{index}.0.in_layers.2.weight", "such U-Net", "unet")

    mult, depths, cross = [], [], []
    for rows in levels:
        key = f"{rows[0]}.0.in_layers.2.weight"
        channels, depth = _size(shapes, key, 0), _depth(shapes, f"{rows[0]}.1")
        if channels % width:
            raise BadFile(
                f"tensor {key!r} has {channels} channels, which is no multiple of the {width} of {first!r}",
                "unet.shape",
            )
        attn1 = f"{rows[0]}.1.transformer_blocks.0.attn1.to_k.weight"
        mult.append(channels // width)
        depths.append(depth)
        cross.append(depth > 0 and _size(shapes, attn1, 1) != channels)
    middle = _depth(shapes, "middle_block.1")
    transformers = [f"{rows[0]}.1" for rows, depth in zip(levels, depths, strict=True) if depth]
    transformers += ["middle_block.1"] * bool(middle)
    context_dim = None
    linear = False
    if transformers:
        context_dim = _size(shapes, f"{transformers[0]}.transformer_blocks.0.attn2.to_k.weight", 1)
        proj_in = f"{transformers[0]}.proj_in.weight"
        linear = len(shapes[proj_in]) == 2 if proj_in in shapes else False
    vector, classes = "label_emb.0.0.weight", "label_emb.weight"
    try:
        return UNetShape(
            in_channels=_size(shapes, first, 1),
            out_channels=_size(shapes, out_key, 0) if out_key else UNetShape.out_channels,
            model_channels=width,
            channel_mult=tuple(mult),
            num_res_blocks=len(levels[0]),
            transformer_depth=tuple(depths),
            middle_depth=middle,
            context_dim=context_dim,
            heads=heads,
            head_channels=head_channels,
            linear=linear,
            cross_only=tuple(cross) if any(cross) else (),
            adm_in_channels=_size(shapes, vector, 1) if vector in shapes else None,
            num_classes=_size(shapes, classes, 0) if classes in shapes else None,
        )
    except BadInput as error:
        raise BadFile(f"{first!r} of shape {list(shapes[first])}: {error}", "unet.shape") from error


def _depth(shapes: Mapping[str, tuple[int, ...]], transformer: str) -> int:
    """Number of blocks of one transformer, 0 where there is none."""
    depth = 0
    while f"{transformer}.transformer_blocks.{depth}.attn1.to_q.weight" in shapes:
        depth += 1
    return depth
