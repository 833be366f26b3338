"""Writing: promise 1, a replayed micro-batch writes nothing twice; promise 7, a lake has one writer."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession

from lake import lease
from lake.commits import CannotWrite, TableLog
from lake.lease import LakeInUse, Lease
from lake.tables import BRONZE_TICKS, GOLD_PRICE_1M, Column, Table
from lake.writer import Changed, Fenced, LakeWriter, append, create_table

COUNTS = Table(
    "test", "counts", "How many of each", ("name",), (Column("name", "STRING", "what"), Column("n", "BIGINT", "many"))
)
SPANNED = Table(
    "test",
    "spanned",
    "How many of each at a time",
    ("at", "name"),
    (Column("at", "TIMESTAMP", "when"), *COUNTS.columns, Column("day", "DATE", "date of at")),
    partitioned_by=("day",),
    statistics=("at",),
    file_time="at",
    file_span=timedelta(minutes=10),
)


@pytest.fixture
def root(spark: SparkSession, tmp_path: Path) -> str:
    for table in (COUNTS, SPANNED):
        create_table(spark, table, f"file:{tmp_path}")
    return f"file:{tmp_path}"


def claimed(spark: SparkSession, root: str) -> LakeWriter:
    writer = LakeWriter(spark, root, (COUNTS, SPANNED))
    writer.claim()
    return writer


def counts(spark: SparkSession, **rows: int) -> DataFrame:
    return spark.createDataFrame(list(rows.items()), "name STRING, n BIGINT")


def stored(spark: SparkSession, root: str) -> list[tuple[str, int]]:
    return sorted((row["name"], row["n"]) for row in spark.read.format("delta").load(COUNTS.path(root)).collect())


def fold(spark: SparkSession, writer: LakeWriter, batch: int, **added: int) -> None:
    """Add to the counts of their names, as a micro-batch that reads what is there and puts something in its place."""
    _, known = writer.stored(spark, COUNTS, [0])
    rows = Counter(added)
    for row in known:
        rows[row["name"]] += row["n"]
    writer.replace(COUNTS, {0: list(rows.items())}, query="q", batch=batch)


def test_a_replayed_batch_appends_and_folds_once(spark: SparkSession, root: str) -> None:
    """By the writer that wrote it, and by the one that comes after a crash."""
    for batch, rows in ((0, {"a": 1}), (0, {"a": 1}), (1, {"a": 2, "b": 5}), (1, {"a": 2, "b": 5})):
        writer = claimed(spark, root)
        for _ in range(2):
            fold(spark, writer, batch, **rows)
    assert stored(spark, root) == [("a", 3), ("b", 5)]
    for batch in (2, 2, 3):
        writer.append(counts(spark, c=batch), COUNTS, query="q", batch=batch, kept=batch * 10)
    assert stored(spark, root) == [("a", 3), ("b", 5), ("c", 2), ("c", 3)]
    again = claimed(spark, root)
    assert again.batch(COUNTS) == 3
    assert (again.metadata(COUNTS)["query"], again.metadata(COUNTS)["kept"]) == ("q", 30)
    # In the newest commit: older ones go as the log is cleaned.
    log = TableLog(spark, COUNTS.path(root))
    assert log.metadata(log.newest())["kept"] == 30


def test_the_last_batch_is_found_behind_maintenance_and_folding_goes_on(spark: SparkSession, root: str) -> None:
    writer = claimed(spark, root)
    for batch in (1, 2):
        writer.append(counts(spark, a=batch), COUNTS, query="q", batch=batch)
    DeltaTable.forPath(spark, COUNTS.path(root)).optimize().executeCompaction()
    fold(spark, writer, 3, a=10)
    assert stored(spark, root) == [("a", 13)]
    DeltaTable.forPath(spark, COUNTS.path(root)).optimize().executeCompaction()
    assert claimed(spark, root).batch(COUNTS) == 3


def test_a_log_that_is_checkpointed_tells_spark_the_same(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are appended, and rows that take others' place; and the next writer goes on after it."""
    monkeypatch.setattr("lake.writer.CHECKPOINT_EVERY", 2)
    first = claimed(spark, root)
    for batch in range(7):
        fold(spark, first, batch, a=batch)
    first.close()
    log = Path(COUNTS.path(root).removeprefix("file:")) / "_delta_log"
    assert json.loads((log / "_last_checkpoint").read_text())["version"] >= 6
    for commit in range(6):
        (log / f"{commit:020d}.json").unlink()
    assert stored(spark, root) == [("a", 21)]
    fold(spark, claimed(spark, root), 7, a=100)
    spark.catalog.clearCache()
    assert stored(spark, root) == [("a", 121)]
    assert spark.read.format("delta").load(COUNTS.path(root)).inputFiles() != []


def test_replacing_rewrites_only_the_files_of_the_spans_it_touches(spark: SparkSession, root: str) -> None:
    day, first = datetime(2024, 8, 9, tzinfo=UTC), 1_723_161_600 // 600

    def add(batch: int, *minutes: int) -> None:
        """One to the count of each of these minutes."""
        writer.was_changed(SPANNED)
        spans, known = writer.stored(spark, SPANNED, {first + minute // 10 for minute in minutes})
        counted = Counter({row["at"]: row["n"] for row in known})
        counted.update(day + timedelta(minutes=minute) for minute in minutes)
        rows: dict[int, list[tuple[object, ...]]] = {span: [] for span in spans}
        for at, n in counted.items():
            rows[first + (at - day) // timedelta(minutes=10)].append((at, "n", n, at.date()))
        writer.replace(SPANNED, rows, query="q", batch=batch)

    def files() -> set[str]:
        return set(spark.read.format("delta").load(SPANNED.path(root)).inputFiles())

    writer = claimed(spark, root)
    add(1, 0, 5, 12, 25, 1439, 1441)
    before = files()
    assert len(before) == 5, "a file a span"
    add(2, 5, 9)
    assert len(before & files()) == 4
    # Compacted files hold several spans; replacing one of them takes the file apart again.
    DeltaTable.forPath(spark, SPANNED.path(root)).optimize().executeCompaction()
    add(3, 5, 25)
    table = (
        spark.read.format("delta").load(SPANNED.path(root)).selectExpr("minute(at) + 60 * hour(at) AS m", "day", "n")
    )
    found = sorted((str(row["day"]), row["m"], row["n"]) for row in table.collect())
    assert found == [
        *(("2024-08-09", 0, 1), ("2024-08-09", 5, 3), ("2024-08-09", 9, 1), ("2024-08-09", 12, 1)),
        *(("2024-08-09", 25, 2), ("2024-08-09", 1439, 1), ("2024-08-10", 1, 1)),
    ]
    assert len(files()) == 5


def test_what_maintenance_has_moved_meanwhile_is_read_again(spark: SparkSession, root: str) -> None:
    """Between the look at the rows and the commit: nothing is written, and the next look finds the new files."""
    writer = claimed(spark, root)
    for batch in range(2):
        writer.append(counts(spark, a=1), COUNTS, query="q", batch=batch)
    _, known = writer.stored(spark, COUNTS, [0])
    DeltaTable.forPath(spark, COUNTS.path(root)).optimize().executeCompaction()
    with pytest.raises(Changed, match="same time"):
        writer.replace(COUNTS, {0: [("a", sum(row["n"] for row in known))]}, query="q", batch=2)
    with pytest.raises(Changed, match="other files"):
        writer.replace(COUNTS, {0: [("a", 2)]}, query="q", batch=2)
    assert stored(spark, root) == [("a", 1), ("a", 1)]
    fold(spark, writer, 2, b=5)
    assert stored(spark, root) == [("a", 2), ("b", 5)]
    # Rows that are appended only follow it.
    DeltaTable.forPath(spark, COUNTS.path(root)).optimize().executeCompaction()
    writer.append(counts(spark, c=1), COUNTS, query="q", batch=3)
    assert stored(spark, root) == [("a", 2), ("b", 5), ("c", 1)]


def test_a_commit_of_which_only_the_answer_was_lost_is_not_made_again(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the NameNode dies after the rename and the client asks it again: it says that the file is there."""
    first = claimed(spark, root)
    fold(spark, first, 0, a=1)
    before, real = first.version(COUNTS), TableLog.put

    def lost(log: TableLog, *told: Any, **more: Any) -> bool:
        real(log, *told, **more)
        return False

    with monkeypatch.context() as breaking:
        breaking.setattr(TableLog, "put", lost)
        fold(spark, first, 1, a=10)
        first.append(counts(spark, b=5), COUNTS, query="q", batch=2)
    assert first.version(COUNTS) == before + 2
    fold(spark, first, 3, a=100)
    assert stored(spark, root) == [("a", 111), ("b", 5)]


def test_a_table_with_features_of_delta_that_are_unknown_here_is_left_alone(spark: SparkSession, root: str) -> None:
    """At the start, and while the job runs."""
    writer = claimed(spark, root)
    name = f"delta.`{COUNTS.path(root)}`"
    spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('delta.appendOnly' = 'false')")
    writer.append(counts(spark, a=1), COUNTS, query="q", batch=0)
    spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    with pytest.raises(CannotWrite, match="deletionVectors"):
        writer.append(counts(spark, a=1), COUNTS, query="q", batch=1)
    with pytest.raises(CannotWrite, match="deletionVectors"):
        claimed(spark, root)
    assert stored(spark, root) == [("a", 1)]


def test_an_older_writer_is_fenced_at_its_next_write(spark: SparkSession, root: str) -> None:
    """Paused before its transaction began: it sees the newer epoch. The newer one is not disturbed."""
    old = claimed(spark, root)
    old.append(counts(spark, a=1), COUNTS, query="q", batch=1)
    new = claimed(spark, root)
    with pytest.raises(Fenced, match="newer writer"):
        old.append(counts(spark, b=1), COUNTS, query="q", batch=2)
    with pytest.raises(Fenced, match="newer writer"):
        fold(spark, old, 2, b=1)
    new.append(counts(spark, c=1), COUNTS, query="q", batch=2)
    assert stored(spark, root) == [("a", 1), ("c", 1)]


def test_a_writer_paused_in_the_middle_of_a_write_is_fenced_too(spark: SparkSession, root: str) -> None:
    """Paused after its files are written and before its commit."""
    old = claimed(spark, root)
    written = old._tables[COUNTS.qualified_name]
    added = written.log.write(counts(spark, b=1))
    claimed(spark, root)
    with pytest.raises(Fenced, match="newer writer"):
        old._commit(COUNTS, added, [], {"query": "q", "batch": 1})
    assert stored(spark, root) == []


def test_of_two_writers_that_claim_a_lake_at_once_one_is_refused(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has looked at the log before the first one's claim was there."""
    second = LakeWriter(spark, root, [COUNTS])
    before = TableLog(spark, COUNTS.path(root)).newest()
    first = claimed(spark, root)
    with monkeypatch.context() as stale:
        stale.setattr(TableLog, "newest", lambda _: before)
        with pytest.raises(Fenced, match="another writer"):
            second.claim()
    first.append(counts(spark, a=1), COUNTS, query="q", batch=1)
    assert stored(spark, root) == [("a", 1)]


def test_a_lease_is_refused_while_its_holder_renews_it(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So often that it is mostly found half-written.
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.001)
    first, second = Lease(spark, root), Lease(spark, root)
    first.acquire()
    with pytest.raises(LakeInUse, match="is writing the lake"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_the_lease_of_a_writer_that_is_silent_is_taken(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is paused lives, but does not renew; once it wakes it leaves the new holder's lease alone."""
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    paused = Lease(spark, root)
    paused._write()
    ticks = iter(range(0, 1000, 5))
    taker = Lease(spark, root, clock=lambda: float(next(ticks)))
    taker.acquire()
    woken = threading.Thread(target=paused._renew)
    woken.start()
    woken.join(60)
    assert not woken.is_alive()
    paused.release()
    third = Lease(spark, root)
    with pytest.raises(LakeInUse):
        third.acquire()
    taker.release()


def test_a_table_tells_what_its_columns_mean_and_is_made_once(spark: SparkSession, root: str) -> None:
    append(counts(spark, a=1), COUNTS, root)
    create_table(spark, COUNTS, root)
    assert stored(spark, root) == [("a", 1)]
    detail = DeltaTable.forPath(spark, COUNTS.path(root)).detail().first()
    assert detail is not None
    assert (detail["description"], detail["properties"]["tickhouse.key"]) == ("How many of each", "name")
    schema = spark.read.format("delta").load(COUNTS.path(root)).schema
    assert [field.metadata["comment"] for field in schema] == ["what", "many"]


@pytest.mark.parametrize("table", [BRONZE_TICKS, GOLD_PRICE_1M], ids=lambda table: str(table.qualified_name))
def test_a_table_is_as_delta_would_have_made_it(spark: SparkSession, root: str, table: Table) -> None:
    create_table(spark, table, root, {"made": "here"})
    builder = DeltaTable.create(spark).location(f"{root}/by_delta").comment(table.comment)
    for column in table.columns:
        builder = builder.addColumn(column.name, column.type, nullable=column.nullable, comment=column.comment)
    builder = builder.partitionedBy(*table.partitioned_by).property("tickhouse.key", ",".join(table.key))
    for name, value in {**table.properties, "made": "here"}.items():
        builder = builder.property(name, value)
    builder.property("delta.dataSkippingStatsColumns", ",".join(table.statistics)).execute()
    told = ["format", "description", "partitionColumns", "properties", "minReaderVersion", "minWriterVersion"]
    ours, deltas = (
        (
            spark.read.format("delta").load(path).schema,
            DeltaTable.forPath(spark, path).detail().select(*told, "tableFeatures", "numFiles").first(),
        )
        for path in (table.path(root), f"{root}/by_delta")
    )
    assert ours == deltas
