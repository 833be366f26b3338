"""Update gold's tables with each micro-batch.

gold.price_5s is the state: its rows are mergeable summaries (lake.gold.summary). A micro-batch merges its own summaries
into the rows that they touch, and derives all other tables again from rows near those. So memory and time grow with the
change, a tick that is hours late costs one read of an old file, and a start reads the last minutes as whole files.

Each table is committed by itself. Its commit names the micro-batch, so that a replay skips tables that have it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any

import polars as pl

from lake.contract import Pair
from lake.delta.log import DataFile
from lake.delta.slices import Batch, Change, Changes, Sink, Slices
from lake.delta.writer import Changed, LakeWriter
from lake.gold import derive
from lake.gold.alerts import Alert, Extremes, alert_row, bound, episodes
from lake.gold.derive import OLDEST_COMPARED, ROLLED, TIME
from lake.gold.lookback import TIMES, Lookback
from lake.gold.summary import COLUMNS, PAIR, SUMS, merged
from lake.rules import GoldRules
from lake.tables import (
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1M,
    GOLD_PRICE_5S,
    GOLD_ROLLING_PRICE,
    SILVER_TICKS,
)
from lake.times import BUCKET, MINUTE, SECOND, bucket_of, bucket_start, to_micros

# After a change of so recent buckets, alerts are reassessed up to the newest bucket.
RECENT = 15 * MINUTE // BUCKET
# After an older change, so many of the following buckets are read first, and all of them if that does not suffice.
FOLLOWED = 30 * MINUTE // BUCKET
_KEY = (*PAIR, "start")


def feeding(rows: pl.DataFrame, rules: GoldRules) -> pl.DataFrame:
    """Rows with source, asset, symbol and quote, of those that feed gold (lake.contract.feeds)."""
    pair = pl.concat_str("source", "asset", separator=":")
    own = pl.col("source").replace_strict(dict(rules.quotes), default=pl.col("quote"), return_dtype=pl.String)
    symbol = pair.replace_strict(dict(rules.symbols), default=None, return_dtype=pl.String)
    return rows.filter(pl.coalesce(symbol == pl.col("symbol"), own == pl.col("quote")))


class Buckets:
    """gold.price_5s as of a micro-batch, with a change that is not committed yet."""

    def __init__(self, slices: Slices, change: Change | None) -> None:
        self._slices, self._change = slices, change

    def stored(self, starts: Iterable[int]) -> pl.DataFrame:
        """The rows of buckets that begin at these times, and `start`."""
        rows = self._slices.load([start // BUCKET for start in starts], self._change)
        return rows.with_columns(pl.col("window_start").cast(pl.Int64).alias("start"))

    def sums(self, starts: Iterable[int]) -> pl.DataFrame:
        """Their source, asset, start and SUMS."""
        return self.stored(starts).select(*_KEY, *SUMS)

    def ends(self, starts: Iterable[int]) -> pl.DataFrame:
        """Their source, asset, start, high, low, open_time, close_time, close."""
        return self.stored(starts).select(
            *(*_KEY, "high", "low", "close"),
            pl.col("first_event_time").cast(pl.Int64).alias("open_time"),
            pl.col("last_event_time").cast(pl.Int64).alias("close_time"),
        )


class Gold:
    """Gold's tables between micro-batches."""

    def __init__(
        self, lake: LakeWriter, rules: GoldRules, minutes: Mapping[Pair, int], sink: Sink | None = None
    ) -> None:
        """minutes: of each pair that gold has, the second since 1970 of its newest minute."""
        self._lake, self._rules = lake, rules
        self._five = Slices(lake, GOLD_PRICE_5S, sink)
        self.minutes = Slices(lake, GOLD_PRICE_1M, sink)
        self._rolling = Slices(lake, GOLD_ROLLING_PRICE, sink)
        self._current = Slices(lake, GOLD_CURRENT_PRICE, sink)
        self._alerts = Slices(lake, GOLD_ALERTS, sink)
        self._lookback = Lookback(
            lake.files,
            lambda since: lake.files_since(SILVER_TICKS, TIMES, since),
            lambda rows: feeding(rows, rules),
        )
        # The start of the bucket of each pair's newest tick, for pairs with a tick since the start.
        self._newest = pl.DataFrame(schema={"source": pl.String, "asset": pl.String, "newest": pl.Int64})
        # Of other pairs only the newest minute is known.
        self.begin_at(minutes)

    def begin_at(self, minutes: Mapping[Pair, int]) -> None:
        """Set the newest minute of each pair in gold; it counts until the pair's first tick after the start."""
        known = [(*pair, second * SECOND) for pair, second in minutes.items()]
        schema = {"source": pl.String, "asset": pl.String, "minute": pl.Int64}
        self._newest_minutes = pl.DataFrame(known, schema=schema, orient="row")

    def has(self, files: Iterable[DataFile]) -> None:
        """Note files that silver.ticks is about to get."""
        self._lookback.add(files)

    def moved(self, removed: Iterable[DataFile], added: Iterable[DataFile]) -> None:
        """Note that rows of silver.ticks have moved to other files."""
        self._lookback.replace(removed, added)

    @property
    def slices(self) -> tuple[Slices, ...]:
        """The rows of the tables that `write` changes."""
        return self._five, self.minutes, self._rolling, self._current, self._alerts

    def write(self, summaries: pl.DataFrame, batch: Batch) -> pl.DataFrame:
        """Bring all tables up to date with a micro-batch's ticks: their summaries by source, symbol, asset and start.

        Out: source, asset and start of the minutes that changed. Raises Fenced.
        """
        delta = merged(feeding(summaries, self._rules), *_KEY)
        changed_minutes = delta.select(*PAIR, pl.col("start") // MINUTE * MINUTE).unique()
        if delta.is_empty():
            return changed_minutes
        newest, outdated = self._attempt(delta, changed_minutes, batch, again=False)
        while outdated:
            newest, outdated = self._attempt(delta, changed_minutes, batch, again=True)
        self._newest = pl.concat([self._newest.join(newest, on=PAIR, how="anti"), newest.select(*PAIR, "newest")])
        for slices in self.slices:
            slices.forget_unused()
        return changed_minutes

    def _attempt(
        self, delta: pl.DataFrame, changed_minutes: pl.DataFrame, batch: Batch, *, again: bool
    ) -> tuple[pl.DataFrame, bool]:
        """Compute and write all tables side by side. Out: `_newest_after`, and whether maintenance
        has replaced rows of gold.price_5s meanwhile, so that all that was derived from them must be derived `again`."""
        five = self._five
        change = None if five.written(batch) else five.prepare(self._spans(delta), self._fold(delta, batch))
        buckets = Buckets(five, change)
        newest = self._newest_after(delta, buckets)

        def update(slices: Slices, changes: Callable[[], Changes]) -> None:
            """Compute and write a table's changes, unless it has the micro-batch."""
            if again or not slices.written(batch):
                rows, gone = changes()
                spans = slices.spans_of(rows if gone is None else pl.concat([rows, gone]))
                slices.update(batch, spans, lambda _: (rows, gone), again=again)

        tables: list[tuple[Slices, Callable[[], Changes]]] = [
            (self.minutes, lambda: (self._minute_rows(changed_minutes, buckets, batch.at), None)),
            (self._current, lambda: (self._current_rows(delta, buckets, batch.at), None)),
            (self._rolling, lambda: (self._rolling_rows(delta, newest, buckets, batch.at), None)),
            (self._alerts, lambda: self._alert_rows(delta, newest, buckets, batch.at)),
        ]
        with ThreadPoolExecutor(len(tables) + 1) as threads:
            running: list[Future[None]] = [threads.submit(five.commit, change, batch)] if change else []
            running += [threads.submit(update, *table) for table in tables]
            outdated = False
            for step in running:
                try:
                    step.result()
                except Changed:
                    outdated = True
        return newest, outdated

    @staticmethod
    def _spans(rows: pl.DataFrame) -> list[int]:
        return [start // BUCKET for start in rows["start"].unique().to_list()]

    # --- gold.price_5s and the minutes

    def _fold(self, delta: pl.DataFrame, batch: Batch) -> Callable[[pl.DataFrame], Changes]:
        added = delta.select(*_KEY, *COLUMNS)

        def fold(before: pl.DataFrame) -> Changes:
            keys = added.select(*PAIR, pl.col("start").cast(TIME).alias("window_start"))
            touched = derive.summaries_of(before.join(keys, on=[*PAIR, "window_start"], how="semi"))
            summaries = merged(pl.concat([touched.select(*_KEY, *COLUMNS), added]), *_KEY) if touched.height else added
            return derive.price_rows(GOLD_PRICE_5S, summaries, batch.at), None

        return fold

    @staticmethod
    def _minute_rows(changed: pl.DataFrame, buckets: Buckets, at: datetime) -> pl.DataFrame:
        starts = [start for minute in changed["start"].unique() for start in range(minute, minute + MINUTE, BUCKET)]
        rows = buckets.stored(starts).with_columns(pl.col("start") // MINUTE * MINUTE)
        parts = derive.summaries_of(rows.join(changed, on=_KEY, how="semi"))
        return derive.price_rows(GOLD_PRICE_1M, derive.windows(parts, MINUTE), at)

    # --- gold.rolling_price

    def _newest_after(self, delta: pl.DataFrame, buckets: Buckets) -> pl.DataFrame:
        """Of the changed pairs: source, asset, before, since, newest.

        newest: where the bucket of the newest tick begins, this micro-batch included. since: rolling prices up to it
        need no look because time goes on. before: where the last bucket at that time began, or its minute.
        """
        pairs = delta.group_by(PAIR).agg(pl.col("start").max().alias("last"))
        known = pairs.join(self._newest, on=PAIR, how="left").join(self._newest_minutes, on=PAIR, how="left")
        known = known.with_columns(since=pl.coalesce("newest", "minute"))
        # After a start: the buckets of the newest minute.
        minutes = known.filter(pl.col("newest").is_null() & pl.col("minute").is_not_null())
        starts = [s for minute in minutes["minute"].unique() for s in range(minute, minute + MINUTE, BUCKET)]
        if starts:
            rows = buckets.stored(starts).join(minutes.select(*PAIR, "minute"), on=PAIR)
            within = rows.filter(pl.col("start").is_between(pl.col("minute"), pl.col("minute") + MINUTE, closed="left"))
            known = known.join(within.group_by(PAIR).agg(pl.col("start").max().alias("found")), on=PAIR, how="left")
            known = known.with_columns(pl.coalesce("newest", "found").alias("newest"))
        return known.select(
            *PAIR,
            pl.col("newest").alias("before"),
            "since",
            pl.max_horizontal("newest", "last").alias("newest"),
        )

    def _rolling_rows(self, delta: pl.DataFrame, newest: pl.DataFrame, buckets: Buckets, at: datetime) -> pl.DataFrame:
        """Rows that look back on a changed bucket, and rows that the pair's progress in time adds."""
        reach = max(ROLLED, self._rules.volatility_buckets)
        wanted = derive.looks(delta.select(_KEY), newest, reach)
        # A pair whose time advances: later rows look back on its earlier minute too.
        ahead = newest.filter(pl.col("newest") > pl.col("since"))
        starts = {
            start
            for since, before in ahead.select("since", "before").unique().rows()
            for start in range(since - MINUTE + BUCKET, (before if before is not None else since) + BUCKET, BUCKET)
        }
        if starts:
            older = buckets.sums(starts).join(ahead.select(*PAIR, "since"), on=PAIR)
            later = derive.looks(older, newest, ROLLED).join(ahead.select(*PAIR, "since"), on=PAIR)
            wanted = pl.concat(
                [wanted, later.filter(pl.col("as_of") > pl.col("since")).select(wanted.columns)]
            ).unique()
        looks = wanted["as_of"].unique()
        near = {start for look in looks for start in range(look - reach * BUCKET, look, BUCKET)}
        return derive.rolling_rows(wanted, buckets.sums(near), self._rules, at)

    # --- gold.current_price

    def _current_rows(self, delta: pl.DataFrame, buckets: Buckets, at: datetime) -> pl.DataFrame:
        fresh = derive.newest_ticks(delta)
        current = self._current.load([0]).join(fresh.select("asset"), on="asset", how="semi")
        known = derive.newest_of(current, self._rules.future_tolerance_seconds)
        best = derive.newest_ticks(pl.concat([known, fresh.select(known.columns)]))
        wanted = best.select(pl.col("newest_source").alias("source"), "asset", time=pl.col("newest_time") - MINUTE)
        starts = {
            bucket_start(number)
            for time in wanted["time"].unique()
            for number in range(bucket_of(time + MINUTE - OLDEST_COMPARED), bucket_of(time) + 1)
        }
        whole, split = derive.prices_before(wanted, buckets.ends(starts))
        among = self._prices_among_ticks(split)
        before = pl.concat([whole, among]).select("asset", "price")
        return derive.current_rows(best, before, at)

    def _prices_among_ticks(self, split: pl.DataFrame) -> pl.DataFrame:
        """source, asset, price of the last tick at or before `time` in the bucket that begins at `start`."""
        if split.is_empty():
            return pl.DataFrame(schema={"source": pl.String, "asset": pl.String, "price": pl.Decimal(28, 12)})
        ranges = [(start, start + BUCKET) for start in split["start"].unique().sort()]
        ticks = self._lookback.ticks(ranges, split.select(PAIR)).join(split, on=PAIR, maintain_order="left")
        within = ticks.filter((pl.col("gold_time") <= pl.col("time")) & (pl.col("gold_time") >= pl.col("start")))
        last = within.unique(PAIR, keep="last", maintain_order=True)
        return last.select(*PAIR, pl.col("price_usd").alias("price"))

    # --- gold.alerts

    def _alert_rows(
        self, delta: pl.DataFrame, newest: pl.DataFrame, buckets: Buckets, at: datetime
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """(new and changed, deleted) rows of gold.alerts, by all ticks that silver has."""
        changed = delta.group_by(PAIR).agg(pl.col("start").min().alias("first"), pl.col("start").max().alias("last"))
        pairs = self._suspects(delta, buckets).vstack(self._in_alert(changed)).unique()
        upserts: list[tuple[object, ...]] = []
        gone: list[tuple[object, ...]] = []
        rows = changed.join(pairs, on=PAIR).join(newest.select(*PAIR, "newest"), on=PAIR)
        for source, asset, first, last, end in rows.rows():
            pair = (source, asset)
            begin, until, alerts = self._reassessed(pair, bucket_of(first), bucket_of(last), bucket_of(end), buckets)
            stored = {
                alert.alert_id: alert
                for alert in self._stored_alerts(pair, begin)
                if begin <= alert.opened_at and (until is None or alert.opened_at < until)
            }
            for alert_id in stored.keys() | alerts.keys():
                old, new = stored.get(alert_id), alerts.get(alert_id)
                if new is None and old is not None:
                    gone.append(alert_row(old, self._rules.alerts, at))
                elif new is not None and new != old:
                    upserts.append(alert_row(new, self._rules.alerts, at))
        return self._alert_frame(upserts), self._alert_frame(gone)

    def _alert_frame(self, rows: Sequence[tuple[object, ...]]) -> pl.DataFrame:
        return pl.DataFrame(rows, schema=self._alerts.empty().schema, orient="row")

    def _suspects(self, delta: pl.DataFrame, buckets: Buckets) -> pl.DataFrame:
        """Pairs in which an episode may be open near a changed bucket. Doubles with a margin: a few pairs too many."""
        reach = self._rules.alerts.reach
        step = pl.DataFrame({"step": range(reach + 1)})
        touched = delta.select(_KEY).join(step, how="cross").select(*PAIR, pl.col("start") + pl.col("step") * BUCKET)
        touched = touched.unique()
        starts = {start + near * BUCKET for start in touched["start"].unique() for near in range(-reach, 1)}
        ends = buckets.ends(starts)
        looked_at = touched.join(ends.select(_KEY), on=_KEY, how="semi").rename({"start": "of"}).join(step, how="cross")
        windows = looked_at.with_columns(start=pl.col("of") - pl.col("step") * BUCKET).join(ends, on=_KEY)
        extremes = windows.group_by(*PAIR, "of").agg(pl.col("high").max(), pl.col("low").min())
        most = pl.col("high").cast(pl.Float64) / pl.col("low").cast(pl.Float64) - 1
        least = float(self._rules.alerts.threshold) / 2 * (1 - 1e-9) - 1e-12
        return extremes.filter(most >= least).select(PAIR).unique()

    def _in_alert(self, changed: pl.DataFrame) -> pl.DataFrame:
        """Pairs with a stored episode that was open at a changed bucket or later."""
        rows = self._alerts_since(changed["first"].min())
        joined = rows.join(changed, on=PAIR)
        closed_at = pl.col("closed_at").cast(pl.Int64)
        return joined.filter(closed_at.is_null() | (closed_at >= pl.col("first"))).select(PAIR).unique()

    def _alerts_since(self, since: Any) -> pl.DataFrame:
        """Rows of the files that may have episodes open at this time or later, and perhaps others."""

        def may_have(file: DataFile) -> bool:
            if file.nulls.get("closed_at", 1):
                return True
            # Statistics are truncated to milliseconds.
            return bool(to_micros(datetime.fromisoformat(file.highest["closed_at"])) + 1_000 >= since)

        return self._alerts.rows_of([file for file in self._lake.live(GOLD_ALERTS).all() if may_have(file)])

    def _stored_alerts(self, pair: Pair, since: int) -> list[Alert]:
        """A pair's rows of gold.alerts that may matter from a gold time on, by opening time."""
        rows = self._alerts_since(since - self._rules.alerts.cooldown_seconds * SECOND)
        names = [name for name in GOLD_ALERTS.column_names if name in Alert.__dataclass_fields__]
        of_pair = rows.filter((pl.col("source") == pair[0]) & (pl.col("asset") == pair[1])).sort("opened_at")
        times = of_pair.with_columns(pl.col("opened_at", "reference_time", "closed_at").cast(pl.Int64)).select(names)
        return [Alert(**row) for row in times.to_dicts()]

    def _extremes(self, pair: Pair, low: int, high: int, buckets: Buckets) -> dict[int, Extremes]:
        """A pair's buckets from one number to before another."""
        rows = buckets.ends(map(bucket_start, range(low, high)))
        of_pair = rows.filter((pl.col("source") == pair[0]) & (pl.col("asset") == pair[1]))
        return {
            bucket_of(start): Extremes(*ends)
            for start, *ends in of_pair.select("start", "high", "low", "open_time").rows()
        }

    def _reassessed(
        self, pair: Pair, first: int, last: int, newest: int, buckets: Buckets
    ) -> tuple[int, int | None, dict[str, Alert]]:
        """(begin, end, the alerts that open in between), after changes to buckets from `first` to `last`.

        begin: a time before `first` at which no episode was open. end: the first time after `last` from which
        the stored alerts are still valid; None: the newest tick was reached first.
        """
        rule = self._rules.alerts
        low = first - 2 * ROLLED
        high = newest + 1 if first >= newest - RECENT else min(newest, last + FOLLOWED) + 1
        while True:
            view = self._extremes(pair, low, high, buckets)
            numbers = sorted(number for number in view if low + rule.reach <= number < high)
            at = bisect_left(numbers, first)
            while at > 0 and bound(view, numbers[at - 1], rule) >= rule.threshold / 2:
                at -= 1
            start = bucket_start(numbers[at])
            stored = self._stored_alerts(pair, start)
            across = [a for a in stored if a.opened_at < start and (a.closed_at is None or a.closed_at >= start)]
            if across:
                low = bucket_of(across[0].opened_at) - 2 * ROLLED
                first = min(first, bucket_of(across[0].opened_at))
                continue
            if at == 0 and numbers[0] == low + rule.reach:
                low -= 4 * (newest - low)
                continue
            alerts: dict[str, Alert] = {}
            closed_at = _last_closed(stored, start)
            cut = False
            for stretch, closed_before, opened in episodes(
                pair, view, numbers[at:], closed_at, self._lookback.of_pair, rule
            ):
                begin = bucket_start(stretch.buckets[0])
                if stretch.buckets[0] > last + rule.reach and closed_before == _last_closed(stored, begin):
                    return start, begin, alerts
                alerts.update({alert.alert_id: alert for alert in opened})
                cut = stretch.then is None
                closed_at = max((a.closed_at for a in opened if a.closed_at is not None), default=closed_at)
            if high > newest:
                return start, None, alerts
            end = bucket_start(high)
            if not cut and closed_at == _last_closed(stored, end):
                return start, end, alerts
            high = newest + 1


def _last_closed(alerts: Iterable[Alert], before: int) -> int | None:
    """When the last of the episodes that opened before a time was closed."""
    return max((a.closed_at for a in alerts if a.opened_at < before and a.closed_at is not None), default=None)
