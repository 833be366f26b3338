"""The newest ticks of silver, looked up by the driver in the very files that it has had written.

A minute-old price, or the ticks around a sudden move, lie in a handful of small files, or in a few row groups of large
ones. Spark would take half a second to plan the question, and Delta as long to find the files after every commit.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lake.alerts import AlertTick
from lake.commits import DataFile
from lake.metrics import Range
from lake.overview import buckets
from lake.parquet import arrow_table, as_stored
from lake.store import Store
from lake.summaries import Pair, Summary, to_micros
from lake.tables import SILVER_TICKS
from lake.ticks import feeds

# So many files are remembered: a quarter of an hour of small micro-batches.
KEPT_FILES = 3_000
# A file of so many bytes is read in one go; of a larger one only the row groups that are asked for.
SMALL_FILE = 512 * 1024
# How many rows are looked at here; more are Spark's work. And how many are kept as they were read.
MOST_ROWS = 500_000
KEPT_ROWS = 500_000
# Small files are fetched so many at a time: each is a wait for two servers.
FETCHED = 8
TIMES = ("event_time", "received_at")
ORDER = ("gold_time", "trade_epoch", "trade_id", "producer", "sequence", "event_id")


class Recent:
    """The newest files of silver.ticks, by the gold times that their ticks may have."""

    def __init__(
        self, store: Store, files: Iterable[DataFile], since: int, known: Iterable[Pair], symbols: Mapping[str, str]
    ) -> None:
        """files: those that silver has, but for such without a tick from `since` on (gold time in microseconds).

        known: the pairs that silver has. symbols: by `source:asset` the symbol that feeds gold, where only one does.
        """
        self._store, self._symbols = store, symbols
        # Prices and alerts look at the same time.
        self._reading = threading.Lock()
        # Gold times from which on the files that are known have all ticks.
        self._floors = dict.fromkeys(known, since)
        self._floor = 0
        self._files: deque[tuple[int, int, DataFile]] = deque()
        # By file and row group; the bounds of a file's row groups by file.
        self._tables: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._kept = 0
        self._groups: OrderedDict[str, list[_Group]] = OrderedDict()
        self.add(sorted(files, key=lambda file: max(file.highest[name] for name in TIMES)))

    def add(self, files: Iterable[DataFile]) -> None:
        """Files that were committed."""
        for file in files:
            first, last = (
                [to_micros(datetime.fromisoformat(told[name])) for name in TIMES]
                for told in (file.lowest, file.highest)
            )
            # Delta's statistics are cut to milliseconds.
            self._files.append((min(first), max(last) + 1_000, file))
        while len(self._files) > KEPT_FILES:
            self._floor = max(self._floor, self._files.popleft()[1])

    def ticks(self, pairs: Collection[Pair], ranges: Sequence[Range]) -> list[tuple[Pair, AlertTick]] | None:
        """The ticks of pairs whose gold times lie in one of the ranges, in tick order; None if there may be others."""
        rows = self._rows(pairs, ranges)
        if rows is None:
            return None
        by_order = pc.sort_indices(rows, [(name, "ascending", "at_start") for name in ORDER])
        names = ("source", "asset", "symbol", "gold_time", "price_usd", "event_id")
        columns = [rows[name].take(by_order).to_pylist() for name in names]
        return [
            ((source, asset), AlertTick(*tick))
            for source, asset, symbol, *tick in zip(*columns, strict=True)
            if feeds(self._symbols, (source, asset), symbol)
        ]

    def buckets(self, pairs: Collection[Pair], time: Range) -> dict[Pair, dict[int, Summary]] | None:
        """The buckets of pairs from one gold time to before another; None if there may be other ticks."""
        rows = self._rows(pairs, [time])
        if rows is None:
            return None
        found: dict[Pair, dict[int, Summary]] = defaultdict(dict)
        for symbol, bucket in buckets(rows.drop_columns(["gold_time"])):
            if feeds(self._symbols, bucket.pair, symbol):
                there = found[bucket.pair]
                known = there.get(bucket.number)
                there[bucket.number] = known.merged(bucket.summary) if known else bucket.summary
        return found

    def _rows(self, pairs: Collection[Pair], ranges: Sequence[Range]) -> pa.Table | None:
        """The ticks of pairs whose gold times lie in one of the ranges; None if there may be others, or too many."""
        begin = min(begin for begin, _ in ranges)
        if begin < max(self._floor, *(self._floors.get(pair, 0) for pair in pairs)):
            return None

        def asked(first: int, last: int) -> bool:
            return any(first < end and last > begin for begin, end in ranges)

        with self._reading:
            files = [file for first, last, file in self._files if asked(first, last)]
            if sum(file.rows for file in files if file.size <= SMALL_FILE) > MOST_ROWS:
                return None
            self._fetch([file for file in files if file.path not in self._groups and file.size <= SMALL_FILE])
            wanted = [
                (file, [number for number, group in enumerate(self._groups_of(file)) if asked(group.first, group.last)])
                for file in files
            ]
            if sum(self._groups_of(file)[number].rows for file, numbers in wanted for number in numbers) > MOST_ROWS:
                return None
            chosen = _within(pairs, ranges)
            parts = [table.filter(chosen) for file, numbers in wanted for table in self._read(file, numbers)]
            while self._kept > KEPT_ROWS:
                self._kept -= self._tables.popitem(last=False)[1].num_rows
        return pa.concat_tables(parts) if parts else _NONE

    def _fetch(self, files: Sequence[DataFile]) -> None:
        """Have small files, whole."""
        if not files:
            return
        with ThreadPoolExecutor(FETCHED) as threads:
            for file, content in zip(files, threads.map(lambda file: self._store.read(file.path), files), strict=True):
                opened = pq.ParquetFile(io.BytesIO(content))
                self._learn(file, opened)
                for number in range(opened.num_row_groups):
                    self._keep(file, number, opened)

    def _learn(self, file: DataFile, opened: pq.ParquetFile) -> None:
        self._groups[file.path] = [_group(opened.metadata.row_group(number)) for number in range(opened.num_row_groups)]
        while len(self._groups) > 2 * KEPT_FILES:
            self._groups.popitem(last=False)

    def _groups_of(self, file: DataFile) -> list[_Group]:
        """The row groups of a file."""
        if file.path not in self._groups:
            with self._opened(file) as opened:
                self._learn(file, opened)
        return self._groups[file.path]

    def _read(self, file: DataFile, numbers: Sequence[int]) -> list[pa.Table]:
        """Row groups of a file, with those columns that prices and alerts need."""
        if missing := [number for number in numbers if (file.path, number) not in self._tables]:
            with self._opened(file) as opened:
                for number in missing:
                    self._keep(file, number, opened)
        return [self._tables[file.path, number] for number in numbers]

    def _keep(self, file: DataFile, number: int, opened: pq.ParquetFile) -> None:
        rows = _with_gold_time(opened.read_row_group(number, _COLUMNS))
        self._tables[file.path, number] = rows
        self._kept += rows.num_rows

    def _opened(self, file: DataFile) -> pq.ParquetFile:
        if file.size > SMALL_FILE:
            # A row group's columns lie side by side, so that reading ahead is worth it.
            return pq.ParquetFile(self._store.open(file.path, file.size))
        return pq.ParquetFile(io.BytesIO(self._store.read(file.path)))


class _Group(NamedTuple):
    """A row group: how many rows, and the gold times that they may have, in microseconds since 1970."""

    rows: int
    first: int
    last: int


_COLUMNS = [*("source", "asset", "symbol", "price_usd", "quantity"), *ORDER[1:], *TIMES, "is_future"]


def _with_gold_time(rows: pa.Table) -> pa.Table:
    """And gold_time, in microseconds since 1970."""
    time = pc.if_else(rows["is_future"], rows["received_at"], rows["event_time"])
    return rows.append_column("gold_time", time.cast(pa.int64()))


_NONE = _with_gold_time(as_stored(SILVER_TICKS, arrow_table(SILVER_TICKS, [])).select(_COLUMNS))


def _group(told: pq.RowGroupMetaData) -> _Group:
    columns = (told.column(number) for number in range(told.num_columns))
    times = [c.statistics for c in columns if c.path_in_schema in TIMES]
    return _Group(
        told.num_rows, min(to_micros(time.min) for time in times), max(to_micros(time.max) for time in times) + 1
    )


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
