"""The newest ticks are found in the files without Spark: the same ones, in the same order, as Spark finds."""

from __future__ import annotations

import random
from collections.abc import Mapping
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
from lake.summaries import Pair, Summary, to_micros
from lake.tables import SILVER_TICKS
from tests.micro_batches import START, lake_in, market, write
from tests.oracle import Record


def in_row_groups(file: DataFile, rows: int) -> DataFile:
    """The file, written again with row groups of so many rows."""
    path = Path(file.path.removeprefix("file:"))
    pq.write_table(pq.ParquetFile(path).read(), path, row_group_size=rows)
    path.with_name(f".{path.name}.crc").unlink(missing_ok=True)
    return replace(file, add={**file.add, "size": path.stat().st_size})


def without_m2(buckets: Mapping[Pair, Mapping[int, Summary]]) -> dict[tuple[Pair, int], Summary]:
    """Exact, but for the one double of which the last digits may differ."""
    return {
        (pair, number): replace(summary, price_m2=round(summary.price_m2, 6))
        for pair, there in buckets.items()
        for number, summary in there.items()
    }


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
    numbers = (begin // 5_000_000 + 12, begin // 5_000_000 + 60)
    buckets = silver.buckets(*numbers, pairs)

    since = begin + 60_000_000
    log = TableLog(spark, SILVER_TICKS.path(settings.lake_root))
    files = log.files(log.newest())
    assert sum(file.rows for file in files) == len(records)
    files = [in_row_groups(file, 20) for file in files] if large else files
    recent = Recent(Store.of(settings.lake_root, ""), files, since, [("b", "x")], rules.symbols)
    for question, ticks in zip(asked, expected, strict=True):
        assert recent.ticks(*question) == ticks
        assert ticks
    found = recent.buckets(pairs, (numbers[0] * 5_000_000, numbers[1] * 5_000_000))
    assert found is not None
    assert without_m2(found) == without_m2(buckets)
    with monkeypatch.context() as narrow:
        narrow.setattr("lake.recent_ticks.MOST_ROWS", 10)
        assert recent.ticks(pairs[:1], [(begin, begin + 3_600_000_000)]) is None
    assert recent.ticks(pairs, [(begin + 59_999_999, begin + 61_000_000)]) is None, "silver had some of them before"
    assert recent.ticks(pairs, [(begin + 10**12, begin + 10**12 + 1)]) == []
