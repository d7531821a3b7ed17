"""The interface as pages to read and try: /docs (Swagger UI) and /redoc, with files that the service serves itself.

The files come from the package `fastapi-offline`, so the pages work without internet, and the policy in their headers
lets them load nothing from elsewhere.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.requests import Request
from starlette.staticfiles import StaticFiles

FILES = "docs/files"
"""Relative, so that the pages work below the prefix of a proxy as well."""

FILE_PATHS = frozenset(
    f"/{FILES}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")
)

# Both programs style their elements one by one; Redoc searches in a worker that it writes itself.
_POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def install(app: FastAPI) -> None:
    """`app` answers /docs, /redoc and their files."""
    swagger = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Engram",
        swagger_js_url=f"{FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{FILES}/swagger-ui.css",
        swagger_favicon_url=f"{FILES}/favicon.png",
    )
    redoc = get_redoc_html(
        openapi_url="openapi.json",
        title="Engram",
        redoc_js_url=f"{FILES}/redoc.standalone.js",
        redoc_favicon_url=f"{FILES}/favicon.png",
        with_google_fonts=False,
    )
    app.add_route("/docs", _answering(swagger))
    app.add_route("/redoc", _answering(redoc))
    app.mount(f"/{FILES}", StaticFiles(directory=str(files("fastapi_offline") / "static")))


def _answering(page: HTMLResponse) -> Callable[[Request], Awaitable[HTMLResponse]]:
    """A route of this page, which may run the scripts that are in it now and those of this service, and no other."""
    scripts = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    digests = [b64encode(sha256(script).digest()).decode() for script in scripts]
    page.headers["Content-Security-Policy"] = _POLICY.format(scripts="".join(f" 'sha256-{each}'" for each in digests))

    async def answer(_: Request) -> HTMLResponse:
        return page

    return answer
