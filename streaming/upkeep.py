"""Upkeep: keep the lake healthy beside the stream, without a scheduler.

A thread joins small files to larger ones, deletes files that have been out of the tables for history_minutes, drops
rows that are older than keep_days, and deletes what killed processes left. It reads and writes files while
micro-batches go on; only its commits, some 20 ms each, wait for the end of a micro-batch and hold back the next one. It
uses at most a quarter of a core.

Every step may be killed: one commit replaces small files by the joined one, and a file is deleted only when it has been
out of the table for the whole history. The thread ends when another writer has the lake.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pyarrow as pa

from conf.settings import Settings
from lake.delta import compact
from lake.delta.checkpoint import LEFTOVER_MILLIS
from lake.delta.drop import is_older, kept_for
from lake.delta.log import DataFile, TableLog
from lake.delta.parquet import ContentsDiffer
from lake.delta.writer import Fenced, horizon
from lake.tables import SILVER_TICKS, STREAMED, Table

if TYPE_CHECKING:
    from streaming.lakehouse import Lakehouse

logger = logging.getLogger(__name__)

# Files of rows that are only appended are joined so long after they were written, by the clock.
APPENDED_FOR = timedelta(seconds=20)
# Files of rows that change are joined when the table's newest row is so much later: late ticks seldom reach them then.
CHANGING_FOR = timedelta(minutes=10)
# Everything that no longer grows is joined so often, whatever its size; orphans and old rows are looked for then too.
SWEEP_SECONDS = 6 * 3_600.0
SETTLED_FOR = timedelta(hours=1)
# A checkpoint of a table with few commits, which deletes what has passed the horizon.
TIDY_SECONDS = 300.0
# After each step the thread rests so many times as long as the step took.
REST = 3.0
# The longest wait between two micro-batches while the lake has too many files.
LONGEST_PAUSE = 10.0

Group = Sequence[DataFile]


class Upkeep:
    """The upkeep of one lakehouse. clock: seconds since 1970."""

    def __init__(
        self,
        house: Lakehouse,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        fan_in: int = compact.FAN_IN,
    ) -> None:
        """Raises UnknownTable."""
        self._house, self._lake, self._clock, self._fan_in = house, house.writer, clock, fan_in
        self._kept, self._round_seconds = kept_for(settings.keep_days), settings.upkeep_seconds
        self._history = timedelta(minutes=settings.history_minutes)
        self._most_debt = settings.debt_files
        self._checkpoint = settings.checkpoint_location
        self._slices = {slices.table: slices for slices in house.slices}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._swept_at: float | None = None
        self._defined = False
        self._is_pausing = False
        # Files that wait to be joined or deleted.
        self.debt = 0
        # Files that could not be joined.
        self._unreadable: set[str] = set()
        # How many small files a table has beyond those that this round joins.
        self._neglected: dict[Table, int] = {}
        self._totals = Counter[str]()

    # --- the thread

    def start(self) -> None:
        """Start the thread. It begins after the first micro-batch: until then a replay may need the files."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after its current step."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._round_seconds):
            if not self._house.is_settled:
                continue
            try:
                self.round()
            except Fenced:
                # The next micro-batch ends the job.
                return
            except Exception:
                self._totals["failures"] += 1
                logger.exception("the lake's upkeep failed; it is tried again")

    def round(self) -> None:
        """Do what is due. Raises Fenced, StoreError."""
        if not self._defined:
            self._define()
        now = self._clock()
        sweeps = self._swept_at is None or now - self._swept_at >= SWEEP_SECONDS
        self._neglected.clear()
        due = {table: self._due(table, self._fan_in, APPENDED_FOR) for table in STREAMED if compact.joined_bytes(table)}
        left = sum(self._lake.cleaned(table).left for table in STREAMED) + sum(self._neglected.values())
        self.debt = sum(len(group) for groups in due.values() for group in groups) + left
        for table, groups in due.items():
            for group in groups:
                self._step(self._join, table, group)
                self.debt -= len(group)
                if self._ended.is_set():
                    return
            if table in self._neglected:
                self._lake.forget_files(table)
        for table in STREAMED:
            self._lake.tidy(table, TIDY_SECONDS)
        if sweeps:
            self._sweep()
            self._swept_at = now
        self._totals["rounds"] += 1

    def _step(self, step: Callable[..., None], *arguments: object) -> None:
        """Do a step, and rest for a multiple of its time."""
        began, cpu = time.monotonic(), time.thread_time()
        try:
            step(*arguments)
        finally:
            self._totals["cpu_milliseconds"] += int(1_000 * (time.thread_time() - cpu))
        self._ended.wait(REST * (time.monotonic() - began))

    def _define(self) -> None:
        """Give the tables the horizon of the settings."""
        for table in STREAMED:
            properties = horizon(self._history)
            if table.qualified_name in self._kept and "delta.appendOnly" in table.properties:
                properties["delta.appendOnly"] = "false"
            with self._house.between():
                self._lake.define(table, properties)
        self._defined = True

    # --- joining files

    def _due(
        self, table: Table, fan_in: int = compact.FAN_IN, appended_for: timedelta = APPENDED_FOR
    ) -> Sequence[Group]:
        if table.file_time:
            live = self._lake.live(table)
            last = live.last()
            newest = last.highest.get(table.file_time) if last else None
            if newest is None:
                return []
            before = datetime.fromisoformat(newest) - CHANGING_FOR
            return compact.due(
                table, live.all(), self._readable(lambda file: file.ends_before(table.file_time, before)), fan_in=fan_in
            )
        files, more = self._lake.small_files(table, compact.small_bytes(table))
        before_millis = 1_000 * (self._clock() - appended_for.total_seconds())
        if more:
            logger.warning(
                "%s has %d small files: batch/maintain.py joins them sooner", table.qualified_name, len(files) + more
            )
            self._neglected[table] = more
        is_closed = self._readable(lambda file: file.add["modificationTime"] <= before_millis)
        return compact.due(table, files, is_closed, fan_in=fan_in)

    def _readable(self, is_closed: Callable[[DataFile], bool]) -> Callable[[DataFile], bool]:
        return lambda file: file.path not in self._unreadable and is_closed(file)

    def _join(self, table: Table, group: Group) -> None:
        """Join a group of files. A group that cannot be read is named once, and left alone from then on."""
        try:
            new = self._lake.write_file(table, compact.join(self._lake.files, table, group))
        except FileNotFoundError as error:
            # An outsider has replaced the files, and deleted them; else the table is damaged.
            self._leave_alone(table, group, error)
            self._lake.catch_up(table)
            return
        except (ContentsDiffer, pa.ArrowException, ValueError) as error:
            self._leave_alone(table, group, error)
            return
        with self._house.between():
            is_done = self._reorganize(table, group, [new])
        if is_done:
            self._totals["joined_files"] += len(group)
            self._totals["joined_bytes"] += new.size
        else:
            self._lake.files.delete(new.path)

    def _leave_alone(self, table: Table, group: Group, error: Exception) -> None:
        self._totals["failures"] += 1
        self._unreadable |= {file.path for file in group}
        logger.error(
            "%s: %d files from %s on are not joined: %s. batch/prove.py tells whether rows are lost",
            *(table.qualified_name, len(group), group[0].path, error),
        )

    def _reorganize(self, table: Table, removed: Group, added: Group) -> bool:
        if slices := self._slices.get(table):
            return slices.reorganize(removed, added)
        if not self._lake.reorganize(table, removed, added):
            return False
        if table == SILVER_TICKS:
            self._house.gold.moved(removed, added)
        return True

    # --- what is seldom due

    def _sweep(self) -> None:
        """Join what no longer grows, drop old rows, and delete orphans. Raises Fenced, StoreError."""
        for table in STREAMED:
            if self._ended.is_set():
                return
            if compact.joined_bytes(table):
                for group in self._due(table, 2, SETTLED_FOR):
                    self._step(self._join, table, group)
            if table.qualified_name in self._kept:
                now = datetime.fromtimestamp(self._clock(), UTC)
                self._step(self._drop, table, now - self._kept[table.qualified_name])
            self._step(self._delete_orphans, table)
        self._step(self._delete_drafts)

    def _drop(self, table: Table, before: datetime) -> None:
        """Drop the files whose rows are all older."""
        slices = self._slices.get(table)
        with self._house.between():
            if slices:
                old = [file for file in self._lake.live(table).all() if is_older(file, table, before)]
                is_done = not old or slices.reorganize(old, [], dropped_before=before)
            else:
                old = self._lake.drop(table, before)
                is_done = True
            if table == SILVER_TICKS:
                self._house.gold.moved(old, [])
        if old and is_done:
            self._totals["dropped_files"] += len(old)
            rows = sum(file.rows for file in old)
            logger.info("%s: %d rows from before %s are dropped", table.qualified_name, rows, before.isoformat())

    def _delete_orphans(self, table: Table) -> None:
        for path in TableLog(self._lake.files, table.path(self._lake.root)).orphans(int(1_000 * self._clock())):
            self._lake.files.delete(path)
            self._totals["orphans"] += 1

    def _delete_drafts(self) -> None:
        """Delete temporary files of killed processes: of the lease, and of Spark's checkpoint."""
        before = 1_000 * self._clock() - LEFTOVER_MILLIS
        folders = [f"{self._checkpoint}/{name}" for name in ("offsets", "commits", "sources/0")]
        for folder in [self._lake.root, *folders]:
            for status in self._lake.files.list(folder):
                if status.name.startswith(".") and status.name.endswith(".tmp") and status.modified < before:
                    self._lake.files.delete(f"{folder}/{status.name}")
                    self._totals["orphans"] += 1

    # --- back-pressure and figures

    def pause(self, stop: threading.Event) -> None:
        """After a micro-batch: wait while the lake has more files than debt_files, so that the next one is larger."""
        excess = self.debt / self._most_debt
        if (excess > 1) != self._is_pausing:
            self._is_pausing = excess > 1
            state = "micro-batches are larger and rarer until they are joined" if excess > 1 else "no more pauses"
            logger.warning("%d small or expired files wait, the limit is %d: %s", self.debt, self._most_debt, state)
        if excess > 1:
            stop.wait(min(LONGEST_PAUSE, excess))

    def figures(self) -> Mapping[str, float]:
        """What was done since the start, and what waits (`debt_files`)."""
        cleaned = [self._lake.cleaned(table) for table in STREAMED]
        return {
            **{name: self._totals[name] for name in ("rounds", "failures", "joined_files", "joined_bytes")},
            **{name: self._totals[name] for name in ("dropped_files", "orphans")},
            "cpu_seconds": self._totals["cpu_milliseconds"] / 1_000,
            "deleted_data_files": sum(table.data_files for table in cleaned),
            "deleted_log_files": sum(table.log_files for table in cleaned),
            "debt_files": self.debt,
        }
