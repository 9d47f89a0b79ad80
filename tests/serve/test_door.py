"""What an order has to pass. The desk's tests show the rest."""

from __future__ import annotations

from typing import get_type_hints

from PIL import Image

from sumuk.generate.request import Request, Steer
from sumuk.serve.door import PICTURES


def fields_with_pictures(kind: type) -> set[str]:
    return {
        name
        for name, hint in get_type_hints(kind).items()
        if Image.Image in getattr(hint, "__args__", (hint,))
    }


def test_every_field_that_holds_a_picture_is_known():
    """One that is forgotten would open a file of the server by the name that a caller gives."""
    assert fields_with_pictures(Request) == set(PICTURES)
    assert fields_with_pictures(Steer) == {"hint"}
