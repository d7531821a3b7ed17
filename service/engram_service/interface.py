"""The interface description (OpenAPI): what the framework finds in the routes, and what it cannot know.

That is the token, how problems are sent and with which statuses, and the limits that are settings. Rules that no schema
can state (a rank lies below its world size, a model has the digest of its address) stand in descriptions; they and all
others are answered with 422.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from engram.errors import (
    Conflict,
    EngramError,
    Forbidden,
    InvalidRequest,
    NotFound,
    RateLimited,
    StorageFull,
    TooLarge,
    Unauthorized,
    Unavailable,
)

from . import problems
from .access import OPEN_PATHS
from .settings import Settings

_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}}

Operation = dict[str, Any]


def document(app: FastAPI, settings: Settings) -> None:
    """`app` describes itself, once it is asked to."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, settings)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _described(app: FastAPI, settings: Settings) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schema: dict[str, Any] = _uniform(found)
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            if path in OPEN_PATHS:
                operation["security"] = []
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _of_text(parameter["schema"])
                maximum = _maxima(settings).get((path.rpartition("/")[2], parameter["name"]))
                if maximum is not None:
                    parameter["schema"]["maximum"] = maximum
            del operation["responses"]["default"]
            for error in _errors(path, method, operation):
                operation["responses"].setdefault(str(error.status), _problem(error))
            operation["responses"]["431"] = {
                **_problem(TooLarge),
                "description": "The head of the request is too long.",
            }
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}] if settings.admin_token is not None else [{}, {"token": []}]
    return schema


def _errors(path: str, method: str, operation: Operation) -> Iterator[type[EngramError]]:
    """What an operation may answer instead, whatever it does: see the errors for what each means."""
    yield Forbidden
    if path not in OPEN_PATHS:
        yield Unauthorized
    parameters = operation.get("parameters", ())
    if "{" in path or "buffer" in {parameter["name"] for parameter in parameters}:
        yield NotFound
    if parameters or "requestBody" in operation:
        yield InvalidRequest
    if method != "get":
        yield from (Conflict, TooLarge, StorageFull)
    elif path.endswith(("/draw", "/forecast")):
        yield Conflict
    yield from (RateLimited, Unavailable)


def _problem(error: type[EngramError]) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": (error.__doc__ or "").partition("\n")[0],
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    return answer | {"headers": _RETRY_AFTER} if error in (RateLimited, Unavailable) else answer


def _of_text(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter is there or it is not: none is null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) != 1:
        return schema
    return {name: value for name, value in schema.items() if name not in ("anyOf", "default")} | dict(kinds[0])


def _uniform(part: Any) -> Any:
    """Tuples described as arrays of one kind of item, as all of ours are: few generators know another way."""
    if isinstance(part, list):
        return [_uniform(each) for each in part]
    if not isinstance(part, dict):
        return part
    described = {name: _uniform(value) for name, value in part.items() if name != "prefixItems"}
    kinds = part.get("prefixItems", ())
    return described | {"items": kinds[0]} if kinds and all(kind == kinds[0] for kind in kinds) else described


def _maxima(settings: Settings) -> dict[tuple[str, str], int]:
    """What settings allow, by the end of the path and the parameter."""
    return {
        ("draw", "size"): settings.max_draw,
        ("draw", "world_size"): settings.max_global_draw,
        ("draw", "rank"): settings.max_global_draw - 1,
        ("exemplars", "limit"): settings.max_page,
        ("ingests", "limit"): settings.max_page,
        ("audit", "limit"): settings.max_page,
    }
