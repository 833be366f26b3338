"""What the notifier tells those who run it (operation/server.py): unhealthy while alerts wait for too long.

It says nothing of the alerts' content, and nothing that the other side of a channel wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from conf.settings import Settings
from operation.lag import KafkaLag, lag_metrics

_OUTCOMES = ("sent", "refused", "stale")


@dataclass
class Figures:
    """A channel since the start. Its thread writes, others read.

    sent: alerts that the other side has accepted. refused: those that it never will. stale: those given up, as no
    news any more. failed: attempts that may succeed later. last_error: of the last failed attempt, without secrets.
    """

    sent: int = 0
    refused: int = 0
    stale: int = 0
    failed: int = 0
    # When the alert that is being sent opened; None while none is.
    sending: datetime | None = None
    last_error: str | None = None

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
            "channels": {
                name: {
                    **{outcome: getattr(figures, outcome) for outcome in _OUTCOMES},
                    "failed": figures.failed,
                    "waiting": self.lags[name].total,
                    "waiting_seconds": figures.waiting_seconds,
                    "last_error": figures.last_error,
                }
                for name, figures in self._figures.items()
            },
        }

    def _trouble(self, name: str) -> list[str]:
        error = self._figures[name].last_error
        return [
            f"{name}: {trouble}" + (f"; last error: {error}" if error else "") for trouble in self.lags[name].trouble()
        ]

    def metrics(self, status: dict[str, Any]) -> Iterator[Metric]:
        channels = status["channels"]
        alerts = CounterMetricFamily(
            "tickhouse_notifier_alerts", "alerts by what became of them", labels=["channel", "outcome"]
        )
        failed = CounterMetricFamily("tickhouse_notifier_failed_attempts", "attempts that failed", labels=["channel"])
        waiting = GaugeMetricFamily(
            "tickhouse_notifier_waiting_seconds", "age of the oldest alert that waits", labels=["channel"]
        )
        for name, figures in channels.items():
            for outcome in _OUTCOMES:
                alerts.add_metric([name, outcome], figures[outcome])
            failed.add_metric([name], figures["failed"])
            waiting.add_metric([name], figures["waiting_seconds"])
        yield from (alerts, failed, waiting)
        yield from lag_metrics(self.lags)
