"""The newest ticks of silver, looked up by the driver in the very files that it has had written.

A minute-old price, or the ticks around a sudden move, lie in a handful of small files. Spark would take half a second
to plan the question, and Delta as long to find the files after every commit.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import SparkSession

from lake.alerts import AlertTick
from lake.commits import DataFile
from lake.metrics import Range
from lake.parquet import stored
from lake.summaries import Pair, to_micros
from lake.ticks import feeds

# So many files are remembered: a quarter of an hour of small micro-batches.
KEPT_FILES = 1_000
# Bytes of a file that is worth reading here, and how many of them are kept as they were read.
SMALL_FILE = 512 * 1024
KEPT_TABLES = 64
ORDER = ("gold_time", "trade_epoch", "trade_id", "producer", "sequence", "event_id")


class Recent:
    """The newest files of silver.ticks, by the gold times that their ticks may have."""

    def __init__(self, spark: SparkSession, newest: Mapping[Pair, int], symbols: Mapping[str, str]) -> None:
        """newest: of the pairs that silver has already, the second since 1970 of their newest minute.

        symbols: by `source:asset` the symbol that feeds gold, where only one does.
        """
        self._spark, self._symbols = spark, symbols
        # Gold times from which on the files that are known have all ticks.
        self._floors = {pair: (second + 60) * 1_000_000 for pair, second in newest.items()}
        self._floor = 0
        self._files: deque[tuple[int, int, DataFile]] = deque()
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()

    def add(self, files: Iterable[DataFile]) -> None:
        """Files that were committed."""
        for file in files:
            first, last = (
                [to_micros(datetime.fromisoformat(told[name])) for name in ("event_time", "received_at")]
                for told in (file.lowest, file.highest)
            )
            # Delta's statistics are cut to milliseconds.
            self._files.append((min(first), max(last) + 1_000, file))
        while len(self._files) > KEPT_FILES:
            self._floor = max(self._floor, self._files.popleft()[1])

    def ticks(self, pairs: Collection[Pair], ranges: Sequence[Range]) -> list[tuple[Pair, AlertTick]] | None:
        """The ticks of pairs whose gold times lie in one of the ranges, in tick order; None if there may be others."""
        begin = min(begin for begin, _ in ranges)
        files = [
            file for first, last, file in self._files if any(first < end and last > begin for begin, end in ranges)
        ]
        known = begin >= max(self._floor, *(self._floors.get(pair, 0) for pair in pairs))
        if not known or any(file.size > SMALL_FILE for file in files):
            return None
        if not files:
            return []
        rows = pa.concat_tables([self._table(file).filter(_within(pairs, ranges)) for file in files])
        by_order = pc.sort_indices(rows, [(name, "ascending", "at_start") for name in ORDER])
        return [
            ((row["source"], row["asset"]), AlertTick(row["gold_time"], row["price_usd"], row["event_id"]))
            for row in rows.take(by_order).to_pylist()
            if feeds(self._symbols, (row["source"], row["asset"]), row["symbol"])
        ]

    def _table(self, file: DataFile) -> pa.Table:
        """The columns of a file that alerts need, gold_time in microseconds since 1970 among them."""
        known = self._tables.get(file.path)
        if known is not None:
            return known
        names = ("source", "asset", "symbol", "price_usd", *ORDER[1:], "event_time", "received_at", "is_future")
        rows = stored(self._spark, file.path, names)
        time = pc.if_else(rows["is_future"], rows["received_at"], rows["event_time"]).cast(pa.int64())
        rows = rows.drop_columns(["event_time", "received_at", "is_future"]).append_column("gold_time", time)
        self._tables[file.path] = rows
        while len(self._tables) > KEPT_TABLES:
            self._tables.popitem(last=False)
        return rows


def _within(pairs: Collection[Pair], ranges: Sequence[Range]) -> pc.Expression:
    time, source, asset = pc.field("gold_time"), pc.field("source"), pc.field("asset")
    of_pairs = [(source == name) & (asset == of) for name, of in pairs]
    in_ranges = [(time >= begin) & (time < end) for begin, end in ranges]
    return _any(of_pairs) & _any(in_ranges)


def _any(conditions: Sequence[pc.Expression]) -> pc.Expression:
    first, *others = conditions
    for condition in others:
        first = first | condition
    return first
