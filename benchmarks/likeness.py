"""How alike two pictures of the miniature's data set are, and whether a drawn one shows what was asked for.

Every picture is looked up among all pictures of the data set (both styles, held-out ones too) in a feature space
that needs no download and was fixed on real pictures only, before any picture was drawn:

    f = [u(c), u(g)] / sqrt 2        u(v) = v / |v|,    likeness(a, b) = f_a . f_b,    distance = 1 - likeness

c: CIE L*a*b* (D65) minus white paper, blurred with sigma 2 pixels, averaged over 4 x 4 pixels: 16 x 16 x 3 numbers.
g: after Dalal & Triggs (2005): of the L*a*b* picture (sigma 1), the steepest channel's gradient at each pixel, its
   unsigned direction in 8 bins, summed with a Gaussian of sigma 4 at the centres of 8 x 8 cells; square roots.

Objects are ranked by their nearest picture. Intervals: 95 %, bootstrap over objects.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sumuk.train.data import Record

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]
"""[N, H, W, 3], sRGB."""


# ---- the feature space -----------------------------------------------------------------------------------------


def to_lab(pictures: Pictures) -> Floats:
    """sRGB (IEC 61966-2-1) to CIE L*a*b* under D65; L 0..100, [N, H, W, 3]."""
    s = pictures.astype(np.float32) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    ratio = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    d = 6 / 29
    x, y, z = np.moveaxis(np.where(ratio > d**3, np.cbrt(ratio), ratio / (3 * d * d) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def blur(fields: Floats, sigma: float) -> Floats:
    """Gaussian over the two middle axes of [N, H, W, C]; edges are continued."""
    reach = round(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    x = torch.from_numpy(fields).permute(0, 3, 1, 2)
    shape = x.shape
    x = F.pad(x.reshape(-1, 1, *shape[2:]), (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return np.ascontiguousarray(x.reshape(shape).permute(0, 2, 3, 1).numpy())


def colours(lab: Floats) -> Floats:
    """What is on the paper and where: [N, 768] for pictures of 64 x 64."""
    ink = blur(lab - np.array([100, 0, 0], np.float32), 2.0)
    count, height, width, channels = ink.shape
    return ink.reshape(count, height // 4, 4, width // 4, 4, channels).mean((2, 4)).reshape(count, -1)


def gradients(lab: Floats, bins: int = 8, cell: int = 8) -> Floats:
    """Which way edges run and where: [N, 512] for pictures of 64 x 64."""
    smooth = blur(lab, 1.0)
    down, across = np.gradient(smooth, axis=(1, 2))
    steepest = np.hypot(down, across).argmax(-1)[..., None]
    dy, dx = (np.take_along_axis(each, steepest, -1)[..., 0] for each in (down, across))
    place = np.arctan2(dy, dx) % np.pi / np.pi * bins
    low = np.floor(place)
    share, strength = place - low, np.hypot(dy, dx)
    votes = np.zeros((*place.shape, bins), np.float32)
    for which, weight in ((low, 1 - share), (low + 1, share)):  # a direction between two bins votes for both
        index = which.astype(int)[..., None] % bins
        np.put_along_axis(
            votes, index, np.take_along_axis(votes, index, -1) + (strength * weight)[..., None], -1
        )
    cells = blur(votes, cell / 2)[:, cell // 2 :: cell, cell // 2 :: cell]
    return np.sqrt(cells).reshape(len(cells), -1)


def features(pictures: Pictures) -> Floats:
    """Unit vectors [N, D]; their inner product is the likeness, -1..1."""
    rows = []
    for start in range(0, len(pictures), 256):
        lab = to_lab(pictures[start : start + 256])
        parts = [
            each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-6)
            for each in (colours(lab), gradients(lab))
        ]
        rows.append(np.concatenate(parts, axis=1) / np.sqrt(2))
    return np.concatenate(rows).astype(np.float32)


# ---- judging ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An object in a style: what a picture should show."""

    object: str
    style: str


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    return [Pair(record.object, record.style) for record in records]


@dataclass(frozen=True)
class Seen:
    """Pictures compared with a gallery: the best likeness of each object [N, O], and each one's nearest picture [N]."""

    best: Floats
    nearest: NDArray[np.int64]


class Gallery:
    """The pictures that others are looked up among.

    Args:
        pictures: [M, 64, 64, 3].
        pairs: what each shows.
    """

    def __init__(self, pictures: Pictures, pairs: Sequence[Pair]) -> None:
        self.pairs, self.features = list(pairs), features(pictures)
        self.objects = list(dict.fromkeys(pair.object for pair in pairs))
        self._column = {name: column for column, name in enumerate(self.objects)}
        self._of = np.array([self._column[pair.object] for pair in pairs])

    def look(self, seen: Floats, allowed: Callable[[int, Pair], bool] | None = None) -> Seen:
        """Compare features [N, D] with all pictures, or with those that are ``allowed`` for query i."""
        likeness = seen @ self.features.T
        if allowed is not None:
            keep = [[allowed(row, pair) for pair in self.pairs] for row in range(len(seen))]
            likeness = np.where(keep, likeness, -2)
        best = np.full((len(seen), len(self.objects)), -2, np.float32)
        np.maximum.at(best.T, self._of, likeness.T)
        return Seen(best, likeness.argmax(1))

    def marks(self, seen: Seen, wanted: Sequence[Pair]) -> NDArray[np.float64]:
        """[N, 4] of 0 and 1: object first, object among five, style of the nearest, its object and style both."""
        rows = []
        for best, nearest, pair in zip(seen.best, seen.nearest, wanted, strict=True):
            rank = int((best > best[self._column[pair.object]]).sum())
            found = self.pairs[nearest]
            rows.append((rank < 1, rank < 5, found.style == pair.style, found == pair))
        return np.array(rows, np.float64)

    def distance(self, seen: Floats, wanted: Sequence[Pair]) -> float:
        """Mean distance to the picture of the wanted pair."""
        place = {pair: row for row, pair in enumerate(self.pairs)}
        own = self.features[[place[pair] for pair in wanted]]
        return round(float(1 - (seen * own).sum(1).mean()), 4)


def interval(marks: NDArray[np.float64], groups: Sequence[str], rounds: int = 2000) -> list[list[float]]:
    """Means of the columns of [N, K] with the 95 % bootstrap interval, in percent; whole groups are drawn again."""
    names, of = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), marks.shape[1]))
    np.add.at(sums, of, marks)
    sizes = np.bincount(of)
    drawn = np.random.default_rng(0).integers(0, len(names), (rounds, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)[:, None]
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return (100 * np.stack([marks.mean(0), low, high], axis=1)).round(1).tolist()


def report(marks: NDArray[np.float64], wanted: Sequence[Pair]) -> dict[str, Any]:
    """A row of a table."""
    values = interval(marks, [pair.object for pair in wanted])
    return {
        "pictures": len(marks),
        **dict(zip(("object", "five", "style", "both"), values, strict=True)),
    }


def validate(
    gallery: Gallery, real: Pictures, rebuilt: Pictures, others: tuple[Pictures, list[Pair]]
) -> dict[str, Any]:
    """What the feature space sees when the answer is known; no drawn picture takes part."""
    pairs = gallery.pairs
    moved = np.pad(real, ((0, 0), (3, 0), (0, 3), (0, 0)), mode="edge")[:, :-3, 3:]
    rows = {}
    for name, pictures in (("rebuilt", rebuilt), ("moved", moved)):
        rows[name] = report(gallery.marks(gallery.look(features(pictures)), pairs), pairs)
    across = gallery.look(gallery.features, lambda row, pair: pair.style != pairs[row].style)
    rows["across"] = report(gallery.marks(across, pairs), pairs)
    foreign, names = others
    rows["foreign"] = report(gallery.marks(gallery.look(features(foreign)), names), names)
    for name in ("across", "foreign"):  # the picture's own style is no candidate: no style to find
        rows[name].update(style=None, both=None)
    rows["rebuilt"]["distance"] = gallery.distance(features(rebuilt), pairs)
    return rows


def shuffled(gallery: Gallery, seen: Seen, wanted: Sequence[Pair], rounds: int = 100) -> dict[str, Any]:
    """The same pictures judged against the prompt of another picture of another object."""
    order, marks, groups = random.Random(0), [], []
    for _ in range(rounds):
        given = order.sample(wanted, len(wanted))
        keep = [row for row, (a, b) in enumerate(zip(given, wanted, strict=True)) if a.object != b.object]
        marks.append(gallery.marks(Seen(seen.best[keep], seen.nearest[keep]), [given[row] for row in keep]))
        groups += [wanted[row] for row in keep]
    return report(np.concatenate(marks), groups) | {"pictures": len(wanted)}
