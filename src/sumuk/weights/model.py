"""A model: a family together with tensors, placed on a device, and what its file says about using it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile
from sumuk.diffusion.prediction import Prediction
from sumuk.diffusion.schedule import Schedule
from sumuk.families.family import Defaults, Facts, Family, Latent
from sumuk.files.hashes import Progress, hashes
from sumuk.nets.clip import ClipText
from sumuk.nets.tokens import ClipTokens
from sumuk.nets.unet import UNet
from sumuk.nets.vae import Vae
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


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that drawing with a checkpoint needs.

    Attributes:
        family: what it is.
        denoiser: the network that is asked at every step.
        vae: pixels to latents and back.
        text: the text tower.
        tokens: its vocabulary.
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
    denoiser: UNet
    vae: Vae
    text: ClipText
    tokens: ClipTokens
    schedule: Schedule
    prediction: Prediction
    latent: Latent
    size: int
    metadata: dict[str, str] = field(default_factory=dict)
    found: Found | None = None
    files: tuple[WeightFile, ...] = ()
    ema: bool = False

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Its networks by the names of the family's parts."""
        return {"denoiser": self.denoiser, "vae": self.vae, "text": self.text}

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's parameters."""
        return next(self._parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self._parameters()).device

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
            zero_snr=self.schedule.noisiest.is_pure_noise,
            latent=self.latent,
            size=self.size,
        )

    def encode_latent(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in -1..1 to the denoiser's latents ``[B, C, H/stride, W/stride]``.

        Args:
            pixels: images.
            noise: standard normal of the latents' shape, to draw from the autoencoder's Gaussian; its
                mean if None.
        """
        moments = self.vae.encode(pixels.to(next(self.vae.parameters())))
        return self.latent.encode(moments.mode() if noise is None else moments.sample(noise.to(moments.mean)))

    def decode_latent(self, x: Tensor) -> Tensor:
        """The denoiser's latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``, about -1..1."""
        return self.vae.decode(self.latent.decode(x).to(next(self.vae.parameters())))

    def _parameters(self) -> Iterator[nn.Parameter]:
        return self.denoiser.parameters()
