"""Delta's log as we read and write it, compared with what deltalake, DuckDB and Spark make of the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from conf.settings import Settings
from lake.delta.files import Files, LocalDisk, files_of
from lake.delta.log import CannotWrite, DataFile, LogIncomplete, TableLog, added_by, metadata_of, redefines, removed_by
from lake.delta.parquet import arrow_table, delta_schema, encoded_file
from lake.tables import Column, Table

COUNTS = Table(
    "test",
    "counts",
    "How many of each at a time",
    ("at", "name"),
    (
        Column("at", "TIMESTAMP", "when"),
        Column("name", "STRING", "what"),
        Column("n", "BIGINT", "many", nullable=True),
        Column("day", "DATE", "date of at"),
    ),
    partitioned_by=("day",),
    statistics=("at", "n"),
)
DAY = datetime(2024, 8, 9, tzinfo=UTC)
PROPERTIES = {"delta.logRetentionDuration": "interval 1 day", "made": "here"}


def create(files: Files, root: str) -> TableLog:
    log = TableLog(files, COUNTS.path(root))
    assert log.create(COUNTS.comment, delta_schema(COUNTS), COUNTS.partitioned_by, PROPERTIES)
    return log


@pytest.fixture
def log(tmp_path: Path) -> TableLog:
    return create(LocalDisk(), f"file:{tmp_path}")


def write(log: TableLog, n: int | None, days: int = 0) -> DataFile:
    at = DAY + timedelta(days=days, seconds=n or 0)
    return log.add(encoded_file(COUNTS, arrow_table(COUNTS, [(at, f"name {n}", n, at.date())])))


def commit(log: TableLog, *numbers: int) -> list[DataFile]:
    """A commit for each number, of one file with it; the files."""
    files = [write(log, number) for number in numbers]
    for number, file in zip(numbers, files, strict=True):
        assert log.put(log.newest() + 1, {"batch": number}, [file])
    return files


def as_deltalake_has_it(log: TableLog, version: int | None = None) -> dict[str, int]:
    """The rows of each file by its whole path."""
    table = DeltaTable(log.path, version=version)
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    return {f"{log.path}/{row['path']}": row["num_records"] for row in actions}


def as_we_have_it(log: TableLog, version: int | None = None) -> dict[str, int]:
    return {file.path: file.rows for file in log.files(version)}


def numbers(log: TableLog, version: int | None = None) -> list[int]:
    """The column n of the files that the log has."""
    return sorted(
        number
        for file in log.files(version)
        for number in pq.read_table(file.path.removeprefix("file:"), partitioning=None)["n"].to_pylist()
    )


def test_a_table_is_read_the_same_by_deltalake_and_duckdb(log: TableLog) -> None:
    first, second = write(log, 1), write(log, 2, days=1)
    assert log.put(1, {"batch": 0}, [first, second], application=("test", 7))
    assert log.put(2, {"batch": 1, "text": "Ü\u2028"}, [write(log, 3)], [first])
    for version in (None, 0, 1, 2):
        assert as_we_have_it(log, version) == as_deltalake_has_it(log, version)
    assert [numbers(log, version) for version in (0, 1, 2)] == [[], [1, 2], [2, 3]]
    with duckdb.connect() as connection:
        connection.register("counts", DeltaTable(log.path).to_pyarrow_dataset())
        rows = connection.execute("SELECT n, day FROM counts ORDER BY n").fetchall()
    assert rows == [(2, date(2024, 8, 10)), (3, DAY.date())]
    state, deltas = log.state(), DeltaTable(log.path)
    assert (state.version, state.configuration) == (2, PROPERTIES)
    assert state.protocol == {"minReaderVersion": 1, "minWriterVersion": 2}
    assert json.loads(state.schema_string) == json.loads(delta_schema(COUNTS)) == json.loads(deltas.schema().to_json())
    assert (log.property("made"), log.property("none")) == ("here", None)
    assert deltas.metadata().description == COUNTS.comment
    assert deltas.transaction_version("test") == 7
    assert log.metadata(2) == {"batch": 1, "text": "Ü\u2028"}
    assert (removed_by(log.actions(2)), len(added_by(log.actions(1)))) == ({first.add["path"]}, 2)
    assert [redefines(log.actions(version)) for version in range(3)] == [True, False, False]
    assert not log.create("", "", [], {})


def test_a_version_is_committed_once(log: TableLog) -> None:
    """Of writers that want the same version one has it; the others see what it did."""
    for version in range(1, 6):
        with ThreadPoolExecutor(4) as threads:
            won = list(threads.map(lambda number: log.put(version, {"batch": number}), range(4)))  # noqa: B023
        assert sorted(won) == [False, False, False, True]
        assert log.metadata(version) == {"batch": won.index(True)}


def test_files_have_the_statistics_of_the_log_and_only_those(log: TableLog) -> None:
    assert log.put(1, {}, [write(log, 1), write(log, None, days=1)])
    with_n, without = sorted(log.files(1), key=lambda file: file.path)
    assert (with_n.lowest, with_n.highest, with_n.nulls, with_n.rows) == (
        {"at": "2024-08-09T00:00:01.000Z", "n": 1},
        {"at": "2024-08-09T00:00:01.000Z", "n": 1},
        {"at": 0, "n": 0},
        1,
    )
    assert (without.lowest, without.nulls) == ({"at": "2024-08-10T00:00:00.000Z"}, {"at": 0, "n": 1})
    assert with_n.size == len(LocalDisk().read(with_n.path))
    bare = log.file({"path": "x.parquet", "size": 3, "partitionValues": {}})
    assert (bare.lowest, bare.highest, bare.nulls, bare.rows, bare.size) == ({}, {}, {}, 0, 3)


def test_paths_are_decoded_for_reading_and_kept_for_the_log(log: TableLog) -> None:
    def path(text: str) -> str:
        return log.file({"path": text}).path

    assert path("name=a%253Ab%20c/part.parquet") == f"{log.path}/name=a%3Ab c/part.parquet"
    assert path("hdfs://host:1/else%20where/part.parquet") == "hdfs://host:1/else where/part.parquet"
    assert path("file:/else/part.parquet") == "file:/else/part.parquet"
    assert log.file({"path": "a%20b", "size": 1, "partitionValues": {}}).removed()["path"] == "a%20b"


def test_rows_that_only_move_are_no_change_of_data(log: TableLog) -> None:
    [file] = commit(log, 1)
    assert log.put(2, {}, [write(log, 1)], [file], data_change=False)
    _, remove, add = log.actions(2)
    assert (remove["remove"]["dataChange"], add["add"]["dataChange"]) == (False, False)
    assert as_we_have_it(log) == as_deltalake_has_it(log)


def test_the_newest_version_is_asked_for_from_a_known_one_or_from_the_checkpoint(log: TableLog) -> None:
    commit(log, *range(5))
    assert [log.newest(), log.newest(after=0), log.newest(after=5)] == [5, 5, 5]
    log.checkpoint()
    assert log.newest() == 5
    commit(log, 5, 6)
    assert (log.newest(), log.has(7), log.has(8)) == (7, True, False)
    assert TableLog(LocalDisk(), f"{log.path}/none").newest() == -1


def test_a_checkpoint_of_deltalake_and_commits_after_it_are_read(log: TableLog) -> None:
    files = commit(log, 0, 1, 2)
    log.checkpoint()
    before = log.state(3)
    commit(log, 3)
    assert log.put(5, {}, [], [files[0]])
    assert numbers(log) == [1, 2, 3]
    for version in (None, 2, 3, 4, 5):
        assert as_we_have_it(log, version) == as_deltalake_has_it(log, version)
    # From the checkpoint alone: the same as from all commits.
    for version in range(4):
        LocalDisk().delete(log._commit(version))
    assert log.state(3) == before
    assert before.files[files[0].add["path"]].lowest == files[0].lowest
    assert log.state().configuration == PROPERTIES
    assert numbers(log) == [1, 2, 3]
    with pytest.raises(LogIncomplete, match=r"02\.json is missing"):
        log.state(2)


def test_a_pointer_to_the_checkpoint_is_only_a_hint(log: TableLog) -> None:
    commit(log, 0, 1, 2)
    log.checkpoint()
    commit(log, 3)
    pointer = f"{log.path}/_delta_log/_last_checkpoint"
    for text in (b"", b'{"ver', b'{"version": 4}', b'{"version": 2, "parts": 7}', b"{}"):
        LocalDisk().write(pointer, text)
        assert (log.newest(), numbers(log), numbers(log, 2)) == (4, [0, 1, 2, 3], [0, 1])
    LocalDisk().delete(pointer)
    assert (log.newest(), numbers(log)) == (4, [0, 1, 2, 3])


def test_a_missing_commit_is_named(log: TableLog) -> None:
    commit(log, 0, 1, 2)
    LocalDisk().delete(log._commit(2))
    with pytest.raises(LogIncomplete, match=r"/test/counts/_delta_log/0{19}2\.json is missing"):
        log.state()
    assert numbers(log, 1) == [0]
    with pytest.raises(LogIncomplete, match=r"0{15}12345\.json is missing: the table has no such version"):
        log.state(12_345)
    with pytest.raises(LogIncomplete, match=r"0{19}9\.json is missing"):
        log.actions(9)
    with pytest.raises(LogIncomplete, match=r"there is no Delta table at .*/none"):
        TableLog(LocalDisk(), f"{log.path}/none").state()


def test_what_deltalake_writes_is_read(log: TableLog) -> None:
    commit(log, 1, 2)
    table = DeltaTable(log.path)
    rows = arrow_table(COUNTS, [(DAY, "a", 10, DAY.date()), (DAY, "b", 11, DAY.date())])
    write_deltalake(table, rows, mode="append")
    table.optimize.compact()
    table.delete("n = 10")
    assert as_we_have_it(log) == as_deltalake_has_it(log)
    assert numbers(log) == [1, 2, 11]
    assert metadata_of(log.actions(log.newest())) == {}


def test_a_table_with_unknown_features_is_not_written(log: TableLog) -> None:
    assert log.check_writable(log.actions(0))
    assert not log.check_writable([{"add": {}}])
    with pytest.raises(CannotWrite, match="columnMapping"):
        log.check_writable([{"protocol": {"minWriterVersion": 7, "writerFeatures": ["appendOnly", "columnMapping"]}}])
    with pytest.raises(CannotWrite, match="no list of features"):
        log.check_writable([{"protocol": {"minWriterVersion": 5}}])


@pytest.mark.services
def test_a_table_on_hdfs_is_read_the_same_by_deltalake(running: Callable[..., Settings]) -> None:
    suite = running("hdfs")
    log = create(files_of(suite.lake_root, str(suite.webhdfs_url)), f"{suite.lake_root}-log")
    commit(log, *range(4))
    log.checkpoint()
    commit(log, 4)
    assert (log.newest(), log.newest(after=2)) == (5, 5)
    for version in (None, 2, 4):
        assert as_we_have_it(log, version) == as_deltalake_has_it(log, version)
    assert not log.put(5, {})


def by_spark(spark: SparkSession, log: TableLog, statement: str) -> None:
    spark.sql(statement.format(f"delta.`{log.path}`"))


def test_what_spark_writes_is_read(spark: SparkSession, log: TableLog) -> None:
    """Maintenance: rows stay the same, or go; and Spark reads what we commit after it."""
    commit(log, 1, 2, 3, 4)
    by_spark(spark, log, "OPTIMIZE {}")
    assert log.newest() == 5
    assert numbers(log) == [1, 2, 3, 4]
    assert len(log.files()) == 1
    assert len(removed_by(log.actions(5))) == 4
    by_spark(spark, log, "DELETE FROM {} WHERE n = 2")
    by_spark(spark, log, "MERGE INTO {} t USING (SELECT 3L AS n) s ON t.n = s.n WHEN MATCHED THEN UPDATE SET n = 30")
    by_spark(spark, log, "INSERT INTO {} VALUES (TIMESTAMP'2024-08-09 00:00:00.123456', 'x', NULL, DATE'2024-08-09')")
    assert as_we_have_it(log) == as_deltalake_has_it(log)
    commit(log, 5)
    rows = spark.read.format("delta").load(log.path)
    assert sorted(row["n"] for row in rows.where("n IS NOT NULL").collect()) == [1, 4, 5, 30]
    [inserted] = [file for file in log.files() if file.nulls.get("n") == 1]
    assert datetime.fromisoformat(inserted.lowest["at"]) == DAY + timedelta(milliseconds=123)
    assert "n" not in inserted.lowest
    by_spark(spark, log, "ALTER TABLE {} SET TBLPROPERTIES (made = 'elsewhere')")
    assert redefines(log.actions(log.newest()))
    assert log.property("made") == "elsewhere"


@pytest.mark.parametrize("rows_per_part", ["1000", "2"])
def test_checkpoints_of_spark_are_read(spark: SparkSession, log: TableLog, rows_per_part: str) -> None:
    """In one file, and in several."""
    files = commit(log, *range(6))
    assert log.put(7, {}, [], files[:1])
    before = log.state(7)
    spark.conf.set("spark.databricks.delta.checkpoint.partSize", rows_per_part)
    try:
        by_spark(spark, log, "ALTER TABLE {} SET TBLPROPERTIES (delta.checkpointInterval = 1)")
        by_spark(spark, log, "DELETE FROM {} WHERE n = 1")
    finally:
        spark.conf.unset("spark.databricks.delta.checkpoint.partSize")
    names = [status.name for status in LocalDisk().list(f"{log.path}/_delta_log")]
    last = [name for name in names if name.startswith(f"{9:020d}.checkpoint")]
    assert (len(last) > 1) == (rows_per_part == "2"), names
    assert log.state(7) == before
    newest = log.state()
    for version in range(10):
        LocalDisk().delete(log._commit(version))
    assert log.newest() == 9
    assert log.state() == newest
    assert numbers(log) == [2, 3, 4, 5]


def test_deletion_vectors_and_checkpoints_of_version_2_are_refused(spark: SparkSession, log: TableLog) -> None:
    rows = arrow_table(COUNTS, [(DAY, str(number), number, DAY.date()) for number in range(50)])
    assert log.put(1, {}, [log.add(encoded_file(COUNTS, rows))])
    by_spark(spark, log, "ALTER TABLE {} SET TBLPROPERTIES (delta.enableDeletionVectors = true)")
    by_spark(spark, log, "DELETE FROM {} WHERE n = 7")
    with pytest.raises(CannotWrite, match="has deletion vectors"):
        log.state()
    with pytest.raises(CannotWrite, match="deletionVectors"):
        log.check_writable(log.actions(2))
    by_spark(spark, log, "ALTER TABLE {} SET TBLPROPERTIES (delta.enableDeletionVectors = false)")
    by_spark(spark, log, "REORG TABLE {} APPLY (PURGE)")
    assert len(numbers(log)) == 49
    by_spark(
        spark,
        log,
        "ALTER TABLE {} SET TBLPROPERTIES (delta.checkpointPolicy = 'v2', delta.checkpointInterval = 1)",
    )
    by_spark(spark, log, "DELETE FROM {} WHERE n = 8")
    with pytest.raises(CannotWrite, match="checkpoints of version 2"):
        log.state()
