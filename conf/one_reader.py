"""A consumer group in which one process reads a topic and the others stand by.

Kafka's group membership decides who reads: a process that joins disturbs nothing, and one that dies is replaced after
SESSION_MS. Only the group's present reader can commit offsets: Kafka refuses the commit of another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.abstract import (
    AbstractPartitionAssignor,
    ConsumerProtocolAssignment,
    ConsumerProtocolSubscription,
    RebalanceProtocol,
)
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

log = logging.getLogger(__name__)

# After a kill the next reader waits so long for the partitions.
SESSION_MS = 10_000
METADATA_MS = 5_000
KAFKA_MS = 5_000
ABSENT_SECONDS = 0.5
STANDS_BY = "stands by: another process of this group reads"
# An alert does not wait for the question whether its topic is still the same one.
ASK_SECONDS = 5.0


class TopicReplaced(KafkaError):  # type: ignore[misc]
    """The topic was deleted, or deleted and made anew, while it was read."""


class _OneReader(AbstractPartitionAssignor):  # type: ignore[misc]
    """Gives all partitions to the member that has them, or to any if nobody has."""

    name = "one-reader"

    def __init__(self) -> None:
        self.stands_by = False
        # Whether it had to share out a topic whose partitions it did not know: there is no use in being a member then.
        self.is_blind = False
        # The group's generation in which this member had the partitions: one that was cut off claims an older one.
        self._generation = -1

    def supported_protocols(self) -> list[RebalanceProtocol]:
        # The reader reads on while others join and leave.
        return [RebalanceProtocol.COOPERATIVE]

    def metadata(self, topics: set[str]) -> ConsumerProtocolSubscription:
        return ConsumerProtocolSubscription(0, list(topics), str(self._generation).encode())

    def assign(self, cluster: Any, members: list[Any]) -> dict[str, ConsumerProtocolAssignment]:
        reader = max(members, key=lambda member: (int(member.metadata.user_data or b"-1"), member.member_id))
        topics = sorted(reader.metadata.topics)
        every = [(topic, sorted(cluster.partitions_for_topic(topic) or ())) for topic in topics]
        self.is_blind = not all(partitions for _, partitions in every)
        return {
            member.member_id: ConsumerProtocolAssignment(0, every if member is reader else [], b"")
            for member in members
        }

    def on_assignment(self, assignment: ConsumerProtocolAssignment, generation: int) -> None:
        stands_by = not assignment.partitions()
        self._generation = -1 if stands_by else generation
        if stands_by and not self.stands_by and not self.is_blind:
            log.info(STANDS_BY)
        self.stands_by = stands_by


@dataclass(frozen=True)
class Stored:
    """The offset from which a group reads a partition on, as Kafka keeps it."""

    begin: int
    end: int
    offset: int | None
    # Whether Kafka no longer has the record that was stored as the next one, or has another one in its place.
    is_lost: bool


@dataclass(eq=False)
class OneReader(ConsumerRebalanceListener):  # type: ignore[misc]
    """Reads a topic as a group's one reader. The caller seeks: while `is_new` is set, `poll` gives no records."""

    servers: str
    topic: str
    group: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_new: bool = False

    def __post_init__(self) -> None:
        """Raises KafkaError."""
        self._admin = KafkaAdminClient(bootstrap_servers=self.servers, bootstrap_timeout_ms=KAFKA_MS)
        self._topic_id = ""
        self._asked_at = 0.0
        self._assignor = _OneReader()
        # The positions that were committed last, or from which this process reads.
        self._committed: dict[TopicPartition, int] = {}
        self._is_member = False
        try:
            self.consumer = self._consumer()
        except KafkaError:
            self._admin.close()
            raise

    def _consumer(self) -> KafkaConsumer:
        return KafkaConsumer(
            bootstrap_servers=self.servers,
            group_id=self.group,
            partition_assignment_strategy=[self._assignor],
            enable_auto_commit=False,
            # Kafka's having less than we have read is an error, not a reason to begin somewhere else in silence.
            auto_offset_reset="none",
            allow_auto_create_topics=False,
            metadata_max_age_ms=METADATA_MS,
            session_timeout_ms=SESSION_MS,
            bootstrap_timeout_ms=KAFKA_MS,
            **self.options,
        )

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        for partition in assigned:
            # So that the consumer looks for no offset of its own. The caller seeks.
            self.consumer.seek(partition, 0)
        self.consumer.pause(*assigned)
        self.is_new = self.is_new or bool(assigned)

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Nothing: what comes next is another assignment."""

    @property
    def stands_by(self) -> bool:
        """Whether another process of the group reads, or the topic is absent."""
        return self._assignor.stands_by

    def poll(self, timeout_ms: int, most: int | None = None) -> dict[TopicPartition, list[Any]]:
        """The next records by partition; none while this process stands by or `is_new` is set. Raises KafkaError."""
        if not self._is_member and not self._join():
            return {}
        if self._assignor.is_blind:
            raise TopicReplaced(f"topic {self.topic} has no partitions")
        polled: dict[TopicPartition, list[Any]] = self.consumer.poll(timeout_ms=timeout_ms, max_records=most)
        return {} if self.is_new else polled

    def _join(self) -> bool:
        """Join the group, if there is a topic."""
        # A member that learns of the topic's partitions while it joins may never get them.
        self._is_member = bool(self._present_id() and self.consumer.partitions_for_topic(self.topic))
        if self._is_member:
            self.consumer.subscribe([self.topic], listener=self)
        else:
            time.sleep(ABSENT_SECONDS)
        return self._is_member

    def stored(self) -> dict[TopicPartition, Stored]:
        """What Kafka has stored for each partition; logs what is lost. Raises KafkaError."""
        partitions = sorted(self.consumer.assignment())
        self._topic_id, self._asked_at = self._present_id(), time.monotonic()
        begins, ends = self.consumer.beginning_offsets(partitions), self.consumer.end_offsets(partitions)
        return {partition: self._stored(partition, begins[partition], ends[partition]) for partition in partitions}

    def _stored(self, partition: TopicPartition, begin: int, end: int) -> Stored:
        committed = self.consumer.committed(partition, metadata=True)
        if committed is None or committed.offset < 0:
            return Stored(begin, end, None, False)
        is_other_topic = committed.metadata not in ("", self._topic_id)
        is_lost = is_other_topic or not begin <= committed.offset <= end
        if is_lost:
            cause = "the topic was made anew" if is_other_topic else "records are deleted, or a disk was lost"
            log.warning(
                *(
                    "group %s read %s, partition %d, up to offset %d, and Kafka has %d to %d: %s",
                    self.group,
                    self.topic,
                ),
                *(partition.partition, committed.offset, begin, end, cause),
            )
        return Stored(begin, end, committed.offset, is_lost)

    def start(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Read from these offsets on."""
        for partition, offset in offsets.items():
            self.consumer.seek(partition, offset)
        self.consumer.resume(*offsets)
        self._committed = dict(offsets)
        self.is_new = False

    def positions(self) -> dict[TopicPartition, OffsetAndMetadata]:
        """What to commit now, with the topic's id. Raises TopicReplaced if the topic is known to be another one."""
        if time.monotonic() - self._asked_at > ASK_SECONDS:
            if self._present_id() != self._topic_id:
                raise TopicReplaced(f"topic {self.topic} was deleted or made anew")
            self._asked_at = time.monotonic()
        return {
            partition: OffsetAndMetadata(self.consumer.position(partition), self._topic_id, -1)
            for partition in self.consumer.assignment()
        }

    @property
    def has_moved(self) -> bool:
        """Whether there is something to commit: `poll` gave records, or passed the end of a transaction."""
        if self.is_new:
            return False
        # What is known now: while Kafka is away, asking would take half a minute.
        positions = {each: self.consumer.position(each, timeout_ms=0) for each in self.consumer.assignment()}
        return any(position != self._committed.get(each) for each, position in positions.items())

    def commit(self) -> None:
        """Store how far the records that `poll` gave go. Raises KafkaError, if this is no longer the reader too."""
        positions = self.positions()
        self.consumer.commit(positions, timeout_ms=KAFKA_MS)
        self._committed = {partition: at.offset for partition, at in positions.items()}

    def _present_id(self) -> str:
        [topic] = self._admin.describe_topics([self.topic])
        return "" if topic["error_code"] else str(topic["topic_id"])

    def close(self) -> None:
        self._admin.close()
        self.consumer.close(autocommit=False, timeout_ms=KAFKA_MS)
