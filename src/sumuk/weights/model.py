"""A model: a family together with tensors, placed on a device, and what its file says about using it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sumuk.base.errors import BadFile, MissingFile
from sumuk.diffusion.prediction import PREDICTIONS, Prediction
from sumuk.diffusion.schedule import Discrete, Schedule
from sumuk.families.family import FAMILIES, Defaults, Facts, Family, Kind, Latent
from sumuk.families.reading import Reading
from sumuk.files.hashes import Hashes
from sumuk.nets.effnet import effnet_pixels
from sumuk.weights.found import Found, Told
from sumuk.weights.remembered import usual_index

if TYPE_CHECKING:
    from sumuk.weights.embedding import Embedding
    from sumuk.weights.hypernet import Hypernet
    from sumuk.weights.live import LiveLora


@dataclass(frozen=True)
class WeightFile:
    """A file that tensors came from.

    Attributes:
        path: where it is.
        licence: of its tensors, with evidence; None: nobody said.
    """

    path: Path
    licence: Told | None = None

    @cached_property
    def hashes(self) -> Hashes:
        """Its hashes; read when first asked for, and remembered."""
        return usual_index().hashes(self.path)

    @property
    def sha256(self) -> str:
        """Its SHA-256 in hexadecimal."""
        return self.hashes.sha256

    @property
    def autov3(self) -> str | None:
        """See :mod:`sumuk.files.hashes`."""
        return self.hashes.autov3


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
class Control:
    """A ControlNet or a picture adapter beside a model.

    Attributes:
        kind: what it is.
        network: what it computes.
        files: where it came from.
    """

    kind: Kind
    network: Any
    files: tuple[WeightFile, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One walk from noise to a latent.

    Attributes:
        family: what the network takes, and its usual settings.
        network: which of the model's networks is asked.
        latent: what it works on.
        schedule: its noise.
        prediction: what the network predicts.
    """

    family: Family
    network: str
    latent: Latent
    schedule: Schedule
    prediction: Prediction

    def noise_for(self, width: int, height: int) -> Schedule:
        """The noise for a picture of that size in pixels."""
        resized = self.family.resized
        return self.schedule if resized is None else resized(self.schedule, width, height)


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
        refiner: a model of the same latents that draws the last part of the way (SDXL); None: none.
        controls: ControlNets by the names under which requests ask for them.
        loras: LoRAs and their like by the names under which requests and prompts ask for them.
        hypernets: hypernetworks, likewise.
        embeddings: textual inversions, likewise.
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
    refiner: Model | None = None
    controls: dict[str, Control] = field(default_factory=dict)
    loras: dict[str, LiveLora] = field(default_factory=dict)
    hypernets: dict[str, Hypernet] = field(default_factory=dict)
    embeddings: dict[str, Embedding] = field(default_factory=dict)

    @property
    def every_file(self) -> tuple[WeightFile, ...]:
        """Its files, and those of its refiner and controls."""
        guests = [control.files for control in self.controls.values()]
        guests += [self.refiner.every_file] if self.refiner is not None else []
        return (*self.files, *(file for files in guests for file in files))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The walks that make a picture, in order; usually one."""
        found = [Stage(self.family, "denoiser", self.latent, self.schedule, self.prediction)]
        while (then := found[-1].family.then) is not None:
            family = FAMILIES[then]
            assert isinstance(family, Family)
            usual = PREDICTIONS[family.prediction]
            found.append(Stage(family, "decoder", family.latent, family.schedule(), usual))
        return tuple(found)

    def network(self, name: str) -> Any:
        """What rows are asked of: ``denoiser``, ``decoder``, or ``refiner``."""
        if name == "refiner":
            assert self.refiner is not None
            return self.refiner.denoiser
        return self.networks[name]

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

    def encode_latent(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in -1..1 to the denoiser's latents ``[B, C, H/stride, W/stride]``.

        Args:
            pixels: images.
            noise: standard normal of the latents' shape, to draw from the autoencoder's Gaussian; its
                mean if None.
        """
        if self.vae is None:
            return self.latent.encode(pixels.to(_first(self.denoiser)))
        if self.family.then is not None:
            return self._compress(pixels)
        moments = self.vae.encode(pixels.to(_first(self.vae)))
        return self.latent.encode(moments.mode() if noise is None else moments.sample(noise.to(moments.mean)))

    def decode_latent(self, x: Tensor) -> Tensor:
        """The denoiser's latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``, about -1..1."""
        z = self.stages[-1].latent.decode(x)
        return z if self.vae is None else self.vae.decode(z.to(_first(self.vae)))

    def _compress(self, pixels: Tensor) -> Tensor:
        """Pixels to the latents of the first of several stages, by an encoder of their own."""
        effnet = self.networks.get("effnet")
        if effnet is None:
            raise MissingFile(
                f"{self.family.title} begins from a picture only with its effnet_encoder; give it to load() "
                'as parts={"effnet": FILE}'
            )
        height, width = (self.latent.cells(side) * effnet.stride for side in pixels.shape[-2:])
        sized = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
        return self.latent.encode(effnet(effnet_pixels(sized.to(_first(effnet)))))


def _first(network: nn.Module) -> nn.Parameter:
    return next(network.parameters())
