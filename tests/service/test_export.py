"""Exports: a whole generation as a tar, streamed, that can be uploaded again."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable

import httpx
import numpy as np
import psutil
import pytest
import simplejpeg

from engram import tar
from tests.contents import create, fill
from tests.servers import ServiceThread, eventually, http


def test_an_export_holds_every_exemplar_as_a_file_of_its_own(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    pixels = [fill(served.state.database, served.settings, task, {task: 4, 7: 3}) for task in range(2)]
    answer = client.get("/v1/buffers/b/export")
    assert answer.headers["Content-Type"] == "application/x-tar"
    assert answer.headers["Engram-Generation"] == "2"
    members = list(tar.read(io.BytesIO(answer.content)))
    assert [member.class_id for member in members] == [0] * 4 + [7] * 3 + [1] * 4 + [7] * 3
    for member, expected in zip(members, np.concatenate(pixels), strict=True):
        assert np.array_equal(simplejpeg.decode_jpeg(member.image, fastupsample=True), expected)


def test_an_older_generation_can_be_exported(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    for task in range(2):
        fill(served.state.database, served.settings, task, {task: 2})
    members = list(tar.read(io.BytesIO(client.get("/v1/buffers/b/export?generation=1").content)))
    assert [member.class_id for member in members] == [0, 0]


def test_an_export_of_nothing_is_an_empty_tar(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    assert client.get("/v1/buffers/b/export").content == tar.END


def test_damaged_exemplars_are_left_out(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    for task in range(2):
        fill(served.state.database, served.settings, task, {task: 3})
    served.state.store.delete(client.get("/v1/buffers/b/manifest").json()["packs"][0]["digest"])
    answer = client.get("/v1/buffers/b/export")
    assert [member.class_id for member in tar.read(io.BytesIO(answer.content))] == [1, 1, 1]
    assert client.get("/healthz").json()["status"] == "degraded"


@pytest.mark.slow
def test_a_client_that_leaves_midway_leaves_nothing_behind(
    serve_thread: Callable[..., ServiceThread], caplog: pytest.LogCaptureFixture
) -> None:
    served, process = serve_thread(cache_bytes=1), psutil.Process()
    create(served.state.database, budget_bytes=10**8, quality=100)
    for task in range(2):
        fill(served.state.database, served.settings, task, {task: 22}, shape=(512, 512, 3))
    with http(served) as client:
        whole = len(client.get("/v1/buffers/b/export").content)
        assert whole > 10**7, "more than the sockets' buffers take"
        before = process.num_fds()
        for _ in range(3):
            host, port = served.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(b"GET /v1/buffers/b/export HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: process.num_fds() <= before)
        assert client.get("/healthz").json()["status"] == "ok"
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
