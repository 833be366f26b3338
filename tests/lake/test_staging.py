"""What an executor's task stages: promises 1 and 5, every record is in the files that it names, whatever its size."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lake.parquet import arrow_table
from lake.staging import BYTES_A_FILE, RECORDS_A_FILE, Plan, Staged, stage_part
from lake.store import Store
from lake.tables import BRONZE_TICKS, SILVER_TICKS
from tests.lake.test_ticks import TICK

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def tick(number: int) -> bytes:
    return json.dumps({**TICK, "trade_id": number, "sequence": number}, separators=(",", ":")).encode()


def batches(topic: str, values: Iterator[bytes], records_a_batch: int) -> Iterator[pa.RecordBatch]:
    """Records as Spark hands them on: consecutive offsets, a few at a time, and now and then none."""
    names = ("key", "value", "topic", "partition", "offset", "kafka_timestamp")
    rows: list[tuple[object, ...]] = []
    for offset, value in enumerate(values):
        rows.append((b"binance:BTCUSDT", value, topic, 0, offset, NOW, NOW, NOW.date()))
        if len(rows) == records_a_batch:
            some = arrow_table(BRONZE_TICKS, rows).select(names)
            yield from some.to_batches()
            yield pa.RecordBatch.from_pylist([], schema=some.schema)
            rows = []
    if rows:
        yield from arrow_table(BRONZE_TICKS, rows).select(names).to_batches()


def staged(folder: Path, records: Iterator[pa.RecordBatch]) -> Staged:
    root = f"file:{folder}"
    plan = Plan(Store.of(root, ""), root, (BRONZE_TICKS, SILVER_TICKS), NOW, ("rejects", "gaps"), 5.0, {})
    (row,) = [row for batch in stage_part(records, plan) for row in batch.to_pylist()]
    told = pickle.loads(row["staged"])
    assert isinstance(told, Staged)
    return told


def offsets(folder: Path, told: Staged) -> list[int]:
    """Those in bronze's staged files."""
    files = [f"{BRONZE_TICKS.path(str(folder))}/{action['path']}" for action in told.of(BRONZE_TICKS)]
    return sorted(offset for file in files for offset in pq.read_table(file, columns=["offset"])["offset"].to_pylist())


def test_many_records_become_several_files(tmp_path: Path) -> None:
    count = RECORDS_A_FILE + 2_345
    told = staged(tmp_path, batches("ticks", (tick(number) for number in range(count)), 1_000))
    assert (told.records, told.odd) == (count, [])
    assert [len(told.of(table)) for table in (BRONZE_TICKS, SILVER_TICKS)] == [2, 2]
    assert offsets(tmp_path, told) == list(range(count))
    runs = [(0, RECORDS_A_FILE - 1), (RECORDS_A_FILE, count - 1)]
    assert told.overview.runs == [(("binance", "BTCUSDT", 0), run) for run in runs]


def test_large_records_become_several_files_too(tmp_path: Path) -> None:
    """Rejected frames of 64 KiB are not held in memory by the hundred thousand."""
    size, count = 64 * 1024, 5_000
    told = staged(tmp_path, batches("rejects", (bytes(size) for _ in range(count)), 300))
    assert told.records == count > 2 * BYTES_A_FILE // size
    assert told.of(SILVER_TICKS) == []
    assert offsets(tmp_path, told) == list(range(count))
    odd = [pq.read_table(url.removeprefix("file:"), columns=["offset"])["offset"].to_pylist() for url in told.odd]
    assert sorted(offset for part in odd for offset in part) == list(range(count))
    assert max(len(part) for part in odd) * size < 2 * BYTES_A_FILE
