"""Deliver the alerts of topic `alerts` through one channel, each once, until they are stale.

The order is: send, write the id to disk, commit the offset. So an alert that the channel accepts within
alert_stale_seconds is delivered at least once. It is delivered twice only if the program dies between sending and
writing the id, or if the channel's answer is lost. Each channel has its own consumer group, so a failing channel does
not delay the others. A second notifier elsewhere stands by, and takes over when the first ends.

An error that we did not foresee ends nothing. In sending, it counts as a failed attempt, and after three such attempts
the alert is passed over. Anywhere else, the channel reads on from the last committed offset.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from kafka.errors import KafkaError
from tenacity import (
    RetryCallState,
    Retrying,
    sleep_using_event,
    stop_any,
    stop_before_delay,
    stop_when_event_set,
    wait_exponential_jitter,
)

from conf.one_reader import OneReader
from conf.text import shown
from notifier.alerts import Alert, NotAnAlert
from notifier.channels import TIMEOUT_SECONDS, Channel, NotNow, Refused
from notifier.status import Figures

if TYPE_CHECKING:
    from kafka.consumer.fetcher import ConsumerRecord

    from conf.settings import Settings
    from notifier.sent_alerts import SentAlerts

log = logging.getLogger(__name__)

POLL_MS = 500
RECONNECT_MS = 2_000
AT_ONCE = 50
KAFKA_AGAIN_SECONDS = 1.0
SAY_AGAIN_SECONDS = 10.0
UNFORESEEN_ATTEMPTS = 3
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
        """Deliver alerts until `stop` is set. No error of one channel may end another: it raises none."""
        try:
            while not self._stop.is_set():
                try:
                    with closing(self._reader()) as reader:
                        self._follow(reader)
                except KafkaError as error:
                    self._complain(error)
                    self._stop.wait(KAFKA_AGAIN_SECONDS)
                except Exception as error:  # noqa: BLE001 - see the module's docstring
                    log.error("%s: %s; reads on at the last committed offset", self._channel.name, _internal(error))
                    self._stop.wait(SAY_AGAIN_SECONDS)
        finally:
            self._channel.close()

    def _reader(self) -> OneReader:
        topic = self._settings.alerts_topic
        # We do not poll while a channel fails; the group must not take us for dead meanwhile.
        longest = self._settings.alert_stale_seconds + (AT_ONCE + 2) * TIMEOUT_SECONDS
        options = {
            "max_poll_interval_ms": round(longest * 1_000),
            "reconnect_backoff_max_ms": RECONNECT_MS,
            # Alerting commits an alert or takes it back.
            "isolation_level": "read_committed",
        }
        return OneReader(self._settings.kafka_bootstrap_servers, topic, self.group, options)

    def _follow(self, reader: OneReader) -> None:
        while not self._stop.is_set():
            polled = reader.poll(POLL_MS, AT_ONCE)
            self.figures.stands_by = reader.stands_by
            if reader.is_new:
                # Old alerts are not sent and those that were sent are known, so reading too much does no harm.
                reader.start(
                    {
                        partition: place.begin if place.offset is None or place.is_lost else place.offset
                        for partition, place in reader.stored().items()
                    }
                )
            for records in polled.values():
                for record in records:
                    if not self.handle(record):
                        return
            if reader.has_moved:
                reader.commit()

    def handle(self, record: ConsumerRecord) -> bool:
        """Deliver a record's alert. Returns whether the record is done; False if the program stops first."""
        try:
            return self._deliver(Alert.read(record.value))
        except NotAnAlert as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            if self._stop.is_set():
                return False
            reason = _internal(error)
        self.figures.skipped += 1
        place = f"{record.topic}, partition {record.partition}, offset {record.offset}"
        start = shown(record.value, 100)
        skipped = self.figures.skipped
        log.warning("%s: skipped %s: %s (%d so far): %s", self._channel.name, place, reason, skipped, start)
        return True

    def _deliver(self, alert: Alert) -> bool:
        """Send an alert. Returns whether it is done, as `handle` does."""
        left = min(self._stale - (self._now() - alert.opened_at), self._stale)
        if alert.alert_id in self._sent_alerts or left <= timedelta(0):
            return True
        sending = Retrying(
            retry=_may_help,
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
        error = _error(state)
        reason = str(error) if isinstance(error, NotNow) or error is None else _internal(error)
        self.figures.failed += 1
        self.figures.last_error = reason
        log.warning("%s: %s; again in %.0f s", self._channel.name, reason, state.upcoming_sleep)

    def _complain(self, error: KafkaError) -> None:
        if time.monotonic() - self._complained >= SAY_AGAIN_SECONDS:
            log.warning("%s: Kafka: %s", self._channel.name, type(error).__name__)
            self._complained = time.monotonic()


def _internal(error: BaseException) -> str:
    """An unforeseen error's type and place. Not its message, which may hold a secret or text from the other side."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"internal error {type(error).__name__} at {places}"


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _may_help(state: RetryCallState) -> bool:
    """Whether another attempt may help."""
    error = _error(state)
    if error is None or isinstance(error, Refused) or not isinstance(error, Exception):
        return False
    return isinstance(error, NotNow) or state.attempt_number < UNFORESEEN_ATTEMPTS


def _wait(state: RetryCallState) -> float:
    error = _error(state)
    return max(_backoff(state), error.wait if isinstance(error, NotNow) else 0.0)
