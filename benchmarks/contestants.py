"""Who is compared in benchmarks/backlog.py: how each is run, and what it has written."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conf.settings import PROJECT, Settings, flag
from lake.reader import open_table, query, row_count
from lake.tables import BRONZE_TICKS, GOLD, SILVER_TICKS, Table

# The environment that scripts/bench makes for those who are not this suite.
PYTHON = PROJECT / ".tickhouse" / "bench" / "bin" / "python"

# (source, asset, beginning) -> what is said of a minute.
Windows = dict[tuple[str, str, datetime], dict[str, float]]


class Contestant(ABC):
    """command: what does the job; environment: what it needs in its environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def rows(self) -> list[int]:
        """How many ticks it has written, of each form that it keeps all ticks in."""

    @abstractmethod
    def windows(self) -> Windows:
        """The minutes it has written."""

    def own_figures(self, log: str) -> dict[str, Any]:
        """What its log says of its speed."""
        return dict(json.loads(log.splitlines()[-1]))


class InDelta(Contestant):
    """Writes Delta tables below a root, named as the lake's."""

    def __init__(self, root: str) -> None:
        self._root = root

    def rows(self) -> list[int]:
        return [row_count(self._root, table) for table in (BRONZE_TICKS, SILVER_TICKS)]

    def windows(self) -> Windows:
        columns = "source, asset, window_start, open, high, low, close, volume, tick_count"
        return _windows(query(self._root, f"SELECT {columns} FROM gold.price_1m").to_pylist())


class Suite(InDelta):
    name = "suite"

    def __init__(self, settings: Settings, conf: Path) -> None:
        super().__init__(settings.lake_root)
        names = ("kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "gaps_topic", "lake_root")
        values = {name: getattr(settings, name) for name in (*names, "max_offsets_per_trigger")}
        values |= {"conf": conf, "checkpoint": f"{settings.lake_root}/_checkpoints/ticks"}
        flags = [text for name, value in values.items() for text in (flag(name), str(value))]
        self.command = [str(PROJECT / "spark-submit.sh"), "streaming/ticks.py", "--once", *flags]

    def own_figures(self, log: str) -> dict[str, Any]:
        """From the first micro-batch's beginning, by the log, to the last commit of any table."""
        micro_batches = re.findall(r"^(\S+ \S+) .* batch \d+: .*?([\d.]+) s$", log, re.MULTILINE)
        ended, took = micro_batches[0]
        # The log's clock is local time.
        first_read = datetime.strptime(ended, "%Y-%m-%d %H:%M:%S,%f").timestamp() - float(took)  # noqa: DTZ007
        last_write = max(_last_commit(self._root, table) for table in (BRONZE_TICKS, SILVER_TICKS, *GOLD))
        return {
            "first_read_to_end": round(last_write - first_read, 2),
            "micro_batches": [float(took) for _, took in micro_batches],
        }


class Floor(InDelta):
    name = "floor"

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__(str(folder))
        self.command = _module("floor", settings, "--lake", folder)


class Pathway(Contestant):
    name = "pathway"

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._folder = folder
        self.command = _module("with_pathway", settings, "--out", folder)
        # Its workers; without a licence key there are no more than eight.
        self.environment = {"PATHWAY_THREADS": str(min(os.cpu_count() or 1, 8))}

    def rows(self) -> list[int]:
        with (self._folder / "ticks.jsonl").open("rb") as lines:
            return [sum(1 for _ in lines)]

    def windows(self) -> Windows:
        """The newest of each; a line with diff -1 takes back an earlier one."""
        changes = map(json.loads, (self._folder / "windows.jsonl").read_text(encoding="utf-8").splitlines())
        rows = [change for change in changes if change["diff"] == 1]
        for row in rows:
            row["window_start"] = datetime.fromisoformat(row["window_start"]).replace(tzinfo=UTC)
        return _windows(sorted(rows, key=lambda row: row["time"]))


def _module(name: str, settings: Settings, *arguments: object) -> list[str]:
    source = ("--servers", settings.kafka_bootstrap_servers, "--topic", settings.ticks_topic)
    return [str(PYTHON), "-m", f"benchmarks.{name}", *source, *map(str, arguments)]


def _windows(rows: Sequence[Mapping[str, Any]]) -> Windows:
    columns = ("open", "high", "low", "close", "volume", "tick_count")
    return {
        (row["source"], row["asset"], row["window_start"]): {name: float(row[name]) for name in columns if name in row}
        for row in rows
    }


def _last_commit(root: str, table: Table) -> float:
    """Seconds since 1970."""
    return float(open_table(root, table).history(1)[0]["timestamp"]) / 1000
