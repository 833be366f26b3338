"""Checkpoints of a log: every reader reads the same before and after, of a log that was cleaned too."""

from __future__ import annotations

import json
import os
import shutil
import time
from builtins import list as list_of
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from conf.settings import Settings
from lake.delta import checkpoint as module
from lake.delta.checkpoint import RETENTION_OF_TOMBSTONES, expired_before
from lake.delta.files import FileStatus, LocalDisk, files_of
from lake.delta.log import CannotWrite, DataFile, TableLog
from lake.delta.parquet import delta_schema
from tests.lake.delta.test_log import COUNTS, DAY, as_deltalake_has_it, as_we_have_it, commit, create, numbers, write

HOUR = 3_600_000
DAY_MILLIS = 24 * HOUR


def now() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def log(tmp_path: Path) -> TableLog:
    return create(LocalDisk(), f"file:{tmp_path}")


def folder(log: TableLog) -> Path:
    return Path(log.path.removeprefix("file:")) / "_delta_log"


def names(log: TableLog) -> set[str]:
    """Of the log's files, without leading zeros and what Hadoop adds on a local disk."""
    return {path.name.lstrip("0") for path in folder(log).iterdir() if not path.name.endswith(".crc")}


def copy_of(log: TableLog, name: str) -> TableLog:
    """A copy in another place, so that no reader has anything of the first one in memory."""
    source = folder(log).parent
    target = source.parent / name
    shutil.copytree(source, target)
    return TableLog(LocalDisk(), f"file:{target}")


def without_commits(log: TableLog, up_to: int) -> None:
    for version in range(up_to + 1):
        LocalDisk().delete(log._commit(version))


def age(log: TableLog, hours: float, *patterns: str) -> None:
    """Let these files of the log be so old."""
    for pattern in patterns:
        for path in folder(log).glob(pattern):
            os.utime(path, (time.time() - hours * 3_600,) * 2)


def actions(log: TableLog, version: int) -> dict[str, list_of[dict[str, Any]]]:
    """What a checkpoint says, by kind."""
    rows = pq.read_table(folder(log) / f"{version:020d}.checkpoint.parquet")
    return {kind: rows[kind].drop_null().to_pylist(maps_as_pydicts="strict") for kind in rows.schema.names}


def in_spark(spark: SparkSession, log: TableLog) -> dict[str, object]:
    """What Spark makes of a table: its rows, and what else its log says."""
    assert spark._jvm is not None
    delta_log = spark._jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, log.path)
    snapshot = delta_log.update(False, *(getattr(delta_log, f"update$default${number}")() for number in (2, 3)))
    return {
        "rows": sorted(tuple(row) for row in spark.read.format("delta").load(log.path).collect()),
        "version": snapshot.version(),
        "tombstones": snapshot.tombstones().count(),
        "transactions": snapshot.transactions().toString(),
        "metadata": snapshot.metadata().toString(),
        "protocol": snapshot.protocol().toString(),
    }


def in_duckdb(log: TableLog) -> list_of[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        connection.register("counts", DeltaTable(log.path).to_pyarrow_dataset())
        return connection.execute("SELECT n, name, day FROM counts ORDER BY n").fetchall()


def test_every_reader_reads_the_same_before_and_after(spark: SparkSession, log: TableLog) -> None:
    """Spark, deltalake, DuckDB and we; with and without the commits that the checkpoint holds."""
    files = commit(log, *range(6))
    assert log.put(7, {"batch": 6}, [write(log, 6, days=1)], files[:2], application=("test", 7))
    assert log.put(8, {"batch": 7}, [write(log, 7)], application=("test", 8))
    assert log.put(9, {}, [], [], application=("other", 1))
    checkpointed = copy_of(log, "checkpointed")
    checkpointed.checkpoint(8)
    cleaned = copy_of(checkpointed, "cleaned")
    without_commits(cleaned, 8)
    assert names(cleaned) == {"8.checkpoint.parquet", "9.json", "_last_checkpoint"}

    expected = in_spark(spark, log)
    assert (expected["version"], expected["tombstones"]) == (9, 2)
    assert str(expected["transactions"]).count("->") == 2
    for other in (checkpointed, cleaned):
        assert in_spark(spark, other) == expected
        assert in_duckdb(other) == in_duckdb(log)
        assert numbers(other) == numbers(log) == [2, 3, 4, 5, 6, 7]
        assert as_we_have_it(other) == as_deltalake_has_it(other)
        table = DeltaTable(other.path)
        assert [table.transaction_version(name) for name in ("test", "other")] == [8, 1]
        assert other.state().configuration == log.state().configuration == table.metadata().configuration
    # And they write on.
    spark.sql(f"DELETE FROM delta.`{cleaned.path}` WHERE n = 2")
    assert numbers(cleaned) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("parts", ["one", "several"])
def test_a_checkpoint_of_spark_is_gone_on_from(spark: SparkSession, log: TableLog, parts: str) -> None:
    files = commit(log, *range(4))
    assert log.put(5, {}, [], files[:1], application=("test", 3))
    spark.conf.set("spark.databricks.delta.checkpoint.partSize", "2" if parts == "several" else "1000")
    try:
        spark.sql(f"ALTER TABLE delta.`{log.path}` SET TBLPROPERTIES (delta.checkpointInterval = 1)")
        spark.sql(f"INSERT INTO delta.`{log.path}` SELECT at, 'x', 9L, day FROM delta.`{log.path}` WHERE n = 3")
    finally:
        spark.conf.unset("spark.databricks.delta.checkpoint.partSize")
    assert log.put(8, {}, [], files[1:2])
    expected = in_spark(spark, copy_of(log, "plain"))
    assert expected["tombstones"] == 2
    without_commits(log, 7)
    log.checkpoint()
    cleaned = copy_of(log, "cleaned")
    assert in_spark(spark, cleaned) == expected
    assert as_we_have_it(cleaned) == as_deltalake_has_it(cleaned)
    assert numbers(cleaned) == [2, 3, 9]


def test_a_checkpoint_of_deltalake_is_gone_on_from(log: TableLog) -> None:
    files = commit(log, *range(4))
    assert log.put(5, {}, [], files[:1], application=("test", 3))
    DeltaTable(log.path).create_checkpoint()
    assert log.put(6, {}, [], files[1:2], application=("other", 1))
    log.checkpoint()
    assert [sorted(remove["path"] for remove in actions(log, version)["remove"]) for version in (5, 6)] == [
        [files[0].add["path"]],
        sorted(file.add["path"] for file in files[:2]),
    ]
    without_commits(log, 6)
    assert numbers(log) == [2, 3]
    assert as_we_have_it(log) == as_deltalake_has_it(log)
    assert [DeltaTable(log.path).transaction_version(name) for name in ("test", "other")] == [3, 1]


def test_a_checkpoint_has_the_newest_of_each_and_no_change_of_data(log: TableLog) -> None:
    first, second = commit(log, 1, 2)
    again = log.file({**first.add, "stats": None, "modificationTime": 1})
    assert log.put(3, {}, [again], [first], application=("test", 1))
    assert log.put(4, {}, [], [second], application=("test", 2))
    for version in (2, 3, 4):
        log.checkpoint(version)
        assert pq.read_schema(folder(log) / f"{version:020d}.checkpoint.parquet").names == [*module.ROWS.names]
        assert all(len(actions(log, version)[kind]) == 1 for kind in ("metaData", "protocol"))
    last = actions(log, 4)
    [add], [remove] = last["add"], last["remove"]
    assert (add["path"], add["stats"], add["dataChange"]) == (first.add["path"], None, False)
    assert (add["partitionValues"], add["size"], add["modificationTime"]) == ({"day": "2024-08-09"}, first.size, 1)
    assert (remove["path"], remove["dataChange"], remove["size"]) == (second.add["path"], False, second.size)
    assert [(txn["appId"], txn["version"]) for txn in last["txn"]] == [("test", 2)]
    assert last["protocol"][0]["writerFeatures"] is None
    assert json.loads(LocalDisk().read(f"{log.path}/_delta_log/_last_checkpoint")) == {
        "version": 4,
        "size": 5,
        "sizeInBytes": (folder(log) / f"{4:020d}.checkpoint.parquet").stat().st_size,
        "numOfAddFiles": 1,
    }


def test_an_older_checkpoint_does_not_take_the_place_of_a_newer_one(log: TableLog) -> None:
    commit(log, 1, 2)
    log.checkpoint()
    pointer = LocalDisk().read(f"{log.path}/_delta_log/_last_checkpoint")
    log.checkpoint(1)
    log.checkpoint()
    assert LocalDisk().read(f"{log.path}/_delta_log/_last_checkpoint") == pointer
    assert "1.checkpoint.parquet" not in names(log)


def test_tombstones_are_kept_for_as_long_as_the_table_says(tmp_path: Path) -> None:
    log = TableLog(LocalDisk(), f"file:{tmp_path}/table")
    schema = delta_schema(COUNTS)
    assert log.create("", schema, COUNTS.partitioned_by, {"delta.deletedFileRetentionDuration": "interval 36 hours"})
    files = commit(log, 1, 2, 3)
    assert log.put(4, {}, [], files[:1])
    log.checkpoint(now=now() + 35 * HOUR)
    assert len(actions(log, 4)["remove"]) == 1
    assert log.put(5, {}, [], files[1:2])
    log.checkpoint(now=now() + 37 * HOUR)
    assert actions(log, 5)["remove"] == []
    assert numbers(log) == [3]


@pytest.mark.parametrize(
    ("text", "millis"),
    [
        ("interval 1 day", DAY_MILLIS),
        ("INTERVAL 2 Weeks", 14 * DAY_MILLIS),
        ("30 days", 30 * DAY_MILLIS),
        ("interval 1 day 12 hours", 36 * HOUR),
        ("interval 90 minutes", 90 * 60_000),
        ("interval 5 seconds", 5_000),
        (None, 7 * DAY_MILLIS),
    ],
)
def test_intervals_are_those_of_delta(text: str | None, millis: int) -> None:
    properties = {} if text is None else {"delta.deletedFileRetentionDuration": text}
    assert expired_before(properties, RETENTION_OF_TOMBSTONES, 10**13) == 10**13 - millis


@pytest.mark.parametrize("text", ["", "interval", "interval day", "interval 1 month", "interval one day", "1 day 2"])
def test_what_we_do_not_understand_expires_nothing(text: str) -> None:
    assert expired_before({"delta.deletedFileRetentionDuration": text}, RETENTION_OF_TOMBSTONES, 10**13) == 0


def test_a_log_is_cleaned_of_what_an_expired_checkpoint_has(log: TableLog) -> None:
    """The table keeps its log for a day: every version of the last day can still be read."""
    commit(log, *range(1, 5))
    log.checkpoint(2)
    log.checkpoint(4)
    commit(log, 5, 6)
    log.checkpoint()
    commit(log, 7)
    age(log, 25, *(f"*{version}.json" for version in range(6)), "*2.checkpoint.parquet", "*4.checkpoint.parquet")
    expected = {version: numbers(log, version) for version in range(4, 8)}
    # Version 5 has expired as well, but 4's checkpoint is needed for it, and it is newer than that.
    log.checkpoint()
    assert names(log) == {
        *("4.checkpoint.parquet", "4.json", "5.json", "6.checkpoint.parquet", "6.json"),
        *("7.checkpoint.parquet", "7.json", "_last_checkpoint"),
    }
    assert {version: numbers(log, version) for version in range(4, 8)} == expected
    for version in (None, *range(4, 8)):
        assert as_we_have_it(log, version) == as_deltalake_has_it(log, version)


def test_a_log_without_an_expired_checkpoint_is_kept(log: TableLog) -> None:
    commit(log, *range(1, 5))
    age(log, 1_000, "*.json")
    log.checkpoint()
    assert names(log) == {".json", *(f"{version}.json" for version in range(1, 5)), "4.checkpoint.parquet"} | {
        "_last_checkpoint"
    }


def test_a_table_that_asks_for_it_keeps_its_log(spark: SparkSession, log: TableLog) -> None:
    commit(log, 1)
    log.checkpoint()
    spark.sql(f"ALTER TABLE delta.`{log.path}` SET TBLPROPERTIES (delta.enableExpiredLogCleanup = false)")
    log.checkpoint(now=now() + 1_000 * DAY_MILLIS)
    assert {".json", "1.json", "1.checkpoint.parquet"} <= names(log)
    spark.sql(f"ALTER TABLE delta.`{log.path}` SET TBLPROPERTIES (delta.enableExpiredLogCleanup = true)")
    log.checkpoint(now=now() + 1_000 * DAY_MILLIS)
    assert names(log) >= {"3.json", "3.checkpoint.parquet", "_last_checkpoint"}
    assert names(log).isdisjoint({".json", "1.json", "1.checkpoint.parquet", "2.json"})


def test_what_a_killed_writer_has_left_is_deleted_after_a_day(log: TableLog) -> None:
    commit(log, 1)
    left = [f".{1:020d}.json.{'a' * 8}-aaaa.tmp", f".{1:020d}.checkpoint.parquet.b.tmp", "._last_checkpoint.c.tmp"]
    for name in left:
        (folder(log) / name).write_bytes(b"half of")
    (folder(log) / ".something else").write_bytes(b"")
    log.checkpoint(now=now() + 23 * HOUR)
    assert set(left) <= names(log)
    log.checkpoint(now=now() + 25 * HOUR)
    assert names(log).isdisjoint(left)
    assert ".something else" in names(log)


class Listed(LocalDisk):
    """Counts the names that a listing has given."""

    given = 0

    def list(self, url: str, after: str = "", limit: int | None = None) -> list_of[FileStatus]:
        found = super().list(url, after, limit)
        Listed.given += len(found)
        return found


def test_a_neglected_log_is_brought_back_over_several_calls(log: TableLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call looks at a bounded part of it, and the oldest files go first."""
    monkeypatch.setattr(module, "_PAGE", 10)
    monkeypatch.setattr(module, "_SEARCHED", 30)
    for version in range(1, 200):
        assert log.put(version, {"batch": version})
    # No checkpoint in the first 150 versions, then one every ten.
    for version in range(150, 200, 10):
        log.checkpoint(version)
    age(log, 25, "*.json", "*.checkpoint.parquet")
    assert log.put(200, {}, [write(log, 1)])
    log.checkpoint()
    log = TableLog(Listed(), log.path)
    versions = range(201)
    for _ in range(20):
        Listed.given = 0
        log.checkpoint(deletions=25)
        assert Listed.given < 100
        left = [version for version in versions if log.has(version)]
        assert len(versions) - len(left) <= 25
        assert left == list(versions)[-len(left) :]
        assert numbers(log) == [1]
        versions = range(left[0], 201)
    assert versions[0] == 190
    assert {"190.checkpoint.parquet", "200.checkpoint.parquet"} <= names(log)
    assert as_we_have_it(log) == as_deltalake_has_it(log)


class Killed(BaseException):
    pass


class Mortal(LocalDisk):
    """A store whose user is killed before its next change of a file but so many."""

    changes = 0

    def _change(self) -> None:
        Mortal.changes -= 1
        if Mortal.changes < 0:
            raise Killed

    def create(self, url: str, content: bytes) -> bool:
        self._change()
        super().write(f"{url.rpartition('/')[0]}/.draft.tmp", content[: len(content) // 2])
        self._change()
        return super().create(url, content)

    def replace(self, url: str, content: bytes) -> None:
        self._change()
        super().replace(url, content)

    def delete(self, url: str, recursive: bool = False) -> None:
        self._change()
        super().delete(url, recursive)


def test_a_process_killed_at_any_step_leaves_a_readable_table(log: TableLog) -> None:
    files = commit(log, 1, 2, 3)
    log.checkpoint(2)
    assert log.put(4, {}, [write(log, 4)], files[:1])
    age(log, 25, *(f"*{version}.json" for version in range(3)), "*2.checkpoint.parquet")
    expected = as_we_have_it(log)
    for step in range(100):
        copy = copy_of(log, f"killed-{step}")
        Mortal.changes = step
        try:
            TableLog(Mortal(), copy.path).checkpoint()
            is_done = True
        except Killed:
            is_done = False
        as_it_is = {path.rpartition("/")[2] for path in as_we_have_it(copy)}
        assert as_it_is == {path.rpartition("/")[2] for path in expected}
        assert as_we_have_it(copy) == as_deltalake_has_it(copy)
        assert numbers(copy, 3) == [1, 2, 3]
        # The next one does what is left.
        copy.checkpoint()
        assert names(copy) - {".draft.tmp"} == {
            *("2.checkpoint.parquet", "2.json", "3.json", "4.json", "4.checkpoint.parquet", "_last_checkpoint")
        }
        assert as_we_have_it(copy) == as_deltalake_has_it(copy)
        if is_done:
            break
    # Half of the draft, the checkpoint, the checksum of Spark's pointer, the pointer, and two files deleted.
    assert step == 6


def test_a_table_with_features_that_we_would_lose_gets_no_checkpoint(spark: SparkSession, log: TableLog) -> None:
    commit(log, 1)
    spark.sql(f"ALTER TABLE delta.`{log.path}` SET TBLPROPERTIES (delta.enableRowTracking = true)")
    with pytest.raises(CannotWrite, match="rowTracking"):
        log.checkpoint()
    assert "_last_checkpoint" not in names(log)


def test_files_that_may_hold_late_rows_are_found_by_their_statistics(log: TableLog) -> None:
    files = commit(log, 1, 2, 3)
    late = {"maxValues": {"at": "2024-08-09T02:00:04+02:00"}}
    texts = [late, {"maxValues": {"at": "unknown"}}, {"maxValues": {"n": 1}}, {}, None]
    others = [
        log.file({**files[0].add, "path": f"other-{number}", "stats": None if text is None else json.dumps(text)})
        for number, text in enumerate(texts)
    ]
    assert log.put(4, {}, others)

    def since(seconds: float, *columns: str) -> list_of[DataFile]:
        found = log.files_since(columns or ("at",), DAY + timedelta(seconds=seconds))
        assert all(log.state().files[file.add["path"]] == file for file in found)
        return found

    for checkpointed in (False, True):
        if checkpointed:
            log.checkpoint()
        unknown = {file.path for file in others[1:]}
        assert {file.path for file in since(100)} == unknown
        assert {file.path for file in since(3.5)} == unknown | {others[0].path}
        # Statistics are cut to milliseconds.
        assert {file.path for file in since(3.000_999)} == unknown | {others[0].path, files[2].path}
        assert {file.path for file in since(3.001)} == unknown | {others[0].path}
        assert len(since(0)) == 8
        # Any of the columns may be the late one.
        assert len(since(100, "at", "absent")) == 8


@pytest.mark.services
def test_a_log_on_hdfs_is_cleaned(running: Callable[..., Settings], tmp_path: Path) -> None:
    suite = running("hdfs")
    files = files_of(suite.lake_root, str(suite.webhdfs_url))
    log = create(files, f"{suite.lake_root}-checkpoint/{tmp_path.name}")
    first = commit(log, *range(1, 5))
    log.checkpoint()
    assert log.put(5, {}, [write(log, 5)], first[:1])
    later = int(datetime.now(UTC).timestamp() * 1_000) + 2 * DAY_MILLIS
    log.checkpoint(now=later, deletions=3)
    log.checkpoint(now=later)
    assert [status.name.lstrip("0") for status in files.list(f"{log.path}/_delta_log")] == [
        *("5.checkpoint.parquet", "5.json", "_last_checkpoint")
    ]
    assert len(log.files()) == 4
    assert as_we_have_it(log) == as_deltalake_has_it(log)
