"""What a request wears: LoRAs and hypernetworks, named in its prompt or in its fields, and when they act.

``<lora:name:0.8>`` acts on text towers and denoiser alike; ``<lora:name:0.5:1>`` gives the towers another strength
than the denoiser, as do ``te=`` and ``unet=``; ``start=`` and ``end=`` are shares of the steps; ``lbw=`` rates the
blocks of the denoiser. ``<hypernet:name:0.6>`` is a hypernetwork. Source: AUTOMATIC1111 stable-diffusion-webui 1.10
("Extra networks") and the LoRA Block Weight extension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sumuk.base.errors import BadInput, nearest
from sumuk.generate.prompt import Prompt
from sumuk.generate.request import Hyper, Request, Wear
from sumuk.generate.tags import SORTS, Tag
from sumuk.nets.hypernet import with_hypernets
from sumuk.nets.patched import Thin, with_parameters, with_thin
from sumuk.weights.hypernet import Hypernet
from sumuk.weights.live import BlockRates, Worn, exchanged
from sumuk.weights.model import Model

TURNS = ("te", "unet")
"""What the weights of a LoRA's tag mean by their turn."""


@dataclass(frozen=True)
class Outfit:
    """What one row wears on one network: LoRAs, and hypernetworks with their strengths."""

    loras: tuple[Worn, ...] = ()
    hypers: tuple[tuple[Hypernet, float], ...] = ()

    @property
    def key(self) -> tuple[Worn, ...]:
        """Rows with equal keys can share a forward: what is only added may differ from row to row."""
        return tuple(each for each in self.loras if each.live.whole)


NOTHING = Outfit()


@dataclass(frozen=True)
class Wardrobe:
    """Everything that a request wears on one model."""

    model: Model
    loras: tuple[Wear, ...] = ()
    hypers: tuple[Hyper, ...] = ()

    def on_tower(self, model: Model, part: str) -> Outfit:
        """What a text tower wears, but a refiner's, which is another model's; it reads before the first step, so it
        knows no windows.
        """
        if model is not self.model:
            return NOTHING
        return Outfit(self._worn(part, ((wear, on_text(wear)) for wear in self.loras)))

    def on_network(self, part: str, step: int, steps: int) -> Outfit:
        """What a denoising network wears in step ``step`` of ``steps`` (from 0)."""
        now = [(wear, wear.weight) for wear in self.loras if acts(wear, step, steps)]
        hypers = [each for each in self.hypers if acts(each, step, steps)] if part == "denoiser" else []
        return Outfit(
            self._worn(part, now), tuple((self.model.hypernets[each.name], each.weight) for each in hypers)
        )

    def changes(self, wear: Wear, part: str) -> bool:
        """Whether a LoRA changes anything of a part, by its strengths and rates."""
        tower = part in {reading.part for reading in self.model.readings}
        return any(
            each.rate(patch)
            for each in self._worn(part, [(wear, on_text(wear) if tower else wear.weight)])
            for patch in each.live.lora.patches
            if patch.part == part
        )

    def _worn(self, part: str, some: Iterable[tuple[Wear, float]]) -> tuple[Worn, ...]:
        lives = self.model.loras
        return tuple(
            Worn(lives[wear.name], wear.name, strength, self._rates.get(wear.name))
            for wear, strength in some
            if strength and part in lives[wear.name].parts
        )

    @cached_property
    def _rates(self) -> dict[str, BlockRates]:
        return {wear.name: BlockRates.read(wear.blocks, self.model) for wear in self.loras if wear.blocks}


def on_text(wear: Wear) -> float:
    """Its strength on text towers."""
    return wear.weight if wear.text_weight is None else wear.text_weight


def acts(wear: Wear | Hyper, step: int, steps: int) -> bool:
    """Whether it is worn in a step (from 0)."""
    return wear.start <= step / steps and (step + 1) / steps <= wear.end


def wardrobe(request: Request, prompt: Prompt, negative: Prompt, model: Model) -> Wardrobe:
    """What a request wears, from its fields and the tags of its prompt.

    Raises:
        BadInput: a name that the model was not loaded with, one that stands twice, a kind of extra network that is not
            known, a weight without effect.
    """
    if negative.tags:
        tag = negative.tags[0]
        raise BadInput(
            f"<{tag.kind}:{tag.name}> in the negative prompt does nothing; it acts on the whole picture, so put it "
            "into the prompt"
        )
    loras, hypers = [*request.loras], [*request.hypers]
    for tag in prompt.tags:
        if tag.sort == "lora":
            loras.append(_lora(tag))
        elif tag.sort == "hypernet":
            hypers.append(_hyper(tag))
        else:
            hint = nearest(tag.kind, SORTS)
            raise BadInput(f"<{tag.kind}:{tag.name}> is no kind of extra network{hint}")
    _check(loras, model.loras, "LoRA")
    _check(hypers, model.hypernets, "hypernetwork")
    made = Wardrobe(model, tuple(loras), tuple(hypers))
    for each in made.loras:
        _check_effect(made, each)
    return made


def _check_effect(made: Wardrobe, wear: Wear) -> None:
    """Refuse what a LoRA is told and what then changes nothing."""
    live, towers = made.model.loras[wear.name], {reading.part for reading in made.model.readings}
    if wear.text_weight is not None and not towers & set(live.parts):
        raise BadInput(
            f"te {wear.text_weight:g} of the LoRA {wear.name!r} does nothing, as it changes no text tower; leave it out"
        )
    denoises = any(made.changes(wear, part) for part in live.parts if part not in towers)
    if not denoises and not any(made.changes(wear, part) for part in live.parts if part in towers):
        raise BadInput(
            f"the LoRA {wear.name!r} changes nothing with these strengths and blocks; leave it out"
        )
    if not denoises and (wear.start, wear.end) != (0.0, 1.0):
        raise BadInput(
            f"start and end of the LoRA {wear.name!r} do nothing, as it changes text towers alone, which read once"
        )


def _lora(tag: Tag) -> Wear:
    values: dict[str, float] = {}
    for turn, (key, value) in enumerate(tag.weights):
        name = key or (TURNS[turn] if turn < len(TURNS) else "dyn")
        if name not in (*TURNS, "start", "end"):
            raise BadInput(
                f"<{tag.kind}:{tag.name}>: {name} {value:g} is not understood; there are te, unet, start, end and lbw"
            )
        if name in values:
            raise BadInput(f"<{tag.kind}:{tag.name}> says {name} twice")
        values[name] = value
    text = values.get("te", 1.0)
    unet = values.get("unet", text)
    window = {key: values[key] for key in ("start", "end") if key in values}
    return Wear(
        name=tag.name, weight=unet, text_weight=None if text == unet else text, blocks=tag.blocks, **window
    )


def _hyper(tag: Tag) -> Hyper:
    if len(tag.weights) > 1 or tag.blocks or any(key for key, _ in tag.weights):
        raise BadInput(f"<hypernet:{tag.name}> takes one number, its strength: <hypernet:{tag.name}:0.8>")
    return Hyper(name=tag.name, weight=tag.weights[0][1] if tag.weights else 1.0)


def _check(some: Sequence[Wear | Hyper], known: dict[str, Any], title: str) -> None:
    names = [each.name for each in some]
    for each in some:
        if each.name not in known:
            raise BadInput(f"the model was loaded without a {title} {each.name!r}{nearest(each.name, known)}")
        if names.count(each.name) > 1:
            raise BadInput(f"the {title} {each.name!r} is named {names.count(each.name)} times; name it once")
        text = getattr(each, "text_weight", None)
        if each.weight == 0.0 and not text:
            raise BadInput(f"the {title} {each.name!r} at strength 0 does nothing; leave it out")


@contextmanager
def dressed(part: str, network: Any, rows: Sequence[Outfit]) -> Iterator[None]:
    """A network with what each row of its batch wears, until the block ends.

    Args:
        part: which of the model's networks it is.
        network: itself.
        rows: of the batch, with equal keys.
    """
    with ExitStack() as stack:
        if additions := _additions(part, [row.loras for row in rows]):
            stack.enter_context(with_thin(network, additions))
        if whole := [each for each in rows[0].loras if part in each.live.whole]:
            stack.enter_context(with_parameters(network, exchanged(network, part, whole)))
        if hypers := _strengths([dict(row.hypers) for row in rows]):
            some = [(each.network, strengths) for each, strengths in hypers.items()]
            stack.enter_context(with_hypernets(network, some))
        yield


def _additions(part: str, rows: Sequence[tuple[Worn, ...]]) -> list[tuple[Thin, list[float]]]:
    """What is added to layers, with the strength for each row."""
    lives = {each.live: each.live.thin.get(part, ()) for row in rows for each in row}
    return [
        (thin, [sum(each.rate(patch) for each in row if each.live is live) for row in rows])
        for live, some in lives.items()
        for thin, patch in some
    ]


def _strengths(rows: Sequence[dict[Hypernet, float]]) -> dict[Hypernet, list[float]]:
    """For each hypernetwork the strength in each row, 0 where it is not worn."""
    every = dict.fromkeys(each for row in rows for each in row)
    return {each: [row.get(each, 0.0) for row in rows] for each in every}
