"""Exports: a whole generation as a tar, streamed, that can be uploaded again."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable

import httpx
import numpy as np
import psutil
import simplejpeg

from engram import tar
from engram_service.database import Database
from tests.contents import create, fill
from tests.servers import ServiceProcess, ServiceThread, eventually, http


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


def test_a_client_that_leaves_midway_leaves_nothing_behind(make_service: Callable[..., ServiceProcess]) -> None:
    service = make_service("--workers", "0", cache_bytes=1)
    database = Database(service.settings)
    create(database, budget_bytes=10**8)
    # 2,500 pictures of 64x64 are some 10 MB of tar: more than the sockets' buffers take.
    for task in range(5):
        fill(database, service.settings, task, {task: 500}, shape=(64, 64, 3))
    database.close()
    process = psutil.Process(service.process.pid)
    with http(service) as client:
        client.get("/v1/buffers/b/export").raise_for_status()
        before = process.num_fds()
        for _ in range(8):
            host, port = service.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(b"GET /v1/buffers/b/export HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: process.num_fds() <= before)
        assert client.get("/healthz").json()["status"] == "ok"
    assert "Traceback" not in service.log.read_text()
