"""What an ingester tells those who run it (operation/server.py), for Prometheus and for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from operation.addresses import ask, read_address

ADDRESS_FILE = "address.json"
"""In the spool's folder: `python -m ingestion status` asks the ingester of a spool."""

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
)


class Subject:
    """An ingester for operation.server.Server. status: its own figures."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self.status = status

    def metrics(self, status: dict[str, Any]) -> Iterator[Metric]:
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


def fetch_status(folder: Path) -> dict[str, Any] | None:
    """What the ingester with this spool says of itself; None where none runs."""
    address = read_address(folder / ADDRESS_FILE)
    if address is None:
        return None
    try:
        _, content = ask(f"{address.url}/status", 10)
        status: dict[str, Any] = json.loads(content)
        return status
    except (OSError, ValueError):
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
