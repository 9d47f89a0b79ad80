"""How the server does: alive, ready, and its figures. Alive and ready need no token, figures do."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from sumuk.serve.calls import TheDesk
from sumuk.serve.metrics import MEDIA
from sumuk.serve.trouble import refused

router = APIRouter(tags=["health"])


@router.get("/livez", response_class=PlainTextResponse)
async def livez() -> str:
    """Whether this process answers, whatever the device is busy with."""
    return "ok"


@router.get(
    "/readyz",
    response_class=PlainTextResponse,
    responses={503: {"description": "Not now: it is loading, draining, or what draws is gone"}},
)
async def readyz(desk: TheDesk) -> str:
    """Whether orders are taken now."""
    if not desk.ready:
        raise refused("unready", desk.why_unready, retry_after=1)
    return "ok"


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(desk: TheDesk) -> Response:
    """Figures in the text form of Prometheus."""
    return Response(desk.metrics.text(), media_type=MEDIA)
