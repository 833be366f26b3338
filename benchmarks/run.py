"""A run of the streaming job under a load: both from start to end, watched meanwhile."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import hdfs

from benchmarks.backlog import say
from benchmarks.figures import WEBHDFS_LIMIT
from benchmarks.job import Job, MicroBatch, Usage, count_records
from benchmarks.load import KAFKA_LIMIT, Load, Market, Shape
from conf.settings import Settings, flag

# The query must run within so many seconds after its process has started, even on a busy machine.
START_LIMIT = 180.0
# The job must have processed all records within so many seconds after the load.
BEHIND_LIMIT = 300.0
LOOK_EVERY = 0.5
SAY_EVERY = 15.0


class JobFailed(RuntimeError):
    """The job died, or did not start in time, or fell behind. The message goes into the table."""


class Run:
    """One checkout's job on topics and a lake of its own. Every wait raises JobFailed and LoadFailed.

    rate: ticks a second; seconds: length of the load; folder: of the job's logs; environment: the job's, beyond ours;
    after: the market of an earlier run on the same topics.
    """

    def __init__(
        self,
        name: str,
        shape: Shape,
        settings: Settings,
        project: Path,
        conf: Path,
        folder: Path,
        rate: float,
        seconds: float,
        environment: Mapping[str, str] | None = None,
        after: Market | None = None,
    ) -> None:
        self._name, self._settings, self._project, self._conf = name, settings, project, conf
        self._folder, self._seconds, self._environment = folder, seconds, environment or {}
        self.market = Market(shape, rate, producer=uuid.uuid4().hex[:16], after=after)
        self.load = Load(settings, self.market, rate, seconds)
        self.jobs: list[Job] = []
        # CPU seconds of the killed jobs; usage of the last job when last measured.
        self.cpu_of_killed = 0.0
        self._usage = Usage(0.0, 0.0, 0.0)
        self._progress_at = 0.0

    def create_topics(self) -> None:
        self.load.start()
        self.wait(self.load.topics_exist.is_set, "Kafka creates the topics", KAFKA_LIMIT)

    def prepare(self) -> None:
        """Create the topics, and start the job; the load begins with `load.begin`."""
        self.create_topics()
        self.start_job()
        self.wait(self._query_runs, "the query runs", START_LIMIT)
        if self.jobs[-1].lacks_class_archive():
            say(f"{self._project}: Spark starts without the class archive, and later; scripts/setup there makes it")

    def start_job(self) -> float:
        """Start the job; returns the time in seconds since 1970."""
        names = ("kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "gaps_topic", "lake_root", "webhdfs_url")
        values = {name: getattr(self._settings, name) for name in names}
        values |= {"conf": self._conf, "checkpoint": self._settings.checkpoint_location}
        flags = [text for name, value in values.items() for text in (flag(name), str(value))]
        began = time.time()
        log = self._folder / f"job-{len(self.jobs)}.log"
        self.jobs.append(Job(self._project, flags, log, self._environment))
        return began

    def restart(self) -> float:
        """kill -9 of the job, and a new start; returns its time in seconds since 1970."""
        self.cpu_of_killed += self.look().cpu_seconds
        self.jobs[-1].kill()
        self._usage = Usage(0.0, 0.0, 0.0)
        say(f"{self._name}: killed, starts again")
        return self.start_job()

    def look(self) -> Usage:
        """The job's usage; of a dead job, the usage when last measured."""
        self._usage = self.jobs[-1].usage() or self._usage
        return self._usage

    def batches(self) -> list[MicroBatch]:
        """The micro-batches of all its jobs."""
        return [batch for job in self.jobs for batch in job.micro_batches()]

    def wait_for_all(self) -> None:
        """Wait until the job has taken all records of the load, which has ended."""
        what = f"all {self.market.records:,} records are taken"
        self.wait(lambda: count_records(self.batches()) >= self.market.records, what, BEHIND_LIMIT)

    def watch(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition during the load."""
        self.wait(condition, what, self._seconds * 2 + KAFKA_LIMIT)

    def wait(self, condition: Callable[[], bool], what: str, limit: float) -> None:
        """Wait until the condition holds, at most `limit` seconds, while the job lives and Kafka takes the load."""
        until = time.monotonic() + limit
        while not condition():
            self.load.check()
            if self.jobs:
                self.look()
                if (code := self.jobs[-1].exit_code) is not None:
                    raise JobFailed(f"died, exit code {code}, {self._after()}")
            if time.monotonic() > until:
                raise JobFailed(f"not within {limit:.0f} s: {what}")
            self._say_progress(what)
            time.sleep(LOOK_EVERY)

    def stop_job(self) -> bool:
        """End the job by SIGTERM; whether that was enough."""
        return self.jobs[-1].stop() if self.jobs else True

    def last_lines(self) -> list[str]:
        """The end of the job's log."""
        return self.jobs[-1].last_lines() if self.jobs else []

    def _query_runs(self) -> bool:
        """Whether the query runs: its checkpoint has the first offsets."""
        files = hdfs.InsecureClient(self._settings.webhdfs_url, timeout=WEBHDFS_LIMIT)
        noted = f"{urlsplit(self._settings.checkpoint_location).path}/sources/0/0"
        return files.status(noted, strict=False) is not None

    def _after(self) -> str:
        """The time since the begin, for a message."""
        began = self.load.began
        return f"{time.time() - began:.0f} s after the load began" if began else "before the load began"

    def _say_progress(self, what: str) -> None:
        if time.monotonic() - self._progress_at < SAY_EVERY:
            return
        self._progress_at = time.monotonic()
        batches = self.batches()
        last = f", last micro-batch {batches[-1].seconds} s" if batches else ""
        say(f"{self._name}: until {what}: {self.market.ticks:,} ticks, {len(batches)} micro-batches{last}")
