"""Jobs and orders as rows and JSON: pictures are taken out of an order and put back into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from sqlite3 import Row
from typing import Any

from sumuk.serve.order import Job, Order, Result
from sumuk.serve.trouble import Trouble


def pack(order: Order) -> tuple[Order, dict[str, bytes]]:
    """An order that JSON can hold, and its pictures by their digests, which stand in it as ``{"sha256": ...}``."""
    pictures: dict[str, bytes] = {}

    def light(value: Any) -> Any:
        if isinstance(value, bytes):
            digest = hashlib.sha256(value).hexdigest()
            pictures[digest] = value
            return {"sha256": digest}
        return value

    return _mapped(order, light), pictures


def unpack(order: Order, picture: Callable[[str], bytes]) -> Order:
    """The way back: the order with its pictures, got by their digests."""

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping) and value.keys() == {"sha256"}:
            return picture(value["sha256"])
        return value

    return _mapped(order, whole)


def _mapped(order: Order, change: Callable[[Any], Any]) -> Order:
    def deep(value: Any) -> Any:
        changed = change(value)
        if changed is not value:
            return changed
        if isinstance(value, Mapping):
            return {name: deep(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [deep(each) for each in value]
        return value

    fields = {name: getattr(order, name) for name in Order.__dataclass_fields__}
    return Order(**fields | {"values": deep(order.values)})


def order_text(light: Order) -> str:
    """A packed order as JSON."""
    return json.dumps(asdict(light), allow_nan=False)


def order_from(text: str) -> Order:
    """A packed order."""
    return Order(**json.loads(text))


def job_from(row: Row, results: Iterable[Row]) -> Job:
    """A job from its row and those of its results."""
    return Job(
        id=row["id"],
        owner=row["owner"],
        state=row["state"],
        order=order_from(row["asked"]),
        count=row["count"],
        cost=row["cost"],
        created=row["created"],
        began=row["began"],
        ended=row["ended"],
        attempt=row["attempt"],
        results=tuple(map(result_from, results)),
        trouble=None if row["trouble"] is None else Trouble(**json.loads(row["trouble"])),
        step=row["steps"] if row["state"] == "done" else 0,
        steps=row["steps"],
    )


def result_from(row: Row) -> Result:
    """A result from its row."""
    return Result(
        image=row["image"],
        file=row["file"],
        seed=int(row["seed"]),
        width=row["width"],
        height=row["height"],
        sha256=row["sha256"],
        receipt=json.loads(row["receipt"]),
    )
