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
import threading
from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal

from pyspark.sql import SparkSession

from lake.alerts import Alert, AlertTick, bound
from lake.commits import DataFile
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
    bucket_before,
    change_pct,
    episodes,
    minute_before,
    newer,
    rolling_row,
)
from lake.parquet import stored
from lake.recent_ticks import TIMES, Recent
from lake.rows import Batch, Rows, alert_rows, current_rows, price_rows, rolling_rows
from lake.silver import Silver
from lake.sinks import Sink
from lake.store import Store
from lake.summaries import (
    BUCKET_SECONDS,
    EPOCH,
    Pair,
    Summary,
    bucket_of,
    bucket_start,
    merge,
    to_micros,
    to_time,
)
from lake.tables import GOLD_PRICE_1M, GOLD_PRICES, SILVER_TICKS
from lake.writer import LakeWriter

logger = logging.getLogger(__name__)


# So many buckets of each pair stay in memory; a late tick before them is looked up in silver.
KEPT_BUCKETS = 900 // BUCKET_SECONDS
# After a start silver's files are known from so long ago on.
RECENT_SECONDS = 900
# A tick that is hours late needs to know what followed it; so much at first, all of it where that is not enough.
FOLLOWED_BUCKETS = 1800 // BUCKET_SECONDS


class Buckets:
    """The last buckets of each pair; older ones are looked up in silver, which must have all ticks that were added.

    Those that silver had when this began are read when they are first asked for: what needs none of them, as minutes
    do not, need not wait for them after a start.
    """

    def __init__(self, silver: Silver, newest: Mapping[Pair, int], began: Silver, reach: int) -> None:
        """newest: of the pairs that silver has, the second since 1970 of their newest minute.

        began: silver as it is now, whatever it gets later. reach: of how many buckets a look at the last ones needs.
        """
        self._silver, self._began = silver, began
        self._by_pair: dict[Pair, dict[int, Summary]] = defaultdict(dict)
        # From this number on a pair's buckets are all here, once those of `began` are.
        self._floors = {pair: second // BUCKET_SECONDS - 3 * ROLLED - reach for pair, second in newest.items()}
        self._to_be_read = dict(newest)
        self._reading = threading.Lock()

    def _read(self) -> None:
        """Have those that silver had when this began. Nothing else is added meanwhile."""
        with self._reading:
            # Pairs that ended in the same hour go together: one that fell silent long ago costs no look at all since.
            hours: dict[int, list[Pair]] = defaultdict(list)
            for pair, second in self._to_be_read.items():
                hours[second // 3600].append(pair)
            for pairs in hours.values():
                end = max(self._to_be_read[pair] for pair in pairs) // BUCKET_SECONDS + ROLLED
                found = self._began.buckets(min(self._floors[pair] for pair in pairs), end, pairs)
                for pair in pairs:
                    self._add(pair, found.get(pair, {}).items())
            # What was read for it is in nobody's way any more.
            self._to_be_read, self._began = {}, self._silver

    def add(self, rows: Iterable[Bucket]) -> None:
        for bucket in rows:
            self._add(bucket.pair, [(bucket.number, bucket.summary)])

    def _add(self, pair: Pair, buckets: Iterable[tuple[int, Summary]]) -> None:
        floor, there = self._floors.setdefault(pair, 0), self._by_pair[pair]
        for number, summary in buckets:
            if number >= floor:
                there[number] = there[number].merged(summary) if number in there else summary

    def prune(self) -> None:
        """Forget what is older than a while before the newest of the pair."""
        for pair, buckets in self._by_pair.items():
            if len(buckets) > 2 * KEPT_BUCKETS:
                floor = max(buckets) - KEPT_BUCKETS
                self._by_pair[pair] = {number: part for number, part in buckets.items() if number >= floor}
                self._floors[pair] = floor

    def newest_time(self, pair: Pair) -> int:
        """Gold time of the pair's newest tick."""
        self._read()
        buckets = self._by_pair[pair]
        return buckets[max(buckets)].last_time

    def view(
        self, needs: Mapping[Pair, Range], silver_written: Callable[[], None]
    ) -> dict[Pair, Mapping[int, Summary]]:
        """Of each pair a mapping that has its buckets from one number to before another, and perhaps more.

        silver_written: returns once silver has all ticks that were added; called only where silver is asked.
        """
        self._read()
        views: dict[Pair, Mapping[int, Summary]] = {pair: self._by_pair[pair] for pair in needs}
        below = {pair: (first, last) for pair, (first, last) in needs.items() if first < self._floors[pair]}
        if below:
            silver_written()
        # Pairs that are asked for the same time go together, in one look into silver.
        for first, last in set(below.values()):
            pairs = [pair for pair, asked in below.items() if asked == (first, last)]
            found = self._silver.buckets(first, last, pairs)
            for pair in pairs:
                views[pair] = {**found.get(pair, {}), **self._by_pair[pair]}
        return views

    def floor(self, pair: Pair) -> int:
        return self._floors[pair]


class Gold:
    """Gold's state between micro-batches."""

    def __init__(
        self,
        spark: SparkSession,
        root: str,
        writer: LakeWriter,
        store: Store,
        rules: GoldRules,
        newest: Mapping[Pair, int],
        rollup_seconds: float = 10.0,
        sink: Sink | None = None,
    ) -> None:
        """newest: of each pair in silver, the second since 1970 of its newest minute."""
        self._spark, self._root, self._writer, self._rules = spark, root, writer, rules
        since = (max(newest.values()) - RECENT_SECONDS) * 1_000_000 if newest else 0
        files = writer.files(SILVER_TICKS, TIMES, to_time(since)) if newest else []
        self._recent, before = (Recent(store, files, since, newest, rules.symbols) for _ in range(2))
        self._silver = Silver.of_lake(spark, root, rules, recent=self._recent)
        began = Silver.of_lake(spark, root, rules, version=writer.version(SILVER_TICKS), recent=before)
        self._reach = max(ROLLED, rules.volatility_buckets)
        self._buckets = Buckets(self._silver, newest, began, self._reach)
        self._prices = {table.name: price_rows(spark, writer, table, sink) for table in GOLD_PRICES}
        self._rolling = rolling_rows(spark, writer, sink)
        self._current = current_rows(spark, writer, rules, sink)
        self._alerts = alert_rows(spark, writer, rules, sink)
        # as_of up to which gold.rolling_price has been looked at, as a bucket's number.
        self._looked: dict[Pair, int] = {}
        # Prices within the bucket of a minute before the current price, by time; that bucket is nearly done with.
        self._bucket_ticks: OrderedDict[tuple[Pair, int], list[AlertTick]] = OrderedDict()
        self._rollup_seconds = rollup_seconds
        self._rolled_up_at: datetime | None = None
        # Minutes that gold.price_5m and the longer ones do not have yet; None: to be asked for.
        self._not_rolled_up: set[WindowKey] | None = None

    # --- one micro-batch

    def has(self, files: Iterable[DataFile]) -> None:
        """silver.ticks has these files now."""
        self._recent.add(files)

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
        if self._not_rolled_up is not None:
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
        changed = self._changed_since_roll_up() if self._not_rolled_up is None else self._not_rolled_up
        for rows in self._prices.values():
            rows.refresh()
        for finer, table in itertools.pairwise(GOLD_PRICES):
            length = table.window_micros
            changed = {(source, asset, micros // length * length) for source, asset, micros in changed}
            self._roll_up(self._prices[finer.name], self._prices[table.name], changed, batch)
        self._not_rolled_up = set()
        self._rolled_up_at = batch.at

    def _roll_up(self, finer: Rows[Window], rows: Rows[Window], keys: set[WindowKey], batch: Batch) -> None:
        length, step = rows.table.window_micros, finer.table.window_micros

        def change(number: int, span: dict[WindowKey, Window]) -> None:
            for source, asset, micros in keys:
                if rows.span(micros) == number:
                    starts = range(micros, micros + length, step)
                    parts = finer.load({finer.span(start) for start in starts})
                    known = [parts[finer.span(start)].get((source, asset, start)) for start in starts]
                    there = [window for window in known if window]
                    whole = merge(window.summary for window in there)
                    span[source, asset, micros] = Window(whole, max(window.updated_at for window in there))

        told = {"up_to": batch.at.isoformat(), "minutes_version": self._writer.version(GOLD_PRICE_1M)}
        rows.update(batch, {rows.span(micros) for *_, micros in keys}, change, **told)

    def rolling(self, dirty: Mapping[Pair, Sequence[int]], batch: Batch, silver_written: Callable[[], None]) -> None:
        """gold.rolling_price of every look at changed buckets, and of those that time has come to."""
        if self._rolling.written(batch):
            return
        reach = self._reach
        looks: dict[Pair, list[int]] = {}
        for pair, numbers in dirty.items():
            newest = bucket_of(self._buckets.newest_time(pair))
            # Below that it would take buckets that are not here; those looks were taken before the start.
            looked = self._looked.get(pair, self._buckets.floor(pair) + reach)
            changed = {look for number in numbers for look in range(number + 1, number + reach + 1) if look <= newest}
            if looked < newest:
                known = self._buckets.view({pair: (self._buckets.floor(pair), newest)}, silver_written)[pair]
                changed |= {
                    look
                    for number in known
                    for look in range(max(number, looked) + 1, min(number + ROLLED, newest) + 1)
                }
            if changed:
                looks[pair] = sorted(changed)
        needs = {pair: (numbers[0] - reach, numbers[-1]) for pair, numbers in looks.items()}
        views = self._buckets.view(needs, silver_written)
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
            best[asset] = newer(best.get(asset), bucket.newest)
        if not best or self._current.written(batch):
            return
        known = self._current.load([0])[0]
        for asset, newest in best.items():
            if asset in known:
                best[asset] = newer(known[asset][0], newest)
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
        views = self._buckets.view(needs, silver_written)
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
            view = self._buckets.view({pair: (low, high)}, silver_written)[pair]
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
        told = self._writer.metadata(GOLD_PRICES[-1])
        up_to = datetime.fromisoformat(told["up_to"]) if "up_to" in told else EPOCH
        found: set[WindowKey] = set()
        for file in self._writer.added_since(GOLD_PRICE_1M, told.get("minutes_version", -1)):
            for row in stored(self._spark, file.path, ["source", "asset", "window_start", "updated_at"]).to_pylist():
                if row["updated_at"] > up_to:
                    found.add((row["source"], row["asset"], to_micros(row["window_start"])))
        return found


def _last_closed(alerts: Iterable[Alert], before: int) -> int | None:
    """When the last of the episodes that opened before a time was closed."""
    return max((a.closed_at for a in alerts if a.opened_at < before and a.closed_at is not None), default=None)
