"""The one way in which Delta tables are created and written.

Exactly once: a micro-batch writes each table at most once, under the transaction id (query, batch). Delta records that
id with the commit and drops a second write with the same one, so a batch that is replayed after a crash completes what
was missing and repeats nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from lake.tables import Table

_APP_ID = "spark.databricks.delta.write.txnAppId"
_VERSION = "spark.databricks.delta.write.txnVersion"


def create_table(spark: SparkSession, table: Table, root: str) -> None:
    """Create the table under root if it is absent, with its comments, partitions and properties."""
    builder = DeltaTable.createIfNotExists(spark).location(table.path(root)).comment(table.comment)
    for column in table.columns:
        builder = builder.addColumn(column.name, column.type, nullable=column.nullable, comment=column.comment)
    if table.partitioned_by:
        builder = builder.partitionedBy(*table.partitioned_by)
    if table.statistics:
        builder = builder.property("delta.dataSkippingStatsColumns", ",".join(table.statistics))
    for name, value in table.properties.items():
        builder = builder.property(name, value)
    builder.property("tickhouse.key", ",".join(table.key)).execute()


@contextmanager
def transaction(spark: SparkSession, query: str, batch: int) -> Iterator[None]:
    """Within it, every write of `spark` carries the transaction id (query, batch); at most one write a table.

    The id is a setting of the session, which is the only way for MERGE. Left set, it would drop later writes silently.
    """
    spark.conf.set(_APP_ID, query)
    spark.conf.set(_VERSION, str(batch))
    try:
        yield
    finally:
        spark.conf.unset(_APP_ID)
        spark.conf.unset(_VERSION)


def append(rows: DataFrame, table: Table, root: str, metadata: Mapping[str, Any] | None = None) -> None:
    """Append rows that have exactly the table's columns; `metadata` is kept with the commit, see `last_commit`."""
    writer = rows.select(*table.column_names).write.format("delta").mode("append")
    if metadata is not None:
        writer = writer.option("userMetadata", json.dumps(metadata, separators=(",", ":")))
    writer.save(table.path(root))


def merge(
    rows: DataFrame,
    table: Table,
    root: str,
    update: Mapping[str, Column],
    only_if: Column | None = None,
    within: Column | None = None,
) -> None:
    """Fold rows into a table: insert those with a new key, else set `update` where `only_if` holds.

    The expressions see the table's row as `old` and the new one as `new`. `within` narrows which part of the table can
    have the keys, so that the rest is not read.
    """
    same = F.lit(True) if within is None else within
    for name in table.key:
        same = same & (F.col(f"old.{name}") == F.col(f"new.{name}"))
    target = DeltaTable.forPath(rows.sparkSession, table.path(root)).alias("old")
    (
        target.merge(rows.alias("new"), same)
        .whenMatchedUpdate(only_if, set=dict(update))
        .whenNotMatchedInsert(values={name: F.col(f"new.{name}") for name in table.column_names})
        .execute()
    )


def last_commit(spark: SparkSession, table: Table, root: str) -> dict[str, Any] | None:
    """What `append` kept with the table's newest commit of its own, looking past maintenance; None if there is none."""
    delta = DeltaTable.forPath(spark, table.path(root))
    for history in (delta.history(1), delta.history()):
        row = history.where(F.col("userMetadata").startswith("{")).orderBy(F.desc("version")).first()
        if row is not None:
            metadata: dict[str, Any] = json.loads(row["userMetadata"])
            return metadata
    return None
