"""A repair beside the stream: rows of some spans of time put in the place of those that a table has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import polars as pl

from lake.delta.files import Files
from lake.delta.frames import cut, read_rows, span_of, typed
from lake.delta.live import LiveFiles
from lake.delta.log import DataFile, TableLog, added_by, redefines, removed_by
from lake.delta.parquet import as_stored, encoded_file
from lake.tables import Table

THREADS = 8


def rewrite(
    files: Files, table: Table, root: str, known: Iterable[DataFile], spans: Collection[int], rows: pl.DataFrame
) -> list[int]:
    """Let `rows` be all rows of these spans. Returns the spans that were not written.

    known: the files of the version that the rows were computed for. A span that another file may hold by now is left
    alone. A file that is replaced may hold other spans too: their rows stay as they are.
    """
    log = TableLog(files, table.path(root))
    version = log.newest()
    live = LiveFiles(table, log.files(version))
    names, left = {file.path for file in known}, set[int]()
    for file in live.touching(spans):
        held = live.spans(file)
        if held is None:
            return sorted(spans)
        if file.path not in names:
            left |= {span for span in spans if span in held}
    written = set(spans) - left
    replaced = live.touching(written)
    live.remove(file.add["path"] for file in replaced)
    is_written = span_of(table).is_in(sorted(written))
    new = typed(table, rows).filter(is_written)
    kept = [read_rows(files, table, file).filter(~is_written) for file in replaced]
    pieces = cut(table, pl.concat([new, *kept]), lambda first, end: bool(live.between(first, end)))
    with ThreadPoolExecutor(THREADS) as threads:
        added = list(threads.map(lambda rows: log.add(encoded_file(table, as_stored(table, rows.to_arrow()))), pieces))
    if not added and not replaced:
        return sorted(left)
    while not log.put(version + 1, {"maintenance": "rewrite"}, added, replaced):
        version += 1
        actions = log.actions(version)
        gone = removed_by(actions) & {file.add["path"] for file in replaced}
        others = LiveFiles(table, [log.file(action) for action in added_by(actions)])
        if gone or others.touching(written) or redefines(actions):
            return sorted(spans)
    return sorted(left)
