"""Access to the service: nobody without the token, and nobody from elsewhere when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from engram.errors import Forbidden
from engram_service import cli
from engram_service.access import OPEN_PATHS
from engram_service.app import create_app
from engram_service.settings import Settings
from tests.servers import ServiceThread

TOKEN = "engram_0123456789abcdef"


@pytest.fixture
def guarded(serve_thread: Callable[..., ServiceThread]) -> ServiceThread:
    """A service with a token."""
    return serve_thread(admin_token=TOKEN)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer  {TOKEN}",
        f"Bearer {TOKEN},{TOKEN}",
        f"Bearer {TOKEN.upper()}",
        "Bearer ÿ".encode("latin-1"),
    ],
)
def test_without_the_token_no_route_answers(guarded: ServiceThread, authorization: str | bytes | None) -> None:
    headers = {} if authorization is None else {b"Authorization": authorization}
    for method, path in (("GET", "/v1/buffers"), ("PUT", "/v1/extractors/x"), ("GET", "/v1/nothing"), ("GET", "/new")):
        answer = httpx.request(method, guarded.url + path, headers=headers)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert TOKEN not in answer.text


def test_every_route_of_the_interface_is_closed_but_the_open_ones(guarded: ServiceThread) -> None:
    for path, operations in httpx.get(f"{guarded.url}/openapi.json").json()["paths"].items():
        for method in operations:
            status = httpx.request(method, guarded.url + path.replace("{", "").replace("}", "")).status_code
            assert (status == 401) == (path not in OPEN_PATHS), path


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_with_the_token_it_answers(guarded: ServiceThread, scheme: str) -> None:
    answer = httpx.get(f"{guarded.url}/v1/buffers", headers={"Authorization": f"{scheme} {TOKEN}"})
    assert answer.status_code == 200


def test_health_and_the_interface_need_no_token(guarded: ServiceThread) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert httpx.get(guarded.url + path).status_code == 200
    schema = httpx.get(f"{guarded.url}/openapi.json").json()
    assert schema["security"] == [{"token": []}]
    assert schema["paths"]["/healthz"]["get"]["security"] == []


def test_the_token_is_in_no_representation_of_the_settings(guarded: ServiceThread) -> None:
    assert TOKEN not in repr(guarded.settings)
    assert TOKEN not in guarded.settings.model_dump_json()


def test_without_a_token_only_requests_for_this_machine_are_answered(served: ServiceThread) -> None:
    for host in ("127.0.0.1:1", "localhost", "[::1]:8077", "LOCALHOST:80"):
        assert httpx.get(f"{served.url}/v1/buffers", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8077", "10.0.0.1", "127.0.0.1.evil.example"):
        answer = httpx.get(f"{served.url}/v1/buffers", headers={"Host": host})
        assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (403, "forbidden")


def test_without_a_token_no_page_of_another_site_gets_in(served: ServiceThread) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:8077", "https://[::1]"):
        assert httpx.get(f"{served.url}/v1/buffers", headers={"Origin": origin}).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "file://"):
        assert httpx.post(f"{served.url}/v1/buffers", headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com", "127.0.0.1.example.com"])
def test_beyond_loopback_there_is_no_service_without_a_token(settings: Settings, host: str) -> None:
    with pytest.raises(Forbidden, match="ENGRAM_ADMIN_TOKEN"):
        create_app(settings.model_copy(update={"host": host}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_is_known_by_all_its_names(settings: Settings, host: str) -> None:
    create_app(settings.model_copy(update={"host": host})).state.database.close()


def test_the_command_refuses_to_serve_others_without_a_token(tmp_path: Path) -> None:
    arguments = ["serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path / "data")]
    ended = CliRunner().invoke(cli.app, arguments)
    assert ended.exit_code == 2
    assert "ENGRAM_ADMIN_TOKEN" in ended.stderr
    assert not (tmp_path / "data").exists()
