"""What an ingester tells those who run it, on loopback: /metrics for Prometheus, /healthz, and /status for people."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ingestion.proxies import direct

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

ADDRESS_FILE = "address.json"

# name, in a feed's status, meaning
_COUNTERS = (
    ("frames", "frames received"),
    ("bytes", "bytes of frames received"),
    ("ticks", "ticks taken, backfilled ones too"),
    ("rejected", "frames that are no ticks"),
    ("connections", "connections made; all but the first are reconnects"),
    ("repeats", "trades that another connection had brought before"),
    ("backfilled", "missing ticks that the venue's history had"),
)
_GAUGES = (
    ("up", "1 while all that is followed has a connection"),
    ("sockets", "connections that are wanted"),
    ("sockets_up", "connections that are up"),
    ("quiet_seconds", "time since the last frame"),
    ("tickless_seconds", "time since the last tick"),
    ("undelivered_instruments", "instruments that are followed and of which no tick comes"),
    ("left_out", "instruments whose names the contract does not take"),
    ("gaps_open", "gaps that are reported and not filled"),
)
_TOTALS = (
    ("published", "messages that Kafka has acknowledged"),
    ("clock_steps", "times that the machine's clock was set"),
    ("clock_takeovers", "times that receipt times were moved to the machine's clock, after a step that lasted"),
    ("takeovers", "times that a fallback took over"),
)
_LEVELS = (
    ("undelivered", "messages in the spool that Kafka has not acknowledged"),
    ("spool_bytes", "size of the spool"),
    ("spool_full", "1 while the spool has no room and nothing is read"),
    ("spool_age_seconds", "age of the oldest message that Kafka has not acknowledged"),
    ("lag_seconds", "time from a frame's receipt to Kafka's acknowledgement, of the newest acknowledged"),
    ("memory_bytes", "resident memory"),
)


class _Status(Collector):
    """Prometheus's view of a status."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        for name, meaning in _TOTALS:
            yield CounterMetricFamily(f"tickhouse_{name}", meaning, value=status[name])
        for name, meaning in _LEVELS:
            yield GaugeMetricFamily(f"tickhouse_{name}", meaning, value=status[name])
        for kind, names in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, meaning in names:
                family = kind(f"tickhouse_{name}", meaning, labels=["feed"])
                for feed, figures in status["feeds"].items():
                    family.add_metric([feed], figures[name])
                yield family


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: who asks how we are is no news."""


class Operation:
    """A small web server in a thread of its own. `status` is asked from that thread, and must only read."""

    def __init__(self, port: int, status: Callable[[], dict[str, Any]], folder: Path) -> None:
        """Raises OSError if the port is taken. `folder` gets a file that says where to ask."""
        self._status = status
        registry = CollectorRegistry()
        registry.register(_Status(status))
        self._metrics = make_wsgi_app(registry)
        self._server: WSGIServer = make_server("127.0.0.1", port, self._answer, handler_class=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="operation", daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._file = folder / ADDRESS_FILE
        self._file.write_text(json.dumps({"pid": os.getpid(), "url": self.url}), encoding="utf-8")
        log.info("metrics at %s/metrics, health at %s/healthz", self.url, self.url)

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            page: Iterable[bytes] = self._metrics(environ, start)
            return page
        if path not in ("/healthz", "/status"):
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics, /healthz or /status\n"]
        status = self._status()
        code = "503 Service Unavailable" if path == "/healthz" and status["trouble"] else "200 OK"
        start(code, [("Content-Type", "application/json")])
        content = {name: status[name] for name in ("trouble", "notes")} if path == "/healthz" else status
        return [json.dumps(content).encode()]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._file.unlink(missing_ok=True)


def fetch_status(folder: Path) -> dict[str, Any] | None:
    """What the ingester with this spool says of itself; None where none runs."""
    try:
        url = json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8"))["url"]
        with direct().open(f"{url}/status", timeout=10) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except (FileNotFoundError, URLError, ConnectionError):
        return None


def format_status(status: dict[str, Any]) -> str:
    """A status for people."""
    lines = [
        "state      " + ("; ".join(status["trouble"]) or "healthy"),
        f"running    {status['seconds']:.0f} s, process {status['pid']}, producer {status['producer']}",
        f"kafka      {status['published']:,} messages acknowledged, {status['undelivered']:,} to go,"
        f" {status['lag_seconds'] * 1e3:.0f} ms behind",
        f"spool      {status['spool_bytes'] / 1e6:,.1f} MB, oldest {status['spool_age_seconds']:.1f} s"
        + (", full" if status["spool_full"] else ""),
        f"memory     {status['memory_bytes'] / 1e6:,.0f} MB",
    ]
    for name, feed in status["feeds"].items():
        up = "not connected"
        if feed["sockets_up"]:
            connected = f"{feed['sockets_up']} of {feed['sockets']} connections up"
            up = f"{connected}, last tick {feed['tickless_seconds']:.1f} s ago"
        lines.append(
            f"{name:<10} {up}; {feed['ticks']:,} ticks, {feed['rejected']:,} rejected,"
            f" {feed['connections']} connections, {feed['gaps_open']} gaps open, {feed['backfilled']:,} backfilled"
        )
    return "\n".join([*lines, *(f"note       {note}" for note in status["notes"])])
