"""Bring a big or neglected lake back to health, in bounded memory: what upkeep does beside the stream, by executors.

    ./spark-submit.sh batch/maintain.py                              # show the files, and what would be done
    ./spark-submit.sh batch/maintain.py --execute                    # do it; the stream and its upkeep may run
    ./spark-submit.sh batch/maintain.py --json --picture files.png           # the files by size and day

In:  the tables' logs and files. Out: the same rows in fewer files.

Per table, in this order:
1. clean    a checkpoint of the log; data files and log files that have passed the table's horizon are deleted.
2. drop     files whose rows are all older than keep_days.
3. join     small files, in the order of time. Of silver.ticks' days that no longer change, rows are sorted by asset
            within a file, so that a query for one asset reads a part of it.
4. orphans  files that the log does not know are deleted when they are a day old.

It joins no files that are younger than --older-than-minutes, and neither joins nor drops those that the last
micro-batch wrote: a restarted stream may need them. Where the stream or another program has changed the same files
meanwhile, it skips them; run it again. The driver holds one table's files at a time, in columns.

Exit codes: 0 all is done, or would be, 1 something was skipped or failed, 2 a wrong setting, or there is no such lake.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession

from batch.file_report import TableFiles, draw, render, surveyed
from batch.opening import files_of_lake
from conf.settings import Settings, arguments, from_command_line
from lake.delta import compact
from lake.delta.beside import Beside
from lake.delta.drop import UnknownTable, is_older, kept_for
from lake.delta.files import Files
from lake.delta.inventory import Inventory
from lake.delta.log import CannotWrite, DataFile, TableLog
from lake.delta.parquet import ContentsDiffer
from lake.silver.state import needed_since
from lake.tables import SILVER_TICKS, STREAMED, Table

logger = logging.getLogger("batch.maintain")

SETTLED_FOR = timedelta(days=2)
"""A day so long ago no longer changes, but for a backfill now and then."""
SETTLED_BYTES = 128 << 20
"""The size of a joined file of such a day."""
SORTED_BYTES = 32 << 20
"""The same, if its rows are sorted: a task has all of them in memory, ten times as large."""
# Limits of a task and of a commit.
FILES_A_GROUP = 2_000
FILES_A_COMMIT = 5_000
GROUPS_A_COMMIT = 64
DELETERS = 8


@dataclass(frozen=True)
class Group:
    """Files to join to one; order: the columns by which its rows are sorted."""

    files: list[DataFile]
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Joining:
    """The task of joining a group, for an executor."""

    store: Files
    table: Table
    root: str
    group: Group


@dataclass(frozen=True)
class Joined:
    """The joined file, which the table does not have yet; or why there is none."""

    file: DataFile | None
    problem: str = ""


Run = Callable[[Sequence[Joining]], list[Joined]]
"""Does the tasks."""


@dataclass
class Work:
    """What was done to a table, or would be, in numbers of files; rows: dropped rows."""

    table: str
    joined: int = 0
    new: int = 0
    dropped: int = 0
    rows: int = 0
    data_files: int = 0
    log_files: int = 0
    orphans: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{self.joined:,} files joined to {self.new:,}" if self.joined else "",
            f"{self.dropped:,} files with {self.rows:,} old rows dropped" if self.dropped else "",
            f"{self.data_files:,} replaced files deleted" if self.data_files else "",
            f"{self.log_files:,} log files deleted" if self.log_files else "",
            f"{self.orphans:,} orphans deleted" if self.orphans else "",
            *(f"skipped: {problem}" for problem in self.problems),
        ]
        return f"{self.table}: {'; '.join(part for part in parts if part) or 'nothing to do'}"


def joined(task: Joining) -> Joined:
    """Join a group, and write the file. Errors become a `problem`: other groups go on."""
    table = task.table
    try:
        encoded = compact.join(task.store, table, task.group.files, task.group.order)
        return Joined(TableLog(task.store, table.path(task.root)).add(encoded))
    except FileNotFoundError as error:
        return Joined(None, f"{len(task.group.files)} files, since others have replaced and deleted them: {error}")
    except (OSError, ContentsDiffer, pa.ArrowException, ValueError) as error:
        return Joined(None, f"{len(task.group.files)} files: {error}")


def here(tasks: Sequence[Joining]) -> list[Joined]:
    """Do the tasks in this process."""
    return [joined(task) for task in tasks]


class Executors:
    """Does the tasks by Spark, which starts with the first of them."""

    def __init__(self) -> None:
        self._spark: SparkSession | None = None

    def __call__(self, tasks: Sequence[Joining]) -> list[Joined]:
        self._spark = self._spark or SparkSession.builder.appName("tickhouse maintain").getOrCreate()
        return self._spark.sparkContext.parallelize(tasks, len(tasks)).map(joined).collect()

    def close(self) -> None:
        """End Spark, if it was started."""
        if self._spark:
            self._spark.stop()


class Maintenance:
    """The maintenance of one table. now: the time, in UTC."""

    def __init__(
        self,
        *,
        files: Files,
        root: str,
        table: Table,
        kept: timedelta | None,
        older_than: timedelta,
        now: datetime,
    ) -> None:
        self.table = table
        self._files, self._root, self._kept, self._older_than, self._now = files, root, kept, older_than, now
        self._log = TableLog(files, table.path(root))

    @property
    def _now_millis(self) -> int:
        return int(1_000 * self._now.timestamp())

    def plan(self) -> Work:
        """What `execute` would do."""
        work, inventory = Work(self.table.qualified_name), Inventory(self._log, self.table)
        kept, keep = self._protected(inventory)
        for file in self._old(inventory, kept):
            work.dropped, work.rows = work.dropped + 1, work.rows + file.rows
        for group in self._groups(inventory, kept):
            work.joined, work.new = work.joined + len(group.files), work.new + 1
        expired = self._log.expired(keep, self._now_millis)
        work.data_files, work.log_files = expired.data_files, expired.log_files
        work.orphans = sum(1 for _ in self._log.orphans(self._now_millis))
        return work

    def execute(self, run: Run) -> Work:
        """Do all steps; one that fails is a problem, and the others go on."""
        work = Work(self.table.qualified_name)
        for step in (self._clean, self._drop, lambda work: self._join(work, run), self._delete_orphans):
            try:
                step(work)
            except (OSError, CannotWrite) as error:
                work.problems.append(str(error))
        return work

    # --- steps

    def _clean(self, work: Work) -> None:
        inventory = Inventory(self._log, self.table)
        _, keep = self._protected(inventory)
        cleaned = self._log.clean(keep, self._now_millis)
        if not cleaned.data_files and self._log.expired(keep, self._now_millis).data_files:
            # The newest version has a checkpoint already; files are deleted with that of a later version.
            Beside(self._log, inventory.version, "maintain").commit()
            cleaned = self._log.clean(keep, self._now_millis)
        work.data_files, work.log_files = cleaned.data_files, cleaned.log_files

    def _drop(self, work: Work) -> None:
        if self._kept is None:
            return
        inventory = Inventory(self._log, self.table)
        protected, _ = self._protected(inventory)
        old = list(self._old(inventory, protected))
        if not old:
            return
        beside = Beside(self._log, inventory.version, "maintain")
        if conflict := beside.drop(old, self._now - self._kept):
            work.problems.append(f"no rows are dropped: {conflict.reason}")
        else:
            work.dropped, work.rows = len(old), sum(file.rows for file in old)

    def _join(self, work: Work, run: Run) -> None:
        inventory = Inventory(self._log, self.table)
        protected, _ = self._protected(inventory)
        beside = Beside(self._log, inventory.version, "maintain")
        for groups in batches(self._groups(inventory, protected)):
            self._join_batch(work, run, beside, groups)
        if work.joined:
            self._log.checkpoint(now=self._now_millis, deletions=0)

    def _join_batch(self, work: Work, run: Run, beside: Beside, groups: Sequence[Group]) -> None:
        results = run([Joining(self._files, self.table, self._root, group) for group in groups])
        work.problems += [result.problem for result in results if result.problem]
        done = [(group, result.file) for group, result in zip(groups, results, strict=True) if result.file]
        # A VACUUM without a retention takes the new files for orphans.
        deleted = [file.path for _, file in done if not self._files.exists(file.path)]
        if deleted:
            work.problems.append(f"{len(deleted)} joined files: somebody has deleted them before their commit")
            done = [item for item in done if item[1].path not in deleted]
        while done:
            removed = [file for group, _ in done for file in group.files]
            conflict = beside.commit([file for _, file in done], removed, data_change=False)
            if conflict is None:
                work.joined, work.new = work.joined + len(removed), work.new + len(done)
                return
            skipped = [item for item in done if not conflict.lost or _has(item[0], conflict.lost)]
            done = [item for item in done if item not in skipped]
            work.problems.append(f"{sum(len(group.files) for group, _ in skipped)} files: {conflict.reason}")
            for _, file in skipped:
                self._files.delete(file.path)

    def _delete_orphans(self, work: Work) -> None:
        orphans = self._log.orphans(self._now_millis)
        with ThreadPoolExecutor(DELETERS) as threads:
            while paths := list(islice(orphans, FILES_A_COMMIT)):
                list(threads.map(self._files.delete, paths))
                work.orphans += len(paths)

    # --- what is to be done

    def _protected(self, inventory: Inventory) -> tuple[set[str], int]:
        """Paths of the last micro-batch's files, and the version from which on a restarted stream needs the log."""
        first, added = self._log.batch_files(inventory.version)
        if self.table == SILVER_TICKS:
            first = min(first, needed_since(self._files, self._root))
        return {file.add["path"] for file in added}, first

    def _old(self, inventory: Inventory, protected: set[str]) -> Iterator[DataFile]:
        if self._kept is None:
            return
        before = self._now - self._kept
        for files in inventory.before(before):
            yield from (f for f in files if is_older(f, self.table, before) and f.add["path"] not in protected)

    def _groups(self, inventory: Inventory, protected: set[str]) -> Iterator[Group]:
        """The groups of files to join, in the order of time."""
        if not compact.joined_bytes(self.table):
            return
        written_before = self._now_millis - self._older_than // timedelta(milliseconds=1)
        rows_before = inventory.newest - self._older_than if inventory.newest else self._now

        def is_closed(file: DataFile) -> bool:
            if file.add["path"] in protected:
                return False
            if self.table.file_time:
                return datetime.fromisoformat(file.highest[self.table.file_time]) < rows_before
            return int(file.add["modificationTime"]) <= written_before

        settled_before = str((self._now - SETTLED_FOR).date())
        for partition, files in inventory.chunks():
            is_settled = bool(partition) and not self.table.file_time and max(partition) < settled_before
            if is_settled and self.table.settled_order:
                yield from _sorted_groups(self.table, files, is_closed)
                continue
            size = SETTLED_BYTES if is_settled else compact.joined_bytes(self.table)
            for group in compact.due(self.table, files, is_closed, most_bytes=size, fan_in=2, sizes=(2,)):
                for first in range(0, len(group), FILES_A_GROUP):
                    if len(part := group[first : first + FILES_A_GROUP]) > 1:
                        yield Group(part)


def _has(group: Group, paths: set[str]) -> bool:
    return any(file.add["path"] in paths for file in group.files)


def _sorted_groups(table: Table, files: Sequence[DataFile], is_closed: Callable[[DataFile], bool]) -> Iterator[Group]:
    """Groups of files that are not sorted yet, or small."""

    def is_chosen(file: DataFile) -> bool:
        is_small = file.size < SORTED_BYTES // 2
        return is_closed(file) and (is_small or not compact.is_sorted(table, file))

    for group in compact.due(table, files, is_chosen, most_bytes=SORTED_BYTES, fan_in=1, sizes=(1,)):
        for first in range(0, len(group), FILES_A_GROUP):
            part = group[first : first + FILES_A_GROUP]
            if len(part) > 1 or not compact.is_sorted(table, part[0]):
                yield Group(part, table.settled_order)


def batches(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """The groups in batches, each for one commit."""
    batch: list[Group] = []
    count = 0
    for group in groups:
        if batch and (count + len(group.files) > FILES_A_COMMIT or len(batch) == GROUPS_A_COMMIT):
            yield batch
            batch, count = [], 0
        batch.append(group)
        count += len(group.files)
    if batch:
        yield batch


def tables_named(names: str) -> list[Table]:
    """The tables with these qualified names, separated by commas; default: all. Raises UnknownTable."""
    known = {table.qualified_name: table for table in STREAMED}
    chosen = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    for name in chosen:
        if name not in known:
            raise UnknownTable(f"--tables: there is no table {name!r}; choose of {', '.join(known)}")
    return [known[name] for name in chosen]


def maintained(
    files: Files,
    settings: Settings,
    tables: Sequence[Table],
    older_than: timedelta,
    now: datetime,
    run: Run | None = None,
) -> Iterator[Work]:
    """The work on each table: done by `run`, or, without it, what would be. Raises UnknownTable, StoreError."""
    kept = kept_for(settings.keep_days)
    for table in tables:
        of_table = kept.get(table.qualified_name)
        maintenance = Maintenance(
            files=files, root=settings.lake_root, table=table, kept=of_table, older_than=older_than, now=now
        )
        yield maintenance.execute(run) if run else maintenance.plan()


def arg_parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__, "lake_root", "webhdfs_url", "keep_days")
    parser.add_argument("--execute", action="store_true", help="do it, instead of saying what would be done")
    parser.add_argument("--tables", default="", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument(
        "--older-than-minutes", type=float, default=60, metavar="N", help="leave younger files alone (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the files by size and day to this PNG")
    return parser


def report(
    before: Sequence[TableFiles], work: Sequence[Work], after: Sequence[TableFiles] | None, as_json: bool
) -> str:
    """What was done, or, if `after` is None, what would be."""
    if not as_json:
        end = "nothing was changed: --execute does it" if after is None else render(after)
        return "\n".join([render(before), "", *map(str, work), "", end])
    rows = {"before": [asdict(table) for table in before], "work": [asdict(table) for table in work]}
    if after is not None:
        rows["after"] = [asdict(table) for table in after]
    return json.dumps({"executed": after is not None, **rows})


def main(argv: Sequence[str] | None = None) -> int:
    parser = arg_parser()
    settings, own = from_command_line(parser, argv)
    root = settings.lake_root
    if not 0 <= own.older_than_minutes <= 525_600:
        parser.error("--older-than-minutes must be between 0 and 525600")
    older_than, after = timedelta(minutes=own.older_than_minutes), None
    try:
        tables = tables_named(own.tables)
        files = files_of_lake(parser, settings)
        tables = [table for table in tables if TableLog(files, table.path(root)).newest() >= 0]
        if not tables:
            parser.error(f"there is no lake at {root}")
        before = [surveyed(files, root, table) for table in tables]
        with closing(Executors()) as run:
            now = datetime.now(UTC)
            work = list(maintained(files, settings, tables, older_than, now, run if own.execute else None))
        if own.execute:
            after = [surveyed(files, root, table) for table in tables]
        if own.picture:
            draw(after or before, own.picture)
    except UnknownTable as error:
        parser.error(str(error))
    except ImportError as error:
        print(f"{parser.prog}: no picture: {error}", file=sys.stderr)
    except (OSError, CannotWrite) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(report(before, work, after, own.json))
    return 1 if any(table.problems for table in work) else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.exit(main())
