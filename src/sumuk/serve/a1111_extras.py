"""A1111's calls for finished pictures: enlarging (without a network: Lanczos, nearest) and reading what a PNG says."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image

from sumuk.base.errors import BadInput
from sumuk.generate.infotext import parse_infotext
from sumuk.serve.a1111_names import UPSCALERS
from sumuk.serve.a1111_pictures import by_hand, enlarged, opened, png_of
from sumuk.serve.a1111_schema import Enlarging, OfPicture, OnePicture, SomePictures, body_of
from sumuk.serve.calls import desk_of, picture_of, unpacked
from sumuk.serve.dropped import png_texts
from sumuk.serve.trouble import refused

router = APIRouter(tags=["a1111"])


@router.post("/sdapi/v1/extra-single-image", openapi_extra=body_of(OnePicture))
async def extra_single_image(request: Request, body: dict[str, Any]) -> dict[str, str]:
    """Enlarge a picture."""
    sent = OnePicture.read(body)
    (image,) = await _all_enlarged(request, sent, [(sent.image, "image")])
    return {"image": image, "html_info": ""}


@router.post("/sdapi/v1/extra-batch-images", openapi_extra=body_of(SomePictures))
async def extra_batch_images(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """Enlarge some pictures."""
    sent = SomePictures.read(body)
    some = [(each.get("data", ""), f"imageList.{place}.data") for place, each in enumerate(sent.imageList)]
    return {"images": await _all_enlarged(request, sent, some), "html_info": ""}


@router.post("/sdapi/v1/png-info", openapi_extra=body_of(OfPicture))
async def png_info(body: dict[str, Any]) -> dict[str, Any]:
    """What a PNG says of itself: A1111's ``parameters`` as text and taken apart, and the receipt beside them."""
    sent = OfPicture.read(body)
    items = await by_hand(lambda: _texts(sent.image))
    text = items.pop("parameters", "")
    said = parse_infotext(text)
    parameters = {"Prompt": said.prompt, "Negative prompt": said.negative, **said.settings} if text else {}
    width, cross, height = parameters.get("Size", "").partition("x")
    if cross:
        del parameters["Size"]
        parameters |= {"Size-1": width, "Size-2": height}
    return {"info": text, "items": items, "parameters": parameters}


def _texts(picture: str) -> dict[str, str]:
    return png_texts(unpacked(picture, "image"))


@router.post("/sdapi/v1/interrogate")
async def interrogate() -> None:
    """Not here."""
    raise refused(
        "not-here", "nothing here describes pictures in words; interrogate needs a captioning model"
    )


async def _all_enlarged(request: Request, sent: Enlarging, some: list[tuple[str, str]]) -> list[str]:
    """Pictures in base64, each with what it is called."""
    for name in ("upscaler_1", "upscaler_2"):
        if getattr(sent, name) not in UPSCALERS:
            raise BadInput(f"{name} {getattr(sent, name)[:60]!r} is not here; known: {', '.join(UPSCALERS)}")
    left = desk_of(request).config.picture_pixels
    made = []
    for text, what in some:
        png = await picture_of(request, text, what)
        image, pixels = await by_hand(partial(_enlarged, png, sent, left, what))
        left -= pixels
        made.append(image)
    return made


def _enlarged(png: bytes, sent: Enlarging, most: int, what: str) -> tuple[str, int]:
    """A picture in base64, and how many pixels it has."""
    image = opened(png)
    if sent.upscaler_1 != "None":  # which there leaves the picture as it is, whatever else is said
        first = _by(sent.upscaler_1, image, sent, most, what)
        blend = sent.extras_upscaler_2_visibility
        if blend > 0 and sent.upscaler_2 != "None":
            first = Image.blend(first, _by(sent.upscaler_2, image, sent, most, what), blend)
        image, png = first, png_of(first)
    return base64.b64encode(png).decode(), image.width * image.height


def _by(upscaler: str, image: Image.Image, sent: Enlarging, most: int, what: str) -> Image.Image:
    """A picture enlarged: by a factor, or so far that it covers a size, of which the rest may be cut away."""
    wanted = (sent.upscaling_resize_w, sent.upscaling_resize_h)
    scale = sent.upscaling_resize
    if sent.resize_mode == 1:
        scale = max(wanted[0] / image.width, wanted[1] / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if width * height > most:
        raise BadInput(
            f"{what} would have {width} x {height} pixels, more than the {most:,} that are left for this call; "
            "lower upscaling_resize, or send fewer pictures"
        )
    made = enlarged(image, upscaler, width, height)
    if sent.resize_mode == 1 and sent.upscaling_crop:
        left, top = (width - wanted[0]) // 2, (height - wanted[1]) // 2
        made = made.crop((left, top, left + wanted[0], top + wanted[1]))
    return made
