"""The route of metrics, for Prometheus."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from ..acting import principal
from ..metrics import Metrics

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(request: Request, accept: Annotated[str, Header(include_in_schema=False)] = "") -> Response:
    """Tell what the service and its workers have done, for Prometheus; a token needs no more than the scope read."""
    principal().need_everything("read")
    found: Metrics = request.app.state.metrics
    body, media_type = found.page(accept)
    return Response(body, headers={"Content-Type": media_type, "Cache-Control": "no-store"})
