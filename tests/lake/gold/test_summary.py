"""Summaries: promise 3, gold is what all ticks together give, however they were cut, in whatever order they merge."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Hashable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lake.contract import TickRules
from lake.delta.parquet import as_stored
from lake.gold.derive import price_rows, summaries_of, windows
from lake.gold.summary import COLUMNS, PAIR, merged, of_ticks, sums
from lake.silver.read import read
from lake.silver.stage import columns
from lake.tables import GOLD_PRICE_1M, GOLD_PRICE_5S, Table
from lake.times import BUCKET, MINUTE
from tests.oracle import Record, Row, Tick, differences, lake_of
from tests.oracle_gold import half_up, units, windows_of
from tests.ticks import TICK, arrow_records, compact

START = datetime(2024, 8, 9, tzinfo=UTC)
RULES = TickRules("rejects", "gaps", 5.0)
KEY = (*PAIR, "start")


def record(number: int, **fields: object) -> Record:
    return Record("ticks", 0, number, None, compact({**TICK, "source": "s", "asset": "a", "symbol": "y", **fields}))


def random_record(number: int, chance: random.Random) -> Record:
    """One of few instants, so that order within an instant matters; prices near 60,000, where doubles lose digits."""
    event_time = START + timedelta(seconds=chance.choice([0, 1, 1, 1, 59.999999, 60, 61]))
    received_at = event_time + timedelta(seconds=chance.choice([-1.25, 0.5, -6]))
    return record(
        number,
        asset=chance.choice(["a", "b"]),
        symbol=chance.choice(["y", "z"]),
        price_usd=f"{chance.randrange(5_999_900, 6_000_100) / 100:.2f}",
        quantity=None if chance.random() < 0.2 else f"{chance.randrange(10**9) / 10**8:.8f}",
        trade_id=number if chance.random() < 0.8 else None,
        trade_epoch=chance.choice([0, 0, 1]),
        event_time=event_time.isoformat(),
        timestamp=received_at.isoformat(),
        producer=chance.choice([None, "p", "q"]),
        sequence=number if chance.random() < 0.9 else None,
    )


def summarized(records: Sequence[Record]) -> pl.DataFrame:
    """As a task does it: of each symbol apart."""
    return of_ticks(columns(read(arrow_records(records), RULES).ticks), "source", "symbol", "asset")


def price_table(table: Table, summaries: pl.DataFrame) -> dict[Hashable, dict[str, object]]:
    """The table's rows by their key, as they are stored."""
    rows = as_stored(table, price_rows(table, summaries, START).to_arrow()).to_pylist()
    return {(row["source"], row["asset"], row["window_start"]): row for row in rows}


def expected(records: Sequence[Record], length: timedelta) -> dict[Hashable, Row]:
    ticks = lake_of(records).silver.values()
    return {(row.source, row.asset, row.window_start): row for row in windows_of(ticks, length)}


def newest_of(ticks: Sequence[Tick]) -> Tick:
    """By lake.contract.CURRENT_ORDER, nulls first."""

    def order(tick: Tick) -> tuple[tuple[bool, object], ...]:
        known_at = min(tick.event_time, tick.received_at)
        of = (known_at, tick.event_time, tick.source, tick.trade_id, tick.producer, tick.sequence, tick.event_id)
        return tuple((part is not None, part if part is not None else 0) for part in of)

    return max(ticks, key=order)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 60), st.lists(st.integers(0, 60), max_size=5), st.booleans())
def test_merged_summaries_of_any_parts_are_the_summary_of_all(
    seed: int, count: int, cuts: list[int], through_the_table: bool
) -> None:
    """In any order, in any groups, and also where some have been stored and read again; ties in an instant too."""
    chance = random.Random(seed)
    records = [random_record(number, chance) for number in range(count)]
    distinct = {tick.kafka_offset for tick in lake_of(records).silver.values()}
    records = [record for record in records if record.offset in distinct]
    shuffled = chance.sample(records, len(records))
    ends = sorted({0, len(records), *(cut for cut in cuts if cut < len(records))})
    parts = [summarized(shuffled[begin:end]).select(*KEY, *COLUMNS) for begin, end in itertools.pairwise(ends)]
    while len(parts) > 1:
        some = chance.sample(range(len(parts)), min(len(parts), chance.choice([2, 2, 3])))
        whole = merged(pl.concat([parts[n] for n in some]), *KEY)
        if through_the_table:
            whole = summaries_of(price_rows(GOLD_PRICE_5S, whole, START)).select(*KEY, *COLUMNS)
        parts = [*(part for n, part in enumerate(parts) if n not in some), whole]
    five = merged(parts[0], *KEY)
    assert differences(expected(records, timedelta(seconds=5)), price_table(GOLD_PRICE_5S, five)) == []
    assert differences(expected(records, timedelta(minutes=1)), price_table(GOLD_PRICE_1M, windows(five, MINUTE))) == []
    assert (
        sums(parts[0], *KEY)
        .sort(KEY)
        .drop("price_m2")
        .equals(five.sort(KEY).select(*KEY, "tick_count", "price_sum", "high", "low", "volume_sum", "notional"))
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_newest_tick_over_all_venues_goes_along(seed: int) -> None:
    """Among ticks of the same instant too."""
    chance = random.Random(seed)
    records = [random_record(number, chance) for number in range(40)]
    ticks = list(lake_of(records).silver.values())
    distinct = {tick.kafka_offset for tick in ticks}
    rows = merged(summarized([record for record in records if record.offset in distinct]), "asset")
    for asset, price, time, event_id in rows.select("asset", "newest", "newest_time", "newest_event_id").rows():
        newest = newest_of([tick for tick in ticks if tick.asset == asset])
        assert (price, event_id) == (newest.price_usd, newest.event_id)
        assert START + timedelta(microseconds=time) - timedelta(seconds=START.timestamp()) == newest.gold_time


def test_no_ticks_have_no_summary() -> None:
    nothing = summarized([])
    assert nothing.is_empty()
    assert merged(nothing, *KEY).is_empty()
    assert price_table(GOLD_PRICE_5S, merged(nothing, *KEY)) == {}


# Numbers

PRICES = ["0.000000000001", "1", "61685.99", "0.3333333333", "9999999999999999.999999999999", "123456789.987654321"]


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("size", [*PRICES, "0"])
def test_tiny_and_huge_prices_are_exact(price: str, size: str) -> None:
    """Where their product has room; a record whose product has none is in quarantine."""
    records = [record(n, price_usd=price, quantity=size, trade_id=n, event_time=START.isoformat()) for n in range(3)]
    lake = lake_of(records)
    rows = summarized(records)
    if Fraction(price) * Fraction(size) >= 10**20 - Fraction(1, 2 * 10**18):
        assert (lake.silver, rows.height) == ({}, 0)
        return
    [row] = rows.select("notional", "volume_sum").to_dicts()
    product = half_up(Fraction(price) * Fraction(size), 18)
    total = 3 * Fraction(product)
    assert row["notional"] == (half_up(total, 18) if total < 10**20 else None)
    assert row["volume_sum"] == half_up(3 * Fraction(size))
    told = differences(expected(records, timedelta(seconds=5)), price_table(GOLD_PRICE_5S, merged(rows, *KEY)))
    # Null where the column has no room: DECIMAL(28,12), and DECIMAL(38,18) of the notional.
    too_large = [
        *(["volume"] if 3 * Fraction(size) >= 10**16 else []),
        *(["vwap"] if Fraction(size) and (total >= 10**20 or total / (3 * Fraction(size)) >= 10**16) else []),
    ]
    assert sorted(words.split(") ")[-1].split(":")[0] for words in told if words.endswith("found None")) == too_large
    assert len(told) == len(too_large)


def many(price: str, size: str, count: int, first: int = 0) -> list[Record]:
    """So many ticks of one bucket."""
    fields = {"price_usd": price, "quantity": size, "event_time": START.isoformat()}
    return [record(n, trade_id=n, **fields) for n in range(first, first + count)]


def test_a_notional_beyond_its_room_is_null_and_stays_null() -> None:
    """From 10^20 on, also far beyond what 128 bits hold, and whatever is merged with it later."""
    large, limit = ("9999999999.999999999", "9999999999"), Fraction(10) ** 20
    one = Fraction(large[0]) * Fraction(large[1])
    assert one < limit < 2 * one
    [fits] = merged(summarized(many(*large, 1)), *KEY)["notional"]
    assert Fraction(fits) == one
    for count in (2, 3, 4, 200):
        whole = merged(summarized(many(*large, count)), *KEY)
        assert whole["notional"].to_list() == [None], f"{count} ticks"
        assert whole["volume_sum"].to_list() == [half_up(count * Fraction(large[1]))]
    stored = summaries_of(price_rows(GOLD_PRICE_5S, whole, START)).select(*KEY, *COLUMNS)
    small = merged(summarized(many("1", "1", 1, first=900)), *KEY).select(*KEY, *COLUMNS)
    again = merged(pl.concat([stored, small]), *KEY)
    assert again["notional"].to_list() == [None]
    assert merged(pl.concat([small, again, again]), *KEY)["notional"].to_list() == [None]
    row = price_table(GOLD_PRICE_5S, again)["s", "a", START]
    assert (row["vwap"], row["volume"]) == (None, half_up(200 * Fraction(large[1]) + 1))


def test_the_last_notional_that_fits_is_kept() -> None:
    """10^20 less the last digit: of parts that come to it, and of one more unit that does not fit."""
    almost = many("9999999999.999999999999", "10000000000", 1)
    rest = many("0.01", "0.999999999999", 1, first=1)
    digit = many("0.000000000001", "0.000001", 1, first=2)
    ticks = [json.loads(record.value or b"") for record in (*almost, *rest)]
    total = sum(Fraction(tick["price_usd"]) * Fraction(tick["quantity"]) for tick in ticks)
    assert 10**20 - total == Fraction(1, 10**14)
    whole = merged(summarized([*almost, *rest]), *KEY)
    assert Fraction(whole["notional"][0]) == total
    up_to = pl.concat([whole.select(*KEY, *COLUMNS), *[_one(digit, 9_999)]])
    assert Fraction(merged(up_to, *KEY)["notional"][0]) == 10**20 - Fraction(1, 10**18)
    assert merged(pl.concat([up_to, _one(digit, 1)]), *KEY)["notional"].to_list() == [None]


def _one(records: Sequence[Record], times: int) -> pl.DataFrame:
    """The sum of so many such ticks, as a part."""
    part = summarized(records).select(*KEY, *COLUMNS)
    return merged(pl.concat([part] * times), *KEY)


def test_a_volume_beyond_its_room_is_null_and_its_sum_goes_on() -> None:
    """volume is DECIMAL(28,12); what is merged has ten digits more."""
    whole = merged(summarized(many("0.000001", "9999999999999999", 3)), *KEY)
    row = price_table(GOLD_PRICE_5S, whole)["s", "a", START]
    assert row["volume"] is None
    assert row["volume_sum"] == half_up(3 * Fraction(9999999999999999))
    assert row["vwap"] == half_up(Fraction("0.000001"))
    longer = price_table(GOLD_PRICE_1M, windows(whole, MINUTE))["s", "a", START]
    assert (longer["volume"], longer["volume_sum"], longer["vwap"]) == (None, row["volume_sum"], row["vwap"])


def test_averages_and_vwap_are_rounded_half_up() -> None:
    """Also where the next digits decide: 1/2 and 2/3 of the last one."""
    for prices, average in (
        (["0.000000000001", "0.000000000002"], "0.000000000002"),
        (["0.000000000001", "0.000000000001", "0.000000000002"], "0.000000000001"),
        (["9999999999999999.999999999999"] * 7, "9999999999999999.999999999999"),
    ):
        records = [
            record(n, price_usd=price, quantity="1", trade_id=n, event_time=START.isoformat())
            for n, price in enumerate(prices)
        ]
        assert half_up(Fraction(sum(units(Decimal(p)) for p in prices), len(prices) * 10**12)) == Decimal(average)
        row = price_table(GOLD_PRICE_5S, merged(summarized(records), *KEY))["s", "a", START]
        assert row["average"] == Decimal(average)
        assert row["vwap"] == Decimal(average)


def test_volatility_keeps_its_digits_at_large_prices() -> None:
    """A sum of squares would lose them."""
    records = [
        record(n, price_usd=f"61685.{n % 7:012d}", quantity=None, trade_id=n, event_time=START.isoformat())
        for n in range(500)
    ]
    parts = [summarized(records[n : n + 10]).select(*KEY, *COLUMNS) for n in range(0, 500, 10)]
    found = price_table(GOLD_PRICE_5S, merged(pl.concat(parts), *KEY))
    assert differences(expected(records, timedelta(seconds=5)), found) == []
    one = price_table(GOLD_PRICE_5S, merged(summarized(records[:1]), *KEY))["s", "a", START]
    assert one["volatility_pct"] is None


# Stored rows


def test_rows_of_a_lake_s_first_version_merge_by_their_volume() -> None:
    """They have no volume_sum."""
    rows = price_rows(GOLD_PRICE_5S, merged(summarized(many("2", "3", 4)), *KEY), START)
    old = rows.with_columns(volume_sum=pl.lit(None, rows.schema["volume_sum"]))
    whole = merged(pl.concat([summaries_of(old), summaries_of(rows)]).select(*KEY, *COLUMNS), *KEY)
    assert whole["volume_sum"].to_list() == [Decimal(24)]
    assert whole["notional"].to_list() == [Decimal(48)]


def test_buckets_begin_at_multiples_of_five_seconds() -> None:
    times = ["1970-01-01T00:00:00Z", "2024-08-09T00:00:04.999999Z", "2024-08-09T00:00:05Z"]
    rows = summarized([record(n, trade_id=n, event_time=time) for n, time in enumerate(times)])
    assert sorted(start // BUCKET * BUCKET == start for start in rows["start"]) == [True] * 3
    assert rows["start"].n_unique() == 3
