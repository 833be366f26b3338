"""Records that Kafka no longer has although the stream has not read them, and topics that were made anew.

Kafka deletes old records, a topic may be deleted and created again, and a broker may lose its disk. The offsets of a
new topic begin at 0 again, so a record is known by topic, partition and offset only within one life of its topic. The
lake counts the lives: a partition's number in the tables is its number in Kafka plus LIFE for each earlier life of the
topic. Bronze's commits carry what the lake knows of the topics (`Topics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from conf.settings import Settings
from lake.silver.gaps import Gap
from streaming.checkpoint import Offsets

LIFE = 1_000_000


class Expired(RuntimeError):
    """Kafka no longer has records that the stream has not read."""


@dataclass(frozen=True)
class Loss:
    """Offsets that Kafka does not have; last is None if nobody knows how many records there were."""

    topic: str
    partition: int
    first: int
    last: int | None
    why: str

    def __str__(self) -> str:
        count = "an unknown number of records" if self.last is None else f"{self.last - self.first + 1} records"
        until = "on" if self.last is None else f"to {self.last}"
        return f"topic {self.topic}, partition {self.partition}: {self.why}: {count} from {self.first} {until} {GONE}"


GONE = "have expired or are lost"


@dataclass(frozen=True)
class TopicNow:
    """A topic in Kafka: its id (None if the broker tells none), and per partition its first offset and its end."""

    id: str | None
    ends: Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class Topics:
    """What the lake knows of its topics.

    ids: of the topics when they were last read. lives: how often a topic was made anew. begins: the offsets where the
    stream began or went on after a loss. losses: what was accepted as lost, as rows of silver.gaps.
    """

    ids: Mapping[str, str] = field(default_factory=dict)
    lives: Mapping[str, int] = field(default_factory=dict)
    begins: Offsets = field(default_factory=dict)
    losses: tuple[Gap, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "ids": dict(self.ids),
            "lives": dict(self.lives),
            "begins": self.begins,
            "losses": [loss.to_json() for loss in self.losses],
        }

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> Topics:
        begins = {topic: {int(n): at for n, at in parts.items()} for topic, parts in known.get("begins", {}).items()}
        losses = tuple(Gap.from_json(loss) for loss in known.get("losses", ()))
        return cls(known.get("ids", {}), known.get("lives", {}), begins, losses)

    def partition(self, topic: str, partition: int) -> int:
        """A partition's number in the tables."""
        return partition + LIFE * self.lives.get(topic, 0)

    def losses_in(self, kafka: Mapping[str, TopicNow], read: Offsets) -> list[Loss]:
        """What Kafka lacks of the records after those that were read. read: the offsets after them."""
        losses: list[Loss] = []
        for topic, partitions in sorted(read.items()):
            now = kafka.get(topic)
            for partition, at in sorted(partitions.items()):
                if now is None or partition not in now.ends:
                    # A topic or partition without records is none to miss.
                    losses += [Loss(topic, partition, at, None, "Kafka has it no more")] if at else []
                    continue
                begin, end = now.ends[partition]
                known = self.ids.get(topic)
                if known and now.id and known != now.id:
                    why = f"the topic was made anew, and ends at offset {end} now"
                    losses += [Loss(topic, partition, at, None, why)] if at else []
                elif at > end:
                    losses.append(Loss(topic, partition, at, None, f"Kafka ends at offset {end}, before {at}"))
                elif at < begin:
                    why = f"the lake ends at offset {at - 1}, and Kafka begins at {begin}"
                    losses.append(Loss(topic, partition, at, begin - 1, why))
        return losses

    def noted(self, kafka: Mapping[str, TopicNow]) -> Topics:
        """With the topics' present ids, if nothing is lost."""
        return replace(self, ids={**self.ids, **{topic: now.id for topic, now in kafka.items() if now.id}})

    def starting(self, kafka: Mapping[str, TopicNow]) -> Offsets | None:
        """Where a new checkpoint begins; None: at Kafka's first records."""
        return self.without([], kafka, self.begins).begins if self.begins else None

    def without(self, losses: Iterable[Loss], kafka: Mapping[str, TopicNow], read: Offsets) -> Topics:
        """After these losses were accepted: where to go on (`begins`), and the losses as rows of silver.gaps."""
        losses = list(losses)
        anew = {loss.topic for loss in losses if loss.last is None}
        begins: Offsets = {}
        for topic, now in kafka.items():
            for partition, (begin, end) in now.ends.items():
                before = read.get(topic, {}).get(partition, 0)
                if topic in anew:
                    is_same = self.ids.get(topic, now.id) == now.id
                    # Of a log that was cut short the lake has the rest.
                    before = min(before, end) if is_same else begin
                begins.setdefault(topic, {})[partition] = max(before, begin)
        return Topics(
            ids={topic: now.id for topic, now in kafka.items() if now.id},
            lives={**self.lives, **{topic: self.lives.get(topic, 0) + 1 for topic in anew}},
            begins=begins,
            losses=(*self.losses, *(self._row(loss) for loss in losses)),
        )

    def _row(self, loss: Loss) -> Gap:
        partition = self.partition(loss.topic, loss.partition)
        return Gap(
            gap_id=f"kafka:{loss.topic}:{partition}:{loss.first}",
            source="kafka",
            symbol=f"{loss.topic}/{partition}",
            trade_epoch=0,
            first_missing=None,
            last_missing=None,
            disconnected_at=None,
            detected_at=datetime.now(UTC),
            status="unfillable",
            reason=f"{loss}; accepted with --accept-loss",
        )


def require_none(losses: list[Loss]) -> None:
    """Raises Expired if there are losses."""
    if losses:
        raise Expired(
            f"Kafka lacks records that the lake has not read: {'; '.join(map(str, losses))}. Nothing was changed. "
            "--accept-loss writes this loss into silver.gaps and goes on with what Kafka has; a new lake_root would "
            "begin with what is left."
        )


def topics_in_kafka(settings: Settings) -> dict[str, TopicNow]:
    """The stream's topics as Kafka has them now; absent ones are left out. Raises KafkaError."""
    names = (settings.ticks_topic, settings.rejects_topic, settings.gaps_topic)
    servers = settings.kafka_bootstrap_servers
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        described = {topic["name"]: topic for topic in admin.describe_topics(list(names)) if not topic["error_code"]}
    with closing(KafkaConsumer(bootstrap_servers=servers)) as consumer:
        topics: dict[str, TopicNow] = {}
        for name, topic in described.items():
            partitions = [TopicPartition(name, part["partition_index"]) for part in topic["partitions"]]
            begins, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
            limits = {part.partition: (begins[part], ends[part]) for part in partitions}
            topics[name] = TopicNow(str(topic["topic_id"]) if topic.get("topic_id") else None, limits)
    return topics
