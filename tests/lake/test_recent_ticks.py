"""The newest ticks are found in the files without Spark: the same ones, in the same order, as Spark finds."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from lake.commits import DataFile, TableLog
from lake.recent_ticks import Recent
from lake.rules import gold_rules
from lake.silver import Silver
from lake.store import Store
from lake.summaries import to_micros
from lake.tables import SILVER_TICKS
from tests.micro_batches import START, lake_in, market, write
from tests.oracle import Record


def in_row_groups(file: DataFile, rows: int) -> DataFile:
    """The file, written again with row groups of so many rows."""
    path = Path(file.path.removeprefix("file:"))
    pq.write_table(pq.ParquetFile(path).read(), path, row_group_size=rows)
    path.with_name(f".{path.name}.crc").unlink(missing_ok=True)
    return replace(file, add={**file.add, "size": path.stat().st_size})


@pytest.mark.parametrize("large", [False, True])
def test_recent_ticks_are_those_that_spark_finds(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """In files that are read as a whole, and in row groups of such as are not; more rows than it reads are Spark's."""
    if large:
        monkeypatch.setattr("lake.recent_ticks.SMALL_FILE", 1)
        monkeypatch.setattr("lake.recent_ticks.KEPT_ROWS", 50)
    chance = random.Random(5)
    records = [Record("ticks", 0, number, None, value) for number, value in enumerate(market(chance))]
    settings = lake_in(tmp_path, spark)
    write(spark, settings, [records[:300], records[300:]])
    rules = gold_rules(settings)
    silver = Silver.of_lake(spark, settings.lake_root, rules)
    pairs = [("a", "x"), ("a", "y"), ("b", "x")]
    begin = to_micros(START)

    asked = []
    for of, seconds in ((pairs, (60, 200)), (pairs[:1], (0, 3_600)), (pairs[:2], (120, 130))):
        first, last = (begin + second * 1_000_000 for second in seconds)
        asked.append((of, [(first, first + (last - first) // 3), (last - (last - first) // 3, last)]))
    expected = [list(silver.alert_ticks(*question)) for question in asked]

    recent = Recent(Store.of(settings.lake_root, ""), {("b", "x"): begin // 1_000_000}, rules.symbols)
    log = TableLog(spark, SILVER_TICKS.path(settings.lake_root))
    files = log.files(log.newest())
    recent.add([in_row_groups(file, 20) for file in files] if large else files)
    for question, ticks in zip(asked, expected, strict=True):
        assert recent.ticks(*question) == ticks
        assert ticks
    with monkeypatch.context() as narrow:
        narrow.setattr("lake.recent_ticks.MOST_ROWS", 10)
        assert recent.ticks(pairs[:1], [(begin, begin + 3_600_000_000)]) is None
    assert recent.ticks(pairs, [(begin + 59_999_999, begin + 61_000_000)]) is None, "silver had some of them before"
    assert recent.ticks(pairs, [(begin + 10**12, begin + 10**12 + 1)]) == []
