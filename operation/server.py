"""The web server of a program: /metrics for Prometheus, /healthz, and /status for people and `scripts/status`.

It listens on loopback only, and answers requests for this machine only: a browser's page of another site that has its
name point to 127.0.0.1 sends that name as Host. A connection is a thread. A connection that is idle or slow is ended
after CONNECTION_SECONDS, and earlier if others need its place, so none of them delays an answer or the program's end.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from operation.addresses import own_address, remove_dead, run_file, write_address

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
CONNECTIONS = 16
"""From so many on, a new connection ends the oldest."""
CONNECTION_SECONDS = 10.0
LOOK_SECONDS = 0.25
"""The end of the program waits so long at most for the server."""

# When a counter began is nothing that anybody here asks for, and doubles the page.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Subject(Protocol):
    """A program as those who run it see it. The server's threads call these: they must only read."""

    def status(self) -> dict[str, Any]:
        """Figures for people, to be written as JSON. `trouble` lists what is wrong, in words; empty: healthy. `notes`,
        if there are any, list what is no reason to act at once."""

    def metrics(self, status: dict[str, Any]) -> Iterable[Metric]:
        """The same for Prometheus. status: what `status` has just returned."""


class Server(Collector):
    """Serves a program's figures from threads of its own until `close`."""

    def __init__(self, program: str, port: int, subject: Subject, state_dir: Path, *, or_any: bool = False) -> None:
        """Raises OSError if the port is taken.

        port: 0: any that is free. or_any: take any that is free, with a warning, if this one is taken.
        """
        self._program, self._subject = program, subject
        self._began = time.monotonic()
        self._process = psutil.Process()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._listener = _listener(port, self, or_any=or_any)
        self.url = f"http://{LOOPBACK}:{self._listener.server_address[1]}"
        self._files: list[Path] = []
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(LOOK_SECONDS,), name="operation", daemon=True
        )
        self._thread.start()
        with suppress(OSError):
            remove_dead(state_dir, program)
        self.announce(run_file(state_dir, program))
        log.info("metrics at %s/metrics, health at %s/healthz", self.url, self.url)

    def announce(self, path: Path) -> None:
        """Write a file that says where to ask; `close` removes it."""
        try:
            write_address(path, own_address(self._program, self.url))
        except OSError as error:
            log.warning("%s is not written, so scripts/status may not find this program: %s", path, error)
        else:
            self._files.append(path)

    def close(self) -> None:
        """End all connections, answered or not."""
        self._listener.shutdown()
        self._listener.hang_up_all()
        self._listener.server_close()
        self._thread.join()
        for path in self._files:
            path.unlink(missing_ok=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def status(self) -> dict[str, Any]:
        """What every program says, and what this one does."""
        common = {
            "program": self._program,
            "pid": self._process.pid,
            "seconds": time.monotonic() - self._began,
            "memory_bytes": self._process.memory_info().rss,
        }
        return common | self._subject.status()

    def collect(self) -> Iterator[Metric]:
        status = self.status()
        yield GaugeMetricFamily("tickhouse_healthy", "1 unless /healthz names trouble", int(not status["trouble"]))
        yield from self._subject.metrics(status)

    def answer(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        """HTTP status, content type and body of a page."""
        if path == "/metrics":
            encoder, kind = choose_encoder(accept)
            return HTTPStatus.OK, kind, encoder(self._registry)
        if path not in ("/healthz", "/status"):
            return HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /healthz or /status\n"
        status = self.status()
        if path == "/status":
            return HTTPStatus.OK, "application/json", json.dumps(status).encode()
        code = HTTPStatus.SERVICE_UNAVAILABLE if status["trouble"] else HTTPStatus.OK
        told = {name: status[name] for name in ("trouble", "notes") if name in status}
        return code, "application/json", json.dumps(told).encode()


def _listener(port: int, server: Server, *, or_any: bool) -> _Listener:
    try:
        return _Listener(port, server)
    except OSError as error:
        if not or_any:
            raise
        log.warning("port %d for metrics: %s; another one is taken", port, error)
        return _Listener(0, server)


class _Listener(ThreadingTCPServer):
    """Accepts connections, and ends those that take too long or another's place."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4 * CONNECTIONS

    def __init__(self, port: int, answering: Server) -> None:
        # Connections that have a thread, oldest first: since when, and whether the thread is still waited for.
        self._began: dict[socket.socket, float] = {}
        self._ended: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.answering = answering
        super().__init__((LOOPBACK, port), _Request)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Make room for a connection. There is none if as many again were ended, and their threads have not."""
        with self._lock:
            if len(self._began) >= 2 * CONNECTIONS:
                return False
            waiting = [each for each in self._began if each not in self._ended]
            if len(waiting) >= CONNECTIONS:
                self._hang_up(waiting[0])
            self._began[request] = time.monotonic()
        return True

    def service_actions(self) -> None:
        long_ago = time.monotonic() - CONNECTION_SECONDS
        with self._lock:
            for connection in [each for each, began in self._began.items() if began < long_ago]:
                self._hang_up(connection)

    def hang_up_all(self) -> None:
        with self._lock:
            for connection in self._began:
                self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        """Let the connection's thread read the end and close it. Only under the lock: the thread has not closed it."""
        self._ended.add(connection)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._began.pop(request, None)
            self._ended.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: the other side has gone, or was hung up on. `_Request` reports our own errors."""


class _Request(BaseHTTPRequestHandler):
    """One request; the connection ends with its answer."""

    server: _Listener
    server_version, sys_version = "tickhouse", ""

    def do_GET(self) -> None:
        try:
            code, kind, body = self._answer()
        except Exception:
            log.exception("%s: no answer", urlsplit(self.path).path)
            code, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"the program's log says why\n"
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        # No other site's page may have it as a script, a picture or a frame.
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def _answer(self) -> tuple[HTTPStatus, str, bytes]:
        for host in self.headers.get_all("Host", []):
            if host.strip().lower().partition(":")[0] not in HOSTS:
                text = f"ask for {' or '.join(HOSTS)}, with any port\n"
                return HTTPStatus.MISDIRECTED_REQUEST, "text/plain", text.encode()
        return self.server.answering.answer(urlsplit(self.path).path, self.headers.get("Accept", ""))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: who asks how we are is no news."""
