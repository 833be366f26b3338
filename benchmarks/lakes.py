"""Make a lake old: let it have many commits behind it as upkeep leaves them, or as nothing has kept them up.

A lake of 200,000 commits is not made by 200,000 commits, which take an hour: a reader sees only what is in the folders.
The lake's writer must not run meanwhile. Every function raises StoreError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from uuid import uuid4

import polars as pl

from lake.delta.files import Files
from lake.delta.frames import read_rows
from lake.delta.log import DataFile, TableLog
from lake.delta.parquet import as_stored, encoded_file
from lake.tables import GOLD_PRICE_1M, SILVER_TICKS, STREAMED, Table

# A log that is kept up has a checkpoint and at most about so many commits after it.
TAIL = 50
THREADS = 16
_NUMBERED = re.compile(r"([0-9]{20})(\..+)")
# The longer windows' commits name the version of gold.price_1m up to which they go.
_MINUTES_VERSION = "minutes_version"


def age(files: Files, root: str, commits: int, kept: int = 0) -> None:
    """Let each table have `commits` commits behind it: its versions get higher numbers, as if older ones were cleaned.

    kept: so many commits without a change of rows are put before the table's own, as a horizon keeps them. Raises
    ValueError if a table has more commits already.
    """
    logs = {table.qualified_name: TableLog(files, table.path(root)) for table in STREAMED}
    by = {table: commits - log.newest() for table, log in logs.items()}
    for table, log in logs.items():
        versions = _versions(files, log)
        # The new numbers must not meet the old ones.
        if by[table] <= versions[-1] - versions[0] or by[table] + versions[0] < kept:
            raise ValueError(f"{table} has versions {versions[0]} to {versions[-1]}: {commits} are too few")
    for table, log in logs.items():
        if _pointer(files, log).get("version", -1) < max(0, log.newest() - TAIL):
            log.checkpoint(max(0, log.newest() - TAIL))
        _renumber(files, log, by[table], by[GOLD_PRICE_1M.qualified_name])
        first, *others = _versions(files, log)
        _precede(files, log, first, kept - len(others))
    _rename(files, f"{SILVER_TICKS.path(root)}/_seen", by[SILVER_TICKS.qualified_name])


def _versions(files: Files, log: TableLog) -> list[int]:
    """The versions of which the log has a commit."""
    matches = (_NUMBERED.fullmatch(status.name) for status in files.list(f"{log.path}/_delta_log"))
    return [int(match[1]) for match in matches if match and match[2] == ".json"]


def _pointer(files: Files, log: TableLog) -> dict[str, Any]:
    """What the log says of its last checkpoint; empty if there is none."""
    try:
        return dict(json.loads(files.read(f"{log.path}/_delta_log/_last_checkpoint")))
    except FileNotFoundError:
        return {}


def _renumber(files: Files, log: TableLog, by: int, minutes_by: int) -> None:
    """Raise the numbers of a log's versions."""
    folder = f"{log.path}/_delta_log"
    pointer = _pointer(files, log)
    _rename(files, folder, by)
    pointer["version"] += by
    files.replace(f"{folder}/_last_checkpoint", json.dumps(pointer).encode())
    for version in range(pointer["version"], log.newest() + 1):
        if _MINUTES_VERSION not in log.metadata(version):
            continue
        for action in (actions := log.actions(version)):
            if info := action.get("commitInfo"):
                metadata = json.loads(info["userMetadata"])
                metadata[_MINUTES_VERSION] += minutes_by
                info["userMetadata"] = json.dumps(metadata)
        content = "".join(json.dumps(action) + "\n" for action in actions)
        files.replace(f"{folder}/{version:020d}.json", content.encode())


def _rename(files: Files, folder: str, by: int) -> None:
    """Raise the numbers with which the names of a folder's files begin."""

    def rename(name: str) -> None:
        match = _NUMBERED.fullmatch(name)
        if match and not files.rename(f"{folder}/{name}", f"{folder}/{int(match[1]) + by:020d}{match[2]}"):
            raise FileExistsError(f"{folder}/{name} cannot be renumbered by {by}")

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(rename, [status.name for status in files.list(folder)]))


def _precede(files: Files, log: TableLog, first: int, count: int) -> None:
    """Write commits that change no rows before version `first`."""
    info = {"timestamp": 0, "operation": "WRITE", "operationParameters": {"mode": "Append"}, "isBlindAppend": True}
    content = (json.dumps({"commitInfo": info}) + "\n").encode()
    with ThreadPoolExecutor(THREADS) as threads:
        versions = range(max(0, first - count), first)
        list(threads.map(lambda version: files.write(f"{log.path}/_delta_log/{version:020d}.json", content), versions))


def neglect(files: Files, root: str, data_files: int, commits: int) -> tuple[int, int]:
    """Give a lake many small data files and many commits, spread over its tables, without a change of its rows.

    Tables that only grow get their rows split into small files, of one row at least. The others get files that were
    replaced by the next, one a commit. Returns the number of data files and of commits that were made.
    """
    tables = [table for table in STREAMED if TableLog(files, table.path(root)).files()]
    growing = [table for table in tables if table.properties.get("delta.appendOnly") == "true"]
    commits_each = max(1, commits // len(tables))
    pieces = max(1, (data_files - commits_each * (len(tables) - len(growing))) // len(growing))
    made = []
    for table in tables:
        log = TableLog(files, table.path(root))
        if table in growing:
            made.append(_split(files, table, log, pieces, commits_each))
        else:
            made.append((_replace_often(files, log, commits_each), commits_each))
    _move_snapshot(files, root)
    return sum(count for count, _ in made), sum(count for _, count in made)


def _split(files: Files, table: Table, log: TableLog, count: int, commits: int) -> tuple[int, int]:
    """Replace the table's files by some `count` smaller ones, in so many commits. Returns the numbers of both."""
    version, old = log.newest(), log.files()
    rows = pl.concat([read_rows(files, table, file) for file in old])
    pieces = [
        part.slice(begin, length)
        for part in (rows.partition_by(table.partitioned_by) if table.partitioned_by else [rows])
        for length in [max(1, rows.height // count)]
        for begin in range(0, part.height, length)
    ]

    def add(piece: pl.DataFrame) -> DataFile:
        return log.add(encoded_file(table, as_stored(table, piece.to_arrow())))

    with ThreadPoolExecutor(THREADS) as threads:
        added = list(threads.map(add, pieces))
    groups = [added[number::commits] for number in range(min(commits, len(added)))]
    _put(log, version, [(group, old if number == 0 else []) for number, group in enumerate(groups)])
    return len(added), len(groups)


def _replace_often(files: Files, log: TableLog, commits: int) -> int:
    """Replace one of the table's files by a copy of itself, and that by another, in so many commits: as many files."""
    version, (file, *_) = log.newest(), log.files()
    content, chain = files.read(file.path), [file]
    folder, _, _ = file.add["path"].rpartition("/")
    for _ in range(commits):
        name = f"{folder}/part-{uuid4()}.snappy.parquet".lstrip("/")
        chain.append(log.file({**file.add, "path": name}))
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda copy: files.write(copy.path, content), chain[1:]))
    _put(log, version, [([new], [old]) for old, new in pairwise(chain)])
    return commits


def _put(log: TableLog, version: int, changes: Sequence[tuple[Sequence[DataFile], Sequence[DataFile]]]) -> None:
    """Commit these additions and removals after a version, and a checkpoint.

    The commits name the stream's last micro-batch, as the stream's own do, but add nothing to its state.
    """
    metadata = _last_batch(log, version)

    def put(number: int, change: tuple[Sequence[DataFile], Sequence[DataFile]]) -> None:
        added, removed = change
        if not log.put(number, metadata, added, removed, data_change=False):
            raise FileExistsError(f"{log.path} has a version {number}: somebody else writes this lake")

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(put, range(version + 1, version + 1 + len(changes)), changes))
    log.checkpoint()


def _last_batch(log: TableLog, version: int) -> dict[str, Any]:
    for number in range(version, -1, -1):
        metadata = log.metadata(number)
        if "batch" in metadata:
            return {name: value for name, value in metadata.items() if name not in ("delta", "early", "seen")}
    return {}


def _move_snapshot(files: Files, root: str) -> None:
    """Let the newest snapshot of silver's state be that of the newest version, which has the same rows."""
    folder, newest = f"{SILVER_TICKS.path(root)}/_seen", TableLog(files, SILVER_TICKS.path(root)).newest()
    *_, name = (status.name for status in files.list(folder))
    match = _NUMBERED.fullmatch(name)
    assert match, f"{folder} has snapshots of versions"
    files.rename(f"{folder}/{name}", f"{folder}/{newest:020d}{match[2]}")
