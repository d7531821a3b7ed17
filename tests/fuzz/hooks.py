"""What schemathesis is told about this service: valid uploads, whose body belongs to which address, and what to renew.

The environment names the service (FUZZ_URL) and where the tally of answers goes (FUZZ_TALLY).
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, HookContext, Response

from tests.fuzz import memory

_client = httpx.Client(base_url=os.environ["FUZZ_URL"], timeout=60)
_tally: Counter[tuple[str, str, int]] = Counter()
_changed: set[str] = set()


def _cut(content: bytes) -> st.SearchStrategy[bytes]:
    """The content, or with something wrong: an end too soon, one byte overwritten."""
    places = st.integers(0, len(content) - 1)
    flipped = st.builds(lambda at, byte: content[:at] + bytes([byte]) + content[at + 1 :], places, st.integers(0, 255))
    return st.just(content) | places.map(lambda end: content[:end]) | flipped


_UPLOADS = [memory.body(0), memory.body(1, 2), memory.body(2, 1), gzip.compress(memory.body(0))]

schemathesis.openapi.media_type("application/x-tar", st.sampled_from(_UPLOADS).flatmap(_cut))
schemathesis.openapi.media_type("application/octet-stream", st.sampled_from(memory.MODELS).flatmap(_cut))


@schemathesis.hook
def map_case(context: HookContext, case: Case[Any]) -> Case[Any]:
    """Most models are sent to their own address, most ranks lie in their world: no schema can say either."""
    if case.operation.label == "PUT /v1/extractors/{sha256}" and isinstance(case.body, bytes) and len(case.body) % 8:
        case.path_parameters["sha256"] = hashlib.sha256(case.body).hexdigest()
    return case


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """What the request names is there; what all buffers are made from stays."""
    parameters = case.path_parameters
    name = parameters.get("buffer")
    if case.method == "DELETE" and name == memory.SOURCE:
        name = parameters["buffer"] = memory.BUFFERS[0]
    if name in _changed:
        memory.renew(_client, name)
        _changed.discard(name)


@schemathesis.hook
def after_call(context: HookContext, case: Case[Any], response: Response) -> None:
    """Counted; what the request made is gone again, and what it changed will be renewed."""
    mode = "?" if case.meta is None else case.meta.generation.mode.value
    _tally[
        case.operation.label if case.method == case.operation.method.upper() else case.method,
        mode,
        response.status_code,
    ] += 1
    if not 200 <= response.status_code < 300 or case.method in ("GET", "HEAD"):
        return
    if response.status_code == 201 and "/buffers/" in (made := response.headers.get("location", [""])[0]):
        if made.rpartition("/")[2] not in (memory.SOURCE, *memory.BUFFERS):
            _client.delete(made)
    elif case.path_parameters.get("buffer") in memory.BUFFERS:
        _changed.add(case.path_parameters["buffer"])


@atexit.register
def _report() -> None:
    rows = [(operation, mode, status, count) for (operation, mode, status), count in sorted(_tally.items())]
    Path(os.environ["FUZZ_TALLY"]).write_text(json.dumps(rows))
