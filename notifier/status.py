"""What the notifier tells those who run it (operation/server.py): unhealthy while alerts wait for too long.

It says nothing of the alerts' content, and nothing that the other side of a channel wrote. Where another notifier sends
a channel's alerts, this one stands by, and what waits is not its trouble.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from conf.one_reader import STANDS_BY
from conf.settings import Settings
from operation.lag import KafkaLag, lag_metrics

_OUTCOMES = ("sent", "refused", "stale", "skipped")


@dataclass
class Figures:
    """A channel since the start. Its thread writes, others read.

    sent: alerts that the other side has accepted. refused: those that it never will. stale: those given up, as no
    news any more. skipped: records that are no alerts, or that an error of ours kept from being sent. failed: attempts
    that may succeed later. last_error: of the last failed attempt, without secrets.
    """

    sent: int = 0
    refused: int = 0
    stale: int = 0
    skipped: int = 0
    failed: int = 0
    # When the alert that is being sent opened; None while none is.
    sending: datetime | None = None
    last_error: str | None = None
    # Whether another notifier sends the channel's alerts.
    stands_by: bool = False

    @property
    def waiting_seconds(self) -> float:
        """The age of the alert that is being sent, the oldest one that waits; 0 while none is."""
        sending = self.sending
        return 0.0 if sending is None else max(0.0, (datetime.now(UTC) - sending).total_seconds())


class Subject:
    """The notifier's channels by name, each with its consumer group, for operation.server.Server."""

    def __init__(self, settings: Settings, channels: Mapping[str, tuple[Figures, str]]) -> None:
        self._figures = {name: figures for name, (figures, _) in channels.items()}
        servers, topic, stale_seconds = (
            settings.kafka_bootstrap_servers,
            settings.alerts_topic,
            settings.stream_stale_seconds,
        )
        self.lags = {
            name: KafkaLag(servers, [topic], stale_seconds, group=group) for name, (_, group) in channels.items()
        }

    def status(self) -> dict[str, Any]:
        return {
            "trouble": [trouble for name in self._figures for trouble in self._trouble(name)],
            "notes": [f"{name}: {STANDS_BY}" for name, figures in self._figures.items() if figures.stands_by],
            "channels": {
                name: {
                    **{outcome: getattr(figures, outcome) for outcome in _OUTCOMES},
                    "failed": figures.failed,
                    "waiting": self.lags[name].total,
                    "waiting_seconds": figures.waiting_seconds,
                    "last_error": figures.last_error,
                    "stands_by": int(figures.stands_by),
                }
                for name, figures in self._figures.items()
            },
        }

    def _trouble(self, name: str) -> list[str]:
        figures = self._figures[name]
        error = f"; last error: {figures.last_error}" if figures.last_error else ""
        return [f"{name}: {trouble}{error}" for trouble in self.lags[name].trouble(is_reader=not figures.stands_by)]

    def metrics(self, status: dict[str, Any]) -> Iterator[Metric]:
        channels = status["channels"]
        alerts = CounterMetricFamily(
            "tickhouse_notifier_alerts", "alerts by what became of them", labels=["channel", "outcome"]
        )
        failed = CounterMetricFamily("tickhouse_notifier_failed_attempts", "attempts that failed", labels=["channel"])
        waiting = GaugeMetricFamily(
            "tickhouse_notifier_waiting_seconds", "age of the oldest alert that waits", labels=["channel"]
        )
        stands_by = GaugeMetricFamily(
            "tickhouse_notifier_stands_by", "1 while another notifier sends", labels=["channel"]
        )
        for name, figures in channels.items():
            for outcome in _OUTCOMES:
                alerts.add_metric([name, outcome], figures[outcome])
            failed.add_metric([name], figures["failed"])
            waiting.add_metric([name], figures["waiting_seconds"])
            stands_by.add_metric([name], figures["stands_by"])
        yield from (alerts, failed, waiting, stands_by)
        yield from lag_metrics(self.lags)
