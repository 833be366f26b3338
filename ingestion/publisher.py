"""The way to Kafka.

kafka-python puts no bound on what it holds while a broker is away, so the bound is here: `send` waits when too many
messages are unacknowledged. The others stay in the spool.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import confluent_kafka
from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAlreadyExistsError,
)
from kafka.net import KafkaNetClient
from kafka.partitioner.default import murmur2

from conf.text import shown
from ingestion.errors import DeliveryFailed, MessageTooLarge
from ingestion.ticks import shortened_reject

if TYPE_CHECKING:
    from kafka.future import Future

    from conf.settings import Settings

log = logging.getLogger(__name__)

# A broker may be away for as long as it likes: a message is never given up while the ingester runs (24 days).
NEVER_MS = 2**31 - 1
LINGER_MS = 5
BATCH_BYTES = 256 * 1024
RECONNECT_MS = 2_000
CONNECTING_MS = 20.0
SAY_AGAIN_SECONDS = 10.0
_TOO_LARGE = {confluent_kafka.KafkaError.MSG_SIZE_TOO_LARGE, confluent_kafka.KafkaError.RECORD_LIST_TOO_LARGE}


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


class _Client(KafkaNetClient):  # type: ignore[misc]  # kafka-python has no types
    """Waits for a broker that is not ready. Its sender waits so many milliseconds as it is told seconds: it spins."""

    def connection_delay(self, node_id: object) -> float:
        """In milliseconds, as the sender takes it; some even while a connection is being made."""
        return max(CONNECTING_MS, 1e3 * float(super().connection_delay(node_id)))


class KafkaPublisher(ABC):
    """Messages to Kafka, each acknowledged by all replicas, repeated by the broker's own count never (idempotent).

    What Kafka has acknowledged is counted in the order of sending, up to the first message that it has not: whatever
    stands before Kafka may forget just that. One of the classes below does it with a library.
    """

    def __init__(self, settings: Settings) -> None:
        self._servers = settings.kafka_bootstrap_servers
        self._topics = {settings.ticks_topic, settings.rejects_topic, settings.gaps_topic}
        self._partitions = settings.kafka_partitions
        self._retention = {
            "retention.ms": str(settings.kafka_retention_hours * 3_600_000),
            "retention.bytes": str(settings.kafka_retention_bytes),
        }
        self._limit = settings.max_in_flight
        self.largest = BATCH_BYTES
        """Bytes of a batch. A larger reject is shortened; other messages are never so large."""
        self._partition_counts: dict[str, int] = {}
        self._partition_of: dict[tuple[str, bytes], int] = {}
        self._refusal: BaseException | None = None
        self.published = 0
        self.refused = 0

    @abstractmethod
    def _open(self, servers: list[str]) -> None:
        """Begin a producer. Raises KafkaError if Kafka does not answer."""

    @abstractmethod
    async def _post(self, topic: str, key: bytes, value: bytes, partition: int) -> None:
        """Take a message. Raises DeliveryFailed."""

    @abstractmethod
    def _settle(self) -> None:
        """Count and forget what Kafka has answered for."""

    @abstractmethod
    def _waiting(self) -> int:
        """Messages taken that Kafka had not answered for when `_settle` last looked."""

    @property
    def in_flight(self) -> int:
        """Messages taken that Kafka has not answered for."""
        self._settle()
        return self._waiting()

    async def start(self) -> None:
        """Create the topics where they are absent. Waits for Kafka as long as it takes."""
        logged_at = 0.0
        while True:
            try:
                await asyncio.to_thread(self._connect)
                return
            except KafkaError as error:
                if time.monotonic() - logged_at > SAY_AGAIN_SECONDS:
                    logged_at = time.monotonic()
                    log.warning("Kafka at %s does not answer (%s); trying until it does", self._servers, shown(error))
            await asyncio.sleep(1.0)

    def _connect(self) -> None:
        self._partition_counts = self._prepared(sorted(self._topics))
        self._open(self._servers.split(","))

    def _prepared(self, topics: list[str]) -> dict[str, int]:
        """Create the topics that are absent; how many partitions each has. Raises KafkaError."""
        admin = KafkaAdminClient(bootstrap_servers=self._servers.split(","), bootstrap_timeout_ms=3_000)
        try:
            # One at a time: what already exists must not keep the other from being created.
            for topic in topics:
                options = {"num_partitions": self._partitions, "configs": self._retention}
                try:
                    admin.create_topics({topic: options}, wait_for_metadata=True)
                    log.info("created the topic %s with %d partitions", topic, self._partitions)
                except TopicAlreadyExistsError:
                    pass
            described = admin.describe_topics(topics)
        finally:
            admin.close()
        counts = {str(topic["name"]): len(topic["partitions"]) for topic in described}
        for topic, count in counts.items():
            if not count:
                raise KafkaTimeoutError(f"topic {topic} has no partitions yet")
            if count != self._partitions:
                log.warning("topic %s has %d partitions, not %d: it keeps them", topic, count, self._partitions)
        return counts

    def check(self) -> None:
        """Raises DeliveryFailed if Kafka has refused a message that it was sent."""
        if self._refusal is not None:
            raise _failure("Kafka refused a message", self._refusal) from self._refusal

    async def send(self, topic: str, key: bytes, value: bytes) -> None:
        self._settle()
        if self._waiting() >= self._limit:
            await self._room()
        self.check()
        if len(value) > self.largest:
            value = shortened_reject(value, self.largest)
        if topic not in self._partition_counts:
            # What a spool holds from before the settings named other topics.
            try:
                self._partition_counts |= await asyncio.to_thread(self._prepared, [topic])
            except KafkaError as error:
                raise DeliveryFailed(f"Kafka does not answer for the topic {topic}: {shown(error)}") from error
        await self._post(topic, key, value, self._partition(topic, key))

    def _partition(self, topic: str, key: bytes) -> int:
        """Where the Java client's partitioner would put the key. kafka-python computes it in Python, so remember it."""
        partition = self._partition_of.get((topic, key))
        if partition is None:
            partition = (murmur2(key) & 0x7FFFFFFF) % self._partition_counts[topic]
            self._partition_of[topic, key] = partition
        return partition

    async def _room(self) -> None:
        began = time.monotonic()
        logged_at = 0.0
        while self._waiting() >= self._limit:
            await asyncio.sleep(0.005)
            self._settle()
            waited = time.monotonic() - began
            if waited - logged_at > SAY_AGAIN_SECONDS / (1 if logged_at else 10):
                logged_at = waited
                log.warning("Kafka at %s acknowledges nothing; what comes stays in the spool", self._servers)
        if logged_at:
            log.warning("Kafka acknowledges again after %.1f s", time.monotonic() - began)

    async def flush(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while self.in_flight:
            if time.monotonic() >= until:
                break
            await asyncio.sleep(0.005)
        return self._waiting() + self.refused

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    @abstractmethod
    def _close(self) -> None:
        """Let go of Kafka. What flush could not deliver stays undelivered: waiting again would deliver no more."""


class PurePublisher(KafkaPublisher):
    """With kafka-python."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._producer: _Producer | None = None
        # In the order of sending. Looking at the oldest costs less than a callback for each.
        self._unacknowledged: deque[Future] = deque()

    def _open(self, servers: list[str]) -> None:
        self._producer = _Producer(
            bootstrap_servers=servers,
            bootstrap_timeout_ms=3_000,
            enable_idempotence=True,
            acks="all",
            delivery_timeout_ms=NEVER_MS,
            # Only reached where Kafka has forgotten a topic; `_post` then asks again, and stalls no longer than this.
            max_block_ms=1_000,
            linger_ms=LINGER_MS,
            batch_size=self.largest,
            allow_auto_create_topics=False,
            # After an hour without Kafka, notice within seconds that it is back.
            reconnect_backoff_max_ms=RECONNECT_MS,
            kafka_client=_Client,
        )

    async def _post(self, topic: str, key: bytes, value: bytes, partition: int) -> None:
        if self._producer is None:
            raise RuntimeError("start() comes first")
        while True:
            try:
                self._unacknowledged.append(self._producer.send(topic, value, key, partition=partition))
                return
            except KafkaTimeoutError as error:
                log.warning("Kafka at %s has no topic %s (%s); asking again", self._servers, topic, error)
                await asyncio.sleep(1.0)
            except KafkaError as error:
                raise _failure(f"Kafka does not take a message for topic {topic}", error) from error

    def _settle(self) -> None:
        futures = self._unacknowledged
        while futures and futures[0].is_done:
            refusal = futures.popleft().exception
            if refusal is None:
                self.published += 1
            else:
                self.refused += 1
                self._refusal = self._refusal or refusal

    def _waiting(self) -> int:
        return len(self._unacknowledged)

    def _close(self) -> None:
        if self._producer is not None:
            self._producer.close(0 if self._unacknowledged else 5)


class NativePublisher(KafkaPublisher):
    """With confluent-kafka, in a third of the processor's time."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._producer: confluent_kafka.Producer | None = None
        # The partition of each message in the order of sending; and of each partition, how many were acknowledged
        # that are still in it. Within a partition Kafka answers in order.
        self._unacknowledged: deque[_Answers] = deque()
        self._answers: dict[tuple[str, int], _Answers] = {}

    def _open(self, servers: list[str]) -> None:
        self._producer = confluent_kafka.Producer(
            {
                "bootstrap.servers": ",".join(servers),
                "enable.idempotence": True,
                "acks": "all",
                # 0: a message is never given up.
                "message.timeout.ms": 0,
                "linger.ms": LINGER_MS,
                "batch.size": self.largest,
                "queue.buffering.max.messages": 2 * self._limit,
                "allow.auto.create.topics": False,
                "reconnect.backoff.max.ms": RECONNECT_MS,
                # `_room` says in one line that Kafka is away.
                "log_level": 0,
            }
        )

    async def _post(self, topic: str, key: bytes, value: bytes, partition: int) -> None:
        if self._producer is None:
            raise RuntimeError("start() comes first")
        answers = self._answers.setdefault((topic, partition), _Answers())
        try:
            self._producer.produce(topic, value, key, partition, answers.answer)
        except confluent_kafka.KafkaException as error:
            raise _failure(f"Kafka does not take a message for topic {topic}", error) from error
        self._unacknowledged.append(answers)

    def _settle(self) -> None:
        if self._producer is not None:
            self._producer.poll(0)
        waiting = self._unacknowledged
        while waiting and waiting[0].count:
            answers = waiting.popleft()
            answers.count -= 1
            if answers.refusal is None:
                self.published += 1
            else:
                self.refused += 1
                self._refusal = self._refusal or answers.refusal

    def _waiting(self) -> int:
        return len(self._unacknowledged)

    def _close(self) -> None:
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(5)
            self._producer = None


class _Answers:
    """Of one partition: how many messages Kafka has answered for and `_settle` has not counted."""

    __slots__ = ("count", "refusal")

    def __init__(self) -> None:
        self.count = 0
        self.refusal: BaseException | None = None

    def answer(self, error: confluent_kafka.KafkaError | None, message: confluent_kafka.Message) -> None:
        self.count += 1
        if error is not None:
            # What follows it must not be taken for delivered before it.
            self.refusal = self.refusal or confluent_kafka.KafkaException(error)


def _failure(what: str, error: BaseException) -> DeliveryFailed:
    too_large = isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError) or (
        isinstance(error, confluent_kafka.KafkaException) and error.args[0].code() in _TOO_LARGE
    )
    return (MessageTooLarge if too_large else DeliveryFailed)(f"{what}: {error!r}")


def publisher(settings: Settings) -> KafkaPublisher:
    """The one that the settings name."""
    return NativePublisher(settings) if settings.kafka_client == "confluent-kafka" else PurePublisher(settings)
