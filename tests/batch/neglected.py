"""A small lake that nothing has kept up, as tests of batch/maintain.py want it: many small files, a long log."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from batch.maintain import Run, Work, here, maintained
from conf.settings import Settings
from lake.delta.files import Files, LocalDisk
from lake.delta.log import TableLog
from lake.tables import STREAMED, Table
from tests.lake.gold.test_update import delivered
from tests.micro_batches import in_kafka, lake_in, pieces
from tests.oracle import Record


def neglected(folder: Path, seed: int, batches: int, **settings: Any) -> tuple[Settings, list[Record], list[Any]]:
    """Settings of a lake to be, all its records, and the micro-batches to write it by."""
    chance = random.Random(seed)
    records = in_kafka(delivered(chance))
    return lake_in(folder, **settings), records, pieces(records, chance, batches)


def maintain(
    settings: Settings,
    *,
    run: Run | None = here,
    ahead: timedelta = timedelta(seconds=1),
    older_than: timedelta = timedelta(0),
    tables: Sequence[Table] = STREAMED,
    files: Files | None = None,
) -> dict[str, Work]:
    """Maintain the lake by a clock that is ahead. Returns the work by table."""
    now = datetime.now(UTC) + ahead
    work = maintained(files or LocalDisk(), settings, tables, older_than, now, run)
    return {table.table: table for table in work}


def problems(work: dict[str, Work]) -> list[str]:
    """What could not be done."""
    return [problem for table in work.values() for problem in table.problems]


def live_files(settings: Settings, table: Table) -> set[str]:
    """URLs of the newest version's files."""
    return {file.path for file in TableLog(LocalDisk(), table.path(settings.lake_root)).files()}


def stored_files(settings: Settings, table: Table) -> set[str]:
    """URLs of all data files in the table's folder."""
    folder = Path(table.path(settings.lake_root).removeprefix("file:"))
    return {f"file:{path}" for path in folder.rglob("*.parquet") if "_delta_log" not in path.parts}


def log_files(settings: Settings, table: Table) -> list[str]:
    """The names of the log's commits and checkpoints."""
    folder = Path(table.path(settings.lake_root).removeprefix("file:")) / "_delta_log"
    return sorted(path.name for path in folder.iterdir() if path.name[0].isdigit())


def age(settings: Settings, seconds: float) -> None:
    """Let all files of the lake be so many seconds older."""
    for path in Path(settings.lake_root.removeprefix("file:")).rglob("*"):
        at = time.time() - seconds
        os.utime(path, (at, at))
