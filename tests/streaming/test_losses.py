"""Promise 4 where Kafka no longer has what the stream has not read: it is named, and goes on only if it is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from pyspark.sql import SparkSession

from batch.comparable import Comparable
from batch.prove import bronze_checks
from conf.settings import Settings
from lake.tables import BRONZE_TICKS, SILVER_GAPS
from streaming.checkpoint import CheckpointError, position_of
from streaming.lakehouse import resume
from streaming.losses import LIFE, Expired, TopicNow, Topics
from streaming.rebuild import rebuild
from streaming.ticks import go_on, start
from tests.lakes import rows_of, wrong_rows
from tests.micro_batches import lake_in, of_its_own, opened
from tests.oracle import Record, lake_of


def value(number: int) -> bytes:
    """A tick that only its place in Kafka tells from others."""
    at = f"2024-08-09T00:{number // 60:02d}:{number % 60:02d}Z"
    return json.dumps({"timestamp": at, "asset": "x", "price_usd": str(100 + number), "source": "a"}).encode()


def once(spark: SparkSession, settings: Settings, *, accept_loss: bool = False, anew: bool = False) -> None:
    """What the command does with --once, and these options."""
    if anew:
        rebuild(spark, settings, accept_loss=accept_loss)
    lakehouse = resume(spark, settings)
    follows = go_on(lakehouse, settings, accept_loss=accept_loss)
    start(spark, settings, lakehouse, follows).awaitTermination()
    lakehouse.finish()


@pytest.mark.services
def test_records_that_expired_and_a_topic_that_was_made_anew(
    spark: SparkSession, running: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = of_its_own(running("kafka"), tmp_path)
    topic = settings.ticks_topic
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    producer = KafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers, acks="all")
    records: list[Record] = []

    def create() -> None:
        admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)

    def send(count: int, life: int, first: int) -> list[Record]:
        sent = [Record(topic, LIFE * life, first + n, None, value(100 * life + first + n)) for n in range(count)]
        for record in sent:
            producer.send(topic, record.value)
        producer.flush()
        return sent

    def losses() -> list[str]:
        rows = rows_of(settings.lake_root, SILVER_GAPS).values()
        assert {row["status"] for row in rows} == {"unfillable"}
        return sorted(str(row["reason"]) for row in rows)

    def compare() -> None:
        wrong = wrong_rows(settings.lake_root, lake_of(records, ticks_topic=topic))
        assert {name: words for name, words in wrong.items() if name != BRONZE_TICKS.qualified_name} == {}
        found = rows_of(settings.lake_root, BRONZE_TICKS)
        assert found.keys() == {record.place for record in records}
        bronze, gaps = (
            spark.read.format("delta").load(table.path(settings.lake_root)) for table in (BRONZE_TICKS, SILVER_GAPS)
        )
        # The proof knows of the accepted loss.
        assert [check.wrong for check in bronze_checks(bronze, gaps, Comparable({}))] == [0, 0]

    create()
    records += send(10, 0, 0)
    once(spark, settings)
    # An outage longer than the retention.
    expired = send(10, 0, 10)
    admin.delete_records({TopicPartition(topic, 0): 15})
    records += expired[5:]
    message = f"topic {topic}, partition 0: .*: 5 records from 10 to 14 have expired.*--accept-loss"
    with pytest.raises(Expired, match=message):
        once(spark, settings)
    with pytest.raises(Expired, match=message):
        rebuild(spark, settings)
    once(spark, settings, accept_loss=True)
    compare()
    [reason] = losses()
    assert f"topic {topic}, partition 0" in reason
    assert "from 10 to 14" in reason
    once(spark, settings)

    # A disk that is lost, or a topic that is deleted: it has grown past the old offset when the stream comes back.
    admin.delete_topics([topic])
    create()
    records += send(30, 1, 0)
    anew = "the topic was made anew, and ends at offset 30 now: an unknown number of records from 20 on"
    for step in (once, rebuild):
        with pytest.raises(Expired, match=anew):
            step(spark, settings)
    once(spark, settings, accept_loss=True, anew=True)
    compare()
    assert [text for text in losses() if "made anew" in text]
    assert reason in losses()
    records += send(5, 1, 30)
    once(spark, settings)
    compare()
    assert len(losses()) == 2
    producer.close()
    admin.close()


KNOWN = Topics(ids={"ticks": "one", "gaps": "one too"})


@pytest.mark.parametrize(
    ("kafka", "message"),
    [
        ({"ticks": TopicNow("one", {0: (0, 9)})}, None),
        ({"ticks": TopicNow("one", {0: (5, 5), 1: (7, 8)})}, None),
        ({"ticks": TopicNow(None, {0: (0, 9)})}, None),
        ({}, "partition 0: Kafka has it no more"),
        ({"ticks": TopicNow("one", {1: (0, 1)})}, "partition 0: Kafka has it no more"),
        ({"ticks": TopicNow("two", {0: (0, 9)})}, "made anew"),
        ({"ticks": TopicNow("one", {0: (0, 9)}), "gaps": TopicNow("other", {0: (0, 3)})}, None),
        ({"ticks": TopicNow("one", {0: (0, 4)})}, "Kafka ends at offset 4, before 5"),
        ({"ticks": TopicNow("one", {0: (7, 9)})}, "Kafka begins at 7: 2 records from 5 to 6"),
    ],
)
def test_what_kafka_lacks_is_named(kafka: dict[str, TopicNow], message: str | None) -> None:
    losses = KNOWN.losses_in(kafka, {"ticks": {0: 5}, "gaps": {0: 0}})
    assert ([message] if message else []) == [message for loss in losses if message and message in str(loss)]
    assert len(losses) == (message is not None)


def test_after_a_log_was_cut_short_its_new_records_are_read_in_a_life_of_their_own() -> None:
    """Kafka gives offsets anew that the lake has already."""
    kafka = {"ticks": TopicNow("one", {0: (0, 4), 1: (2, 9)})}
    read = {"ticks": {0: 5, 1: 7}}
    after = KNOWN.without(KNOWN.losses_in(kafka, read), kafka, read)
    assert after.begins == {"ticks": {0: 4, 1: 7}}
    assert after.partition("ticks", 1) == LIFE + 1
    assert Topics.from_json(json.loads(json.dumps(after.to_json()))) == after


# The checkpoint


def spark_checkpoint(folder: Path, settings: Settings) -> Path:
    """As Spark writes it: micro-batch 0 is complete, and 1 planned."""
    for name, content in {
        "offsets/0": 'v1\n{"batchWatermarkMs":0}\n{"ticks":{"0":5}}',
        "offsets/1": 'v1\n{"batchWatermarkMs":0}\n{"ticks":{"0":8}}',
        "commits/0": 'v1\n{"nextBatchWatermarkMs":0}',
        "sources/0/0": '\0v1\n{"ticks":{"0":0}}',
    }.items():
        path = folder / "checkpoint" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "checkpoint"


def test_the_position_is_after_the_last_complete_micro_batch(tmp_path: Path) -> None:
    settings = lake_in(tmp_path)
    files = opened(settings).writer.files
    assert position_of(files, settings.checkpoint_location) is None
    folder = spark_checkpoint(tmp_path, settings)
    position = position_of(files, settings.checkpoint_location)
    assert position is not None
    assert (position.batch, position.offsets) == (0, {"ticks": {0: 5}})
    (folder / "commits/0").unlink()
    position = position_of(files, settings.checkpoint_location)
    assert position is not None
    assert (position.batch, position.offsets) == (-1, {"ticks": {0: 0}})


@pytest.mark.parametrize("name", ["metadata", "offsets/0", "offsets/1", "commits/0"])
@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_damaged_checkpoint_is_named_with_advice(tmp_path: Path, name: str, length: int) -> None:
    """After a power cut a file is empty or cut short."""
    settings = lake_in(tmp_path)
    files = opened(settings).writer.files
    path = spark_checkpoint(tmp_path, settings) / name
    path.write_bytes(path.read_bytes()[:length])

    def begin() -> None:
        opened(settings)
        position_of(files, settings.checkpoint_location)

    with pytest.raises(CheckpointError, match=f"{name} is missing, empty or cut short.*--rebuild"):
        begin()
