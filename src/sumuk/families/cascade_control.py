"""Stable Cascade's ControlNets: files of their own, told by their backbone and its projections.

Canny, inpainting and super resolution differ in the channels of their hint. Where in stage C what they say is added
stands in no file, see :mod:`sumuk.nets.cascade_control`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from sumuk.families.family import FAMILIES, Arrangement, Kind, Part, Shapes
from sumuk.files.layout import Rule, rename

if TYPE_CHECKING:
    from torch import nn

NAMES = ("backbone.*", "projections.*")
HINTS = {
    1: "edges (canny)",
    4: "a picture and its mask (inpainting)",
    16: "a smaller latent (super resolution)",
}
"""Channels of a hint, and what that is in the published files."""


def _same(names: Collection[str]) -> list[Rule]:
    return [rename(name, name) for name in NAMES]


def _build(shapes: Shapes) -> nn.Module:
    from sumuk.nets.cascade_control import CascadeControl, cascade_control_shape

    return CascadeControl(cascade_control_shape(shapes))


def _config(shapes: Shapes) -> dict[str, Any]:
    return {}


CONTROL = Part(
    name="control",
    title="ControlNet",
    key="projections.0.2.weight",
    original=NAMES,
    diffusers=_same,
    supplier="a ControlNet's own file",
    build=_build,
    config=_config,
)


def _first(shapes: Shapes) -> tuple[int, ...]:
    """The shape of the convolution that reads the hint; EfficientNets begin with one and its norm."""
    plain, efficient = "control.backbone.0.weight", "control.backbone.0.0.weight"
    return shapes.get(plain, shapes.get(efficient, ()))


def _recognise(shapes: Shapes) -> str | None:
    for name in ("projections.0.0.weight", "projections.0.2.weight"):
        if len(shapes.get(f"control.{name}", ())) != 4:
            return f"there is no convolution {name!r} of a Cascade ControlNet"
    return None if len(_first(shapes)) == 4 else "there is no backbone of a Cascade ControlNet"


def _tells(shapes: Shapes) -> Mapping[str, str]:
    return {"hint": HINTS.get(_first(shapes)[1], f"{_first(shapes)[1]} channels")}


CASCADE = Kind(
    name="controlnet",
    variant="cascade",
    title="ControlNet for Stable Cascade",
    architecture="stable-cascade-v1-stage-c/controlnet",
    arrangements=(
        Arrangement(
            name="bare",
            title="single network, original names without prefix",
            dialect="original",
            parts=((CONTROL, ""),),
        ),
    ),
    recognise=_recognise,
    licence="stable-cascade-nc-community",
    tells=_tells,
)
FAMILIES.add(CASCADE.key, CASCADE)
