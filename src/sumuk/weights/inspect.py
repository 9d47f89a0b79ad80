"""What a checkpoint is, from its header alone: no tensor is loaded and torch is not imported.

What weights cannot show (eps or v, a stretched noise schedule, the licence) is answered with its evidence:
metadata, a marker tensor, a configuration file, or the family's default, which is a guess and says so.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sumuk.base.errors import BadFile
from sumuk.diffusion.schedule import ContinuousVP, Discrete, Schedule, VarianceExploding, zero_terminal_snr
from sumuk.families.detect import Match, Near, Unknown, detect
from sumuk.families.family import FAMILIES, Facts, Family, Kind, Latent, Part
from sumuk.families.lineage import EITHER, LIMITS, alike
from sumuk.files.gaps import gaps
from sumuk.files.layout import Moved, some
from sumuk.files.tensors import Lazy, Tensors
from sumuk.weights.found import Found, FoundPart, MissingPart, Told
from sumuk.weights.source import Source, read

__all__ = ["Found", "FoundPart", "MissingPart", "Opened", "Told", "describe", "open", "recognise"]

SPELLINGS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "sample": "clean", "flow": "flow"}
"""Spellings of metadata and scheduler configurations -> names in the table of predictions."""

PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "ss_model_prediction_type")

ARCHITECTURES = {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"}
"""What ``modelspec.architecture`` says of the prediction, where nothing else does."""

CONTRADICTS = "; but "
"""Stands between two pieces of evidence that disagree."""

SCORE_SDE = {
    "ScoreSdeVeScheduler": ("ve", ("sigma_min", "sigma_max")),
    "ScoreSdeVpScheduler": ("vp", ("beta_min", "beta_max")),
}
"""The diffusers library's names of score-SDE's noise, and of its two ends."""
CONTINUOUS: dict[str, Callable[[float, float], Schedule]] = {"ve": VarianceExploding, "vp": ContinuousVP}

SMALL = ("F8", "F4", "F6", "U8", "I8", "Q", "IQ", "NF4", "FP4")
"""Beginnings of types and schemes of at most 8 bits."""

BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
"""What a scheduler configuration says of the noise that the network was trained with."""


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

    def own(self, part: str) -> Tensors:
        """What there is of one part, by the names that its network gives them."""
        return {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in self.moved.tensors.items()
            if name.startswith(f"{part}.")
        }

    def tensors(self, part: str) -> Tensors:
        """The same to load from.

        Raises:
            BadFile: half of a set is there; a network of what remains would be another one.
        """
        if self.moved.halves:
            there, lost = self.moved.halves[0]
            raise BadFile(
                f"{self.source.path}: holds {there[0]!r} without {lost[0]!r}, its other part", "layout.half"
            )
        return self.own(part)

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's configuration, in a diffusers folder."""
        places = (
            "scheduler/scheduler_config.json",
            "scheduler_config.json",
        )  # the second: folders of one network
        return next((found for place in places if (found := self.source.config(place))), {})

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
        architecture = metadata.get("modelspec.architecture", "")
        if not said and architecture in ARCHITECTURES:
            said.append((ARCHITECTURES[architecture], "metadata modelspec.architecture"))
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
            evidence = CONTRADICTS.join(f"{where} says {value}" for value, where in said)
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
        """The noise: score-SDE's if the file says so (metadata ``sumuk.schedule`` or a scheduler's name), else the
        family's, stretched if the file says so.

        Raises:
            BadFile: a scheduler configuration with other noise than any that is known here.
        """
        family = self.family
        if (score := self._score_sde()) is not None:
            return score
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

    def _score_sde(self) -> Schedule | None:
        """The continuous noise of Song et al. 2021 that the same networks can be trained on; None if none is named."""
        said, name = self.source.metadata.get("sumuk.schedule"), str(self.scheduler.get("_class_name", ""))
        if said is not None:
            kind, *ends = said.split() or [""]
            where = "metadata sumuk.schedule"
        elif name in SCORE_SDE:
            kind, keys = SCORE_SDE[name]
            ends = [str(self.scheduler[key]) for key in keys if key in self.scheduler]
            where = "scheduler_config.json"
        elif name.startswith("EDM"):
            raise BadFile(
                f"{self.source.path}: the scheduler is {name}, whose noise {self.family.title} does not have here",
                "meta.schedule",
            )
        else:
            return None
        try:
            least, most = map(float, ends)
        except ValueError:
            least = most = math.nan
        if kind not in CONTINUOUS or not 0 < least < most < math.inf:
            raise BadFile(
                f"{self.source.path}: {where} says {said or ' '.join([kind, *ends])!r:.60}, not like 've 0.01 50'",
                "meta.schedule",
            )
        return CONTINUOUS[kind](least, most)

    def size(self) -> int:
        """The longer side of the training images in pixels."""
        sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", said := self.resolution().value)
        if not sides or not int(sides[1]) * int(sides[2]):
            where = f"{self.source.path}: resolution"
            raise BadFile(f"{where} is {said!r:.60}, not like '512x512'", "meta.resolution")
        return max(int(sides[1]), int(sides[2]))

    def latent(self) -> Latent:
        """Channels and stride from the header; scale and shift from configuration, metadata, or family."""
        usual = self.family.latent
        vae = self.own("vae")
        channels, stride = usual.channels, usual.stride
        if self.family.channels is not None:
            channels = self.family.channels({n: t.shape for n, t in self.own("denoiser").items()})
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
        except (TypeError, ValueError, OverflowError):
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
        if kind.licence == "unknown":
            return Told("unknown", "the file does not say, and such files have many", sure=False)
        return Told(kind.licence, f"that of {kind.title}; the file does not say", sure=False)

    def resolution(self) -> Told:
        """Pixels a side, as ``"512x512"``."""
        if said := self.source.metadata.get("modelspec.resolution"):
            return Told(said, "metadata modelspec.resolution")
        for place in ("unet/config.json", "transformer/config.json", "config.json"):
            size = self.source.config(place).get("sample_size")
            if type(size) is int:  # True is no size
                pixels = round(size * self.latent().stride)
                return Told(f"{pixels}x{pixels}", place)
        if self.family.sides is not None:
            side = self.family.sides({name: one.shape for name, one in self.own("denoiser").items()})
            return Told(f"{side}x{side}", "the denoiser's table of positions")
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
        "parts": tuple(_parts(opened)),
        "metadata": source.metadata,
        "notes": source.notes,
        "files": tuple(map(str, source.files)),
        "layout": answer.arrangement.name if answer.arrangement else None,
        "ignored": len(answer.moved.ignored),
        "alternatives": tuple(_alternatives(opened)),
    }
    if isinstance(answer, Unknown):
        return Found(unknown=answer.why, **common)
    kind, moved = answer.family, answer.moved
    lost, odd = gaps([name for names in moved.origin.values() for name in names] if kind.parts else [])
    lost += [name for _, names in moved.halves for name in names if name not in lost]
    common |= {
        "family": kind.name,
        "variant": kind.variant,
        "title": kind.title,
        "missing": tuple(_missing(opened, kind)),
        "details": _details(opened, kind),
        "models": tuple(known.title for known in alike(kind.key, _count(opened, kind))),
        "licence": opened.licence(),
        "extra": (*moved.unknown, *odd),
        "incomplete": tuple(lost),
    }
    if isinstance(kind, Family):
        common |= {
            "prediction": _prediction(opened),
            "zero_snr": opened.zero_snr(),
            "ema": sum(1 for name in source.tensors if name.startswith("model_ema.diffusion_model")),
            "latent": opened.latent(),
            "resolution": opened.resolution(),
        }
    found = Found(**common)
    return replace(found, warnings=tuple(_warnings(found)))


def _prediction(opened: Opened) -> Told:
    """As the file says it. Where it does not, a flow is one by its network, and eps or v may be unknown."""
    told, family = opened.prediction(), opened.family
    if told.sure or CONTRADICTS in told.evidence:
        return told
    if family.prediction == "flow":
        return Told("flow", f"{family.title} is a flow: its network is trained for nothing else")
    if family.name in EITHER:
        evidence = f"the file does not say, and its tensors fit eps and v; {family.title} usually predicts {told.value}"
        return Told("unknown", evidence, sure=False, usual=told.value)
    return told


def _details(opened: Opened, kind: Kind) -> dict[str, str]:
    """What is this kind's own."""
    said: dict[str, str] = {}
    if kind.tells is not None:
        said |= kind.tells({name: tensor.shape for name, tensor in opened.moved.tensors.items()})
    if not isinstance(kind, Family):  # a network's own folder says what its tensors do not
        config = opened.source.config("config.json")
        told = {key: config[key] for key in ("scaling_factor", "shift_factor") if config.get(key) is not None}
        said |= {key: f"{value} (config.json)" for key, value in told.items()}
    return said


def _parts(opened: Opened) -> Iterator[FoundPart]:
    answer = opened.answer
    parts = answer.parts if isinstance(answer, Unknown) else answer.family.parts
    for part in parts:
        if opened.has(part):
            yield _part(part.name, part.title, opened.own(part.name))
    if isinstance(answer, Match) and not parts:
        yield _part(answer.family.name, answer.family.title, opened.moved.tensors)


def _count(opened: Opened, kind: Kind) -> int:
    """Numbers in the tensors of a kind's first network."""
    return sum(one.parameters for one in opened.own(kind.parts[0].name).values()) if kind.parts else 0


def _part(name: str, title: str, own: Mapping[str, Lazy]) -> FoundPart:
    dtypes = dict(Counter(tensor.stored for tensor in own.values()).most_common())
    return FoundPart(name, title, len(own), sum(tensor.parameters for tensor in own.values()), dtypes)


def _alternatives(opened: Opened) -> Iterator[Near]:
    """What was considered. To a model, the networks in it are none."""
    draws = isinstance(opened.answer, Match) and isinstance(opened.answer.family, Family)
    for near in opened.answer.near:
        if not draws or isinstance(FAMILIES[near.family], Family):
            yield near


def _missing(opened: Opened, kind: Kind) -> Iterator[MissingPart]:
    for part in kind.parts:
        if not opened.has(part):
            yield MissingPart(part.name, part.title, part.supplier, part.optional)


def _warnings(found: Found) -> Iterator[str]:
    """What one should know before using it."""
    if found.licence is not None:
        said = found.licence.value.lower()
        bound = next((text for name, (_, text) in LIMITS.items() if name.lower() == said), None)
        if bound is None and re.search(r"non-?commercial|-nc(?:-|$)", said):
            bound = "not for commercial use"
        if bound is not None:
            yield f"licence {found.licence.value}: {bound}"
    if found.prediction is not None and found.prediction.value == "unknown":
        yield f"what it predicts is unknown: load() takes {found.prediction.usual} unless prediction= says otherwise"
    if found.prediction is not None and CONTRADICTS in found.prediction.evidence:
        yield f"it contradicts itself: {found.prediction.evidence}"
    needed = [part.name for part in found.missing if not part.optional]
    if needed:
        yield f"it is not whole: {', '.join(needed)} must come from another file"
    if found.incomplete:
        lost = some(found.incomplete)
        yield f"it lacks {len(found.incomplete)} tensors that it should have: {lost}; load() refuses it"
    if found.extra:
        yield f"{len(found.extra)} tensors have no place in it: {some(found.extra)}; load() refuses it"
    if any(dtype.startswith(SMALL) for part in found.parts for dtype in part.dtypes):
        yield "some of its numbers are stored in 8 bits or fewer"
