"""What the gold tables must hold, computed from distinct ticks in any order with plain Python, decimals and fractions.

The second half of tests/oracle.py, which makes the ticks. A window is a slice of the ticks in tick order, so that there
is nothing to merge and nothing to correct. Not computed: updated_at, and what tables carry for merging.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.oracle import Tick

DIGITS_AFTER_POINT = 12
NOTIONAL_DIGITS = 18
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
ROLLING_STEP = timedelta(seconds=5)
OLDEST_COMPARED = timedelta(seconds=120)


@dataclass(frozen=True)
class PriceWindow:
    """A row of gold.price_1m, price_5m, price_1h or price_1d."""

    source: str
    asset: str
    window_start: datetime
    window_end: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    average: Decimal
    volatility_pct: float | None
    volume: Decimal | None
    vwap: Decimal | None
    tick_count: int
    first_event_time: datetime
    last_event_time: datetime
    window_date: date


@dataclass(frozen=True)
class RollingPrice:
    """A row of gold.rolling_price."""

    source: str
    asset: str
    as_of: datetime
    average_1m: Decimal
    volatility_pct: float | None
    low: Decimal
    high: Decimal
    tick_count: int


@dataclass(frozen=True)
class CurrentPrice:
    """A row of gold.current_price."""

    asset: str
    price_usd: Decimal
    source: str
    event_time: datetime
    event_id: str
    change_pct_1m: float | None


@dataclass(frozen=True)
class Alert:
    """A row of gold.alerts."""

    alert_id: str
    source: str
    asset: str
    direction: str
    threshold_pct: float
    window_seconds: int
    opened_at: datetime
    reference_price: Decimal
    reference_time: datetime
    trigger_price: Decimal
    peak_change_pct: float
    closed_at: datetime | None


@dataclass(frozen=True)
class Mover:
    """A row of gold.top_movers."""

    window_start: datetime
    rank: int
    source: str
    asset: str
    change_pct: float


GoldRow = PriceWindow | RollingPrice | CurrentPrice | Alert | Mover


def windows_of(ticks: Iterable[Tick], length: timedelta) -> Iterator[PriceWindow]:
    """gold.price_1m, and its like with windows of another length."""
    for (source, asset), ordered in instruments(ticks).items():
        by_start: defaultdict[datetime, list[Tick]] = defaultdict(list)
        for tick in ordered:
            by_start[EPOCH + (tick.gold_time - EPOCH) // length * length].append(tick)
        for start, members in by_start.items():
            prices = [units(tick.price_usd) for tick in members]
            sized = [(Fraction(t.price_usd), Fraction(t.quantity)) for t in members if t.quantity is not None]
            notional = sum(Fraction(half_up(price * size, NOTIONAL_DIGITS)) for price, size in sized)
            volume = sum((size for _, size in sized), Fraction(0))
            yield PriceWindow(
                source=source,
                asset=asset,
                window_start=start,
                window_end=start + length,
                open=members[0].price_usd,
                high=price_of(max(prices)),
                low=price_of(min(prices)),
                close=members[-1].price_usd,
                average=price_of(Fraction(sum(prices), len(prices))),
                volatility_pct=volatility_pct(prices),
                volume=half_up(volume) if sized else None,
                vwap=half_up(notional / volume) if volume else None,
                tick_count=len(members),
                first_event_time=members[0].gold_time,
                last_event_time=members[-1].gold_time,
                window_date=start.date(),
            )


def rolling_prices_of(ticks: Iterable[Tick], volatility: timedelta = MINUTE) -> Iterator[RollingPrice]:
    """gold.rolling_price; `volatility` is the length of the window that volatility_pct looks back on."""
    for (source, asset), ordered in instruments(ticks).items():
        times = [tick.gold_time for tick in ordered]
        prices = [units(tick.price_usd) for tick in ordered]

        # The first look at a tick is at the first step after it, the last one a minute after it at most.
        first_looks = {EPOCH + ((time - EPOCH) // ROLLING_STEP + 1) * ROLLING_STEP for time in times}
        looks = {first + step * ROLLING_STEP for first in first_looks for step in range(MINUTE // ROLLING_STEP)}
        for as_of in sorted(look for look in looks if look <= times[-1]):
            end = bisect_left(times, as_of)
            minute = prices[bisect_left(times, as_of - MINUTE) : end]
            yield RollingPrice(
                source=source,
                asset=asset,
                as_of=as_of,
                average_1m=price_of(Fraction(sum(minute), len(minute))),
                volatility_pct=volatility_pct(prices[bisect_left(times, as_of - volatility) : end]),
                low=price_of(min(minute)),
                high=price_of(max(minute)),
                tick_count=len(minute),
            )


def current_prices_of(ticks: Iterable[Tick]) -> Iterator[CurrentPrice]:
    """gold.current_price."""
    by_instrument = instruments(ticks)
    by_asset: defaultdict[str, list[Tick]] = defaultdict(list)
    for (_, asset), ordered in by_instrument.items():
        by_asset[asset].extend(ordered)
    for asset, members in by_asset.items():
        newest = max(members, key=_newness)
        before = [t for t in by_instrument[newest.source, asset] if t.gold_time <= newest.gold_time - MINUTE]
        change = None
        if before and newest.gold_time - before[-1].gold_time <= OLDEST_COMPARED:
            change = float(100 * (Fraction(newest.price_usd) / Fraction(before[-1].price_usd) - 1))
        yield CurrentPrice(asset, newest.price_usd, newest.source, newest.event_time, newest.event_id, change)


def alerts_of(
    ticks: Iterable[Tick],
    *,
    threshold_pct: float = 2.0,
    window: timedelta = timedelta(seconds=10),
    cooldown: timedelta = timedelta(seconds=60),
) -> Iterator[Alert]:
    """gold.alerts. A threshold is the decimal that it is written as: 0.1 is a tenth."""
    threshold = Fraction(str(threshold_pct)) / 100
    for (source, asset), ordered in instruments(ticks).items():
        episode: Alert | None = None
        peak = Fraction(0)
        closed_at: datetime | None = None
        lows = lowest_before(ordered, window, lambda tick: tick.price_usd)
        highs = lowest_before(ordered, window, lambda tick: tick.price_usd.copy_negate())
        for tick, low, high in zip(ordered, lows, highs, strict=True):
            now, change, direction, reference = tick.gold_time, Fraction(0), "", None
            if low and high:
                up = Fraction(tick.price_usd) / Fraction(low.price_usd) - 1
                down = 1 - Fraction(tick.price_usd) / Fraction(high.price_usd)
                change, direction, reference = (up, "up", low) if up >= down else (down, "down", high)
            if episode and (reference is None or change < threshold / 2):
                yield replace(episode, peak_change_pct=float(100 * peak), closed_at=now)
                episode, closed_at = None, now
            elif episode:
                peak = max(peak, change)
            elif reference and change > threshold and (closed_at is None or now - closed_at >= cooldown):
                peak = change
                episode = Alert(
                    alert_id=f"{source}:{asset}:{direction}:{tick.event_id}",
                    source=source,
                    asset=asset,
                    direction=direction,
                    threshold_pct=threshold_pct,
                    window_seconds=window // timedelta(seconds=1),
                    opened_at=now,
                    reference_price=reference.price_usd,
                    reference_time=reference.gold_time,
                    trigger_price=tick.price_usd,
                    peak_change_pct=float(100 * peak),
                    closed_at=None,
                )
        if episode:
            yield replace(episode, peak_change_pct=float(100 * peak))


def top_movers_of(minutes: Iterable[PriceWindow]) -> Iterator[Mover]:
    """gold.top_movers of the rows of gold.price_1m."""
    by_minute: defaultdict[datetime, list[tuple[Fraction, PriceWindow]]] = defaultdict(list)
    for row in minutes:
        by_minute[row.window_start].append((100 * (Fraction(row.close) / Fraction(row.open) - 1), row))
    for start, changes in by_minute.items():
        changes.sort(key=lambda pair: (-abs(pair[0]), pair[1].source, pair[1].asset))
        for rank, (change, row) in enumerate(changes, start=1):
            yield Mover(start, rank, row.source, row.asset, float(change))


def lowest_before(ordered: Sequence[Tick], window: timedelta, value: Callable[[Tick], Decimal]) -> list[Tick | None]:
    """Of each tick at t the tick with the lowest value in [t - window, t), the first of equals; None if it is empty."""
    found: list[Tick | None] = []
    candidates: deque[Tick] = deque()  # each has a lower value than, or the same as, all that joined after it
    joined = 0
    for tick in ordered:
        while ordered[joined].gold_time < tick.gold_time:
            while candidates and value(candidates[-1]) > value(ordered[joined]):
                candidates.pop()
            candidates.append(ordered[joined])
            joined += 1
        while candidates and tick.gold_time - candidates[0].gold_time > window:
            candidates.popleft()
        found.append(candidates[0] if candidates else None)
    return found


def instruments(ticks: Iterable[Tick]) -> dict[tuple[str, str], list[Tick]]:
    """The ticks of each source and asset, in tick order."""
    found: defaultdict[tuple[str, str], list[Tick]] = defaultdict(list)
    for tick in ticks:
        found[tick.source, tick.asset].append(tick)
    for members in found.values():
        members.sort(key=lambda t: _order(t.gold_time, t.trade_epoch, t.trade_id, t.producer, t.sequence, t.event_id))
    return found


def volatility_pct(prices: Sequence[int]) -> float | None:
    """100 * sample standard deviation / mean, exact up to the last square root; None below two prices. In any unit."""
    count, total, squares = len(prices), sum(prices), sum(price * price for price in prices)
    if count < 2:
        return None
    return 100 * math.sqrt(Fraction(count * (count * squares - total * total), (count - 1) * total * total))


def units(price: Decimal) -> int:
    """A price in its smallest unit."""
    return int(Fraction(price) * 10**DIGITS_AFTER_POINT)


def price_of(number: Fraction | int) -> Decimal:
    """The price of so many of the smallest units, half up."""
    return half_up(Fraction(number) / 10**DIGITS_AFTER_POINT)


def half_up(number: Fraction, digits: int = DIGITS_AFTER_POINT) -> Decimal:
    """A number from 0 up, rounded half up to so many digits after the point."""
    scaled = math.floor(number * 10**digits + Fraction(1, 2))
    return Decimal((0, tuple(int(digit) for digit in str(scaled)), -digits))


def _newness(t: Tick) -> tuple[tuple[bool, datetime | int | str], ...]:
    known_at = min(t.event_time, t.received_at)
    return _order(known_at, t.event_time, t.source, t.trade_id, t.producer, t.sequence, t.event_id)


def _order(*parts: datetime | int | str | None) -> tuple[tuple[bool, datetime | int | str], ...]:
    """A sort key in which None comes first."""
    return tuple((part is not None, 0 if part is None else part) for part in parts)
