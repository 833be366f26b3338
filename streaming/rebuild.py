"""Recompute silver and gold from bronze: after a lost checkpoint, or a change of settings that decide content."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from conf.settings import Settings
from lake.contract import RECORD
from lake.delta.drop import DROPPED_BEFORE
from lake.delta.version import PROPERTY as VERSION_PROPERTY
from lake.rules import PROPERTY, deciding
from lake.silver.stage import RECORDS_A_TASK
from lake.tables import (
    BRONZE_TICKS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    STREAMED,
    VERSION,
)
from streaming.checkpoint import Offsets, put_aside
from streaming.lakehouse import lakehouse, opened
from streaming.losses import LIFE, Expired, Topics, require_none, topics_in_kafka

__all__ = ["Expired", "following", "rebuild", "slices"]

logger = logging.getLogger(__name__)

PLACE = ("topic", "partition", "offset")


def rebuild(spark: SparkSession, settings: Settings, *, accept_loss: bool = False) -> Offsets:
    """Recompute silver and gold from bronze. Returns the offsets after bronze's last, where the stream goes on.

    An existing checkpoint is renamed. If this fails half-way, run it again. accept_loss: go on without records that
    Kafka no longer has. Raises Expired, RowsDropped, KafkaError.
    """
    lake = opened(settings)
    check_complete(lake.property(BRONZE_TICKS, DROPPED_BEFORE), BRONZE_TICKS.path(settings.lake_root))
    records = spark.read.format("delta").load(BRONZE_TICKS.path(settings.lake_root))
    topics = following(settings, records, Topics.from_json(lake.metadata(BRONZE_TICKS).get("kafka", {})), accept_loss)
    lake.claim()
    for table in (SILVER_TICKS, SILVER_QUARANTINE):
        name = f"delta.`{table.path(settings.lake_root)}`"
        spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('delta.appendOnly' = 'false')")
    for table in STREAMED:
        if table != BRONZE_TICKS:
            lake.empty(table)
    for table in (SILVER_TICKS, SILVER_QUARANTINE):
        name, made_by = f"delta.`{table.path(settings.lake_root)}`", deciding(settings).replace("'", "\\'")
        properties = f"'delta.appendOnly' = 'true', '{PROPERTY}' = '{made_by}', '{VERSION_PROPERTY}' = '{VERSION}'"
        spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ({properties})")
    lake.claim()
    house = lakehouse(spark, settings, lake)
    house.rebuilding, house.topics = True, topics
    # In the order of arrival, in batches of about the stream's size.
    records = records.select(*RECORD, "ingested_at")
    minutes = records.select((F.unix_timestamp("ingested_at") / 60).cast("bigint").alias("minute")).groupBy("minute")
    spark.sparkContext.setLocalProperty("sql.streaming.queryId", "rebuild")
    parts = slices(minutes.count().orderBy("minute").toLocalIterator(), settings.max_offsets_per_trigger)
    for number, (first, last, count) in enumerate(parts):
        within = (F.col("ingested_at") >= F.timestamp_seconds(F.lit(first * 60))) & (
            F.col("ingested_at") < F.timestamp_seconds(F.lit(last * 60 + 60))
        )
        # Like Kafka's reader: each task reads a contiguous range of a partition.
        tasks = records.where(within).repartitionByRange(-(-count // RECORDS_A_TASK), *PLACE)
        house.write_batch(tasks.sortWithinPartitions(*PLACE), number)
    house.finish()
    put_aside(lake.files, settings.checkpoint_location)
    house.forget_batches()
    logger.info("silver and gold are made anew from bronze")
    return topics.begins


def slices(minutes: Iterable[Row], most: int) -> Iterator[tuple[int, int, int]]:
    """Group minutes into runs (first, last, records) of about `most` records; minutes: rows of minute and count."""
    first, last, records = None, 0, 0
    for minute, count in minutes:
        if first is not None and records + count > most:
            yield first, last, records
            first, records = None, 0
        first = minute if first is None else first
        last, records = minute, records + count
    if first is not None:
        yield first, last, records


class RowsDropped(RuntimeError):
    """bronze no longer has all records."""


def check_complete(dropped_before: str | None, path: str) -> None:
    """Raises RowsDropped if records of bronze, which is at `path`, have been dropped."""
    if dropped_before:
        raise RowsDropped(
            f"records from before {dropped_before} have been dropped from bronze.ticks, so a rebuild "
            "would lose the rows of silver and gold of that time. Nothing was changed. If they may be lost: "
            f"ALTER TABLE delta.`{path}` UNSET TBLPROPERTIES ('{DROPPED_BEFORE}'), then --rebuild again."
        )


def following(settings: Settings, bronze_records: DataFrame, topics: Topics, accept_loss: bool) -> Topics:
    """The topics, beginning after bronze's last records. Raises Expired if Kafka does not have what follows."""
    newest = bronze_records.groupBy("topic", "partition").agg(F.max("offset").alias("offset")).collect()
    last = {(row["topic"], row["partition"]): row["offset"] for row in newest}
    kafka = topics_in_kafka(settings)
    read: Offsets = {}
    for topic in (settings.ticks_topic, settings.rejects_topic, settings.gaps_topic):
        life = range(topics.partition(topic, 0), topics.partition(topic, LIFE))
        of_bronze = {partition - life[0] for name, partition in last if name == topic and partition in life}
        begins = topics.begins.get(topic, {})
        for partition in of_bronze | begins.keys() | (kafka[topic].ends.keys() if topic in kafka else set()):
            after_last = last.get((topic, topics.partition(topic, partition)), -1) + 1
            read.setdefault(topic, {})[partition] = max(after_last, begins.get(partition, 0))
    losses = topics.losses_in(kafka, read)
    if not accept_loss:
        require_none(losses)
    return topics.without(losses, kafka, read)
