"""What a family of models is: networks and their published names, latents, noise, text towers, licence.

A family is one frozen value in one file. Its *shape* (widths, depths, context size) is not part of it: that
is read from the file's header, so a miniature and the published model are the same family and take the same
path. Nothing here imports torch; networks are imported when one is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sumuk.base.registry import Registry
from sumuk.diffusion.schedule import Schedule
from sumuk.families.reading import Given, Reading
from sumuk.files.layout import Layout, Rule, alias, rename
from sumuk.files.tensors import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = Mapping[str, Shape]
"""Tensor names and shapes."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a family, and how its tensors may be named.

    Attributes:
        name: what the model calls it: ``denoiser``, ``vae``, ``text``.
        title: what people call it.
        key: a native name that every file with this part has.
        original: top-level names of the published layout, which is the native one (``input_blocks.*``).
        aliases: rules for older spellings of the published layout, read only.
        file: name of its weight file in a diffusers folder.
        diffusers: the rules of the diffusers library's layout, from either side's names, without prefixes.
        supplier: which file would supply the part if it is missing.
        build: a network from its native names and shapes, on torch's present default device.
        config: the ``config.json`` of the diffusers layout, from native names and shapes.
        optional: whether a model is whole without it (SD3 draws without T5).
        fixed: settings of that ``config.json`` that change the arithmetic and no tensor; another value is refused.
    """

    name: str
    title: str
    key: str
    original: tuple[str, ...]
    aliases: tuple[Rule, ...] = ()
    file: str = "diffusion_pytorch_model.safetensors"
    diffusers: Callable[[Collection[str]], Sequence[Rule]]
    supplier: str
    build: Callable[[Shapes], nn.Module]
    config: Callable[[Shapes], dict[str, Any]]
    optional: bool = False
    fixed: tuple[str, ...] = ()

    def rules(self, dialect: str, names: Collection[str]) -> list[Rule]:
        """The rules of one dialect, ``original`` or ``diffusers``."""
        if dialect == "diffusers":
            return list(self.diffusers(names))
        return [*(rename(name, name) for name in self.original), *(alias(rule) for rule in self.aliases)]


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How a file or folder puts the parts of a family together.

    Attributes:
        name: for the user: ``single``, ``diffusers``, ...
        title: in words.
        dialect: how the parts' tensors are named, ``original`` or ``diffusers``.
        parts: each part with the prefix of its tensors.
        ignored: rules for what else such files hold and what is of no use here.
    """

    name: str
    title: str
    dialect: str
    parts: tuple[tuple[Part, str], ...]
    ignored: tuple[Rule, ...] = ()

    def layout(self, names: Collection[str], backward: bool = False) -> Layout:
        """The rules between a file's names and native ones (``denoiser.input_blocks...``).

        Args:
            names: those of the file, or native ones; the numbers of levels and blocks are read off them.
            backward: whether the names are native.
        """
        rules: list[Rule] = []
        for part, prefix in self.parts:
            own = f"{part.name}." if backward else prefix
            inner = {name[len(own) :] for name in names if name.startswith(own)}
            rules += [rule.under(prefix, f"{part.name}.") for rule in part.rules(self.dialect, inner)]
        return Layout(*self.ignored, *rules)


@dataclass(frozen=True, kw_only=True)
class Latent:
    """What the denoiser works on, against what the autoencoder makes: ``model = (z - shift) * scale``.

    Attributes:
        channels: of one latent.
        stride: pixels a side that one latent cell stands for; Cascade's stage C has no whole number of them.
        scale: factor.
        shift: offset.
    """

    channels: int
    stride: float
    scale: float
    shift: float = 0.0

    def cells(self, side: int) -> int:
        """How many cells a side of that many pixels has; a last one may reach beyond the picture."""
        return math.ceil(side / self.stride - 1e-6)

    def encode(self, z: Tensor) -> Tensor:
        """The autoencoder's latent ``[B, C, H, W]`` as the denoiser knows it."""
        return (z - self.shift) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        """The denoiser's latent ``[B, C, H, W]`` as the autoencoder knows it."""
        return x / self.scale + self.shift


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets that does not say: pixels a side, steps, guidance scale, solver, step spacing.

    ``grid`` None is the solver's own spacing.
    """

    size: int
    steps: int
    guidance: float
    solver: str = "dpmpp-2m"
    grid: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a diffusers folder says in configuration files and a single file in metadata.

    Attributes:
        prediction: name in ``PREDICTIONS``.
        zero_snr: whether the noise schedule is stretched to a terminal SNR of zero.
        latent: see :class:`Latent`.
        size: pixels a side of the training images.
    """

    prediction: str
    zero_snr: bool
    latent: Latent
    size: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of weight file, or one variant of it: what it holds and how it is recognised.

    A kind by itself completes a model or changes one: an autoencoder, a text tower, a ControlNet. One that draws is
    a :class:`Family`.

    Attributes:
        name: short and stable (``sd1``).
        variant: ``text-to-image``, ``inpainting``, ...
        title: in words.
        architecture: the modelspec name (``modelspec.architecture``) that its files carry.
        arrangements: the layouts of its files; the first lists all parts and is the one to write by default.
        recognise: None if native names and shapes are this variant's, else the reason why not.
        licence: SPDX-like name of the published weights' licence.
        tells: what else names and shapes say that people want to know, as texts (an adapter's rank).
    """

    name: str
    variant: str
    title: str
    architecture: str
    arrangements: tuple[Arrangement, ...]
    recognise: Callable[[Shapes], str | None]
    licence: str
    tells: Callable[[Shapes], Mapping[str, str]] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its networks."""
        return tuple(part for part, _ in self.arrangements[0].parts)

    @property
    def key(self) -> str:
        """Name and variant in one: ``sd1/inpainting``."""
        return f"{self.name}/{self.variant}"


@dataclass(frozen=True, kw_only=True)
class Family(Kind):
    """A kind of model that draws.

    Attributes:
        latent: of the published models; a file's metadata may say otherwise.
        channels: of one latent, from the denoiser's native names and shapes; None: those of ``latent``.
        schedule: its noise.
        resized: the noise for a picture of a width and height in pixels, where it depends on them (FLUX.1 shifts it);
            None: it does not.
        prediction: what its network predicts unless a file says otherwise, a name in ``PREDICTIONS``.
        readings: the towers that read the prompt, in order; none for models without text.
        condition: what the network takes beside ``x`` and time, by the names of its ``forward``, each of batch 1.
        beside: what is laid beside the latent as further channels, in order: names of ``sumuk.generate.beside``.
        guidance: how guidance is done: ``classifier-free``, ``embedded`` or ``none``.
        classes: whether requests name a class number instead of a prompt.
        guided: how many channels of the prediction guidance acts on, from the first; None: all (DiT: 3).
        clips: whether the clean estimate is held to -1..1, as models of pixels are drawn.
        then: key of the family that draws on from this one's latents with its own network, the part ``decoder``
            (Cascade's stage B); None: the autoencoder does.
        sides: pixels a side of the training images, from the denoiser's native names and shapes, where they show it.
        takes: what else of a request it follows: ``sizes`` (SDXL is told them), ``hint`` (a depth map), ``like`` (a
            picture seen by CLIP), ``noise_level`` (of what it is shown).
        level: the usual noise level.
        view: what it is told of a picture's view by CLIP: (view [1, P], noise level, standard normal [1, P], the
            part ``statistics`` or None) -> [1, P]; None: the view itself.
        defaults: for requests.
        folder: what the JSON files of a diffusers folder say beside the networks' own configurations.
    """

    latent: Latent
    channels: Callable[[Shapes], int] | None = None
    schedule: Callable[[], Schedule]
    resized: Callable[[Schedule, int, int], Schedule] | None = None
    prediction: str
    readings: tuple[Reading, ...]
    condition: Callable[[Given], dict[str, Tensor]]
    beside: tuple[str, ...] = ()
    guidance: str
    classes: bool = False
    guided: int | None = None
    clips: bool = False
    then: str | None = None
    sides: Callable[[Shapes], int] | None = None
    takes: tuple[str, ...] = ()
    level: int = 0
    view: Callable[[Tensor, int, Tensor, Any], Tensor] | None = None
    defaults: Defaults
    folder: Callable[[Facts], dict[str, dict[str, Any]]]


FAMILIES: Registry[Kind] = Registry("family")
"""All kinds, each under its key ``name/variant``; the first variant of a family also under its bare name.
"""
