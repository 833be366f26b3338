"""What an executor's task stages: promises 1 and 5, each record is in the files that it names, whatever its size."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from lake.contract import RECORD, TickRules
from lake.delta.files import LocalDisk, QuotaExceeded, StoreUnavailable
from lake.delta.log import Action
from lake.gold.summary import merged
from lake.silver import stage as stage_module
from lake.silver.deduplicate import Seen
from lake.silver.stage import BYTES_A_FILE, RECORDS_A_FILE, Plan, Staged, read_back, stage_part, without_repeats
from lake.tables import BRONZE_TICKS, SILVER_QUARANTINE, SILVER_TICKS, Table
from tests.lakes import wrong_gaps, wrong_rows
from tests.micro_batches import in_kafka, lake_in, market, opened, write, write_one
from tests.oracle import Quarantined, Record, Tick, lake_of, row_of
from tests.ticks import CASES, GAP, TICK, arrow_records, compact

NOW = datetime(2026, 11, 25, tzinfo=UTC)
TABLES = (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE)
NO_MINUTES = pl.DataFrame(schema={"source": pl.String, "asset": pl.String, "newest": pl.Int64})


def plan_in(folder: Path, tables: tuple[Table, ...] = TABLES, minutes: pl.DataFrame = NO_MINUTES) -> Plan:
    rules = TickRules("rejects", "gaps", 5.0)
    return Plan(LocalDisk(), f"file:{folder}", tables, NOW, rules, minutes)


def tick(number: int, **fields: object) -> bytes:
    return compact({**TICK, "trade_id": number, "sequence": number, **fields})


def batches(records: Sequence[Record], records_a_batch: int) -> Iterator[pa.RecordBatch]:
    """Records as Spark hands them on: a few at a time, and now and then none."""
    rows = arrow_records(records).select(RECORD).combine_chunks()
    for at in range(0, len(records), records_a_batch):
        yield from rows.slice(at, records_a_batch).to_batches()
        yield pa.RecordBatch.from_pylist([], schema=rows.schema)


def staged(plan: Plan, records: Sequence[Record], records_a_batch: int = 300) -> Staged:
    [row] = [row for batch in stage_part(batches(records, records_a_batch), plan) for row in batch.to_pylist()]
    found = pickle.loads(row["staged"])
    assert isinstance(found, Staged)
    return found


def rows_of(folder: Path, table: Table, actions: Sequence[Action]) -> list[dict[str, object]]:
    """Those of the table's staged files, with the partition that the log would give them."""
    rows: list[dict[str, object]] = []
    for action in actions:
        for row in pq.ParquetFile(f"{table.path(str(folder))}/{action['path']}").read().to_pylist():
            rows.append({**row, **action["partitionValues"]})
    return rows


def offsets(folder: Path, table: Table, found: Staged) -> list[int]:
    name = "kafka_offset" if table == SILVER_TICKS else "offset"
    return sorted(int(str(row[name])) for row in rows_of(folder, table, found.of(table)))


# Files


def test_each_record_is_in_bronze_and_in_silver_or_quarantine_or_a_report(tmp_path: Path) -> None:
    """Of all odd records that the contract knows, each by its place."""
    records = [replace(case.record(offset), ingested_at=NOW) for offset, case in enumerate(CASES)]
    found = staged(plan_in(tmp_path), records, 7)
    expected = lake_of(records)
    reports = [record.offset for record in records if row_of(record) is None]
    assert found.records == len(CASES)
    assert offsets(tmp_path, BRONZE_TICKS, found) == list(range(len(CASES)))
    assert sorted(row.kafka_offset for row in expected.silver.values()) == offsets(tmp_path, SILVER_TICKS, found)
    assert sorted(row.offset for row in expected.quarantine.values()) == offsets(tmp_path, SILVER_QUARANTINE, found)
    assert len(found.reports) == len(reports)


def test_silver_has_a_file_of_each_date(tmp_path: Path) -> None:
    times = {n: f"2024-08-{9 + n % 3:02d}T00:00:00Z" for n in range(9)}
    found = staged(plan_in(tmp_path), in_kafka(tick(n, event_time=time) for n, time in times.items()))
    rows = rows_of(tmp_path, SILVER_TICKS, found.of(SILVER_TICKS))
    assert {(row["trade_id"], row["event_date"]) for row in rows} == {(n, time[:10]) for n, time in times.items()}
    assert len(found.of(SILVER_TICKS)) == 3
    assert len(found.of(BRONZE_TICKS)) == 1


def test_many_records_become_several_files(tmp_path: Path) -> None:
    count = RECORDS_A_FILE + 2_345
    found = staged(plan_in(tmp_path), in_kafka(tick(number) for number in range(count)), 1_000)
    assert (found.records, found.of(SILVER_QUARANTINE)) == (count, [])
    assert [len(found.of(table)) for table in (BRONZE_TICKS, SILVER_TICKS)] == [2, 2]
    assert offsets(tmp_path, BRONZE_TICKS, found) == list(range(count))
    runs = [part.numbers.runs.select("first", "last").rows() for part in found.ticks]
    assert [run for part in runs for run in part] == [(0, RECORDS_A_FILE - 1), (RECORDS_A_FILE, count - 1)]


def test_large_records_become_several_files_too(tmp_path: Path) -> None:
    """Rejected frames of 64 KiB are not held in memory by the hundred thousand."""
    size, count = 64 * 1024, 5_000
    found = staged(plan_in(tmp_path), in_kafka((bytes(size) for _ in range(count)), "rejects"))
    assert found.records == count > 2 * BYTES_A_FILE // size
    assert found.of(SILVER_TICKS) == []
    assert offsets(tmp_path, BRONZE_TICKS, found) == list(range(count))
    parts = [rows_of(tmp_path, SILVER_QUARANTINE, [action]) for action in found.of(SILVER_QUARANTINE)]
    assert sorted(int(str(row["offset"])) for part in parts for row in part) == list(range(count))
    assert max(map(len, parts)) * size < 2 * BYTES_A_FILE


def test_a_table_that_has_the_micro_batch_gets_no_file(tmp_path: Path) -> None:
    """A replay tells the driver the same, and writes what is lacking."""
    records = in_kafka([tick(1), b"{"])
    first = staged(plan_in(tmp_path), records)
    found = staged(plan_in(tmp_path, (SILVER_QUARANTINE,)), records)
    assert (found.of(BRONZE_TICKS), found.of(SILVER_TICKS)) == ([], [])
    assert len(found.of(SILVER_QUARANTINE)) == 1
    assert found.ticks[0].summaries.equals(first.ticks[0].summaries)


def test_a_task_without_records_stages_nothing(tmp_path: Path) -> None:
    found = staged(plan_in(tmp_path), [])
    assert (found.records, found.ticks, found.files) == (0, [], {})
    assert list(tmp_path.iterdir()) == []


def test_what_executors_staged_is_put_together(tmp_path: Path) -> None:
    plan, whole = plan_in(tmp_path), Staged()
    report = compact({**GAP, "first_missing": 7, "last_missing": 9})
    for first in (0, 10):
        records = [*in_kafka([tick(first), b'{"trade_id": 3}'], first=first), *in_kafka([report], "gaps", first=first)]
        whole.add(staged(plan, records))
    assert whole.records == 6
    assert (len(whole.of(BRONZE_TICKS)), len(whole.of(SILVER_TICKS)), len(whole.of(SILVER_QUARANTINE))) == (2, 2, 2)
    assert [report.first_missing for report in whole.reports] == [7, 7]


# Records that cannot be read


def poisonous(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step of staging fail where it meets a record or tick with POISON."""
    real = getattr(stage_module, name)

    def step(rows: pa.Table | pl.DataFrame, *more: object) -> object:
        if "POISON" in str(rows.to_pydict()["value"] if isinstance(rows, pa.Table) else rows["symbol"].to_list()):
            raise error
        return real(rows, *more)

    monkeypatch.setattr(stage_module, name, step)


@pytest.mark.parametrize("step", ["read", "of_ticks"])
def test_a_record_that_cannot_be_read_is_in_quarantine_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Also where only its tick cannot be written. All other records of the task are staged as ever."""
    bad = {7, 23, 24, 90}
    records = in_kafka([tick(n, symbol="POISON") if n in bad else tick(n) for n in range(100)])
    poisonous(step, ValueError("what\x1b[31m\nis " + "this" * 1_000), monkeypatch)
    found = staged(plan_in(tmp_path), records, 30)
    assert offsets(tmp_path, BRONZE_TICKS, found) == list(range(100))
    assert offsets(tmp_path, SILVER_TICKS, found) == sorted(set(range(100)) - bad)
    rows = rows_of(tmp_path, SILVER_QUARANTINE, found.of(SILVER_QUARANTINE))
    assert {(row["offset"], row["value"]) for row in rows} == {(n, records[n].value) for n in bad}
    assert {row["rule"] for row in rows} == {"unreadable"}
    assert all(str(row["reason"]).startswith("ValueError: what\\x1b[31m\\nis this") for row in rows)
    assert all(len(str(row["reason"])) < 1_100 for row in rows)
    assert sorted(text.partition(" cannot be read: ValueError")[0] for text in found.unreadable) == sorted(
        f"ticks:0:{n}" for n in bad
    )
    assert found.records == 100
    assert found.offsets == {("ticks", 0): (0, 99)}
    assert sum(int(part.summaries["tick_count"].sum()) for part in found.ticks) == 96


@pytest.mark.parametrize("error", [StoreUnavailable("no answer"), OSError("disk"), MemoryError()], ids=repr)
def test_an_error_of_the_machine_is_no_record_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    poisonous("read", error, monkeypatch)
    with pytest.raises(type(error)):
        staged(plan_in(tmp_path), in_kafka([tick(1), tick(2, symbol="POISON")]))


def test_a_task_that_can_read_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a library that is broken: no record is to blame, and none goes to quarantine."""

    def read(*_: object) -> None:
        raise AttributeError("no such function")

    monkeypatch.setattr(stage_module, "read", read)
    with pytest.raises(AttributeError, match="no such function"):
        staged(plan_in(tmp_path), in_kafka([tick(1), tick(2)]))


@dataclass(frozen=True)
class Full(LocalDisk):
    """A store whose quota is used up for data files."""

    def write(self, url: str, content: bytes) -> None:
        raise QuotaExceeded("the quota is used up")


def test_a_used_up_quota_ends_a_micro_batch_at_once_without_a_retry_of_the_task(tmp_path: Path) -> None:
    """Spark would run a task that fails again; so the task returns the error, and the driver raises it."""
    settings = lake_in(tmp_path)
    lakehouse = opened(settings)
    lakehouse.writer.files = Full()
    with pytest.raises(QuotaExceeded, match="the quota is used up"):
        write_one(lakehouse, in_kafka([tick(1)]), 0)
    assert isinstance(lakehouse.failure, QuotaExceeded)


SHORT = [case.value for case in CASES if len(case.value or b"") < 2_000]
times = st.one_of(st.just(-1), st.integers(0, 2**53), st.integers(-(2**53), 2**53))
anything = st.one_of(st.none(), st.binary(max_size=60), st.sampled_from(SHORT))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(anything, anything, times, st.sampled_from(["ticks", "rejects", "gaps"])), max_size=8))
def test_whatever_a_record_holds_it_is_staged(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[bytes | None, bytes | None, int, str]]
) -> None:
    """Any bytes as key and value, and any time in milliseconds, on any topic: each record is in one place."""
    folder = tmp_path_factory.mktemp("anything")
    columns = [list(column) for column in zip(*contents, strict=True)] or [[], [], [], []]
    arrays = {
        "key": pa.array(columns[0], pa.binary()),
        "value": pa.array(columns[1], pa.binary()),
        "topic": pa.array(columns[3], pa.string()),
        "partition": pa.array([0] * len(contents), pa.int32()),
        "offset": pa.array(range(len(contents)), pa.int64()),
        "kafka_timestamp": pa.array([ms * 1_000 for ms in columns[2]], pa.timestamp("us", "UTC")),
    }
    [row] = [row for out in stage_part(pa.table(arrays).to_batches(), plan_in(folder)) for row in out.to_pylist()]
    found = pickle.loads(row["staged"])
    assert found.unreadable == []
    assert offsets(folder, BRONZE_TICKS, found) == list(range(len(contents)))
    distinct = sum(int(part.summaries["tick_count"].sum()) for part in found.ticks)
    records = [Record(topic, 0, n, key, value, ingested_at=NOW) for n, (key, value, _, topic) in enumerate(contents)]
    expected = [row_of(record) for record in records]
    assert distinct == len({row.event_id for row in expected if isinstance(row, Tick)})
    assert len(offsets(folder, SILVER_QUARANTINE, found)) == sum(isinstance(row, Quarantined) for row in expected)
    assert len(found.reports) == expected.count(None)


# Ticks


def test_a_tick_is_late_if_a_later_minute_of_its_pair_was_in_gold(tmp_path: Path) -> None:
    minute = int(datetime(2024, 8, 9, 0, 1, tzinfo=UTC).timestamp())
    known = pl.DataFrame({"source": ["binance"], "asset": ["bitcoin"], "newest": [minute]}, schema=NO_MINUTES.schema)
    late = {"event_time": "2024-08-09T00:00:59.999999Z", "timestamp": "2024-08-09T00:01:30Z"}
    cases = {
        1: {**late},
        2: {**late, "event_time": "2024-08-09T00:01:00Z"},
        3: {**late, "source": "kraken"},
        4: {**late, "asset": "ethereum"},
        # Of a clock that is not believed the receipt counts.
        5: {"event_time": "2024-08-09T00:05:00Z", "timestamp": "2024-08-09T00:00:30Z"},
    }
    found = staged(plan_in(tmp_path, minutes=known), in_kafka(tick(n, **fields) for n, fields in cases.items()))
    rows = rows_of(tmp_path, SILVER_TICKS, found.of(SILVER_TICKS))
    assert {row["trade_id"]: row["is_late"] for row in rows} == {1: True, 2: False, 3: False, 4: False, 5: True}


def parts_with_repeats(plan: Plan) -> list[Staged]:
    return [
        staged(plan, in_kafka([tick(n, event_time=f"2024-08-{8 + n % 2:02d}T23:59:59Z") for n in ids], first=first))
        for ids, first in ((range(10), 0), (range(6, 20), 100), (range(12, 15), 200), (range(20, 25), 300))
    ]


@pytest.mark.parametrize("few", [0, 20_000], ids=["by executors", "by the driver"])
def test_repeats_across_tasks_are_written_out_of_their_files(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """The files of a part with repeats are replaced; a part that is nothing but repeats has none."""
    monkeypatch.setattr("lake.silver.stage.FEW", few)
    plan = plan_in(tmp_path)
    parts = [part for found in parts_with_repeats(plan) for part in found.ticks]
    repeats = Seen({("binance", "BTCUSDT", 0): ((0, 1),)}).repeats([part.numbers for part in parts])
    assert sorted(repeats) == [0, 1, 2]
    left = without_repeats(spark, parts, repeats, plan)
    actions = [action for part in left for action in part.actions]
    rows = rows_of(tmp_path, SILVER_TICKS, actions)
    assert sorted(int(str(row["trade_id"])) for row in rows) == list(range(2, 25))
    assert {row["trade_id"]: row["kafka_offset"] for row in rows} == {
        **{n: n for n in range(2, 10)},
        **{n: 94 + n for n in range(10, 20)},
        **{n: 280 + n for n in range(20, 25)},
    }
    there = {path.name for path in tmp_path.glob("silver/ticks/*/*.parquet")}
    assert there == {action["path"].split("/")[1] for action in actions}, "files that no table gets are deleted"
    assert sum(int(part.summaries["tick_count"].sum()) for part in left) == 23
    counted = [
        n
        for part in left
        for first, last in part.numbers.runs.select("first", "last").rows()
        for n in range(first, last + 1)
    ]
    assert sorted(counted) == list(range(2, 25))


@pytest.mark.parametrize("few", [0, 20_000], ids=["by executors", "by the driver"])
def test_what_is_read_back_is_what_was_staged(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """After a crash gold is made of what silver has."""
    monkeypatch.setattr("lake.silver.stage.FEW", few)
    plan = plan_in(tmp_path)
    values = market(random.Random(2))
    found = staged(plan, in_kafka(values))
    [part] = found.ticks
    again = read_back(spark, part.actions, len(values), plan)
    by = ("source", "symbol", "asset", "start")
    one, other = (
        merged(frame, *by).drop("price_m2").sort(by)
        for frame in (part.summaries, pl.concat([part.summaries for part in again]))
    )
    assert one.equals(other)
    assert Seen().after(Seen().delta([part.numbers], [], {})) == Seen().after(
        Seen().delta([part.numbers for part in again], [], {})
    )
    assert all(part.actions == [] for part in again)


# Spark itself


def test_tasks_of_spark_do_the_same(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promises 1 to 5 with a real session: several tasks, odd records, repeats across tasks and micro-batches."""
    for name in ("lake.silver.stage.FEW", "streaming.lakehouse.FEW"):
        monkeypatch.setattr(name, 0)
    settings = lake_in(tmp_path, spark)
    values: list[bytes | None] = list(market(random.Random(9)))
    values[350:350] = [*values[300:320], b"{", None, *values[:10]]
    values[500:500] = values[490:499]
    records = in_kafka(values)
    monkeypatch.setattr("lake.silver.stage.RECORDS_A_LOOK", 50)
    write(spark, settings, [records[:340], records[340:600]])
    write(spark, settings, [records[600:]], first=2)
    expected = lake_of(records)
    assert wrong_rows(settings.lake_root, expected) == {}
    assert wrong_gaps(settings.lake_root, expected) == []
    assert expected.quarantine
