"""Licences of weights: what a file says of itself, and what holds for everything that made a picture.

A picture is made by a stack of files: a checkpoint, perhaps another autoencoder, LoRAs, ControlNets. Whoever uses it
is bound by all of their licences, so that the strictest decides. What nobody said is *unknown*, which is stricter than
any condition that one could keep: unknown is not free.

Here "commercial" means using the weights, for instance selling pictures as they are ordered. What may be done with
pictures that exist is often another paragraph of the same licence. This is data, and no advice of a lawyer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sumuk.families.lineage import LIMITS, LINEAGE
from sumuk.weights.found import Told

if TYPE_CHECKING:
    from sumuk.weights.model import Model, WeightFile

Commercial = Literal["yes", "conditions", "unknown", "no"]
STRICTNESS: tuple[Commercial, ...] = ("yes", "conditions", "unknown", "no")
"""From the freest answer to the strictest."""
KEY = "modelspec.license"
"""Where a file's header says it."""
LONGEST = 120
"""Characters of a name that a file gives its licence; more is cut."""


@dataclass(frozen=True)
class Licence:
    """One licence.

    Attributes:
        name: SPDX's identifier, or the name that Sumuk uses; what the file says where it is no known one.
        commercial: whether the weights may be used commercially.
        means: that in words, a clause without a full stop.
        aliases: what else it is called in metadata and on model pages.
    """

    name: str
    commercial: Commercial
    means: str
    aliases: tuple[str, ...] = ()


GIVEN = "any use"
NAMED = "any use, as long as the authors are named and the licence goes with copies of the weights"
SHARED = "any use; who passes changed weights on does so under the same licence"
RAIL = (
    "any use but the harmful ones that it lists; whoever gets the weights, or a service with them, is told so"
)
NC = "not for commercial use"

LICENCES: tuple[Licence, ...] = (
    Licence("CC0-1.0", "yes", GIVEN, ("CC0", "cc0-1.0 universal", "public domain",
            "https://creativecommons.org/publicdomain/zero/1.0/")),
    Licence("Unlicense", "yes", GIVEN, ("the unlicense",)),
    Licence("MIT", "yes", NAMED, ("Expat", "https://opensource.org/licenses/MIT")),
    Licence("BSD-2-Clause", "yes", NAMED),
    Licence("BSD-3-Clause", "yes", NAMED),
    Licence("Apache-2.0", "yes", NAMED, ("Apache 2", "Apache License, Version 2.0",
            "https://www.apache.org/licenses/LICENSE-2.0")),
    Licence("CC-BY-4.0", "yes", NAMED, ("Creative Commons Attribution 4.0 International",
            "https://creativecommons.org/licenses/by/4.0/")),
    Licence("CC-BY-SA-4.0", "yes", SHARED, ("Creative Commons Attribution-ShareAlike 4.0 International",
            "https://creativecommons.org/licenses/by-sa/4.0/")),
    Licence("GPL-3.0", "yes", SHARED, ("GPL-3.0-only", "GPL-3.0-or-later", "GPLv3")),
    Licence("AGPL-3.0", "yes", SHARED, ("AGPL-3.0-only", "AGPL-3.0-or-later", "AGPLv3")),
    Licence("OpenRAIL", "yes", RAIL, ("bigscience-openrail-m", "BigScience OpenRAIL-M", "OpenRAIL-M")),
    Licence("CreativeML-OpenRAIL-M", "yes", RAIL, ("CreativeML Open RAIL-M", "CreativeML OpenRAIL")),
    Licence("CreativeML-OpenRAIL++-M", "yes", RAIL, ("openrail++", "CreativeML Open RAIL++-M", "OpenRAIL++-M")),
    Licence("FAIPL-1.0-SD", "conditions", "any use, but who changes the weights, or offers changed ones as a service, "
            "publishes the changes under the same licence",
            ("Fair AI Public License 1.0-SD", "fair-ai-public-license-1.0-sd",
             "https://freedevproject.org/faipl-1.0-sd/")),
    Licence("Playground-v2.5-Community", "conditions",
            "free for commercial use below a million users a month, else it takes a licence",
            ("playground-v2dot5-community", "Playground v2.5 Community License")),
    Licence("Stability-AI-Community", "conditions", LIMITS["Stability-AI-Community"][1],
            ("stabilityai-ai-community", "Stability AI Community License Agreement",
             "https://stability.ai/license", "https://stability.ai/community-license-agreement")),
    Licence("CC-BY-NC-4.0", "no", LIMITS["CC-BY-NC-4.0"][1],
            ("Creative Commons Attribution-NonCommercial 4.0 International",
             "https://creativecommons.org/licenses/by-nc/4.0/")),
    Licence("CC-BY-NC-SA-4.0", "no", NC, ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
            "https://creativecommons.org/licenses/by-nc-sa/4.0/")),
    Licence("CC-BY-NC-ND-4.0", "no", NC, ("Creative Commons Attribution-NonCommercial-NoDerivatives 4.0 International",
            "https://creativecommons.org/licenses/by-nc-nd/4.0/")),
    Licence("FLUX.1-dev-Non-Commercial", "no", LIMITS["FLUX.1-dev-Non-Commercial"][1],
            ("FLUX.1 [dev] Non-Commercial License", "flux-1-dev-non-commercial-license", "flux-dev-non-commercial",
             "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md")),
    Licence("Stability-AI-NC-Research", "no", LIMITS["Stability-AI-NC-Research"][1],
            ("Stability AI Non-Commercial Research Community License", "sai-nc-community",
             "stabilityai-nc-research-community", "SDXL 0.9 Research License")),
    Licence("stable-cascade-nc-community", "no", LIMITS["stable-cascade-nc-community"][1],
            ("Stable Cascade Non-Commercial Community License",)),
)  # fmt: skip
"""Those of the lineage, and what people put their own work under; from the freest to the strictest."""
UNKNOWN = Licence(
    "unknown", "unknown", "nobody said under which terms, which is not free: ask whoever made it"
)

_WORDS = re.compile(r"[a-z0-9]+|\++")
_EMPTY = {"the", "license", "licence", "agreement", "version", "http", "https", "www"}
_NONCOMMERCIAL = re.compile(
    r"\bno[nt]? ?(?:for )?commercial\b|\bnc\b|\b(?:research|personal)(?: use)? only\b"
)


def _words(text: str) -> list[str]:
    """A name without case, punctuation and words that every licence has; ``++`` is part of one."""
    plain = unicodedata.normalize("NFKC", text[:1000]).casefold()
    return [word for word in _WORDS.findall(plain) if word not in _EMPTY]


_KNOWN = {"".join(_words(name)): each for each in LICENCES for name in (each.name, *each.aliases)}
_PLACE = {each: place for place, each in enumerate(LICENCES)}


def licence_of(text: str | None) -> Licence:
    """The licence that a text names, as metadata, model pages and :attr:`Kind.licence` spell it.

    An unknown name that says "non-commercial" or the like is taken by its word; any other is unknown.
    """
    words = _words(text or "")
    if (known := _KNOWN.get("".join(words))) is not None:
        return known
    line = " ".join((text or "").split())
    name = "".join(each for each in line if each.isprintable())[
        :LONGEST
    ]  # it is shown, and comes from anywhere
    if _NONCOMMERCIAL.search(" ".join(words)):
        return Licence(name, "no", "by its name, not for commercial use")
    if not name or "".join(words) in ("unknown", "other", "none"):
        return UNKNOWN
    return Licence(
        name, "unknown", "not known here, which is not free: read it, or ask whoever made the file"
    )


def _strictness(licence: Licence) -> tuple[int, int]:
    return STRICTNESS.index(licence.commercial), _PLACE.get(licence, len(_PLACE))


def strictest(licences: Iterable[Licence]) -> Licence:
    """The one that binds most; the first of several, and unknown if there is none."""
    return max(licences, key=_strictness, default=UNKNOWN)


def warning(licence: Licence | str) -> str | None:
    """One sentence for whoever loads weights that forbid or bound commercial use; None for others."""
    known = licence_of(licence) if isinstance(licence, str) else licence
    return f"licence {known.name}: {known.means}" if known.commercial in ("no", "conditions") else None


@dataclass(frozen=True)
class Record:
    """One file's licence.

    Attributes:
        file: its name; empty for a model that came from none.
        licence: what binds whoever uses it.
        said: whether the file says so itself; else it is that of the published weights of its kind, or unknown.
    """

    file: str
    licence: Licence
    said: bool


@dataclass(frozen=True)
class Stack:
    """The licences of all files that make a picture."""

    records: tuple[Record, ...]

    @property
    def deciding(self) -> Record:
        """The file whose licence is the strictest."""
        return max(self.records, key=lambda record: _strictness(record.licence))

    @property
    def licence(self) -> Licence:
        """What holds for the picture's making."""
        return self.deciding.licence

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a picture's receipt."""
        return {
            "name": self.licence.name,
            "commercial": self.licence.commercial,
            "because": self.deciding.file,
            "stack": [
                {"file": record.file, "name": record.licence.name, "said": record.said}
                for record in self.records
            ],
        }


def stack(model: Model, *worn: WeightFile) -> Stack:
    """The licences of a model's own files, its refiner's, and those of what it wears."""
    records = [*_own(model), *(_own(model.refiner) if model.refiner is not None else ())]
    return Stack((*records, *map(_of_file, worn)))


def everything(model: Model) -> Stack:
    """The same for a model with all that was loaded beside it, worn or not."""
    beside = (model.loras, model.hypernets, model.embeddings)
    worn = [guest.file for some in beside for guest in some.values() if guest.file is not None]  # type: ignore[attr-defined]
    worn += [file for control in model.controls.values() for file in control.files]
    return stack(model, *worn)


def said_in(metadata: Mapping[str, str]) -> Told | None:
    """What a file's header says; None: nothing."""
    said = metadata.get(KEY)
    return Told(said, f"metadata {KEY}") if said else None


def _own(model: Model) -> Iterator[Record]:
    first, *others = map(_of_file, model.files) if model.files else [_of_family(model)]
    yield _at_least(first, model)
    yield from others


def _of_file(file: WeightFile) -> Record:
    told = file.licence
    if told is None:
        return Record(file.path.name, UNKNOWN, said=False)
    return Record(file.path.name, licence_of(told.value), told.sure)


def _of_family(model: Model) -> Record:
    told = said_in(model.metadata)
    return Record("", licence_of(told.value if told else model.family.licence), said=told is not None)


def _at_least(record: Record, model: Model) -> Record:
    """What is published under a licence is not freer in another's copy: names and sizes of its tensors tell it.

    Where several published models look alike, the freest of them counts, for the file may be that one.
    """
    titles = () if model.found is None else model.found.models
    alike = [licence_of(LINEAGE[name].licence) for name in LINEAGE if LINEAGE[name].title in titles]
    known = [licence for licence in alike if licence.commercial != "unknown"]
    floor = min(known, key=_strictness, default=None)
    if floor is None or _strictness(floor) <= _strictness(record.licence):
        return record
    return Record(record.file, floor, said=False)
