"""The gold tables, kept up to date from what each micro-batch adds to the buckets of silver's ticks.

A micro-batch arrives here as a few summaries, one per venue, asset and five seconds (lake.summaries), so the driver
does the rest in plain Python: fold them into the rows of gold.price_1m, and derive everything else from buckets near
the changed ones. What it needs of older times it reads back: rows from the tables, buckets and ticks from silver. So
memory holds the last minutes of each pair, however long the job runs, and a tick that is hours late costs one look
into silver.

Each table is written in a transaction of its own, and knows by the micro-batch in it whether a replay has it already.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial, reduce
from typing import Any, Generic, NamedTuple, TypeVar

from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from lake.alerts import Alert, AlertTick, bound
from lake.metrics import (
    MINUTE,
    OLDEST_COMPARED,
    ROLLED,
    Bucket,
    GoldRules,
    Newest,
    Range,
    Window,
    WindowKey,
    alert_row,
    bucket_from,
    change_pct,
    current_row,
    episodes,
    price_row,
    rolling_row,
)
from lake.sinks import Sink
from lake.summaries import (
    BUCKET_SECONDS,
    Pair,
    Summary,
    bucket_of,
    bucket_start,
    bucket_summaries,
    merge,
    rank,
    stored_order,
    to_time,
)
from lake.tables import (
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1M,
    GOLD_PRICES,
    GOLD_ROLLING_PRICE,
    SILVER_TICKS,
    Table,
)
from lake.ticks import feeds_gold, gold_time
from lake.writer import Changed, LakeWriter

logger = logging.getLogger(__name__)

# So many buckets of each pair stay in memory; a late tick before them is looked up in silver.
KEPT_BUCKETS = 900 // BUCKET_SECONDS
# A tick that is hours late needs to know what followed it; so much at first, all of it where that is not enough.
FOLLOWED_BUCKETS = 1800 // BUCKET_SECONDS

MICROSECOND = timedelta(microseconds=1)
Value = TypeVar("Value")


class Batch(NamedTuple):
    """A micro-batch: the query, its number, and when it began."""

    query: str
    number: int
    at: datetime


class Silver:
    """The ticks that feed gold, read back from rows of silver.ticks."""

    def __init__(self, load: Callable[[], DataFrame], rules: GoldRules) -> None:
        """load: the rows as they are then."""
        self._load, self._rules = load, rules

    @classmethod
    def of_lake(cls, spark: SparkSession, root: str, rules: GoldRules, version: int | None = None) -> Silver:
        """silver.ticks as of now, or as of a version."""

        def load() -> DataFrame:
            reader = spark.read.format("delta")
            if version is not None:
                reader = reader.option("versionAsOf", version)
            return reader.load(SILVER_TICKS.path(root))

        return cls(load, rules)

    def ticks(self, begin: int, end: int, pairs: Iterable[Pair] | None = None) -> DataFrame:
        """Rows by gold time, in microseconds since 1970 and without the end."""
        ticks = self._load().where(feeds_gold(self._rules.symbols))
        if begin > 0:
            # Not by gold_time(), of which the files have no statistics.
            first, last = F.timestamp_micros(F.lit(begin)), F.timestamp_micros(F.lit(end))
            by_venue = (F.col("event_time") >= first) & (F.col("event_time") < last)
            by_receipt = (F.col("received_at") >= first) & (F.col("received_at") < last)
            ticks = ticks.where((by_venue & ~F.col("is_future")) | (by_receipt & F.col("is_future")))
        if pairs is None:
            return ticks
        named = [F.struct(F.lit(source), F.lit(asset)) for source, asset in pairs]
        return ticks.where(F.struct("source", "asset").isin(*named))

    def summaries(self, begin: int, end: int, pairs: Iterable[Pair] | None = None) -> DataFrame:
        """The buckets of a time, as `bucket_summaries`."""
        return bucket_summaries(self.ticks(begin, end, pairs), "source", "asset")

    def buckets(self, begin: int, end: int, pairs: Iterable[Pair] | None = None) -> dict[Pair, dict[int, Summary]]:
        """The buckets from one number to before another."""
        found: dict[Pair, dict[int, Summary]] = defaultdict(dict)
        for row in self.summaries(bucket_start(begin), bucket_start(end), pairs).toLocalIterator():
            bucket = bucket_from(row)
            found[bucket.pair][bucket.number] = bucket.summary
        return found

    def alert_ticks(self, pairs: Sequence[Pair], ranges: Sequence[Range]) -> Iterator[tuple[Pair, AlertTick]]:
        """The ticks of pairs whose gold times lie in one of the ranges, in tick order."""
        time = F.unix_micros(gold_time())
        order = ("gold_time", "trade_epoch", "trade_id", "producer", "sequence", "event_id")
        whole = self.ticks(min(begin for begin, _ in ranges), max(end for _, end in ranges), pairs)
        within = reduce(Column.__or__, ((time >= begin) & (time < end) for begin, end in ranges))
        rows = whole.where(within).withColumn("gold_time", time).select("source", "asset", "price_usd", *order)
        for row in rows.orderBy(*order).toLocalIterator():
            yield (row["source"], row["asset"]), AlertTick(row["gold_time"], row["price_usd"], row["event_id"])

    def pair_ticks(self, pair: Pair, ranges: Sequence[Range]) -> list[AlertTick]:
        """One pair's; a few ranges at a time, so that the question stays small."""
        joined: list[Range] = []
        for begin, end in ranges:
            if joined and begin <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((begin, end))
        some = (joined[at : at + 50] for at in range(0, len(joined), 50))
        return [tick for part in some for _, tick in self.alert_ticks([pair], part)]

    def bucket_ticks(self, pair: Pair, number: int) -> list[AlertTick]:
        return self.pair_ticks(pair, [(bucket_start(number), bucket_start(number + 1))])


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


class Buckets:
    """The last buckets of each pair; older ones are looked up in silver, which must have all ticks that were added."""

    def __init__(self, silver: Silver, newest: Mapping[Pair, int]) -> None:
        """newest: of the pairs that silver has, the second since 1970 of their newest minute."""
        self._silver = silver
        self._by_pair: dict[Pair, dict[int, Summary]] = defaultdict(dict)
        # From this number on a pair's buckets are all here.
        self._floors: dict[Pair, int] = {}
        for pair, second in newest.items():
            self._floors[pair] = second // BUCKET_SECONDS - 2 * ROLLED - ROLLED
        if newest:
            kept = silver.buckets(min(self._floors.values()), 1 + max(newest.values()) // BUCKET_SECONDS + ROLLED)
            for pair, buckets in kept.items():
                floor = self._floors.setdefault(pair, 0)
                self._by_pair[pair] = {number: part for number, part in buckets.items() if number >= floor}

    def add(self, rows: Iterable[Bucket]) -> None:
        for pair, number, summary, _ in rows:
            if number >= self._floors.setdefault(pair, 0):
                known = self._by_pair[pair].get(number)
                self._by_pair[pair][number] = known.merged(summary) if known else summary

    def prune(self) -> None:
        """Forget what is older than a while before the newest of the pair."""
        for pair, buckets in self._by_pair.items():
            if len(buckets) > 2 * KEPT_BUCKETS:
                floor = max(buckets) - KEPT_BUCKETS
                self._by_pair[pair] = {number: part for number, part in buckets.items() if number >= floor}
                self._floors[pair] = floor

    def newest_time(self, pair: Pair) -> int:
        """Gold time of the pair's newest tick."""
        buckets = self._by_pair[pair]
        return buckets[max(buckets)].last_time

    def view(self, needs: Mapping[Pair, Range]) -> dict[Pair, Mapping[int, Summary]]:
        """Of each pair a mapping that has its buckets from one number to before another, and perhaps more."""
        views: dict[Pair, Mapping[int, Summary]] = {pair: self._by_pair[pair] for pair in needs}
        below = {pair: (first, last) for pair, (first, last) in needs.items() if first < self._floors[pair]}
        # Pairs that are asked for the same time go together, in one look into silver.
        for first, last in set(below.values()):
            pairs = [pair for pair, asked in below.items() if asked == (first, last)]
            found = self._silver.buckets(first, last, pairs)
            for pair in pairs:
                views[pair] = {**found.get(pair, {}), **self._by_pair[pair]}
        return views

    def floor(self, pair: Pair) -> int:
        return self._floors[pair]


class Rows(Generic[Value]):
    """A gold table: its rows of the spans in use, as values by key, on the driver."""

    def __init__(
        self,
        spark: SparkSession,
        writer: LakeWriter,
        table: Table,
        columns: Sequence[Column],
        parse: Callable[[Row], tuple[Any, Value]],
        time: Callable[[Any, Value], int],
        row: Callable[[Any, Value], tuple[object, ...]],
        sink: Sink | None = None,
        kept: int = 8,
    ) -> None:
        """columns, parse: how a stored row becomes key and value; row: the way back; time: what its span goes by."""
        self.table = table
        self._spark, self._writer = spark, writer
        self._columns, self._parse, self._time, self._row = columns, parse, time, row
        self._sink, self._kept = sink, kept
        self._spans: OrderedDict[int, dict[Any, Value]] = OrderedDict()

    def span(self, micros: int) -> int:
        """The number of the span of a time."""
        if self.table.file_span is None:
            return 0
        return micros // (self.table.file_span // MICROSECOND)

    def load(self, numbers: Iterable[int]) -> dict[int, dict[Any, Value]]:
        """The rows of these spans, and of those that share files with them."""
        wanted = set(numbers)
        if missing := wanted - self._spans.keys():
            spans, stored = self._writer.stored(self._spark, self.table, missing)
            wanted.update(spans)
            for number in spans:
                self._spans[number] = {}
            for row in stored.select(*self._columns).collect() if stored is not None else ():
                key, value = self._parse(row)
                self._spans[self.span(self._time(key, value))][key] = value
        for number in wanted:
            self._spans.move_to_end(number)
        return {number: self._spans[number] for number in wanted}

    def refresh(self) -> None:
        """Forget rows that maintenance may have changed since they were read."""
        if self._writer.was_changed(self.table):
            self._spans.clear()

    def written(self, batch: Batch) -> bool:
        return batch.number <= self._writer.batch(self.table)

    def update(
        self, batch: Batch, numbers: Iterable[int], change: Callable[[int, dict[Any, Value]], None], **metadata: Any
    ) -> None:
        """Change the rows of spans, each given to `change`, and commit them. Raises Fenced."""
        numbers = set(numbers)
        if not numbers or self.written(batch):
            return
        for _ in range(10):
            try:
                before = self.load(numbers)
                after = {number: dict(rows) for number, rows in before.items()}
                for number in numbers:
                    change(number, after[number])
                rows = {
                    number: [self._row(key, value) for key, value in span.items()] for number, span in after.items()
                }
                told = {"query": batch.query, "batch": batch.number, **metadata}
                self._writer.replace(self.table, rows, **told)
            except Changed as error:
                logger.info("%s: its rows are read again", error)
                self._spans.clear()
                continue
            self._spans.update(after)
            while len(self._spans) > max(self._kept, len(after)):
                self._spans.popitem(last=False)
            if self._sink:
                changed = [
                    self._row(key, value)
                    for number, span in after.items()
                    for key, value in span.items()
                    if before[number].get(key) != value
                ]
                self._sink.changed(self.table, rows, changed)
            return
        raise Changed(f"{self.table.qualified_name} is changed by somebody else again and again")


class Gold:
    """Gold's state between micro-batches."""

    def __init__(
        self,
        spark: SparkSession,
        root: str,
        writer: LakeWriter,
        rules: GoldRules,
        newest: Mapping[Pair, int],
        rollup_seconds: float = 10.0,
        sink: Sink | None = None,
    ) -> None:
        """newest: of each pair in silver, the second since 1970 of its newest minute."""
        self._spark, self._root, self._writer, self._rules = spark, root, writer, rules
        self._silver = Silver.of_lake(spark, root, rules)
        self._buckets = Buckets(self._silver, newest)
        self._prices = {
            table.name: Rows[Window](
                *(spark, writer, table, _window_columns(), _window),
                lambda key, _: key[2],
                partial(price_row, table),
                sink,
            )
            for table in GOLD_PRICES
        }
        rolling = Rows[tuple[object, ...]](
            *(spark, writer, GOLD_ROLLING_PRICE, _rolling_columns(), _rolling),
            lambda key, _: key[2],
            lambda _, row: row,
            sink,
        )
        self._rolling = rolling
        self._current = Rows[tuple[Newest, float | None, datetime]](
            *(
                spark,
                writer,
                GOLD_CURRENT_PRICE,
                _current_columns(),
                lambda row: _current(row, rules.future_tolerance_seconds),
            ),
            lambda *_: 0,
            lambda asset, value: current_row(asset, *value),
            sink,
        )
        self._alerts = Rows[tuple[Alert, datetime]](
            *(spark, writer, GOLD_ALERTS, _alert_columns(), _alert),
            lambda _, value: value[0].opened_at,
            lambda _, value: alert_row(value[0], rules.alerts, value[1]),
            sink,
        )
        # as_of up to which gold.rolling_price has been looked at, as a bucket's number.
        self._looked: dict[Pair, int] = {}
        # Prices within the bucket of a minute before the current price, by time; that bucket is nearly done with.
        self._bucket_ticks: OrderedDict[tuple[Pair, int], list[AlertTick]] = OrderedDict()
        self._rollup_seconds = rollup_seconds
        self._rolled_up_at: datetime | None = None
        # Minutes that gold.price_5m and the longer ones do not have yet.
        self._not_rolled_up = self._changed_since_roll_up()

    # --- one micro-batch

    def take(self, found: Sequence[Bucket], counted: bool) -> dict[Pair, list[int]]:
        """Add a micro-batch's buckets, unless silver had them when this began; the changed ones of each pair."""
        if not counted:
            self._buckets.add(found)
        self._buckets.prune()
        dirty: dict[Pair, list[int]] = defaultdict(list)
        for bucket in found:
            dirty[bucket.pair].append(bucket.number)
            self._bucket_ticks.pop((bucket.pair, bucket.number), None)
        return {pair: sorted(numbers) for pair, numbers in dirty.items()}

    def prices(self, found: Sequence[Bucket], batch: Batch) -> None:
        """Fold the buckets into gold.price_1m."""
        minutes: dict[WindowKey, list[Summary]] = defaultdict(list)
        for bucket in found:
            minutes[*bucket.pair, bucket_start(bucket.number) // MINUTE * MINUTE].append(bucket.summary)
        rows = self._prices[GOLD_PRICE_1M.name]

        def fold(number: int, span: dict[WindowKey, Window]) -> None:
            for key, parts in minutes.items():
                if rows.span(key[2]) == number:
                    known = [span[key].summary] if key in span else []
                    span[key] = Window(merge([*known, *parts]), batch.at)

        rows.update(batch, {rows.span(key[2]) for key in minutes}, fold)
        self._not_rolled_up |= minutes.keys()

    def roll_up(self, batch: Batch, *, at_once: bool = False) -> None:
        """Bring the longer windows up to date with gold.price_1m, unless that was done a moment ago.

        Called after everything else of a micro-batch is written: so all tables have the micro-batch that the longest
        window says.
        """
        if self._rolled_up_at is None:
            self._rolled_up_at = batch.at
        if not at_once and (batch.at - self._rolled_up_at).total_seconds() < self._rollup_seconds:
            return
        changed = self._not_rolled_up
        for rows in self._prices.values():
            rows.refresh()
        for finer, table in itertools.pairwise(GOLD_PRICES):
            length = _length(table)
            changed = {(source, asset, micros // length * length) for source, asset, micros in changed}
            self._roll_up(self._prices[finer.name], self._prices[table.name], changed, batch)
        self._not_rolled_up = set()
        self._rolled_up_at = batch.at

    @staticmethod
    def _roll_up(finer: Rows[Window], rows: Rows[Window], keys: set[WindowKey], batch: Batch) -> None:
        length, step = _length(rows.table), _length(finer.table)

        def change(number: int, span: dict[WindowKey, Window]) -> None:
            for source, asset, micros in keys:
                if rows.span(micros) == number:
                    starts = range(micros, micros + length, step)
                    parts = finer.load({finer.span(start) for start in starts})
                    known = [parts[finer.span(start)].get((source, asset, start)) for start in starts]
                    there = [window for window in known if window]
                    whole = merge(window.summary for window in there)
                    span[source, asset, micros] = Window(whole, max(window.updated_at for window in there))

        rows.update(batch, {rows.span(micros) for *_, micros in keys}, change, up_to=batch.at.isoformat())

    def rolling(self, dirty: Mapping[Pair, Sequence[int]], batch: Batch, silver_written: Callable[[], None]) -> None:
        """gold.rolling_price of every look at changed buckets, and of those that time has come to."""
        reach = max(ROLLED, self._rules.volatility_buckets)
        looks: dict[Pair, list[int]] = {}
        for pair, numbers in dirty.items():
            newest = bucket_of(self._buckets.newest_time(pair))
            looked = self._looked.get(pair, self._buckets.floor(pair))
            changed = {look for number in numbers for look in range(number + 1, number + reach + 1) if look <= newest}
            if looked < newest:
                known = self._buckets.view({pair: (self._buckets.floor(pair), newest)})[pair]
                changed |= {
                    look
                    for number in known
                    for look in range(max(number, looked) + 1, min(number + ROLLED, newest) + 1)
                }
            if changed:
                looks[pair] = sorted(changed)
        needs = {pair: (numbers[0] - reach, numbers[-1]) for pair, numbers in looks.items()}
        if any(first < self._buckets.floor(pair) for pair, (first, _) in needs.items()):
            silver_written()
        views = self._buckets.view(needs)
        rows = self._rolling
        made: dict[int, dict[WindowKey, tuple[object, ...]]] = defaultdict(dict)
        for pair, numbers in looks.items():
            for look in numbers:
                row = rolling_row(pair, look, views[pair], self._rules, batch.at)
                if row:
                    micros = bucket_start(look)
                    made[rows.span(micros)][*pair, micros] = row
        rows.update(batch, made, lambda number, span: span.update(made[number]))
        for pair, numbers in looks.items():
            self._looked[pair] = max(self._looked.get(pair, 0), numbers[-1])

    def current(self, found: Sequence[Bucket], batch: Batch, silver_written: Callable[[], None]) -> None:
        """gold.current_price, with its change within a minute."""
        best: dict[str, Newest] = {}
        for bucket in found:
            asset = bucket.pair[1]
            if asset not in best or rank(bucket.newest.newness) > rank(best[asset].newness):
                best[asset] = bucket.newest
        if not best or self._current.written(batch):
            return
        known = self._current.load([0])[0]
        for asset in best:
            if asset in known and rank(known[asset][0].newness) > rank(best[asset].newness):
                best[asset] = known[asset][0]
        before = self._minute_before(best, silver_written)
        values = {
            asset: (newest, change_pct(newest.price, before[asset]) if asset in before else None, batch.at)
            for asset, newest in best.items()
        }
        self._current.update(batch, [0], lambda _, span: span.update(values))

    def _minute_before(self, best: Mapping[str, Newest], silver_written: Callable[[], None]) -> dict[str, Decimal]:
        """Of each asset its venue's last price a minute before the newest, if that is not too old."""
        pairs = {asset: (newest.newness[2], asset) for asset, newest in best.items()}
        needs = {
            pairs[asset]: (bucket_of(newest.time - OLDEST_COMPARED), bucket_of(newest.time))
            for asset, newest in best.items()
        }
        if any(first < self._buckets.floor(pair) for pair, (first, _) in needs.items()):
            silver_written()
        views = self._buckets.view(needs)
        wanted: set[tuple[Pair, int]] = set()
        for asset, pair in pairs.items():
            time = best[asset].time - MINUTE
            number = bucket_before(time, views[pair])
            if number is not None and views[pair][number].last_time > time:
                wanted.add((pair, number))
        self._look_up(wanted, silver_written)
        found = {
            asset: minute_before(best[asset].time, pair, views[pair], lambda *key: self._bucket_ticks[key])
            for asset, pair in pairs.items()
        }
        return {asset: price for asset, price in found.items() if price is not None}

    def _look_up(self, wanted: set[tuple[Pair, int]], silver_written: Callable[[], None]) -> None:
        """Have the ticks of these buckets: one look into silver for all pairs of the same time."""
        missing = wanted - self._bucket_ticks.keys()
        if missing:
            silver_written()
        for number in {number for _, number in missing}:
            pairs = [pair for pair, asked in missing if asked == number]
            self._bucket_ticks.update({(pair, number): [] for pair in pairs})
            for pair, tick in self._silver.alert_ticks(pairs, [(bucket_start(number), bucket_start(number + 1))]):
                self._bucket_ticks[pair, number].append(tick)
        while len(self._bucket_ticks) > max(16, 2 * len(wanted)):
            self._bucket_ticks.popitem(last=False)

    def alerts(self, dirty: Mapping[Pair, Sequence[int]], batch: Batch, silver_written: Callable[[], None]) -> None:
        """gold.alerts, as all ticks that silver has make them: rows that late ticks abolish go."""
        rows = self._alerts
        if not dirty or rows.written(batch):
            return
        changed: dict[str, Alert | None] = {}
        spans: set[int] = set()
        for pair, numbers in dirty.items():
            begin, end, found = self._reassessed(pair, numbers[0], numbers[-1], silver_written)
            stored = {
                alert.alert_id: alert
                for alert in self._stored_alerts(pair, begin)
                if begin <= alert.opened_at and (end is None or alert.opened_at < end)
            }
            for alert_id in stored.keys() | found.keys():
                old, new = stored.get(alert_id), found.get(alert_id)
                if old != new:
                    changed[alert_id] = new
                    spans |= {rows.span(alert.opened_at) for alert in (old, new) if alert}

        def change(number: int, span: dict[str, tuple[Alert, datetime]]) -> None:
            for alert_id, alert in changed.items():
                if alert is None:
                    span.pop(alert_id, None)
                elif rows.span(alert.opened_at) == number:
                    span[alert_id] = (alert, batch.at)

        rows.update(batch, spans, change)

    def _stored_alerts(self, pair: Pair, since: int) -> list[Alert]:
        """A pair's rows of gold.alerts of episodes that may still have been open then, and later ones, by time."""
        rows = self._alerts
        spans = range(rows.span(since) - 1, rows.span(self._buckets.newest_time(pair)) + 1)
        alerts = [alert for span in rows.load(spans).values() for alert, _ in span.values() if alert.pair == pair]
        return sorted(alerts, key=lambda alert: alert.opened_at)

    def _reassessed(
        self, pair: Pair, first: int, last: int, silver_written: Callable[[], None]
    ) -> tuple[int, int | None, dict[str, Alert]]:
        """(begin, end, the alerts that open in between), after changes to buckets from `first` to `last`.

        From a moment before `first` at which no episode was open, to the first one after `last` at which things are as
        before the change; None: to the newest tick.
        """
        rule, newest = self._rules.alerts, bucket_of(self._buckets.newest_time(pair))
        stored = self._stored_alerts(pair, bucket_start(first))
        low = first - 2 * ROLLED
        high = newest + 1 if first >= self._buckets.floor(pair) else min(newest, last + FOLLOWED_BUCKETS) + 1
        while True:
            if low < self._buckets.floor(pair):
                silver_written()
            view = self._buckets.view({pair: (low, high)})[pair]
            numbers = sorted(number for number in view if low + rule.reach <= number < high)
            at = bisect_left(numbers, first)
            while at > 0 and bound(view, numbers[at - 1], rule) >= rule.threshold / 2:
                at -= 1
            start = bucket_start(numbers[at])
            across = [a for a in stored if a.opened_at < start and (a.closed_at is None or a.closed_at >= start)]
            if across:
                low = bucket_of(across[0].opened_at) - 2 * ROLLED
                first = min(first, bucket_of(across[0].opened_at))
                continue
            if at == 0 and numbers[0] == low + rule.reach:
                low -= 4 * (newest - low)
                continue
            found: dict[str, Alert] = {}
            closed_at = _last_closed(stored, start)
            cut = False
            for stretch, closed_before, alerts in episodes(
                pair, view, numbers[at:], closed_at, self._alert_ticks(silver_written), rule
            ):
                begin = bucket_start(stretch.buckets[0])
                if stretch.buckets[0] > last + rule.reach and closed_before == _last_closed(stored, begin):
                    return start, begin, found
                found.update({alert.alert_id: alert for alert in alerts})
                cut = stretch.then is None
                closed_at = max((a.closed_at for a in alerts if a.closed_at is not None), default=closed_at)
            if high > newest:
                return start, None, found
            end = bucket_start(high)
            if not cut and closed_at == _last_closed(stored, end):
                return start, end, found
            high = newest + 1

    def _alert_ticks(
        self, silver_written: Callable[[], None]
    ) -> Callable[[Pair, Sequence[Range]], Sequence[AlertTick]]:
        def ticks(pair: Pair, ranges: Sequence[Range]) -> list[AlertTick]:
            silver_written()
            return self._silver.pair_ticks(pair, ranges)

        return ticks

    def _changed_since_roll_up(self) -> set[WindowKey]:
        """The minutes that gold.price_1m has got since the last roll-up."""
        up_to = self._writer.metadata(GOLD_PRICES[-1]).get("up_to")
        minutes = self._spark.read.format("delta").load(GOLD_PRICE_1M.path(self._root))
        if up_to is not None:
            minutes = minutes.where(F.col("updated_at") > F.lit(datetime.fromisoformat(up_to)))
        keys = minutes.select("source", "asset", F.unix_micros("window_start").alias("start"))
        return {(row["source"], row["asset"], row["start"]) for row in keys.collect()}


def _length(table: Table) -> int:
    """Of a price table's windows, in microseconds."""
    assert table.window is not None
    return table.window // MICROSECOND


def _last_closed(alerts: Iterable[Alert], before: int) -> int | None:
    """When the last of the episodes that opened before a time was closed."""
    return max((a.closed_at for a in alerts if a.opened_at < before and a.closed_at is not None), default=None)


# How stored rows become keys and values again.


def _micros(name: str) -> Column:
    return F.unix_micros(name).alias(name)


def _window_columns() -> tuple[Column, ...]:
    return (
        *(F.col(name) for name in ("source", "asset", "tick_count", "price_sum", "price_m2", "high", "low")),
        *(
            F.col("open"),
            stored_order("open_order").alias("first"),
            F.col("close"),
            stored_order("close_order").alias("last"),
        ),
        *(F.col("volume"), F.col("notional"), _micros("window_start"), _micros("updated_at")),
    )


def _window(row: Row) -> tuple[WindowKey, Window]:
    told = row.asDict()
    key = (told.pop("source"), told.pop("asset"), told.pop("window_start"))
    updated_at = to_time(told.pop("updated_at"))
    first, last = tuple(told.pop("first")), tuple(told.pop("last"))
    return key, Window(Summary(**told, open_order=first, close_order=last), updated_at)


def _rolling_columns() -> tuple[Column, ...]:
    names = ("source", "asset", "average_1m", "volatility_pct", "low", "high", "tick_count")
    return (*(F.col(name) for name in names), _micros("as_of"), _micros("updated_at"))


def _rolling(row: Row) -> tuple[WindowKey, tuple[object, ...]]:
    source, asset, *values, as_of, updated_at = row
    return (source, asset, as_of), (source, asset, to_time(as_of), *values, to_time(updated_at))


def _current_columns() -> tuple[Column, ...]:
    order = "current_order"
    rest = (F.col(f"{order}.{name}") for name in ("source", "trade_id", "producer", "sequence", "event_id"))
    newness = F.struct(F.unix_micros(f"{order}.known_at"), F.unix_micros(f"{order}.event_time"), *rest)
    return (F.col("asset"), F.col("price_usd"), newness.alias("newness"), F.col("change_pct_1m"), _micros("updated_at"))


def _current(row: Row, future_tolerance: float) -> tuple[str, tuple[Newest, float | None, datetime]]:
    newness = tuple(row["newness"])
    known_at, event_time = newness[:2]
    # As in is_future: a venue's time too far ahead of the receipt is not believed.
    time = known_at if event_time - known_at > future_tolerance * 1_000_000 else event_time
    newest = Newest(newness, row["price_usd"], time)
    return row["asset"], (newest, row["change_pct_1m"], to_time(row["updated_at"]))


def _alert_columns() -> tuple[Column, ...]:
    names = ("alert_id", "source", "asset", "direction", "reference_price", "trigger_price", "peak_change_pct")
    times = ("opened_at", "reference_time", "closed_at", "updated_at")
    return (*(F.col(name) for name in names), *(_micros(name) for name in times))


def _alert(row: Row) -> tuple[str, tuple[Alert, datetime]]:
    told = row.asDict()
    updated_at = to_time(told.pop("updated_at"))
    return told["alert_id"], (Alert(**told), updated_at)
