"""A repair beside the stream: replace a table's rows of some spans of time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import polars as pl

from lake.delta.beside import Beside
from lake.delta.files import Files
from lake.delta.frames import cut, read_rows, span_of, typed
from lake.delta.live import LiveFiles
from lake.delta.log import Action, DataFile, TableLog, added_by
from lake.delta.parquet import as_stored, encoded_file
from lake.tables import Table

THREADS = 8


def rewrite(
    files: Files, table: Table, root: str, base: Iterable[DataFile], spans: Collection[int], rows: pl.DataFrame
) -> list[int]:
    """Replace all rows of these spans by `rows`. Returns the spans that were not replaced.

    base: the files of the version that the rows were computed from. A span that a newer file may hold is not replaced.
    If a replaced file holds other spans too, their rows stay as they are.
    """
    log = TableLog(files, table.path(root))
    version = log.newest()
    live = LiveFiles(table, log.files(version))
    names, left = {file.path for file in base}, set[int]()
    for file in live.touching(spans):
        file_spans = live.spans(file)
        if file_spans is None:
            return sorted(spans)
        if file.path not in names:
            left |= {span for span in spans if span in file_spans}
    new_spans = set(spans) - left
    replaced = live.touching(new_spans)
    live.remove(file.add["path"] for file in replaced)
    is_written = span_of(table).is_in(sorted(new_spans))
    new = typed(table, rows).filter(is_written)
    other_rows = [read_rows(files, table, file).filter(~is_written) for file in replaced]
    pieces = cut(table, pl.concat([new, *other_rows]), lambda first, end: bool(live.between(first, end)), replaced)
    with ThreadPoolExecutor(THREADS) as threads:
        added = list(threads.map(lambda rows: log.add(encoded_file(table, as_stored(table, rows.to_arrow()))), pieces))
    if not added and not replaced:
        return sorted(left)

    def conflicts(actions: Sequence[Action]) -> bool:
        return bool(LiveFiles(table, [log.file(action) for action in added_by(actions)]).touching(new_spans))

    conflict = Beside(log, version, "rewrite").commit(added, replaced, conflicts=conflicts)
    return sorted(spans if conflict else left)
