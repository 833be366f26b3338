"""silver.ticks, looked back into: the ticks that feed gold, and their buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from lake.alerts import AlertTick
from lake.metrics import (
    GoldRules,
    Range,
    bucket_from,
)
from lake.recent_ticks import ORDER, Recent
from lake.summaries import (
    Pair,
    Summary,
    bucket_start,
    bucket_summaries,
)
from lake.tables import (
    SILVER_TICKS,
)
from lake.ticks import feeds_gold, gold_time


class Silver:
    """The ticks that feed gold, read back from rows of silver.ticks."""

    def __init__(self, load: Callable[[], DataFrame], rules: GoldRules, recent: Recent | None = None) -> None:
        """load: the rows as they are then."""
        self._load, self._rules, self._recent = load, rules, recent

    @classmethod
    def of_lake(
        cls,
        spark: SparkSession,
        root: str,
        rules: GoldRules,
        version: int | None = None,
        recent: Recent | None = None,
    ) -> Silver:
        """silver.ticks as of now, or as of a version."""

        def load() -> DataFrame:
            reader = spark.read.format("delta")
            if version is not None:
                reader = reader.option("versionAsOf", version)
            return reader.load(SILVER_TICKS.path(root))

        return cls(load, rules, recent)

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
        return bucket_summaries(self.ticks(begin, end, pairs))

    def buckets(self, begin: int, end: int, pairs: Iterable[Pair] | None = None) -> dict[Pair, dict[int, Summary]]:
        """The buckets from one number to before another."""
        pairs = None if pairs is None else list(pairs)
        if self._recent and pairs:
            recent = self._recent.buckets(pairs, (bucket_start(begin), bucket_start(end)))
            if recent is not None:
                return recent
        found: dict[Pair, dict[int, Summary]] = defaultdict(dict)
        for row in self.summaries(bucket_start(begin), bucket_start(end), pairs).toLocalIterator():
            bucket = bucket_from(row)
            found[bucket.pair][bucket.number] = bucket.summary
        return found

    def alert_ticks(self, pairs: Sequence[Pair], ranges: Sequence[Range]) -> Iterator[tuple[Pair, AlertTick]]:
        """The ticks of pairs whose gold times lie in one of the ranges, in tick order."""
        recent = self._recent.ticks(pairs, ranges) if self._recent else None
        if recent is not None:
            yield from recent
            return
        time = F.unix_micros(gold_time())
        whole = self.ticks(min(begin for begin, _ in ranges), max(end for _, end in ranges), pairs)
        within = reduce(Column.__or__, ((time >= begin) & (time < end) for begin, end in ranges))
        rows = whole.where(within).withColumn("gold_time", time).select("source", "asset", "price_usd", *ORDER)
        for row in rows.orderBy(*ORDER).toLocalIterator():
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
