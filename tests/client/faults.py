"""A proxy in front of a real service that breaks requests and answers on command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx

Fault = Literal["busy", "limited", "hang up", "lose the answer", "cut the answer", "gateway", "hold"]


class FaultyProxy:
    """Forwards requests to a service, except that the next ones meet `faults`, in order.

    `busy` answers 503 with a problem, `limited` 429 with `retry_after`, `gateway` 502 without a problem; `hang up`
    closes the connection before the service hears of it, `lose the answer` after; `cut the answer` breaks off half-way.
    `hold` sets `holds` and forwards the request once `release` is set. To pass for another version's service, it states
    `api_number` if that is given (empty: none), and sends `change` of what the service answered.
    """

    def __init__(self, target: str, *faults: Fault | None, retry_after: str = "0") -> None:
        self.faults = list(faults)
        self.retry_after = retry_after
        self.api_number: str | None = None
        self.change: Callable[[bytes], bytes] = lambda content: content
        self.requests = 0
        self.connections = 0
        self.holds, self.release = threading.Event(), threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                proxy.connections += 1
                super().setup()

            def handle_any(self) -> None:
                proxy.requests += 1
                fault = proxy.faults.pop(0) if proxy.faults else None
                body = self.body()
                if fault == "hang up":
                    self.close_connection = True
                elif fault in ("busy", "limited", "gateway"):
                    self.refuse(fault)
                else:
                    if fault == "hold":
                        proxy.holds.set()
                        proxy.release.wait()
                    self.forward(body, fault)

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def refuse(self, fault: Fault) -> None:
                status = {"busy": 503, "limited": 429}.get(fault, 502)
                slug = {"busy": "unavailable", "limited": "rate-limited"}.get(fault)
                content = (
                    b"bad gateway" if slug is None else b'{"type": "https://engram.dev/problems/%s"}' % slug.encode()
                )
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if slug is None else "application/problem+json")
                self.send_header("Content-Length", str(len(content)))
                if slug is not None:
                    self.send_header("Retry-After", proxy.retry_after)
                self.end_headers()
                self.wfile.write(content)

            def forward(self, body: bytes, fault: Fault | None) -> None:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "transfer-encoding")}
                answer = httpx.request(self.command, target + self.path, headers=headers, content=body, timeout=60)
                if fault == "lose the answer":
                    self.close_connection = True
                    return
                self.send_response(answer.status_code)
                for name in ("Content-Type", "ETag"):
                    if name in answer.headers:
                        self.send_header(name, answer.headers[name])
                number = answer.headers["Engram-API"] if proxy.api_number is None else proxy.api_number
                if number:
                    self.send_header("Engram-API", number)
                content = proxy.change(answer.content)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                half = len(content) // 2
                self.wfile.write(content[:half] if fault == "cut the answer" else content)
                self.close_connection = fault == "cut the answer"

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def faulty(target: str, *faults: Fault | None, retry_after: str = "0") -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target, *faults, retry_after=retry_after)
    try:
        yield proxy
    finally:
        proxy.stop()
