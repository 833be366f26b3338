"""The driver reads back silver's ticks: for the price of a minute ago, and for alerts.

The driver knows silver's files by the times in their statistics, and reads the row groups that a query overlaps. Most
queries need only the last minutes, whose files it has just committed and keeps in memory. An older query reads the log.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import NamedTuple

import polars as pl
import pyarrow.parquet as pq

from lake.contract import Pair
from lake.delta.files import Files
from lake.delta.log import DataFile
from lake.gold.alerts import AlertTick
from lake.gold.summary import PAIR
from lake.times import Range, to_micros, to_time

# A file of up to so many bytes is read whole; of a larger one only the row groups that a question needs.
SMALL_FILE = 512 * 1024
# Limits of the cached rows and of the known files.
KEPT_ROWS = 200_000
KEPT_FILES = 5_000
THREADS = 8
TIMES = ("event_time", "received_at")
ORDER = ("gold_time", "trade_epoch", "trade_id", "producer", "sequence", "event_id")
_COLUMNS = ("source", "asset", "symbol", "quote", "price_usd", *ORDER[1:], *TIMES, "is_future")
_SCHEMA = pl.Schema(
    [
        *((name, pl.String()) for name in ("source", "asset", "symbol", "quote")),
        ("price_usd", pl.Decimal(28, 12)),
        *((name, pl.String() if name in ("producer", "event_id") else pl.Int64()) for name in ORDER),
    ]
)


class _Group(NamedTuple):
    """A row group: its number, and the range of its gold times, in microseconds since 1970."""

    number: int
    first: int
    last: int


class _FileTimes(NamedTuple):
    """A file, and the range of its gold times."""

    first: int
    last: int
    file: DataFile


class Lookback:
    """The ticks that feed gold, by gold time."""

    def __init__(
        self,
        files: Files,
        files_since: Callable[[datetime], Iterable[DataFile]],
        feeds: Callable[[pl.DataFrame], pl.DataFrame],
    ) -> None:
        """files_since: silver.ticks' current files that may have a tick of a time (one of TIMES) or later.

        feeds: keeps the rows that feed gold, by source, asset, symbol.
        """
        self._files, self._all_files_since, self._feeds = files, files_since, feeds
        self._file_times: OrderedDict[str, _FileTimes] = OrderedDict()
        # The files of the last micro-batch.
        self._newest: list[DataFile] = []
        # The known files have all ticks from this gold time on; None: the log has not been read yet.
        self._floor: int | None = None
        self._groups: OrderedDict[str, list[_Group]] = OrderedDict()
        self._rows: OrderedDict[tuple[str, int], pl.DataFrame] = OrderedDict()
        self._row_count = 0
        self._lock = threading.Lock()

    def add(self, files: Iterable[DataFile]) -> None:
        """Add files of silver.ticks, even before their commit."""
        with self._lock:
            self._newest = list(files)
            for file in self._newest:
                self._file_times[file.path] = _file_times(file)
            while len(self._file_times) > KEPT_FILES:
                forgotten = self._file_times.popitem(last=False)[1]
                if self._floor is not None:
                    self._floor = max(self._floor, forgotten.last + 1)

    def replace(self, removed: Iterable[DataFile], added: Iterable[DataFile]) -> None:
        """Replace files by files of the same rows."""
        with self._lock:
            for file in removed:
                self._file_times.pop(file.path, None)
            for file in added:
                self._file_times[file.path] = _file_times(file)

    def ticks(self, ranges: Sequence[Range], pairs: pl.DataFrame | None = None) -> pl.DataFrame:
        """Ticks whose gold times lie in one of the ranges, in tick order. pairs: source, asset; None: all.

        Out: source, asset, symbol, quote, price_usd, ORDER; times in microseconds since 1970.
        """
        with self._lock:
            try:
                parts = [self._feeds(part) for part in self._touching(ranges)]
            except FileNotFoundError:
                # Maintenance has moved the file's rows to another file, and VACUUM has deleted it.
                self._floor = None
                self._file_times = OrderedDict((file.path, _file_times(file)) for file in self._newest)
                parts = [self._feeds(part) for part in self._touching(ranges)]
        within = pl.any_horizontal(pl.col("gold_time").is_between(*ends, closed="left") for ends in ranges)
        rows = pl.concat([part.filter(within) for part in parts]) if parts else pl.DataFrame(schema=_SCHEMA)
        if pairs is not None:
            rows = rows.join(pairs, on=PAIR, how="semi")
        return rows.sort(ORDER)

    def of_pair(self, pair: Pair, ranges: Sequence[Range]) -> list[AlertTick]:
        """One pair's ticks, in tick order."""
        rows = self.ticks(ranges, pl.DataFrame([pair], schema=list(PAIR), orient="row"))
        return [AlertTick(*row) for row in rows.select("gold_time", "price_usd", "event_id").rows()]

    def _touching(self, ranges: Sequence[Range]) -> list[pl.DataFrame]:
        def touches(first: int, last: int) -> bool:
            return any(first < end and last >= begin for begin, end in ranges)

        files = [item.file for item in self._files_since(min(begin for begin, _ in ranges)) if touches(*item[:2])]
        small = [file for file in files if file.path not in self._groups and file.size <= SMALL_FILE]
        if small:
            with ThreadPoolExecutor(min(THREADS, len(small))) as threads:
                for file, content in zip(small, threads.map(lambda f: self._files.read(f.path), small), strict=True):
                    self._read(file, pq.ParquetFile(io.BytesIO(content)), touches)
        parts: list[pl.DataFrame] = []
        for file in files:
            groups = self._groups.get(file.path)
            missing = groups is None or any(
                (file.path, group.number) not in self._rows for group in groups if touches(group.first, group.last)
            )
            if missing:
                self._read(file, self._opened(file), touches)
            for group in self._groups[file.path]:
                if touches(group.first, group.last):
                    self._rows.move_to_end((file.path, group.number))
                    parts.append(self._rows[file.path, group.number])
        while self._row_count > KEPT_ROWS and len(self._rows) > 1:
            self._row_count -= self._rows.popitem(last=False)[1].height
        while len(self._groups) > KEPT_FILES:
            self._groups.popitem(last=False)
        return parts

    def _files_since(self, begin: int) -> Iterable[_FileTimes]:
        """All files that may have ticks from a gold time on, and perhaps others."""
        if self._floor is None or begin < self._floor:
            files = map(_file_times, self._all_files_since(to_time(begin)))
            known = {item.file.path: item for item in (*files, *self._file_times.values())}
            if len(known) > KEPT_FILES:
                # A rare question: later ones will be about newer ticks.
                return list(known.values())
            self._file_times = OrderedDict(sorted(known.items(), key=lambda item: item[1].last))
            self._floor = begin
        return list(self._file_times.values())

    def _read(self, file: DataFile, opened: pq.ParquetFile, touches: Callable[[int, int], bool]) -> None:
        groups = [_group(opened.metadata.row_group(number), number) for number in range(opened.num_row_groups)]
        self._groups[file.path] = groups
        for group in groups:
            if touches(group.first, group.last) and (file.path, group.number) not in self._rows:
                rows = pl.from_arrow(opened.read_row_group(group.number, list(_COLUMNS)))
                assert isinstance(rows, pl.DataFrame)
                rows = _with_gold_time(rows)
                self._rows[file.path, group.number] = rows
                self._row_count += rows.height

    def _opened(self, file: DataFile) -> pq.ParquetFile:
        if file.size > SMALL_FILE:
            # A row group's columns are adjacent, so reading ahead pays.
            return pq.ParquetFile(self._files.open(file.path, file.size))
        return pq.ParquetFile(io.BytesIO(self._files.read(file.path)))


def _with_gold_time(rows: pl.DataFrame) -> pl.DataFrame:
    time = pl.when("is_future").then("received_at").otherwise("event_time").cast(pl.Int64)
    return rows.with_columns(gold_time=time).select(_SCHEMA.names()).cast(_SCHEMA)


def _file_times(file: DataFile) -> _FileTimes:
    if not all(name in ends for ends in (file.lowest, file.highest) for name in TIMES):
        # Without statistics: ticks of any time.
        return _FileTimes(0, 2**62, file)
    ends = [
        [to_micros(datetime.fromisoformat(values[name])) for name in TIMES] for values in (file.lowest, file.highest)
    ]
    # Delta's statistics are truncated to milliseconds.
    return _FileTimes(min(ends[0]), max(ends[1]) + 1_000, file)


def _group(group: pq.RowGroupMetaData, number: int) -> _Group:
    columns = (group.column(index) for index in range(group.num_columns))
    times = [column.statistics for column in columns if column.path_in_schema in TIMES]
    return _Group(number, min(to_micros(time.min) for time in times), max(to_micros(time.max) for time in times) + 1)
