"""What schemathesis is told about this service: valid uploads, whose body belongs to which address, and what to renew.

The environment names the service (FUZZ_URL) and its token (FUZZ_TOKEN), what there is by parameters of paths
(FUZZ_HELD), and where the tally of answers goes (FUZZ_TALLY).
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, HookContext, Response

from engram.errors import InvalidRequest
from engram_service.routes.draw import parse
from tests.fuzz import memory

_client = httpx.Client(
    base_url=os.environ["FUZZ_URL"], headers={"Authorization": f"Bearer {os.environ['FUZZ_TOKEN']}"}, timeout=60
)
_tally: Counter[tuple[str, str, int]] = Counter()
_changed: set[str] = set()
_numbers = itertools.count()
_held: dict[str, list[Any]] = json.loads(os.environ["FUZZ_HELD"])
_extractors = [hashlib.sha256(content).hexdigest() for content in memory.MODELS]


def _mode(case: Case[Any]) -> str:
    return "explicit" if case.meta is None else case.meta.generation.mode.value


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
    """What no schema can say: most models are sent to their own address, and ranks lie in a world of bounded size."""
    if case.operation.label == "PUT /v1/extractors/{sha256}" and isinstance(case.body, bytes) and len(case.body) % 8:
        case.path_parameters["sha256"] = hashlib.sha256(case.body).hexdigest()
    query = case.query
    if case.operation.label.endswith("/draw") and _mode(case) == "positive" and "size" in query:
        # Numbers are text where they were made for their place in the address.
        most = memory.MAX_GLOBAL_DRAW // (int(query["size"]) * len(memory.TASKS))
        query["world_size"] = min(int(query.get("world_size", 1)), most)
        query["rank"] = int(query.get("rank", 0)) % query["world_size"]
    if case.operation.label.endswith("/draw") and _mode(case) == "negative" and _is_right(query):
        query["size"] = "none"  # what was wrong with it is gone once it is text
    if case.operation.label.endswith("/exemplars") and _mode(case) == "positive" and query.get("key"):
        query["key"] = [*memory.KEYS][: len(query["key"])]  # dictionaries have no lists
    if _mode(case) == "positive" and query.get("where") and next(_numbers) % 8:
        query["where"] = [*memory.CONDITIONS][: len(query["where"])]
    # The coverage phase leaves out the quotes that the pattern demands.
    tag = str(case.headers.get("if-match", "*"))
    if _mode(case) == "positive" and tag.isdigit():
        case.headers["if-match"] = f'"{tag}"'
    return case


def _is_right(query: dict[str, Any]) -> bool:
    """Whether the parameters of a draw are right as they will be written in the address; objects are left out there."""
    written = {name: value for name, value in query.items() if not isinstance(value, dict | list)}
    try:
        parse(str(httpx.QueryParams(written)).encode())
    except InvalidRequest:
        return False
    return True


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """What the request names is there, nearly always; what all buffers are made from stays."""
    parameters = case.path_parameters
    if _mode(case) != "negative" and "PUT" not in case.operation.label:
        for name, values in _held.items():
            if name in parameters and parameters[name] not in values and next(_numbers) % 8:
                parameters[name] = values[next(_numbers) % len(values)]
        if "/packs/" in case.operation.label and parameters["sha256"] in _extractors:
            parameters["sha256"] = _held["pack"][0]
        if "/extractors/" in case.operation.label and parameters["sha256"] in _held["pack"]:
            parameters["sha256"] = _extractors[0]
        for name, value in (("generation", 2), ("extractor", _extractors[0])):
            if name in case.query and next(_numbers) % 4:
                case.query[name] = value
    buffer = parameters.get("buffer")
    if case.method == "DELETE" and buffer in (memory.SOURCE, memory.UPLOADED):
        buffer = parameters["buffer"] = memory.BUFFERS[0]
    if buffer in _changed:
        memory.renew(_client, buffer)
        _changed.discard(buffer)


@schemathesis.hook
def after_call(context: HookContext, case: Case[Any], response: Response) -> None:
    """Counted; what the request made is gone again, and what it changed will be renewed."""
    label = case.operation.label if case.method == case.operation.method.upper() else case.method
    _tally[label, _mode(case), response.status_code] += 1
    if not 200 <= response.status_code < 300 or case.method in ("GET", "HEAD"):
        return
    if response.status_code == 201 and "/buffers/" in (made := response.headers.get("location", [""])[0]):
        if made.rpartition("/")[2] not in (memory.SOURCE, *memory.BUFFERS):
            _client.delete(made)
    elif case.method == "DELETE" and case.path_parameters.get("sha256") in _extractors:
        memory.register(_client)
    elif case.path_parameters.get("buffer") in memory.BUFFERS:
        _changed.add(case.path_parameters["buffer"])


@atexit.register
def _report() -> None:
    rows = [(operation, mode, status, count) for (operation, mode, status), count in sorted(_tally.items())]
    Path(os.environ["FUZZ_TALLY"]).write_text(json.dumps(rows))
