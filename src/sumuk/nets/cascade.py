"""The two denoisers of Stable Cascade (Würstchen, version 3): stage C draws a small latent, stage B enlarges it.

Both are one U-Net (Pernias et al. 2023) of groups of blocks C T or C T A, see :mod:`sumuk.nets.cascade_blocks`::

    x = embedding(x) + effnet + pixels                       the sums in stage B only
    x = down[0](x), keep;  x = down[1](downscale(x)), keep;  ...
    x = upscale(up[0](x));  x = upscale(up[1](x, kept));  ...
    clf(x)

Stage C (1B, 3.6B) has two levels of one resolution, both with attention; stage B (700M, 1.5B) has four levels, each
half the size of the last, attends in the coarse ones, and runs the blocks of its way up two or three times, with a
1x1 convolution between. The network is told a time in [0, 1], see :mod:`sumuk.diffusion.cosine`, and one or two more
numbers of the same kind, ``sca`` and ``crp``, which are 0 in all published use.

Parameter names are those of the published files, which have no prefix. No shape tells how the heads lie: 64 wide,
in all four. Letters: B batch, C channels, H W height and width of the latent, M condition tokens, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.cascade_blocks import (
    AttentionBlock,
    ChannelNorm,
    ConvBlock,
    Resample,
    TimeBlock,
    normed,
    resized,
)
from sumuk.nets.cascade_shape import (
    CascadeShape,
    Shapes,
    StageBShape,
    StageCShape,
    missing,
    read_b,
    read_c,
)
from sumuk.nets.layers import zero
from sumuk.nets.unfilled import unfilled

TIME_SCALE = 10_000.0
"""What a time in [0, 1] is multiplied by before its sinusoidal features are taken; their longest period as well."""


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of a time in [0, 1]: ``[B]`` to float32 ``[B, width]``, as DDPM has them.

    At times this large the rounding of a frequency moves its angle by up to 5e-4. The networks were trained with the
    roundings of exactly this order of operations, so :func:`~sumuk.nets.layers.timestep_embedding` is not used.
    """
    half = width // 2
    rates = torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(TIME_SCALE) / (half - 1))
    angles = (t.float() * TIME_SCALE)[:, None] * rates.exp()
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Cascade(nn.Module):
    """What both stages share; see :class:`StageC` and :class:`StageB`.

    Args:
        shape: see :class:`CascadeShape`.
        halves: whether each level has half the height and width of the one before.
    """

    def __init__(self, shape: CascadeShape, *, halves: bool) -> None:
        super().__init__()
        self.shape, self.halves = shape, halves
        widths, fine = shape.widths, shape.widths[0]
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(shape.patch),
            nn.Conv2d(shape.in_channels * shape.patch**2, fine, 1),
            ChannelNorm(),
        )
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.down_downscalers, self.up_upscalers = nn.ModuleList(), nn.ModuleList()
        self.down_repeat_mappers, self.up_repeat_mappers = nn.ModuleList(), nn.ModuleList()
        last = len(widths) - 1
        for level, width in enumerate(widths):
            before = self._resample(widths[level - 1], width, 0) if level else nn.Identity()
            self.down_downscalers.append(before)
            self.down_blocks.append(self._groups(level, shape.down[level], skip=0))
            self.down_repeat_mappers.append(_mappers(width, shape.down_repeats[level]))
        for level, width in reversed(list(enumerate(widths))):
            self.up_blocks.append(self._groups(level, shape.up[level], skip=width if level < last else 0))
            self.up_repeat_mappers.append(_mappers(width, shape.up_repeats[level]))
            after = self._resample(width, widths[level - 1], 1) if level else nn.Identity()
            self.up_upscalers.append(after)
        self.clf = nn.Sequential(
            ChannelNorm(),
            nn.Conv2d(fine, shape.out_channels * shape.patch**2, 1),
            nn.PixelShuffle(shape.patch),
        )
        zero(self.clf[1])

    def _resample(self, channels: int, out_channels: int, up: int) -> nn.Module:
        if not self.halves:
            return nn.Sequential(ChannelNorm(), Resample(channels, out_channels, up))
        kind = nn.ConvTranspose2d if up else nn.Conv2d
        return nn.Sequential(ChannelNorm(), kind(channels, out_channels, 2, stride=2))

    def _groups(self, level: int, count: int, skip: int) -> nn.ModuleList:
        shape, width = self.shape, self.shape.widths[level]
        blocks = nn.ModuleList()
        for group in range(count):
            blocks.append(ConvBlock(width, 0 if group else skip, shape.kernel))
            blocks.append(TimeBlock(width, shape.time_width, shape.times))
            if shape.attends[level]:
                blocks.append(AttentionBlock(width, shape.cond_width, width // shape.head_channels))
        return blocks

    def features(self, x: Tensor, t: Tensor, told: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Sinusoidal features of the time and of each further one (0 if it is not given), in the dtype of x."""
        for name, value in told.items():
            if value is not None and name not in self.shape.times:
                raise BadInput(f"this stage was not trained on {name!r}; it knows {list(self.shape.times)}")
        times = [t]
        for name in self.shape.times:
            value = told.get(name)
            times.append(torch.zeros_like(t) if value is None else value)
        width = self.shape.time_width
        return [time_features(one, width).to(x.dtype) for one in times]

    def tokens(self, mapper: nn.Module, name: str, given: Tensor, x: Tensor, width: int) -> Tensor:
        """``given [B, n, width]`` as condition tokens ``[B, n * tokens, D]``, not yet normalised."""
        said: Tensor = mapper(_rows(name, given, x, width))
        return said.reshape(x.shape[0], -1, self.shape.cond_width)

    def walk(
        self,
        x: Tensor,
        times: Sequence[Tensor],
        cond: Tensor,
        residuals: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Down, up and out: ``x [B, widths[0], H / patch, W / patch]`` to the prediction.

        Args:
            x: the embedded latent, with all that is added to it.
            times: of :meth:`features`.
            cond: tokens ``[B, M, D]``, normalised.
            residuals: what a control adds to the input of each C, in the order in which they run; of any height
                and width. None, or a list that ends early, adds nothing.
        """
        if self.halves and min(x.shape[-2:]) < 2 ** (len(self.shape.widths) - 1):
            least = self.shape.patch * 2 ** (len(self.shape.widths) - 1)
            raise BadInput(f"the latent is too small for this stage: it needs at least {least} x {least}")
        rest, skips = iter(residuals), []
        groups = zip(self.down_downscalers, self.down_blocks, self.down_repeat_mappers, strict=True)
        for scaler, blocks, mappers in groups:
            x = _run(scaler(x), blocks, mappers, times, cond, rest)
            skips.append(x)
        skip: Tensor | None = None  # the coarsest level begins with its own map
        groups = zip(self.up_upscalers, self.up_blocks, self.up_repeat_mappers, strict=True)
        skips.pop()
        for scaler, blocks, mappers in groups:
            x = scaler(_run(x, blocks, mappers, times, cond, rest, skip))
            skip = skips.pop() if skips else None
        left = sum(1 for _ in rest)
        if left:
            raise BadInput(
                f"{len(residuals)} control residuals, but only {len(residuals) - left} blocks for them"
            )
        return self.clf(x)

    def check(self, x: Tensor, t: Tensor) -> None:
        """BadInput unless latent and times fit."""
        shape = self.shape
        if (
            x.ndim != 4
            or x.shape[1] != shape.in_channels
            or x.shape[2] % shape.patch
            or x.shape[3] % shape.patch
        ):
            sides = f" with H and W multiples of {shape.patch}" if shape.patch > 1 else ""
            raise BadInput(
                f"this stage needs x of shape [B, {shape.in_channels}, H, W]{sides}, not {tuple(x.shape)}"
            )
        if t.shape != x.shape[:1]:
            raise BadInput(f"this stage needs t of shape [{x.shape[0]}], not {tuple(t.shape)}")


def _mappers(width: int, repeats: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(repeats - 1))


def _run(
    x: Tensor,
    blocks: nn.Module,
    mappers: nn.Module,
    times: Sequence[Tensor],
    cond: Tensor,
    residuals: Iterator[Tensor | None],
    skip: Tensor | None = None,
) -> Tensor:
    """All blocks of one level, once more after each mapper; the first block sees the skip every time."""
    for mapper in (None, *mappers.children()):
        if mapper is not None:
            x = mapper(x)
        for number, block in enumerate(blocks.children()):
            if isinstance(block, ConvBlock):
                beside = None if number else skip
                if beside is not None:
                    x = resized(x, beside.shape[-2:])  # an odd height was rounded down on the way
                more = next(residuals, None)
                if more is not None:
                    x = x + resized(more, x.shape[-2:]).to(x.dtype)
                x = block(x, beside)
            else:
                x = block(x, times if isinstance(block, TimeBlock) else cond)
    return x


class StageC(Cascade):
    """The denoiser of the small latent, 42.67 pixels a cell, told by text and by pictures.

    Args:
        shape: see :class:`StageCShape`; usually read off a file by :func:`stage_c_shape`.
    """

    shape: StageCShape

    def __init__(self, shape: StageCShape) -> None:
        super().__init__(shape, halves=False)
        self.clip_txt_mapper = nn.Linear(shape.text_width, shape.cond_width)
        self.clip_txt_pooled_mapper = nn.Linear(shape.pooled_width, shape.cond_width * shape.tokens)
        self.clip_img_mapper = nn.Linear(shape.image_width, shape.cond_width * shape.tokens)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor,
        clip_img: Tensor | None = None,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        residuals: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Predict the noise of a latent.

        Args:
            x: noisy latent ``[B, C, H, W]``, of any height and width.
            t: time in [0, 1], ``[B]``.
            clip_text: what the text tower says of each token, ``[B, M, text_width]``.
            clip_text_pooled: of the whole, projected, ``[B, n, pooled_width]``; n is 1.
            clip_img: pictures through the image tower, projected, ``[B, n, image_width]``; None: one of zeros.
            sca: ``[B]``; None: 0.
            crp: ``[B]``; None: 0.
            residuals: what a ControlNet says, see :meth:`Cascade.walk`.

        Returns:
            ``[B, out_channels, H, W]``.

        Raises:
            BadInput: something of the wrong shape.
        """
        shape = self.shape
        self.check(x, t)
        if clip_img is None:
            clip_img = x.new_zeros(x.shape[0], 1, shape.image_width)
        cond = torch.cat(
            (
                self.clip_txt_mapper(_rows("clip_text", clip_text, x, shape.text_width)),
                self.tokens(
                    self.clip_txt_pooled_mapper, "clip_text_pooled", clip_text_pooled, x, shape.pooled_width
                ),
                self.tokens(self.clip_img_mapper, "clip_img", clip_img, x, shape.image_width),
            ),
            dim=1,
        )
        times = self.features(x, t, {"sca": sca, "crp": crp})
        return self.walk(self.embedding(x), times, normed(cond), residuals)


class StageB(Cascade):
    """The denoiser of stage A's latent, 4 pixels a cell, which it draws from stage C's.

    Args:
        shape: see :class:`StageBShape`; usually read off a file by :func:`stage_b_shape`.
    """

    shape: StageBShape

    def __init__(self, shape: StageBShape) -> None:
        super().__init__(shape, halves=True)
        self.clip_mapper = nn.Linear(shape.pooled_width, shape.cond_width * shape.tokens)
        self.effnet_mapper = _map_mapper(shape.effnet_channels, shape.widths[0])
        self.pixels_mapper = _map_mapper(shape.pixel_channels, shape.widths[0])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        effnet: Tensor,
        clip_text_pooled: Tensor,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
        residuals: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Predict the noise of a latent.

        Args:
            x: noisy latent ``[B, C, H, W]``; H and W multiples of ``patch``, of any number that the levels can halve.
            t: time in [0, 1], ``[B]``.
            effnet: stage C's latent, ``[B, effnet_channels, h, w]``, stretched to the size of the picture.
            clip_text_pooled: what the text tower says of the whole, projected, ``[B, n, pooled_width]``; n is 1.
            pixels: ``[B, pixel_channels, h, w]``, stretched alike; None: zeros.
            sca: ``[B]``; None: 0.
            residuals: see :meth:`Cascade.walk`.

        Returns:
            ``[B, out_channels, H, W]``.

        Raises:
            BadInput: something of the wrong shape.
        """
        shape = self.shape
        self.check(x, t)
        effnet = _map("effnet", effnet, x, shape.effnet_channels)
        if pixels is None:
            pixels = x.new_zeros(
                x.shape[0], shape.pixel_channels, 1, 1
            )  # a constant has one value at any size
        pixels = _map("pixels", pixels, x, shape.pixel_channels)
        cond = self.tokens(self.clip_mapper, "clip_text_pooled", clip_text_pooled, x, shape.pooled_width)
        times = self.features(x, t, {"sca": sca})
        h = self.embedding(x)
        h = h + self.effnet_mapper(resized(effnet, h.shape[-2:]))
        h = h + resized(self.pixels_mapper(pixels), h.shape[-2:])
        return self.walk(h, times, normed(cond), residuals)


def _map_mapper(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1), ChannelNorm()
    )


def _rows(name: str, given: Tensor, x: Tensor, width: int) -> Tensor:
    if given.ndim != 3 or given.shape[0] != x.shape[0] or given.shape[2] != width:
        raise BadInput(
            f"this stage needs {name} of shape [{x.shape[0]}, n, {width}], not {tuple(given.shape)}"
        )
    return given.to(x.dtype)


def _map(name: str, given: Tensor, x: Tensor, channels: int) -> Tensor:
    if given.ndim != 4 or given.shape[:2] != (x.shape[0], channels):
        wanted = f"[{x.shape[0]}, {channels}, h, w]"
        raise BadInput(f"this stage needs {name} of shape {wanted}, not {tuple(given.shape)}")
    return given.to(x.dtype)


def stage_c_shape(shapes: Shapes) -> StageCShape:
    """Read the whole shape of a stage C off a header, and make sure that it explains every tensor.

    Args:
        shapes: shape of each tensor, by its published name; all of them and no others.

    Raises:
        BadFile: a tensor is missing, unexplained, or has a shape that does not fit the others; named.
    """
    shape = read_c(shapes)
    _explain(StageC, shape, shapes)
    return shape


def stage_b_shape(shapes: Shapes) -> StageBShape:
    """Read the whole shape of a stage B off a header; see :func:`stage_c_shape`."""
    shape = read_b(shapes)
    _explain(StageB, shape, shapes)
    return shape


def _explain(kind: Callable[[Any], nn.Module], shape: CascadeShape, shapes: Shapes) -> None:
    with unfilled():
        expected = {key: tuple(tensor.shape) for key, tensor in kind(shape).state_dict().items()}
    for key, wanted in expected.items():
        if key not in shapes:
            raise missing(key)
        if tuple(shapes[key]) != wanted:
            raise BadFile(
                f"tensor {key!r} has shape {list(shapes[key])}, but the rest of this stage calls for {list(wanted)}; "
                "the file is damaged or of another kind",
                "cascade.shape",
            )
    for key in shapes:
        if key not in expected:
            raise BadFile(f"tensor {key!r} has no place in this stage; remove it", "cascade.unknown")
