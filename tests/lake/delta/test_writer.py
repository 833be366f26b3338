"""Writing: promise 1, a replayed micro-batch writes nothing twice; promise 7, a lake has one writer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from delta.tables import DeltaTable
from deltalake import DeltaTable as Reader
from pyspark.sql import SparkSession

from lake.delta.files import LocalDisk
from lake.delta.log import Action, CannotWrite, TableLog
from lake.delta.parquet import as_stored, encoded_file
from lake.delta.slices import Changes, Slices
from lake.delta.writer import Changed, Fenced, LakeWriter, create_table
from lake.tables import BRONZE_TICKS, GOLD_PRICE_1M, Column, Table
from tests.lake.delta.spanned import batch, lake_in

COUNTS = Table(
    "test", "counts", "How many of each", ("name",), (Column("name", "STRING", "what"), Column("n", "BIGINT", "many"))
)
OTHER = Table("test", "other", "How many of each", ("name",), COUNTS.columns)


@pytest.fixture
def root(tmp_path: Path) -> str:
    lake_in(f"file:{tmp_path}", COUNTS, OTHER)
    return f"file:{tmp_path}"


def claimed(root: str) -> LakeWriter:
    writer = LakeWriter(LocalDisk(), root, (COUNTS, OTHER))
    writer.claim()
    return writer


def log_of(root: str) -> TableLog:
    return TableLog(LocalDisk(), COUNTS.path(root))


def frame(**counts: int) -> pl.DataFrame:
    return pl.DataFrame(list(counts.items()), schema={"name": pl.String, "n": pl.Int64}, orient="row")


def staged(writer: LakeWriter, **counts: int) -> list[Action]:
    """A file of these rows that belongs to no table yet."""
    file = encoded_file(COUNTS, as_stored(COUNTS, frame(**counts).to_arrow()))
    writer.files.write(f"{COUNTS.path(writer.root)}/{file.name}", file.content)
    return [file.action]


def append(writer: LakeWriter, number: int, *, metadata: dict[str, Any] | None = None, **counts: int) -> None:
    writer.add(staged(writer, **counts), COUNTS, query="q", batch=number, **(metadata or {}))


def fold(writer: LakeWriter, number: int, **added: int) -> None:
    """Add to the counts of their names, as a micro-batch that reads what is there and puts something in its place."""

    def change(before: pl.DataFrame) -> Changes:
        return pl.concat([before, frame(**added)]).group_by("name").agg(pl.col("n").sum()), None

    Slices(writer, COUNTS).update(batch(number), [0], change)


def stored(root: str) -> list[tuple[str, int]]:
    """The table's rows, as another program reads them."""
    rows = Reader(COUNTS.path(root)).to_pyarrow_table().to_pylist()
    return sorted((row["name"], row["n"]) for row in rows)


def sql(spark: SparkSession, root: str, statement: str) -> None:
    """A statement of Spark on the table, {} in which is its name."""
    spark.sql(statement.replace("{}", f"delta.`{COUNTS.path(root)}`"))


# Replays


def test_a_replayed_batch_appends_and_folds_once(root: str) -> None:
    """By the writer that wrote it, and by the one that comes after a crash."""
    for number, rows in ((0, {"a": 1}), (0, {"a": 1}), (1, {"a": 2, "b": 5}), (1, {"a": 2, "b": 5})):
        writer = claimed(root)
        for _ in range(2):
            fold(writer, number, **rows)
    assert stored(root) == [("a", 3), ("b", 5)]
    for number in (2, 2, 3):
        append(writer, number, metadata={"kept": number * 10}, c=number)
    assert stored(root) == [("a", 3), ("b", 5), ("c", 2), ("c", 3)]
    again = claimed(root)
    assert again.batch(COUNTS) == 3
    assert (again.metadata(COUNTS)["query"], again.metadata(COUNTS)["kept"]) == ("q", 30)
    append(again, 3, c=3)
    assert stored(root) == [("a", 3), ("b", 5), ("c", 2), ("c", 3)]
    # In the newest commit: older ones go as the log is cleaned.
    assert log_of(root).metadata(log_of(root).newest())["kept"] == 30


def test_a_replay_finds_the_files_of_its_batch(root: str) -> None:
    """Also behind claims and maintenance: gold may lack what silver has."""
    writer = claimed(root)
    append(writer, 1, a=1)
    files = writer.add([*staged(writer, b=2), *staged(writer, c=3)], COUNTS, query="q", batch=2)
    assert len(files) == 2
    later = claimed(root)
    assert {file.path for file in later.files_of(COUNTS, 2)} == {file.path for file in files}
    assert len(later.files_of(COUNTS, 1)) == 1
    assert later.files_of(COUNTS, 7) == []


def test_files_since_a_version_are_the_live_ones_of_later_commits(root: str) -> None:
    writer = claimed(root)
    append(writer, 0, a=1)
    version = writer.version(COUNTS)
    append(writer, 1, b=1)
    fold(writer, 2, c=1)
    append(writer, 3, d=1)
    live = {file.path for file in log_of(root).files()}
    assert {file.path for file in writer.added_since(COUNTS, version)} == live
    assert {file.path for file in claimed(root).added_since(COUNTS, version)} == live
    assert writer.added_since(COUNTS, writer.version(COUNTS)) == []
    # The log may have been cleaned since: then all files are as good an answer.
    (Path(COUNTS.path(root).removeprefix("file:")) / "_delta_log" / f"{version + 1:020d}.json").rename(root[5:] + "/x")
    with pytest.raises(FileNotFoundError):
        writer.added_since(COUNTS, version)


def test_rows_are_forgotten_and_the_next_query_begins_at_its_first_batch(root: str) -> None:
    """What --rebuild does: empty the tables, fill them, and go on with a new checkpoint."""
    writer = claimed(root)
    append(writer, 7, metadata={"kept": 1}, a=1)
    writer.empty(COUNTS)
    assert (stored(root), writer.batch(COUNTS)) == ([], -1)
    append(writer, 0, metadata={"kept": 2}, b=1)
    writer.forget(COUNTS)
    again = claimed(root)
    assert (again.batch(COUNTS), again.metadata(COUNTS)["kept"]) == (-1, 2)
    assert "query" not in again.metadata(COUNTS)
    append(again, 0, c=1)
    assert stored(root) == [("b", 1), ("c", 1)]


# Maintenance beside the stream


def test_the_last_batch_is_found_behind_maintenance_and_folding_goes_on(spark: SparkSession, root: str) -> None:
    writer = claimed(root)
    for number in (1, 2):
        append(writer, number, a=number)
    sql(spark, root, "OPTIMIZE {}")
    fold(writer, 3, a=10)
    assert stored(root) == [("a", 13)]
    sql(spark, root, "DELETE FROM {} WHERE n > 100")
    assert claimed(root).batch(COUNTS) == 3


def test_what_maintenance_has_moved_meanwhile_is_read_again(spark: SparkSession, root: str) -> None:
    """Between the look at the rows and the commit: nothing is written, and the next look finds the new files."""
    writer = claimed(root)
    for number in range(2):
        append(writer, number, a=1)
    slices = Slices(writer, COUNTS)
    change = slices.prepare([0], lambda before: (before.group_by("name").agg(pl.col("n").sum()), None))
    sql(spark, root, "OPTIMIZE {}")
    with pytest.raises(Changed, match="same time"):
        slices.commit(change, batch(2))
    assert stored(root) == [("a", 1), ("a", 1)]
    fold(writer, 2, b=5)
    assert stored(root) == [("a", 2), ("b", 5)]
    # Rows that are appended only follow it.
    sql(spark, root, "DELETE FROM {} WHERE name = 'b'")
    append(writer, 3, c=1)
    assert stored(root) == [("a", 2), ("c", 1)]
    fold(writer, 4, a=1)
    assert stored(root) == [("a", 3), ("c", 1)], "rows that were deleted do not come back"


def test_a_log_that_is_checkpointed_tells_spark_the_same(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are appended, and rows that take others' place; and the next writer goes on after it."""
    monkeypatch.setattr("lake.delta.writer.CHECKPOINT_EVERY", 2)
    first = claimed(root)
    for number in range(7):
        fold(first, number, a=number)
    first.close()
    log = Path(COUNTS.path(root).removeprefix("file:")) / "_delta_log"
    version = json.loads((log / "_last_checkpoint").read_text())["version"]
    assert version >= 6
    for commit in range(version):
        (log / f"{commit:020d}.json").unlink(missing_ok=True)
    assert stored(root) == [("a", 21)]
    fold(claimed(root), 7, a=100)
    spark.catalog.clearCache()
    by_spark = spark.read.format("delta").load(COUNTS.path(root))
    assert [tuple(row) for row in by_spark.collect()] == stored(root) == [("a", 121)]


def test_a_table_with_features_of_delta_that_are_unknown_here_is_left_alone(spark: SparkSession, root: str) -> None:
    """At the start, and while the job runs."""
    writer = claimed(root)
    sql(spark, root, "ALTER TABLE {} SET TBLPROPERTIES ('delta.appendOnly' = 'false')")
    append(writer, 0, a=1)
    sql(spark, root, "ALTER TABLE {} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    with pytest.raises(CannotWrite, match="deletionVectors"):
        append(writer, 1, a=1)
    with pytest.raises(CannotWrite, match="deletionVectors"):
        claimed(root)
    rows = spark.read.format("delta").load(COUNTS.path(root)).collect()
    assert [tuple(row) for row in rows] == [("a", 1)]


# Answers that are lost


def test_a_commit_of_which_only_the_answer_was_lost_is_not_made_again(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the NameNode dies after the rename and the client asks it again: it says that the file is there."""
    first = claimed(root)
    fold(first, 0, a=1)
    before, real = first.version(COUNTS), TableLog.put

    def lost(log: TableLog, *arguments: Any, **more: Any) -> bool:
        real(log, *arguments, **more)
        return False

    with monkeypatch.context() as breaking:
        breaking.setattr(TableLog, "put", lost)
        fold(first, 1, a=10)
        append(first, 2, b=5)
    assert first.version(COUNTS) == before + 2
    fold(first, 3, a=100)
    assert stored(root) == [("a", 111), ("b", 5)]


def test_the_same_micro_batch_that_is_written_again_is_no_lost_answer(root: str) -> None:
    """Gold derives a table anew where maintenance has changed what it was derived from; that is another commit."""
    writer = claimed(root)
    slices = Slices(writer, COUNTS)
    for rows in (frame(a=1), frame(a=2)):
        slices.update(batch(0), [0], partial(_put, rows), again=True)
    assert stored(root) == [("a", 2)]


def _put(rows: pl.DataFrame, _: pl.DataFrame) -> Changes:
    return rows, None


# Other writers


def test_an_older_writer_is_fenced_at_its_next_write(root: str) -> None:
    """Paused before its write began: it sees the newer epoch. The newer one is not disturbed."""
    old = claimed(root)
    append(old, 1, a=1)
    new = claimed(root)
    with pytest.raises(Fenced, match="newer writer"):
        append(old, 2, b=1)
    with pytest.raises(Fenced, match="newer writer"):
        fold(old, 2, b=1)
    with pytest.raises(Fenced, match="newer writer"):
        old.empty(COUNTS)
    with pytest.raises(Fenced, match="newer writer"):
        old.forget(COUNTS)
    append(new, 2, c=1)
    assert stored(root) == [("a", 1), ("c", 1)]


def test_a_writer_paused_in_the_middle_of_a_write_is_fenced_too(root: str) -> None:
    """Paused after its files are written and before its commit."""
    old = claimed(root)
    fold(old, 0, a=1)
    slices = Slices(old, COUNTS)
    change = slices.prepare([0], lambda _: (frame(b=1), None))
    actions = staged(old, c=1)
    claimed(root)
    with pytest.raises(Fenced, match="newer writer"):
        slices.commit(change, batch(1))
    with pytest.raises(Fenced, match="newer writer"):
        old.add(actions, COUNTS, query="q", batch=1)
    assert stored(root) == [("a", 1)]


def test_of_two_writers_that_claim_a_lake_at_once_one_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has looked at the log before the first one's claim was there."""
    second = LakeWriter(LocalDisk(), root, [COUNTS])
    before = log_of(root).newest()
    first = claimed(root)
    with monkeypatch.context() as stale:
        stale.setattr(TableLog, "newest", lambda *_: before)
        with pytest.raises(Fenced, match="another writer"):
            second.claim()
    append(first, 1, a=1)
    assert stored(root) == [("a", 1)]


# Tables


def test_a_table_tells_what_its_columns_mean_and_is_made_once(spark: SparkSession, root: str) -> None:
    append(claimed(root), 0, a=1)
    create_table(LocalDisk(), COUNTS, root)
    assert stored(root) == [("a", 1)]
    detail = DeltaTable.forPath(spark, COUNTS.path(root)).detail().first()
    assert detail is not None
    assert (detail["description"], detail["properties"]["tickhouse.key"]) == ("How many of each", "name")
    schema = spark.read.format("delta").load(COUNTS.path(root)).schema
    assert [field.metadata["comment"] for field in schema] == ["what", "many"]


@pytest.mark.parametrize("table", [BRONZE_TICKS, GOLD_PRICE_1M], ids=lambda table: str(table.qualified_name))
def test_a_table_is_as_delta_would_have_made_it(spark: SparkSession, root: str, table: Table) -> None:
    """But for the properties that only the suite knows."""
    create_table(LocalDisk(), table, root, {"made": "here"})
    builder = DeltaTable.create(spark).location(f"{root}/by_delta").comment(table.comment)
    for column in table.columns:
        builder = builder.addColumn(column.name, column.type, nullable=column.nullable, comment=column.comment)
    builder.partitionedBy(*table.partitioned_by).execute()
    told = ["format", "description", "partitionColumns", "minReaderVersion", "minWriterVersion"]
    ours, deltas = (
        (
            spark.read.format("delta").load(path).schema,
            DeltaTable.forPath(spark, path).detail().select(*told, "tableFeatures", "numFiles").first(),
        )
        for path in (table.path(root), f"{root}/by_delta")
    )
    assert ours == deltas
    detail = DeltaTable.forPath(spark, table.path(root)).detail().first()
    assert detail is not None
    assert detail["properties"] == {
        **table.properties,
        "made": "here",
        "tickhouse.key": ",".join(table.key),
        "tickhouse.version": "2",
        "delta.dataSkippingStatsColumns": ",".join(table.statistics),
        "delta.checkpointInterval": "1000000000",
        "delta.logRetentionDuration": "interval 86400 seconds",
        "delta.deletedFileRetentionDuration": "interval 86400 seconds",
    }
