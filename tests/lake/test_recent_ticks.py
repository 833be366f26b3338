"""The newest ticks are found in the files without Spark: the same ones, in the same order, as Spark finds."""

from __future__ import annotations

import random
from pathlib import Path

from pyspark.sql import SparkSession

from lake.commits import TableLog
from lake.recent_ticks import Recent
from lake.rules import gold_rules
from lake.silver import Silver
from lake.summaries import to_micros
from lake.tables import SILVER_TICKS
from tests.micro_batches import START, lake_in, market, write
from tests.oracle import Record


def test_recent_ticks_are_those_that_spark_finds(spark: SparkSession, tmp_path: Path) -> None:
    chance = random.Random(5)
    records = [Record("ticks", 0, number, None, value) for number, value in enumerate(market(chance))]
    settings = lake_in(tmp_path, spark)
    write(spark, settings, [records[:300], records[300:]])
    rules = gold_rules(settings)
    silver = Silver.of_lake(spark, settings.lake_root, rules)
    pairs = [("a", "x"), ("a", "y"), ("b", "x")]
    begin = to_micros(START)

    recent = Recent(spark, {("b", "x"): begin // 1_000_000}, rules.symbols)
    recent.add(TableLog(spark, SILVER_TICKS.path(settings.lake_root)).begin().files())
    for asked, seconds in ((pairs, (60, 200)), (pairs[:1], (0, 3_600)), (pairs[:2], (120, 130))):
        first, last = (begin + second * 1_000_000 for second in seconds)
        ranges = [(first, first + (last - first) // 3), (last - (last - first) // 3, last)]
        found = recent.ticks(asked, ranges)
        assert found == list(silver.alert_ticks(asked, ranges))
        assert found
    assert recent.ticks(pairs, [(begin + 59_999_999, begin + 61_000_000)]) is None, "silver had some of them before"
    assert recent.ticks(pairs, [(begin + 10**12, begin + 10**12 + 1)]) == []
