"""Checkpoints of a Delta table's log: reading a log in columns, writing a checkpoint, cleaning the log.

A checkpoint has one row per action still in force: the live files, the recently removed files (tombstones, which
VACUUM needs), and the newest of everything else. A busy table gets hundreds of thousands of tombstones a day, so the
rows stay in Arrow columns: only the live files that a caller needs become Python objects.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from io import BytesIO
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lake.delta.files import Files, FileStatus

logger = logging.getLogger(__name__)

_TEXTS = pa.map_(pa.string(), pa.string())
_VECTOR = {
    "storageType": pa.string(),
    "pathOrInlineDv": pa.string(),
    "offset": pa.int32(),
    "sizeInBytes": pa.int32(),
    "cardinality": pa.int64(),
}
_KINDS: dict[str, dict[str, pa.DataType]] = {
    "txn": {"appId": pa.string(), "version": pa.int64(), "lastUpdated": pa.int64()},
    "add": {
        "path": pa.string(),
        "partitionValues": _TEXTS,
        "size": pa.int64(),
        "modificationTime": pa.int64(),
        "dataChange": pa.bool_(),
        "stats": pa.string(),
        "tags": _TEXTS,
        # We write no deletion vectors; TableLog detects them here.
        "deletionVector": pa.struct(_VECTOR),
    },
    "remove": {
        "path": pa.string(),
        "deletionTimestamp": pa.int64(),
        "dataChange": pa.bool_(),
        "extendedFileMetadata": pa.bool_(),
        "partitionValues": _TEXTS,
        "size": pa.int64(),
    },
    "metaData": {
        "id": pa.string(),
        "name": pa.string(),
        "description": pa.string(),
        "format": pa.struct({"provider": pa.string(), "options": _TEXTS}),
        "schemaString": pa.string(),
        "partitionColumns": pa.list_(pa.string()),
        "configuration": _TEXTS,
        "createdTime": pa.int64(),
    },
    "protocol": {
        "minReaderVersion": pa.int32(),
        "minWriterVersion": pa.int32(),
        "readerFeatures": pa.list_(pa.string()),
        "writerFeatures": pa.list_(pa.string()),
    },
}
ROWS = pa.schema({kind: pa.struct(fields) for kind, fields in _KINDS.items()})
"""Actions as Delta's protocol has them in a checkpoint; exactly one column of a row is not null."""

_DICTIONARIES = [
    f"{kind}.{column}"
    for kind in ("add", "remove")
    for column in ("partitionValues.key_value.key", "partitionValues.key_value.value")
]
"""Columns with few distinct values. Without a dictionary the others are written faster, and take no more space."""

ORDERED_BY = "tickhouse.ordered_by"
"""The tag of a data file whose rows are sorted: the columns, with commas."""

_CHECKPOINT = re.compile(r"([0-9]{20})\.checkpoint(?:\.[0-9]{10}\.([0-9]{10}))?\.parquet")
_NUMBERED = re.compile(r"\.?([0-9]{20})\.")
"""A file of a version. Hidden ones are drafts, or checksums that Hadoop keeps on local disks."""
_FIRST = "0"
"""Sorts before every file of a version, and after hidden files."""
_V2_CHECKPOINT = re.compile(r"([0-9]{20})\.checkpoint\.[0-9a-f-]{36}\.(?:json|parquet)")

RETENTION_OF_TOMBSTONES = ("delta.deletedFileRetentionDuration", "interval 7 days")
RETENTION_OF_THE_LOG = ("delta.logRetentionDuration", "interval 30 days")
"""Properties, with Delta's defaults."""
_SECONDS = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400, "week": 604_800}
LEFTOVER_MILLIS = 86_400_000
"""An unfinished or unknown file may be a running process's, unless it has not changed for so long."""

_ROWS_A_PART = 20_000
_PAGE = 1_000
"""HDFS lists so many names per answer."""
_SEARCHED = 20_000
"""How many names one call searches for a checkpoint: some 0.2 s."""
_DELETERS = 8


class UnknownFormat(ValueError):
    """A checkpoint of Delta's checkpoint format 2, which we do not read."""


class Checkpoint(NamedTuple):
    """parts: the number of its numbered files; 0: one file without a number; -1: checkpoint format 2."""

    version: int
    parts: int

    def names(self) -> list[str]:
        """The names of its files. Raises UnknownFormat."""
        if self.parts < 0:
            raise UnknownFormat
        if self.parts == 0:
            return [f"{self.version:020d}.checkpoint.parquet"]
        parts = range(1, self.parts + 1)
        return [f"{self.version:020d}.checkpoint.{part:010d}.{self.parts:010d}.parquet" for part in parts]


def checkpoint_of(name: str) -> Checkpoint | None:
    """The checkpoint to which a log file of this name belongs; None if to none."""
    if match := _CHECKPOINT.fullmatch(name):
        return Checkpoint(int(match[1]), int(match[2] or 0))
    if match := _V2_CHECKPOINT.fullmatch(name):
        return Checkpoint(int(match[1]), -1)
    return None


def rows_of_checkpoint(content: bytes, tombstones: bool, change: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """The rows of one checkpoint file, of any writer. Raises UnknownFormat.

    tombstones: include them. change: what is made of each part of the rows.
    """
    file = pq.ParquetFile(BytesIO(content))
    schema = file.schema_arrow
    if "checkpointMetadata" in schema.names:
        raise UnknownFormat
    # Skip the parsed statistics and partitions: the JSON has them too.
    kinds = [kind for kind in _KINDS if kind in schema.names and (tombstones or kind != "remove")]
    fields = {kind: {field.name for field in schema.field(kind).type} for kind in kinds}
    columns = [f"{kind}.{name}" for kind, names in fields.items() for name in _KINDS[kind] if name in names]
    # In parts: each step copies the rows, and a checkpoint of 500,000 files has 300 MB of them.
    batches = file.iter_batches(_ROWS_A_PART, columns=columns)
    parts = [change(_in_force(pa.Table.from_batches([batch]))) for batch in batches]
    return pa.concat_tables([ROWS.empty_table(), *parts])


def _in_force(rows: pa.Table) -> pa.Table:
    """Rows of a checkpoint as ROWS, without those of other kinds."""
    for field in ROWS:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    rows = rows.select(ROWS.names).cast(ROWS)
    return rows.filter(pl.DataFrame({kind: _is_valid(rows, kind) for kind in _KINDS}).fold(pl.Series.__or__).to_arrow())


def rows_of_commits(commits: Iterable[Sequence[dict[str, Any]]]) -> pa.Table:
    """The actions of these commits as rows; commits are oldest first."""
    # The actions of a commit are unordered: it may remove a file and add it again with other statistics.
    actions = [action for commit in commits for action in sorted(commit, key=lambda action: "remove" not in action)]
    return pa.Table.from_pylist([action for action in actions if not action.keys().isdisjoint(_KINDS)], schema=ROWS)


def newest_of_each(rows: pa.Table) -> pa.Table:
    """The last row of each file, of each application, of the metadata and of the protocol; rows are oldest first."""
    keys = pl.DataFrame(
        {
            "added": _column(rows, "add", "path"),
            "removed": _column(rows, "remove", "path"),
            "application": _column(rows, "txn", "appId"),
            "metadata": _is_valid(rows, "metaData"),
        }
    )
    key = pl.struct(pl.coalesce("added", "removed"), "application", "metadata")
    return rows.filter(keys.select(key.is_last_distinct()).to_series().to_arrow())


def only(rows: pa.Table, kind: str) -> dict[str, Any]:
    """The content of the only row of a kind, without nulls; empty if there is none."""
    for content in rows[kind].drop_null().to_pylist(maps_as_pydicts="strict"):
        return {name: value for name, value in content.items() if value is not None}
    return {}


def has_vectors(rows: pa.Table) -> bool:
    """Whether a live file has a deletion vector."""
    return bool(pc.any(pc.struct_field(rows["add"], "deletionVector").is_valid()).as_py())


def adds(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """The `add` action of each live file, without nulls."""
    for chunk in rows["add"].chunks:
        files = chunk.drop_null()
        columns = {
            field.name: _values(column)
            for field, column in zip(files.type, files.flatten(), strict=True)
            if column.null_count < len(column)
        }
        for values in zip(*columns.values(), strict=True):
            yield {name: value for name, value in zip(columns, values, strict=True) if value is not None}


def _values(column: pa.Array) -> list[Any]:
    """A column's values, maps as dictionaries; three times as fast as to_pylist."""
    if not pa.types.is_map(column.type):
        return list(column.to_pylist())
    keys, items, offsets = column.keys.to_pylist(), column.items.to_pylist(), column.offsets.to_pylist()
    pairs = list(zip(keys, items, strict=True))
    return [dict(pairs[first:end]) for first, end in itertools.pairwise(offsets)]


def reaching(rows: pa.Table, columns: Sequence[str], since: datetime) -> pa.Table:
    """The added files that may have a row in which one of these columns has a time of `since` or later.

    A file is left out only if the statistics of all these columns rule it out.
    """
    files = rows.filter(pc.is_valid(rows["add"]))
    # Statistics are truncated to milliseconds.
    before = since - timedelta(milliseconds=1)
    statistics = pl.col("stats").str
    highest = [
        statistics.json_path_match(f"$.maxValues['{name}']").str.to_datetime(
            "%+", time_unit="us", time_zone="UTC", strict=False
        )
        for name in columns
    ]
    needed = pl.any_horizontal((time > before).fill_null(True) for time in highest)
    stats = pl.DataFrame({"stats": _column(files, "add", "stats")})
    return files.filter(stats.select(needed).to_series().to_arrow())


class EncodedCheckpoint(NamedTuple):
    """A checkpoint's file, and the content of `_last_checkpoint`, which points to it."""

    content: bytes
    pointer: bytes


def expired_tombstones(rows: pa.Table, before: int) -> list[str]:
    """The paths of files that were removed before a time, in milliseconds since 1970; the first removed first."""
    removed = pl.DataFrame(
        {
            "path": _column(rows, "remove", "path"),
            # Delta dates a tombstone without a time to 1970.
            "at": _column(rows, "remove", "deletionTimestamp").fill_null(0),
        }
    )
    return removed.filter(pl.col("path").is_not_null() & (pl.col("at") < before)).sort("at")["path"].to_list()


def paths_of(rows: pa.Table, kind: str) -> list[str]:
    """The paths of all added or removed files; kind: add or remove."""
    return _column(rows, kind, "path").drop_nulls().to_list()


def without_tombstones(rows: pa.Table, paths: Collection[str]) -> pa.Table:
    """The rows without the tombstones of these files."""
    return rows.filter((~_column(rows, "remove", "path").is_in(list(paths)).fill_null(False)).to_arrow())


def without_removed(rows: pa.Table) -> pa.Table:
    """The rows without tombstones, once no older row of their files is left."""
    return rows.filter(pc.is_null(rows["remove"]))


def with_statistics_of(rows: pa.Table, names: Collection[str]) -> pa.Table:
    """The rows; added files keep the statistics of these columns only, which take the most memory."""
    chunks = []
    for chunk in rows["add"].chunks:
        fields = dict(zip(chunk.type.names, chunk.flatten(), strict=True))
        text = pl.col("stats").str
        ends = [
            pl.struct(*(text.json_path_match(f"$.{end}['{name}']").alias(name) for name in sorted(names))).alias(end)
            for end in ("minValues", "maxValues")
            if names
        ]
        count = text.json_path_match("$.numRecords").cast(pl.Int64).alias("numRecords")
        stats = pl.DataFrame({"stats": _series(fields["stats"])}).select(pl.struct(count, *ends).struct.json_encode())
        fields["stats"] = stats.to_series().to_arrow().cast(pa.string())
        chunks.append(pa.StructArray.from_arrays(list(fields.values()), fields=list(chunk.type), mask=chunk.is_null()))
    index = rows.schema.get_field_index("add")
    return rows.set_column(index, ROWS.field("add"), pa.chunked_array(chunks, ROWS.field("add").type))


def columns_of(rows: pa.Table, partitions: Sequence[str], times: Collection[str]) -> pl.DataFrame:
    """The added files as columns: path, size (bytes), modified (milliseconds since 1970), rows, `lowest NAME` and
    `highest NAME` (statistics of the columns `times`, as text), order (the tag ORDERED_BY), and each partition column
    as text."""
    parts = [_columns_of(chunk.drop_null(), partitions, times) for chunk in rows["add"].chunks]
    none = pa.array([], ROWS.field("add").type)
    return pl.concat([_columns_of(none, partitions, times), *parts])


def _columns_of(files: pa.StructArray, partitions: Sequence[str], times: Collection[str]) -> pl.DataFrame:
    def field(name: str) -> pl.Series:
        return _series(pc.struct_field(files, name))

    def of_map(name: str, key: str) -> pl.Series:
        return _series(pc.map_lookup(pc.struct_field(files, name), pa.scalar(key), "first"))

    statistics = field("stats").str
    return pl.DataFrame(
        {
            "path": field("path"),
            "size": field("size"),
            "modified": field("modificationTime"),
            "rows": statistics.json_path_match("$.numRecords").cast(pl.Int64),
            **{f"lowest {name}": statistics.json_path_match(f"$.minValues['{name}']") for name in times},
            **{f"highest {name}": statistics.json_path_match(f"$.maxValues['{name}']") for name in times},
            "order": of_map("tags", ORDERED_BY),
            **{name: of_map("partitionValues", name) for name in partitions},
        }
    )


def _series(values: pa.Array) -> pl.Series:
    series = pl.from_arrow(values)
    assert isinstance(series, pl.Series)
    return series


def smaller(rows: pa.Table, order: str, below: int, limit: int) -> tuple[pa.Table, int]:
    """Up to `limit` added files below a size in bytes, and the number of such files.

    order: a column with statistics; of more than `limit` files those with the highest values.
    """
    sizes = _column(rows, "add", "size")
    chosen = rows.filter((sizes < below).fill_null(False).to_arrow())
    if chosen.num_rows <= limit:
        return chosen, chosen.num_rows
    highest = _column(chosen, "add", "stats").str.json_path_match(f"$.maxValues['{order}']")
    places = highest.arg_sort(descending=True, nulls_last=True).head(limit)
    return chosen.take(places.to_arrow()), chosen.num_rows


def encoded_checkpoint(version: int, rows: pa.Table) -> EncodedCheckpoint:
    """A checkpoint with these rows (`newest_of_each`)."""
    for kind in ("add", "remove"):
        rows = rows.set_column(rows.schema.get_field_index(kind), ROWS.field(kind), _without_change(rows[kind]))
    output = BytesIO()
    pq.write_table(rows, output, compression="snappy", use_dictionary=_DICTIONARIES)
    pointer = {
        "version": version,
        "size": rows.num_rows,
        "sizeInBytes": output.tell(),
        "numOfAddFiles": rows.num_rows - rows["add"].null_count,
    }
    return EncodedCheckpoint(output.getvalue(), json.dumps(pointer).encode())


def _without_change(files: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same adds or removes with dataChange false, as Delta wants them in a checkpoint."""
    chunks = []
    for chunk in files.chunks:
        columns = dict(zip(chunk.type.names, chunk.flatten(), strict=True))
        columns["dataChange"] = pa.repeat(pa.scalar(False), len(chunk))
        chunks.append(pa.StructArray.from_arrays(list(columns.values()), fields=list(chunk.type), mask=chunk.is_null()))
    return pa.chunked_array(chunks, files.type)


def _column(rows: pa.Table, kind: str, name: str) -> pl.Series:
    column = pl.from_arrow(pc.struct_field(rows[kind], name))
    assert isinstance(column, pl.Series)
    return column


def _is_valid(rows: pa.Table, kind: str) -> pl.Series:
    column = pl.from_arrow(rows[kind].is_valid())
    assert isinstance(column, pl.Series)
    return column


def expired_before(configuration: Mapping[str, str], retention: tuple[str, str], now: int) -> int:
    """The time before which things have expired, by a property of the table; in milliseconds since 1970.

    0, so that nothing expires, if we cannot parse the property.
    """
    name, default = retention
    text = configuration.get(name, default)
    words = text.lower().removeprefix("interval ").split()
    try:
        # zip of no words would make an interval of 0 seconds.
        units = zip(words[::2], words[1::2], strict=True) if words else [("", "")]
        return now - 1_000 * sum(int(number) * _SECONDS[unit.removesuffix("s")] for number, unit in units)
    except (ValueError, KeyError):
        logger.warning("%s is %r, which we cannot read: nothing expires. Write it as %r", name, text, default)
        return 0


class LogCleaner:
    """Deletes log files that no reader needs any more. folder: the URL of the log.

    Once a checkpoint has expired, the versions before it have too, and files that only they need may go. A file's own
    modification time counts: a copied log is kept as long as a new one.
    """

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._folder = files, folder
        # Files up to the name `searched` have expired; `superseding` is the version of the last checkpoint among them.
        self._expired_before = 0
        self._searched, self._superseding = _FIRST, -1

    def clean(self, expired_before: int, now: int, limit: int, keep: int | None = None, superseding: int = -1) -> int:
        """Delete at most `limit` files older than a time, the oldest first, and return their number.

        A log that was not cleaned for long takes several calls: each reads a bounded part of it. keep: files from this
        version on stay. superseding: a version that has expired, although its checkpoint is younger.
        """
        if expired_before < self._expired_before:
            # The retention has become longer.
            self._searched, self._superseding = _FIRST, -1
        self._expired_before = expired_before
        self._search(expired_before)
        self._superseding = max(self._superseding, superseding)
        end = self._superseding if keep is None else min(self._superseding, keep)
        names = list(itertools.islice(self._deletable(expired_before, now, end), limit))
        with ThreadPoolExecutor(_DELETERS) as threads:
            list(threads.map(self._files.delete, (f"{self._folder}/{name}" for name in names)))
        return len(names)

    def _search(self, expired_before: int) -> None:
        """Find the newest expired checkpoint."""
        parts = Counter[Checkpoint]()
        for status in itertools.islice(listed(self._files, self._folder, self._searched), _SEARCHED):
            if not status.name[0].isdigit() or status.modified >= expired_before:
                return
            self._searched = status.name
            if checkpoint := checkpoint_of(status.name):
                parts[checkpoint] += 1
                if parts[checkpoint] >= checkpoint.parts:
                    self._superseding = checkpoint.version

    def _deletable(self, expired_before: int, now: int, end: int) -> Iterator[str]:
        """The names of deletable files of versions before `end`, in order: first the drafts of killed processes."""
        for status in listed(self._files, self._folder):
            is_hidden, numbered = status.name.startswith("."), _NUMBERED.match(status.name)
            is_superseded = numbered is not None and int(numbered[1]) < end
            if not is_hidden and not is_superseded:
                return
            is_left_over = is_hidden and status.name.endswith(".tmp") and status.modified < now - LEFTOVER_MILLIS
            if is_left_over or (is_superseded and status.modified < expired_before):
                yield status.name


def listed(files: Files, folder: str, after: str = "") -> Iterator[FileStatus]:
    """The entries of a folder after a name, listed lazily."""
    while page := files.list(folder, after, _PAGE):
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1].name
