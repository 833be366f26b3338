"""Rows that change, as Polars frames: read by spans of time, changed, and committed.

A table whose rows change (lake.tables.Table.file_time) has whole spans of time in each file. A change replaces the
files of the spans that it touches; no other file is read or written. A data file never changes, so rows are cached by
file, and files from maintenance are read like any new file.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import polars as pl

from lake.delta import frames
from lake.delta.frames import cut, read_rows, schema_of, span_of
from lake.delta.log import DataFile
from lake.delta.parquet import as_stored
from lake.delta.writer import Changed, LakeWriter
from lake.tables import Table

logger = logging.getLogger(__name__)

# The cache keeps so many rows, and more only if the last micro-batch used them.
KEPT_ROWS = 100_000
THREADS = 8
TRIES = 10


class Batch(NamedTuple):
    """A micro-batch: the query, its number, and when it began."""

    query: str
    number: int
    at: datetime


class Sink(Protocol):
    """A receiver of gold's changes outside Delta."""

    def changed(self, table: Table, pieces: dict[int, pl.DataFrame], gone: Collection[int], rows: pl.DataFrame) -> None:
        """A change was committed.

        pieces: first span -> all rows of each new file. gone: first spans of files without a successor.
        rows: the new and changed rows.
        """


@dataclass
class Change:
    """A change of a table, computed but not committed yet."""

    replaced: list[DataFile]
    # All rows of the files that replace these.
    pieces: list[pl.DataFrame]
    upserts: pl.DataFrame
    committed: bool = False


Changes = tuple[pl.DataFrame, pl.DataFrame | None]
"""New and changed rows, and the keys of deleted rows (None: no row is deleted)."""


class Slices:
    """The rows of one table, with a cache of those in use."""

    def __init__(self, writer: LakeWriter, table: Table, sink: Sink | None = None, kept_rows: int = KEPT_ROWS) -> None:
        self.table = table
        self._writer, self._sink, self._kept_rows = writer, sink, kept_rows
        self._schema = schema_of(table)
        # By file path; the last used last.
        self._rows: OrderedDict[str, pl.DataFrame] = OrderedDict()
        self._used: set[str] = set()
        self._lock = threading.Lock()

    def empty(self) -> pl.DataFrame:
        """No rows."""
        return pl.DataFrame(schema=self._schema)

    def load(self, spans: Collection[int], pending: Change | None = None) -> pl.DataFrame:
        """The rows of these spans, as of the pending change if there is one. Raises Fenced, StoreError."""
        if pending is None:
            return self._within(self.rows_of(self._writer.live(self.table).touching(spans)), spans)
        with self._lock:
            files = self._writer.live(self.table).touching(spans)
            if not pending.committed:
                replaced = {file.path for file in pending.replaced}
                files = [file for file in files if file.path not in replaced]
            parts = [self._cached(files), *(() if pending.committed else pending.pieces)]
        return self._within(pl.concat(parts), spans)

    def rows_of(self, files: Sequence[DataFile]) -> pl.DataFrame:
        """All rows of these files."""
        with self._lock:
            return self._cached(files)

    def _cached(self, files: Sequence[DataFile]) -> pl.DataFrame:
        if missing := [file for file in files if file.path not in self._rows]:
            with ThreadPoolExecutor(min(THREADS, len(missing))) as threads:
                for file, rows in zip(missing, threads.map(self._read, missing), strict=True):
                    self._rows[file.path] = rows
        for file in files:
            self._rows.move_to_end(file.path)
            self._used.add(file.path)
        parts = [self._rows[file.path] for file in files]
        return pl.concat(parts) if parts else self.empty()

    def written(self, batch: Batch) -> bool:
        """Whether the table has a micro-batch already."""
        return batch.number <= self._writer.batch(self.table)

    def prepare(self, spans: Collection[int], change: Callable[[pl.DataFrame], Changes]) -> Change:
        """Compute a change of these spans. change: maps their rows (perhaps with others) to the changes."""
        live = self._writer.live(self.table)
        replaced = live.touching(spans)
        if growing := self._growing(spans):
            replaced = list({file.path: file for file in (*replaced, growing)}.values())
        before = self.rows_of(replaced)
        upserts, deleted = change(before)
        key = list(self.table.key)
        after = before.join(upserts.select(key), on=key, how="anti")
        if deleted is not None:
            after = after.join(deleted.select(key), on=key, how="anti")
        upserts = upserts.select(self._schema.names()).cast(self._schema)
        paths = {file.path for file in replaced}

        def is_interrupted(first: int, end: int) -> bool:
            return any(file.path not in paths for file in live.between(first, end))

        return Change(replaced, cut(self.table, pl.concat([after, upserts]), is_interrupted, replaced), upserts)

    def commit(self, change: Change, batch: Batch, **metadata: Any) -> None:
        """Commit a change. Raises Fenced, Changed."""
        pieces = [as_stored(self.table, piece.to_arrow()) for piece in change.pieces]
        firsts = {self._first_span(file) for file in change.replaced} if self._sink else set()
        added = self._writer.replace(self.table, pieces, change.replaced, batch.query, batch.number, **metadata)
        with self._lock:
            self._writer.live(self.table).replace([file.add["path"] for file in change.replaced], added)
            for file in change.replaced:
                self._rows.pop(file.path, None)
            self._rows.update({file.path: rows for file, rows in zip(added, change.pieces, strict=True)})
            self._used.update(file.path for file in added)
            change.committed = True
        if self._sink:
            rows_by_span = {self._first_span(file): rows for file, rows in zip(added, change.pieces, strict=True)}
            self._sink.changed(self.table, rows_by_span, firsts - rows_by_span.keys(), change.upserts)

    def reorganize(
        self, removed: Sequence[DataFile], added: Sequence[DataFile], dropped_before: datetime | None = None
    ) -> bool:
        """As LakeWriter.reorganize; the sink gets the new files' rows."""
        firsts = {self._first_span(file) for file in removed} if self._sink else set()
        if not self._writer.reorganize(self.table, removed, added, dropped_before):
            return False
        with self._lock:
            for file in removed:
                self._rows.pop(file.path, None)
        if self._sink:
            rows_by_span = {self._first_span(file): self._read(file) for file in added}
            self._sink.changed(self.table, rows_by_span, firsts - rows_by_span.keys(), self.empty())
        return True

    def update(
        self,
        batch: Batch,
        spans: Collection[int],
        change: Callable[[pl.DataFrame], Changes],
        *,
        again: bool = False,
        **metadata: Any,
    ) -> None:
        """Compute and commit a change of these spans; again if maintenance changed their files. Raises Fenced.

        again: write even if the table has the micro-batch.
        """
        if not spans or (self.written(batch) and not again):
            return
        for _ in range(TRIES):
            try:
                self.commit(self.prepare(spans, change), batch, **metadata)
            except Changed as error:
                logger.info("%s: the change is computed again", error)
                continue
            return
        raise Changed(f"{self.table.qualified_name} is changed by somebody else again and again")

    def spans_of(self, rows: pl.DataFrame, column: str = "") -> list[int]:
        """The distinct spans of rows, ascending. column: the rows' time; default: the table's file_time."""
        return rows.select(span_of(self.table, column).unique().sort()).to_series().to_list() if rows.height else []

    def forget_unused(self) -> None:
        """After a micro-batch: while the cache exceeds KEPT_ROWS, drop rows that the micro-batch did not use."""
        with self._lock:
            count = sum(rows.height for rows in self._rows.values())
            for path in list(self._rows):
                if count <= self._kept_rows:
                    break
                if path not in self._used:
                    count -= self._rows.pop(path).height
            self._used = set()

    def _growing(self, spans: Collection[int]) -> DataFile | None:
        """The newest file, if it has room for later spans."""
        live = self._writer.live(self.table)
        last = live.last()
        if last is None or last.rows >= frames.ROWS_A_FILE or self.table.file_span is None:
            return None
        its_spans = live.spans(last)
        return last if its_spans and max(spans, default=its_spans[-1]) > its_spans[-1] else None

    def _read(self, file: DataFile) -> pl.DataFrame:
        return read_rows(self._writer.files, self.table, file)

    def _within(self, rows: pl.DataFrame, spans: Collection[int]) -> pl.DataFrame:
        if self.table.file_span is None:
            return rows
        return rows.filter(span_of(self.table).is_in(list(spans)))

    def _first_span(self, file: DataFile) -> int:
        spans = self._writer.live(self.table).spans(file)
        return spans[0] if spans else -1
