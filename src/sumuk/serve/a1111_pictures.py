"""What A1111 does to pictures before and after they are drawn on: other shapes, masks, holes, the part around a mask.

All of it is done here, on plain pictures that :func:`~sumuk.serve.pictures.clean` made, so that what is drawn on has
the right shape already; resizing alone is left to whoever draws. Nothing here needs a network or a device.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from PIL import Image, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo

from sumuk.base.errors import BadInput
from sumuk.generate.infotext import parse_infotext, write_infotext

Shape = Literal[0, 1, 2]
"""``resize_mode``. 0: as it is, whatever becomes of its proportions; 1: cropped; 2: filled up at its edges."""
Box = tuple[int, int, int, int]
INTO_MASK = 2
"""How far a blurred edge reaches, in radii."""
_HANDS = ThreadPoolExecutor(2, "sumuk-a1111")
T = TypeVar("T")


async def by_hand(work: Callable[[], T]) -> T:
    """Do something to pictures beside the event loop, no more than two at a time."""
    return await asyncio.get_running_loop().run_in_executor(_HANDS, work)


def opened(png: bytes) -> Image.Image:
    """A picture of ours, decoded."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        image.load()
        return image


def png_of(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """A picture as a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def flat(image: Image.Image) -> Image.Image:
    """RGB, transparent parts over white."""
    if "A" not in image.getbands():
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def shaped(image: Image.Image, width: int, height: int, mode: Shape) -> Image.Image:
    """A picture with the proportions of width x height: cropped around its middle, or its edges drawn out.

    The pixels keep their size; whoever draws resizes, in one go.
    """
    wide, high = image.size
    if mode == 0 or wide * height == high * width:
        return image
    if (wide * height > high * width) == (mode == 1):  # the width changes
        size = (max(1, round(high * width / height)), high)
    else:
        size = (wide, max(1, round(wide * height / width)))
    left, top = (size[0] - wide) // 2, (size[1] - high) // 2
    if mode == 1:
        return image.crop((-left, -top, size[0] - left, size[1] - top))
    made = Image.new(image.mode, size)
    for beside, edge in (
        ((0, 0, left, high), (0, 0, 1, high)),
        ((left + wide, 0, size[0], high), (wide - 1, 0, wide, high)),
        ((0, 0, wide, top), (0, 0, wide, 1)),
        ((0, top + high, wide, size[1]), (0, high - 1, wide, high)),
    ):
        room = (beside[2] - beside[0], beside[3] - beside[1])
        if min(room) > 0:
            made.paste(image.crop(edge).resize(room), beside)
    made.paste(image, (left, top))
    return made


def mask_of(image: Image.Image, invert: bool) -> Image.Image:
    """A mask in grey, white where it is drawn anew: of a transparent picture its opaque part, else how light it is."""
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    if alpha is not None and alpha.getextrema() != (255, 255):
        grey = alpha.point(lambda value: 255 if value > 128 else 0)
    else:
        grey = image.convert("L")
    return ImageOps.invert(grey) if invert else grey


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture of which the masked part gives way to the colours around it (``inpainting_fill`` 0).

    Halved again and again, what is not masked covers every hole; the larger sizes then say what is near.
    """
    kept = flat(image)
    seen = kept.convert("RGBA")
    seen.putalpha(ImageOps.invert(mask))
    sizes = [seen.convert("RGBa")]
    while max(sizes[-1].size) > 1:
        half = (max(1, sizes[-1].width // 2), max(1, sizes[-1].height // 2))
        sizes.append(sizes[-1].resize(half, Image.Resampling.BOX))
    ground = Image.new("RGBA", (1, 1), "grey")
    for each in reversed(sizes):
        near = each.convert("RGBA")
        near.putalpha(near.getchannel("A").point(lambda value: min(255, 4 * value)))
        ground = ground.resize(each.size, Image.Resampling.BILINEAR)
        ground.alpha_composite(near)
    return Image.composite(ground.convert("RGB"), kept, mask)


def part_around(mask: Image.Image, width: int, height: int, padding: int) -> Box:
    """The part of a picture that holds what is masked, with the proportions of width x height as far as there is room.

    Raises:
        BadInput: nothing is masked.
    """
    box = mask.getbbox()
    if box is None:
        raise BadInput("the mask is black everywhere, so that nothing would be drawn")
    left, right = max(0, box[0] - padding), min(mask.width, box[2] + padding)
    top, bottom = max(0, box[1] - padding), min(mask.height, box[3] + padding)
    wanted_wide = max(right - left, round((bottom - top) * width / height))
    wanted_high = max(bottom - top, round((right - left) * height / width))
    left, right = _widened(left, right, wanted_wide, mask.width)
    top, bottom = _widened(top, bottom, wanted_high, mask.height)
    return left, top, right, bottom


def _widened(low: int, high: int, wanted: int, most: int) -> tuple[int, int]:
    """A stretch made longer on both sides, and shifted back where it would leave 0..most."""
    wanted = min(wanted, most)
    low = min(max(0, low - (wanted - (high - low)) // 2), most - wanted)
    return low, low + wanted


@dataclass(frozen=True)
class Scene:
    """A picture to draw on.

    Attributes:
        init: what is drawn on, a PNG.
        mask: what of it, a PNG of the same size.
        back: makes the whole picture of a drawn one, where a part was cut out.
    """

    init: bytes
    mask: bytes | None = None
    back: Callable[[bytes], bytes] | None = None


def scene(
    init: bytes,
    mask: bytes | None,
    *,
    width: int | None,
    height: int | None,
    resize_mode: Shape,
    invert: bool,
    blur: int,
    fill: bool,
    only_masked: bool,
    padding: int,
) -> Scene:
    """Set up what ``img2img`` draws on.

    Raises:
        BadInput: there is no size to cut or fill for, or nothing is masked.
    """
    cut = only_masked and mask is not None
    if width is None or height is None:
        if cut:
            raise BadInput(
                "inpaint_full_res true needs width and height, the size at which the masked part is drawn; "
                "say them, or send false"
            )
        if resize_mode:
            raise BadInput(f"resize_mode {resize_mode} needs width and height; say them, or send 0")
        width, height = opened(init).size
    if mask is None:
        image = opened(init)
        made = shaped(image, width, height, resize_mode)
        return Scene(init if made is image else png_of(made))
    image = flat(opened(init))
    grey = mask_of(opened(mask), invert)
    if grey.size != image.size:
        grey = grey.resize(image.size)
    if cut:
        return _part(image, grey, width, height, blur, fill, padding)
    image, grey = (shaped(each, width, height, resize_mode) for each in (image, grey))
    return Scene(png_of(filled(image, grey) if fill else image), png_of(grey))


def _part(
    image: Image.Image, mask: Image.Image, width: int, height: int, blur: int, fill: bool, padding: int
) -> Scene:
    """The masked part alone, drawn at width x height and put back."""
    box = part_around(mask, width, height, padding + INTO_MASK * blur)
    part, grey = image.crop(box), mask.crop(box)
    soft = grey.filter(ImageFilter.GaussianBlur(blur)) if blur else grey

    def back(png: bytes) -> bytes:
        drawn = opened(png)
        said = drawn.info.get("parameters")
        small = drawn.convert("RGB").resize(part.size, Image.Resampling.LANCZOS)
        whole = image.copy()
        whole.paste(Image.composite(small, part, soft), box)
        more = {"Inpaint area": "Only masked", "Masked area padding": padding}
        return png_of(whole, _texts(said, more) if isinstance(said, str) else None)

    return Scene(png_of(filled(part, grey) if fill else part), png_of(grey), back)


def _texts(said: str, more: dict[str, Any]) -> PngInfo:
    """``parameters`` with further settings. (The receipt stays behind: it does not tell how to make the whole.)"""
    found = parse_infotext(said)
    info = PngInfo()
    info.add_itxt("parameters", write_infotext(found.prompt, found.negative, found.settings | more))
    return info


def enlarged(image: Image.Image, upscaler: str, width: int, height: int) -> Image.Image:
    """A picture resized to width x height by ``Lanczos`` or ``Nearest``."""
    how = Image.Resampling.LANCZOS if upscaler == "Lanczos" else Image.Resampling.NEAREST
    return image.resize((width, height), how)
