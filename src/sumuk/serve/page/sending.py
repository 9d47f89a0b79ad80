"""From a picture to the fields of Create: all that made it, the picture itself, or what a dropped file says of it."""

from __future__ import annotations

import asyncio

from sumuk.base.errors import MissingFile
from sumuk.serve.calls import unpacked
from sumuk.serve.dropped import dropped
from sumuk.serve.order import Caller
from sumuk.serve.page import markup
from sumuk.serve.page.context import Page
from sumuk.serve.page.form import BLANK, Form, form_of, model_named
from sumuk.serve.pictures import clean

SENDS = ("send-all", "send-init", "send-mask")


async def sent(page: Page, caller: Caller, act: str, id: str, image: int, form: Form) -> tuple[Form, str]:
    """The fields after a picture was sent to them, and what is to be said.

    Args:
        page: with the desk.
        caller: whose picture.
        act: ``send-all``: everything that made it; ``send-init``: it becomes the start picture of what stands there;
            ``send-mask``: both, to repaint a part.
        id: of the job.
        image: which of its pictures.
        form: the fields as they stand.

    Raises:
        Refused: there is no such picture any more.
    """
    job = page.desk.job(id, caller)
    result = next((each for each in job.results if each.image == image), None)
    if result is None:
        raise MissingFile(f"job {id[:40]} has no picture {image}")
    left: dict[str, str] = {}
    if act != "send-init":
        order = job.order
        form, left = await form_of(order.values, page.kept, caller.owner, order.controls)
        form |= {"model": order.model or "", "vae": order.vae or "", "seed": str(result.seed), "count": 1}
        if order.refiner:
            left["refiner"] = f"{order.refiner}: the page has no field for it"
    if act != "send-all":
        png = await asyncio.to_thread(page.desk.result_file(id, image, caller).read_bytes)
        plain = await clean(png, "the picture", page.desk.config.picture_pixels)
        left.pop("init", None)
        left.pop("mask", None)
        form = form | {"start": {"picture": await page.kept.put(caller.owner, plain), "mask": None}}
    words = page.words
    return form, markup.said(words("sent")) + (markup.bullets(words("left"), left) if left else "")


async def replayed(page: Page, caller: Caller, data: str, form: Form) -> tuple[Form, str]:
    """The fields as a dropped PNG has them, and what is to be said.

    Raises:
        Refused, BadFile: it is none, or says nothing of itself.
    """
    found = await asyncio.to_thread(dropped, unpacked(data, "the file"))
    form, lost = await form_of(found["request"], page.kept, caller.owner)
    left = found["left_out"] | lost
    said = found["model"]
    model = model_named(said, await page.desk.catalogue())
    if model is None:
        name = said.get("file") or said.get("title") or said.get("sha256")
        if name:
            left["model"] = f"{name} is not offered here"
    form["model"] = model or ""
    words = page.words
    taken = [name for name, value in form.items() if value != BLANK[name]]
    sentence = words("taken", names=", ".join(taken)) if taken else words("nothing-taken")
    return form, markup.said(sentence) + (markup.bullets(words("left"), left) if left else "")
