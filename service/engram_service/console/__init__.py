"""The console: pages for operators under /console, rendered here and served with files of our own.

A module of this package per page: its `router` has the page and the forms on it, `page.render` makes the answer. Views
know HTTP and call the same rules as the routes of the API; every page has its twin there.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI

from . import (
    audit_log,
    buffer,
    draws,
    exemplar,
    exemplars,
    extractors,
    forecast,
    ingests,
    login,
    overview,
    snapshots,
    task,
    tokens,
)
from . import map as task_map
from .overview import Paces
from .page import STATIC, Console, Files, check_csrf

VIEWS = (
    overview,
    buffer,
    draws,
    forecast,
    snapshots,
    task,
    exemplars,
    exemplar,
    task_map,
    ingests,
    extractors,
    tokens,
    audit_log,
    login,
)
"""One per page; what they share is in `page`."""


def install(app: FastAPI) -> None:
    """`app` answers /console and everything below it."""
    app.state.console, app.state.paces = Console(), Paces()
    app.mount(f"/{STATIC}", Files())
    for view in VIEWS:
        app.include_router(view.router, prefix="/console", dependencies=[Depends(check_csrf)], include_in_schema=False)
