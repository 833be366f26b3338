"""Reading the lake without Spark."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lake import reader
from lake.delta.overtaken import FileLost, Overtaken
from lake.reader import NoSuchTable, query, read, row_count
from lake.tables import GOLD_CURRENT_PRICE, GOLD_PRICE_1M, Table

NOON = datetime(2024, 8, 9, 12, tzinfo=UTC)


@pytest.fixture
def root(tmp_path: Path) -> str:
    rows = pa.table(
        {
            "source": ["binance", "binance"],
            "asset": ["bitcoin", "ethereum"],
            "window_start": pa.array([NOON, NOON], pa.timestamp("us", "UTC")),
            "average": pa.array([Decimal("61685.990000000001"), Decimal("0.000000000001")], pa.decimal128(28, 12)),
        }
    )
    for asset in rows["asset"].to_pylist():
        part = rows.filter(pa.compute.equal(rows["asset"], asset))
        write_deltalake(GOLD_PRICE_1M.path(str(tmp_path)), part, mode="append")
    return str(tmp_path)


def test_decimals_and_times_come_as_they_are(root: str) -> None:
    (row,) = read(root, GOLD_PRICE_1M, "asset = 'bitcoin'").to_pylist()
    assert (row["average"], row["window_start"]) == (Decimal("61685.990000000001"), NOON)


def test_sql_names_tables_as_the_lake_does(root: str) -> None:
    assert query(root, "SELECT count(*) AS n, max(asset) AS last FROM gold.price_1m").to_pylist() == [
        {"n": 2, "last": "ethereum"}
    ]


def test_rows_are_counted_without_reading_them(root: str) -> None:
    assert row_count(root, GOLD_PRICE_1M) == 2
    assert row_count(root, GOLD_CURRENT_PRICE) == 0


def test_a_table_that_nobody_wrote_is_named(root: str) -> None:
    with pytest.raises(NoSuchTable, match=r"gold\.current_price"):
        read(root, GOLD_CURRENT_PRICE)


def test_a_reader_that_is_overtaken_is_told_to_start_again(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version's files are replaced and deleted between its look at the log and its read."""
    real, opened = reader.open_table, list[DeltaTable]()

    def overtaken(root: str, table: Table) -> DeltaTable:
        opened.append(real(root, table))
        if len(opened) == 1:
            other = real(root, table)
            other.alter.set_table_properties({"delta.deletedFileRetentionDuration": "interval 90 minutes"})
            other.optimize.compact()
            other.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
        return opened[-1]

    monkeypatch.setattr(reader, "open_table", overtaken)
    with pytest.raises(Overtaken, match=r"gold\.price_1m.* 90 minutes \(setting history_minutes\)\. Start again"):
        read(root, GOLD_PRICE_1M)
    assert read(root, GOLD_PRICE_1M).num_rows == 2


def test_a_lake_that_lacks_a_file_is_damaged(root: str) -> None:
    first = next(Path(GOLD_PRICE_1M.path(root)).glob("*.parquet"))
    first.unlink()
    with pytest.raises(FileLost, match=f"{first.name} .* damaged"):
        read(root, GOLD_PRICE_1M)


def test_a_mistake_in_a_query_is_the_callers(root: str) -> None:
    with pytest.raises(duckdb.Error, match="no_such_column"):
        query(root, "SELECT no_such_column FROM gold.price_1m")
