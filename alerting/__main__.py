"""Raise alerts from Kafka's topic of ticks: to topic `alerts`, and as a line of JSON each to standard output.

    python -m alerting

The rule is that of gold.alerts (lake/gold/alerts.py), tick by tick as they come, so an alert is out within milliseconds
and waits for no table. gold.alerts is exact: it includes late ticks, which are skipped here. A row is sent when an
episode opens and when it closes, at least once, under the same alert_id.

It resumes at its committed offsets, after reading the LOOK_BACK_SECONDS before to find the open episodes.

Exit codes: 0 ended by SIGINT or SIGTERM, 2 a wrong setting.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Context, Decimal
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError, TopicAlreadyExistsError

from conf.logs import set_up_logging
from conf.settings import Settings, arguments, from_command_line
from lake.contract import Pair, TickRules, feeds
from lake.gold.alerts import Alert, AlertTick, Episodes, alert_row
from lake.rules import AlertRule, gold_rules, tick_rules
from lake.silver.judge import Tick, judge
from lake.tables import GOLD_ALERTS

logger = logging.getLogger("alerting")

LOOK_BACK_SECONDS = 600
POLL_MS = 50
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


def resume(consumer: KafkaConsumer, topic: str, stop: threading.Event) -> dict[TopicPartition, int]:
    """Seek to LOOK_BACK_SECONDS before the committed offsets. Returns the offsets from which alerts are sent."""
    while not (numbers := consumer.partitions_for_topic(topic)):
        logger.info("waiting for topic %s", topic)
        if stop.wait(1):
            return {}
    partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    since = int((time.time() - LOOK_BACK_SECONDS) * 1000)
    earlier = consumer.offsets_for_times(dict.fromkeys(partitions, since))
    resumes = {}
    for partition in partitions:
        committed = consumer.committed(partition)
        # On the first start, send no alerts for the past; gold.alerts has them.
        resumes[partition] = ends[partition] if committed is None else committed
        look_back = earlier.get(partition)
        begin = min(resumes[partition], look_back.offset if look_back else ends[partition])
        consumer.seek(partition, begin)
        logger.info("partition %d: reads on at %d, looks back to %d", partition.partition, resumes[partition], begin)
    return resumes


def create_topic(settings: Settings) -> None:
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    try:
        options = {"num_partitions": settings.kafka_partitions, "replication_factor": 1}
        admin.create_topics({settings.alerts_topic: options})
    except TopicAlreadyExistsError:
        pass
    finally:
        admin.close()


def watch(settings: Settings, stop: threading.Event, tell: Callable[[str], None]) -> None:
    """Raise alerts until `stop` is set. Raises KafkaError if Kafka fails."""
    rules, rules_of_ticks = gold_rules(settings), tick_rules(settings)
    state = Watch(rules.alerts, dict(rules.symbols), dict(rules.quotes))
    create_topic(settings)
    servers = settings.kafka_bootstrap_servers
    consumer = KafkaConsumer(
        bootstrap_servers=servers,
        group_id=f"{settings.alerts_topic}-of-{settings.ticks_topic}",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=POLL_MS,
        reconnect_backoff_max_ms=2_000,
    )
    producer = KafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True)
    try:
        resumes = resume(consumer, settings.ticks_topic, stop)
        logger.info("watching topic %s for topic %s", settings.ticks_topic, settings.alerts_topic)
        committed_at = 0.0
        while not stop.is_set():
            deliveries = []
            for partition, records in consumer.poll(timeout_ms=POLL_MS).items():
                for record in records:
                    alert = alert_in(record, state, rules_of_ticks, datetime.now(UTC))
                    if alert is None or record.offset < resumes[partition]:
                        continue
                    value = message(alert, rules.alerts, datetime.now(UTC))
                    tell(value.decode())
                    if time.time() - alert.opened_at / 1e6 <= settings.alert_stale_seconds or alert.closed_at:
                        key = ":".join(alert.pair).encode()
                        deliveries.append(producer.send(settings.alerts_topic, value, key=key))
            for future in deliveries:
                future.get(timeout=30)
            if deliveries or time.monotonic() - committed_at > 5:
                # Do not commit an offset before those where it resumed.
                if all(consumer.position(partition) >= offset for partition, offset in resumes.items()):
                    consumer.commit()
                committed_at = time.monotonic()
    finally:
        producer.close()
        consumer.close(autocommit=False)


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
    )
    parser.prog = "python -m alerting"
    settings, _ = from_command_line(parser, argv)
    set_up_logging(settings.log_format)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.is_set():
        try:
            watch(settings, stop, lambda line: print(line, flush=True))
        except KafkaError as error:
            logger.warning("Kafka at %s: %r; trying again", settings.kafka_bootstrap_servers, error)
            stop.wait(2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
