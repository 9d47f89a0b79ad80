"""What an order costs, and whether it can be drawn at all: asked before it is taken in.

Worker side, but no device is touched, so that the answer comes while a forward runs.
"""

from __future__ import annotations

from sumuk.generate.request import Request, make_request
from sumuk.generate.settings import Settings, resolve
from sumuk.serve.offered import Offered
from sumuk.serve.order import Order
from sumuk.serve.residents import Residents
from sumuk.serve.wire import Checked


def check(order: Order, offered: Offered, residents: Residents) -> Checked:
    """Whether an order can be drawn: to the last setting if its model is here, by its names and values if not.

    Raises:
        SumukError: a value is not allowed, or something that it names is not offered or does not fit.
    """
    key = residents.key(order)
    for name, sort in ((order.vae, "vae"), (order.refiner, "model")):
        if name is not None:
            offered.find(name, sort)
    request = request_of(order)
    for steer in request.steer:
        offered.find(steer.control, "control")
    resident = residents.get(key)
    if resident is None:
        return _guess(key[0], request, offered)
    settings = resolve(request, resident.dress(request, offered))
    return Checked(
        model=key[0],
        count=request.count,
        cost=request.count * cost(settings),
        steps=settings.walked,
        width=settings.width,
        height=settings.height,
    )


def _guess(name: str, request: Request, offered: Offered) -> Checked:
    """What an order will about cost, by its family's usual settings, until the model is here."""
    usual = offered.usual_settings(name)
    width, height = request.width or usual.size, request.height or usual.size
    steps = request.steps or usual.steps
    scale = usual.guidance if request.guidance is None else request.guidance
    rows = 1 if scale == 1.0 else 2
    larger = 0.0 if request.hires is None else request.hires.scale**2 * (request.hires.steps or steps)
    return Checked(
        model=name,
        count=request.count,
        cost=request.count * rows * width * height * (steps + larger),
        steps=steps,
        width=width,
        height=height,
        sure=False,
    )


def request_of(order: Order) -> Request:
    """The request of an order, with its controls under the names that the server offers.

    Raises:
        BadInput: a value that no request takes.
    """
    values = dict(order.values)
    if steers := values.get("steer"):
        values["steer"] = [
            {**each, "control": order.controls.get(each["control"], each["control"])}
            if isinstance(each, dict) and "control" in each
            else each
            for each in steers
        ]
    return make_request(**values)


def cost(settings: Settings) -> float:
    """Pixels x steps x rows of one picture."""
    rows = 2 if settings.kind == "classifier-free" and settings.guidance_scale != 1.0 else 1
    rows += bool(settings.request.skip_layers)
    first = settings.width * settings.height * settings.walked
    second = 0 if settings.larger is None else settings.larger[0] * settings.larger[1]
    later = settings.width * settings.height * (settings.decoder_steps or 0)
    return float(rows * (first + second * (settings.rewalked or 0)) + later)
