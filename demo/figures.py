"""What the demo shows, as it is at one moment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from kafka import KafkaConsumer, TopicPartition

from conf.settings import Settings
from lake.reader import NoSuchTable, open_table, query, row_count
from lake.tables import BRONZE_TICKS, SILVER_QUARANTINE, SILVER_TICKS

MINUTES_SHOWN = 3
_progress = re.compile(r"received (\d+), published (\d+)").findall
Row = Mapping[str, object]


@dataclass(frozen=True)
class Figures:
    """received and published: by ingestion since it started; the rest: in Kafka and in the lake, whoever put it there.

    lag: records in Kafka that bronze has not. freshness: seconds since the newest price in gold was made; None without
    one. gold_rows: minutes of gold.price_1m that were written since the demo began.
    """

    received: int = 0
    published: int = 0
    in_kafka: int = 0
    bronze: int = 0
    silver: int = 0
    quarantine: int = 0
    lag: int = 0
    freshness: float | None = None
    gold_rows: int = 0
    prices: Sequence[Row] = ()
    minutes: Sequence[Row] = ()


class Watch:
    """Looks at Kafka, the lake and ingestion's log."""

    def __init__(self, settings: Settings, ingestion_log: Path, began: datetime) -> None:
        self._settings = settings
        self._log = ingestion_log
        self._began = began
        self._consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers, enable_auto_commit=False)

    def close(self) -> None:
        self._consumer.close()

    def look(self) -> Figures:
        root = self._settings.lake_root
        ends = self._ends()
        delivered = bronze_ends(root)
        received, published = (_progress(self._log.read_text(encoding="utf-8")) or [("0", "0")])[-1]
        flow = Figures(
            received=int(received),
            published=int(published),
            in_kafka=sum(ends.values()),
            bronze=row_count(root, BRONZE_TICKS),
            silver=row_count(root, SILVER_TICKS),
            quarantine=row_count(root, SILVER_QUARANTINE),
            lag=sum(end - delivered.get(place, 0) for place, end in ends.items()),
        )
        try:
            prices = query(root, "SELECT * FROM gold.current_price ORDER BY asset").to_pylist()
            minutes = query(
                root,
                f"""
                SELECT *, updated_at >= TIMESTAMPTZ '{self._began.isoformat()}' AS is_new FROM gold.price_1m
                QUALIFY row_number() OVER (PARTITION BY source, asset ORDER BY window_start DESC) <= {MINUTES_SHOWN}
                ORDER BY asset, source, window_start DESC
                """,
            ).to_pylist()
        except NoSuchTable:
            return flow
        newest = max((row["event_time"] for row in prices), default=None)
        return replace(
            flow,
            freshness=None if newest is None else (datetime.now(UTC) - newest).total_seconds(),
            gold_rows=sum(row["is_new"] for row in minutes),
            prices=prices,
            minutes=minutes,
        )

    def _ends(self) -> dict[tuple[str, int], int]:
        """The offset after the last record of each partition of the suite's topics, as far as they exist."""
        topics = (self._settings.ticks_topic, self._settings.rejects_topic)
        existing = self._consumer.topics() & set(topics)
        partitions = [
            TopicPartition(topic, number)
            for topic in existing
            for number in self._consumer.partitions_for_topic(topic) or ()
        ]
        ends = self._consumer.end_offsets(partitions) if partitions else {}
        return {(place.topic, place.partition): end for place, end in ends.items()}


def bronze_ends(root: str) -> dict[tuple[str, int], int]:
    """The offset after the last record that bronze has of each partition of a topic.

    From the statistics in the table's log, where each file has records of one partition, as the stream writes them.
    """
    try:
        files = pa.table(open_table(root, BRONZE_TICKS).get_add_actions(flatten=True)).to_pylist()
    except NoSuchTable:
        return {}
    if all((file["min.topic"], file["min.partition"]) == (file["max.topic"], file["max.partition"]) for file in files):
        lasts = [(file["max.topic"], file["max.partition"], file["max.offset"]) for file in files]
    else:
        rows = query(root, 'SELECT topic, partition, max("offset") AS last FROM bronze.ticks GROUP BY ALL').to_pylist()
        lasts = [(row["topic"], row["partition"], row["last"]) for row in rows]
    ends: dict[tuple[str, int], int] = {}
    for topic, partition, last in lasts:
        ends[topic, partition] = max(ends.get((topic, partition), 0), last + 1)
    return ends
