"""Deliver the alerts of topic `alerts` through one channel, each once, until they are stale.

The order is: send, write the id to disk, commit the offset. So an alert that the channel accepts within
alert_stale_seconds is delivered at least once. It is delivered twice only if the program dies between sending and
writing the id, or if the channel's answer is lost. Each channel has its own consumer group, so a failing channel does
not delay the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from kafka import KafkaConsumer
from kafka.errors import KafkaError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_any,
    stop_before_delay,
    stop_when_event_set,
    wait_exponential_jitter,
)

from notifier.alerts import Alert, NotAnAlert
from notifier.channels import TIMEOUT_SECONDS, Channel, NotNow, Refused
from notifier.status import Figures

if TYPE_CHECKING:
    from kafka.consumer.fetcher import ConsumerRecord

    from conf.settings import Settings
    from notifier.sent_alerts import SentAlerts

log = logging.getLogger(__name__)

POLL_MS = 500
KAFKA_MS = 5_000
METADATA_MS = 5_000
RECONNECT_MS = 2_000
# After a kill the next start waits so long for the partitions.
SESSION_MS = 10_000
AT_ONCE = 50
KAFKA_AGAIN_SECONDS = 1.0
SAY_AGAIN_SECONDS = 10.0
_backoff = wait_exponential_jitter(initial=1, max=10, jitter=1)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Delivery:
    """The delivery of alerts through one channel."""

    def __init__(
        self,
        settings: Settings,
        channel: Channel,
        sent_alerts: SentAlerts,
        stop: threading.Event,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._settings = settings
        self._channel = channel
        self._sent_alerts = sent_alerts
        self._stop = stop
        self._now = now
        self._stale = timedelta(seconds=settings.alert_stale_seconds)
        self._complained = -SAY_AGAIN_SECONDS
        self.figures = Figures()
        self.group = f"notifier-{channel.name}-{settings.alerts_topic}"

    def run(self) -> None:
        """Deliver alerts until `stop` is set."""
        try:
            while not self._stop.is_set():
                try:
                    with self._consumer() as consumer:
                        self._follow(consumer)
                except KafkaError as error:
                    self._complain(error)
                    self._stop.wait(KAFKA_AGAIN_SECONDS)
        finally:
            self._channel.close()

    @contextmanager
    def _consumer(self) -> Iterator[KafkaConsumer]:
        topic = self._settings.alerts_topic
        # We do not poll while a channel fails; the group must not take us for dead meanwhile.
        longest = self._settings.alert_stale_seconds + (AT_ONCE + 2) * TIMEOUT_SECONDS
        consumer = KafkaConsumer(
            topic,
            bootstrap_servers=self._settings.kafka_bootstrap_servers,
            group_id=self.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # The topic's writer decides its number of partitions.
            allow_auto_create_topics=False,
            metadata_max_age_ms=METADATA_MS,
            session_timeout_ms=SESSION_MS,
            max_poll_interval_ms=round(longest * 1_000),
            bootstrap_timeout_ms=KAFKA_MS,
            reconnect_backoff_max_ms=RECONNECT_MS,
        )
        try:
            yield consumer
        finally:
            consumer.close(timeout_ms=KAFKA_MS)

    def _follow(self, consumer: KafkaConsumer) -> None:
        while not self._stop.is_set():
            polled = consumer.poll(timeout_ms=POLL_MS, max_records=AT_ONCE)
            for records in polled.values():
                for record in records:
                    if not self.handle(record):
                        return
            if polled:
                consumer.commit(timeout_ms=KAFKA_MS)

    def handle(self, record: ConsumerRecord) -> bool:
        """Deliver a record's alert. Returns whether the record is done; False if the program stops first."""
        try:
            alert = Alert.read(record.value)
        except NotAnAlert as error:
            place = f"{record.topic}, partition {record.partition}, offset {record.offset}"
            log.warning("%s: skipped %s: %s", self._channel.name, place, error)
            return True
        left = min(self._stale - (self._now() - alert.opened_at), self._stale)
        if alert.alert_id in self._sent_alerts or left <= timedelta(0):
            return True
        sending = Retrying(
            retry=retry_if_exception_type(NotNow),
            wait=_wait,
            stop=stop_any(stop_when_event_set(self._stop), stop_before_delay(left)),
            sleep=sleep_using_event(self._stop),
            before_sleep=self._failed,
            reraise=True,
        )
        self.figures.sending = alert.opened_at
        try:
            sending(self._channel.send, alert)
        except NotNow as error:
            if self._stop.is_set():
                return False
            self.figures.stale += 1
            log.error("%s: gave up %s: %s, and it is no news any more", self._channel.name, alert.alert_id, error)
        except Refused as error:
            self.figures.refused += 1
            self.figures.last_error = str(error)
            log.error("%s: refused %s: %s", self._channel.name, alert.alert_id, error)
        else:
            self.figures.sent += 1
            log.info("%s: told of %s", self._channel.name, alert.alert_id)
        finally:
            self.figures.sending = None
        try:
            self._sent_alerts.add(alert.alert_id)
        except OSError as error:
            log.error("%s: cannot remember %s after a restart: %s", self._channel.name, alert.alert_id, error)
        return True

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.figures.failed += 1
        self.figures.last_error = str(error)
        log.warning("%s: %s; again in %.0f s", self._channel.name, error, state.upcoming_sleep)

    def _complain(self, error: KafkaError) -> None:
        if time.monotonic() - self._complained >= SAY_AGAIN_SECONDS:
            log.warning("%s: Kafka: %s", self._channel.name, type(error).__name__)
            self._complained = time.monotonic()


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(_backoff(state), error.wait if isinstance(error, NotNow) else 0.0)
