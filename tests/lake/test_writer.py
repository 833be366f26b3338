"""Writing: promise 1, a replayed micro-batch writes nothing twice; promise 7, a lake has one writer."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lake import lease
from lake.commits import TableLog
from lake.lease import LakeInUse, Lease
from lake.tables import Column, Table
from lake.writer import Fenced, LakeWriter, append, create_table

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


def total(rows: DataFrame) -> DataFrame:
    return rows.groupBy("name").agg(F.sum("n").alias("n"))


def test_a_replayed_batch_appends_and_folds_once(spark: SparkSession, root: str) -> None:
    """By the writer that wrote it, and by the one that comes after a crash."""
    for batch, rows in ((0, {"a": 1}), (0, {"a": 1}), (1, {"a": 2, "b": 5}), (1, {"a": 2, "b": 5})):
        writer = claimed(spark, root)
        for _ in range(2):
            writer.fold(counts(spark, **rows), COUNTS, query="q", batch=batch, spans=[0], folded=total)
    assert stored(spark, root) == [("a", 3), ("b", 5)]
    for batch in (2, 2, 3):
        writer.append(counts(spark, c=batch), COUNTS, query="q", batch=batch, decided=partial(dict, kept=batch * 10))
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
    writer.fold(counts(spark, a=10), COUNTS, query="q", batch=3, spans=[0], folded=total)
    assert stored(spark, root) == [("a", 13)]
    DeltaTable.forPath(spark, COUNTS.path(root)).optimize().executeCompaction()
    assert claimed(spark, root).batch(COUNTS) == 3


def test_folding_rewrites_only_the_files_of_the_spans_it_touches(spark: SparkSession, root: str) -> None:
    def rows(*minutes: int) -> DataFrame:
        values = ", ".join(f"(TIMESTAMP '2024-08-09 00:00:00' + INTERVAL {m} MINUTE, 'n', 1L)" for m in minutes)
        return spark.sql(f"SELECT * FROM VALUES {values} AS v(at, name, n)")

    def folded(both: DataFrame) -> DataFrame:
        return both.groupBy("at", "name").agg(F.sum("n").alias("n")).withColumn("day", F.to_date("at"))

    def files() -> set[str]:
        return set(spark.read.format("delta").load(SPANNED.path(root)).inputFiles())

    writer = claimed(spark, root)
    writer.fold(rows(0, 5, 12, 25, 1439, 1441), SPANNED, query="q", batch=0, spans=[], folded=folded)
    assert files() == set(), "no spans: nothing to write"
    start = 1_723_161_600 // 600
    spans = [start, start + 1, start + 2, start + 143, start + 144]
    writer.fold(rows(0, 5, 12, 25, 1439, 1441), SPANNED, query="q", batch=1, spans=spans, folded=folded)
    before = files()
    assert len(before) == 5, "a file a span"
    writer.fold(rows(5, 9), SPANNED, query="q", batch=2, spans=[start], folded=folded)
    assert len(before & files()) == 4
    # Compacted files hold several spans; folding into one of them takes the file apart again.
    DeltaTable.forPath(spark, SPANNED.path(root)).optimize().executeCompaction()
    writer.fold(rows(5, 25), SPANNED, query="q", batch=3, spans=[start, start + 2], folded=folded)
    table = (
        spark.read.format("delta").load(SPANNED.path(root)).selectExpr("minute(at) + 60 * hour(at) AS m", "day", "n")
    )
    found = sorted((str(row["day"]), row["m"], row["n"]) for row in table.collect())
    assert found == [
        *(("2024-08-09", 0, 1), ("2024-08-09", 5, 3), ("2024-08-09", 9, 1), ("2024-08-09", 12, 1)),
        *(("2024-08-09", 25, 2), ("2024-08-09", 1439, 1), ("2024-08-10", 1, 1)),
    ]
    assert len(files()) == 5


def test_an_older_writer_is_fenced_at_its_next_write(spark: SparkSession, root: str) -> None:
    """Paused before its transaction began: it sees the newer epoch. The newer one is not disturbed."""
    old = claimed(spark, root)
    old.append(counts(spark, a=1), COUNTS, query="q", batch=1)
    new = claimed(spark, root)
    with pytest.raises(Fenced, match="newer writer"):
        old.append(counts(spark, b=1), COUNTS, query="q", batch=2)
    with pytest.raises(Fenced, match="newer writer"):
        old.fold(counts(spark, b=1), COUNTS, query="q", batch=2, spans=[0], folded=total)
    new.append(counts(spark, c=1), COUNTS, query="q", batch=2)
    assert stored(spark, root) == [("a", 1), ("c", 1)]


def test_a_writer_paused_in_the_middle_of_a_write_is_fenced_too(spark: SparkSession, root: str) -> None:
    """Paused after its files are written and before its commit: Delta's conflict check finds the newer epoch."""
    old = claimed(spark, root)
    transaction = old._begin(COUNTS)
    added = transaction.write(counts(spark, b=1))
    claimed(spark, root)
    with pytest.raises(Fenced, match="same time"):
        old._finish(COUNTS, transaction, added, [], {"query": "q", "batch": 1})
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
