"""Prices by time window as mergeable summaries: what the stream folds into gold, and what a batch recomputes.

A summary of some ticks of a window holds count, sum, M2, volume, notional, highest, lowest, and the first and the last
by tick order. Two summaries of disjoint ticks merge into the summary of both, in any order, so a late tick is no
special case, and every longer window is a merge of shorter ones. Counts, sums and extremes are exact; M2 (the sum of
squared differences from the mean) is a double, merged by Chan, Golub and LeVeque's formula (1979), since a sum of
squares would lose eight digits at a price of 60,000.

Ticks are summarised into buckets of BUCKET_SECONDS where they are: by Arrow as they come (lake.overview), by Spark when
they are read back (`bucket_summaries`). From there on there are few rows, whatever the rate of ticks, and plain Python
merges them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from lake.tables import PRICE
from lake.ticks import gold_time, notional

BUCKET_SECONDS = 5

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Enough for every sum and product of DECIMAL(38) columns to be exact, and every quotient to be rounded once.
EXACT = Context(prec=100, rounding=ROUND_HALF_UP)
SMALLEST = Decimal("1e-12")
LARGEST = Decimal(10) ** 16

Pair = tuple[str, str]
"""source, asset"""
Order = tuple[int, int, int | None, str | None, int | None, str]
"""gold time in microseconds since 1970, trade_epoch, trade_id, producer, sequence, event_id: orders a pair's ticks."""
Newness = tuple[int, int, str, int | None, str | None, int | None, str]
"""known at and event time in microseconds since 1970, source, trade_id, producer, sequence, event_id."""


def rank(order: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key by which orders compare as in Spark: null before everything else."""
    return tuple((part is not None, part) for part in order)


@dataclass(frozen=True, slots=True)
class Summary:
    """Of some ticks of a source and asset; prices and quantities exact."""

    tick_count: int
    price_sum: Decimal
    price_m2: float
    high: Decimal
    low: Decimal
    open: Decimal
    open_order: Order
    close: Decimal
    close_order: Order
    volume: Decimal | None
    notional: Decimal | None

    @property
    def first_time(self) -> int:
        """Gold time of the first tick, in microseconds since 1970."""
        return self.open_order[0]

    @property
    def last_time(self) -> int:
        return self.close_order[0]

    @property
    def average(self) -> Decimal:
        """price_sum / tick_count, half up."""
        return rounded(EXACT.divide(self.price_sum, Decimal(self.tick_count)))

    @property
    def volatility_pct(self) -> float | None:
        """100 * sqrt(M2 / (n - 1)) / mean; None below two ticks."""
        if self.tick_count < 2:
            return None
        mean = float(self.price_sum) / self.tick_count
        return 100 * math.sqrt(max(self.price_m2, 0.0) / (self.tick_count - 1)) / mean

    @property
    def vwap(self) -> Decimal | None:
        """notional / volume, half up; None without volume."""
        if not self.volume or self.notional is None:
            return None
        return rounded(EXACT.divide(self.notional, self.volume))

    def merged(self, other: Summary) -> Summary:
        """The summary of both ones' ticks, of which they share none."""
        count = self.tick_count + other.tick_count
        distance = float(other.price_sum) / other.tick_count - float(self.price_sum) / self.tick_count
        first = self if rank(self.open_order) <= rank(other.open_order) else other
        last = self if rank(self.close_order) >= rank(other.close_order) else other
        return Summary(
            tick_count=count,
            price_sum=EXACT.add(self.price_sum, other.price_sum),
            price_m2=self.price_m2 + other.price_m2 + distance * distance * self.tick_count * other.tick_count / count,
            high=max(self.high, other.high),
            low=min(self.low, other.low),
            open=first.open,
            open_order=first.open_order,
            close=last.close,
            close_order=last.close_order,
            volume=_sum(self.volume, other.volume),
            notional=_sum(self.notional, other.notional),
        )


def merge(summaries: Iterable[Summary]) -> Summary:
    """The summary of at least one."""
    return reduce(Summary.merged, summaries)


def _sum(left: Decimal | None, right: Decimal | None) -> Decimal | None:
    if left is None or right is None:
        return right if left is None else left
    return EXACT.add(left, right)


def rounded(number: Decimal) -> Decimal:
    """Half up to 12 digits after the point."""
    return number.quantize(SMALLEST, context=EXACT)


def to_time(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


def to_micros(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1)


def bucket_of(micros: int) -> int:
    """The number of the bucket that a gold time lies in."""
    return micros // (BUCKET_SECONDS * 1_000_000)


def bucket_start(bucket: int) -> int:
    """Gold time at which a bucket begins, in microseconds since 1970."""
    return bucket * BUCKET_SECONDS * 1_000_000


def bucket_summaries(ticks: DataFrame) -> DataFrame:
    """A summary of each bucket of a source and asset, of rows of silver.ticks. Read by `summary_of`.

    Out: source, asset, bucket BIGINT, summary STRUCT, newest STRUCT: a Newness, price_usd and gold_time, of the newest
    tick.
    """
    time = F.unix_micros(gold_time())
    order = F.struct(time, "trade_epoch", "trade_id", "producer", "sequence", "event_id")
    event_time = F.unix_micros("event_time")
    newness = F.struct(
        F.least(event_time, F.unix_micros("received_at")).alias("known_at"),
        event_time.alias("event_time"),
        *("source", "trade_id", "producer", "sequence", "event_id", "price_usd"),
        time.alias("gold_time"),
    )
    price = F.col("price_usd")
    rows = ticks.select(
        *("source", "asset"),
        F.floor(time / (BUCKET_SECONDS * 1_000_000)).alias("bucket"),
        "price_usd",
        "quantity",
        notional(price, F.col("quantity")).alias("notional"),
        order.alias("order"),
        newness.alias("newness"),
    )
    return rows.groupBy("source", "asset", "bucket").agg(
        F.struct(
            F.count("*").alias("tick_count"),
            F.sum("price_usd").cast("DECIMAL(38,12)").alias("price_sum"),
            (F.var_pop(price.cast("double")) * F.count("*")).alias("price_m2"),
            F.max("price_usd").alias("high"),
            F.min("price_usd").alias("low"),
            F.min(F.struct("order", "price_usd")).alias("first"),
            F.max(F.struct("order", "price_usd")).alias("last"),
            F.try_sum("quantity").alias("volume"),
            F.try_sum("notional").alias("notional"),
        ).alias("summary"),
        F.max("newness").alias("newest"),
    )


def summary_of(row: Row) -> Summary:
    """The Summary in the column `summary` of `bucket_summaries`."""
    first, last = row["first"], row["last"]
    return Summary(
        *(row["tick_count"], row["price_sum"], row["price_m2"], row["high"], row["low"]),
        *(first["price_usd"], tuple(first["order"]), last["price_usd"], tuple(last["order"])),
        *(row["volume"], row["notional"]),
    )


def as_price(number: Decimal | None) -> Decimal | None:
    """As a DECIMAL(28,12), or None where that cannot hold it."""
    return None if number is None or number >= LARGEST else number


assert PRICE == "DECIMAL(28,12)"
