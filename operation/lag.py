"""How far a reader is behind Kafka, by topic and partition."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from prometheus_client.core import GaugeMetricFamily, Metric

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
ANSWER_MS = 5_000

Place = tuple[str, int]
"""topic, partition"""


class KafkaLag:
    """The records that Kafka has and a reader has not processed, looked up by a thread of its own.

    They are stale if they have been in Kafka for longer than `stale_seconds`, by Kafka's time of the record.
    """

    def __init__(
        self,
        servers: str,
        topics: Sequence[str],
        stale_seconds: float,
        *,
        processed: Callable[[], Mapping[Place, int]] | None = None,
        group: str | None = None,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """processed: of each partition the offset after the last processed record, called by the thread, may raise
        OSError. group: a consumer group, instead of `processed`: what it has committed is processed. Of a partition
        without an offset nothing is."""
        self._servers, self._topics, self._group = servers, topics, group
        self._stale_seconds, self._look_seconds = stale_seconds, look_seconds
        self._processed = processed
        self._consumer: KafkaConsumer | None = None
        self._looked_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kafka-lag", daemon=True)
        # Replaced as wholes; empty before the first look.
        self.records: Mapping[Place, int] = {}
        self.stale: Mapping[Place, int] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Does not wait for Kafka: the thread ends with the process, if not before."""
        self._ended.set()

    @property
    def total(self) -> int:
        """Records in Kafka that are not processed."""
        return sum(self.records.values())

    @property
    def stale_total(self) -> int:
        """Of these the stale ones."""
        return sum(self.stale.values())

    def trouble(self, *, is_reader: bool = True) -> list[str]:
        """In words; empty if nothing is stale and Kafka answers.

        is_reader: False while another process of the group reads, whose stale records are not this one's trouble.
        """
        silent = time.monotonic() - self._looked_at
        trouble = []
        if silent > self._stale_seconds + self._look_seconds:
            trouble.append(f"how much Kafka has cannot be seen for {silent:.0f} s")
        if is_reader and self.stale_total:
            trouble.append(
                f"{self.stale_total:,} of the {self.total:,} records to go have been in Kafka"
                f" for more than {self._stale_seconds:g} s"
            )
        return trouble

    def look(self) -> None:
        """Ask Kafka once. Raises KafkaError, OSError, and ValueError if `processed` does."""
        if self._consumer is None:
            self._consumer = KafkaConsumer(
                bootstrap_servers=self._servers,
                group_id=self._group,
                enable_auto_commit=False,
                allow_auto_create_topics=False,
                bootstrap_timeout_ms=ANSWER_MS,
                metadata_max_age_ms=round(self._look_seconds * 1_000),
                reconnect_backoff_max_ms=2_000,
            )
        consumer = self._consumer
        partitions = [
            TopicPartition(topic, number)
            for topic in self._topics
            for number in sorted(consumer.partitions_for_topic(topic) or ())
        ]
        if not partitions:
            self.records, self.stale, self._looked_at = {}, {}, time.monotonic()
            return
        # Asked for first, so that what is processed meanwhile is not taken for lag.
        ends = consumer.end_offsets(partitions, timeout_ms=ANSWER_MS)
        before = round((time.time() - self._stale_seconds) * 1_000)
        fresh = consumer.offsets_for_times(dict.fromkeys(partitions, before), timeout_ms=ANSWER_MS)
        processed = self._processed() if self._processed else self._committed(partitions)
        unknown = [partition for partition in partitions if partition not in processed]
        begins = consumer.beginning_offsets(unknown, timeout_ms=ANSWER_MS) if unknown else {}
        reached = {partition: processed.get(partition, begins.get(partition, 0)) for partition in partitions}
        self.records = {tuple(each): max(0, ends[each] - reached[each]) for each in partitions}
        self.stale = {
            tuple(each): max(0, (fresh[each].offset if fresh[each] else ends[each]) - reached[each])
            for each in partitions
        }
        self._looked_at = time.monotonic()

    def _committed(self, partitions: Iterable[TopicPartition]) -> dict[Place, int]:
        assert self._consumer is not None
        committed = {each: self._consumer.committed(each, timeout_ms=ANSWER_MS) for each in partitions}
        return {tuple(each): offset for each, offset in committed.items() if offset is not None}

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.look()
            except (KafkaError, OSError, ValueError) as error:
                # `trouble` says so if it lasts.
                log.debug("Kafka's offsets cannot be seen: %r", error)
                self._close()
            self._ended.wait(self._look_seconds)
        self._close()

    def _close(self) -> None:
        if self._consumer is not None:
            with suppress(KafkaError):
                self._consumer.close(timeout_ms=ANSWER_MS)
            self._consumer = None


def lag_metrics(readers: Mapping[str, KafkaLag]) -> Iterator[Metric]:
    """The lags of a program's readers, by their names."""
    labels = ["reader", "topic", "partition"]
    lag = GaugeMetricFamily(
        "tickhouse_kafka_lag_records", "records in Kafka that the reader has not processed", labels=labels
    )
    stale = GaugeMetricFamily(
        "tickhouse_kafka_stale_records", "of these, those that have been in Kafka for too long", labels=labels
    )
    for name, reader in readers.items():
        for family, counts in ((lag, reader.records), (stale, reader.stale)):
            for (topic, partition), count in counts.items():
                family.add_metric([name, topic, str(partition)], count)
    yield from (lag, stale)
