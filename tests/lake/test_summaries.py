"""Summaries: promise 3, gold is what all ticks together give, however they were cut."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lake.canonical import canonical
from lake.metrics import MINUTE, Bucket, Window, WindowKey, bucket_from, newer, price_row
from lake.overview import overview
from lake.parquet import arrow_type
from lake.summaries import Pair, Summary, bucket_start, bucket_summaries, merge, to_time
from lake.tables import GOLD_PRICE_1M, SILVER_TICKS
from lake.ticks import notional
from tests.lake.test_ticks import TICK, arrow
from tests.oracle import Row, Tick, differences
from tests.oracle_gold import windows_of

START = datetime(2024, 8, 9, tzinfo=UTC)


def tick(number: int, chance: random.Random) -> Tick:
    """One of few instants, so that order within an instant matters; prices near 60,000, where doubles lose digits."""
    event_time = START + timedelta(seconds=chance.choice([0, 1, 1, 1, 59.999999, 60, 61]))
    received_at = event_time + timedelta(seconds=chance.choice([-1.25, 0.5]))
    is_future = chance.random() < 0.1
    return Tick(
        event_id=f"s:y:0:{number}",
        source="s",
        symbol="y",
        asset=chance.choice(["a", "b"]),
        quote="USD",
        price_usd=Decimal(chance.randrange(5_999_900, 6_000_100)).scaleb(-2).quantize(Decimal("1e-12")),
        quantity=None
        if chance.random() < 0.2
        else Decimal(chance.randrange(10**9)).scaleb(-8).quantize(Decimal("1e-12")),
        trade_id=number if chance.random() < 0.8 else None,
        trade_epoch=chance.choice([0, 0, 1]),
        event_time=event_time,
        received_at=received_at,
        producer="p",
        sequence=number,
        kafka_partition=0,
        kafka_offset=number,
        is_future=is_future,
        event_date=event_time.date(),
    )


def frame(spark: SparkSession, ticks: Sequence[Tick]) -> DataFrame:
    columns = (
        "event_id STRING, source STRING, asset STRING, price_usd DECIMAL(28,12), quantity DECIMAL(28,12), "
        "trade_id BIGINT, trade_epoch BIGINT, event_time TIMESTAMP, received_at TIMESTAMP, producer STRING, "
        "sequence BIGINT, is_future BOOLEAN"
    )
    names = [column.split()[0] for column in columns.split(", ")]
    return spark.createDataFrame([tuple(getattr(tick, name) for name in names) for tick in ticks], columns)


def by_spark(spark: SparkSession, ticks: Sequence[Tick]) -> list[Bucket]:
    return [bucket_from(row) for row in bucket_summaries(frame(spark, ticks)).collect()]


def by_arrow(_: SparkSession, ticks: Sequence[Tick]) -> list[Bucket]:
    columns = {
        column.name: pa.array([getattr(tick, column.name) for tick in ticks], arrow_type(column.type))
        for column in SILVER_TICKS.columns
        if column.name != "is_late"
    }
    notionals = [None if t.quantity is None else exact_notional(t.price_usd, t.quantity) for t in ticks]
    rows = pa.table({**columns, "notional": pa.array(notionals, pa.decimal256(51, 18))})
    return [bucket for _, bucket in overview(rows, {})[0].buckets]


def by_number(parts: Sequence[Bucket]) -> dict[tuple[Pair, int], Bucket]:
    """Those of the same five seconds as one: Arrow tells symbols and epochs apart."""
    whole: dict[tuple[Pair, int], Bucket] = {}
    for part in parts:
        key = (part.pair, part.number)
        if known := whole.get(key):
            part = Bucket(*key, known.summary.merged(part.summary), newer(known.newest, part.newest))
        whole[key] = part
    return whole


def exact_notional(price: Decimal, size: Decimal) -> Decimal:
    with localcontext() as context:
        context.prec = 80
        return (price * size).quantize(Decimal("1e-18"), ROUND_HALF_UP)


def test_arrow_and_spark_find_the_same_in_a_bucket(spark: SparkSession) -> None:
    """Its newest tick too, among ticks of the same instant."""
    chance = random.Random(3)
    for count in (1, 2, 40, 300):
        ticks = [tick(number, chance) for number in range(count)]
        found = [by_number(way(spark, ticks)) for way in (by_spark, by_arrow)]
        assert found[0].keys() == found[1].keys()
        for key, one in found[0].items():
            other = found[1][key]
            assert one.newest == other.newest
            assert one.summary.price_m2 == pytest.approx(other.summary.price_m2, rel=1e-9, abs=1e-9)
            # The merge needs a price_m2 of the same binary digits no more than the tables do.
            assert replace(one.summary, price_m2=0.0) == replace(other.summary, price_m2=0.0)


@pytest.mark.parametrize("way", [by_spark, by_arrow])
@pytest.mark.parametrize("seed", [1, 2])
def test_merged_summaries_of_any_parts_are_the_summary_of_all(
    spark: SparkSession, seed: int, way: Callable[[SparkSession, Sequence[Tick]], list[Bucket]]
) -> None:
    chance = random.Random(seed)
    ticks = [tick(number, chance) for number in range(60)]
    chance.shuffle(ticks)
    parts = [ticks[:23], ticks[23:24], ticks[24:]]
    minutes: dict[WindowKey, list[Summary]] = defaultdict(list)
    for part in parts:
        for bucket in way(spark, part):
            minutes[*bucket.pair, bucket_start(bucket.number) // MINUTE * MINUTE].append(bucket.summary)
    found: dict[Hashable, dict[str, object]] = {}
    for (source, asset, micros), summaries in minutes.items():
        made = price_row(GOLD_PRICE_1M, (source, asset, micros), Window(merge(summaries), START))
        found[source, asset, to_time(micros)] = dict(zip(GOLD_PRICE_1M.column_names, made, strict=True))
    expected: dict[Hashable, Row] = {
        (row.source, row.asset, row.window_start): row for row in windows_of(ticks, timedelta(minutes=1))
    }
    assert differences(expected, found) == []


PRICES = ["0.000000000001", "1", "61685.99", "0.3333333333", "9999999999999999.999999999999", "123456789.987654321"]


def test_a_notional_is_exact_for_tiny_and_huge_prices(spark: SparkSession) -> None:
    """Every product of these, rounded once to 18 decimals; null from 10^20 on."""
    pairs = [(Decimal(price), Decimal(size)) for price in PRICES for size in PRICES]
    rows = spark.createDataFrame(pairs, "price DECIMAL(28,12), size DECIMAL(28,12)")
    found = rows.select(notional(F.col("price"), F.col("size")).alias("notional")).collect()
    for (price, size), row in zip(pairs, found, strict=True):
        exact = exact_notional(price, size)
        assert row["notional"] == (exact if exact < 10**20 else None), (price, size)
    messages = [{**TICK, "price_usd": f"{price:f}", "quantity": f"{size:f}"} for price, size in pairs]
    parsed = canonical(arrow([json.dumps(message, separators=(",", ":")).encode() for message in messages]), (), 5.0)
    by_offset = dict(zip(parsed.ticks["kafka_offset"].to_pylist(), parsed.ticks["notional"].to_pylist(), strict=True))
    for offset, row in enumerate(found):
        assert by_offset.get(offset) == row["notional"], pairs[offset]
    assert 0 < parsed.odd.num_rows < len(pairs)
