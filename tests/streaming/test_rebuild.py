"""A lost checkpoint, or a setting that decides what the tables hold: silver and gold are made anew, nothing is lost."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Hashable, Mapping
from decimal import Decimal
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from pyspark.sql import SparkSession

from conf.settings import Settings
from lake.tables import BRONZE_TICKS, GOLD, SILVER_QUARANTINE, SILVER_TICKS
from streaming.checkpoint import CheckpointError
from streaming.lakehouse import SettingsChanged, resume
from streaming.losses import Expired
from streaming.rebuild import rebuild
from streaming.ticks import start
from tests.lakes import rows_of
from tests.micro_batches import market, of_its_own
from tests.oracle import Lake, Record, Row, differences, lake_of


def stream(spark: SparkSession, settings: Settings, *, anew: bool = False) -> None:
    """What `--once` does, with or without `--rebuild`."""
    follows = rebuild(spark, settings) if anew else None
    lakehouse = resume(spark, settings)
    query = start(spark, settings, lakehouse, follows)
    query.awaitTermination()
    lakehouse.finish()


def compare(spark: SparkSession, settings: Settings, expected: Lake) -> None:
    tables: list[Mapping[Hashable, Row]] = [
        *(expected.bronze, expected.silver, expected.quarantine),
        *(expected.price_5s, expected.price_1m, expected.price_5m, expected.price_1h, expected.price_1d),
        *(expected.rolling_price, expected.current_price, expected.alerts),
    ]
    for table, rows in zip((BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, *GOLD), tables, strict=True):
        found = rows_of(settings.lake_root, table)
        if table == BRONZE_TICKS:
            assert found.keys() == rows.keys()
        else:
            assert differences(rows, found) == [], table.qualified_name


@pytest.mark.services
def test_a_lost_checkpoint_and_a_changed_setting(
    spark: SparkSession, running: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = of_its_own(running("kafka"), tmp_path)
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    admin.create_topics({settings.ticks_topic: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
    producer = KafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers, acks="all")
    values = [*market(random.Random(4)), b"no tick"]
    records = [Record(settings.ticks_topic, 0, number, None, value) for number, value in enumerate(values)]
    third = len(records) // 3

    def send(part: list[Record]) -> None:
        for record in part:
            assert record.value is not None
            producer.send(settings.ticks_topic, record.value)
        producer.flush()

    def expected(part: list[Record], settings: Settings) -> Lake:
        threshold = float(settings.alert_threshold_pct)
        return lake_of(part, ticks_topic=settings.ticks_topic, alert_threshold_pct=threshold)

    send(records[:third])
    stream(spark, settings)
    send(records[third : 2 * third])
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="--rebuild"):
        resume(spark, settings)
    stream(spark, settings, anew=True)
    compare(spark, settings, expected(records[: 2 * third], settings))

    changed = settings.model_copy(update={"alert_threshold_pct": Decimal(1)})
    with pytest.raises(SettingsChanged, match="alert_threshold_pct was 2, is 1"):
        resume(spark, changed)
    send(records[2 * third :])
    stream(spark, changed, anew=True)
    wanted = expected(records, changed)
    assert len(wanted.alerts) > len(expected(records, settings).alerts)
    compare(spark, changed, wanted)

    send(records[:10])
    partition = TopicPartition(settings.ticks_topic, 0)
    admin.delete_records({partition: len(records) + 4})
    with pytest.raises(Expired, match=f"4 records from {len(records)} to {len(records) + 3} have expired"):
        rebuild(spark, changed)
    compare(spark, changed, wanted)
    producer.close()
    admin.close()
