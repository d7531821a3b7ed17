"""A log message is one line, says on whose behalf it is, and never holds a token or what would forge another line."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_service.acting import ACTING, Acting, Principal
from engram_service.database import Database
from engram_service.logs import BLOT, JsonLines, TextLines, about
from tests.contents import create, pictures
from tests.servers import ServiceProcess, ServiceThread, eventually, http
from tests.uploads import final, queue, tar_of_arrays

TOKEN = "engram_" + "aB3-_" * 9
SECRET = "correct horse"


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "engram_service.x", "levelname": "INFO", "msg": message, "args": arguments})
    vars(made).update(more)
    return made


def as_json(found: logging.LogRecord, worker: str = "") -> dict[str, Any]:
    line = JsonLines(worker, SECRET).format(found)
    assert "\n" not in line
    assert line.isascii()
    read: dict[str, Any] = json.loads(line)
    return read


def test_a_json_line_says_when_where_what_and_on_whose_behalf() -> None:
    def log() -> dict[str, Any]:
        ACTING.set(Acting(Principal("trainer 1", "write"), "req-7"))
        with about("ingest-9"):
            return as_json(record("%d packs", 3, process=17), worker="host:ab")

    found = copy_context().run(log)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "INFO",
        "logger": "engram_service.x",
        "message": "3 packs",
        "process": 17,
        "worker": "host:ab",
        "request_id": "req-7",
        "who": "trainer 1",
        "ingest": "ingest-9",
    }
    assert as_json(record("outside of any request")).keys() == {"time", "level", "logger", "message", "process"}


def test_an_exception_is_a_member_and_in_text_indented_below() -> None:
    try:
        raise ValueError(f"bad\nINFO forged {TOKEN}")
    except ValueError:
        found = record("it failed", exc_info=sys.exc_info())
    member = as_json(found)["exception"]
    assert member.startswith("Traceback")
    assert "ValueError: bad" in member
    first, *rest = TextLines("", "").format(found).splitlines()
    assert first.endswith("engram_service.x: it failed")
    assert all(line.startswith("    ") for line in rest)
    assert TOKEN not in member + "".join(rest)


@given(st.text())
def test_whatever_is_logged_is_one_line_that_a_terminal_shows_as_it_is(text: str) -> None:
    for line in (TextLines("", "").format(record("path %s", text)), JsonLines("", "").format(record("path %s", text))):
        assert len(line.splitlines()) == 1
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
    if not re.search("(?i)bearer", text):
        assert as_json(record("path %s", text))["message"] == f"path {text}"


@pytest.mark.parametrize(
    "text", [TOKEN, f"/x?token={TOKEN}&y", f"Bearer {TOKEN}", f"authorization: bearer s3cr3t-{SECRET}", SECRET]
)
def test_no_token_is_written_in_either_form(text: str) -> None:
    for lines in (JsonLines("", SECRET), TextLines("", SECRET)):
        for found in (record("%s", text), record("x", path=text), record("x", headers={"a": text})):
            line = lines.format(found)
            assert not re.search(f"{TOKEN}|{SECRET}|s3cr3t", line), line
    assert BLOT in JsonLines("", SECRET).format(record("%s", text))


def test_names_of_ours_are_no_tokens() -> None:
    text = "engram_service.app engram_http_request_duration_seconds engram_trainer"
    assert as_json(record(text))["message"] == text


def lines_of(service: ServiceProcess) -> list[dict[str, Any]]:
    text = service.log.read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_an_access_log_has_a_line_per_request_with_its_id_and_its_time(
    serve_thread: Callable[..., ServiceThread], caplog: pytest.LogCaptureFixture
) -> None:
    service = serve_thread(access_log=True, admin_token="t" * 32)
    with caplog.at_level(logging.INFO), http(service, "t" * 32) as client:
        client.get("/v1/buffers?secret=1", headers={"X-Request-ID": "mine-1"})
        client.head("/v1/buffers", headers={"X-Request-ID": "mine-2"})
        httpx.get(f"{service.url}/v1/buffers", headers={"X-Request-ID": "mine-3"})
        assert eventually(lambda: len([1 for found in caplog.records if found.name == "engram_service.access"]) == 3)
    lines = [found for found in caplog.records if found.name == "engram_service.access"]
    told = [{name: vars(line)[name] for name in ("method", "path", "status", "request_id", "who")} for line in lines]
    assert told == [
        {"method": "GET", "path": "/v1/buffers", "status": 200, "request_id": "mine-1", "who": "admin"},
        {"method": "HEAD", "path": "/v1/buffers", "status": 200, "request_id": "mine-2", "who": "admin"},
        {"method": "GET", "path": "/v1/buffers", "status": 401, "request_id": "mine-3", "who": ""},
    ]
    assert all(vars(line)["ms"] > 0 and vars(line)["client"] == "127.0.0.1" for line in lines)
    assert not any("secret" in line.getMessage() for line in lines)


@pytest.mark.slow
def test_a_service_and_its_workers_log_json_with_the_request_and_the_ingest(
    make_service: Callable[..., ServiceProcess],
) -> None:
    token = "0123456789abcdef" * 2
    service = make_service(log_format="json", access_log=True, admin_token=token)
    database = Database(service.settings)
    create(database)
    body = tar_of_arrays(pictures(1, 6), np.arange(6) % 2)
    with http(service, token) as client:
        answer = client.post("/v1/buffers/b/tasks/0/ingests", content=body, headers={"X-Request-ID": "upload-1"})
        assert answer.status_code == 202
        name = answer.json()["id"]
        failing = queue(database, service.settings, b"no tar", task=1)
        assert eventually(lambda: final(database, failing).state == "failed")
        client.get(f"/v1/buffers/%0Aforged%20{token}/tasks/0?token={token}")

        def told() -> bool:
            lines = lines_of(service)
            about_it = [line for line in lines if line.get("ingest") == name and "committed" in line["message"]]
            access = [line for line in lines if line.get("request_id") == "upload-1" and "status" in line]
            forged = [line for line in lines if "forged" in line.get("path", "")]
            return bool(about_it and about_it[0]["worker"] and access and access[0]["status"] == 202 and forged)

        assert eventually(told)
    database.close()
    service.stop()
    whole = service.log.read_text()
    assert token not in whole
    plain = [line for line in whole.splitlines() if not line.startswith("{")]
    assert plain == [line for line in plain if line.startswith("Engram service on")]
