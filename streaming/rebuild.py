"""Recompute silver and gold from bronze: after a lost checkpoint, or a change of settings that decide content."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from kafka import KafkaConsumer, TopicPartition
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from conf.settings import Settings
from lake.contract import RECORD
from lake.delta.drop import DROPPED_BEFORE
from lake.delta.files import Files
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
from streaming.lakehouse import lakehouse, opened

logger = logging.getLogger(__name__)

PLACE = ("topic", "partition", "offset")


def rebuild(spark: SparkSession, settings: Settings) -> dict[str, dict[str, int]]:
    """Recompute silver and gold from bronze. Returns, per topic and partition, the offset after bronze's last.

    An existing checkpoint is renamed. If this fails half-way, run it again. Raises Expired, RowsDropped.
    """
    lake = opened(settings)
    check_complete(lake.property(BRONZE_TICKS, DROPPED_BEFORE), BRONZE_TICKS.path(settings.lake_root))
    records = spark.read.format("delta").load(BRONZE_TICKS.path(settings.lake_root))
    follows = following(settings, records)
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
    house.rebuilding = True
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
    for table in STREAMED:
        lake.forget(table)
    logger.info("silver and gold are made anew from bronze")
    return follows


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


class Expired(RuntimeError):
    """Kafka no longer has the records after bronze's last one."""


def following(settings: Settings, bronze_records: DataFrame) -> dict[str, dict[str, int]]:
    """Per topic and partition in Kafka, the offset after bronze's last. Raises Expired."""
    newest = bronze_records.groupBy("topic", "partition").agg(F.max("offset").alias("offset")).collect()
    last = {(row["topic"], row["partition"]): row["offset"] for row in newest}
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers)
    try:
        follows: dict[str, dict[str, int]] = {}
        for topic in (settings.ticks_topic, settings.rejects_topic, settings.gaps_topic):
            partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
            earliest = consumer.beginning_offsets(partitions) if partitions else {}
            for partition, begin in earliest.items():
                follows_at = last.get((topic, partition.partition), -1) + 1
                if follows_at < begin:
                    raise Expired(
                        f"topic {topic}, partition {partition.partition}: bronze ends at offset {follows_at - 1}, and "
                        f"Kafka begins at {begin}: {begin - follows_at} records from {follows_at} to {begin - 1} have "
                        "expired. "
                        "Nothing was changed. A new lake_root would begin with what is left."
                    )
                follows.setdefault(topic, {})[str(partition.partition)] = follows_at
        return follows
    finally:
        consumer.close()


def put_aside(files: Files, location: str) -> None:
    """Rename a checkpoint, if there is one."""
    if files.exists(location):
        files.rename(location, f"{location}.before-{datetime.now(UTC):%Y%m%dT%H%M%S}")
