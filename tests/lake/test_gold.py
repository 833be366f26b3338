"""Promises 2 and 3: gold is what all distinct ticks together give, however late, repeated, and cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Mapping
from decimal import Decimal
from io import StringIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from lake.reader import query, read
from lake.sinks import Console, PlainParquet, is_of_the_contract
from lake.tables import GOLD, GOLD_CURRENT_PRICE
from tests.lakes import rows_of
from tests.micro_batches import START, lake_in, market, write
from tests.oracle import Record, Row, differences, lake_of


@pytest.mark.parametrize("seed", [1])
def test_gold_is_that_of_all_ticks_together(spark: SparkSession, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    values = market(chance)
    # A tenth of the ticks that have trade ids come late: some by a little, some after everything else.
    late = [value for value in values if b'"trade_id":null' not in value and chance.random() < 0.1]
    in_time = [value for value in values if value not in set(late)]
    for value in late:
        in_time.insert(chance.choice([len(in_time), chance.randrange(len(in_time))]), value)
    repeated = chance.sample(range(len(in_time)), 40)
    delivered = [value for at, value in enumerate(in_time) for _ in range(2 if at in repeated else 1)]
    records = [Record("ticks", 0, number, None, value) for number, value in enumerate(delivered)]

    settings = lake_in(tmp_path, spark)
    cuts = [0, *sorted(chance.sample(range(1, len(records)), 4)), len(records)]
    parts = [records[begin:end] for begin, end in itertools.pairwise(cuts)]
    plain = PlainParquet(spark, f"file:{tmp_path / 'plain'}")
    write(spark, settings, parts[:3], sink=plain)
    write(spark, settings, parts[3:], first=3, sink=plain)

    expected = lake_of(records)
    assert len(expected.alerts) > 5, "there is something to find"
    tables: list[Mapping[Hashable, Row]] = [
        *(expected.price_1m, expected.price_5m, expected.price_1h, expected.price_1d),
        *(expected.rolling_price, expected.current_price, expected.alerts),
    ]
    for table, rows in zip(GOLD, tables, strict=True):
        assert differences(rows, rows_of(settings.lake_root, table)) == [], table.qualified_name
    movers = query(settings.lake_root.replace("file:", ""), "SELECT * FROM gold.top_movers").to_pylist()
    found: dict[Hashable, dict[str, object]] = {(row["window_start"], row["rank"]): row for row in movers}
    wanted: dict[Hashable, Row] = {(row.window_start, row.rank): row for row in expected.top_movers.values()}
    assert differences(wanted, found) == []

    # The plain files hold the same rows.
    for table in GOLD:
        there = pq.read_table(tmp_path / "plain" / table.name)
        assert there.column_names == [column.name for column in table.columns if is_of_the_contract(column)]
        assert sorted(map(str, there.select(list(table.key)).to_pylist())) == sorted(
            str({name: row[name] for name in table.key})
            for row in read(settings.lake_root.replace("file:", ""), table).to_pylist()
        )
    minutes: dict[Hashable, dict[str, object]] = {
        (row["source"], row["asset"], row["window_start"]): row
        for row in pq.read_table(tmp_path / "plain" / "price_1m").to_pylist()
    }
    assert differences(expected.price_1m, minutes) == []


def test_the_console_tells_a_row_in_a_line() -> None:
    out = StringIO()
    row = ("bitcoin", Decimal("61685.990000000000"), "binance", START, "binance:BTCUSDT:0:7", 0.125, START, None)
    Console(out).changed(GOLD_CURRENT_PRICE, {}, [row])
    assert out.getvalue() == (
        "gold.current_price asset=bitcoin price_usd=61685.99 source=binance event_time=2024-08-09T23:50:00+00:00 "
        "event_id=binance:BTCUSDT:0:7 change_pct_1m=0.125\n"
    )
