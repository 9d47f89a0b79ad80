"""ControlNet for the U-Nets (Zhang, Rao & Agrawala 2023): a copy of the encoder that reads a picture as well.

The picture (edges, depth, a pose) becomes a feature map of the latent's size and is added behind the copy's
first convolution. Each output of the copy passes a 1x1 convolution that started at zero, and is added to what
the U-Net's decoder reads (their equation 2)::

    h_0 = conv(x) + hint_block(picture);    h_i = block_i(h_{i-1})           the copied encoder
    residual_i = zero_conv_i(h_i);          middle = zero_conv(middle_block(h_n))

Parameter names are those of the published files without ``control_model.``. Those for SDXL were published in
the diffusers layout only; here they bear the names that the original layout would give them.

Letters: B batch, C channels, H W height and width of the latent, M tokens of the context, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.layers import zero
from sumuk.nets.unet import Encoder, UNetShape, encoder_shape

Residuals = tuple[list[Tensor], Tensor]
"""What a control adds: to each output of the encoder where the decoder reads it, and to that of the middle."""


@dataclass(frozen=True, kw_only=True)
class ControlNetShape(UNetShape):
    """The shape of the copied encoder, and that of the layers that read the picture.

    Args:
        hint_channels: colours of the picture.
        hint_widths: channels at full size, at half size, and so on down to the latent's size.
    """

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hint_channels < 1 or not self.hint_widths or min(self.hint_widths) < 1:
            raise BadInput(f"a picture of {self.hint_channels} colours cannot be read by {self.hint_widths}")

    @property
    def stride(self) -> int:
        """Pixels a side of the picture to one cell of the latent."""
        return 2 ** (len(self.hint_widths) - 1)


class ControlNet(Encoder):
    """The copy and its outputs. An untrained one adds nothing, as all its outputs start at zero.

    Args:
        shape: see :class:`ControlNetShape`; usually read off a file by :func:`controlnet_shape`.
    """

    shape: ControlNetShape

    def __init__(self, shape: ControlNetShape) -> None:
        super().__init__(shape)
        self.input_hint_block = _hint_block(shape)
        self.zero_convs = nn.ModuleList(_zero_conv(width) for width in self.skip_widths)
        self.middle_block_out = _zero_conv(self.skip_widths[-1])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        hint: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Residuals:
        """What ``UNet.forward(residuals=...)`` takes, for the same inputs.

        Args:
            x: noisy latent, without further channels, ``[B, C, H, W]``.
            t: network time, ``[B]``.
            hint: the picture in 0 to 1, ``[B, 3, 8 H, 8 W]``, or one for all, ``[1, 3, 8 H, 8 W]``.
            context: features of the text, ``[B, M, D]``.
            y: vector, for networks that take one (SDXL).

        Raises:
            BadInput: a part is missing, superfluous, or of the wrong shape.
        """
        context = self.check(x, context)
        height, width = (size * self.shape.stride for size in x.shape[2:])
        wanted = (self.shape.hint_channels, height, width)
        if hint.ndim != 4 or tuple(hint.shape[1:]) != wanted or hint.shape[0] not in (1, x.shape[0]):
            raise BadInput(
                f"this ControlNet needs a picture of shape {[x.shape[0], *wanted]} for a latent of "
                f"{list(x.shape)}, not {list(hint.shape)}"
            )
        emb = self.embed(x, t, y)
        h, residuals = x, []
        for index, (block, out) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = block(h, emb, context)
            if index == 0:
                h = h + self.input_hint_block(hint.to(x.dtype))
            residuals.append(out(h))
        return residuals, self.middle_block_out(self.middle_block(h, emb, context))


def _hint_block(shape: ControlNetShape) -> nn.Sequential:
    """Convolutions from picture to first width, halving the size between two widths; the last one is zero."""
    widths = shape.hint_widths
    layers: list[nn.Module] = [nn.Conv2d(shape.hint_channels, widths[0], 3, padding=1), nn.SiLU()]
    for here, below in pairwise(widths):
        layers += [nn.Conv2d(here, here, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(here, below, 3, padding=1, stride=2), nn.SiLU()]
    last = nn.Conv2d(widths[-1], shape.model_channels, 3, padding=1)
    zero(last)
    return nn.Sequential(*layers, last)


def _zero_conv(width: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, width, 1)
    zero(convolution)
    return nn.Sequential(convolution)


def scaled(control: Residuals, weight: float, *, guess: bool = False, pooled: bool = False) -> Residuals:
    """A control at another strength.

    Args:
        control: what a ControlNet answered.
        weight: factor.
        guess: deep residuals count more than shallow ones, by ``10^s`` with s from -1 to 0 in equal steps: the
            published way to draw from a picture without any prompt.
        pooled: only the mean over the picture counts, and all residuals alike (control_v11e_sd15_shuffle).

    Returns:
        The same with each residual multiplied; pooled ones are ``[B, C, 1, 1]``.
    """
    outputs, middle = control
    every = [*outputs, middle]
    if pooled:
        every = [each.mean(dim=(2, 3), keepdim=True) for each in every]
    last = len(every) - 1
    ramp = guess and not pooled
    every = [each * (weight * 10 ** (i / last - 1) if ramp else weight) for i, each in enumerate(every)]
    return every[:-1], every[-1]


def summed(controls: Sequence[Residuals]) -> Residuals:
    """Several controls as one.

    Raises:
        BadInput: none is given, or they are for U-Nets of different depths.
    """
    if len({len(outputs) for outputs, _ in controls}) != 1:
        depths = [len(outputs) for outputs, _ in controls]
        raise BadInput(f"controls of {depths} residuals cannot be added; give one or more for the same model")
    rows = zip(*([*outputs, middle] for outputs, middle in controls), strict=True)
    every = [torch.stack(torch.broadcast_tensors(*row)).sum(0) for row in rows]
    return every[:-1], every[-1]


def controlnet_shape(
    shapes: Mapping[str, tuple[int, ...]], *, heads: int | None = None, head_channels: int | None = None
) -> ControlNetShape:
    """Read the shape of a ControlNet off a header (published names without prefix).

    Args:
        shapes: shape of each tensor, by its native name.
        heads: see :class:`UNetShape`; no tensor shows how its heads lie, so the family has to say.
        head_channels: see :class:`UNetShape`.

    Raises:
        BadFile: a tensor that tells a width is missing, or of a shape that no ControlNet has; named.
    """
    encoder = encoder_shape(shapes, heads=heads, head_channels=head_channels)
    names: list[str] = []
    while (name := f"input_hint_block.{2 * len(names)}.weight") in shapes:
        names.append(name)
    if len(names) < 2 or len(names) % 2:
        raise BadFile(
            f"tensor {name!r} is missing; the file is incomplete or no ControlNet", "controlnet.missing"
        )
    for each in names:
        if len(shapes[each]) != 4 or not all(0 < size <= 2**20 for size in shapes[each]):
            raise BadFile(
                f"tensor {each!r} has the shape {list(shapes[each])}, which no ControlNet has",
                "controlnet.shape",
            )
    return ControlNetShape(
        **{field.name: getattr(encoder, field.name) for field in fields(encoder)},
        hint_channels=shapes[names[0]][1],
        hint_widths=tuple(shapes[each][0] for each in names[:-1:2]),
    )
