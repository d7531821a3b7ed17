from collections.abc import Callable

import httpx
import pytest
from fastapi.routing import APIRoute

from engram.schemas import API_NUMBER
from tests.servers import ServiceThread, http


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/buffers", 200),
        ("GET", "/v1/buffers/none", 404),
        ("GET", "/v1/buffers/none/draw?size=x", 422),
        ("PUT", "/v1/buffers", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/healthz", 200),
    ],
)
def test_every_answer_states_the_number_of_the_api(client: httpx.Client, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.headers.get_list("Engram-API") == [str(API_NUMBER)]


def test_refusals_and_defects_state_it_too(serve_thread: Callable[..., ServiceThread]) -> None:
    service = serve_thread(admin_token="secret")
    # In front of the route that the table of routes knows by this path.
    service.app.router.routes.insert(0, APIRoute("/v1/whoami", lambda: 1 / 0))
    for token, status in ((None, 401), ("secret", 500)):
        with http(service, token) as client:
            answer = client.get("/v1/whoami")
        assert (answer.status_code, answer.headers.get_list("Engram-API")) == (status, [str(API_NUMBER)])
