"""Compaction: join a table's small files to larger ones, without a change of rows.

Files are joined in the order of their time, so that files and row groups cover short periods, which readers skip. A
file belongs to one of four sizes. Neighbours of a size, or smaller, are joined once there are FAN_IN of them, or enough
for a whole joined file. So a row is written about three times more, and a partition has at most some fifty small files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain, groupby
from typing import Any

import pyarrow as pa

from lake.delta.checkpoint import ORDERED_BY
from lake.delta.files import Files
from lake.delta.log import DataFile
from lake.delta.parquet import Contents, ContentsDiffer, EncodedFile, joined_file, parts_of
from lake.tables import Table
from lake.times import to_micros

FAN_IN = 16
APPENDED_BYTES = 32 << 20
"""The size of a joined file of rows that never change. The driver has one such file in memory at a time."""
CHANGING_BYTES = 8 << 20
"""Of rows that change: a late tick replaces a whole file."""
_SIZES = (64, 8, 2)
"""A file is small below these parts of a joined file's size. A file of at least half the size is left alone."""


def joined_bytes(table: Table) -> int:
    """The size of a joined file, in bytes; 0 if files of this table are not joined."""
    if table.file_time:
        return CHANGING_BYTES
    return APPENDED_BYTES if table.arrival_time else 0


def small_bytes(table: Table) -> int:
    """A file below so many bytes is small, so that it will be joined with others."""
    return joined_bytes(table) // _SIZES[-1]


def due(
    table: Table,
    files: Sequence[DataFile],
    is_closed: Callable[[DataFile], bool],
    *,
    most_bytes: int = 0,
    fan_in: int = FAN_IN,
    sizes: Sequence[int] = _SIZES,
) -> list[list[DataFile]]:
    """The groups of files to join now, each in the order of time.

    is_closed: whether a file may be joined already. most_bytes: the size of a joined file; default: joined_bytes.
    sizes: a file is small below these parts of it.
    """
    most_bytes = most_bytes or joined_bytes(table)
    groups: list[list[DataFile]] = []
    taken: set[str] = set()
    for part in sizes:
        small = {file.path for file in files if file.size < most_bytes // part and is_closed(file)} - taken
        for run in _runs(table, files, small):
            for group, is_full in _cut(run, most_bytes):
                if len(group) >= fan_in or (is_full and len(group) > 1):
                    groups.append(group)
                    taken |= {file.path for file in group}
    return groups


def _runs(table: Table, files: Iterable[DataFile], chosen: Collection[str]) -> Iterator[list[DataFile]]:
    """Neighbours by partition and time whose paths are all chosen."""
    timed = [(_partition(file), ends, file) for file in files if (ends := _ends(table, file))]
    for _, items in groupby(sorted(timed, key=lambda item: item[:2]), key=lambda item: item[0]):
        run: list[DataFile] = []
        last = -1
        for _, (first, end), file in items:
            # A file of rows that change has whole spans: a joined file must not reach over another one.
            is_neighbour = file.path in chosen and (first > last or not table.file_time)
            if not is_neighbour and run:
                yield run
                run = []
            if is_neighbour:
                run.append(file)
            last = max(last, end)
        if run:
            yield run


def _cut(run: Iterable[DataFile], most_bytes: int) -> Iterator[tuple[list[DataFile], bool]]:
    """The run in groups of at most so many bytes, and whether the next file has no room in the group."""
    group: list[DataFile] = []
    size = 0
    for file in run:
        if group and size + file.size > most_bytes:
            yield group, True
            group, size = [], 0
        group.append(file)
        size += file.size
    yield group, False


def _partition(file: DataFile) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(file.add["partitionValues"].items()))


def _ends(table: Table, file: DataFile) -> tuple[int, int] | None:
    """The lowest and highest time of a file, in microseconds since 1970; None if its statistics lack them."""
    column = table.file_time or table.arrival_time
    try:
        lowest, highest = (datetime.fromisoformat(values[column]) for values in (file.lowest, file.highest))
    except KeyError:
        return None
    return to_micros(lowest), to_micros(highest)


def is_sorted(table: Table, file: DataFile) -> bool:
    """Whether the file's rows are in the table's settled_order."""
    return bool((file.add.get("tags") or {}).get(ORDERED_BY) == ",".join(table.settled_order))


def join(files: Files, table: Table, group: Sequence[DataFile], order: Sequence[str] = ()) -> EncodedFile:
    """One file of the group's rows, in the group's order; it is not written yet.

    The group is of one partition. order: columns by which the rows are sorted; all of them are in memory then.
    Raises ContentsDiffer if a row would be lost or changed, FileNotFoundError and StoreError.
    """
    partition = group[0].add["partitionValues"]
    parts: Iterable[pa.Table] = chain.from_iterable(
        parts_of(files, table, file.path, file.size, partition) for file in group
    )
    unsorted = Contents(table)
    if order:
        rows = pa.concat_tables(parts)
        unsorted.add(rows)
        parts = [rows.sort_by([(name, "ascending") for name in order])]
    encoded, contents = joined_file(table, parts, partition)
    if order and contents != unsorted:
        raise ContentsDiffer(f"{table.qualified_name}: a sorted file has {contents} instead of {unsorted}")
    expected = sum(file.rows for file in group)
    if all(file.rows for file in group) and contents.rows != expected:
        raise ContentsDiffer(f"{table.qualified_name}: {len(group)} files have {contents.rows} rows, not {expected}")
    return replace(encoded, action={**encoded.action, "tags": {ORDERED_BY: ",".join(order)}}) if order else encoded
