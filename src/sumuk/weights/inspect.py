"""What a checkpoint is, from its header alone: no tensor is loaded and torch is not imported.

What weights cannot show (eps or v, a stretched noise schedule, the licence) is answered with its evidence:
metadata, a marker tensor, a configuration file, or the family's default, which is a guess and says so.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from sumuk.base.errors import BadFile
from sumuk.diffusion.schedule import Discrete, Schedule, zero_terminal_snr
from sumuk.families.detect import Match, Unknown, detect
from sumuk.families.family import Facts, Family, Latent, Part
from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.layout import Moved
from sumuk.files.tensors import Tensors
from sumuk.weights.source import Source, read

SPELLINGS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "sample": "clean", "flow": "flow"}
"""Spellings of metadata and scheduler configurations -> names in the table of predictions."""

PREDICTION_KEYS = ("modelspec.prediction_type", "ss_model_prediction_type")

BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
"""What a scheduler configuration says of the noise that the network was trained with."""


@dataclass(frozen=True)
class Told:
    """A value and how it is known.

    Attributes:
        value: the answer.
        evidence: where it comes from.
        sure: False where it is the family's default because the file says nothing.
    """

    value: str
    evidence: str
    sure: bool = True


@dataclass(frozen=True)
class FoundPart:
    """A network that is there: what it is called, tensors, parameters, and how many tensors of each dtype."""

    name: str
    title: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class MissingPart:
    """A network that is not there, and which file would supply it."""

    name: str
    title: str
    supplier: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer to "what is this file?".

    Attributes:
        path: the file or folder.
        family: name of the family, None if unknown.
        variant: which of its variants.
        title: in words.
        layout: how its tensors are named and put together.
        parts: networks that are there.
        missing: networks that are not.
        prediction: what the denoiser predicts, with evidence.
        zero_snr: whether its noise schedule is stretched to a terminal SNR of zero, with evidence.
        ema: number of averaged weights (``model_ema.*``) that lie beside the plain ones.
        latent: of the model; None if unknown.
        licence: of the weights, with evidence.
        resolution: pixels a side of its training images, with evidence.
        metadata: texts of the header.
        ignored: number of tensors that are known and of no use.
        extra: names that no rule explains; load() refuses them.
        incomplete: names that lack a companion.
        unknown: why no family was recognised; None if one was.
        notes: choices made among several files.
        files: the weight files.
    """

    path: str
    family: str | None = None
    variant: str | None = None
    title: str = ""
    layout: str | None = None
    parts: tuple[FoundPart, ...] = ()
    missing: tuple[MissingPart, ...] = ()
    prediction: Told | None = None
    zero_snr: Told | None = None
    ema: int = 0
    latent: Latent | None = None
    licence: Told | None = None
    resolution: Told | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    ignored: int = 0
    extra: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    unknown: str | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)

    def hashes(self, progress: Progress | None = None) -> dict[str, Hashes]:
        """SHA-256, AutoV2 and AutoV3 of each weight file; this reads them whole."""
        return {file: hashes(file, progress) for file in self.files}


@dataclass(frozen=True)
class Opened:
    """A source, recognised: what :func:`open` reports and what loading builds on."""

    source: Source
    answer: Match | Unknown

    @property
    def family(self) -> Family:
        """The family; only to be asked of a match that draws."""
        assert isinstance(self.answer, Match) and isinstance(self.answer.family, Family)
        return self.answer.family

    @property
    def moved(self) -> Moved:
        """Tensors by native name, and leftovers."""
        return self.answer.moved

    def has(self, part: Part) -> bool:
        """Whether a network is there."""
        return f"{part.name}.{part.key}" in self.moved.tensors

    def tensors(self, part: str) -> Tensors:
        """The tensors of one part by the names that its network gives them."""
        return {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in self.moved.tensors.items()
            if name.startswith(f"{part}.")
        }

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's configuration, in a diffusers folder."""
        return self.source.config("scheduler/scheduler_config.json")

    def prediction(self) -> Told:
        """What the denoiser predicts: what the file says, else the family's usual; unsure where it says two.

        Raises:
            BadFile: it says something that is no prediction.
        """
        metadata = self.source.metadata
        said = [(metadata[key], f"metadata {key}") for key in PREDICTION_KEYS if key in metadata]
        if "prediction_type" in self.scheduler:
            said.append((self.scheduler["prediction_type"], "scheduler/scheduler_config.json"))
        if "v_pred" in self.source.tensors:
            said.append(("v", "marker tensor v_pred"))
        for value, where in said:
            if not isinstance(value, str) or value not in SPELLINGS:
                known = f"not one of {', '.join(SPELLINGS)}"
                raise BadFile(f"{self.source.path}: {where} says {value!r:.60}, {known}", "meta.prediction")
        if not said:
            usual = self.family.prediction
            evidence = f"the file does not say; {self.family.title} usually predicts {usual}"
            return Told(usual, evidence, sure=False)
        answers = [SPELLINGS[value] for value, _ in said]
        if len(set(answers)) > 1:
            evidence = "; but ".join(f"{where} says {value}" for value, where in said)
            return Told(answers[0], evidence, sure=False)
        return Told(answers[0], said[0][1])

    def zero_snr(self) -> Told:
        """Whether the noise schedule ends in pure noise: ``yes`` or ``no``."""
        if "ztsnr" in self.source.tensors:
            return Told("yes", "marker tensor ztsnr")
        if self.source.metadata.get("ss_zero_terminal_snr") == "True":
            return Told("yes", "metadata ss_zero_terminal_snr")
        if self.scheduler.get("rescale_betas_zero_snr") is True:
            return Told("yes", "scheduler/scheduler_config.json")
        return Told("no", "no marker for it")

    def schedule(self) -> Schedule:
        """The noise, stretched if the file says so.

        Raises:
            BadFile: a scheduler configuration with other betas than the family's; no sampler of ours
                would fit.
        """
        family = self.family
        size, prediction = family.defaults.size, family.prediction
        published = Facts(prediction=prediction, zero_snr=False, latent=family.latent, size=size)
        usual = family.folder(published).get("scheduler/scheduler_config.json", {})
        for key in BETAS:
            if key in self.scheduler and self.scheduler[key] != usual.get(key):
                raise BadFile(
                    f"{self.source.path}: scheduler_config.json says {key} {self.scheduler[key]!r:.40}; "
                    f"{family.title} has {usual.get(key)!r}",
                    "meta.schedule",
                )
        schedule = family.schedule()
        if self.zero_snr().value == "yes" and isinstance(schedule, Discrete):
            return zero_terminal_snr(schedule)
        return schedule

    def size(self) -> int:
        """The longer side of the training images in pixels."""
        sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", said := self.resolution().value)
        if not sides:
            where = f"{self.source.path}: resolution"
            raise BadFile(f"{where} is {said!r:.60}, not like '512x512'", "meta.resolution")
        return max(int(sides[1]), int(sides[2]))

    def latent(self) -> Latent:
        """Channels and stride from the header; scale and shift from configuration, metadata, or family."""
        usual = self.family.latent
        vae = self.tensors("vae")
        channels, stride = usual.channels, usual.stride
        if self.family.channels is not None:
            channels = self.family.channels({n: t.shape for n, t in self.tensors("denoiser").items()})
        levels = sum(
            re.fullmatch(r"encoder\.down\.[0-9]+\.block\.0\.conv1\.weight", name) is not None for name in vae
        )
        if levels:
            stride = 2 ** (levels - 1)
        config = self.source.config("vae/config.json")
        scale = self._number("scaling_factor", config, "sumuk.latent_scale", usual.scale)
        shift = self._number("shift_factor", config, "sumuk.latent_shift", usual.shift)
        if scale == 0:
            raise BadFile(f"{self.source.path}: a latent scale of 0 loses everything", "meta.number")
        return Latent(channels=channels, stride=stride, scale=scale, shift=shift)

    def _number(self, key: str, config: dict[str, Any], meta: str, usual: float) -> float:
        said = config.get(key)
        if said is None:
            said = self.source.metadata.get(meta, usual)
        try:
            value = float(said)  # type: ignore[arg-type]  # anything else is caught
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise BadFile(f"{self.source.path}: {key} is {said!r:.60}, not a number", "meta.number")
        return value

    def licence(self) -> Told:
        """The weights' licence."""
        if said := self.source.metadata.get("modelspec.license"):
            return Told(said, "metadata modelspec.license")
        assert isinstance(self.answer, Match)
        kind = self.answer.family
        return Told(kind.licence, f"that of {kind.title}; the file does not say", sure=False)

    def resolution(self) -> Told:
        """Pixels a side, as ``"512x512"``."""
        if said := self.source.metadata.get("modelspec.resolution"):
            return Told(said, "metadata modelspec.resolution")
        for place in ("unet/config.json", "transformer/config.json", "config.json"):
            size = self.source.config(place).get("sample_size")
            if isinstance(size, int):
                pixels = round(size * self.latent().stride)
                return Told(f"{pixels}x{pixels}", place)
        usual = self.family.defaults.size
        return Told(f"{usual}x{usual}", f"usual for {self.family.title}; the file does not say", sure=False)


def open(path: str | os.PathLike[str], variant: str | None = None) -> Found:
    """Say what a checkpoint is, from its header.

    Args:
        path: a ``.safetensors`` file, an ``.index.json``, or a folder.
        variant: which weights of a diffusers folder, see :func:`~sumuk.weights.source.read`.

    Raises:
        MissingFile: nothing there.
        BadFile: a header that breaks its format's rules, or metadata that contradicts itself.
    """
    return describe(recognise(read(path, variant)))


def recognise(source: Source) -> Opened:
    """A source with the answer to which family it is."""
    return Opened(source, detect(source.tensors))


def describe(opened: Opened) -> Found:
    """The report on a recognised source."""
    answer, source = opened.answer, opened.source
    common: dict[str, Any] = {
        "path": str(source.path),
        "parts": _parts(opened),
        "metadata": source.metadata,
        "notes": source.notes,
        "files": tuple(map(str, source.files)),
        "layout": answer.arrangement.name if answer.arrangement else None,
        "ignored": len(answer.moved.ignored),
    }
    if isinstance(answer, Unknown):
        return Found(unknown=answer.why, **common)
    kind, moved = answer.family, answer.moved
    common |= {
        "family": kind.name,
        "variant": kind.variant,
        "title": kind.title,
        "licence": opened.licence(),
        "extra": tuple(moved.unknown),
        "incomplete": tuple(name for there, _ in moved.halves for name in there),
    }
    if not isinstance(kind, Family):
        return Found(**common)
    return Found(
        missing=tuple(
            MissingPart(part.name, part.title, part.supplier) for part in kind.parts if not opened.has(part)
        ),
        prediction=opened.prediction(),
        zero_snr=opened.zero_snr(),
        ema=sum(1 for name in source.tensors if name.startswith("model_ema.diffusion_model")),
        latent=opened.latent(),
        resolution=opened.resolution(),
        **common,
    )


def _parts(opened: Opened) -> tuple[FoundPart, ...]:
    answer = opened.answer
    parts = answer.parts if isinstance(answer, Unknown) else answer.family.parts
    found = []
    for part in parts:
        if opened.has(part):
            own = opened.tensors(part.name).values()
            dtypes = dict(Counter(tensor.dtype for tensor in own).most_common())
            found.append(FoundPart(part.name, part.title, len(own), sum(t.parameters for t in own), dtypes))
    return tuple(found)
