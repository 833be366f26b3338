"""What the streaming job says of itself is what it did, and is unhealthy when it stands still."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from kafka import KafkaAdminClient, KafkaProducer

from conf.settings import Settings
from lake.delta.lease import Lease
from lake.delta.log import TableLog
from lake.delta.writer import Fenced
from lake.tables import BRONZE_TICKS, GOLD_CURRENT_PRICE, SILVER_QUARANTINE, SILVER_TICKS, STREAMED
from operation.lag import KafkaLag
from operation.server import Server
from streaming.lakehouse import Lakehouse
from streaming.status import Subject, processed_offsets
from tests.lakes import rows_of
from tests.micro_batches import in_kafka, lake_in, market, opened, write, write_one
from tests.operation.conventions import exposed, problems_of
from tests.programs import wait_until

NO_KAFKA = "127.0.0.1:1"


@contextmanager
def leased(settings: Settings, lakehouse: Lakehouse) -> Iterator[Lease]:
    lease = Lease(lakehouse.writer.files, settings.lake_root)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def page_of(subject: Subject, folder: Path) -> tuple[str, dict[str, Any]]:
    """/metrics and /status."""
    with Server("streaming", 0, subject, folder) as server:
        return server.answer("/metrics", "")[2].decode(), json.loads(server.answer("/status", "")[2])


def test_counts_are_what_the_tables_have(tmp_path: Path) -> None:
    settings = lake_in(tmp_path, kafka_bootstrap_servers=NO_KAFKA, state_dir=tmp_path)
    lakehouse = opened(settings)
    values: list[bytes | None] = list(market(random.Random(5)))
    parts = [
        in_kafka([*values[:200], b"no tick", values[3], values[3]]),
        in_kafka([*values[190:300], None], first=203),
        in_kafka([b"a report that is none"], "gaps"),
    ]
    for number, part in enumerate(parts):
        write_one(lakehouse, part, number, tasks=2)
    with leased(settings, lakehouse) as lease:
        subject = Subject(settings, lakehouse, lease, psutil.Process())
        for table in STREAMED:
            lakehouse.writer.count(table)
        page, status = page_of(subject, tmp_path)
    figures = exposed(page)
    assert problems_of(page) == []
    root = settings.lake_root
    silver, quarantine = len(rows_of(root, SILVER_TICKS)), len(rows_of(root, SILVER_QUARANTINE))
    assert figures["tickhouse_stream_micro_batches_total"] == 3
    assert figures["tickhouse_stream_records_total"] == len(rows_of(root, BRONZE_TICKS)) == sum(map(len, parts))
    assert figures["tickhouse_stream_ticks_total"] == silver == 300
    assert figures["tickhouse_stream_quarantined_total"] == quarantine == 3
    # Twice the same of the first part, and the ten that both parts have.
    assert figures["tickhouse_stream_repeats_total"] == 12
    for stage in ("stage", "deduplicate", "bronze.ticks", "silver.ticks", "silver.gaps", "whole"):
        assert figures[f'tickhouse_stream_stage_seconds_count{{stage="{stage}"}}'] == 3
    # The last micro-batch has no tick.
    assert figures['tickhouse_stream_stage_seconds_count{stage="gold"}'] == 2
    whole, staging = (figures[f'tickhouse_stream_stage_seconds_sum{{stage="{name}"}}'] for name in ("whole", "stage"))
    assert whole > staging > 0
    for table in STREAMED:
        name, log = table.qualified_name, TableLog(lakehouse.writer.files, table.path(root))
        assert figures[f'tickhouse_table_files{{table="{name}"}}'] == len(log.files()), name
        assert figures[f'tickhouse_table_version{{table="{name}"}}'] == log.newest(), name
        # No checkpoint yet: every commit counts, also the one that created the table.
        assert figures[f'tickhouse_table_log_files{{table="{name}"}}'] == log.newest() + 1, name
    assert figures["tickhouse_stream_epoch"] == lakehouse.writer.epoch
    assert figures["tickhouse_stream_lease_held"] == 1
    assert figures["tickhouse_stream_jvm_resident_memory_bytes"] > 1e6
    assert not [name for name in figures if name.startswith("tickhouse_upkeep_")], "it is off"
    assert status["last_batch"]["number"] == 2
    assert (status["recent_batches"], status["recent_records"]) == (3, sum(map(len, parts)))
    lakehouse.finish()


def tick(received_at: datetime, number: int) -> bytes:
    at = received_at.isoformat(timespec="microseconds")
    return json.dumps(
        {"timestamp": at, "asset": "x", "price_usd": "1", "source": "a", "symbol": "X", "trade_id": number}
    ).encode()


def test_freshness_is_from_the_newest_receipt_to_the_commit(tmp_path: Path) -> None:
    settings = lake_in(tmp_path)
    lakehouse = opened(settings)
    began = time.time()
    minute_ago, hour_ago = (datetime.now(UTC) - timedelta(seconds=seconds) for seconds in (60, 3_600))
    write_one(lakehouse, in_kafka([tick(hour_ago, 1), tick(minute_ago, 2)]), 0)
    took = time.time() - began
    for table in (BRONZE_TICKS, SILVER_TICKS, GOLD_CURRENT_PRICE):
        freshness = lakehouse.progress.freshness(table.qualified_name)
        assert freshness is not None
        # Statistics have milliseconds.
        assert 59.9 < freshness < 60.1 + took
    assert lakehouse.progress.freshness("gold.price_1d") is None, "the longer windows come later"
    lakehouse.finish()
    lakehouse.progress.observe_commits(lakehouse.writer)
    assert (lakehouse.progress.freshness("gold.price_1d") or 0) > 59.9


def test_a_replay_counts_no_tick_again(tmp_path: Path) -> None:
    settings = lake_in(tmp_path)
    part = in_kafka(market(random.Random(6))[:100])
    write(None, settings, [part])
    again = opened(settings)
    write_one(again, part, 0)
    samples = {
        sample.name: sample.value
        for metric in again.progress.metrics()
        for sample in metric.samples
        if not sample.labels
    }
    assert samples["tickhouse_stream_micro_batches_total"] == 1
    assert samples["tickhouse_stream_ticks_total"] == samples["tickhouse_stream_repeats_total"] == 0
    again.finish()


def test_a_lost_lease_and_a_newer_writer_are_trouble(tmp_path: Path) -> None:
    settings = lake_in(tmp_path, kafka_bootstrap_servers=NO_KAFKA, state_dir=tmp_path)
    lakehouse = opened(settings)
    with leased(settings, lakehouse) as lease:
        subject = Subject(settings, lakehouse, lease, None)
        assert subject.trouble() == []
        holder = json.loads(lakehouse.writer.files.read(lease.url))
        lakehouse.writer.files.replace(lease.url, json.dumps({**holder, "id": "another"}).encode())
        wait_until(lambda: subject.trouble() != [], "it sees that another job holds the lease")
        assert subject.trouble() == [f"the lease of the lake {settings.lake_root} is not held"]
        write_one(lakehouse, in_kafka([tick(datetime.now(UTC), 1)]), 0)
        second = opened(settings)
        with pytest.raises(Fenced):
            write_one(lakehouse, in_kafka([tick(datetime.now(UTC), 2)], first=1), 1)
        [trouble] = subject.trouble()
        assert "taken over" in trouble
        figures = exposed(page_of(subject, tmp_path)[0])
        assert (figures["tickhouse_stream_fenced"], figures["tickhouse_healthy"]) == (1, 0)
        second.finish()


def test_a_job_is_unhealthy_while_kafka_cannot_be_seen(tmp_path: Path) -> None:
    lag = KafkaLag(NO_KAFKA, ["ticks"], stale_seconds=0.5, processed=dict, look_seconds=0.2)
    assert lag.trouble() == []
    lag.start()
    wait_until(lambda: lag.trouble() != [], "it says so")
    assert "how much Kafka has cannot be seen" in lag.trouble()[0]
    lag.stop()


@pytest.mark.services
def test_lag_is_what_kafka_has_beyond_the_checkpoint(running: Callable[..., Settings], tmp_path: Path) -> None:
    """Fresh records are lag, old ones trouble; what the checkpoint has is neither."""
    suite = running("kafka")
    name = uuid.uuid4().hex[:8]
    settings = lake_in(
        tmp_path,
        kafka_bootstrap_servers=suite.kafka_bootstrap_servers,
        state_dir=tmp_path,
        stream_stale_seconds=3_600,
        ticks_topic=f"ticks-{name}",
        rejects_topic=f"rejects-{name}",
        gaps_topic=f"gaps-{name}",
    )
    lakehouse = opened(settings)
    ticks = settings.ticks_topic
    offsets = tmp_path / "checkpoint" / "offsets"

    def checkpoint(batch: int, ends: dict[str, dict[str, int]]) -> None:
        """As Spark writes it before a micro-batch."""
        offsets.mkdir(exist_ok=True)
        (offsets / str(batch)).write_text(f'v1\n{{"batchTimestampMs":1}}\n{json.dumps(ends)}')

    with leased(settings, lakehouse) as lease:
        subject = Subject(settings, lakehouse, lease, None)
        subject.lag.look()
        assert (subject.lag.records, subject.trouble()) == ({}, []), "there is no topic yet"
        admin = KafkaAdminClient(bootstrap_servers=suite.kafka_bootstrap_servers)
        admin.create_topics({ticks: {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        producer = KafkaProducer(bootstrap_servers=suite.kafka_bootstrap_servers, acks="all")
        long_ago = round((time.time() - 7_200) * 1_000)
        for number in range(10):
            at = long_ago if number < 4 else None
            producer.send(ticks, tick(datetime.now(UTC), number), partition=0, timestamp_ms=at).get(30)
        producer.send(ticks, b"no tick", partition=1).get(30)
        producer.close()

        def look() -> tuple[int, int, int]:
            subject.lag.look()
            records = subject.lag.records
            return records[ticks, 0], records[ticks, 1], subject.lag.stale_total

        wait_until(lambda: _raises_nothing(look), "the consumer knows the topic")
        assert look() == (10, 1, 4)
        assert subject.lag.trouble(is_reader=False) == [], "another process is behind"
        [trouble] = subject.trouble()
        assert "4 of the 11 records to go have been in Kafka for more than 3600 s" in trouble
        assert "not since the start" in trouble
        write_one(lakehouse, in_kafka([b"x"]), 0)
        checkpoint(0, {ticks: {"0": 3}})
        assert look() == (7, 1, 1)
        [trouble] = subject.trouble()
        assert trouble.endswith(" s ago")
        checkpoint(1, {ticks: {"0": 10, "1": 1}})
        assert look() == (7, 1, 1), "a micro-batch that is not written yet is lag"
        write_one(lakehouse, in_kafka([b"x"], first=1), 1)
        assert look() == (0, 0, 0)
        assert subject.trouble() == []
        page = page_of(subject, tmp_path)[0]
        assert problems_of(page) == []
        assert exposed(page)[f'tickhouse_kafka_lag_records{{partition="0",reader="stream",topic="{ticks}"}}'] == 0
    assert processed_offsets(lakehouse.writer.files, settings.checkpoint_location, 0) == {(ticks, 0): 3}
    assert processed_offsets(lakehouse.writer.files, settings.checkpoint_location, -1) == {}


def _raises_nothing(look: Callable[[], object]) -> bool:
    try:
        look()
    except KeyError:
        return False
    return True
