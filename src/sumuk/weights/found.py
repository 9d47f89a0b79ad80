"""The answer to "what is this file?", as plain values that become JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sumuk.families.detect import Near
from sumuk.families.family import Latent
from sumuk.files.hashes import Hashes, Progress, hashes


@dataclass(frozen=True)
class Told:
    """A value and how it is known.

    Attributes:
        value: the answer, or ``unknown``.
        evidence: where it comes from.
        sure: False where it is the family's default because the file says nothing, or where it says two things.
        usual: what is taken for it where the answer is unknown.
    """

    value: str
    evidence: str
    sure: bool = True
    usual: str | None = None


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
    """A network that is not there, which file would supply it, and whether the model is whole without it."""

    name: str
    title: str
    supplier: str
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer to "what is this file?".

    Attributes:
        path: the file or folder.
        family: name of the family, None if unknown.
        variant: which of its variants.
        title: in words.
        layout: how its tensors are named and put together.
        parts: networks that are there; of an adapter, which has none, all of it.
        missing: networks that are not.
        details: what else the header says that is this kind's own: an adapter's rank, what an autoencoder serves.
        models: models of the lineage whose files look like this; where there are several, tensors do not tell them
            apart.
        prediction: what the denoiser predicts, with evidence; ``unknown`` where the file does not say and both were
            published.
        zero_snr: whether its noise schedule is stretched to a terminal SNR of zero, with evidence.
        ema: number of averaged weights (``model_ema.*``) that lie beside the plain ones.
        latent: of the model; None if unknown.
        licence: of the weights, with evidence.
        resolution: pixels a side of its training images, with evidence.
        metadata: texts of the header.
        ignored: number of tensors that are known and of no use.
        extra: names that no rule explains, or that stand where others are expected; load() refuses them.
        incomplete: names that are not there though the rest calls for them. Not all can be told without building the
            network, which load() does.
        alternatives: other kinds that were considered, and why they are not the answer.
        warnings: what one should know before using it, in sentences.
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
    details: dict[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
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
    alternatives: tuple[Near, ...] = ()
    warnings: tuple[str, ...] = ()
    unknown: str | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Of all networks that are there."""
        return sum(part.parameters for part in self.parts)

    def as_dict(self, hashed: bool = False, progress: Progress | None = None) -> dict[str, Any]:
        """Everything as plain JSON values.

        Args:
            hashed: also ``hashes``, which is None otherwise, as it reads the files whole.
            progress: see :meth:`hashes`.
        """
        read = {file: asdict(one) for file, one in self.hashes(progress).items()} if hashed else None
        return asdict(self) | {"parameters": self.parameters, "hashes": read}

    def hashes(self, progress: Progress | None = None) -> dict[str, Hashes]:
        """SHA-256, AutoV2 and AutoV3 of each weight file; this reads them whole."""
        return {file: hashes(file, progress) for file in self.files}
