"""One network out of another file: alone or among others, under any names by which its kind is known."""

from __future__ import annotations

from dataclasses import replace

from sumuk.base.errors import BadFile
from sumuk.families.detect import Match, Unknown, moved
from sumuk.families.family import Family, Part
from sumuk.weights import inspect
from sumuk.weights.inspect import Opened
from sumuk.weights.source import Source


def supply(family: Family, source: Source, part: Part) -> Opened:
    """A file as the supplier of a part.

    Args:
        family: of the model that it is for.
        source: the file.
        part: which network is wanted.

    Raises:
        BadFile: it has none; says what it is instead.
    """
    for arrangement in family.arrangements:
        if arrangement.name.startswith("bare"):
            # The part by itself: whatever else is named like it (two CLIP towers are) cannot be meant, and it may be
            # of another size than the published ones.
            alone = replace(arrangement, parts=((part, ""),))
            opened = Opened(source, Match(family, alone, moved(alone, source.tensors)))
            if opened.has(part) and not opened.moved.unknown and not opened.moved.halves:
                return opened
    opened = inspect.recognise(source)
    answer = opened.answer
    there = answer.family.parts if isinstance(answer, Match) else answer.parts
    if any(each.name == part.name and opened.has(each) for each in there):
        return opened
    if isinstance(answer, Match) and len(answer.arrangement.parts) == 1:
        # A tower by itself is called after its kind; names that only its kind knows (llama.cpp's) are read its way.
        own, prefix = answer.arrangement.parts[0]
        spelt = replace(part, original=own.original, aliases=own.aliases, diffusers=own.diffusers)
        alone = replace(answer.arrangement, parts=((spelt, prefix),))
        opened = Opened(source, Match(family, alone, moved(alone, source.tensors)))
        if own.key == part.key and opened.has(part):
            return opened
    why = f": {answer.why}" if isinstance(answer, Unknown) else f"; it is {answer.family.title}"
    raise BadFile(f"{source.path}: has no part {part.name!r} to supply{why}", "model.part")
