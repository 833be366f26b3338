"""Queries and a start on a lake with many commits behind it: `scripts/soak --open-figures [--commits 20000,200000]`

Lets ./spark-submit.sh streaming/ticks.py write a lake, and makes it as old as asked for (benchmarks/lakes.py): with so
many commits behind it, of which the logs keep --kept, and a checkpoint, as upkeep leaves them. With --neglected it
makes a lake without upkeep instead: with --data-files data files and --log-files commits, spread over the tables. With
--keep the lake stays, for instance for batch/maintain.py.

At each age it asks four queries by lake.reader and by the Thrift Server, 20 times each:

current    all rows of gold.current_price
minutes    one asset's rows of today's gold.price_1m
count      count(*) of today's silver.ticks
alerts     the last hour's rows of gold.alerts

cold s     the first time: in a new process (without Python's start), or of a version that the server has not seen
p95 s      of all times
start s    from the start of the streaming job to the first commit of gold.price_1m that contains a tick received since

Prints a table, and one line of JSON. In the end silver.ticks must have each tick once.

Exit codes: 0 each start took at most 15 s, and silver.ticks is exact; 1 a start took longer, silver.ticks is wrong, the
job died, or HDFS or SQL failed; 2 a wrong setting or argument; 3 to 6 a service did not start (services/errors.py);
7 Kafka did not take the load.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hdfs
from impala.error import Error as SqlError

import services
from benchmarks import cold, lakes
from benchmarks.backlog import SERVICES, say, started
from benchmarks.figures import GoldCommit, percentile, restart_to_gold
from benchmarks.follow import GoldFollower
from benchmarks.instruments import TERMINATED
from benchmarks.load import LoadFailed, Market, Shape
from benchmarks.places import own_places, remove_traces
from benchmarks.run import START_LIMIT, JobFailed, Run
from conf.settings import PROJECT, Settings, arguments, from_command_line, settings_file
from lake.delta.files import Files, files_of
from lake.reader import row_count
from lake.tables import GOLD_ALERTS, GOLD_CURRENT_PRICE, GOLD_PRICE_1M, SILVER_GAPS, SILVER_TICKS, TABLES
from services.registration import sql_connection

TIMES = 20
# The first new gold row comes within so many seconds of the job's start.
START_BOUND = 15.0
# Ticks a second during a start.
START_RATE = 100.0


def queries(now: datetime) -> dict[str, str]:
    """The four queries, by name."""
    hour_ago = f"{now - timedelta(hours=1):%Y-%m-%d %H:%M:%S}"
    return {
        "current": f"SELECT * FROM {GOLD_CURRENT_PRICE.qualified_name}",
        "minutes": (
            f"SELECT * FROM {GOLD_PRICE_1M.qualified_name} WHERE asset = 'a00000' AND window_date = DATE '{now.date()}'"
        ),
        "count": f"SELECT count(*) FROM {SILVER_TICKS.qualified_name} WHERE event_date = DATE '{now.date()}'",
        "alerts": f"SELECT * FROM {GOLD_ALERTS.qualified_name} WHERE opened_at >= TIMESTAMP '{hour_ago}'",
    }


def by_path(root: str, sql: str) -> str:
    """The query for Spark, over the tables' paths: the server's metastore may name another lake's."""
    for table in TABLES:
        sql = sql.replace(f"FROM {table.qualified_name}", f"FROM delta.`{table.path(root)}`")
    return sql


def ask_server(settings: Settings, sql: str, times: int) -> list[float]:
    """The seconds of a query by the Thrift Server. Raises SqlError, and others if it does not answer."""
    seconds = []
    with closing(sql_connection(settings)) as connection, closing(connection.cursor()) as cursor:
        # A server's first query of a Delta table takes seconds, which are no lake's: so ask for another table first.
        cursor.execute(by_path(settings.lake_root, f"SELECT count(*) FROM {SILVER_GAPS.qualified_name}"))
        cursor.fetchall()
        for _ in range(times):
            began = time.perf_counter()
            cursor.execute(by_path(settings.lake_root, sql))
            cursor.fetchall()
            seconds.append(time.perf_counter() - began)
    return seconds


def ask_all(settings: Settings, thrift: bool, times: int = TIMES) -> dict[str, dict[str, float | None]]:
    """Cold time and p95 of each query by each way of reading, by "way query"."""
    ways: dict[str, Callable[[str], list[float]]] = {
        "reader": lambda sql: cold.measured(settings.lake_root, sql, times)
    }
    if thrift:
        ways["thrift"] = lambda sql: ask_server(settings, sql, times)
    figures = {}
    for way, ask in ways.items():
        for name, sql in queries(datetime.now(UTC)).items():
            seconds = ask(sql)
            figures[f"{way} {name}"] = {"cold": round(seconds[0], 3), "p95": percentile(seconds, 95)}
    return figures


class Ageing:
    """A lake on topics of its own, its job's runs, and the ticks sent so far."""

    def __init__(self, settings: Settings, conf: Path, folder: Path, instruments: int) -> None:
        self._settings, self._conf, self._folder, self._shape = settings, conf, folder, Shape(instruments)
        self._markets: list[Market] = []

    @property
    def ticks(self) -> int:
        return sum(market.ticks for market in self._markets)

    def fill(self, rate: float, seconds: float) -> None:
        """Let the job write the lake. Raises JobFailed, LoadFailed."""
        run = self._next_run(rate, seconds)
        try:
            run.prepare()
            run.load.begin()
            run.watch(lambda: not run.load.is_alive(), "the end of the load")
            run.wait_for_all()
        finally:
            run.load.stop()
            run.stop_job()

    def start(self, files: Files) -> float | None:
        """Start the job, and end it after its first new gold row; the seconds until that. Raises as `fill`."""
        run = self._next_run(START_RATE, START_LIMIT)
        follower, commits = GoldFollower(files, self._settings.lake_root, from_now=True), list[GoldCommit]()
        try:
            run.create_topics()
            run.load.begin()
            began = run.start_job()

            def has_new_row() -> bool:
                commits.extend(follower.read())
                return restart_to_gold(commits, began) is not None

            run.wait(has_new_row, "a new row of gold.price_1m", START_LIMIT)
            run.load.stop()
            run.load.check()
            run.wait_for_all()
        finally:
            run.load.stop()
            run.stop_job()
        return restart_to_gold(commits, began)

    def _next_run(self, rate: float, seconds: float) -> Run:
        folder = self._folder / f"run-{len(self._markets)}"
        folder.mkdir()
        after = self._markets[-1] if self._markets else None
        run = Run("aged", self._shape, self._settings, PROJECT, self._conf, folder, rate, seconds, after=after)
        self._markets.append(run.market)
        return run


def measure(settings: Settings, own: argparse.Namespace, conf: Path) -> list[dict[str, Any]]:
    """A row for each age. Removes topics and lake, unless they are to be kept. Raises JobFailed, LoadFailed, NoAnswer.

    Raises ValueError if the lake has more commits than an age.
    """
    settings, folder = own_places(settings)
    files, rows = files_of(settings.lake_root, str(settings.webhdfs_url)), list[dict[str, Any]]()
    ages = [None] if own.neglected else own.commits
    with ExitStack() as cleanup:
        if own.keep:
            say(f"the lake stays: {settings.lake_root}")
        else:
            cleanup.callback(remove_traces, settings, folder)
        ageing = Ageing(settings, conf, folder, own.instruments)
        say(f"filling {settings.lake_root}")
        ageing.fill(own.rate, own.seconds)
        for commits in ages:
            began = time.monotonic()
            if commits is None:
                made, puts = lakes.neglect(files, settings.lake_root, own.data_files, own.log_files)
                say(f"{made:,} data files and {puts:,} commits more (a data file has a row at least)")
            else:
                lakes.age(files, settings.lake_root, commits, min(own.kept, commits // 2))
            what = "neglected" if commits is None else f"{commits:,} commits"
            say(f"{what}: made in {time.monotonic() - began:.0f} s")
            row: dict[str, Any] = {"age": what, "queries": ask_all(settings, own.thrift), "start": None}
            rows.append(row)
            try:
                row["start"] = ageing.start(files)
            except JobFailed as error:
                # What was measured until then is worth its row.
                row["outcome"] = str(error)
                break
            in_silver = row_count(settings.lake_root, SILVER_TICKS)
            row["outcome"] = "exact" if in_silver == ageing.ticks else f"{in_silver:,} ticks, not {ageing.ticks:,}"
    return rows


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text: a line per way and query, and the starts."""
    width = 24
    lines = ["cold s / p95 s".ljust(width) + "".join(row["age"].rjust(width) for row in rows)]
    for name in rows[0]["queries"]:
        cells = [f"{row['queries'][name]['cold']:.3f} / {row['queries'][name]['p95']:.3f}" for row in rows]
        lines.append(name.ljust(width) + "".join(cell.rjust(width) for cell in cells))
    starts = ["-" if row["start"] is None else f"{row['start']:.1f}" for row in rows]
    lines.append("start s".ljust(width) + "".join(start.rjust(width) for start in starts))
    lines.append("silver.ticks".ljust(width) + "".join(row["outcome"].rjust(width) for row in rows))
    return "\n".join(lines)


def holds(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every start was fast enough, and silver exact."""
    return all(row["outcome"] == "exact" and (row["start"] or START_BOUND + 1) <= START_BOUND for row in rows)


def counts(text: str) -> list[int]:
    """Ascending positive numbers, separated by commas. Raises ValueError."""
    numbers = [int(part) for part in text.split(",")]
    if numbers != sorted(set(numbers)) or numbers[0] < 1:
        raise ValueError
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, "kafka_bootstrap_servers", "lake_root", "webhdfs_url", "state_dir", "sql_port")
    parser.prog = "scripts/soak --open-figures"
    parser.add_argument("--commits", type=counts, default="20000,100000,200000", metavar="N,...", help="ascending ages")
    parser.add_argument("--kept", type=int, default=3_000, metavar="N", help="commits in each log (default: 3000)")
    parser.add_argument("--neglected", action="store_true", help="a lake that nothing has kept up")
    parser.add_argument("--data-files", type=int, default=50_000, metavar="N", help="of it (default: 50000)")
    parser.add_argument("--log-files", type=int, default=10_000, metavar="N", help="commits of it (default: 10000)")
    parser.add_argument("--rate", type=float, default=1_000, metavar="N", help="ticks a second (default: 1000)")
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="the job writes so long (default: 60)")
    parser.add_argument("--instruments", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--thrift", action=argparse.BooleanOptionalAction, default=True, help="ask the Thrift Server too (default)"
    )
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--keep", action="store_true", help="remove neither topics nor lake nor logs")
    settings, own = from_command_line(parser, argv)
    if min(own.rate, own.seconds, own.instruments, own.data_files, own.log_files) <= 0 or own.kept < 0:
        parser.error("numbers must be above 0, --kept may be 0")
    conf = settings_file(os.environ, own.conf).resolve()
    # So SIGTERM too ends the job, and removes its topics and lake.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        with started(settings, (*SERVICES, "sql") if own.thrift else SERVICES):
            rows = measure(settings, own, conf)
    except (services.ServiceError, LoadFailed) as error:
        say(f"{parser.prog}: {error}")
        return error.exit_code
    except (JobFailed, cold.NoAnswer, SqlError, ValueError, OSError, hdfs.HdfsError) as error:
        say(f"{parser.prog}: {error}")
        return 1
    if not own.json:
        print(f"{render(rows)}\n")
    figures = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count(), "rows": rows}
    print(json.dumps(figures))
    return 0 if holds(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
