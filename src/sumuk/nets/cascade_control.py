"""ControlNets of Stable Cascade: a hint to what is added inside stage C.

They copy nothing of the network that they steer (Stability AI, 2024): a backbone reads the hint once, and one small
projection for each place makes of it what is added there::

    maps[i] = conv1x1(leaky(conv1x1(backbone(hint))))

Stage C counts its residual blocks (those named ``C``, with a depthwise convolution) from 0, down and then up: in the
3.6B network 8 and 24, then 24 and 8. Map i belongs to block ``places[i]``: it is resized to that block's picture
(bilinear, ``align_corners``) and added to the block's **input**, on the way up before the skip is joined. Places are
written in no file; :data:`PLACES` are those of all three published ControlNets here.

The hint is as the published training made it, **values 0..1 and without normalisation**:

- canny, [B, 1, H, W]: edges found in a picture of 224 pixels a side, resized to the picture's size (bilinear);
- inpainting, [B, 4, H, W]: the picture, white where it is to be painted, and the mask, 1 there;
- super resolution, [B, 16, h, w]: the EfficientNet latent of the picture at half its size, resized to twice its size
  (nearest), so that it is as large as stage C's own latent.

Shapes: B images, C channels of the hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.effnet import BackboneShape, backbone, backbone_shape, check, size_of
from sumuk.nets.layers import zero

PLACES = (0, 4, 8, 12, 51, 55, 59, 63)
"""Numbers of stage C's residual blocks to whose input a map is added, for the 3.6B network."""

SLOPE = 0.2  # of the leaky rectifiers below 0


@dataclass(frozen=True, kw_only=True)
class PlainShape:
    """A backbone of convolutions that keeps the size: for hints that are as small as the latent.

    Attributes:
        channels: of the hint.
        hidden: channels of the first layer.
        width: channels of the blocks.
        depth: blocks.
        features: channels of the output.
    """

    channels: int = 16
    hidden: int = 16384
    width: int = 1024
    depth: int = 8
    features: int = 1280


@dataclass(frozen=True, kw_only=True)
class CascadeControlShape:
    """What a header says of a ControlNet, and what none says.

    Attributes:
        backbone: what reads the hint.
        width: channels of stage C.
        places: where the maps are added, see :data:`PLACES`; one projection for each.
    """

    backbone: BackboneShape | PlainShape
    width: int = 2048
    places: tuple[int, ...] = PLACES

    def __post_init__(self) -> None:
        if self.width < 1 or not self.places or min(self.places) < 0:
            raise BadInput(f"a Cascade ControlNet needs a width and places of blocks, not {self}")
        if list(self.places) != sorted(set(self.places)):
            raise BadInput(f"places {self.places} must be numbers of different blocks, in order")


def cascade_control_shape(
    shapes: Mapping[str, tuple[int, ...]], places: tuple[int, ...] = PLACES
) -> CascadeControlShape:
    """Reads a ControlNet off its header.

    Args:
        shapes: shape of each tensor, by its published name.
        places: where its maps are added, which no header shows.

    Raises:
        BadFile: it is no such ControlNet, or has another number of projections than there are places.
    """
    count = 0
    while f"projections.{count}.2.weight" in shapes:
        count += 1
    width = size_of(shapes, "projections.0.2.weight", 0)
    if count != len(places):
        raise BadFile(
            f"the ControlNet has {count} projections ('projections.{count - 1}.2.weight' is the last) for "
            f"{len(places)} places {places}; say which blocks of stage C it was trained for",
            "control.places",
        )
    # An EfficientNet begins with a layer of convolution and norm, the other kind with a bare convolution.
    plain = "backbone.0.weight" in shapes
    return CascadeControlShape(
        backbone=_plain_shape(shapes) if plain else backbone_shape(shapes), width=width, places=tuple(places)
    )


def _plain_shape(shapes: Mapping[str, tuple[int, ...]]) -> PlainShape:
    depth = 0
    while f"backbone.{depth + 3}.blocks.0.weight" in shapes:
        depth += 1
    return PlainShape(
        channels=size_of(shapes, "backbone.0.weight", 1),
        hidden=size_of(shapes, "backbone.0.weight", 0),
        width=size_of(shapes, "backbone.2.weight", 0),
        depth=depth,
        features=size_of(shapes, f"backbone.{depth + 3}.weight", 0),
    )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position; [B, C, h, w] to the same."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class PlainBlock(nn.Module):
    """Two times norm, GELU, convolution, around a shortcut; [B, width, h, w] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ChannelNorm(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            ChannelNorm(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


class CascadeControl(nn.Module):
    """The ControlNet. An untrained one adds zero, as its projections end in zeros.

    Args:
        shape: see :class:`CascadeControlShape`; usually read off a file by :func:`cascade_control_shape`.
    """

    def __init__(self, shape: CascadeControlShape) -> None:
        super().__init__()
        self.shape = shape
        self.backbone = _backbone(shape.backbone)
        self.projections = nn.ModuleList(
            _projection(shape.backbone.features, shape.width) for _ in shape.places
        )

    def forward(self, hint: Tensor) -> list[Tensor]:
        """What is added inside stage C.

        Args:
            hint: [B, C, H, W], as the module says.

        Returns:
            For each of ``shape.places`` a map [B, width, h, w], to be resized and added there: h and w are those of
            the hint, a 32nd of them where an EfficientNet reads it.

        Raises:
            BadInput: another number of channels, or a hint that is too small.
        """
        check(hint, self.shape.backbone.channels, "this ControlNet")
        if min(hint.shape[2:]) < (least := _least(self.shape.backbone)):
            raise BadInput(f"this ControlNet needs a hint of {least} a side or more, not {tuple(hint.shape)}")
        read = self.backbone(hint)
        return [project(read) for project in self.projections]


def _backbone(shape: BackboneShape | PlainShape) -> nn.Sequential:
    if isinstance(shape, BackboneShape):
        # Where the hint is no RGB picture, the published networks had their first convolution replaced by one
        # without padding; its weights know no other.
        return backbone(shape, padding=1 if shape.channels == 3 else 0)
    return nn.Sequential(
        nn.Conv2d(shape.channels, shape.hidden, 1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(shape.hidden, shape.width, 1),
        *(PlainBlock(shape.width) for _ in range(shape.depth)),
        nn.Conv2d(shape.width, shape.features, 1),
    )


def _projection(features: int, width: int) -> nn.Sequential:
    last = nn.Conv2d(features, width, 1, bias=False)
    zero(last)
    return nn.Sequential(nn.Conv2d(features, features, 1, bias=False), nn.LeakyReLU(SLOPE), last)


def _least(shape: BackboneShape | PlainShape) -> int:
    """Smallest side of a hint: that of a first convolution without padding."""
    return 3 if isinstance(shape, BackboneShape) and shape.channels != 3 else 1
