"""Promises 1 to 3 while the streaming job, Kafka and HDFS die and come back: the tables are the oracle's in the end."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import hdfs
import psutil
import pytest

import services
from benchmarks.freshness import commits
from conf.settings import PROJECT, Settings
from lake.tables import BRONZE_TICKS, GOLD, SILVER_QUARANTINE, SILVER_TICKS
from tests.conftest import TEST_CONF
from tests.faults.conftest import ASSETS, FULL, SEED
from tests.killing import DAEMONS, kill_daemon, kill_executors
from tests.lakes import rows_of
from tests.listening import family
from tests.oracle import Record, Row, differences, lake_of
from tests.programs import ingestion, kafka_records, simulator, wait_until

# An hour; in scripts/test the end-to-end test has each of these faults once.
pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(not FULL, reason="scripts/faults stream"),
]
Show = Callable[..., None]
RATE = 1_000
PATIENCE = 600.0


class Stream:
    """The streaming job, started again whenever it ends, until told to finish."""

    def __init__(self, settings: Settings, logs: Path, on: str = "local", more: Sequence[str] = ()) -> None:
        """more: arguments of the job."""
        self._logs = logs
        self._files = hdfs.InsecureClient(settings.webhdfs_url)
        self._gold = [table.path(urlsplit(settings.lake_root).path) for table in GOLD]
        names = ("lake_root", "ticks_topic", "rejects_topic", "gaps_topic")
        given = [text for name in names for text in ("--" + name.replace("_", "-"), str(getattr(settings, name)))]
        self._command = ["./spark-submit.sh", "--on", on, "streaming/ticks.py", "--conf", str(TEST_CONF), *given, *more]
        self._process: psutil.Popen | None = None
        self._ended = threading.Event()
        self.starts: list[float] = []
        self.recoveries: list[float] = []

    def _start(self, *more: str) -> psutil.Popen:
        self.starts.append(time.time())
        with (self._logs / f"stream-{len(self.starts)}.log").open("wb") as log:
            return psutil.Popen([*self._command, *more], cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT)

    def _supervise(self) -> None:
        while not self._ended.is_set():
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            self._ended.wait(0.5)

    @contextmanager
    def running(self) -> Iterator[None]:
        supervisor = threading.Thread(target=self._supervise)
        supervisor.start()
        try:
            yield
        finally:
            self._ended.set()
            supervisor.join()
            self.kill()

    def kill(self) -> None:
        """kill -9 of the driver and all that it has started."""
        if self._process is not None and self._process.poll() is None:
            for process in family([self._process]):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait(60)

    def newest_gold(self) -> float:
        """When a table of gold was last written, in seconds since 1970; 0 if it cannot be told now."""
        try:
            return max((at for path in self._gold for _, at, _ in commits(self._files, path, 3)), default=0.0)
        except (hdfs.HdfsError, OSError):
            return 0.0

    def wait_for_gold(self, since: float) -> None:
        """Wait until the job has written gold again."""
        wait_until(lambda: self.newest_gold() > since, "gold is written again", PATIENCE)
        started = [at for at in self.starts if at < self.newest_gold()][-1]
        if started > since - 5:
            self.recoveries.append(self.newest_gold() - started)

    def finish(self) -> None:
        """What Kafka has now, to its end."""
        process = self._start("--once")
        assert process.wait(PATIENCE) == 0, (self._logs / f"stream-{len(self.starts)}.log").read_text()[-5000:]


def test_stream(own: Settings, running: Callable[..., Settings], folder: Path, show: Show) -> None:
    """The driver, the broker, a DataNode and the NameNode killed with -9 at random moments while ticks flow."""
    running("hdfs")
    faults = ["driver"] * 20 + ["broker", "datanode", "namenode"] * 3
    survive(own, Stream(lake_of_its_own(own), folder), faults, folder, show)


def test_stream_on_yarn(own: Settings, running: Callable[..., Settings], folder: Path, show: Show) -> None:
    """Executors killed with -9 at random moments while ticks flow."""
    running("hdfs", "yarn")
    stream = Stream(lake_of_its_own(own), folder, on="yarn-client")
    survive(own, stream, ["executor"] * 10, folder, show)
    assert len(stream.starts) == 2, "the driver outlives its executors: one start, and one for the rest"


def lake_of_its_own(own: Settings) -> Settings:
    return own.model_copy(update={"lake_root": f"{own.lake_root}/{own.ticks_topic}"})


def survive(own: Settings, stream: Stream, faults: list[str], folder: Path, show: Show) -> None:
    """Ticks flow while the faults happen in some order; at the end all tables are the oracle's."""
    settings = lake_of_its_own(own)
    chance = random.Random(11)
    chance.shuffle(faults)
    arguments = ("--assets", ",".join(ASSETS), "--rate", str(RATE), "--seed", str(SEED))
    with (
        simulator(folder, *arguments) as (market, url),
        ingestion(folder, settings, url, "--assets", ",".join(ASSETS)) as ingester,
    ):
        with stream.running():
            stream.wait_for_gold(0)
            for number, fault in enumerate(faults, 1):
                time.sleep(chance.uniform(0, 3))
                at = time.time()
                if fault == "driver":
                    stream.kill()
                elif fault == "executor":
                    wait_until(lambda: kill_executors(settings), "an executor runs", PATIENCE)
                else:
                    kill_daemon(settings, fault)
                    time.sleep(30 if fault == "namenode" else 1)
                    services.up(settings, [DAEMONS[fault]])
                    at = time.time()
                stream.wait_for_gold(at)
                print(f"{number} of {len(faults)}: {fault}, gold again {time.time() - at:.0f} s later", flush=True)
        market.stop()
        assert ingester.stop() == 0
        summary = ingester.line()
    stream.finish()

    names = (settings.ticks_topic, settings.rejects_topic, settings.gaps_topic)
    records = [
        Record(record.topic, record.partition, record.offset, record.key, record.value)
        for name in names
        for record in kafka_records(settings, name)
    ]
    expected = lake_of(records, ticks_topic=settings.ticks_topic, gaps_topic=settings.gaps_topic)
    tables: list[Mapping[Hashable, Row]] = [
        *(expected.silver, expected.quarantine),
        *(expected.price_5s, expected.price_1m, expected.price_5m, expected.price_1h, expected.price_1d),
        *(expected.rolling_price, expected.current_price, expected.alerts),
    ]
    assert rows_of(settings.lake_root, BRONZE_TICKS).keys() == expected.bronze.keys()
    for table, rows in zip((SILVER_TICKS, SILVER_QUARANTINE, *GOLD), tables, strict=True):
        assert differences(rows, rows_of(settings.lake_root, table)) == [], table.qualified_name
    show(
        **{name: faults.count(name) for name in sorted(set(faults))},
        acknowledged=summary["published"],
        in_bronze=len(expected.bronze),
        in_silver=len(expected.silver),
        alerts=len(expected.alerts),
        starts_of_the_job=len(stream.starts),
        recovery_seconds_median=round(median(stream.recoveries), 1) if stream.recoveries else None,
        recovery_seconds_most=round(max(stream.recoveries), 1) if stream.recoveries else None,
    )
