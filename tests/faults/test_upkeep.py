"""Promises 1 to 3 while upkeep and maintenance rearrange the lake and die at it: the tables are as the oracle says."""

from __future__ import annotations

import random
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from conf.settings import PROJECT, Settings
from lake.delta.files import files_of
from lake.delta.log import MAINTENANCE, LogIncomplete, TableLog
from lake.tables import BRONZE_TICKS, SILVER_TICKS
from tests.conftest import TEST_CONF
from tests.faults.conftest import FULL
from tests.faults.test_stream import Stream, lake_of_its_own, survive
from tests.listening import family

# Half an hour each. tests/streaming/test_upkeep.py and tests/batch/test_maintain.py have each fault once.
pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(not FULL, reason="scripts/faults upkeep"),
]
Show = Callable[..., None]
# Upkeep is at work most of the time, and deletes what it replaced a minute ago.
OFTEN = ("--upkeep-seconds", "1", "--history-minutes", "1")


def rearranged(settings: Settings) -> Counter[str]:
    """How many commits of which kind of maintenance the logs of bronze and silver have still."""
    files, kinds = files_of(settings.lake_root, settings.webhdfs_url), Counter[str]()
    for table in (BRONZE_TICKS, SILVER_TICKS):
        log = TableLog(files, table.path(settings.lake_root))
        with suppress(LogIncomplete):
            for version in range(log.newest(), -1, -1):
                if kind := log.metadata(version).get(MAINTENANCE):
                    kinds[kind] += 1
    return kinds


def test_upkeep(own: Settings, running: Callable[..., Settings], folder: Path, show: Show) -> None:
    """The driver and the NameNode killed with -9 at random moments while upkeep is at work."""
    running("hdfs")
    settings = lake_of_its_own(own)
    survive(own, Stream(settings, folder, more=OFTEN), ["driver"] * 20 + ["namenode"] * 3, folder, show)
    assert rearranged(settings)["upkeep"] > 0


class Maintainer:
    """batch/maintain.py, started again and again, and killed with -9 at random moments, but for every third time."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._log = folder / "maintain.log"
        arguments = ("--execute", "--older-than-minutes", "0", "--lake-root", settings.lake_root)
        self._command = ["./spark-submit.sh", "batch/maintain.py", "--conf", str(TEST_CONF), *arguments]
        self._ended = threading.Event()
        self.exits = Counter[int]()

    def _run(self) -> None:
        chance, number = random.Random(13), 0
        with self._log.open("ab") as log:
            while not self._ended.is_set():
                number += 1
                process = psutil.Popen(self._command, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT)
                if number % 3:
                    self._ended.wait(chance.uniform(3, 40))
                    for member in family([process]):
                        with suppress(psutil.NoSuchProcess):
                            member.kill()
                self.exits[process.wait(600)] += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block, and that of the last run."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


def test_upkeep_and_maintenance(own: Settings, running: Callable[..., Settings], folder: Path, show: Show) -> None:
    """Two batch/maintain.py beside the stream and its upkeep, all of them killed at random moments."""
    running("hdfs")
    settings = lake_of_its_own(own)
    one, other = Maintainer(settings, folder), Maintainer(settings, folder)
    with one.running(), other.running():
        survive(own, Stream(settings, folder, more=OFTEN), ["driver"] * 8 + ["namenode"], folder, show)
    exits = one.exits + other.exits
    # 2: before the stream has made the lake. 1: something was skipped, or the NameNode was away.
    assert set(exits) <= {0, 1, 2, -9}
    assert exits[0] + exits[1] > 0
    assert exits[-9] > 0
    assert rearranged(settings).keys() >= {"upkeep", "maintain"}
