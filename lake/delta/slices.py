"""Rows that change, in columns: read by spans of time, changed, and committed.

A table whose rows change (lake.tables.Table.file_time) has whole spans of time in each file. A change replaces the
files of the spans that it touches; no other file is read or written. A data file never changes, so that rows are
cached by file: what maintenance has replaced is read again by itself.
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

# Rows are kept up to this many, and beyond it those that the last micro-batch has used.
KEPT_ROWS = 100_000
THREADS = 8
TRIES = 10


class Batch(NamedTuple):
    """A micro-batch: the query, its number, and when it began."""

    query: str
    number: int
    at: datetime


class Sink(Protocol):
    """A copy of gold for those without Delta."""

    def changed(self, table: Table, pieces: dict[int, pl.DataFrame], gone: Collection[int], rows: pl.DataFrame) -> None:
        """A change was committed.

        pieces: by its first span all rows of each file that is new. gone: first spans of files that are no more.
        rows: those of the rows that are new or others than before.
        """


@dataclass
class Change:
    """A change of a table that is computed and not yet committed."""

    replaced: list[DataFile]
    # All rows of the files that replace them.
    pieces: list[pl.DataFrame]
    upserts: pl.DataFrame
    committed: bool = False


Changes = tuple[pl.DataFrame, pl.DataFrame | None]
"""Rows that are new or others than before, and the keys of rows that go."""


class Slices:
    """The rows of one table, those in use in memory."""

    def __init__(self, writer: LakeWriter, table: Table, sink: Sink | None = None, kept_rows: int = KEPT_ROWS) -> None:
        self.table = table
        self._writer, self._sink, self._kept_rows = writer, sink, kept_rows
        self._schema = schema_of(table)
        # By a file's path; the last used last.
        self._rows: OrderedDict[str, pl.DataFrame] = OrderedDict()
        self._used: set[str] = set()
        self._lock = threading.Lock()

    def empty(self) -> pl.DataFrame:
        """No rows."""
        return pl.DataFrame(schema=self._schema)

    def load(self, spans: Collection[int], pending: Change | None = None) -> pl.DataFrame:
        """The rows of these spans, as they will be once a pending change is committed. Raises Fenced, StoreError."""
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
        """Compute a change of these spans. change: of the spans' rows (and perhaps others), what becomes of them."""
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

        return Change(replaced, cut(self.table, pl.concat([after, upserts]), is_interrupted), upserts)

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
            named = {self._first_span(file): rows for file, rows in zip(added, change.pieces, strict=True)}
            self._sink.changed(self.table, named, firsts - named.keys(), change.upserts)

    def update(
        self,
        batch: Batch,
        spans: Collection[int],
        change: Callable[[pl.DataFrame], Changes],
        *,
        again: bool = False,
        **metadata: Any,
    ) -> None:
        """Compute a change of these spans and commit it, once more where maintenance was quicker. Raises Fenced.

        again: also if the table has the micro-batch.
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
        """The spans of rows, each once, ascending. column: of their times; default: the table's own."""
        return rows.select(span_of(self.table, column).unique().sort()).to_series().to_list() if rows.height else []

    def forget_unused(self) -> None:
        """At the end of a micro-batch: let go of rows that it has not used, beyond KEPT_ROWS."""
        with self._lock:
            kept = sum(rows.height for rows in self._rows.values())
            for path in list(self._rows):
                if kept <= self._kept_rows:
                    break
                if path not in self._used:
                    kept -= self._rows.pop(path).height
            self._used = set()

    def _growing(self, spans: Collection[int]) -> DataFile | None:
        """The newest file, if later spans than it has are to be added to it."""
        live = self._writer.live(self.table)
        last = live.last()
        if last is None or last.rows >= frames.ROWS_A_FILE or self.table.file_span is None:
            return None
        known = live.spans(last)
        return last if known and max(spans, default=known[-1]) > known[-1] else None

    def _read(self, file: DataFile) -> pl.DataFrame:
        return read_rows(self._writer.files, self.table, file)

    def _within(self, rows: pl.DataFrame, spans: Collection[int]) -> pl.DataFrame:
        if self.table.file_span is None:
            return rows
        return rows.filter(span_of(self.table).is_in(list(spans)))

    def _first_span(self, file: DataFile) -> int:
        spans = self._writer.live(self.table).spans(file)
        return spans[0] if spans else -1
