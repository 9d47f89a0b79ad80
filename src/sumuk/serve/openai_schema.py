"""What OpenAI's image calls take and answer, as the package ``openai`` 3.54 sends and reads it.

Every parameter of that client is known here. One that cannot be followed takes its harmless values alone, and anything
else is refused by name. Our own settings ride in ``sumuk`` (the client's ``extra_body``).

Source: the types of the package ``openai``; https://platform.openai.com/docs/api-reference/images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from sumuk.generate.request import Request, Text
from sumuk.serve.formats import Kind
from sumuk.serve.trouble import Refused, Trouble, refused
from sumuk.serve.wish import Strict, twin

MOST = 10
"""Pictures of one call."""
USUAL_QUALITY = 100
"""Of JPEG and WebP where no ``output_compression`` is said, as OpenAI has it."""
SAID_OTHERWISE = ("prompt", "width", "height", "count", "init", "mask", "preview")
"""Settings that OpenAI's own parameters say."""


def _size(value: str) -> str:
    sides = [int(side) for side in value.split("x")] if value != "auto" else []
    if any(side % 8 or not 8 <= side <= 8192 for side in sides):
        raise PydanticCustomError("size", "both sides are multiples of 8 from 8 to 8192, as in 512x768")
    return value


def _unfollowed(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("unfollowed", "this is not supported here; leave it out")
    return value


Size: TypeAlias = Annotated[
    str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"), AfterValidator(_size)
]
Unfollowed: TypeAlias = Annotated[None, BeforeValidator(_unfollowed)]
Sent: TypeAlias = Annotated[
    str | bytes, Field(description="A PNG, JPEG or WebP: a file of the form, or base64 in JSON.")
]
Label: TypeAlias = Annotated[Text, Field(max_length=512)]

if TYPE_CHECKING:
    Own = Strict
else:
    Own = twin(
        Request,
        "Settings",
        SAID_OTHERWISE,
        vae=(Text | None, None),
        refiner=(Text | None, None),
        controls=(dict[Text, Text], Field(default_factory=dict)),
    )


class Asked(Strict):
    """What all three calls have in common."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: Text | None = None
    n: int | None = Field(1, ge=1, le=MOST)
    size: Size | None = None
    """auto: the picture's own size, or the model's where there is no picture."""
    response_format: Literal["b64_json", "url"] | None = None
    user: Label | None = None
    """It goes into the log, and does nothing else; likewise ``safety_identifier``."""
    sumuk: Own = Field(default_factory=Own)  # type: ignore[valid-type]  # made from the request's fields


class Variation(Asked):
    """``POST /v1/images/variations``."""

    image: Sent | list[Sent]


class Generation(Asked):
    """``POST /v1/images/generations``."""

    prompt: Text
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    """The server's checks are those that it was started with."""
    output_compression: int | None = Field(None, ge=1, le=100)
    output_format: Kind | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    quality: Literal["auto", "standard"] | None = None
    """Older clients always send ``standard``, which meant the usual one. More steps are said in ``sumuk``."""
    safety_identifier: Label | None = None
    stream: bool | None = None
    style: Unfollowed = None
    complexity: Unfollowed = None
    frame_count: Unfollowed = None
    frame_duration_ms: Unfollowed = None
    svg: Unfollowed = None


class Edit(Generation):
    """``POST /v1/images/edits``."""

    image: Sent | list[Sent]
    mask: Sent | None = None
    input_fidelity: Unfollowed = None
    markup: Unfollowed = None


@dataclass(frozen=True)
class Wanted:
    """How the pictures are to be answered.

    Attributes:
        kind: their format.
        quality: of JPEG and WebP.
        urls: addresses of the pictures rather than the pictures.
        events: the first part of the events' names, if they are to be streamed.
        partial: how many previews.
        size: as it was said.
        label: whom the client does it for.
    """

    kind: Kind = "png"
    quality: int | None = None
    urls: bool = False
    events: str = ""
    partial: int = 0
    size: str = "auto"
    label: str = ""


def wanted(asked: Asked) -> Wanted:
    """How a call's pictures are to be answered.

    Raises:
        Refused: what is said of that would do nothing.
    """
    size, label, urls = asked.size or "auto", asked.user or "", asked.response_format == "url"
    if not isinstance(asked, Generation):
        return Wanted(urls=urls, size=size, label=label)
    kind, quality = asked.output_format or "png", asked.output_compression
    if kind == "png" and quality is not None:
        raise _useless(
            f"output_compression: {quality} does nothing for png; leave it out, or take jpeg or webp"
        )
    if asked.partial_images and not asked.stream:
        raise _useless(f"partial_images: {asked.partial_images} do nothing without stream; leave it out")
    if asked.partial_images and (asked.n or 1) > 1:
        raise _useless("partial_images: the events do not say of which picture; take n = 1, or leave it out")
    if asked.stream and urls:
        raise _useless("response_format: events hold the pictures themselves; leave url out")
    return Wanted(
        kind=kind,
        quality=USUAL_QUALITY if quality is None and kind != "png" else quality,
        urls=urls,
        events=("image_edit" if isinstance(asked, Edit) else "image_generation") if asked.stream else "",
        partial=asked.partial_images or 0,
        size=size,
        label=asked.safety_identifier or label,
    )


def _useless(detail: str) -> Refused:
    return refused("bad-value", detail)


class Datum(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None


class About(BaseModel):
    """What our own API calls it."""

    job: str
    seeds: list[int]


class Answer(BaseModel):
    """The pictures. There is no ``usage``, since nothing here is counted in tokens."""

    created: int
    background: Literal["opaque"] = "opaque"
    data: list[Datum]
    output_format: Kind
    size: str
    sumuk: About


class Model(BaseModel):
    """A model that draws; ``created`` is 0, since a file does not say when its model was made."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "sumuk"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Fault(BaseModel):
    """A problem as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str


CODES = {
    "no-token": "invalid_api_key",
    "too-many": "rate_limit_exceeded",
    "prompt-moderated": "content_policy_violation",
    "content-moderated": "content_policy_violation",
}
"""OpenAI's codes, where there is one; else our own."""
_NAMED = re.compile(r"([A-Za-z_][\w.]*): ")


def fault_of(trouble: Trouble) -> Fault:
    """A problem as OpenAI's clients read it; ``param`` is the name that the sentence begins with."""
    named = _NAMED.match(trouble.detail)
    kind = "server_error" if trouble.status >= 500 else "invalid_request_error"
    return Fault(
        message=trouble.detail,
        type="requests" if trouble.type == "too-many" else kind,
        param=named[1] if named else None,
        code=CODES.get(trouble.type, trouble.type.replace("-", "_")),
    )


def with_fault(trouble: Trouble) -> Trouble:
    """A problem whose document has the member ``error``, which OpenAI's clients read."""
    return replace(trouble, more={**trouble.more, "error": fault_of(trouble).model_dump()})


class ProblemWithFault(BaseModel):
    """What went wrong (RFC 9457), with the member that OpenAI's clients read."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    error: Fault


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema in one piece, for a body that is read by hand."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return whole(parts[value["$ref"].rpartition("/")[2]])
            return {key: whole(each) for key, each in value.items()}
        return [whole(each) for each in value] if isinstance(value, list) else value

    return whole(schema)
