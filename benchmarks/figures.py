"""The figures of benchmarks/instruments.py, from the job's log and the lake, and the table of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, quantiles
from typing import Any
from urllib.parse import urlsplit

import hdfs

from benchmarks.freshness import commits, received
from benchmarks.job import MicroBatch
from benchmarks.load import Market
from conf.settings import Settings
from lake.reader import NoSuchTable, query, row_count
from lake.tables import GOLD_PRICE_1M, SILVER_QUARANTINE, SILVER_TICKS

# WebHDFS must answer within so many seconds.
WEBHDFS_LIMIT = 60.0
ALL_COMMITS = 1_000_000

# A scenario's figures: name -> number, or None if there is no such figure.
Figures = Mapping[str, Any]

COLUMNS = {
    "micro_batch_seconds": "batch s",
    "frame_to_gold_p50": "gold p50 s",
    "frame_to_gold_p99": "gold p99 s",
    "frame_to_gold_p99_with_start": "p99 +start",
    "first_micro_batch_seconds": "1st batch s",
    "restart_to_gold_seconds": "restart s",
    "cpu_seconds_per_1000": "CPU s/1000",
    "driver_jvm_mb": "JVM MB",
    "driver_python_mb": "Python MB",
    "micro_batches": "batches",
    "slope": "slope",
}
# Figures of restarts that are compared with the restart on the lake of 5 instruments.
OF_RESTARTS = ("restart_to_gold_seconds",)
# The slope is already a ratio.
NOT_COMPARED = ("slope",)
BASE, BASE_OF_RESTARTS = "5", "restart-5"
WIDTH = 12


@dataclass
class GoldCommit:
    """A micro-batch's commit of gold.price_1m; received_at of its ticks. Times are seconds since 1970."""

    committed_at: float
    received_at: list[float] = field(default_factory=list)


def read_gold_commits(settings: Settings) -> list[GoldCommit]:
    """Read the commits, in their order; none if the job died before it created the tables."""
    files = hdfs.InsecureClient(settings.webhdfs_url, timeout=WEBHDFS_LIMIT)
    root = urlsplit(settings.lake_root).path
    in_gold: dict[int, GoldCommit] = {}
    if any(files.status(table.path(root), strict=False) is None for table in (GOLD_PRICE_1M, SILVER_TICKS)):
        return []
    for batch, at, _ in commits(files, GOLD_PRICE_1M.path(root), ALL_COMMITS):
        in_gold.setdefault(batch, GoldCommit(at))
    for batch, _, paths in commits(files, SILVER_TICKS.path(root), ALL_COMMITS):
        if batch in in_gold:
            in_gold[batch].received_at += [at for path in paths for at in received(files, path)]
    return list(in_gold.values())


def frame_to_gold(in_gold: Sequence[GoldCommit], since: float) -> list[float]:
    """Seconds from the frame to gold, of each tick received since."""
    return [commit.committed_at - at for commit in in_gold for at in commit.received_at if at >= since]


def restart_to_gold(in_gold: Sequence[GoldCommit], restarted_at: float) -> float | None:
    """Seconds from the job's start to the first commit of gold with a tick received since; None: there is none."""
    fresh = [each.committed_at for each in in_gold if max(each.received_at, default=0.0) >= restarted_at]
    return round(min(fresh) - restarted_at, 2) if fresh else None


def percentile(values: Sequence[float], number: int) -> float | None:
    return round(quantiles(values, n=100, method="inclusive")[number - 1], 3) if len(values) > 1 else None


def mean_seconds(batches: Sequence[MicroBatch], since: float, until: float) -> float | None:
    """The mean duration of micro-batches that ended in this time; None if there are none."""
    chosen = [batch.seconds for batch in batches if since <= batch.ended_at <= until]
    return mean(chosen) if chosen else None


def batch_figures(batches: Sequence[MicroBatch], began: float, ended: float) -> dict[str, float | None]:
    """Figures of the micro-batches of a load from `began` to `ended`, all since the job's last start."""
    quarter = (ended - began) / 4
    second = mean_seconds(batches, began + quarter, began + 2 * quarter)
    last = mean_seconds(batches, began + 3 * quarter, ended)
    # If no micro-batch ended in the second half, one micro-batch lasted all that time: use the whole load.
    half = mean_seconds(batches, began + 2 * quarter, ended) or mean_seconds(batches, began, ended)
    # A new query's first micro-batch may have no records yet.
    first = next((batch for batch in batches if batch.records), None)
    return {
        "micro_batch_seconds": half and round(half, 3),
        "first_micro_batch_seconds": first.seconds if first else None,
        "slope": round(last / second, 2) if last and second else None,
    }


def gold_figures(
    in_gold: Sequence[GoldCommit], began: float, ended: float, restarted_at: float | None
) -> dict[str, float | None]:
    """Percentiles of the delay to gold: of the ticks of the load's second half, and one of all its ticks.

    The one of all ticks includes the start, when micro-batches take longest.
    """
    later = frame_to_gold(in_gold, (began + ended) / 2)
    return {
        "frame_to_gold_p50": round(median(later), 3) if later else None,
        "frame_to_gold_p99": percentile(later, 99),
        "frame_to_gold_p99_with_start": percentile(frame_to_gold(in_gold, began), 99),
        "restart_to_gold_seconds": None if restarted_at is None else restart_to_gold(in_gold, restarted_at),
    }


def find_difference(settings: Settings, market: Market) -> str | None:
    """How the tables differ from the records sent; None if they do not."""
    root = settings.lake_root
    try:
        silver = query(root, "SELECT count(*) AS rows, count(DISTINCT (symbol, trade_id)) AS ticks FROM silver.ticks")
        gold = query(root, "SELECT coalesce(sum(tick_count), 0)::BIGINT AS ticks FROM gold.price_1m")
    except (NoSuchTable, TimeoutError, OSError) as error:
        return f"the tables cannot be read: {error}"
    ((rows, ticks),) = ((row["rows"], row["ticks"]) for row in silver.to_pylist())
    counts = {
        "rows in silver.ticks": (rows, market.ticks),
        "distinct ticks in silver.ticks": (ticks, market.ticks),
        "ticks in gold.price_1m": (gold.to_pylist()[0]["ticks"], market.ticks),
        "rows in silver.quarantine": (row_count(root, SILVER_QUARANTINE), market.non_ticks),
    }
    wrong = [f"{count:,} {what}, not {expected:,}" for what, (count, expected) in counts.items() if count != expected]
    return "; ".join(wrong) or None


def multiples(figures: Figures, base: Figures) -> dict[str, float]:
    """Each figure as a multiple of another scenario's figure."""
    return {
        name: round(figures[name] / base[name], 2)
        for name in COLUMNS
        if name not in NOT_COMPARED and figures.get(name) is not None and base.get(name)
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row its multiples: `of_base` of the same checkout's row "5", `of_first` of the first checkout's row.

    A restart's time is compared with the restart on the lake of 5 instruments.
    """
    of_job: dict[str, dict[str, Figures]] = defaultdict(dict)
    for row in rows:
        of_job[row["job"]][row["scenario"]] = row
    first = next(iter(of_job.values()), {})
    for row in rows:
        own = of_job[row["job"]]
        base = {**own.get(BASE, {})}
        base |= {name: own.get(BASE_OF_RESTARTS, {}).get(name) for name in OF_RESTARTS}
        row["of_base"] = multiples(row, base)
        row["of_first"] = {} if own is first else multiples(row, first.get(row["scenario"], {}))


def render_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text: per scenario its figures and its outcome, and the multiples below."""
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    first_width = max(len(row["scenario"]) for row in rows) + 2
    lines: list[str] = []

    def add(first: str, cells: Sequence[str], last: str = "") -> None:
        lines.append("".join([first.ljust(first_width), *(cell.rjust(WIDTH) for cell in cells), "  ", last]).rstrip())

    for job in jobs:
        if len(jobs) > 1:
            lines += ["", f"job of {job}"]
        add("", list(COLUMNS.values()), "tables")
        for row in (row for row in rows if row["job"] == job):
            add(row["scenario"], [format_figure(row.get(name)) for name in COLUMNS], row["outcome"])
            for title, name in ((f"  / {BASE}", "of_base"), ("  / 1st", "of_first")):
                if row[name] and not (name == "of_base" and row["scenario"] == BASE):
                    add(title, [f"x {row[name][key]:.2f}" if key in row[name] else "" for key in COLUMNS])
    return "\n".join(lines)


def format_figure(figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:,.3f}".rstrip("0").rstrip(".")
