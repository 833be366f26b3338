"""Alerts: episodes in which an asset's price changes by more than a threshold within seconds.

`Episodes` is the rule itself, tick by tick; the stream, the batch jobs and `python -m alerting` share it. `stretches`
finds the buckets that need the rule. The highest and lowest price of the buckets in a tick's window bound the tick's
change. An episode can open only where this bound is above the threshold. In a bucket whose bound is below half the
threshold, the first tick ends any open episode.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Context, Decimal
from fractions import Fraction
from typing import NamedTuple

from lake.contract import Pair
from lake.rules import AlertRule
from lake.times import SECOND, Range, bucket_start, to_time

# Products of DECIMAL(28,12) are exact.
EXACT = Context(prec=100)
_minus, _times = EXACT.subtract, EXACT.multiply
_100, _200 = Decimal(100), Decimal(200)


class AlertTick(NamedTuple):
    """The fields of a tick that the rule needs; time: gold time in microseconds since 1970."""

    time: int
    price: Decimal
    event_id: str


@dataclass(frozen=True)
class Alert:
    """A row of gold.alerts, times in microseconds since 1970."""

    alert_id: str
    source: str
    asset: str
    direction: str
    opened_at: int
    reference_price: Decimal
    reference_time: int
    trigger_price: Decimal
    peak_change_pct: float
    closed_at: int | None = None

    @property
    def pair(self) -> Pair:
        return (self.source, self.asset)


class Episodes:
    """The alert rule for one pair; ticks must come in tick order."""

    def __init__(self, pair: Pair, rule: AlertRule, last_closed_at: int | None = None) -> None:
        self._pair = pair
        self._threshold_pct = rule.threshold_pct
        self._window = rule.window_seconds * SECOND
        self._cooldown = rule.cooldown_seconds * SECOND
        self.last_closed_at = last_closed_at
        # Monotonic queues of the window's ticks: the first of each is the window's lowest (highest) price.
        self._lows: deque[AlertTick] = deque()
        self._highs: deque[AlertTick] = deque()
        # Ticks at the newest instant. They do not count as before each other.
        self._newest: list[AlertTick] = []
        self.open: Alert | None = None
        # The open episode's largest change: a price difference, and the price that it refers to.
        self._peak = Decimal(0), Decimal(1)

    def add(self, tick: AlertTick) -> Alert | None:
        """The episode that this tick opens, changes or closes, if any."""
        self._advance(tick.time)
        self._newest.append(tick)
        if not self._lows:
            return self.close(tick.time) if self.open else None
        low, high = self._lows[0], self._highs[0]
        rise, fall = _minus(tick.price, low.price), _minus(high.price, tick.price)
        if _times(rise, high.price) >= _times(fall, low.price):
            change, against, reference, direction = rise, low.price, low, "up"
        else:
            change, against, reference, direction = fall, high.price, high, "down"
        # Compare products instead of quotients: exact and fast.
        threshold = _times(self._threshold_pct, against)
        if self.open:
            if _times(change, _200) < threshold:
                return self.close(tick.time)
            if _times(change, self._peak[1]) > _times(self._peak[0], against):
                self._peak = change, against
                self.open = replace(self.open, peak_change_pct=_percent(change, against))
                return self.open
        elif _times(change, _100) > threshold and not self._cooling(tick.time):
            self._peak = change, against
            source, asset = self._pair
            self.open = Alert(
                alert_id=f"{source}:{asset}:{direction}:{tick.event_id}",
                source=source,
                asset=asset,
                direction=direction,
                opened_at=tick.time,
                reference_price=reference.price,
                reference_time=reference.time,
                trigger_price=tick.price,
                peak_change_pct=_percent(change, against),
            )
            return self.open
        return None

    def close(self, time: int) -> Alert:
        """Close the open episode at a gold time, and return it."""
        assert self.open is not None
        closed = replace(self.open, closed_at=time)
        self.open, self.last_closed_at = None, time
        return closed

    def _cooling(self, time: int) -> bool:
        return self.last_closed_at is not None and time - self.last_closed_at < self._cooldown

    def _advance(self, time: int) -> None:
        """Move the window's end to a gold time: ticks at that time are not in it yet."""
        if self._newest and self._newest[0].time < time:
            for tick in self._newest:
                while self._lows and self._lows[-1].price > tick.price:
                    self._lows.pop()
                self._lows.append(tick)
                while self._highs and self._highs[-1].price < tick.price:
                    self._highs.pop()
                self._highs.append(tick)
            self._newest.clear()
        for extremes in (self._lows, self._highs):
            while extremes and extremes[0].time < time - self._window:
                extremes.popleft()


def _percent(change: Decimal, against: Decimal) -> float:
    return float(100 * Fraction(change) / Fraction(against))


class Extremes(NamedTuple):
    """A bucket's highest and lowest price, and the gold time of its first tick."""

    high: Decimal
    low: Decimal
    first_time: int


class Stretch(NamedTuple):
    """A pair's consecutive buckets in which an episode can be open; `then`: the next bucket, if known."""

    buckets: Sequence[int]
    can_open: bool
    then: int | None


def bound(buckets: Mapping[int, Extremes], bucket: int, rule: AlertRule) -> Fraction:
    """The largest possible change of a tick in the bucket: highest / lowest - 1 over the buckets of its window."""
    within = [buckets[near] for near in range(bucket - rule.reach, bucket + 1) if near in buckets]
    return Fraction(max(part.high for part in within)) / Fraction(min(part.low for part in within)) - 1


def stretches(buckets: Mapping[int, Extremes], numbers: Sequence[int], rule: AlertRule) -> Iterator[Stretch]:
    """A pair's stretches. numbers: sorted numbers of its buckets, from one on before which no episode is open."""
    run: list[int] = []
    can_open = False
    for number in numbers:
        most = bound(buckets, number, rule)
        if most >= rule.threshold / 2:
            run.append(number)
            can_open = can_open or most > rule.threshold
        elif run:
            yield Stretch(run, can_open, number)
            run, can_open = [], False
    if run:
        yield Stretch(run, can_open, None)


def episodes(
    pair: Pair,
    buckets: Mapping[int, Extremes],
    numbers: Sequence[int],
    last_closed_at: int | None,
    ticks: Callable[[Pair, Sequence[Range]], Sequence[AlertTick]],
    rule: AlertRule,
) -> Iterator[tuple[Stretch, int | None, list[Alert]]]:
    """Yield each stretch that can open an episode, the last closing time before it, and its alerts.

    numbers: as in `stretches`. ticks: returns a pair's ticks in some ranges of gold time, in tick order; called once at
    most, and only if an episode may open.
    """
    openable = [stretch for stretch in stretches(buckets, numbers, rule) if stretch.can_open]
    ranges = [
        (bucket_start(s.buckets[0]) - rule.window_seconds * SECOND, bucket_start(s.buckets[-1] + 1)) for s in openable
    ]
    within = ticks(pair, ranges) if openable else ()
    for stretch, (begin, end) in zip(openable, ranges, strict=True):
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


def alert_row(alert: Alert, rule: AlertRule, at: datetime) -> tuple[object, ...]:
    """A row of gold.alerts, in the order of its columns."""
    return (
        *(alert.alert_id, alert.source, alert.asset, alert.direction, float(rule.threshold_pct), rule.window_seconds),
        *(to_time(alert.opened_at), alert.reference_price, to_time(alert.reference_time), alert.trigger_price),
        *(alert.peak_change_pct, None if alert.closed_at is None else to_time(alert.closed_at), at),
    )
