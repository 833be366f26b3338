"""Follow a lake's commits while the job writes it: which ticks came to gold, and when."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime

from benchmarks.figures import GoldCommit
from lake.delta.files import Files
from lake.delta.log import Action, DataFile, LogIncomplete, TableLog, added_by, metadata_of
from lake.tables import GOLD_PRICE_1M, SILVER_TICKS

THREADS = 4
# Micro-batches that one of the tables has and the other does not: the newest so many.
KEPT = 1_000
_COMMIT = re.compile(r"([0-9]{20})\.json")


class GoldFollower:
    """The micro-batches that silver.ticks and gold.price_1m have both got since the last read.

    It reads commits before upkeep removes them, and no data files, which upkeep may have replaced: a file's statistics
    have its first and its last receipt. The ticks between them are taken as evenly spread, as a load's are.
    """

    def __init__(self, files: Files, root: str, from_now: bool = False) -> None:
        """from_now: leave out the commits until now. Raises StoreError."""
        self._files = files
        self._silver, self._gold = (TableLog(files, table.path(root)) for table in (SILVER_TICKS, GOLD_PRICE_1M))
        self._read = {log.path: log.newest() if from_now else -1 for log in (self._silver, self._gold)}
        self._receipts: dict[int, list[float]] = {}
        self._committed: dict[int, float] = {}

    def read(self) -> list[GoldCommit]:
        """The micro-batches, oldest first. Raises StoreError."""
        for actions in self._commits(self._silver):
            added = [self._silver.file(add) for add in added_by(actions)]
            self._receipts[_batch(actions)] = [at for file in added for at in receipts(file)]
        for actions in self._commits(self._gold):
            # A micro-batch may change gold twice; its ticks are there with the first commit.
            self._committed.setdefault(_batch(actions), _time(actions))
        both = sorted(self._receipts.keys() & self._committed.keys())
        commits = [GoldCommit(self._committed.pop(batch), self._receipts.pop(batch)) for batch in both]
        for waiting in (self._receipts, self._committed):
            for batch in sorted(waiting)[:-KEPT]:
                del waiting[batch]
        return commits

    def _commits(self, log: TableLog) -> Iterator[list[Action]]:
        """The new commits of micro-batches, without those that only move rows or claim the lake."""
        last = self._read[log.path]
        after = f"{last:020d}.json" if last >= 0 else ""
        names = (status.name for status in self._files.list(f"{log.path}/_delta_log", after))
        versions = [int(match[1]) for name in names if (match := _COMMIT.fullmatch(name))]
        self._read[log.path] = max([last, *versions])
        with ThreadPoolExecutor(THREADS) as threads:
            for actions in threads.map(lambda version: existing_actions(log, version), versions):
                if any(add["dataChange"] for add in added_by(actions)) and "batch" in metadata_of(actions):
                    yield actions


def receipts(file: DataFile) -> list[float]:
    """When the ticks of a file of silver.ticks were received, in seconds since 1970, taken as evenly spread."""
    first, last = (
        datetime.fromisoformat(values["received_at"]).astimezone(UTC).timestamp()
        for values in (file.lowest, file.highest)
    )
    step = (last - first) / max(1, file.rows - 1)
    return [first + step * number for number in range(file.rows)]


def existing_actions(log: TableLog, version: int) -> list[Action]:
    """A commit's actions; none if it is cleaned up already."""
    with suppress(LogIncomplete):
        return log.actions(version)
    return []


def _batch(actions: list[Action]) -> int:
    return int(metadata_of(actions)["batch"])


def _time(actions: list[Action]) -> float:
    """The time of a commit, in seconds since 1970."""
    return float(next(action["commitInfo"]["timestamp"] for action in actions if "commitInfo" in action)) / 1_000
