"""The quality check names each kind of wrong row, and keeps its verdicts."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from batch.check_quality import GOLD_SUITE, SILVER_SUITE, Suite, Verdict, check, verdicts
from lake.delta.files import files_of
from lake.delta.writer import create_table
from lake.reader import read
from lake.tables import QUALITY_RESULTS

DAY = date(2024, 8, 9)
CHECKED_AT = datetime(2024, 8, 10, tzinfo=UTC)
SILVER = """
    'binance:BTCUSDT:0:1' AS event_id, 'binance' AS source, 'BTCUSDT' AS symbol, 'bitcoin' AS asset, 'USD' AS quote,
    100 AS price_usd, 1 AS quantity, 1 AS trade_id, 0 AS trade_epoch, TIMESTAMP'2024-08-09 10:00:01' AS event_time,
    TIMESTAMP'2024-08-09 10:00:01' AS received_at, 'p' AS producer, 1 AS sequence, 0 AS kafka_partition,
    0 AS kafka_offset, false AS is_late, false AS is_future, DATE'2024-08-09' AS event_date
"""
GOLD = """
    'binance' AS source, 'bitcoin' AS asset, TIMESTAMP'2024-08-09 10:00:00' AS window_start,
    TIMESTAMP'2024-08-09 10:01:00' AS window_end, 100 AS open, 101 AS high, 99 AS low, 100 AS close, 100 AS average,
    0.5 AS volatility_pct, 1 AS volume, 100 AS vwap, 2 AS tick_count,
    TIMESTAMP'2024-08-09 10:00:00' AS first_event_time,
    TIMESTAMP'2024-08-09 10:00:59' AS last_event_time, TIMESTAMP'2024-08-09 10:02:00' AS updated_at,
    DATE'2024-08-09' AS window_date, 200 AS price_sum, 0.5 AS price_m2, 100 AS notional, 1 AS volume_sum,
    struct(TIMESTAMP'2024-08-09 10:00:00' AS gold_time, 0 AS trade_epoch, 1 AS trade_id, 'p' AS producer, 1 AS sequence,
           'a' AS event_id) AS open_order,
    open_order AS close_order
"""


def rows_of(spark: SparkSession, suite: Suite, changes: dict[str, Column] | None = None) -> DataFrame:
    """A good row of the suite's table, with some columns changed."""
    types = {column.name: column.type for column in suite.table.columns}
    row = spark.sql(f"SELECT {SILVER if suite is SILVER_SUITE else GOLD}").withColumns(changes or {})
    return row.select(*(F.col(name).cast(type_name) for name, type_name in types.items()))


def failures(rows: DataFrame, suite: Suite) -> list[Verdict]:
    found = verdicts(rows, suite, DAY, CHECKED_AT)
    assert len(found) == len(suite.expectations)
    return [verdict for verdict in found if not verdict.success]


def test_each_kind_of_wrong_tick_is_named(spark: SparkSession) -> None:
    wrong = [
        rows_of(spark, SILVER_SUITE, change)
        for change in (
            {},
            {"price_usd": F.lit(0), "event_id": F.lit("b")},
            {"asset": F.lit(None), "event_id": F.lit("c")},
            {"event_date": F.lit(date(2024, 8, 8)), "event_id": F.lit("d")},
            {"event_id": F.lit("binance:BTCUSDT:0:1"), "is_future": F.lit(True)},
        )
    ]
    rows = wrong[0]
    for frame in wrong[1:]:
        rows = rows.unionByName(frame)
    found = {(row.expectation, row.column_name): row for row in failures(rows, SILVER_SUITE)}
    assert {name: row.unexpected_count for name, row in found.items()} == {
        ("expect_column_values_to_be_between", "price_usd"): 1,
        ("expect_column_values_to_not_be_null", "asset"): 1,
        ("event_date is the date of event_time", ""): 1,
        ("expect_column_values_to_be_unique", "event_id"): 2,
        ("expect_column_values_to_be_in_set", "is_future"): 1,
    }
    warnings = [name for name, row in found.items() if row.severity == "warning"]
    assert warnings == [("expect_column_values_to_be_in_set", "is_future")]


def test_each_kind_of_wrong_minute_is_named(spark: SparkSession) -> None:
    start = F.lit("2024-08-09 10:00:30").cast("timestamp")
    wrong = rows_of(spark, GOLD_SUITE, {"window_start": start, "average": F.lit(102), "tick_count": F.lit(0)})
    found = {(row.expectation, row.column_name) for row in failures(wrong, GOLD_SUITE)}
    assert found == {
        ("the window is one minute", ""),
        ("the window starts with a minute", ""),
        ("expect_column_pair_values_a_to_be_greater_than_b", "high,average"),
        ("expect_column_values_to_be_between", "tick_count"),
    }


def test_a_good_day_passes_an_empty_one_fails_and_the_verdicts_are_kept(spark: SparkSession, tmp_path: Path) -> None:
    root = f"file:{tmp_path}"
    files = files_of(root, "")
    for suite in (SILVER_SUITE, GOLD_SUITE):
        create_table(files, suite.table, root)
        rows_of(spark, suite).write.format("delta").mode("append").save(suite.table.path(root))
    assert [verdict for verdict in check(spark, files, root, DAY, CHECKED_AT) if not verdict.success] == []
    empty = [
        verdict.expectation
        for verdict in check(spark, files, root, date(2024, 8, 8), CHECKED_AT)
        if not verdict.success
    ]
    assert empty == 2 * ["expect_table_row_count_to_be_between"]
    kept = read(str(tmp_path), QUALITY_RESULTS).to_pylist()
    assert len(kept) == 2 * (len(SILVER_SUITE.expectations) + len(GOLD_SUITE.expectations))
    assert {row["checked_at"] for row in kept} == {CHECKED_AT}
    assert {row["success"] for row in kept if row["slice"].endswith("2024-08-09")} == {True}
