"""The live files of a table whose rows change, indexed by span of time."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime

from lake.delta.log import DataFile
from lake.tables import Table
from lake.times import to_micros

# The index has cells of so many spans: many short files and one long file are both cheap.
SPANS_A_CELL = 256


class LiveFiles:
    """The files of one version of a table, indexed by span (lake.tables.Table.span)."""

    def __init__(self, table: Table, files: Iterable[DataFile], below: int | None = None) -> None:
        """below: leave out files of so many bytes or more."""
        self._table, self._below = table, below
        self._files: dict[str, tuple[DataFile, range | None]] = {}
        self._cells: dict[int, dict[str, None]] = defaultdict(dict)
        # A file whose statistics lack the time may hold any span.
        self._unknown: dict[str, None] = {}
        self._lock = threading.RLock()
        self.add(files)

    def __len__(self) -> int:
        return len(self._files)

    def all(self) -> list[DataFile]:
        """All files."""
        with self._lock:
            return [file for file, _ in self._files.values()]

    def add(self, files: Iterable[DataFile]) -> None:
        """Add files. A file that is live already, as after ANALYZE, gets its new statistics."""
        with self._lock:
            for file in files:
                path, spans = file.add["path"], self._spans_of(file)
                self.remove([path])
                if self._below is not None and file.size >= self._below:
                    continue
                self._files[path] = (file, spans)
                if spans is None:
                    self._unknown[path] = None
                else:
                    for cell in _cells(spans):
                        self._cells[cell][path] = None

    def replace(self, paths: Iterable[str], files: Iterable[DataFile]) -> None:
        """Replace the files at these paths in one step for readers of other threads."""
        with self._lock:
            self.remove(paths)
            self.add(files)

    def remove(self, paths: Iterable[str]) -> None:
        """Remove the files at these paths, as the log names them."""
        with self._lock:
            for path in paths:
                _, spans = self._files.pop(path, (None, None))
                self._unknown.pop(path, None)
                for cell in _cells(spans) if spans else ():
                    self._cells[cell].pop(path, None)
                    if not self._cells[cell]:
                        del self._cells[cell]

    def has(self, files: Iterable[DataFile]) -> bool:
        """Whether all of these are live."""
        return all(file.add["path"] in self._files for file in files)

    def spans(self, file: DataFile) -> range | None:
        """The spans that a live file may hold; None if its statistics do not say."""
        return self._files[file.add["path"]][1]

    def touching(self, spans: Collection[int]) -> list[DataFile]:
        """The files that may hold rows of these spans, each once."""
        with self._lock:
            near = {path for cell in {span // SPANS_A_CELL for span in spans} for path in self._cells.get(cell, ())}
            chosen = [path for path in near if any(span in (self._files[path][1] or ()) for span in spans)]
            return [self._files[path][0] for path in (*self._unknown, *sorted(chosen))]

    def between(self, first: int, end: int) -> list[DataFile]:
        """The files that may hold rows of a span from `first` to before `end`."""
        cells = range(first // SPANS_A_CELL, (end - 1) // SPANS_A_CELL + 1) if first < end else range(0)
        with self._lock:
            near = {path for cell in cells for path in self._cells.get(cell, ())}
            files = ((path, self._files[path][1]) for path in sorted(near))
            return [self._files[path][0] for path, spans in files if spans and spans[0] < end and spans[-1] >= first]

    def interleave(self, files: Iterable[DataFile], removed: Iterable[DataFile]) -> bool:
        """Whether a live file, but for `removed`, may hold a span among those of one of these files."""
        gone = {file.path for file in removed}
        ranges = [spans for file in files if (spans := self._spans_of(file))]
        return any(file.path not in gone for spans in ranges for file in self.between(spans[0], spans[-1] + 1))

    def last(self) -> DataFile | None:
        """The file with the highest span; None if there is none."""
        with self._lock:
            if not self._cells:
                return None
            paths = self._cells[max(self._cells)]
            path = max(paths, key=lambda path: (self._files[path][1] or range(1))[-1])
            return self._files[path][0]

    def _spans_of(self, file: DataFile) -> range | None:
        if self._table.file_span is None:
            return range(1)
        try:
            ends = [values[self._table.file_time] for values in (file.lowest, file.highest)]
        except KeyError:
            return None
        # Statistics are truncated to milliseconds; no span ends within a millisecond.
        first, last = (self._table.span(to_micros(datetime.fromisoformat(text))) for text in ends)
        return range(first, last + 1)


def _cells(spans: range) -> range:
    return range(spans[0] // SPANS_A_CELL, spans[-1] // SPANS_A_CELL + 1)
