"""What there is to write of a model or of a checkpoint: tensors by native names, words, and what tensors do not say.

A :class:`~sumuk.weights.model.Model` and a recognised checkpoint become the same value, so that saving and converting
are one thing. Of a checkpoint only the header is read; its networks are built without numbers, which checks every name
and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sumuk.base.errors import BadFile, BadInput
from sumuk.diffusion.schedule import ContinuousVP, Schedule, VarianceExploding
from sumuk.families.detect import Match, Unknown
from sumuk.families.family import FAMILIES, Facts, Family, Kind
from sumuk.files.layout import some
from sumuk.files.quantised import METADATA
from sumuk.files.tensors import Lazy, Tensors, dtype_name, lazy
from sumuk.nets.packed import packed_weights, shapes, value
from sumuk.weights import vocabulary
from sumuk.weights.building import build, check_config
from sumuk.weights.inspect import ARCHITECTURES, Opened
from sumuk.weights.model import Model, Words

MODELSPEC = "1.0.1"
PREDICTION = {"eps": "epsilon", "v": "v", "clean": "sample", "flow": "flow"}
"""Names in the table of predictions -> what ``modelspec.prediction_type`` calls them."""

DIGEST = "modelspec.hash_sha256"
STALE = (DIGEST, "sshs_model_hash", "sshs_legacy_hash", METADATA)
"""Metadata that tell of the tensors' bytes, and are untrue as soon as one changes."""

LATENT = {"scaling_factor": "sumuk.latent_scale", "shift_factor": "sumuk.latent_shift"}
"""What an autoencoder's ``config.json`` and a file's metadata call scale and shift of its latents."""

COMPVIS = "https://github.com/CompVis/stable-diffusion"
IMPLEMENTATIONS = {
    "sd1": COMPVIS,
    "sd2": "https://github.com/Stability-AI/stablediffusion",
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sd3": "https://github.com/Stability-AI/sd3-ref",
    "flux": "https://github.com/black-forest-labs/flux",
    "cascade": "https://github.com/Stability-AI/StableCascade",
    "dit": "https://github.com/facebookresearch/DiT",
    "ddpm": "https://github.com/hojonathanho/diffusion",
}
"""Whose tensor names a family's single files have (``modelspec.implementation``)."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What there is to write.

    Attributes:
        kind: what it is.
        tensors: by native name, the part in front (``vae.decoder.conv_in.weight``).
        words: the vocabulary of each text tower of which it is to be written.
        usual: towers whose vocabulary everybody has, so that a single file need not bring it.
        facts: what a model's metadata and configuration say; None for what draws nothing by itself.
        schedule: a model's noise.
        metadata: texts to keep.
        guessed: facts that the file does not say and that are the family's usual: ``prediction``, ``size``.
        config: what a network's ``config.json`` says beside its shape.
    """

    kind: Kind
    tensors: Tensors
    words: Mapping[str, Words] = field(default_factory=dict)
    usual: frozenset[str] = frozenset()
    facts: Facts | None = None
    schedule: Schedule | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    guessed: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def present(self) -> tuple[str, ...]:
        """The parts that are there."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.tensors))


def of_model(model: Model) -> Contents:
    """A loaded model."""
    tensors: Tensors = {}
    for part, network in model.networks.items():
        packed = packed_weights(network)
        for name, shape in shapes(network).items():
            if name in packed:  # expanded one at a time, when it is written
                kind = dtype_name(packed[name].dtype)
                tensors[f"{part}.{name}"] = Lazy(shape, kind, partial(value, network, name))
            else:
                tensors[f"{part}.{name}"] = lazy(value(network, name))
    readings = model.readings
    return Contents(
        kind=model.family,
        tensors=tensors,
        words={reading.part: model.words[reading.part] for reading in readings},
        usual=frozenset(
            reading.part
            for reading in readings
            if vocabulary.is_usual(model.words[reading.part], reading, model.networks[reading.part].shape)
        ),
        facts=model.facts,
        schedule=model.schedule,
        metadata={key: text for key, text in model.metadata.items() if not key.startswith(vocabulary.META)},
    )


def of_opened(opened: Opened, folder: bool) -> Contents:
    """A recognised checkpoint, of which everything has a place.

    Args:
        opened: the checkpoint.
        folder: whether it becomes a diffusers folder, which brings the words of each tower.

    Raises:
        BadFile: tensors are missing, unknown, or of a wrong shape; its configuration asks for other arithmetic.
        MissingFile: words that are needed lie nowhere within reach.
    """
    kind, where = whole(opened).family, opened.source.path
    if not kind.parts:
        raise BadInput(f"{where}: is {kind.title}, which holds no network: its layout cannot be changed here")
    if unknown := opened.moved.unknown:
        raise BadFile(
            f"{where}: holds {len(unknown)} tensors that {kind.title} does not know: {some(unknown)}; "
            "remove them first: prune(..., drop=NAMES)",
            "model.unknown_tensors",
        )
    opened.moved.refuse_leftovers(str(where))
    networks: dict[str, Any] = {}
    for part in kind.parts:
        if own := opened.own(part.name):
            networks[part.name] = build(part, own, opened)
            check_config(part, own, opened)
    bare = known(opened)
    tensors = dict(opened.moved.tensors)
    if not isinstance(kind, Family):
        return replace(bare, tensors=tensors)
    words: dict[str, Words] = {}
    usual = set()
    for reading in kind.readings:
        shape = networks[reading.part].shape if reading.part in networks else None
        if shape is None or not (folder or where.is_dir()):
            continue  # a single file's words stay in its metadata
        if not folder and reading.words == "t5" and shape.vocabulary == vocabulary.T5_ROWS:
            continue  # those that everybody has, wherever they lie
        words[reading.part] = vocabulary.read(opened, reading, shape)
        if vocabulary.is_usual(words[reading.part], reading, shape):
            usual.add(reading.part)
    said = {vocabulary.meta(part) for part in words}
    kept = {key: text for key, text in bare.metadata.items() if key not in said}
    return replace(bare, tensors=tensors, words=words, usual=frozenset(usual), metadata=kept)


def known(opened: Opened) -> Contents:
    """What a recognised checkpoint is and says, without its tensors and words."""
    kind, metadata = whole(opened).family, opened.source.metadata
    if not isinstance(kind, Family):
        return Contents(kind=kind, tensors={}, metadata=metadata, config=latent_config(opened))
    prediction = opened.prediction()
    guessed = {"prediction"} if not prediction.sure and kind.prediction != "flow" else set()
    if not opened.resolution().sure:
        guessed.add("size")
    facts = Facts(
        prediction=prediction.value,
        zero_snr=opened.zero_snr().value == "yes",
        latent=opened.latent(),
        size=opened.size(),
    )
    return Contents(
        kind=kind,
        tensors={},
        facts=facts,
        schedule=opened.schedule(),
        metadata=metadata,
        guessed=frozenset(guessed),
    )


def latent_config(opened: Opened) -> dict[str, float]:
    """Scale and shift of a stand-alone autoencoder's latents, as far as anything says them."""
    source = opened.source
    config, found = source.config("config.json"), {}
    model = _of_architecture(source.metadata.get("modelspec.architecture", ""))
    for key, meta in LATENT.items():
        said = config.get(key)
        if said is None:
            said = source.metadata.get(meta)
        if said is None and model is not None:
            said = model.latent.scale if key == "scaling_factor" else model.latent.shift or None
        if said is not None:
            try:
                found[key] = float(said)
            except (TypeError, ValueError):
                raise BadFile(f"{source.path}: {key} is {said!r:.60}, not a number", "meta.number") from None
    return found


def _of_architecture(name: str) -> Family | None:
    """The family whose autoencoder ``modelspec.architecture`` names: ``stable-diffusion-xl-v1-base/vae``."""
    if not name.endswith("/vae"):
        return None
    kinds = (FAMILIES[key] for key in FAMILIES)
    wanted = name.removesuffix("/vae")
    return next((kind for kind in kinds if isinstance(kind, Family) and kind.architecture == wanted), None)


def texts(contents: Contents, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file: what it had, what the caller adds, and what it is.

    Raises:
        BadInput: what the caller adds contradicts what it is.
    """
    kind, facts = contents.kind, contents.facts
    said = {"format": "pt"}
    usual = {"modelspec.sai_model_spec": MODELSPEC, "modelspec.architecture": kind.architecture}
    anew: tuple[str, ...] = STALE
    if facts is None:
        said |= {LATENT[key]: repr(value) for key, value in contents.config.items()}
        kept = {key: text for key, text in contents.metadata.items() if not key.startswith(anew)}
        return usual | kept | dict(metadata) | said
    anew += ("sumuk.latent_", "sumuk.schedule")  # said below as it is now
    kept = {key: text for key, text in contents.metadata.items() if not key.startswith(anew)}
    said |= usual | _told(contents, facts)
    if "prediction" in contents.guessed and kind.architecture in ARCHITECTURES:
        del said["modelspec.architecture"]  # which would say what nobody knows
    for key, text in metadata.items():
        if said.get(key, text) != text:
            raise BadInput(f"metadata {key} {text!r:.60} contradicts the model, which has {said[key]!r:.60}")
    usual = {
        "modelspec.title": kind.title,
        "modelspec.implementation": IMPLEMENTATIONS.get(kind.name, COMPVIS),
    }
    if "size" not in contents.guessed:
        usual["modelspec.resolution"] = f"{facts.size}x{facts.size}"
    return usual | kept | dict(metadata) | said


def _told(contents: Contents, facts: Facts) -> dict[str, str]:
    """What a model's tensors do not say."""
    kind, schedule = contents.kind, contents.schedule
    assert isinstance(kind, Family)  # it has facts
    said = {}
    if "prediction" not in contents.guessed:
        said["modelspec.prediction_type"] = PREDICTION[facts.prediction]
    if isinstance(schedule, VarianceExploding):
        said["sumuk.schedule"] = f"ve {schedule.first!r} {schedule.last!r}"
    if isinstance(schedule, ContinuousVP):
        said["sumuk.schedule"] = f"vp {schedule.start!r} {schedule.end!r}"
    return said | latent_texts(kind, facts)


def latent_texts(family: Family, facts: Facts) -> dict[str, str]:
    """Scale and shift of the latents, where they are not the family's."""
    said = {}
    if facts.latent.scale != family.latent.scale:
        said[LATENT["scaling_factor"]] = repr(facts.latent.scale)
    if facts.latent.shift != family.latent.shift:
        said[LATENT["shift_factor"]] = repr(facts.latent.shift)
    return said


def whole(opened: Opened) -> Match:
    """The answer for a checkpoint that was recognised.

    Raises:
        BadFile: it was not.
    """
    if isinstance(opened.answer, Unknown):
        raise BadFile(f"{opened.source.path}: unknown model: {opened.answer.why}", "model.unknown")
    return opened.answer
