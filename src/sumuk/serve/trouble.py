"""What went wrong, as every API tells it: problem details (RFC 9457), ``application/problem+json``.

``type`` is a short stable name, ``detail`` the sentence that names the offending value and the remedy. A mistake of the
caller's is 4xx; 503 and 504 are the server's state; anything else is a bug of ours and is told without its insides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sumuk.base.errors import BadFile, BadInput, Cancelled, MissingExtra, MissingFile, OutOfMemory, SumukError

MEDIA = "application/problem+json"
TITLES = {
    "bad-request": (400, "The request cannot be read"),
    "bad-value": (400, "A value is not allowed"),
    "bad-picture": (400, "A picture cannot be used"),
    "prompt-moderated": (400, "The prompt was refused by a safety check"),
    "content-moderated": (400, "The picture was withheld by a safety check"),
    "no-token": (401, "A token is needed"),
    "foreign-origin": (403, "The request comes from another site"),
    "not-found": (404, "There is no such thing"),
    "not-allowed": (405, "This address does not take that method"),
    "slow": (408, "The request did not arrive in time"),
    "conflict": (409, "It is not possible in this state"),
    "gone": (410, "It is no longer kept"),
    "no-length": (411, "The length must be said"),
    "too-large": (413, "The request is too large"),
    "not-json": (415, "The body is of another kind"),
    "foreign-host": (421, "The request is meant for another host"),
    "other-body": (422, "The idempotency key belongs to another request"),
    "bad-model": (422, "A model file cannot be used"),
    "too-many": (429, "Too much at once"),
    "cancelled": (499, "It was cancelled"),
    "internal": (500, "A fault of the server"),
    "not-here": (501, "It is not installed here"),
    "out-of-memory": (503, "There is not enough memory"),
    "unready": (503, "The server is not ready"),
    "worker-lost": (503, "What drew it was lost"),
    "deadline": (504, "It was not finished in time"),
}


@dataclass(frozen=True)
class Trouble:
    """One problem.

    Attributes:
        type: a name of :data:`TITLES`.
        detail: what is wrong with what, and what to do.
        retry_after: seconds after which another try makes sense.
        more: further members of the document, such as ``position``.
    """

    type: str
    detail: str
    retry_after: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """Of HTTP."""
        return TITLES[self.type][0]

    @property
    def title(self) -> str:
        """In general words."""
        return TITLES[self.type][1]

    def as_problem(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "type": f"urn:sumuk:{self.type}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.more,
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it, for storing; ``Trouble(**that)`` is the way back."""
        return asdict(self)


class Refused(SumukError):
    """An order or a call that is not taken; carries the :class:`Trouble` that says why."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.detail)
        self.trouble = trouble


def refused(type: str, detail: str, *, retry_after: float | None = None, **more: Any) -> Refused:
    """A :class:`Refused` in one line."""
    return Refused(Trouble(type, detail, retry_after, more))


def trouble_of(error: BaseException) -> Trouble:
    """What any error is told as. The words of errors that are not ours stay in the log."""
    if isinstance(error, Refused):
        return error.trouble
    if isinstance(error, Cancelled):
        return Trouble("cancelled", str(error))
    if isinstance(error, OutOfMemory):
        return Trouble("out-of-memory", str(error))
    if isinstance(error, MissingExtra):
        return Trouble("not-here", str(error))
    if isinstance(error, BadFile):
        return Trouble("bad-picture" if error.code.startswith("image.") else "bad-model", str(error))
    if isinstance(error, MissingFile):
        return Trouble("not-found", str(error))
    if isinstance(error, BadInput):
        return Trouble("bad-value", str(error))
    if isinstance(error, SumukError):
        return Trouble("bad-value", str(error))
    return Trouble("internal", "a fault of the server; its log says more under the job's or the request's id")
