"""Does a lake stay small and fast: `scripts/soak [--minutes 60] [--rate 1000] [--history-minutes 10]`

Starts ./spark-submit.sh streaming/ticks.py on topics and a lake of its own, sends ticks at a rate, and prints a row
each minute. At the end it ends the job with SIGTERM, compares the tables with the records sent, and lets batch/prove.py
recompute them.

batches      micro-batches that ended in this minute; batch s: their mean duration
p50, p99 s   from a tick's frame to the commit of gold.price_1m that contains it, of the micro-batches of this minute
files        in the lake's folder in HDFS; data: data files in the tables' folders; live: those of the newest versions,
             as of the logs' last checkpoints; log: files in the tables' logs, and their MB
NN files     files and folders in all of HDFS; NN heap MB: the least that the NameNode had in use. It grows between two
             collections; where the NameNode is this checkout's and there is a jcmd, it collects before each query
JVM, Python  resident memory of the driver's two processes
cores        processor cores that all the job's processes used in this minute
silver s     count(*) of silver.ticks by lake.reader in a process of its own: from opening the table to the answer,
             without Python's start, the median of three. gold 1m s: the same of today's gold.price_1m. Measured every
             five minutes, in shorter runs more often

Verdict: files, the NameNode's heap, the driver's memory and the query times are at the end at most 1.3 times those of
the middle of the run (of the tenth of the run until then; heap: the least, others: the median); count(*) takes less
than 0.5 s; the tables have each tick once; the proof holds. --against compares p50 and p99 with another run's, of which
FILE has the output: at most 1.1 times.

Then what a day at this load leaves at the default horizon, with the formulas, the CPU seconds per million ticks, and
one line of JSON.

Exit codes: 0 all verdicts hold, 1 one does not or the job died, 2 a wrong setting or argument, 3 to 6 a service did not
start (services/errors.py), 7 Kafka did not take the load.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import hdfs

import services
from benchmarks import cold, curves, growth
from benchmarks.backlog import say, started
from benchmarks.figures import find_difference, frame_to_gold, percentile
from benchmarks.follow import GoldFollower
from benchmarks.growth import Minute, Verdict
from benchmarks.instruments import TERMINATED
from benchmarks.load import LoadFailed, Shape
from benchmarks.places import own_places, remove_traces
from benchmarks.run import JobFailed, Run
from benchmarks.storage import NameNode, lake_files
from conf.settings import ENVIRONMENT_PREFIX, PROJECT, Settings, arguments, flag, from_command_line, settings_file
from lake.delta.files import files_of
from lake.tables import GOLD_PRICE_1M, SILVER_TICKS

HEAP_EVERY, COMMITS_EVERY = 2.0, 10.0
QUERY_EVERY_MINUTES, QUERY_TIMES = 5, 3
SILVER_COUNT = f"SELECT count(*) FROM {SILVER_TICKS.qualified_name}"
GOLD_COUNT = f"SELECT count(*) FROM {GOLD_PRICE_1M.qualified_name} WHERE window_date = DATE '{{}}'"
PROOF_LIMIT = 3_600.0


class Soak:
    """Watches a run from the load's begin to its end. period: seconds of a row, which are called a minute."""

    def __init__(self, settings: Settings, run: Run, minutes: int, period: float = 60.0) -> None:
        self._settings, self._run, self._minutes, self._period = settings, run, minutes, period
        self._query_every = max(1, min(QUERY_EVERY_MINUTES, minutes // 6))
        self._name_node = NameNode(settings)
        self._follower = GoldFollower(files_of(settings.lake_root, str(settings.webhdfs_url)), settings.lake_root)
        self._delays: list[float] = []
        self._heaps: list[float] = []
        # One query at a time, beside the rows: on a lake that grows it may take longer than a minute.
        self._asking = ThreadPoolExecutor(1)
        self._answers: Future[dict[str, float | None]] | None = None
        self._queried = 0
        self._heap_at = self._commits_at = 0.0
        self.rows: list[Minute] = []

    def watch(self, show: Callable[[Minute], None]) -> None:
        """Begin the load, and show each minute's row when it has ended. Raises JobFailed, LoadFailed, OSError."""
        self._cpu_seconds = self._run.look().cpu_seconds
        self._lake = lake_files(self._settings)
        self._run.load.begin()
        self._began = self._looked_at = self._run.load.began

        def has_ended() -> bool:
            self._look(show)
            return len(self.rows) == self._minutes

        self._run.watch(has_ended, "the end of the load")

    def _look(self, show: Callable[[Minute], None]) -> None:
        now, ends_at = time.time(), self._began + (len(self.rows) + 1) * self._period
        if now >= ends_at:
            self.rows.append(self._row())
            show(self.rows[-1])
        elif self._is_due() and now >= ends_at - self._period / 2:
            self._queried = len(self.rows) + 1
            self._answers = self._asking.submit(self._query)
        if time.time() - self._heap_at >= HEAP_EVERY:
            self._note_heap()
        if time.time() - self._commits_at >= COMMITS_EVERY:
            self._note_commits()

    def _is_due(self) -> bool:
        minute = len(self.rows) + 1
        return self._answers is None and self._queried < minute and minute % self._query_every == 0

    def _query(self) -> dict[str, float | None]:
        # Collected first: so the least of this minute is what the NameNode needs.
        self._name_node.collect()
        self._note_heap()
        seconds: dict[str, float | None] = {}
        today = GOLD_COUNT.format(datetime.now(UTC).date())
        for name, sql in (("silver_seconds", SILVER_COUNT), ("minutes_seconds", today)):
            try:
                seconds[name] = median(cold.measured(self._settings.lake_root, sql)[0] for _ in range(QUERY_TIMES))
            except cold.NoAnswer as error:
                say(f"no query time: {error}")
        return seconds

    def _answered(self) -> dict[str, float | None]:
        """The query times, if there are new ones; the last row waits for them."""
        if self._answers is None or not (self._answers.done() or len(self.rows) + 1 == self._minutes):
            return {}
        answers, self._answers = self._answers.result(), None
        return answers

    def _note_heap(self) -> None:
        self._heap_at = time.time()
        if (heap := self._name_node.heap_mb()) is not None:
            self._heaps.append(heap)

    def _note_commits(self) -> None:
        self._commits_at = time.time()
        self._delays += frame_to_gold(self._follower.read(), self._began)

    def _row(self) -> Minute:
        """The row of the minute that has ended, and a new begin."""
        looked_at, usage = time.time(), self._run.look()
        lake = lake_files(self._settings)
        self._note_commits()
        batches = [batch for batch in self._run.batches() if self._looked_at < batch.ended_at <= looked_at]
        commits = lake.commits_since(self._lake)
        seconds = looked_at - self._looked_at
        row = Minute(
            minute=len(self.rows) + 1,
            micro_batches=len(batches),
            micro_batch_seconds=round(fmean(batch.seconds for batch in batches), 3) if batches else None,
            frame_to_gold_p50=percentile(self._delays, 50),
            frame_to_gold_p99=percentile(self._delays, 99),
            files=lake.files,
            data_files=lake.total("data_files"),
            live_files=lake.total("live_files"),
            log_files=lake.total("log_files"),
            log_bytes=lake.total("log_bytes"),
            namenode_files=self._name_node.files(),
            heap_mb=round(min(self._heaps), 1) if self._heaps else None,
            jvm_mb=round(usage.jvm_mb),
            python_mb=round(usage.python_mb),
            cpu_cores=round((usage.cpu_seconds - self._cpu_seconds) / seconds, 2),
            commits=sum(commits.values()),
            written_files=round(sum(lake.tables[name].commit_files * count for name, count in commits.items())),
            written_log_bytes=round(sum(lake.tables[name].commit_bytes * count for name, count in commits.items())),
            **self._answered(),
        )
        self._lake, self._looked_at, self._cpu_seconds = lake, looked_at, usage.cpu_seconds
        self._delays, self._heaps = [], []
        return row


def environment_of(own: argparse.Namespace, settings: type[Settings] = Settings) -> dict[str, str]:
    """The job's environment: the soak's horizon and upkeep, where this checkout has these settings.

    A job refuses a setting that it does not know.
    """
    values = {"history_minutes": f"{own.history_minutes:g}", "upkeep": str(own.upkeep).lower()}
    known = {name: value for name, value in values.items() if name in settings.model_fields}
    if unknown := sorted(values.keys() - known.keys()):
        say(f"this checkout has no settings {', '.join(unknown)}: its job runs without them")
    return {f"{ENVIRONMENT_PREFIX}{name.upper()}": value for name, value in known.items()}


def default_horizon(own: argparse.Namespace, settings: type[Settings] = Settings) -> float:
    """The default of history_minutes; the run's own horizon in a checkout without this setting."""
    field = settings.model_fields.get("history_minutes")
    return float(field.default) if field else float(own.history_minutes)


def tables(settings: Settings, run: Run) -> Verdict:
    """Whether the tables have each tick once."""
    difference = find_difference(settings, run.market)
    ticks = f"{run.market.ticks:,} ticks in silver.ticks and in gold.price_1m, each once"
    return Verdict("the tables", difference is None, difference or ticks)


def proof(settings: Settings, project: Path, conf: Path, log: Path) -> Verdict:
    """Let batch/prove.py recompute the tables; its output goes to `log`."""
    names = ("lake_root", "webhdfs_url", "rejects_topic", "gaps_topic")
    flags = [text for name in names for text in (flag(name), str(getattr(settings, name)))]
    command = [str(project / "spark-submit.sh"), "batch/prove.py", "--conf", str(conf), *flags]
    with log.open("w", encoding="utf-8") as output:
        try:
            ran = subprocess.run(
                command, cwd=project, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=PROOF_LIMIT
            )
        except subprocess.TimeoutExpired:
            return Verdict("the proof", False, f"no end within {PROOF_LIMIT:.0f} s")
    text = log.read_text(encoding="utf-8", errors="replace")
    checks = [line for line in text.splitlines() if line.startswith(("holds", "BROKEN"))]
    broken = [line for line in checks if line.startswith("BROKEN")]
    why = f"batch/prove.py ended with exit code {ran.returncode}, {len(checks)} checks"
    return Verdict("the proof", ran.returncode == 0, "; ".join([why, *broken]))


def verdicts(rows: Sequence[Minute], others: Sequence[Minute]) -> list[Verdict]:
    """The verdicts on the figures. others: of the run to compare with, or none."""
    return [*growth.growth(rows), *growth.fast_queries(rows), *(growth.as_fresh(rows, others) if others else [])]


def rows_of(output: str) -> list[Minute]:
    """The rows of another run, of which this is the output. Raises ValueError."""
    lines = output.strip().splitlines()
    try:
        return [Minute(**row) for row in json.loads(lines[-1])["rows"]]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its last line is no figures of a soak ({error!r})") from None


def soak(
    settings: Settings,
    own: argparse.Namespace,
    conf: Path,
    others: Sequence[Minute] = (),
    period: float = 60.0,
    show: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Run it, and return the figures. Removes topics and lake, but keeps a failed run's logs. Raises LoadFailed.

    conf: the job's settings file. period: seconds of a row. show: gets each line for people.
    """
    settings, folder = own_places(settings)
    with ExitStack() as cleanup:
        if not own.keep:
            cleanup.callback(remove_traces, settings, folder)
        run = Run(
            *("soak", Shape(own.instruments), settings, PROJECT, conf, folder, own.rate, own.minutes * period),
            environment=environment_of(own),
        )
        rows, results = _watched(settings, own, run, period, show)
        if own.prove and results[0].holds:
            say("the proof: batch/prove.py recomputes the tables")
            results.append(proof(settings, PROJECT, conf, folder / "proof.log"))
        results += verdicts(rows, others)
        holds = all(verdict.holds is not False for verdict in results)
        if not holds and not own.keep:
            logs = folder.with_name(f"failed-{folder.name}")
            folder.rename(logs)
            say(f"the logs of the job and the proof are in {logs}")
    return _figures(own, rows, results, holds, show)


def _watched(
    settings: Settings, own: argparse.Namespace, run: Run, period: float, show: Callable[[str], None]
) -> tuple[list[Minute], list[Verdict]]:
    """The minutes, and the verdicts on the job's life and its tables."""
    watcher = Soak(settings, run, own.minutes, period)
    try:
        run.prepare()
        show(growth.header())
        watcher.watch(lambda row: show(growth.line(row)))
        run.wait(lambda: not run.load.is_alive(), "the end of the load", period)
        run.load.check()
        run.wait_for_all()
        if not run.stop_job():
            raise JobFailed("not ended by SIGTERM")
        job = Verdict("the job", True, "took all records, and was ended by SIGTERM")
        return watcher.rows, [job, tables(settings, run)]
    except JobFailed as error:
        for text in run.last_lines():
            say(f"  | {text}")
        return watcher.rows, [Verdict("the job", False, str(error))]
    finally:
        run.load.stop()
        run.stop_job()


def _figures(
    own: argparse.Namespace,
    rows: Sequence[Minute],
    results: Sequence[Verdict],
    holds: bool,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Show verdicts, the day and the curves; return all as one object for JSON."""
    show("")
    for verdict in results:
        show(str(verdict))
    figures: dict[str, Any] = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: getattr(own, name) for name in ("minutes", "rate", "instruments", "history_minutes", "upkeep")},
        "cores": os.cpu_count(),
        "holds": holds,
        "verdicts": [asdict(verdict) for verdict in results],
        "rows": [asdict(row) for row in rows],
    }
    if rows:
        day = growth.day(rows, own.history_minutes, default_horizon(own))
        show(f"\n{day}")
        figures["day"] = asdict(day)
        figures["cpu_seconds_a_million"] = round(growth.cpu_seconds_a_million(rows, own.rate), 1)
        show(f"\nThe job's processor time: {figures['cpu_seconds_a_million']:,} s per million ticks.")
        title = f"{own.rate:,g} ticks/s, {own.instruments} instruments, {'' if own.upkeep else 'no '}upkeep"
        curves.draw(rows, title, own.png)
        show(f"\nCurves: {own.png}\n")
    return figures


def parser_of() -> argparse.ArgumentParser:
    parser = arguments(__doc__, "kafka_bootstrap_servers", "lake_root", "webhdfs_url", "state_dir")
    parser.prog = "scripts/soak"
    parser.add_argument("--minutes", type=int, default=60, metavar="N", help="length of the load (default: 60)")
    parser.add_argument("--rate", type=float, default=1_000, metavar="N", help="ticks a second (default: 1000)")
    parser.add_argument("--instruments", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--history-minutes", type=float, default=10, metavar="N", help="old versions stay so long (default: 10)"
    )
    on_or_off = argparse.BooleanOptionalAction
    parser.add_argument("--upkeep", action=on_or_off, default=True, help="with the stream's upkeep (default)")
    parser.add_argument("--prove", action=on_or_off, default=True, help="let batch/prove.py end the run (default)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="output of another run, to compare delays with")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the curves (default: STATE_DIR/soak/soak.png)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--keep", action="store_true", help="remove neither topics nor lake nor logs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of()
    settings, own = from_command_line(parser, argv)
    if min(own.minutes, own.rate, own.instruments, own.history_minutes) <= 0:
        parser.error("--minutes, --rate, --instruments and --history-minutes must be above 0")
    own.png = own.png or settings.state_dir / "soak" / "soak.png"
    others: list[Minute] = []
    if own.against:
        try:
            others = rows_of(own.against.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--against {own.against}: {error}")
    conf = settings_file(os.environ, own.conf).resolve()
    # So SIGTERM too ends the job, and removes its topics and lake.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        with started(settings):
            figures = soak(settings, own, conf, others, show=say if own.json else print_now)
    except (services.ServiceError, LoadFailed) as error:
        say(f"{parser.prog}: {error}")
        return error.exit_code
    except (OSError, hdfs.HdfsError) as error:
        say(f"{parser.prog}: HDFS at {settings.webhdfs_url} failed, or a file here: {error}")
        return 1
    print(json.dumps(figures))
    return 0 if figures["holds"] else 1


def print_now(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
