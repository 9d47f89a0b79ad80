"""Stable Cascade's stage A: the vector-quantised autoencoder of Paella.

Rampas et al. 2022, "A Novel Sampling Scheme for Text- and Image-Conditional Image Synthesis in Quantized Latent
Spaces" (arXiv 2211.07292). Pixels are folded two by two into channels; a block mixes positions, then channels::

    x = x + g2 depthwise(norm(x) (1 + g0) + g1)
    x = x + g5 channelwise(norm(x) (1 + g3) + g4)          norm over channels, without weights; six scalars g a block

    latent = batch norm(conv(down(conv(fold(pixels))))),    pixels = unfold(conv(up(conv(latent))))

Cascade uses the latent as it is, unquantised; :meth:`Paella.quantise` gives the nearest code vectors. The published
network works on pixels in 0..1; **here they are -1..1**, as those of ``vae.py``, and are moved on the way in and out.
Latents are raw: the published decoder multiplies by 0.43 what stage B made, which is the family's to do.

Shapes: B images, C colours, H and W pixels, z latent channels, h = H / stride, w = W / stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.effnet import StoredNorm, size_of

FOLD = 2  # pixels a side that are folded into channels before anything else
EXPAND = 4  # channels inside a block's channelwise part over its width
ROWS = 4096  # latent cells that are compared with the codebook at a time; 8192 codes take 128 MiB


@dataclass(frozen=True, kw_only=True)
class PaellaShape:
    """What a header says of the autoencoder.

    Attributes:
        width: channels of the narrowest picture; half as many at each level above it.
        levels: number of sizes inside; one halving between two.
        blocks: blocks of the decoder at its narrowest picture (one at each other place).
        channels: of a latent.
        codes: rows of the codebook.
        colours: channels of an image.
    """

    width: int = 384
    levels: int = 2
    blocks: int = 12
    channels: int = 4
    codes: int = 8192
    colours: int = 3

    def __post_init__(self) -> None:
        if min(self.levels, self.blocks, self.channels, self.codes, self.colours) < 1:
            raise BadInput(f"a Paella autoencoder needs counts of at least 1, not {self}")
        if self.levels > 8 or self.width < 1 or self.width % 2 ** (self.levels - 1):
            raise BadInput(f"Paella width {self.width} cannot be halved {self.levels - 1} times")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the largest picture to the smallest."""
        return tuple(self.width // 2**level for level in reversed(range(self.levels)))

    @property
    def stride(self) -> int:
        """Pixels a side that one latent cell stands for."""
        return int(FOLD * 2 ** (self.levels - 1))


def paella_shape(shapes: Mapping[str, tuple[int, ...]]) -> PaellaShape:
    """Reads the shape off tensor names and shapes alone; BadFile, with a tensor's name, if it is no such network."""
    levels, blocks = 1, 0
    while len(shapes.get(f"down_blocks.{2 * levels - 1}.weight", ())) == 4:
        levels += 1
    while f"up_blocks.{blocks + 1}.gammas" in shapes:
        blocks += 1
    entry, exit_ = "up_blocks.0.0.weight", "out_block.0.weight"
    folded = size_of(shapes, exit_, 0)
    if folded % FOLD**2:
        raise BadFile(f"tensor {exit_!r} makes {folded} channels, no multiple of {FOLD**2}", "paella.header")
    try:
        return PaellaShape(
            width=size_of(shapes, entry, 0),
            levels=levels,
            blocks=blocks,
            channels=size_of(shapes, entry, 1),
            codes=size_of(shapes, "vquantizer.codebook.weight", 0),
            colours=folded // FOLD**2,
        )
    except BadInput as error:
        raise BadFile(f"tensor {entry!r}: {error}", "paella.header") from error


@dataclass(frozen=True)
class Point:
    """A latent without chance, in the place of a Gaussian.

    Attributes:
        mean: [B, z, h, w].
    """

    mean: Tensor

    def mode(self) -> Tensor:
        """The latent."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """The latent as well: there is nothing to draw. ``noise`` must fit all the same."""
        if noise.shape != self.mean.shape:
            raise BadInput(
                f"noise of shape {tuple(noise.shape)} does not fit latents {tuple(self.mean.shape)}"
            )
        return self.mean


class MixingBlock(nn.Module):
    """Mixes positions, then channels (the module's formula); [B, width, h, w] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), nn.Conv2d(width, width, kernel_size=3, groups=width)
        )
        self.channelwise = nn.Sequential(
            nn.Linear(width, EXPAND * width), nn.GELU(), nn.Linear(EXPAND * width, width)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        g = self.gammas
        h = _norm(x) * (1 + g[0]) + g[1]
        x = x + self.depthwise(h.permute(0, 3, 1, 2)) * g[2]
        h = _norm(x) * (1 + g[3]) + g[4]
        return x + self.channelwise(h).permute(0, 3, 1, 2) * g[5]


def _norm(x: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h, w, C], each position's channels with mean 0 and variance 1."""
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=1e-6)


class Quantiser(nn.Module):
    """The codebook, under its published name."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codes, width)


class Paella(nn.Module):
    """The autoencoder, with the outside of :class:`~sumuk.nets.vae.Vae`."""

    def __init__(self, shape: PaellaShape) -> None:
        super().__init__()
        self.shape = shape
        widths, folded = shape.widths, shape.colours * FOLD**2
        self.in_block = nn.Sequential(nn.PixelUnshuffle(FOLD), nn.Conv2d(folded, widths[0], 1))
        down: list[nn.Module] = [MixingBlock(widths[0])]
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), MixingBlock(after)]
        latent = nn.Conv2d(widths[-1], shape.channels, 1, bias=False)
        self.down_blocks = nn.Sequential(*down, nn.Sequential(latent, StoredNorm(shape.channels)))
        self.vquantizer = Quantiser(shape.codes, shape.channels)
        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(shape.channels, widths[-1], 1))]
        up += [MixingBlock(widths[-1]) for _ in range(shape.blocks)]
        for before, after in pairwise(widths[::-1]):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), MixingBlock(after)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], folded, 1), nn.PixelShuffle(FOLD))

    @property
    def stride(self) -> int:
        """Pixels a side that one latent cell stands for."""
        return self.shape.stride

    def encode(self, pixels: Tensor) -> Point:
        """[B, C, H, W] in -1..1 to its latent; H and W are multiples of ``stride``."""
        self._check(pixels, self.shape.colours, self.stride, "pixels")
        return Point(self.down_blocks(self.in_block((pixels + 1) / 2)))

    def decode(self, latent: Tensor) -> Tensor:
        """[B, z, h, w] to pixels [B, C, h * stride, w * stride], about -1..1, not clamped."""
        self._check(latent, self.shape.channels, 1, "a latent")
        return self.out_block(self.up_blocks(latent)) * 2 - 1

    def quantise(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest code of each cell.

        Args:
            latent: [B, z, h, w].

        Returns:
            The codes in place of the cells, [B, z, h, w], and their numbers, [B, h, w].
        """
        self._check(latent, self.shape.channels, 1, "a latent")
        codebook = self.vquantizer.codebook.weight
        cells = latent.permute(0, 2, 3, 1)
        found = [
            torch.cdist(rows.float(), codebook.float()).argmin(dim=1)
            for rows in cells.reshape(-1, cells.shape[-1]).split(ROWS)
        ]
        numbers = torch.cat(found).reshape(cells.shape[:-1])
        return self.vquantizer.codebook(numbers).permute(0, 3, 1, 2), numbers

    def _check(self, x: Tensor, channels: int, step: int, what: str) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise BadInput(
                f"{what} of shape {tuple(x.shape)}: this autoencoder takes [B, {channels}, height, width]"
            )
        if x.shape[2] < step or x.shape[3] < step or x.shape[2] % step or x.shape[3] % step:
            raise BadInput(
                f"{what} of {x.shape[3]}x{x.shape[2]}: sides must be multiples of {step}; resize or pad"
            )
