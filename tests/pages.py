"""Pages of the console over plain HTTP: their forms, and what one reads on them."""

from __future__ import annotations

import html
import re

import httpx


def csrf(client: httpx.Client, path: str = "/console") -> str:
    """What forms of the client's session carry."""
    found = re.search(r'"X-CSRF-Token": "([^"]+)"', client.get(path).text)
    assert found is not None, f"{path} has no token for forms"
    return found[1]


def post(client: httpx.Client, path: str, /, **fields: object) -> httpx.Response:
    """Send a form of the console as its page would; where the answer leads is not followed."""
    data = {"csrf": csrf(client), **{name: str(value) for name, value in fields.items()}}
    return client.post(path, data=data, headers={"Accept": "text/html"}, follow_redirects=False)


def text(page: httpx.Response | str) -> str:
    """What a reader sees: without tags, white space closed up."""
    source = page if isinstance(page, str) else page.text
    body = source.partition("<body")[2].partition(">")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())
