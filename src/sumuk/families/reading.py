"""How a family is told what to draw: its towers read the prompt, and what they say becomes the network's inputs.

The engine reads and weighs the words, tower by tower (:class:`Reading` says how); a family only puts together what
its network takes beside ``x`` and time: one function from :class:`Given` to named tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How one tower reads the prompt.

    Attributes:
        part: the tower's :class:`~sumuk.families.family.Part`.
        words: its kind of vocabulary: ``clip`` (chunks with begin and end) or ``t5`` (one row with an end).
        pad: the id that fills rows up; None: the vocabulary's own.
        layer: the hidden state, counted from the end, that is read with clip skip 1; or a function from the tower's
            shape to it, where files leave away what is not read.
        norm: whether the tower's final norm is applied to it.
        pool: the sentence as one vector: ``pooled``, ``projected``, or None for none.
        length: tokens of a row; None: as many as the tower has positions. T5 has none, so it must be said.
        masked: whether the tower does not attend to what fills the row up.
    """

    part: str
    words: str = "clip"
    pad: int | None = None
    layer: int | Callable[[Any], int] = 1
    norm: bool = True
    pool: str | None = None
    length: int | None = None
    masked: bool = False

    def layer_of(self, shape: Any) -> int:
        """The layer for a tower of that shape."""
        return self.layer if isinstance(self.layer, int) else self.layer(shape)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one tower says of one text.

    Attributes:
        z: its rows, [1, n, D]; a longer text has more of them.
        pooled: the whole as one vector [1, P], of the first chunk; None where the reading pools nothing.
    """

    z: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What SDXL is told of the picture that it imitates, in pixels (Podell et al. 2023, section 2.2).

    Attributes:
        original: height and width before cropping.
        crop: rows and columns cut away at top and left.
        target: height and width wanted.
    """

    original: tuple[int, int]
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Everything that a family may put into its network's inputs.

    Attributes:
        shape: the denoiser's shape value, for widths.
        texts: what each tower said, by part; without an entry for a tower that the model lacks.
        sizes: of the picture.
        negative: whether this is the side to go away from.
        empty: whether the text has no words.
        guidance: scale, for networks that take it as an input.
        label: class number of class-conditional models; None: no class.
        coarse: the finished latent [1, C, h, w] that this stage draws on from (Cascade's stage B); None: none.
        image: a picture through CLIP's image tower, [1, P] or [1, n, P]; None: none.
        noise_level: how much noise lies on what the network is shown (x4 upscaler, unCLIP), in schedule steps.
    """

    shape: Any
    sizes: Sizes
    texts: Mapping[str, Encoded] = field(default_factory=dict)
    negative: bool = False
    empty: bool = False
    guidance: float = 1.0
    label: int | None = None
    coarse: Tensor | None = None
    image: Tensor | None = None
    noise_level: int = 0
