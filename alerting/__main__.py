"""Raise alerts from Kafka's topic of ticks: to topic `alerts`, and as a line of JSON each to standard output.

    python -m alerting

The rule is that of gold.alerts (lake/gold/alerts.py), tick by tick as they come, so an alert is out within milliseconds
and waits for no table. gold.alerts is exact: it includes late ticks, which are skipped here. A row is sent when an
episode opens and when it closes, at least once, under the same alert_id.

It resumes at its committed offsets, after reading the LOOK_BACK_SECONDS before to find the open episodes. A second
process with the same topics stands by, and takes over when the first ends. Who reads only committed records of topic
`alerts` sees each row once.

Exit codes: 0 ended by SIGINT or SIGTERM, 2 a wrong setting.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Context, Decimal
from typing import Any

from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.errors import KafkaError, TopicAlreadyExistsError

from alerting.status import Figures
from conf.logs import set_up_logging
from conf.one_reader import OneReader
from conf.settings import Settings, arguments, from_command_line
from lake.contract import Pair, TickRules, feeds
from lake.gold.alerts import Alert, AlertTick, Episodes, alert_row
from lake.rules import AlertRule, gold_rules, tick_rules
from lake.silver.judge import Tick, judge
from lake.tables import GOLD_ALERTS
from operation.server import Server

logger = logging.getLogger("alerting")

LOOK_BACK_SECONDS = 600
POLL_MS = 50
COMMIT_SECONDS = 5
# Readers of committed records wait so long for a transaction of a process that has died, if nobody takes over.
TRANSACTION_MS = 10_000
CLOSE_SECONDS = 5
# Prices have up to 28 digits, which must not be rounded.
_EXACT = Context(prec=40)


@dataclass
class Watch:
    """The episodes of all pairs."""

    rule: AlertRule
    symbols: dict[str, str] = field(default_factory=dict)
    quotes: dict[str, str] = field(default_factory=dict)
    late: int = 0
    _episodes: dict[Pair, tuple[Episodes, int]] = field(default_factory=dict)

    def add(self, tick: Tick) -> Alert | None:
        """The episode that the tick opens or closes, if any."""
        pair = (tick.source, tick.asset)
        if not feeds(self.symbols, self.quotes, pair, tick.symbol, tick.quote):
            return None
        gold_time = tick.gold_time
        episodes, newest = self._episodes.get(pair) or (Episodes(pair, self.rule), gold_time)
        if gold_time < newest:
            self.late += 1
            return None
        self._episodes[pair] = (episodes, gold_time)
        was_open = episodes.open is not None
        changed = episodes.add(AlertTick(gold_time, tick.price_usd, tick.event_id))
        return changed if changed and (not was_open or changed.closed_at is not None) else None


def message(alert: Alert, rule: AlertRule, now: datetime) -> bytes:
    """The row of gold.alerts as JSON."""
    row = dict(zip(GOLD_ALERTS.column_names, alert_row(alert, rule, now), strict=True))
    return json.dumps(row, default=_json_value, separators=(",", ":")).encode()


def _json_value(value: datetime | Decimal) -> str:
    """A time with microseconds; a price with all its digits, without trailing zeros."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds")
    return f"{value.normalize(_EXACT):f}"


@dataclass
class Alerting:
    """Reads ticks and sends alerts; Kafka commits an alert together with how far the ticks were read.

    `known`: whether this process has read ticks before, so that a group without offsets is one that has lost them.
    """

    settings: Settings
    tell: Callable[[str], None]
    figures: Figures
    known: bool = False

    def run(self, stop: threading.Event) -> None:
        """Raise alerts until `stop` is set. Raises KafkaError if Kafka fails, or another process took over."""
        settings = self.settings
        create_topic(settings)
        servers, group = settings.kafka_bootstrap_servers, group_of(settings)
        options = {"fetch_max_wait_ms": POLL_MS, "reconnect_backoff_max_ms": 2_000}
        with ExitStack() as open_clients:
            reader = OneReader(servers, settings.ticks_topic, group, options)
            open_clients.callback(reader.close)
            while not stop.is_set():
                reader.poll(POLL_MS)
                self.figures.stands_by = reader.stands_by
                if reader.is_new:
                    with sender(servers, group) as producer:
                        self._read(reader, producer, stop)

    def _read(self, reader: OneReader, producer: KafkaProducer, stop: threading.Event) -> None:
        """Read from where the group stopped, until `stop` is set or the partitions are others."""
        rules, rules_of_ticks = gold_rules(self.settings), tick_rules(self.settings)
        state = Watch(rules.alerts, dict(rules.symbols), dict(rules.quotes))
        resumes = self._resume(reader)
        committed_at = 0.0
        while not stop.is_set():
            raised: list[tuple[Alert, str]] = []
            rows: list[tuple[bytes, bytes]] = []
            for partition, records in reader.poll(POLL_MS).items():
                self.figures.read(records)
                for record in records:
                    alert = alert_in(record, state, rules_of_ticks, datetime.now(UTC))
                    if alert is None or record.offset < resumes[partition]:
                        continue
                    value = message(alert, rules.alerts, datetime.now(UTC))
                    raised.append((alert, value.decode()))
                    if time.time() - alert.opened_at / 1e6 <= self.settings.alert_stale_seconds or alert.closed_at:
                        rows.append((":".join(alert.pair).encode(), value))
            if reader.is_new or not reader.consumer.assignment():
                return
            if rows or time.monotonic() - committed_at > COMMIT_SECONDS:
                self._commit(reader, producer, rows, resumes)
                committed_at = time.monotonic()
            for alert, line in raised:
                self.figures.raised(alert)
                self.tell(line)

    def _commit(
        self,
        reader: OneReader,
        producer: KafkaProducer,
        rows: list[tuple[bytes, bytes]],
        resumes: dict[TopicPartition, int],
    ) -> None:
        """Send alerts, and store how far the ticks were read: both or neither."""
        positions = reader.positions()
        # Do not commit an offset before those where it resumed.
        offsets = {
            partition: at if at.offset >= resumes[partition] else at._replace(offset=resumes[partition])
            for partition, at in positions.items()
        }
        try:
            producer.begin_transaction()
            deliveries = [producer.send(self.settings.alerts_topic, value, key=key) for key, value in rows]
            producer.send_offsets_to_transaction(offsets, reader.consumer.group_metadata())
            producer.commit_transaction()
            for delivery in deliveries:
                delivery.get(timeout=30)
        except KafkaError:
            self.figures.failed(len(rows))
            raise

    def _resume(self, reader: OneReader) -> dict[TopicPartition, int]:
        """Seek to LOOK_BACK_SECONDS before the stored offsets. Returns the offsets from which alerts are sent.

        What is stored is of no use if the topic was made anew, or has lost records. Then alerts are sent for the ticks
        that Kafka took while an alert of theirs would still be news: none is missed, and none is stale.
        """
        consumer, stored = reader.consumer, reader.stored()
        now = time.time()
        earlier = consumer.offsets_for_times(dict.fromkeys(stored, int((now - LOOK_BACK_SECONDS) * 1_000)))
        news = consumer.offsets_for_times(dict.fromkeys(stored, int((now - self.settings.alert_stale_seconds) * 1_000)))
        # On the first start, send no alerts for the past; gold.alerts has them.
        is_first = not self.known and all(place.offset is None for place in stored.values())
        resumes, begins = {}, {}
        for partition, place in stored.items():
            fresh = news[partition].offset if news.get(partition) else place.end
            resumes[partition] = place.offset if place.offset is not None and not place.is_lost else fresh
            if is_first:
                resumes[partition] = place.end
            look_back = earlier[partition].offset if earlier.get(partition) else place.end
            begins[partition] = min(resumes[partition], look_back)
            logger.info(
                "partition %d: reads on at %d, looks back to %d",
                partition.partition,
                resumes[partition],
                begins[partition],
            )
        reader.start(begins)
        self.known = True
        logger.info("watching topic %s for topic %s", self.settings.ticks_topic, self.settings.alerts_topic)
        return resumes


def group_of(settings: Settings) -> str:
    """The consumer group."""
    return f"{settings.alerts_topic}-of-{settings.ticks_topic}"


@contextmanager
def sender(servers: str, group: str) -> Iterator[KafkaProducer]:
    """A producer of transactions. Kafka takes no further ones of a process that had the group's partitions before."""
    producer = KafkaProducer(
        bootstrap_servers=servers,
        acks="all",
        enable_idempotence=True,
        transactional_id=group,
        transaction_timeout_ms=TRANSACTION_MS,
        max_block_ms=TRANSACTION_MS,
    )
    try:
        producer.init_transactions()
        yield producer
    finally:
        producer.close(timeout=CLOSE_SECONDS)


def create_topic(settings: Settings) -> None:
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    try:
        # -1: as many replicas as the broker's default.
        options = {"num_partitions": settings.kafka_partitions, "replication_factor": -1}
        admin.create_topics({settings.alerts_topic: options})
    except TopicAlreadyExistsError:
        pass
    finally:
        admin.close()


def alert_in(record: Any, state: Watch, rules: TickRules, now: datetime) -> Alert | None:
    """The alert that a Kafka record opens or closes. Invalid records are skipped; silver.quarantine has the reason."""
    tick = judge(record.value, record.topic, record.partition, record.offset, now, rules)
    return state.add(tick) if isinstance(tick, Tick) else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *("kafka_bootstrap_servers", "ticks_topic", "alerts_topic", "gold_symbols", "gold_quotes"),
        *("future_tolerance_seconds", "receipt_tolerance_seconds"),
        *("alert_threshold_pct", "alert_window_seconds", "alert_cooldown_seconds", "alert_stale_seconds", "log_format"),
        *("state_dir", "alerting_metrics_port", "stream_stale_seconds"),
    )
    parser.prog = "python -m alerting"
    settings, _ = from_command_line(parser, argv)
    set_up_logging(settings.log_format)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    figures = Figures(settings, group_of(settings))
    figures.lag.start()
    alerting = Alerting(settings, lambda line: print(line, flush=True), figures)
    with Server("alerting", settings.alerting_metrics_port, figures, settings.state_dir, or_any=True):
        while not stop.is_set():
            try:
                alerting.run(stop)
            except KafkaError as error:
                logger.warning("Kafka at %s: %r; trying again", settings.kafka_bootstrap_servers, error)
                stop.wait(2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
