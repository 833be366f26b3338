"""quality.results: the verdicts of checks, appended by the jobs that make them."""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import SparkSession

from lake.delta.files import Files
from lake.delta.writer import create_table
from lake.tables import QUALITY_RESULTS


def append(spark: SparkSession, files: Files, root: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Append verdicts, in the order of the table's columns, to quality.results, which is created if it is absent."""
    create_table(files, QUALITY_RESULTS, root)
    verdicts = spark.createDataFrame(list(rows), QUALITY_RESULTS.schema)
    verdicts.write.format("delta").mode("append").save(QUALITY_RESULTS.path(root))
