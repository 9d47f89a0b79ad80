"""The body of a call that may bring files: JSON, or a form whose names say where a value belongs.

OpenAI's clients write ``{"sumuk": {"steps": 4, "skip_layers": [7]}}`` as the form fields ``sumuk[steps]`` and
``sumuk[skip_layers][]``, and several files as ``image[]``. A list of objects has no such name that could be read back
(which of two ``sumuk[loras][][weight]`` belongs to whom?), so ``sumuk`` may also be one field of JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from sumuk.serve.body import check_json
from sumuk.serve.calls import desk_of
from sumuk.serve.trouble import Refused, refused

FILES, FIELDS = 16, 256
"""Parts of a form."""
_NAME = re.compile(r"([A-Za-z_]\w{0,60})((?:\[\w{0,60}\])*)")

M = TypeVar("M", bound=BaseModel)


async def body_of(request: Request, model: type[M]) -> M:
    """What was sent, whether in JSON or in a form; files are bytes.

    Raises:
        Refused: the body is of neither kind, or cannot be read.
        RequestValidationError: a value is not allowed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            values = await request.json()
        except (ValueError, RecursionError) as error:
            raise refused("bad-request", f"the body is no JSON: {error!s:.100}") from None
    elif kind == "multipart/form-data":
        most = desk_of(request).config.body_bytes  # the guard has seen that all of it together is less
        async with request.form(max_files=FILES, max_fields=FIELDS, max_part_size=most) as form:
            values = folded(
                [(k, await v.read() if isinstance(v, UploadFile) else v) for k, v in form.multi_items()]
            )
    else:
        raise refused("not-json", f"the body is {kind[:60]!r}; send application/json or multipart/form-data")
    try:
        # In a form everything is text, so that "4" is a number there, and only there.
        return model.model_validate(values, strict=kind == "application/json")
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


def folded(items: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Form fields as the object that their names describe.

    Raises:
        Refused: a name cannot be read, or two say the same.
    """
    values: dict[str, Any] = {}
    for name, value in items:
        found = _NAME.fullmatch(name)
        if found is None:
            raise refused("bad-value", f"the form field {name[:80]!r} cannot be read; write sumuk[steps]")
        if isinstance(value, str) and "\0" in value:  # JSON with it is refused too
            raise refused("bad-value", f"{found[1]}: the text holds the character NUL")
        *holders, last = [found[1], *re.findall(r"\[(\w*)\]", found[2])]
        if "" in holders:
            raise refused(
                "bad-value",
                f"{found[1]}: a list of objects cannot be said in form fields; send it as JSON text",
            )
        listed = last == ""
        if listed:
            last = holders.pop()
        target: Any = values
        for holder in holders:
            target = target.setdefault(holder, {})
            if not isinstance(target, dict):
                raise refused("bad-value", f"{found[1]}: it is said twice, in different ways")
        if listed and isinstance(target.setdefault(last, []), list):
            target[last].append(value)
        elif last in target:
            raise refused("bad-value", f"{found[1]}: {name[:80]!r} is said twice")
        else:
            target[last] = _object(value) if name == "sumuk" else value
    return values


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        return check_json(text.encode() if isinstance(text, str) else text)
    except Refused as error:
        raise refused("bad-value", f"sumuk: {error}") from None
