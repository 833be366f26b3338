"""How long a tick takes from its frame to the alert that it opens: `python -m benchmarks.alerts`

Reads the topics `alerts` and `ticks` as they are, after the ingester and `python -m alerting` have run: of each alert
that was opened, the time between the receipt of the tick that triggered it and the alert's own time in Kafka. Prints
one line of JSON: how many alerts, and p50, p99 and the longest of that time in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from statistics import quantiles
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from conf.settings import Settings, arguments, from_command_line
from lake.rules import tick_rules
from lake.silver.judge import Tick, judge


def records(settings: Settings, topic: str) -> Iterator[Any]:
    """What a topic holds now."""
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers, auto_offset_reset="earliest")
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions) if partitions else {}
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            for records in consumer.poll(timeout_ms=500).values():
                yield from records
    finally:
        consumer.close()


def waits(settings: Settings) -> list[float]:
    """Seconds from the frame to the alert, of each alert that was opened while it was news."""
    opened: dict[str, float] = {}
    for record in records(settings, settings.alerts_topic):
        row = json.loads(record.value)
        if row["closed_at"] is None:
            _, _, _, event_id = row["alert_id"].split(":", 3)
            opened.setdefault(event_id, record.timestamp / 1_000)
    rules = tick_rules(settings)
    now = datetime.now(UTC)
    seconds = []
    for record in records(settings, settings.ticks_topic):
        tick = judge(record.value, record.topic, record.partition, record.offset, now, rules)
        if isinstance(tick, Tick) and tick.event_id in opened:
            seconds.append(opened.pop(tick.event_id) - tick.received_at / 1_000_000)
    return sorted(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    names = ("kafka_bootstrap_servers", "ticks_topic", "alerts_topic", "future_tolerance_seconds")
    settings, _ = from_command_line(arguments(__doc__, *names), argv)
    seconds = waits(settings)
    figures: dict[str, object] = {"alerts": len(seconds)}
    if len(seconds) > 1:
        percentiles = quantiles(seconds, n=100, method="inclusive")
        figures |= {f"frame_to_alert_p{number}": round(percentiles[number - 1], 3) for number in (50, 99)}
        figures["longest"] = round(seconds[-1], 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
