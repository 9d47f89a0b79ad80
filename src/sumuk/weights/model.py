"""A model: a family together with tensors, placed on a device, and what its file says about using it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile
from sumuk.diffusion.prediction import Prediction
from sumuk.diffusion.schedule import Discrete, Schedule
from sumuk.families.family import Defaults, Facts, Family, Latent
from sumuk.families.reading import Reading
from sumuk.files.hashes import Progress, hashes
from sumuk.weights.inspect import Found


@dataclass(frozen=True)
class WeightFile:
    """A file that tensors came from."""

    path: Path

    @cached_property
    def sha256(self) -> str:
        """Its SHA-256 in hexadecimal; read when first asked for."""
        return self.digest()

    def digest(self, progress: Progress | None = None) -> str:
        """The same, with a report of progress."""
        return hashes(self.path, progress).sha256


class Words(Protocol):
    """A tower's vocabulary: :class:`sumuk.nets.tokens.ClipTokens`, :class:`sumuk.nets.unigram.T5Tokens`."""

    @property
    def size(self) -> int:
        """Number of words."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a row."""
        ...

    def encode(self, text: str) -> list[int]:
        """A text's tokens, without begin, end and padding."""
        ...

    def row(self, ids: Sequence[int]) -> list[int]:
        """A whole row for the tower."""
        ...

    def to_json(self) -> str:
        """All of it as text, for a file's metadata."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that drawing with a checkpoint needs.

    Attributes:
        family: what it is.
        networks: its networks by the names of the family's parts; those that it may lack and lacks have no entry.
        words: the vocabulary of each text tower, by part.
        schedule: its noise.
        prediction: what the denoiser predicts.
        latent: scale, shift, channels and stride of its latents.
        size: pixels a side of its training images.
        metadata: texts of its file, kept when it is saved again.
        found: what :func:`sumuk.open` said of the file; None for a model that was not loaded.
        files: the files that it came from.
        ema: whether the denoiser has the file's averaged weights instead of its plain ones.
    """

    family: Family
    networks: dict[str, Any]
    words: dict[str, Words] = field(default_factory=dict)
    schedule: Schedule
    prediction: Prediction
    latent: Latent
    size: int
    metadata: dict[str, str] = field(default_factory=dict)
    found: Found | None = None
    files: tuple[WeightFile, ...] = ()
    ema: bool = False

    @property
    def denoiser(self) -> Any:
        """The network that is asked at every step."""
        return self.networks["denoiser"]

    @property
    def vae(self) -> Any:
        """Pixels to latents and back; None for a model of pixels."""
        return self.networks.get("vae")

    @property
    def text(self) -> Any:
        """The first text tower; None for a model without text."""
        return next((self.networks[reading.part] for reading in self.readings), None)

    @property
    def tokens(self) -> Any:
        """The first tower's vocabulary; None for a model without text."""
        return next((self.words[reading.part] for reading in self.readings), None)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """How the prompt is read, by each of the towers that are here."""
        return tuple(reading for reading in self.family.readings if reading.part in self.networks)

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's parameters."""
        return _first(self.denoiser).dtype

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return _first(self.denoiser).device

    @property
    def defaults(self) -> Defaults:
        """What a request gets that does not say; the file's own guidance (``sumuk.guidance``) before the family's.

        Raises:
            BadFile: the file's guidance is no number from 1 to 100.
        """
        usual = replace(self.family.defaults, size=self.size)
        said = self.metadata.get("sumuk.guidance")
        if said is None:
            return usual
        try:
            guidance = float(said)
        except ValueError:
            guidance = math.nan
        if not 1.0 <= guidance <= 100.0:
            raise BadFile(f"metadata sumuk.guidance {said!r} is no number from 1 to 100", "model.metadata")
        return replace(usual, guidance=guidance)

    @property
    def facts(self) -> Facts:
        """What is said in configuration files and metadata when the model is saved."""
        return Facts(
            prediction=self.prediction.name,
            zero_snr=isinstance(self.schedule, Discrete) and self.schedule.noisiest.is_pure_noise,
            latent=self.latent,
            size=self.size,
        )

    def noise_for(self, width: int, height: int) -> Schedule:
        """The noise for a picture of that size in pixels."""
        resized = self.family.resized
        return self.schedule if resized is None else resized(self.schedule, width, height)

    def encode_latent(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in -1..1 to the denoiser's latents ``[B, C, H/stride, W/stride]``.

        Args:
            pixels: images.
            noise: standard normal of the latents' shape, to draw from the autoencoder's Gaussian; its
                mean if None.
        """
        if self.vae is None:
            return self.latent.encode(pixels.to(_first(self.denoiser)))
        moments = self.vae.encode(pixels.to(_first(self.vae)))
        return self.latent.encode(moments.mode() if noise is None else moments.sample(noise.to(moments.mean)))

    def decode_latent(self, x: Tensor) -> Tensor:
        """The denoiser's latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``, about -1..1."""
        z = self.latent.decode(x)
        return z if self.vae is None else self.vae.decode(z.to(_first(self.vae)))


def _first(network: nn.Module) -> nn.Parameter:
    return next(network.parameters())
