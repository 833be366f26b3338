"""Writing: promise 1, a replayed micro-batch writes nothing twice, and the id that does it stays where it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lake import writer
from lake.tables import Column, Table

COUNTS = Table(
    "test", "counts", "How many of each", ("name",), (Column("name", "STRING", "what"), Column("n", "BIGINT", "many"))
)


@pytest.fixture
def root(spark: SparkSession, tmp_path: Path) -> str:
    writer.create_table(spark, COUNTS, f"file:{tmp_path}")
    return f"file:{tmp_path}"


def counts(spark: SparkSession, **rows: int) -> DataFrame:
    return spark.createDataFrame(list(rows.items()), "name STRING, n BIGINT")


def stored(spark: SparkSession, root: str) -> list[tuple[str, int]]:
    return sorted((row["name"], row["n"]) for row in spark.read.format("delta").load(COUNTS.path(root)).collect())


def test_a_replayed_batch_appends_and_folds_once(spark: SparkSession, root: str) -> None:
    total = {"n": F.col("old.n") + F.col("new.n")}
    for batch, rows in ((0, {"a": 1}), (0, {"a": 1}), (1, {"a": 2, "b": 5}), (1, {"a": 2, "b": 5})):
        with writer.transaction(spark, "query", batch):
            writer.merge(counts(spark, **rows), COUNTS, root, total)
    assert stored(spark, root) == [("a", 3), ("b", 5)]
    for batch in (2, 2, 3):
        with writer.transaction(spark, "query", batch):
            writer.append(counts(spark, c=batch), COUNTS, root)
    assert stored(spark, root) == [("a", 3), ("b", 5), ("c", 2), ("c", 3)]


def test_a_failed_batch_leaves_no_id_behind(spark: SparkSession, root: str) -> None:
    """Left behind, it would drop the next write silently."""
    with writer.transaction(spark, "query", 7):
        writer.append(counts(spark, a=1), COUNTS, root)
    with pytest.raises(RuntimeError, match="broken"), writer.transaction(spark, "query", 8):
        raise RuntimeError("broken")
    writer.append(counts(spark, b=1), COUNTS, root)
    writer.append(counts(spark, b=2), COUNTS, root)
    assert stored(spark, root) == [("a", 1), ("b", 1), ("b", 2)]


def test_the_last_commit_is_found_behind_maintenance(spark: SparkSession, root: str) -> None:
    assert writer.last_commit(spark, COUNTS, root) is None
    for batch in (1, 2):
        writer.append(counts(spark, a=batch), COUNTS, root, {"batch": batch})
    DeltaTable.forPath(spark, COUNTS.path(root)).optimize().executeCompaction()
    assert writer.last_commit(spark, COUNTS, root) == {"batch": 2}


def test_a_table_tells_what_its_columns_mean_and_is_made_once(spark: SparkSession, root: str) -> None:
    writer.append(counts(spark, a=1), COUNTS, root)
    writer.create_table(spark, COUNTS, root)
    assert stored(spark, root) == [("a", 1)]
    detail = DeltaTable.forPath(spark, COUNTS.path(root)).detail().first()
    assert detail is not None
    assert (detail["description"], detail["properties"]["tickhouse.key"]) == ("How many of each", "name")
    schema = spark.read.format("delta").load(COUNTS.path(root)).schema
    assert [field.metadata["comment"] for field in schema] == ["what", "many"]
