"""Checkpoints of a Delta table's log: reading, in columns, what a log says; writing a checkpoint; cleaning the log.

A checkpoint has one row for each action that still counts: the live files, the files removed of late (tombstones,
which VACUUM needs), and the newest of everything else. A busy table has hundreds of thousands of tombstones a day, so
the rows stay in Arrow's columns: only live files that are asked for become Python objects.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        # We write no file with one; TableLog sees here that a file has one.
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
"""Columns in which few values repeat: the others are written faster, and no longer, without a dictionary."""

_CHECKPOINT = re.compile(r"([0-9]{20})\.checkpoint(?:\.[0-9]{10}\.([0-9]{10}))?\.parquet")
_NUMBERED = re.compile(r"\.?([0-9]{20})\.")
"""Files of a version; hidden ones are drafts, and checksums that Hadoop keeps on local disks."""
_FIRST = "0"
"""Files of versions come after this name, hidden ones before it."""
_V2_CHECKPOINT = re.compile(r"([0-9]{20})\.checkpoint\.[0-9a-f-]{36}\.(?:json|parquet)")

RETENTION_OF_TOMBSTONES = ("delta.deletedFileRetentionDuration", "interval 7 days")
RETENTION_OF_THE_LOG = ("delta.logRetentionDuration", "interval 30 days")
"""Properties, with Delta's defaults."""
_SECONDS = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400, "week": 604_800}
_DAY_MILLIS = 86_400_000

_PAGE = 1_000
"""HDFS sends as many names at once."""
_SEARCHED = 20_000
"""So many names of a log are searched for a checkpoint in one call, some 0.2 s."""
_DELETERS = 8


class UnknownFormat(ValueError):
    """A checkpoint of version 2 of Delta's format."""


class Checkpoint(NamedTuple):
    """parts: how many files it has, which have numbers; 0: one file without a number; -1: of version 2."""

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
    """The checkpoint that the file of this name in a log is (a part of); None if it is another file."""
    if match := _CHECKPOINT.fullmatch(name):
        return Checkpoint(int(match[1]), int(match[2] or 0))
    if match := _V2_CHECKPOINT.fullmatch(name):
        return Checkpoint(int(match[1]), -1)
    return None


def rows_of_checkpoint(content: bytes, tombstones: bool) -> pa.Table:
    """The rows of one file of a checkpoint, whoever has written it. tombstones: with them. Raises UnknownFormat."""
    file = pq.ParquetFile(BytesIO(content))
    schema = file.schema_arrow
    if "checkpointMetadata" in schema.names:
        raise UnknownFormat
    # Without the statistics and partitions that are parsed already: they are in JSON too.
    kinds = [kind for kind in _KINDS if kind in schema.names and (tombstones or kind != "remove")]
    fields = {kind: {field.name for field in schema.field(kind).type} for kind in kinds}
    rows = file.read([f"{kind}.{name}" for kind, names in fields.items() for name in _KINDS[kind] if name in names])
    for field in ROWS:
        if field.name not in fields:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    rows = rows.select(ROWS.names).cast(ROWS)
    # Without rows of other kinds.
    return rows.filter(pl.DataFrame({kind: _is_valid(rows, kind) for kind in _KINDS}).fold(pl.Series.__or__).to_arrow())


def rows_of_commits(commits: Iterable[Sequence[dict[str, Any]]]) -> pa.Table:
    """The rows that these commits add to those before; commits are oldest first."""
    # A commit has no order: it may remove a file and add it again with other statistics.
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
    """The content of the only row of a kind, without what is null; empty if there is none."""
    for content in rows[kind].drop_null().to_pylist(maps_as_pydicts="strict"):
        return {name: value for name, value in content.items() if value is not None}
    return {}


def has_vectors(rows: pa.Table) -> bool:
    """Whether a file is added with a deletion vector."""
    return bool(pc.any(pc.struct_field(rows["add"], "deletionVector").is_valid()).as_py())


def adds(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """What the log says of each file that is added, without what is null."""
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
    """The values of a column: those of a map as dictionaries, in a third of the time that to_pylist takes."""
    if not pa.types.is_map(column.type):
        return list(column.to_pylist())
    keys, items, offsets = column.keys.to_pylist(), column.items.to_pylist(), column.offsets.to_pylist()
    pairs = list(zip(keys, items, strict=True))
    return [dict(pairs[first:end]) for first, end in itertools.pairwise(offsets)]


def reaching(rows: pa.Table, columns: Sequence[str], since: datetime) -> pa.Table:
    """The added files that may have a row in which one of these columns has a time of `since` or later.

    A file is left out only if the statistics of all these columns say so.
    """
    files = rows.filter(pc.is_valid(rows["add"]))
    # Statistics are cut to milliseconds.
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
    """A checkpoint's file, and what `_last_checkpoint` says of it."""

    content: bytes
    pointer: bytes


def encoded_checkpoint(version: int, rows: pa.Table, tombstones_since: int) -> EncodedCheckpoint:
    """A checkpoint with these rows (`newest_of_each`), without tombstones of before a time.

    Times are in milliseconds since 1970.
    """
    # A tombstone without a time is one of 1970 to Delta.
    removed = pl.DataFrame(
        {"is": _is_valid(rows, "remove"), "at": _column(rows, "remove", "deletionTimestamp").fill_null(0)}
    )
    rows = rows.filter(removed.select(~pl.col("is") | (pl.col("at") >= tombstones_since)).to_series().to_arrow())
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
    """Adds or removes that change nothing by themselves: a stream that reads a checkpoint sees the files only."""
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
    """What is of before this time has expired, by a property of the table; times in milliseconds since 1970.

    0 if we cannot read the property: then everything is kept.
    """
    name, default = retention
    text = configuration.get(name, default)
    words = text.lower().removeprefix("interval ").split()
    try:
        # Of nothing, Python's zip makes an interval of 0 seconds.
        units = zip(words[::2], words[1::2], strict=True) if words else [("", "")]
        return now - 1_000 * sum(int(number) * _SECONDS[unit.removesuffix("s")] for number, unit in units)
    except (ValueError, KeyError):
        logger.warning("%s is %r, which we cannot read: nothing expires. Write it as %r", name, text, default)
        return 0


class LogCleaner:
    """Deletes the files of a log that nobody needs any more. folder: the URL of the log.

    Where a checkpoint has expired, so has every version before it: what is needed for those only may go. A file's own
    age counts, not its version's place, so that a log that was copied is kept as a new one.
    """

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._folder = files, folder
        # Names up to `searched` have expired; `superseding` is the version of the last checkpoint among them.
        self._expired_before = 0
        self._searched, self._superseding = _FIRST, -1

    def clean(self, expired_before: int, now: int, limit: int) -> int:
        """Delete files older than a time, the oldest first; at most `limit`. How many they were.

        A log that was left alone for long takes several calls: each looks at a bounded part of it.
        """
        if expired_before < self._expired_before:
            # The log is to be kept for longer than it was.
            self._searched, self._superseding = _FIRST, -1
        self._expired_before = expired_before
        self._search(expired_before)
        names = list(itertools.islice(self._deletable(expired_before, now), limit))
        with ThreadPoolExecutor(_DELETERS) as threads:
            list(threads.map(self._files.delete, (f"{self._folder}/{name}" for name in names)))
        return len(names)

    def _search(self, expired_before: int) -> None:
        """Find the newest checkpoint that has expired."""
        parts = Counter[Checkpoint]()
        for status in itertools.islice(self._listed(self._searched), _SEARCHED):
            if not status.name[0].isdigit() or status.modified >= expired_before:
                return
            self._searched = status.name
            if found := checkpoint_of(status.name):
                parts[found] += 1
                if parts[found] >= found.parts:
                    self._superseding = found.version

    def _deletable(self, expired_before: int, now: int) -> Iterator[str]:
        """The names of files that may go, in order: first drafts that a killed process has left."""
        for status in self._listed(""):
            is_hidden, numbered = status.name.startswith("."), _NUMBERED.match(status.name)
            is_superseded = numbered is not None and int(numbered[1]) < self._superseding
            if not is_hidden and not is_superseded:
                return
            is_left_over = is_hidden and status.name.endswith(".tmp") and status.modified < now - _DAY_MILLIS
            if is_left_over or (is_superseded and status.modified < expired_before):
                yield status.name

    def _listed(self, after: str) -> Iterator[FileStatus]:
        """What is in the log after a name, listed as far as it is asked for."""
        while page := self._files.list(self._folder, after, _PAGE):
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].name
