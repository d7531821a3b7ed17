"""The proxy of the security page, as it is written there, lets nothing but TLS in and changes no answer."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from engram.client import Client
from engram.errors import Unauthorized
from tests.examples import ROOT, blocks
from tests.servers import ServiceProcess, eventually

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
TOKEN = "of-the-test-of-the-proxy"
pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(NGINX is None or not shutil.which("openssl"), reason="install Debian's nginx and openssl"),
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def proxied(make_service: Callable[..., ServiceProcess], tmp_path: Path) -> Iterator[tuple[str, ssl.SSLContext]]:
    """The address of a service behind nginx, and whom its certificate is from."""
    service = make_service(admin_token=TOKEN)
    certificate, key, port = tmp_path / "pem", tmp_path / "key", free_port()
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", *subject, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    (block,) = [block for block in blocks(ROOT / "docs" / "security.md") if block.language == "nginx"]
    text = block.text
    for there, here in (
        ("127.0.0.1:8077", service.url.removeprefix("http://")),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("server_name engram.example.org", "server_name localhost"),
        ("/etc/ssl/engram.example.org.pem", str(certificate)),
        ("/etc/ssl/private/engram.example.org.key", str(key)),
    ):
        assert text.count(there) == 1
        text = text.replace(there, here)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off;\npid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}\n{text}}}\n"
    )
    command = [str(NGINX), "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    server = subprocess.Popen(command)
    url, trusted = f"https://localhost:{port}", ssl.create_default_context(cafile=certificate)
    try:
        assert eventually(lambda: answers(url, trusted))
        yield url, trusted
    finally:
        server.terminate()
        server.wait()


def answers(url: str, trusted: ssl.SSLContext) -> bool:
    try:
        return httpx.get(f"{url}/healthz", verify=trusted).status_code == 200
    except httpx.TransportError:
        return False


def test_behind_the_proxy_of_the_page_uploads_draws_and_the_console_work(
    proxied: tuple[str, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, trusted = proxied
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pem"))
    with Client(url) as client, pytest.raises(Unauthorized):
        client.buffers()
    images = np.random.default_rng(1).integers(0, 256, (40, 16, 16, 3), np.uint8)
    with Client(url, token=TOKEN) as client:
        client.create_buffer("behind", budget_bytes=50_000)
        client.wait(client.upload("behind", 0, images, np.arange(40) % 2))
        assert len(client.draw("behind", 8, seed=1, step=0)) == 8
    page = httpx.get(f"{url}/console/login", verify=trusted)
    assert page.status_code == 200
    assert "Secure" in page.headers["Set-Cookie"]
    assert httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, verify=trusted).status_code == 403
    # What is sent in the clear to the port of TLS is refused.
    assert httpx.get(url.replace("https", "http") + "/healthz").status_code == 400
