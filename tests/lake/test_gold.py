"""Promises 2 and 3: gold is what all distinct ticks together give, however late, repeated, and cut."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Hashable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from conf.settings import Settings
from lake.tables import GOLD
from streaming.ticks import resume
from tests.oracle import Record, Row, differences, lake_of
from tests.streaming.test_ticks import checkpoint_of, frame, stored

START = datetime(2024, 8, 9, 23, 50, tzinfo=UTC)


def market(chance: random.Random) -> list[bytes]:
    """Ticks of three pairs around midnight: bursts, silences, jumps that alert, clocks that run ahead."""
    ticks: list[tuple[float, bytes]] = []
    for source, symbol, price in (("a", "X", 100.0), ("a", "Y", 0.5), ("b", "X", 101.0)):
        now = chance.uniform(0, 5)
        for trade_id in range(1, 260):
            now += chance.choice([0.0, 0.001, 0.2, 1.0, 3.0, 9.0, 31.0 if chance.random() < 0.5 else 0.5])
            price *= 1 + chance.choice(
                [0, 0, 0.001, -0.001, 0.004, -0.004, 0.012, -0.012, 0.03 * chance.choice([0, 0, 1, -1])]
            )
            at = START + timedelta(seconds=now)
            ahead = timedelta(seconds=chance.choice([0, -0.1, 1.25, 600 if chance.random() < 0.1 else 0]))
            tick: dict[str, object] = {
                "timestamp": at.isoformat(timespec="microseconds"),
                "asset": symbol.lower(),
                "price_usd": f"{price:.4f}",
                "quote": "USD",
                "source": source,
                "symbol": symbol,
                "event_time": (at + ahead).isoformat(timespec="microseconds"),
                "quantity": None if chance.random() < 0.1 else f"{chance.random():.5f}",
                "trade_id": trade_id if symbol == "X" else None,
                "trade_epoch": 0,
                "producer": f"p-{source}",
                "sequence": trade_id,
            }
            ticks.append((now, json.dumps(tick, separators=(",", ":")).encode()))
    ticks.sort(key=lambda pair: pair[0])
    return [value for _, value in ticks]


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

    settings = Settings(lake_root=f"file:{tmp_path / 'lake'}", checkpoint=f"file:{tmp_path / 'checkpoint'}")
    checkpoint_of(tmp_path / "checkpoint", "q")
    spark.sparkContext.setLocalProperty("sql.streaming.queryId", "q")
    cuts = [0, *sorted(chance.sample(range(1, len(records)), 4)), len(records)]
    lakehouse = resume(spark, settings)
    for batch, (begin, end) in enumerate(itertools.pairwise(cuts)):
        if batch == 3:
            lakehouse = resume(spark, settings)
        lakehouse.write_batch(frame(spark, records[begin:end]), batch)
    lakehouse.finish()

    expected = lake_of(records)
    assert len(expected.alerts) > 5, "there is something to find"
    tables: list[Mapping[Hashable, Row]] = [
        *(expected.price_1m, expected.price_5m, expected.price_1h, expected.price_1d),
        *(expected.rolling_price, expected.current_price, expected.alerts),
    ]
    for table, rows in zip(GOLD, tables, strict=True):
        assert differences(rows, stored(spark, settings.lake_root, table)) == [], table.qualified_name
