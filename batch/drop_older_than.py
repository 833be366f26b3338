"""Drop a table's old rows: scripts/drop-older-than TABLE DAYS (or --before TIME) [--execute CHECKSUM]

    scripts/drop-older-than silver.ticks 90                                 # show what would go, and its checksum
    scripts/drop-older-than silver.ticks 90 --execute 3f6c0d5be21f4a77      # drop exactly that
    scripts/drop-older-than gold.price_5s --before 2026-11-01T00:00:00Z

Rows go by whole files, whose rows are all from before the time; by Table.age_time in lake/tables.py. Rows in files that
also have younger rows stay. DAYS count from the last midnight (UTC). The table's old versions keep the rows until
its history (history_minutes) has passed. The stream may run meanwhile. The table records the time in its property
tickhouse.dropped_before, so that the proof leaves those rows out.

Exit codes: 0 dropped, or shown, 1 nothing was dropped: the files are no longer those of the checksum, or the stream has
changed them at the same time, or the lake cannot be reached, 2 a wrong setting or argument.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.opening import files_of_lake
from conf.settings import arguments, from_command_line
from lake.delta.beside import Beside
from lake.delta.drop import UnknownTable, is_older, table_with_age
from lake.delta.files import Files
from lake.delta.inventory import Inventory
from lake.delta.log import CannotWrite, DataFile, TableLog
from lake.tables import Table

SHOWN = 10


@dataclass(frozen=True)
class Drop:
    """The files to drop, as of a version of the table, and how many rows from before the time stay."""

    table: Table
    before: datetime
    version: int
    files: list[DataFile]
    staying_rows: int

    @property
    def checksum(self) -> str:
        """Of the table's name and the list of files."""
        names = [self.table.qualified_name, *sorted(file.add["path"] for file in self.files)]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        column = self.table.age_time
        lines = [f"{self.table.qualified_name}: rows whose {column} is before {self.before.isoformat()}"]
        lines += [f"    {file.add['path']}: {file.rows:,} rows" for file in self.files[:SHOWN]]
        lines += [f"    and {len(self.files) - SHOWN:,} files more"] if len(self.files) > SHOWN else []
        size = sum(file.size for file in self.files)
        lines.append(f"files: {len(self.files):,}, rows: {sum(file.rows for file in self.files):,}, bytes: {size:,}")
        if self.files:
            lowest, highest = (
                pick(ends[column] for ends in of_files)
                for pick, of_files in ((min, [f.lowest for f in self.files]), (max, [f.highest for f in self.files]))
            )
            lines.append(f"period: {lowest} to {highest}")
        lines.append(f"rows that stay, since their file also has younger rows: {self.staying_rows:,}")
        lines.append(f"checksum: {self.checksum}")
        return "\n".join(lines)


def planned(files: Files, root: str, table: Table, before: datetime) -> Drop:
    """What is to be dropped now. Raises StoreError, CannotWrite."""
    log = TableLog(files, table.path(root))
    inventory = Inventory(log, table)
    protected = {file.add["path"] for file in log.batch_files(inventory.version).files}
    going, staying = list[DataFile](), 0
    for chunk in inventory.before(before):
        for file in chunk:
            if is_older(file, table, before) and file.add["path"] not in protected:
                going.append(file)
            else:
                staying += _older_rows(files, table, file, before)
    return Drop(table, before, inventory.version, going, staying)


def _older_rows(files: Files, table: Table, file: DataFile, before: datetime) -> int:
    """How many rows of a file are from before a time."""
    source = pq.ParquetFile(files.open(file.path, file.size))
    count = 0
    for batch in source.iter_batches(columns=[table.age_time]):
        count += pc.sum(pc.less(batch[table.age_time], before)).as_py() or 0
    return count


def execute(files: Files, root: str, drop: Drop) -> str | None:
    """Drop the files; why not, if nothing was dropped. Raises StoreError."""
    log = TableLog(files, drop.table.path(root))
    conflict = Beside(log, drop.version, "drop-older-than").drop(drop.files, drop.before)
    return conflict.reason if conflict else None


def time_of(text: str) -> datetime:
    """An ISO 8601 time; without a zone it is UTC. Raises ValueError."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def before_days(days: float, now: datetime) -> datetime:
    """The midnight so many days before the last one."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days)


def arg_parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__, "lake_root", "webhdfs_url")
    parser.prog = "scripts/drop-older-than"
    parser.add_argument("table", metavar="TABLE", help="for example silver.ticks")
    parser.add_argument("days", metavar="DAYS", nargs="?", type=float, help="drop rows older than so many days")
    parser.add_argument("--before", type=time_of, metavar="TIME", help="instead of DAYS: ISO 8601, UTC without a zone")
    parser.add_argument("--execute", metavar="CHECKSUM", help="drop them; CHECKSUM is the one that was shown")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arg_parser()
    settings, own = from_command_line(parser, argv)
    if (own.days is None) == (own.before is None):
        parser.error("give either DAYS or --before TIME")
    if own.days is not None and not 0 <= own.days <= 100_000:
        parser.error("DAYS must be between 0 and 100000")
    try:
        table = table_with_age(own.table)
    except UnknownTable as error:
        parser.error(str(error))
    before = own.before or before_days(own.days, datetime.now(UTC))
    root = settings.lake_root
    try:
        files = files_of_lake(parser, settings)
        if TableLog(files, table.path(root)).newest() < 0:
            parser.error(f"{table.qualified_name} is not in the lake {root}")
        drop = planned(files, root, table, before)
        print(drop)
        if not own.execute:
            print(f"nothing was changed: --execute {drop.checksum} drops them")
            return 0
        if own.execute != drop.checksum:
            print(f"{parser.prog}: other files would go now than those of {own.execute}: look again", file=sys.stderr)
            return 1
        problem = execute(files, root, drop) if drop.files else None
    except (OSError, CannotWrite) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if problem:
        print(f"{parser.prog}: nothing was dropped: {problem}", file=sys.stderr)
        return 1
    print("dropped")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.exit(main())
