"""Measure the streaming job with N instruments, invalid records and repeats: `python -m benchmarks.instruments`

Per scenario: start ./spark-submit.sh streaming/ticks.py on its own topics and lake, send ticks in ingestion's layout
for a while, end the job with SIGTERM, and compare the tables with the records sent.

5              5 instruments, only ticks
5+odd          and 0.2 % invalid records
5+repeats      and 1 % repeats: the same bytes again, every second one 3 seconds later
5+both         both
restart-5      kill -9 of the job halfway, and a new start while the load goes on

Prints a table, and one line of JSON. Below each row are its multiples of row 5, and with several --job-dir also of the
first checkout's same row.

batch s        mean micro-batch, from the job's log, in the second half of the load (or of the time after the restart)
gold p50 s     from a tick's frame to the commit of gold.price_1m that contains it, of ticks of the same half
p99 +start     p99 of all ticks since the job's last start: the first micro-batches are the slowest
1st batch s    the first micro-batch with records after the job's last start
restart s      from the new start to the first commit of gold.price_1m that contains a tick received since
CPU s/1000     CPU seconds of all the job's processes per 1,000 ticks of the load; with a restart, the start too
JVM MB         resident memory of the driver's JVM at the end; Python MB: the same of the driver's Python
slope          mean micro-batch of the last quarter / mean of the second quarter
tables         exact: silver.ticks has each tick once, gold.price_1m counts as many, quarantine has the invalid records

Exit codes: 0 all tables are exact, 1 a query died, fell behind or wrote wrong tables, 2 a wrong setting or argument,
3 to 6 a service did not start (services/errors.py), 7 Kafka did not take the load.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import services
from benchmarks.backlog import say, started
from benchmarks.figures import compare, render_table
from benchmarks.load import LoadFailed
from benchmarks.places import own_places, remove_traces
from benchmarks.scenarios import EXACT, Measurement, Scenario, parse_scenario
from conf.settings import PROJECT, Settings, arguments, from_command_line, settings_file

SCENARIOS = "1,5,500,5000,20000,5+odd,5+repeats,5+both,restart-5,restart-5000"
TERMINATED = 143


def measure(
    scenario: Scenario, settings: Settings, project: Path, conf: Path, rate: float, seconds: float, keep: bool
) -> dict[str, Any]:
    """A scenario's row. Removes its topics and lake, but keeps a failed job's logs. Raises LoadFailed."""
    settings, folder = own_places(settings)
    with ExitStack() as cleanup:
        if not keep:
            cleanup.callback(remove_traces, settings, folder)
        row = Measurement(scenario, settings, project, conf, folder, rate, seconds).run()
        if row["outcome"] != EXACT and not keep:
            logs = folder.with_name(f"failed-{folder.name}")
            folder.rename(logs)
            say(f"{scenario.name}: the job's logs are in {logs}")
    say(f"{scenario.name}: {row['outcome']}")
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, "kafka_bootstrap_servers", "lake_root", "webhdfs_url", "state_dir")
    parser.prog = "python -m benchmarks.instruments"
    parser.add_argument("--scenarios", default=SCENARIOS, metavar="NAMES", help=f"default: {SCENARIOS}")
    parser.add_argument("--rate", type=float, default=1_000, metavar="N", help="ticks a second (default: 1000)")
    parser.add_argument("--seconds", type=float, default=90, metavar="N", help="length of the load (default: 90)")
    parser.add_argument(
        "--job-dir",
        type=Path,
        action="append",
        metavar="DIR",
        help="run the job of this checkout, which has been set up; several: of each in turn (default: this one)",
    )
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--keep", action="store_true", help="remove neither topics nor lakes nor logs")
    settings, own = from_command_line(parser, argv)
    try:
        scenarios = [parse_scenario(name) for name in own.scenarios.split(",")]
    except ValueError as error:
        parser.error(f"--scenarios: {error}")
    if own.rate <= 0 or own.seconds <= 0:
        parser.error("--rate and --seconds must be above 0")
    projects = [project.resolve() for project in own.job_dir or [PROJECT]]
    for project in projects:
        if not (project / "spark-submit.sh").exists():
            parser.error(f"--job-dir {project}: there is no spark-submit.sh")
    conf = settings_file(os.environ, own.conf).resolve()
    # So SIGTERM too ends the job, and removes its topics and lake.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    rows: list[dict[str, Any]] = []
    with ExitStack() as cleanup:
        try:
            cleanup.enter_context(started(settings))
            for scenario in scenarios:
                for project in projects:
                    say(f"{scenario.name}: {project}")
                    rows.append(measure(scenario, settings, project, conf, own.rate, own.seconds, own.keep))
        except (services.ServiceError, LoadFailed) as error:
            say(f"{parser.prog}: {error}")
            return error.exit_code
    compare(rows)
    if not own.json:
        print(f"{own.rate:,g} ticks/s for {own.seconds:g} s, {os.cpu_count()} cores\n\n{render_table(rows)}")
        for row in rows:
            if row["log"]:
                print(f"\nThe end of the job's log in {row['scenario']} ({row['outcome']}):")
                print("\n".join(f"  | {line}" for line in row["log"]))
        print()
    figures = {"rate": own.rate, "seconds": own.seconds, "cores": os.cpu_count(), "rows": rows}
    print(json.dumps({"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), **figures}))
    return 0 if all(row["outcome"] == EXACT for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
