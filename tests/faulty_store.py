"""A store of this machine that fails as it is told to: a proxy before a real S3 server."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """What happens to a request instead of, or before, its answer."""

    status: int = 0
    """Answered with this and no more."""
    delay_seconds: float = 0.0
    body_bytes: int | None = None
    """How much of the answer's body comes before `end`."""
    end: str = "reset"
    """How it ends there: reset, close or hang."""


@dataclass
class Proxy:
    """Passes requests on to a server on this machine; GET requests meet the faults in order, one each."""

    upstream: int
    port: int = 0
    faults: deque[Fault] = field(default_factory=deque)
    forever: Fault | None = None
    """What happens to all GET requests when there are no other faults."""
    gets: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    """Set to end what hangs."""

    def behave(self) -> None:
        """No faults from here on."""
        self.over.set()
        self.over = threading.Event()
        self.faults.clear()
        self.forever = None
        self.gets = 0


@contextmanager
def proxy_of(upstream: int) -> Iterator[Proxy]:
    proxy = Proxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._pass_on(None)

        def do_GET(self) -> None:
            proxy.gets += 1
            self._pass_on(proxy.faults.popleft() if proxy.faults else proxy.forever)

        def _pass_on(self, fault: Fault | None) -> None:
            if fault:
                time.sleep(fault.delay_seconds)
            if fault and fault.status:
                self.send_response(fault.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = HTTPConnection("127.0.0.1", proxy.upstream)
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in (
                    "connection",
                    "transfer-encoding",
                    "date",
                    "server",
                    "content-length",
                ):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") or str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            if fault is None or fault.body_bytes is None:
                self.wfile.write(body)
                return
            self.wfile.write(body[: fault.body_bytes])
            self.wfile.flush()
            if fault.end == "hang":
                proxy.over.wait()
            if fault.end == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def shutdown_request(self, request: object) -> None:
            self.close_request(request)  # type: ignore[arg-type]  # no FIN first, a reset stays one

    server = Server(("127.0.0.1", 0), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        server.shutdown()
        server.server_close()
