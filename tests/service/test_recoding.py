"""One exemplar at lower qualities: the bytes and the pixels that a buffer encoded again would have."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import simplejpeg

from engram import strip
from engram.schemas import Exemplar
from tests.contents import UInt8Array, create, fill
from tests.servers import ServiceThread

EXEMPLARS = "/v1/buffers/b/exemplars"


@pytest.fixture
def pixels(served: ServiceThread) -> UInt8Array:
    """Buffer "b" with one task at quality 60; what it stores, row by row."""
    create(served.state.database, quality=60)
    return fill(served.state.database, served.settings, 0, {0: 3, 1: 2})


def listed(client: httpx.Client) -> list[Exemplar]:
    return [Exemplar.model_validate(each) for each in client.get(EXEMPLARS).json()["exemplars"]]


def test_lower_candidates_have_the_bytes_of_encoding_again(client: httpx.Client, pixels: UInt8Array) -> None:
    for each in listed(client):
        found = client.get(f"{EXEMPLARS}/{each.pack}/{each.row}/qualities").json()
        assert found["stored"] == {"quality": 60, "bytes": each.bytes}
        assert [lower["quality"] for lower in found["lower"]] == [50, 25, 10]
        for lower in found["lower"]:
            again = strip.encode(pixels[each.row][None], [0], quality=lower["quality"])
            assert lower["bytes"] == again.sizes[0]


def test_the_picture_at_a_quality_is_what_would_be_replayed(client: httpx.Client, pixels: UInt8Array) -> None:
    each = listed(client)[3]
    path = f"{EXEMPLARS}/{each.pack}/{each.row}"
    answer = client.get(f"{path}?quality=10")
    again = strip.encode(pixels[each.row][None], [0], quality=10).decode()[0]
    assert np.array_equal(simplejpeg.decode_jpeg(answer.content, fastupsample=True), again)
    assert client.get(f"{path}?quality=60").content == client.get(path).content
    held = {"If-None-Match": answer.headers["ETag"]}
    assert client.get(f"{path}?quality=10", headers=held).status_code == 304
    assert client.get(path, headers=held).status_code == 200


@pytest.mark.parametrize("query", ["?quality=61", "?quality=0", "?quality=x"])
def test_what_is_gone_is_not_made_up(client: httpx.Client, pixels: UInt8Array, query: str) -> None:
    each = listed(client)[0]
    assert client.get(f"{EXEMPLARS}/{each.pack}/{each.row}{query}").status_code == 422
    assert client.get(f"{EXEMPLARS}/{each.pack}/9/qualities").status_code == 404
