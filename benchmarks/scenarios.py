"""A scenario of benchmarks/instruments.py: its load, its job from start to end, and its row of figures."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hdfs

from benchmarks.backlog import say
from benchmarks.figures import WEBHDFS_LIMIT, batch_figures, find_difference, gold_figures, read_gold_commits
from benchmarks.job import Job, MicroBatch, Usage, count_records
from benchmarks.load import KAFKA_LIMIT, Load, Market, Shape
from conf.settings import Settings, flag

ODD_SHARE, REPEAT_SHARE = 0.002, 0.01
SHARES = {
    None: (0.0, 0.0),
    "odd": (ODD_SHARE, 0.0),
    "repeats": (0.0, REPEAT_SHARE),
    "both": (ODD_SHARE, REPEAT_SHARE),
}
EXACT = "exact"

# The query must run within so many seconds after its process has started, even on a busy machine.
START_LIMIT = 180.0
# The job must have processed all records within so many seconds after the load.
BEHIND_LIMIT = 300.0
LOOK_EVERY = 0.5
SAY_EVERY = 15.0


class JobFailed(RuntimeError):
    """The job died, or did not start in time, or fell behind. The message goes into the table."""


@dataclass(frozen=True)
class Scenario:
    name: str
    shape: Shape
    restart: bool


def parse_scenario(name: str) -> Scenario:
    """Raises ValueError."""
    match = re.fullmatch(r"(restart-)?([1-9]\d{0,5})(?:\+(odd|repeats|both))?", name)
    if match is None:
        raise ValueError(f"{name!r} is no scenario: write N, N+odd, N+repeats, N+both, or restart- before one of these")
    return Scenario(name, Shape(int(match[2]), *SHARES[match[3]]), restart=match[1] is not None)


class Measurement:
    """The measurement of a scenario with one checkout's job."""

    def __init__(
        self,
        scenario: Scenario,
        settings: Settings,
        project: Path,
        conf: Path,
        folder: Path,
        rate: float,
        seconds: float,
    ) -> None:
        self._scenario, self._settings, self._project, self._conf = scenario, settings, project, conf
        self._folder = folder
        self._seconds = seconds
        self._market = Market(scenario.shape, rate, producer=uuid.uuid4().hex[:16])
        self._load = Load(settings, self._market, rate, seconds)
        self._jobs: list[Job] = []
        # CPU seconds of the killed jobs; usage of the last job when last measured.
        self._cpu_of_killed = 0.0
        self._usage = Usage(0.0, 0.0, 0.0)
        self._progress_at = 0.0

    def run(self) -> dict[str, Any]:
        """Run the scenario, and return its row. Raises LoadFailed."""
        try:
            self._load.start()
            self._wait(self._load.topics_exist.is_set, "Kafka creates the topics", KAFKA_LIMIT)
            self._start_job()
            self._wait(self._query_runs, "the query runs", START_LIMIT)
            if self._jobs[-1].lacks_class_archive():
                say(f"{self._project}: Spark starts without the class archive, and later; scripts/setup there makes it")
            cpu_before = self._look().cpu_seconds
            self._load.begin()
            since, restarted_at, failure = self._load.began, None, None
            try:
                if self._scenario.restart:
                    self._watch(lambda: time.time() >= self._load.began + self._seconds / 2, "half of the load")
                    since = restarted_at = self._restart()
                self._watch(lambda: not self._load.is_alive(), "the end of the load")
                self._load.check()
                self._wait(self._has_all, f"all {self._market.records:,} records are taken", BEHIND_LIMIT)
            except JobFailed as error:
                failure = error
            ended = time.time()
            self._load.stop()
            usage = self._look()
            cpu_seconds = self._cpu_of_killed + usage.cpu_seconds - cpu_before
            return self._row(since, ended, restarted_at, usage, cpu_seconds, failure)
        except JobFailed as error:
            return {**self._names(), "outcome": str(error), "log": self._last_lines()}
        finally:
            self._load.stop()
            if self._jobs:
                self._jobs[-1].stop()

    def _row(
        self,
        since: float,
        ended: float,
        restarted_at: float | None,
        usage: Usage,
        cpu_seconds: float,
        failure: JobFailed | None,
    ) -> dict[str, Any]:
        """End the job, read its tables, and make the row."""
        log = self._last_lines() if failure else []
        if not self._jobs[-1].stop() and failure is None:
            failure = JobFailed("not ended by SIGTERM")
        batches = self._jobs[-1].micro_batches()
        outcome = str(failure) if failure else find_difference(self._settings, self._market) or EXACT
        return {
            **self._names(),
            **batch_figures(batches, since, ended),
            **gold_figures(read_gold_commits(self._settings), since, self._load.ended, restarted_at),
            "cpu_seconds_per_1000": round(cpu_seconds / max(1, self._market.ticks) * 1_000, 3),
            "driver_jvm_mb": round(usage.jvm_mb),
            "driver_python_mb": round(usage.python_mb),
            "micro_batches": sum(len(job.micro_batches()) for job in self._jobs),
            "ticks": self._market.ticks,
            "odd": self._market.non_ticks,
            "repeats": self._market.repeats,
            "load_seconds": round(self._load.ended - self._load.began, 1),
            "outcome": outcome,
            "log": log,
        }

    def _names(self) -> dict[str, Any]:
        return {"scenario": self._scenario.name, "job": str(self._project), **asdict(self._scenario.shape)}

    def _start_job(self) -> float:
        """Start the job; returns the time in seconds since 1970."""
        names = ("kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "gaps_topic", "lake_root", "webhdfs_url")
        values = {name: getattr(self._settings, name) for name in names}
        values |= {"conf": self._conf, "checkpoint": self._settings.checkpoint_location}
        flags = [text for name, value in values.items() for text in (flag(name), str(value))]
        began = time.time()
        self._jobs.append(Job(self._project, flags, self._folder / f"job-{len(self._jobs)}.log"))
        return began

    def _query_runs(self) -> bool:
        """Whether the query runs: its checkpoint has the first offsets."""
        files = hdfs.InsecureClient(self._settings.webhdfs_url, timeout=WEBHDFS_LIMIT)
        noted = f"{urlsplit(self._settings.checkpoint_location).path}/sources/0/0"
        return files.status(noted, strict=False) is not None

    def _restart(self) -> float:
        self._cpu_of_killed += self._look().cpu_seconds
        self._jobs[-1].kill()
        self._usage = Usage(0.0, 0.0, 0.0)
        say(f"{self._scenario.name}: killed, starts again")
        return self._start_job()

    def _look(self) -> Usage:
        """The job's usage; of a dead job, the usage when last measured."""
        self._usage = self._jobs[-1].usage() or self._usage
        return self._usage

    def _batches(self) -> list[MicroBatch]:
        """The micro-batches of all its jobs."""
        return [batch for job in self._jobs for batch in job.micro_batches()]

    def _has_all(self) -> bool:
        return count_records(self._batches()) >= self._market.records

    def _watch(self, condition: Callable[[], bool], what: str) -> None:
        self._wait(condition, what, self._seconds * 2 + KAFKA_LIMIT)

    def _wait(self, condition: Callable[[], bool], what: str, limit: float) -> None:
        """Raises JobFailed if the job dies, or the condition does not hold in time, and LoadFailed."""
        until = time.monotonic() + limit
        while not condition():
            self._load.check()
            if self._jobs:
                self._look()
                if (code := self._jobs[-1].exit_code) is not None:
                    raise JobFailed(f"died, exit code {code}, {self._after()}")
            if time.monotonic() > until:
                raise JobFailed(f"not within {limit:.0f} s: {what}")
            self._say_progress(what)
            time.sleep(LOOK_EVERY)

    def _after(self) -> str:
        """The time since the begin, for a message."""
        began = self._load.began
        return f"{time.time() - began:.0f} s after the load began" if began else "before the load began"

    def _say_progress(self, what: str) -> None:
        if time.monotonic() - self._progress_at < SAY_EVERY:
            return
        self._progress_at = time.monotonic()
        batches = self._batches()
        last = f", last micro-batch {batches[-1].seconds} s" if batches else ""
        say(f"{self._scenario.name}: until {what}: {self._market.ticks:,} ticks, {len(batches)} micro-batches{last}")

    def _last_lines(self) -> list[str]:
        return self._jobs[-1].last_lines() if self._jobs else []
