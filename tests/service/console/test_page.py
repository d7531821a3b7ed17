"""What all pages of the console have in common: the frame, the policy, the check of forms, problems as pages."""

from __future__ import annotations

import re

import httpx
import pytest

from engram_service.console.page import HEADERS, readable_bytes
from tests.servers import ServiceThread


def test_the_console_opens_with_its_pages_in_the_navigation(client: httpx.Client) -> None:
    page = client.get("/console")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for label in ("Overview", "Ingests", "Draws", "Extractors", "Tokens", "Audit"):
        assert f">{label}</a>" in page.text
    assert page.text.count('aria-current="page"') == 1


def test_every_answer_of_the_console_carries_the_policy(client: httpx.Client) -> None:
    for path in ("/console", "/console/nothing", "/console/static/console.css", "/console/static/nothing.js"):
        answer = client.get(path)
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, path
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_the_api_does_not_carry_the_policy(client: httpx.Client) -> None:
    assert "content-security-policy" not in client.get("/v1/buffers").headers


def test_no_page_has_scripts_or_styles_of_its_own_or_names_another_host(client: httpx.Client) -> None:
    for path in ("/console", "/console/nothing"):
        page = client.get(path).text
        assert not re.search(r"<script(?![^>]*src=)|<style| style=| on[a-z]+=\"|https?://", page), path


def test_files_with_their_version_are_good_for_ever_and_others_are_asked_for_again(client: httpx.Client) -> None:
    page = client.get("/console").text
    addresses = re.findall(r'(?:src|href)="(console/static/[^"]+)"', page)
    assert len(addresses) >= 6
    for address in addresses:
        assert "immutable" in client.get(f"/{address}").headers["cache-control"], address
    assert client.get("/console/static/console.css").headers["cache-control"] == "no-cache"


def test_addresses_are_relative_so_that_pages_work_below_the_prefix_of_a_proxy(client: httpx.Client) -> None:
    page = client.get("/console/buffers/x/y").text
    addresses = re.findall(r'(?:src|href|action)="([^"#]+)"', page)
    assert addresses
    for address in addresses:
        assert address.startswith("../../../console"), address


@pytest.mark.parametrize("path", ["/console/nothing", "/console/buffers/%2F%2Fx/%3Cscript%3E"])
def test_a_problem_is_a_page_and_what_it_quotes_is_text(client: httpx.Client, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 404
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<h1>Not found</h1>" in page.text
    assert "<script>" not in page.text


def test_a_problem_is_json_for_who_asks_for_it(client: httpx.Client) -> None:
    answer = client.get("/console/nothing", headers={"Accept": "application/json"})
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 404


def test_a_method_that_is_not_possible_is_a_page_too(client: httpx.Client) -> None:
    page = client.put("/console")
    assert page.status_code == 405
    assert "PUT is not possible here" in page.text


def test_the_head_of_a_problem_has_no_body(client: httpx.Client) -> None:
    answer = client.head("/console/nothing")
    assert (answer.status_code, answer.content) == (404, b"")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_the_interface_description_has_no_pages(served: ServiceThread, client: httpx.Client) -> None:
    assert not [path for path in client.get("/openapi.json").json()["paths"] if "console" in path]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"), (12_345_678, "12.3 MB")],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert readable_bytes(size) == text
