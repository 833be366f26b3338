"""What alerting tells those who run it (operation/server.py): unhealthy while it is behind Kafka, or cannot see it.

A process that stands by is not behind: the one that reads is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from conf.one_reader import STANDS_BY
from conf.settings import Settings
from lake.gold.alerts import Alert
from operation.lag import KafkaLag, lag_metrics

READER = "alerting"
_COUNTERS = (
    ("records", "Kafka records read"),
    ("send_errors", "alerts that Kafka did not take, and that are sent again"),
)


class Figures:
    """What alerting has done since it started. One thread writes, others read."""

    def __init__(self, settings: Settings, group: str) -> None:
        """group: that of the consumer."""
        self._records = self._opened = self._closed = self._send_errors = 0
        # Kafka's time of the last record read, in Unix seconds.
        self._last_record: float | None = None
        # Whether another process reads the ticks.
        self.stands_by = False
        self.lag = KafkaLag(
            settings.kafka_bootstrap_servers,
            [settings.ticks_topic],
            settings.stream_stale_seconds,
            group=group,
        )

    def read(self, records: Sequence[Any]) -> None:
        """Records of a partition were read."""
        self._last_record = records[-1].timestamp / 1_000
        self._records += len(records)

    def raised(self, alert: Alert) -> None:
        """An episode opened or closed."""
        self._opened += alert.closed_at is None
        self._closed += alert.closed_at is not None

    def failed(self, alerts: int) -> None:
        """Kafka did not take so many alerts, as far as is known."""
        self._send_errors += alerts

    def status(self) -> dict[str, Any]:
        last = self._last_record
        return {
            "trouble": self.lag.trouble(is_reader=not self.stands_by),
            "notes": [STANDS_BY] if self.stands_by else [],
            "stands_by": int(self.stands_by),
            "records": self._records,
            "opened": self._opened,
            "closed": self._closed,
            "send_errors": self._send_errors,
            "last_record_timestamp_seconds": last,
            "lag_records": self.lag.total,
            "stale_records": self.lag.stale_total,
        }

    def metrics(self, status: dict[str, Any]) -> Iterator[Metric]:
        for name, meaning in _COUNTERS:
            yield CounterMetricFamily(f"tickhouse_alerting_{name}", meaning, value=status[name])
        alerts = CounterMetricFamily("tickhouse_alerting_alerts", "alerts by what happened", labels=["change"])
        for change in ("opened", "closed"):
            alerts.add_metric([change], status[change])
        yield alerts
        yield GaugeMetricFamily(
            "tickhouse_alerting_stands_by", "1 while another process reads", value=status["stands_by"]
        )
        if (last := status["last_record_timestamp_seconds"]) is not None:
            name, meaning = "tickhouse_alerting_last_record_timestamp_seconds", "Kafka's time of the last record read"
            yield GaugeMetricFamily(name, meaning, value=last)
        yield from lag_metrics({READER: self.lag})
