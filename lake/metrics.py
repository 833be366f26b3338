"""What gold's rows hold, given summaries of buckets: pure functions that the stream and the batch jobs share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from pyspark.sql import Row

from lake.alerts import Alert, AlertTick, Episodes, Rule, Stretch, stretches
from lake.summaries import (
    BUCKET_SECONDS,
    Newness,
    Order,
    Pair,
    Summary,
    as_price,
    bucket_of,
    bucket_start,
    merge,
    rank,
    summary_of,
    to_time,
)
from lake.tables import Table

MINUTE = 60_000_000
ROLLED = 60 // BUCKET_SECONDS
"""Buckets of gold.rolling_price's minute."""
OLDEST_COMPARED = 2 * MINUTE
"""gold.current_price compares with no older price."""

Range = tuple[int, int]
"""Gold times from one to before another, in microseconds since 1970."""
WindowKey = tuple[str, str, int]
"""source, asset, and a time in microseconds since 1970"""


@dataclass(frozen=True)
class GoldRules:
    """The settings that decide what gold's tables hold."""

    symbols: Mapping[str, str] = field(default_factory=dict)
    future_tolerance_seconds: float = 5.0
    volatility_seconds: int = 60
    alerts: Rule = field(default_factory=Rule)

    @property
    def volatility_buckets(self) -> int:
        return self.volatility_seconds // BUCKET_SECONDS


class Newest(NamedTuple):
    """The newest tick of some; `time` is its gold time."""

    newness: Newness
    price: Decimal
    time: int


def newer(one: Newest | None, other: Newest) -> Newest:
    """The newer of two, of which the first may be none."""
    return one if one is not None and rank(one.newness) > rank(other.newness) else other


class Window(NamedTuple):
    """What a row of gold.price_1m and its like is made of."""

    summary: Summary
    updated_at: datetime


class Bucket(NamedTuple):
    """A row of `lake.summaries.bucket_summaries`."""

    pair: Pair
    number: int
    summary: Summary
    newest: Newest

    @property
    def minute(self) -> int:
        """The second since 1970 at which its minute begins."""
        return self.number * BUCKET_SECONDS // 60 * 60


def bucket_from(row: Row) -> Bucket:
    told = row["newest"]
    newest = Newest(tuple(told[:7]), told["price_usd"], told["gold_time"])
    return Bucket((row["source"], row["asset"]), row["bucket"], summary_of(row["summary"]), newest)


def price_row(table: Table, key: WindowKey, window: Window) -> tuple[object, ...]:
    """A row of gold.price_1m or one of its like."""
    assert table.window is not None
    source, asset, micros = key
    summary, start = window.summary, to_time(micros)
    return (
        *(source, asset, start, start + table.window),
        *(summary.open, summary.high, summary.low, summary.close, summary.average, summary.volatility_pct),
        *(as_price(summary.volume), as_price(summary.vwap), summary.tick_count),
        *(to_time(summary.first_time), to_time(summary.last_time), window.updated_at, start.date()),
        *(summary.price_sum, summary.price_m2, summary.notional),
        *(_stored(summary.open_order), _stored(summary.close_order)),
    )


def _stored(order: Order) -> tuple[object, ...]:
    return (to_time(order[0]), *order[1:])


def rolling_row(
    pair: Pair, as_of: int, buckets: Mapping[int, Summary], rules: GoldRules, at: datetime
) -> tuple[object, ...] | None:
    """The row of gold.rolling_price at as_of (the bucket that begins then); None if its minute has no tick."""
    minute = [buckets[number] for number in range(as_of - ROLLED, as_of) if number in buckets]
    if not minute:
        return None
    whole = merge(minute)
    volatile = [buckets[number] for number in range(as_of - rules.volatility_buckets, as_of) if number in buckets]
    volatility = merge(volatile).volatility_pct if volatile else None
    return (
        *(*pair, to_time(bucket_start(as_of)), whole.average, volatility),
        *(whole.low, whole.high, whole.tick_count, at),
    )


def alert_row(alert: Alert, rule: Rule, at: datetime) -> tuple[object, ...]:
    return (
        *(alert.alert_id, alert.source, alert.asset, alert.direction, float(rule.threshold_pct), rule.window_seconds),
        *(to_time(alert.opened_at), alert.reference_price, to_time(alert.reference_time), alert.trigger_price),
        *(alert.peak_change_pct, None if alert.closed_at is None else to_time(alert.closed_at), at),
    )


def current_row(asset: str, newest: Newest, change_pct: float | None, at: datetime) -> tuple[object, ...]:
    known_at, event_time, source, *_, event_id = newest.newness
    order = (to_time(known_at), to_time(event_time), *newest.newness[2:])
    return (asset, newest.price, source, to_time(event_time), event_id, change_pct, at, order)


def change_pct(price: Decimal, before: Decimal) -> float:
    return float(100 * (Fraction(price) / Fraction(before) - 1))


def episodes(
    pair: Pair,
    buckets: Mapping[int, Summary],
    numbers: Sequence[int],
    last_closed_at: int | None,
    ticks: Callable[[Pair, Sequence[Range]], Sequence[AlertTick]],
    rule: Rule,
) -> Iterator[tuple[Stretch, int | None, list[Alert]]]:
    """Each stretch of a pair's buckets that can open an episode, when the last one before was closed, and its alerts.

    numbers: sorted, from a bucket on that no stretch crosses. ticks: of a pair, whose gold times lie in one of the
    ranges, in tick order; asked for once, and only where an episode may open.
    """
    found = [stretch for stretch in stretches(buckets, numbers, rule) if stretch.can_open]
    ranges = [
        (bucket_start(s.buckets[0]) - rule.window_seconds * 1_000_000, bucket_start(s.buckets[-1] + 1)) for s in found
    ]
    within = ticks(pair, ranges) if found else ()
    for stretch, (begin, end) in zip(found, ranges, strict=True):
        watch = Episodes(pair, rule, last_closed_at)
        alerts: dict[str, Alert] = {}
        first = bisect_left(within, begin, key=lambda tick: tick.time)
        last = bisect_left(within, end, key=lambda tick: tick.time)
        for tick in within[first:last]:
            if changed := watch.add(tick):
                alerts[changed.alert_id] = changed
        if watch.open and stretch.then is not None:
            closed = watch.close(buckets[stretch.then].first_time)
            alerts[closed.alert_id] = closed
        yield stretch, last_closed_at, list(alerts.values())
        last_closed_at = watch.last_closed_at


def bucket_before(time: int, buckets: Mapping[int, Summary]) -> int | None:
    """The last bucket, of the minute up to then, that has a tick at a time or before."""
    near = range(bucket_of(time), bucket_of(time - MINUTE) - 1, -1)
    return next((number for number in near if number in buckets and buckets[number].first_time <= time), None)


def minute_before(
    newest: int, pair: Pair, buckets: Mapping[int, Summary], ticks: Callable[[Pair, int], Sequence[AlertTick]]
) -> Decimal | None:
    """A pair's last price a minute before a gold time, or earlier; None if there is none of the minute before that.

    ticks: all of a bucket, in tick order; asked for only where a bucket's last tick is too late.
    """
    time = newest - MINUTE
    number = bucket_before(time, buckets)
    if number is None:
        return None
    at, price = buckets[number].last_time, buckets[number].close
    if at > time:
        within = ticks(pair, number)
        at, price, _ = within[bisect_left(within, time + 1, key=lambda tick: tick.time) - 1]
    return price if at >= time - MINUTE else None
