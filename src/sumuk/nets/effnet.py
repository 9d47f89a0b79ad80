"""Stable Cascade's semantic compressor: EfficientNetV2-S and what is put around it.

``EffNet`` makes of an image the latent that stage C learns, 32 times smaller a side; ``Previewer`` makes of that
latent a small image. Pernias et al. 2023, "Wuerstchen" (the semantic compressor); Tan & Le 2021, "EfficientNetV2",
table 4; squeeze and excitation after Hu et al. 2018. With ``conv`` a convolution without bias, then batch norm, then
SiLU where marked +::

    fused block(x)  = [x +] conv1x1(conv3x3+(x))                        (one conv3x3+ where it does not widen)
    block(x)        = [x +] conv1x1(excite(depthwise3x3+(conv1x1+(x))))
    excite(x)       = x sigmoid(fc2(silu(fc1(mean over positions of x))))
    latent          = batch norm(conv1x1(backbone(pixels)))

The shortcut [x +] is there where a block keeps size and width. Pixels are RGB in 0..1 less :data:`MEAN`, over
:data:`STD` (:func:`effnet_pixels`), at any size: Cascade gives the picture whole, e.g. 768 pixels a side for a latent
of 24. Names are torchvision's, under ``backbone``; stored statistics are always used, as nothing here is trained.

Shapes: B images, C channels, H and W pixels, h = ceil(H / 32), w = ceil(W / 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.header import reader

size_of = reader("Stable Cascade network", "effnet")
"""One size of one tensor of these files."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's statistics of RGB in 0..1, by which pixels are normalised."""

STRIDES = (1, 2, 2, 2, 1, 2)
"""Step of the first block of each of the six stages. A header does not show them."""

EPS = 1e-3  # of the batch norms in EfficientNetV2; the others have torch's 1e-5
STRIDE = 32
PREVIEW = 8  # pixels a side that the previewer makes of a latent cell


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """Blocks of one kind and width.

    Attributes:
        fused: whether widening and spatial convolution are one.
        width: channels that each block makes.
        depth: blocks.
        expand: channels inside a block over those that it is given.
    """

    fused: bool
    width: int
    depth: int
    expand: int

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.expand) < 1:
            raise BadInput(f"an EfficientNet stage needs width, depth, expansion of at least 1, not {self}")
        if not self.fused and self.expand == 1:
            raise BadInput("an EfficientNet stage that is not fused widens: expand must be 2 or more, not 1")


V2_S = (
    StageShape(fused=True, width=24, depth=2, expand=1),
    StageShape(fused=True, width=48, depth=4, expand=4),
    StageShape(fused=True, width=64, depth=4, expand=4),
    StageShape(fused=False, width=128, depth=6, expand=4),
    StageShape(fused=False, width=160, depth=9, expand=6),
    StageShape(fused=False, width=256, depth=15, expand=6),
)
"""The published stages (Tan & Le 2021, table 4)."""


@dataclass(frozen=True, kw_only=True)
class BackboneShape:
    """What a header says of an EfficientNetV2 without its classifier.

    Attributes:
        channels: of the input.
        stem: channels after the first convolution.
        stages: six of them, see :data:`STRIDES`.
        features: channels of the output.
    """

    channels: int = 3
    stem: int = 24
    stages: tuple[StageShape, ...] = V2_S
    features: int = 1280

    def __post_init__(self) -> None:
        if min(self.channels, self.stem, self.features) < 1:
            raise BadInput(f"an EfficientNet needs channels of at least 1, not {self}")
        if len(self.stages) != len(STRIDES):
            raise BadInput(f"an EfficientNetV2-S has {len(STRIDES)} stages, not {len(self.stages)}")


@dataclass(frozen=True, kw_only=True)
class EffNetShape:
    """A backbone, and the channels of the latent that is read off its features."""

    backbone: BackboneShape = BackboneShape()
    channels: int = 16


@dataclass(frozen=True, kw_only=True)
class PreviewerShape:
    """Channels of the latent, of the widest layer (a multiple of 4), and of the image."""

    channels: int = 16
    width: int = 512
    colours: int = 3

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4 or min(self.channels, self.colours) < 1:
            raise BadInput(f"a previewer needs channels and a width that is a multiple of 4, not {self}")


def effnet_shape(shapes: Mapping[str, tuple[int, ...]]) -> EffNetShape:
    """Reads the encoder off its header; BadFile if it is none."""
    return EffNetShape(backbone=backbone_shape(shapes), channels=size_of(shapes, "mapper.0.weight", 0))


def backbone_shape(shapes: Mapping[str, tuple[int, ...]]) -> BackboneShape:
    """Reads ``backbone.*`` off a header; BadFile, with the name of a tensor, if it is no EfficientNetV2-S."""
    first, last = "backbone.0.0.weight", f"backbone.{len(STRIDES) + 1}.0.weight"
    before = size_of(shapes, first, 0)
    stages = []
    for place in range(1, len(STRIDES) + 1):
        block, depth = f"backbone.{place}.0.block", 0
        while f"backbone.{place}.{depth}.block.0.0.weight" in shapes:
            depth += 1
        inner = size_of(shapes, f"{block}.0.0.weight", 0)
        fused = f"{block}.2.fc1.weight" not in shapes
        widens = not fused or f"{block}.1.0.weight" in shapes
        if widens and inner % before:
            raise BadFile(
                f"tensor '{block}.0.0.weight' makes {inner} channels of {before}, which is no multiple",
                "effnet.header",
            )
        out = f"{block}.{3 if not fused else 1 if widens else 0}.0.weight"
        try:
            stage = StageShape(
                fused=fused,
                width=size_of(shapes, out, 0),
                depth=depth,
                expand=inner // before if widens else 1,
            )
        except BadInput as error:
            raise BadFile(f"tensor '{block}.0.0.weight': {error}", "effnet.header") from error
        stages.append(stage)
        before = stage.width
    return BackboneShape(
        channels=size_of(shapes, first, 1),
        stem=size_of(shapes, first, 0),
        stages=tuple(stages),
        features=size_of(shapes, last, 0),
    )


def previewer_shape(shapes: Mapping[str, tuple[int, ...]]) -> PreviewerShape:
    """Reads the previewer off its header; BadFile if it is none."""
    first = "blocks.0.weight"
    try:
        return PreviewerShape(
            channels=size_of(shapes, first, 1),
            width=size_of(shapes, first, 0),
            colours=size_of(shapes, "blocks.24.weight", 0),
        )
    except BadInput as error:
        raise BadFile(f"tensor {first!r}: {error}", "effnet.header") from error


class StoredNorm(nn.BatchNorm2d):
    """Batch norm by the stored statistics, in training mode too: ``(x - mean) / sqrt(var + eps) weight + bias``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Excite(nn.Module):
    """Squeeze and excitation: channels weighed by what all of them are on average; [B, C, h, w] to the same."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, narrow, 1)
        self.fc2 = nn.Conv2d(narrow, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        average = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(average))))


class InvertedBlock(nn.Module):
    """Widen, look around, narrow (the module's formulas); [B, before, h, w] to [B, width, h / stride, w / stride]."""

    def __init__(self, before: int, stage: StageShape, stride: int) -> None:
        super().__init__()
        inner, width = before * stage.expand, stage.width
        if stage.fused and stage.expand == 1:
            layers: list[nn.Module] = [_conv(before, width, 3, stride)]
        elif stage.fused:
            layers = [_conv(before, inner, 3, stride), _conv(inner, width, active=False)]
        else:
            layers = [
                _conv(before, inner),
                _conv(inner, inner, 3, stride, groups=inner),
                Excite(inner, max(1, before // 4)),
                _conv(inner, width, active=False),
            ]
        self.block = nn.Sequential(*layers)
        self.keeps = stride == 1 and before == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.keeps else self.block(x)


def backbone(shape: BackboneShape, padding: int = 1) -> nn.Sequential:
    """EfficientNetV2 without its classifier: [B, C, H, W] to [B, features, h, w].

    Args:
        shape: see :class:`BackboneShape`.
        padding: of the first convolution. 1; some ControlNets were trained with 0.
    """
    before = shape.stem
    layers: list[nn.Module] = [_conv(shape.channels, before, 3, 2, padding=padding)]
    for stage, stride in zip(shape.stages, STRIDES, strict=True):
        blocks = []
        for index in range(stage.depth):
            blocks.append(InvertedBlock(before, stage, stride if index == 0 else 1))
            before = stage.width
        layers.append(nn.Sequential(*blocks))
    return nn.Sequential(*layers, _conv(before, shape.features))


def _conv(
    before: int,
    after: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    padding: int | None = None,
    active: bool = True,
) -> nn.Sequential:
    pad = kernel // 2 if padding is None else padding
    layers = [
        nn.Conv2d(before, after, kernel, stride, pad, groups=groups, bias=False),
        StoredNorm(after, eps=EPS),
    ]
    return nn.Sequential(*layers, *([nn.SiLU()] if active else []))


class EffNet(nn.Module):
    """The encoder: an image to the latent of stage C, whose channels have about mean 0 and variance 1."""

    def __init__(self, shape: EffNetShape) -> None:
        super().__init__()
        self.shape = shape
        self.backbone = backbone(shape.backbone)
        self.mapper = nn.Sequential(
            nn.Conv2d(shape.backbone.features, shape.channels, 1, bias=False),
            StoredNorm(shape.channels, affine=False),
        )

    @property
    def stride(self) -> int:
        """Pixels a side that one latent cell stands for."""
        return STRIDE

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W], normalised (:func:`effnet_pixels`), to the latent [B, 16, h, w]."""
        check(pixels, self.shape.backbone.channels, "an EfficientNet")
        return self.mapper(self.backbone(pixels))


class Previewer(nn.Module):
    """The latent of stage C to a small image: convolutions, GELU and batch norm, doubled in size three times."""

    def __init__(self, shape: PreviewerShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        layers: list[nn.Module] = [nn.Conv2d(shape.channels, width, 1), *_after(width)]
        before = width
        for level, after in enumerate((width, width // 2, width // 4, width // 4)):
            if level > 0:
                layers += [nn.ConvTranspose2d(before, after, 2, stride=2), *_after(after)]
            layers += [nn.Conv2d(after, after, 3, padding=1), *_after(after)]
            before = after
        self.blocks = nn.Sequential(*layers, nn.Conv2d(before, shape.colours, 1))

    @property
    def stride(self) -> int:
        """Pixels a side that it makes of one latent cell."""
        return PREVIEW

    def forward(self, latent: Tensor) -> Tensor:
        """[B, 16, h, w] to pixels [B, 3, 8 h, 8 w], about 0..1, not clamped."""
        check(latent, self.shape.channels, "the previewer")
        return self.blocks(latent)


def _after(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.GELU(), StoredNorm(width)


def effnet_pixels(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in -1..1 as :class:`EffNet` takes them: ``((pixels + 1) / 2 - MEAN) / STD``."""
    check(pixels, 3, "an EfficientNet")
    mean, std = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return ((pixels + 1) / 2 - mean) / std


def check(x: Tensor, channels: int, who: str) -> None:
    """BadInput unless ``x`` is a batch of images of so many channels."""
    if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < 1:
        raise BadInput(f"{who} takes [B, {channels}, height, width], not {tuple(x.shape)}")
