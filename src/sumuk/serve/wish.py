"""A request as JSON has it: the fields of :class:`sumuk.Request`, with base64 text where a picture stands.

Made from the request's own fields, so that names, bounds and defaults are said once. JSON is read strictly: ``true`` is
no number, ``"512"`` is none either. What the fields must agree on is checked where the order is.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Container
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union, get_args, get_origin

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, create_model

from sumuk.generate.request import Hires, Hyper, Request, Steer, Text, Wear, places

Base64: TypeAlias = Annotated[
    str, Field(description="A PNG, JPEG or WebP in base64, or a data: URL of one; addresses are not fetched.")
]


class Strict(BaseModel):
    """A part of a body: nothing unknown is in it, and nothing is taken for what it is not."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _as_json(annotation: Any, twins: dict[Any, type[Strict]]) -> Any:
    """A field's type with text for pictures, lists for tuples, and the twins of nested values."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Image.Image or (origin is Annotated and args[0] is Image.Image):
        return Base64
    if origin is Annotated:
        return Annotated[(_as_json(args[0], twins), *args[1:])]
    if origin in (Union, types.UnionType):
        return Union[tuple(_as_json(each, twins) for each in args)]  # noqa: UP007  # made here
    if origin is tuple:
        some: Any = list[_as_json(args[0], twins)]  # type: ignore[misc]  # made here
        fixed = args[-1] is not Ellipsis
        return Annotated[some, Field(min_length=len(args), max_length=len(args))] if fixed else some
    return twins.get(annotation, Text if annotation is str else annotation)


def twin(kind: type[BaseModel], name: str, without: Container[str] = (), **more: Any) -> type[Strict]:
    """A model of the same fields that reads JSON.

    Args:
        kind: whose fields.
        name: of the model.
        without: fields that it has not.
        more: fields that it has besides, as pydantic's ``create_model`` takes them.
    """
    fields: dict[str, Any] = {}
    for field, about in kind.model_fields.items():
        if field in without:
            continue
        said = _as_json(about.annotation, _TWINS)
        if about.metadata and said is not Base64:
            said = Annotated[(said, *about.metadata)]
        usual = list(about.default) if isinstance(about.default, tuple) else about.default
        fields[field] = (said, ... if about.is_required() else usual)
    told = (kind.__doc__ or "").split("\n\n")[0]
    return create_model(name, __base__=Strict, __doc__=told, **fields, **more)


_TWINS: dict[Any, type[Strict]] = {}
_TWINS |= {kind: twin(kind, kind.__name__) for kind in (Hires, Steer, Wear, Hyper)}

if TYPE_CHECKING:
    Wish = Strict
else:
    Wish = twin(Request, "Request")


async def values_of(wish: Strict, read: Callable[[str, str], Awaitable[bytes]]) -> dict[str, Any]:
    """An order's values: what was said, and bytes where a picture stands.

    Args:
        wish: what was sent.
        read: makes bytes of a picture's text; told what to call it.
    """
    values = wish.model_dump(exclude_unset=True)
    for holder, key, called in places(values):
        holder[key] = await read(holder[key], called)
    return values
