"""A request: what someone wants drawn, as one frozen value.

It comes from the command line, Python, HTTP or the page, and is written into every image that it made. Flags and
JSON schema derive from the fields below, so each has its default, bounds and help in one place.
"""

from __future__ import annotations

import hashlib
import io
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from sumuk.base.errors import BadFile, BadInput, MissingFile, SumukError, nearest

MOST_PIXELS = 4096 * 4096
"""Pixels of one picture, drawn or given."""
MOST_BYTES = 256 * 2**20
"""Of a picture's file."""
FORMATS = ("PNG", "JPEG", "WEBP")
PICTURES = ("init", "mask", "hint", "like")
"""Fields of a request that are pictures; each of ``steer`` has a ``hint`` besides."""
SEEDS = 2**64


def read_image(source: Any) -> Image.Image:
    """A picture from a path, bytes or PIL image, as it is meant to be seen: RGB, RGBA or L, 8 bits, turned upright.

    Raises:
        MissingFile, BadFile, BadInput: see :func:`open_image`; a picture without a defined white (mode F).
    """
    name, image = open_image(source)
    try:
        return _plain(image)
    except SumukError:
        raise
    except Exception as error:  # damaged EXIF or palettes: Pillow's errors there have no common base
        raise BadFile(f"{name} cannot be decoded: {error}", "image.damaged") from None


def open_image(source: Any, formats: tuple[str, ...] = FORMATS) -> tuple[str, Image.Image]:
    """A picture, decoded but otherwise as it is in its file, and what to call it in messages.

    The header is read first, and nothing is decoded that is too large or of another format.

    Raises:
        MissingFile: no such file.
        BadFile: not such a picture, damaged, or animated.
        BadInput: too many pixels, or no picture at all.
    """
    name, content = _content(source)
    allowed = ", ".join(formats[:-1]) + " or " * (len(formats) > 1) + formats[-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is lower
            image = content if isinstance(content, Image.Image) else Image.open(content, formats=formats)
        if image.width * image.height > MOST_PIXELS:
            raise BadInput(
                f"{name} has {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read"
            )
        if getattr(image, "is_animated", False) and image.format in ("PNG", "WEBP"):
            raise BadFile(f"{name} is animated; save the frame that you mean by itself", "image.animated")
        image.load()
    except SumukError:
        raise
    except UnidentifiedImageError:
        raise BadFile(f"{name} is no {allowed} picture", "image.format") from None
    except Exception as error:  # decoders of damaged files raise anything; the remedy is the same
        raise BadFile(f"{name} cannot be decoded: {error}", "image.damaged") from None
    return name, image


def _content(source: Any) -> tuple[str, Image.Image | io.BytesIO]:
    if isinstance(source, Image.Image):
        return "the picture", source
    if isinstance(source, bytes):
        name, size = f"the picture of {len(source):,} bytes", len(source)
    elif isinstance(source, (str, Path)):
        source = Path(source)
        if not source.is_file():
            raise MissingFile(f"no image at {source}")
        name, size = str(source), source.stat().st_size
    else:
        raise BadInput(f"an image is a path, bytes or a PIL image, not {type(source).__name__}")
    if size > MOST_BYTES:
        raise BadFile(f"{name} has {size:,} bytes; at most {MOST_BYTES:,} are read", "image.large")
    try:
        return name, io.BytesIO(source if isinstance(source, bytes) else source.read_bytes())
    except OSError as error:
        raise BadFile(f"{name} cannot be read: {error.strerror or error}", "image.unreadable") from None


def _plain(image: Image.Image) -> Image.Image:
    """A copy in RGB, RGBA or L, upright as its EXIF says, with nothing hidden beside the pixels."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise BadInput("a picture of floating-point numbers has no defined white; convert it to 8 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them to white
        deep = np.asarray(image, np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadInput("a picture of 32-bit numbers has no defined white; convert it to 8 bits")
        plain = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        plain = image.convert("RGBA")
    else:
        plain = image.convert("L" if image.mode in ("1", "L") else "RGB")
    plain = plain.copy() if plain is image else plain
    plain.info = {}
    return plain


def places(values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where pictures stand in a request's values: the dictionary, the key in it, and how to call the place."""
    for name in PICTURES:
        if values.get(name) is not None:
            yield cast("dict[str, Any]", values), name, name
    steer = values.get("steer")
    for number, each in enumerate(steer if isinstance(steer, list | tuple) else ()):
        if isinstance(each, Mapping) and each.get("hint") is not None:
            yield cast("dict[str, Any]", each), "hint", f"steer.{number}.hint"


def image_digest(image: Image.Image) -> str:
    """SHA-256 over mode, size and pixels: two files with the same picture have the same digest."""
    head = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def _describe(image: Image.Image) -> dict[str, Any]:
    return {"width": image.width, "height": image.height, "sha256": image_digest(image)}


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is no Unicode character, but half of one") from None
    return text


Picture = Annotated[Image.Image, BeforeValidator(read_image), PlainSerializer(_describe)]
Text = Annotated[str, AfterValidator(_unicode)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]
Side = Annotated[int, Field(ge=1, le=65_536)]
Offset = Annotated[int, Field(ge=0, le=65_536)]


class _Value(BaseModel):
    """A frozen value whose bad fields are told in one line, as :class:`BadInput`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            known = type(self).model_fields
            raise BadInput("; ".join(_sentence(each, known) for each in error.errors()[:3])) from None


V = TypeVar("V", bound="_Value")


def _ordered(window: V) -> V:
    """A value whose ``start`` lies before its ``end``."""
    start, end = window.start, window.end  # type: ignore[attr-defined]  # those that come here have them
    if start >= end:
        raise ValueError(f"start {start:g} is not before end {end:g}, so that it would never act")
    return window


class Hires(_Value):
    """A second pass at a larger size over the first one's result."""

    scale: Number = Field(default=2.0, gt=1.0, le=4.0)
    steps: int = Field(default=0, ge=0, le=1000)
    """Steps of the second pass before strength shortens them; 0: as many as the first."""
    strength: Number = Field(default=0.5, gt=0.0, le=1.0)


class Steer(_Value):
    """A ControlNet at work: which one, what it looks at, how much and when."""

    control: Text
    """The name under which the model was loaded with it."""
    hint: Picture
    """Edges, depth, pose, or whatever it was trained on, as a picture."""
    weight: Number = Field(default=1.0, gt=0.0, le=10.0)
    start: Number = Field(default=0.0, ge=0.0, lt=1.0)
    end: Number = Field(default=1.0, gt=0.0, le=1.0)
    """The share of the steps in which it steers."""
    guess: bool = False
    """Draw from the picture rather than from the words: deep findings count most, and what is drawn away from is left
    alone."""
    mode: int | None = Field(default=None, ge=0)
    """Kind of the picture by number, for networks that know several (FLUX.1 union)."""

    @model_validator(mode="after")
    def _agree(self) -> Steer:
        return _ordered(self)


class Wear(_Value):
    """A LoRA at work: which one, how much, where and when."""

    name: Text
    """The name under which the model was loaded with it."""
    weight: Number = Field(default=1.0, ge=-10.0, le=10.0)
    text_weight: Number | None = Field(default=None, ge=-10.0, le=10.0)
    """Of the text towers; None: as ``weight``. They read before the first step, so start and end do not concern them.
    """
    blocks: Text = ""
    """Rates of the denoiser's blocks: a preset (``MIDD``), numbers (``1,0,0.5,...``), or ``IN04:0.3,OUT*:0.5``."""
    start: Number = Field(default=0.0, ge=0.0, lt=1.0)
    end: Number = Field(default=1.0, gt=0.0, le=1.0)
    """The share of the steps in which it acts."""

    @model_validator(mode="after")
    def _agree(self) -> Wear:
        return _ordered(self)


class Hyper(_Value):
    """A hypernetwork at work."""

    name: Text
    weight: Number = Field(default=1.0, ge=-10.0, le=10.0)
    start: Number = Field(default=0.0, ge=0.0, lt=1.0)
    end: Number = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _agree(self) -> Hyper:
        return _ordered(self)


class Request(_Value):
    """What to draw. None means: the model's own default, which the receipt then states.

    Raises:
        BadInput: a value is out of range, unknown, or would do nothing; names it and what is allowed.
    """

    prompt: Text = ""
    negative: Text = ""
    width: Size | None = None
    height: Size | None = None
    steps: int | None = Field(default=None, ge=1, le=1000)
    solver: str | None = None
    """None: the one that the model family is usually drawn with."""
    grid: str | None = None
    """Step spacing; None: the one that the model family or the solver uses."""
    eta: Number | None = Field(default=None, ge=0.0, le=1.0)
    """Share of fresh noise for solvers that have it; None: the solver's own."""
    guidance: Number | None = Field(default=None, ge=0.0, le=100.0)
    """Classifier-free guidance scale; 1 asks the network once a step and knows no negative prompt."""
    rescale: Number = Field(default=0.0, ge=0.0, le=1.0)
    guidance_start: Number = Field(default=0.0, ge=0.0, le=1.0)
    guidance_end: Number = Field(default=1.0, ge=0.0, le=1.0)
    skip_layers: tuple[NonNegativeInt, ...] = ()
    """Layers to leave out in a third answer that is drawn away from (SD 3.5 medium: 7, 8, 9)."""
    skip_scale: Number = Field(default=2.5, gt=0.0, le=100.0)
    skip_start: Number = Field(default=0.01, ge=0.0, le=1.0)
    skip_end: Number = Field(default=0.2, ge=0.0, le=1.0)
    """How much, and in which share of the steps."""
    seed: int | None = Field(default=None, ge=0, lt=SEEDS)
    """Image i of a batch has seed + i; None draws one, which the receipt states."""
    variation_seed: int | None = Field(default=None, ge=0, lt=SEEDS)
    variation: Number = Field(default=0.0, ge=0.0, le=1.0)
    """How far to go from the seed's noise towards the variation seed's."""
    count: int = Field(default=1, ge=1, le=64)
    clip_skip: int = Field(default=1, ge=1, le=12)
    """1 takes the text tower's last layer, 2 the one before it."""
    label: int | None = Field(default=None, ge=0, lt=2**31)
    """Class number, for models that draw classes instead of prompts."""
    original: tuple[Side, Side] | None = None
    """Width and height that SDXL is told its training picture had; None: those of the picture."""
    crop: tuple[Offset, Offset] | None = None
    """Left and top that SDXL is told were cut away; None: nothing."""
    decoder_steps: int | None = Field(default=None, ge=1, le=1000)
    """Steps of the second stage, for models that have one (Stable Cascade)."""
    decoder_guidance: Number | None = Field(default=None, ge=1.0, le=100.0)
    """Its guidance scale; 1 is none."""
    refiner_start: Number | None = Field(default=None, ge=0.0, lt=1.0)
    """From which share of the noise's way the refiner draws, for models loaded with one; None: 0.8."""
    hint: Picture | None = None
    """The picture that a depth or control model follows (a depth map, edges)."""
    like: Picture | None = None
    """A picture whose content is imitated, as CLIP's image tower sees it (unCLIP, Stable Cascade)."""
    noise_level: int | None = Field(default=None, ge=0, lt=1000)
    """How much noise is laid on what the model is shown (x4 upscaler, unCLIP); None: the family's usual."""
    steer: tuple[Steer, ...] = ()
    """ControlNets at work, for models loaded with some."""
    loras: tuple[Wear, ...] = Field(default=(), max_length=64)
    """LoRAs at work beside those that the prompt names, for models loaded with some."""
    hypers: tuple[Hyper, ...] = Field(default=(), max_length=16)
    """Hypernetworks, likewise."""
    init: Picture | None = None
    strength: Number = Field(default=0.75, ge=0.0, le=1.0)
    """Image to image: the share of the way that is walked again. 0: none; what the model's encoder keeps of it."""
    mask: Picture | None = None
    """White is drawn anew, black is kept; of the size of ``init``."""
    mask_blur: int = Field(default=2, ge=0, le=256)
    hires: Hires | None = None
    quick: bool = False
    """Decode with the tiny decoder (TAESD) that the model was loaded with: many times faster, a little softer."""
    preview: int = Field(default=0, ge=0)
    """A preview every so many steps; 0: none."""

    @model_validator(mode="after")
    def _agree(self) -> Request:
        """What is wrong between fields; a setting that would do nothing is wrong too."""
        if self.mask is not None:
            self._check_mask(self.mask)
        elif self.mask_blur != Request.model_fields["mask_blur"].default:
            raise ValueError(f"mask_blur {self.mask_blur} does nothing without a mask; leave it out")
        if self.init is None and self.strength != Request.model_fields["strength"].default:
            raise ValueError(f"strength {self.strength:g} does nothing without an init image; leave it out")
        for name in ("skip_scale", "skip_start", "skip_end"):
            if not self.skip_layers and getattr(self, name) != Request.model_fields[name].default:
                raise ValueError(
                    f"{name} {getattr(self, name):g} does nothing without skip_layers; leave it out"
                )
        if self.guidance_start >= self.guidance_end:
            raise ValueError(
                f"guidance_start {self.guidance_start:g} is not before guidance_end {self.guidance_end:g}, "
                "so that no step would be guided"
            )
        if self.variation > 0 and self.variation_seed is None:
            raise ValueError("variation needs a variation_seed")
        if self.variation_seed is not None and "variation" not in self.model_fields_set:
            raise ValueError(
                f"variation_seed {self.variation_seed} does nothing without variation, how far to go (0 to 1)"
            )
        return self

    def _check_mask(self, mask: Image.Image) -> None:
        if self.init is None:
            raise ValueError("a mask needs an init image")
        if mask.size != self.init.size:
            raise ValueError(
                f"the mask is {mask.width} x {mask.height} but the init image "
                f"{self.init.width} x {self.init.height}; make them the same size"
            )
        if mask.mode == "RGBA" and mask.getchannel("A").getextrema() != (255, 255):
            raise ValueError("the mask has transparent parts; paint it white (drawn anew) and black (kept)")
        if mask.convert("L").getextrema() == (0, 0):
            raise ValueError("the mask is black everywhere, so that nothing would be drawn")


def make_request(**values: Any) -> Request:
    """A :class:`Request` from names and values, wherever they come from."""
    return Request(**values)


def _sentence(error: Any, known: Iterable[str]) -> str:
    """One of pydantic's errors in words."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown setting {name[:60]!r}{nearest(name, known)}"
    if error["type"] == "value_error":  # ours, which names the value already
        text = error["msg"].removeprefix("Value error, ")
        return f"{name}: {text}" if name else str(text)
    # reprlib: the value may be megabytes of bytes, or nested deeper than repr can go
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]} (got {reprlib.repr(error['input'])})"
