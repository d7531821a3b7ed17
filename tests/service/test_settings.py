"""Settings: documented, read from the environment, frozen, and what the command makes of them."""

from __future__ import annotations

import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from engram_service import cli
from engram_service.settings import Settings
from tests.servers import PATIENCE_S, ServiceProcess, ServiceThread


def test_every_setting_is_documented() -> None:
    undocumented = [name for name, field in Settings.model_fields.items() if not field.description]
    assert undocumented == []


def test_settings_come_from_the_environment_and_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGRAM_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ENGRAM_MAX_DRAW", "17")
    monkeypatch.setenv("ENGRAM_ADMIN_TOKEN", "")
    settings = Settings()
    assert (settings.data_dir, settings.max_draw, settings.admin_token) == (tmp_path, 17, None)
    with pytest.raises(ValidationError, match="frozen"):
        settings.max_draw = 18  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", "70000"), ("max_draw", "0"), ("lease_s", "0"), ("admin_token", "a b"), ("admin_token", "tökén")],
)
def test_a_setting_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"ENGRAM_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name):
        Settings()


def test_the_database_is_in_the_data_folder_unless_a_url_says_otherwise(tmp_path: Path) -> None:
    embedded = Settings(data_dir=tmp_path)
    assert embedded.is_embedded
    assert embedded.sqlalchemy_url == f"sqlite:///{tmp_path}/engram.sqlite"
    assert not Settings(database_url="postgresql+psycopg://u@h/d").is_embedded


def test_a_json_body_has_a_limit(serve_thread: Callable[..., ServiceThread]) -> None:
    served = serve_thread(max_json_bytes=200)
    body = {"name": "b", "budget_bytes": 1000}
    assert httpx.post(f"{served.url}/v1/buffers", json=body).status_code == 201
    for content in (b" " * 201, iter([b"{" + b" " * 150, b" " * 150])):
        answer = httpx.post(f"{served.url}/v1/buffers", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["max_json_bytes"]) == (413, 200)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"name": "b"}', b"[" * 10_000])
def test_a_body_that_is_no_buffer_is_an_invalid_request(served: ServiceThread, body: bytes) -> None:
    for headers in ({"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}):
        answer = httpx.post(f"{served.url}/v1/buffers", content=body, headers=headers)
        assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/problem+json"), answer.text


def test_a_page_has_a_limit(serve_thread: Callable[..., ServiceThread]) -> None:
    served = serve_thread(max_page=3)
    httpx.post(f"{served.url}/v1/buffers", json={"name": "b", "budget_bytes": 1000})
    assert httpx.get(f"{served.url}/v1/buffers/b/exemplars?limit=3").status_code == 200
    assert httpx.get(f"{served.url}/v1/buffers/b/exemplars?limit=4").json()["max_page"] == 3


def test_the_service_says_where_it_listens_and_ends_on_sigterm(make_service: Callable[..., ServiceProcess]) -> None:
    service = make_service(workers=0)
    assert httpx.get(f"{service.url}/readyz").json()["status"] == "ok"
    lines = re.findall(r"^Engram service on (http://127\.0\.0\.1:\d+)$", service.log.read_text(), re.MULTILINE)
    assert lines == [service.url]
    assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()


@pytest.mark.slow
def test_ctrl_c_ends_the_service_without_a_stack(make_service: Callable[..., ServiceProcess]) -> None:
    service = make_service(workers=0)
    service.process.send_signal(signal.SIGINT)
    service.process.wait(PATIENCE_S)
    assert "Traceback" not in service.log.read_text()


def test_a_port_that_is_taken_is_said_in_one_line(served: ServiceThread, tmp_path: Path) -> None:
    port = served.url.rpartition(":")[2]
    ended = CliRunner().invoke(cli.app, ["serve", "--port", port, "--data-dir", str(tmp_path / "other")])
    assert ended.exit_code == 2
    assert f"cannot serve on 127.0.0.1 port {port}" in ended.stderr


def test_a_setting_that_is_wrong_is_said_in_one_line() -> None:
    ended = CliRunner().invoke(cli.app, ["serve", "--port", "70000"])
    assert (ended.exit_code, ended.stderr.splitlines()[0][:21]) == (2, "engram-service: port:")


def test_what_the_service_keeps_is_of_its_user_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    settings.make_folders()
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in settings.folders} == {0o700}
