"""The way to Kafka.

kafka-python puts no bound on what it holds while a broker is away, so the bound is here: `send` waits when too many
messages are unacknowledged. The others stay in the spool.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, TopicAlreadyExistsError
from kafka.partitioner.default import murmur2

from ingestion.errors import DeliveryFailed

if TYPE_CHECKING:
    from kafka.future import Future

    from conf.settings import Settings

log = logging.getLogger(__name__)

# A broker may be away for as long as it likes: a message is never given up while the ingester runs (24 days).
NEVER_MS = 2**31 - 1
SAY_AGAIN_SECONDS = 10.0


class Publisher(Protocol):
    """Where messages go. What stands before Kafka, or instead of it, has these methods."""

    async def send(self, topic: str, key: bytes, value: bytes) -> None:
        """Take a message; waits while too many are unacknowledged. Raises DeliveryFailed."""

    async def flush(self, seconds: float) -> int:
        """Wait until everything taken is acknowledged, at most so long; how many messages are not."""

    async def close(self) -> None:
        """Let go of Kafka."""


class _Producer(KafkaProducer):  # type: ignore[misc]  # kafka-python has no types
    """Closes without complaint about what it could not deliver, which is counted here; also when Python ends."""

    def close(self, timeout: float | None = None, null_logger: bool = False) -> None:
        with suppress(KafkaTimeoutError):
            super().close(timeout, null_logger)


class KafkaPublisher:
    """Messages to Kafka, each acknowledged by all replicas, repeated by the broker's own count never (idempotent)."""

    def __init__(self, settings: Settings) -> None:
        self._servers = settings.kafka_bootstrap_servers
        self._topics = {settings.ticks_topic, settings.rejects_topic, settings.gaps_topic}
        self._partitions = settings.kafka_partitions
        self._retention = {
            "retention.ms": str(settings.kafka_retention_hours * 3_600_000),
            "retention.bytes": str(settings.kafka_retention_bytes),
        }
        self._limit = settings.max_in_flight
        self._producer: _Producer | None = None
        self._partition_counts: dict[str, int] = {}
        self._partition_of: dict[tuple[str, bytes], int] = {}
        # In the order of sending. Looking at the oldest costs less than a callback for each, and what it tells is
        # a beginning of the sequence that Kafka has: whatever stands before Kafka may forget just that.
        self._unacknowledged: deque[Future] = deque()
        self._refusal: BaseException | None = None
        self.published = 0
        self.refused = 0

    @property
    def in_flight(self) -> int:
        """Messages taken that Kafka has not answered for."""
        self._settle()
        return len(self._unacknowledged)

    async def start(self) -> None:
        """Create the topics where they are absent. Waits for Kafka as long as it takes."""
        said = 0.0
        while True:
            try:
                self._producer = await asyncio.to_thread(self._connect)
                return
            except KafkaError as error:
                if time.monotonic() - said > SAY_AGAIN_SECONDS:
                    said = time.monotonic()
                    log.warning("Kafka at %s does not answer (%s); trying until it does", self._servers, error)
            await asyncio.sleep(1.0)

    def _connect(self) -> _Producer:
        servers = self._servers.split(",")
        admin = KafkaAdminClient(bootstrap_servers=servers, bootstrap_timeout_ms=3_000)
        try:
            # One at a time: what already exists must not keep the other from being created.
            for topic in sorted(self._topics):
                options = {"num_partitions": self._partitions, "configs": self._retention}
                try:
                    admin.create_topics({topic: options}, wait_for_metadata=True)
                    log.info("created the topic %s with %d partitions", topic, self._partitions)
                except TopicAlreadyExistsError:
                    pass
        finally:
            admin.close()
        producer = _Producer(
            bootstrap_servers=servers,
            bootstrap_timeout_ms=3_000,
            enable_idempotence=True,
            acks="all",
            delivery_timeout_ms=NEVER_MS,
            # Only reached where Kafka has forgotten a topic; `send` then asks again, and stalls no longer than this.
            max_block_ms=1_000,
            linger_ms=5,
            batch_size=256 * 1024,
            allow_auto_create_topics=False,
            # After an hour without Kafka, notice within seconds that it is back.
            reconnect_backoff_max_ms=2_000,
        )
        try:
            self._partition_counts = {topic: len(producer.partitions_for(topic)) for topic in self._topics}
        except KafkaError:
            producer.close(timeout=0)
            raise
        for topic, count in self._partition_counts.items():
            if count != self._partitions:
                log.warning("topic %s has %d partitions, not %d: it keeps them", topic, count, self._partitions)
        return producer

    async def send(self, topic: str, key: bytes, value: bytes) -> None:
        if self._producer is None:
            raise RuntimeError("start() comes first")
        self._settle()
        if len(self._unacknowledged) >= self._limit:
            await self._room()
        if self._refusal is not None:
            raise DeliveryFailed(f"Kafka refused a message: {self._refusal!r}") from self._refusal
        partition = self._partition(topic, key)
        while True:
            try:
                self._unacknowledged.append(self._producer.send(topic, value, key, partition=partition))
                return
            except KafkaTimeoutError as error:
                log.warning("Kafka at %s has no topic %s (%s); asking again", self._servers, topic, error)
                await asyncio.sleep(1.0)
            except KafkaError as error:
                raise DeliveryFailed(f"Kafka does not take a message for topic {topic}: {error!r}") from error

    def _partition(self, topic: str, key: bytes) -> int:
        """Where the Java client's partitioner would put the key. kafka-python computes it in Python, so remember it."""
        partition = self._partition_of.get((topic, key))
        if partition is None:
            partition = (murmur2(key) & 0x7FFFFFFF) % self._partition_counts[topic]
            self._partition_of[topic, key] = partition
        return partition

    def _settle(self) -> None:
        """Count and forget what Kafka has answered for."""
        futures = self._unacknowledged
        while futures and futures[0].is_done:
            refusal = futures.popleft().exception
            if refusal is None:
                self.published += 1
            else:
                self.refused += 1
                self._refusal = self._refusal or refusal

    async def _room(self) -> None:
        began = time.monotonic()
        said = 0.0
        while len(self._unacknowledged) >= self._limit:
            await asyncio.sleep(0.005)
            self._settle()
            waited = time.monotonic() - began
            if waited - said > SAY_AGAIN_SECONDS / (1 if said else 10):
                said = waited
                log.warning("Kafka at %s acknowledges nothing; what comes stays in the spool", self._servers)
        if said:
            log.warning("Kafka acknowledges again after %.1f s", time.monotonic() - began)

    async def flush(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        self._settle()
        while self._unacknowledged and time.monotonic() < until:
            await asyncio.sleep(0.005)
            self._settle()
        return len(self._unacknowledged) + self.refused

    async def close(self) -> None:
        if self._producer is not None:
            # What flush could not deliver is counted by then: waiting again would deliver no more.
            await asyncio.to_thread(self._producer.close, 0 if self._unacknowledged else 5)
